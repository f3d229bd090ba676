"""Figures show what they are given: values, intervals, marks, labels."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unike.report.paper import figures
from unike.report.paper.figures import EditedAnswer, Interval, Point, ProbePanel, Space, Sweep, WorkedExample
from unike.types import UserError


def value(mean: float) -> Interval:
    return Interval(mean, mean - 2, mean + 1)


def bar_ends(container) -> list[tuple[float, float]]:
    """Low and high of each vertical error bar."""
    return [tuple(segment[:, 1]) for segment in container.lines[2][0].get_segments()]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# ---------------------------------------------------------------- drawing


def test_the_trade_off_shows_ours_filled_with_intervals_and_the_papers_hollow() -> None:
    points = [
        Point("UniKE", value(90), value(80), (70.0, 60.0)),
        Point("UniKE, scoped", value(95), value(85)),
    ]
    figure = figures.draw_trade_off({"one": points, "two": points[:1]})
    axes = figure.axes[0]
    assert [a.get_title() for a in figure.axes] == ["one", "two"]
    ours = [(*(float(v[0]) for v in c.lines[0].get_data()),) for c in axes.containers]
    assert ours == [(90, 80), (95, 85)]
    up, right = axes.containers[0].lines[2][::-1], axes.containers[0].lines[2]
    assert up[0].get_segments()[0][:, 1].tolist() == [78, 81]
    assert right[0].get_segments()[0][:, 0].tolist() == [88, 91]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert [line.get_xydata().tolist() for line in hollow] == [[[70, 60]]]
    assert hollow[0].get_markeredgecolor() == axes.containers[0].lines[0].get_color()
    assert legend(figure) == ["UniKE", "UniKE, scoped", "hollow: the paper"]
    low, high = axes.get_xlim()
    assert low < 70
    assert high > 100


def test_variants_share_a_colour_and_no_two_methods_a_marker() -> None:
    look = figures.choose_looks(["FT (last layer)", "UniKE", "FT (vision projection)", "UniKE, scoped"])
    assert look["FT (last layer)"][0] == look["FT (vision projection)"][0] != look["UniKE"][0]
    assert look["UniKE"][0] == look["UniKE, scoped"][0]
    assert len({marker for _, marker in look.values()}) == 4


def test_the_scale_near_100_is_monotone_and_undone_by_its_inverse() -> None:
    values = np.array([0.0, 50.0, 90.0, 99.0, 100.0])
    spread = figures._spread(values)
    assert (np.diff(spread) > 0).all()
    assert np.allclose(figures._unspread(spread), values)


def test_a_sweep_joins_its_settings_and_leaves_those_apart_alone() -> None:
    sweep = Sweep(
        "alpha", ["0.1", "0.3", "adaptive"], {"locality": [value(v) for v in (50, 60, 70)]}, apart=1
    )
    axes = figures.draw_sweeps({("row", "column"): sweep}).axes[0]
    joined, alone = axes.containers
    assert joined.lines[0].get_ydata().tolist() == [50, 60]
    assert alone.lines[0].get_ydata().tolist() == [70]
    assert joined.lines[0].get_linestyle() != "None" == alone.lines[0].get_linestyle()
    assert bar_ends(joined) == [(48, 51), (58, 61)]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0.1", "0.3", "adaptive"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("alpha", "row, %", "column")


def test_lines_that_coincide_do_not_cover_each_other() -> None:
    same = [value(100), value(100)]
    axes = figures.draw_sweeps({("r", "c"): Sweep("k", ["1", "5"], {"a": same, "b": same})}).axes[0]
    first, second = (c.lines[0] for c in axes.containers)
    assert first.get_xdata()[0] != second.get_xdata()[0]
    assert first.get_linestyle() != second.get_linestyle()


def test_bars_reach_their_values_from_the_axis_on_and_the_label_says_from_where() -> None:
    panel = {"generality": {"none": value(95), "random": value(90)}}
    figure = figures.draw_grouped_bars({"one": panel}, {"one": {"generality": {"none": 84.0}}})
    axes = figure.axes[0]
    tops = [bar.get_y() + bar.get_height() for c in axes.containers if hasattr(c, "patches") for bar in c]
    assert tops == [95, 90]
    floor = axes.get_ylim()[0]
    assert floor == 80
    assert axes.get_ylabel() == "%, from 80"
    diamonds = [line for line in axes.lines if line.get_marker() == "D"]
    assert [line.get_ydata().tolist() for line in diamonds] == [[84.0], []]
    assert set(legend(figure)) == {"none", "random", "the paper"}


def test_spaces_tell_right_from_wrong_by_more_than_colour_and_join_a_questions_answers() -> None:
    right, wrong = np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[4.0, 5.0], [6.0, 7.0]])
    axes = figures.draw_spaces({"one": {"raw": Space(right, wrong, "a note")}}).axes[0]
    joined, first, second = axes.lines
    assert first.get_xydata().tolist() == right.tolist()
    assert second.get_xydata().tolist() == wrong.tolist()
    assert first.get_marker() != second.get_marker()
    pairs = joined.get_xydata()
    assert pairs[[0, 1, 3, 4]].tolist() == [[0, 1], [4, 5], [2, 3], [6, 7]]
    assert np.isnan(pairs[[2, 5]]).all()
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("raw", "a note", "one")


def test_an_example_marks_what_holds_and_does_not_repeat_an_answer(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(picture)
    after = {"scoped": EditedAnswer("deer", True), "preset": EditedAnswer("owl", False)}
    panels = [
        ProbePanel("edited", str(picture), "What?", "deer", after),
        ProbePanel("text", None, "Who?", "x", after),
    ]
    figure = figures.draw_examples([WorkedExample("E-VQA: deer", panels), WorkedExample("again", panels[:1])])
    texts = [t.get_text() for t in figure.texts]
    assert {
        "E-VQA: deer",
        "again",
        "edited",
        "What?",
        "before: deer",
        "✓ scoped: as before",
        "✗ preset: owl",
    } <= {*texts}
    assert len(figure.axes) == 2
    assert figure.axes[0].images[0].get_array()[0, 0].tolist() == [255, 0, 0]


def test_no_line_of_an_example_is_wider_than_its_column() -> None:
    panel = ProbePanel(
        "heading " * 4, None, "question " * 9, "answer " * 9, {"scoped": EditedAnswer("word " * 20, True)}
    )
    assert max(len(line) for line, _, _ in figures.wrap_panel(panel, 24)) <= 24


def test_the_same_data_give_the_same_files(tmp_path: Path) -> None:
    panels = {("r", "c"): Sweep("k", ["1"], {"a": [value(50)]})}
    first = figures.save(figures.draw_sweeps(panels), tmp_path / "a" / "figure")
    second = figures.save(figures.draw_sweeps(panels), tmp_path / "b" / "figure")
    assert [p.suffix for p in first] == [".png", ".svg"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_a_large_drawing_is_kept_as_pixels_only(tmp_path: Path, monkeypatch) -> None:
    figure = figures.draw_sweeps({("r", "c"): Sweep("k", ["1"], {"a": [value(50)]})})
    figures.save(figure, tmp_path / "figure")
    monkeypatch.setattr(figures, "SVG_BYTES", 10)
    assert figures.save(figure, tmp_path / "figure") == [tmp_path / "figure.png"]
    assert not (tmp_path / "figure.svg").exists()


def test_a_missing_package_is_told_with_the_extra_that_has_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib: not installed.*unike\[figures\]"):
        figures.draw_trade_off({})
