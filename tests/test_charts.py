"""Charts of pages: that they show the numbers they are given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unike.report.charts import draw_curve, draw_histogram, draw_shares


def test_shares_fill_their_rows() -> None:
    chart = draw_shares("t", {"a": [1, 0, 3], "b": [0, 0, 2]}, ("no", "half", "all"))
    widths = {(bar.series, bar.y): bar.width for bar in chart.bars}
    assert widths[0, 3] * 3 == pytest.approx(widths[2, 3])
    assert widths[0, 3] + widths[2, 3] == pytest.approx(widths[2, 29])
    assert chart.description == "a: no 1, all 3; b: all 2"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_histograms_count_every_value(values: list[float]) -> None:
    chart = draw_histogram("t", {"a": values})
    assert chart is not None
    assert sum(int(bar.hint.rsplit(": ", 1)[1]) for bar in chart.bars) == len(values)
    assert all(bar.y >= 0 and bar.y + bar.height <= chart.height and bar.height > 0 for bar in chart.bars)


def test_whole_numbers_have_a_bin_each() -> None:
    chart = draw_histogram("t", {"a": [3, 3, 5]})
    assert chart is not None
    assert [bar.hint for bar in chart.bars] == ["a, 3: 2", "a, 5: 1"]
    assert chart.bars[1].x - chart.bars[0].x == pytest.approx(2 * chart.width / 3)


def test_curves_end_at_the_last_edit() -> None:
    chart = draw_curve("t", {"a": [100.0, 50.0, 0.0], "b": [0.0, 0.0]}, 4)
    xs = [[float(point.split(",")[0]) for point in line.split()] for line in chart.lines]
    assert xs[0][-1] == xs[1][-1]
    assert xs[1][0] == xs[0][1]


def test_a_histogram_of_nothing_is_none() -> None:
    assert draw_histogram("t", {"a": []}) is None
    assert draw_histogram("t", {"a": [], "b": [2.0]}) is not None
