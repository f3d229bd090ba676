"""Charts of pages: that they show the numbers they are given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unike.report.charts import LEFT, Chart, describe_constant, draw_curve, draw_histogram, draw_shares


def list_axes(chart: Chart) -> list[str]:
    return [word.text for word in chart.words if "axis" in word.look.split()]


def test_shares_fill_their_rows() -> None:
    chart = draw_shares("t", {"a": [1, 0, 3], "b": [0, 0, 2]}, ("no", "half", "all"))
    assert chart is not None
    assert list_axes(chart) == ["probe", "cases, in percent"]
    widths = {(bar.series, bar.y): bar.width for bar in chart.bars}
    assert widths[0, 3] * 3 == pytest.approx(widths[2, 3])
    assert widths[0, 3] + widths[2, 3] == pytest.approx(widths[2, 29])
    assert chart.description == "a: no 1, all 3; b: all 2"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_histograms_count_every_value(values: list[float]) -> None:
    chart = draw_histogram("t", {"a": values}, "x", "y")
    if min(values) == max(values):
        assert chart is None, "one bar says no more than a sentence"
        assert describe_constant("t", {"a": values}).startswith("t: ")
        return
    assert chart is not None
    assert describe_constant("t", {"a": values}) == ""
    assert list_axes(chart) == ["y", "x"]
    assert len({bar.x for bar in chart.bars}) > 1
    assert sum(int(bar.hint.rsplit(": ", 1)[1]) for bar in chart.bars) == len(values)
    assert all(bar.y >= 0 and bar.y + bar.height <= chart.height and bar.height > 0 for bar in chart.bars)


def test_whole_numbers_have_a_bin_each() -> None:
    chart = draw_histogram("t", {"a": [3, 3, 5]}, "x", "y")
    assert chart is not None
    assert [bar.hint for bar in chart.bars] == ["a, 3: 2", "a, 5: 1"]
    assert chart.bars[1].x - chart.bars[0].x == pytest.approx(2 * (chart.width - LEFT) / 3)


def test_curves_end_at_the_last_edit() -> None:
    chart = draw_curve("t", {"a": [100.0, 50.0, 0.0], "b": [0.0, 0.0]}, 4, "edits", "%")
    assert chart is not None
    assert list_axes(chart) == ["%", "edits"]
    xs = [[float(point.split(",")[0]) for point in line.split()] for line in chart.lines]
    assert xs[0][-1] == xs[1][-1]
    assert xs[1][0] == xs[0][1]


def test_what_has_one_value_is_a_sentence() -> None:
    assert draw_histogram("t", {"a": []}, "x", "y") is None
    assert describe_constant("t", {"a": []}) == ""
    assert draw_histogram("t", {"a": [], "b": [2.0]}, "x", "y") is None
    assert describe_constant("Steps", {"a": [], "b": [2.0]}) == "Steps: 2 (one value)."
    assert describe_constant("Seconds", {"a": [0.25] * 3}) == "Seconds: 0.25 in all 3 values."
    assert draw_shares("t", {"a": [1, 2]}, ("no", "yes")) is None
    assert draw_curve("t", {"a": [50.0], "b": []}, 2, "edits", "%") is None


def test_close_ends_are_told_apart() -> None:
    chart = draw_histogram("t", {"a": [0.0701, 0.0702]}, "x", "y")
    assert chart is not None
    assert {"0.0701", "0.0702"} <= {word.text for word in chart.words}


def test_long_names_of_rows_have_room() -> None:
    short, long = (draw_shares("t", {name: [1], "b": [1]}, ("all",)) for name in ("a", "M-Gen low contrast"))
    assert short is not None
    assert long is not None
    assert long.bars[0].x > short.bars[0].x
    assert long.bars[0].x > 5 * len("M-Gen low contrast")
