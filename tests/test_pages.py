"""What pages say at a glance: the verdict, dots for probes, coloured cells, and what is folded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_runs import ended, save_run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compare import WITHOUT
from test_report import HOSTILE, Read, shown, shown_text

from unike.evaluation.record import Record
from unike.evaluation.summary import TITLES
from unike.report.compare import Comparison, Difference, compare
from unike.report.compare_page import build_comparison_page, write_comparison
from unike.report.page import TEMPLATES
from unike.report.run_page import build_run_page
from unike.report.verdict import LEAST_UNITS, format_number, judge_comparison, judge_run
from unike.tables import main as compare_main
from unike.types import FIVE_METRICS, METRICS, UserError


def passing(number: int, names: Sequence[str], asked: Sequence[str] = METRICS) -> dict[str, Any]:
    """A record of the ``asked`` probes, of which ``names`` pass."""
    made = ended(number)
    some = made["answers"]["reliability"]
    made["answers"] = dict.fromkeys(asked, some)
    made["scores"] = {
        mode: {name: {"before": 0.0, "after": float(name in names)} for name in asked}
        for mode in ("teacher_forced", "generated")
    }
    return made


def all_but(*names: str) -> list[str]:
    return [name for name in METRICS if name not in names]


# ---------------------------------------------------------------- the verdict of a run


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sets(st.sampled_from(METRICS)), min_size=1, max_size=7))
def test_the_verdict_counts_as_a_slow_count_does(sets: list[set[str]]) -> None:
    records = [Record.from_json(passing(i, list(names))) for i, names in enumerate(sets)]
    verdict = judge_run(records, "generated")
    whole = sum(names == set(METRICS) for names in sets)
    taken = sum("reliability" in names for names in sets)
    assert verdict.startswith(f"{whole} of {len(sets)} cases pass all 8 probes (generated answers). ")
    assert f"{taken} of {len(sets)} edits give the target." in verdict
    fails = Counter(name for names in sets for name in METRICS if name not in names)
    if not fails:
        assert "Most failures" not in verdict
        return
    worst, count = re.search(r"Most failures: (.+), (\d+) of \d+\.", verdict).groups()  # type: ignore[union-attr]
    assert int(count) == max(fails.values())
    assert fails[{title: name for name, title in TITLES.items()}[worst]] == max(fails.values())


def test_the_verdict_of_a_run_stands_at_the_top(tmp_path: Path) -> None:
    records = [passing(0, METRICS), passing(1, all_but("same_question")), passing(2, all_but("joint"))]
    records += [passing(3, all_but("joint", "m_locality")), {"id": "x", "status": "failed", "error": "e"}]
    run = save_run(tmp_path / "run", records)
    words = (
        "1 of 4 cases pass all 8 probes (generated answers). 4 of 4 edits give the target. Most failures: "
        "joint, 2 of 4. 1 of 5 records failed."
    )
    assert build_run_page(run).verdict == words
    html = (run / "report.html").read_text() if shown(run) else ""
    assert html.index(words) < html.index("<table>")
    assert html.index("<h1>") < html.index(words)


def test_a_verdict_without_cases() -> None:
    failed = Record.from_json({"id": "x", "status": "failed", "error": "e"})
    assert judge_run([], "generated") == "There is no record yet."
    assert judge_run([failed], "generated") == "No case was evaluated."
    few = [Record.from_json(ended(0))]
    assert judge_run(few, "teacher_forced").startswith("1 of 1 cases pass all 5 probes (teacher-forced).")


def test_further_probes_do_not_change_the_verdict() -> None:
    asked = [*METRICS, "minimal_pair"]
    records = [Record.from_json(passing(i, METRICS, asked)) for i in range(3)]
    assert judge_run(records, "generated").startswith("3 of 3 cases pass all 8 probes")


# ---------------------------------------------------------------- dots


def dots_of(page: Read) -> list[str]:
    return [str(a["aria-label"]) for a in page.of("span") if a.get("class") == "dots"]


def test_each_case_has_a_dot_per_probe_and_names_those_that_fail(tmp_path: Path) -> None:
    records = [passing(0, METRICS), passing(1, all_but("same_question", "t_locality"))]
    records += [passing(2, METRICS, all_but("joint"))]
    run = save_run(tmp_path / "run", records)
    first, second, third = build_run_page(run).cases
    assert [passes for _, passes in first.dots[0].dots] == [True] * 8
    assert dict(second.dots[0].dots) == {
        TITLES[name]: name not in ("same_question", "t_locality") for name in METRICS
    }
    assert second.fails == ("T-Locality", "same question")
    assert dict(third.dots[0].dots)["joint"] is None, "not evaluated, and the others keep their places"
    page = shown(run)
    assert dots_of(page) == [
        "8 of 8 probes pass",
        "6 of 8 probes pass; T-Locality, same question fail",
        "7 of 7 probes pass",
    ]
    marks = [str(a["class"]) for a in page.of("i")]
    assert Counter(marks) == {"pass": 8 + 6 + 7, "fail": 2, "none": 1}
    assert "fails: T-Locality; same question" in page.text
    # Another sign for each, not another colour alone.
    signs = re.findall(r'<i class="(\w+)" title="[^"]*">(.)</i>', (run / "report.html").read_text())
    assert dict(signs) == {"pass": "●", "fail": "✗", "none": "-"}


def test_further_probes_have_dots_of_their_own(tmp_path: Path) -> None:
    asked = [*METRICS, "minimal_pair", HOSTILE]
    run = save_run(tmp_path / "run", [passing(0, METRICS, asked)])
    (view,) = build_run_page(run).cases
    assert view.dots[0].standard == 8
    assert [passes for _, passes in view.dots[0].dots] == [True] * 8 + [False] * 2
    assert len(shown(run).of("i")) == 10


def test_a_failed_case_has_no_dots(tmp_path: Path) -> None:
    page = build_run_page(save_run(tmp_path / "run", [{"id": "x", "status": "failed", "error": "e"}]))
    assert page.cases[0].dots == ()


def test_pictures_are_named_as_the_probes_they_are(tmp_path: Path) -> None:
    one = save_run(tmp_path / "a", [ended(i) for i in range(3)], tmp_path / "data")
    lost = [WITHOUT["reliability"], WITHOUT["m_locality"], WITHOUT["t_locality"]]
    other = save_run(tmp_path / "b", [ended(i, names) for i, names in enumerate(lost)])
    assert [view.label for view in build_run_page(one).cases] == ["Reliability"] * 3
    views = build_comparison_page(compare(one, other), {}).cases
    assert [view.label for view in views] == ["Reliability", "M-Locality", "T-Locality"]
    for view in views:
        assert view.label == view.probes[0].title
        assert view.image == view.probes[0].image
    html = write_comparison(compare(one, other), one, tmp_path / "page.html").read_text()
    labels = re.findall(r'<span class="thumb">.*?<small>(.*?)</small></span>', html)
    assert labels == ["Reliability", "M-Locality", "T-Locality"]


# ---------------------------------------------------------------- tables and charts


def test_cells_are_coloured_by_value_and_have_a_bar_as_long(tmp_path: Path) -> None:
    records = [
        passing(i, all_but(*(["joint"] if i < 3 else []), *(["same_image"] if i else []))) for i in range(4)
    ]
    run = save_run(tmp_path / "run", records)
    (table,) = build_run_page(run).tables
    cells = {row[0].text: row[-1] for row in table.rows}
    assert (cells["Reliability"].look, cells["Reliability"].share) == ("good", 100.0)
    assert (cells["joint"].look, cells["joint"].share, cells["joint"].text) == ("bad", 25.0, "25.0")
    assert (cells["same image"].look, cells["same image"].text) == ("bad", "25.0")
    page = shown(run)
    widths = Counter(str(a["width"]) for a in page.of("rect") if a.get("height") == "4")
    assert widths["25.0"] == 4, "two metrics, in two evaluation modes"
    assert [a for a in page.of("td") if a.get("class") == "bad"]


@pytest.mark.parametrize(("kept", "look"), [(10, "good"), (9, "good"), (8, "fair"), (5, "fair"), (4, "bad")])
def test_the_looks_thresholds(tmp_path: Path, kept: int, look: str) -> None:
    records = [ended(i, FIVE_METRICS if i < kept else WITHOUT["m_locality"]) for i in range(10)]
    (table,) = build_run_page(save_run(tmp_path / "run", records)).tables
    assert {row[0].text: row[-1].look for row in table.rows}["M-Locality"] == look


@pytest.mark.parametrize("value", [-3.0, 7.0])
@pytest.mark.parametrize("side", ["before", "after"])
def test_scores_out_of_their_range_are_refused(tmp_path: Path, value: float, side: str) -> None:
    record = ended(0)
    for scores in record["scores"].values():
        scores["reliability"][side] = value
    with pytest.raises(UserError, match="scores is not as a run writes it"):
        build_run_page(save_run(tmp_path / "run", [record]))


def test_further_rows_are_folded(tmp_path: Path) -> None:
    asked = [*METRICS, "minimal_pair"]
    (table,) = build_run_page(save_run(tmp_path / "run", [passing(0, METRICS, asked)])).tables
    titles = [row[0].text for row in table.rows]
    assert titles == [*(TITLES[name] for name in METRICS), "harmonic mean of 5", "harmonic mean of all 8"]
    assert [row[0].text for row in table.rest] == ["same question, minimal pair", "of 8, with minimal pairs"]
    page = shown(tmp_path / "run")
    assert [a for a in page.of("details") if a.get("class") == "rest"]


def test_an_evaluation_mode_that_the_run_lacks_has_no_column(tmp_path: Path) -> None:
    record = ended(0)
    both = build_run_page(save_run(tmp_path / "both", [record])).tables[0]
    del record["scores"]["generated"]
    one = build_run_page(save_run(tmp_path / "one", [record])).tables[0]
    assert [cell.text for cell in both.header][2:] == ["after, teacher-forced", "after, generated"]
    assert [cell.text for cell in one.header][2:] == ["after, teacher-forced"]
    assert {len(row) for row in one.rows} == {3}


def test_tables_fit_a_phone(tmp_path: Path) -> None:
    """Each table can scroll, named and by keyboard; on a narrow screen an interval has a line of its own. A
    browser is asked in ``test_browser``."""
    page = shown(save_run(tmp_path / "run", [passing(0, METRICS, [*METRICS, "minimal_pair"])]))
    wide = [a for a in page.of("div") if a.get("class") == "wide"]
    assert len(wide) == len(page.of("table")) == 2
    ids = {a.get("id") for _, a in page.tags}
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-labelledby"] in ids for a in wide)
    style = (TEMPLATES / "page.css").read_text()
    assert ".wide { overflow-x: auto; }" in style
    narrow = style[style.index("@media (max-width: 60rem)") :]
    assert ".interval { display: block; }" in narrow


def test_what_would_be_one_bar_is_a_sentence(tmp_path: Path) -> None:
    same = [ended(i, steps=3, seconds=0.25) for i in range(4)]
    page = build_run_page(save_run(tmp_path / "same", same))
    assert {"Steps per edit: 3 in all 4 values.", "Seconds per edit: 0.25 in all 4 values."} <= set(
        page.constants
    )
    assert not [chart for chart in page.charts if chart.title in ("Steps per edit", "Seconds per edit")]
    assert "Steps per edit: 3 in all 4 values." in shown(tmp_path / "same").text
    other = build_run_page(save_run(tmp_path / "other", [ended(i, steps=3 + i) for i in range(4)]))
    assert [chart for chart in other.charts if chart.title == "Steps per edit"]
    for chart in (*page.charts, *other.charts):
        assert len(chart.bars) > 1
        assert len([word for word in chart.words if "axis" in word.look.split()]) == 2, (
            "both axes have titles"
        )


# ---------------------------------------------------------------- two runs


def make_runs(folder: Path, a: Sequence[Sequence[str]], b: Sequence[Sequence[str]]) -> tuple[Path, Path]:
    """Two runs whose records pass the named probes."""
    made = [[passing(i, names) for i, names in enumerate(sets)] for sets in (a, b)]
    return save_run(folder / "a", made[0]), save_run(folder / "b", made[1])


def resample(differences: Sequence[float]) -> tuple[float, float, float]:
    """A naive paired bootstrap, in percent."""
    values = 100 * np.array(differences)
    drawn = np.random.default_rng(1).integers(0, len(values), (2000, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def say(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def test_the_verdict_of_two_runs_has_the_numbers_of_a_slow_bootstrap(tmp_path: Path) -> None:
    a = [all_but("same_question") if i < 9 else METRICS for i in range(20)]
    b = [all_but("joint") if i < 6 else METRICS for i in range(20)]
    found = compare(*make_runs(tmp_path, a, b))
    (gain, low, high), (loss, least, most) = (resample([1.0] * n + [0.0] * (20 - n)) for n in (9, 6))
    assert min(low, least) > 0
    on_q = f"same question by {say(gain)} [{say(low)}, {say(high)}]"
    on_joint = f"joint by {say(loss)} [{say(least)}, {say(most)}]"
    assert judge_comparison(found) == (
        f"B is better on {on_q}; A is better on {on_joint} (generated answers). No certain difference on 6 "
        "of 8 metrics (generated answers)."
    )
    turned = judge_comparison(compare(tmp_path / "b", tmp_path / "a"))
    assert turned.startswith(f"B is better on {on_joint}; A is better on {on_q} (generated")


def test_a_difference_that_may_be_none_is_no_verdict(tmp_path: Path) -> None:
    a = [all_but("same_question") if i < 2 else METRICS for i in range(20)]
    b = [METRICS] * 20
    gain, low, high = resample([1.0] * 2 + [0.0] * 18)
    assert low == 0
    assert judge_comparison(compare(*make_runs(tmp_path, a, b))) == (
        "Neither run is certainly better. Every 95% interval includes 0. Largest difference: same question, "
        f"B by {say(gain)} [0, {say(high)}]."
    )
    equal = judge_comparison(compare(tmp_path / "b", tmp_path / "b"))
    assert equal == "Both runs have the same means on all 8 metrics."


@pytest.mark.parametrize("count", [1, LEAST_UNITS - 1, LEAST_UNITS])
def test_few_records_are_no_verdict(tmp_path: Path, count: int) -> None:
    """All of them differ: the interval is [100, 100], whatever their number."""
    runs = make_runs(tmp_path, [all_but("joint")] * count, [METRICS] * count)
    verdict = judge_comparison(compare(*runs))
    assert verdict.startswith("B is better on joint by 100 [100, 100]") == (count >= LEAST_UNITS)
    assert ("too few" in verdict) == (count < LEAST_UNITS)
    looks = {cell.look for row in build_comparison_page(compare(*runs), {}).tables[0].rows for cell in row}
    assert ("b" in looks) == (count >= LEAST_UNITS)


def test_sequences_are_counted_not_their_records(tmp_path: Path) -> None:
    made = []
    for names in (all_but("joint"), METRICS):
        place = {"position": 1, "kind": "final"}
        made.append([passing(i, names) | place | {"sequence": i % 2, "case": f"vqa-{i}"} for i in range(12)])
    runs = save_run(tmp_path / "a", made[0]), save_run(tmp_path / "b", made[1])
    assert "2 sequences: too few, 8 are needed" in judge_comparison(compare(*runs))


def test_no_row_is_marked_that_the_verdict_denies(tmp_path: Path) -> None:
    """A certain difference in the other evaluation mode, or of a mean, is said too."""

    def make(mode: str, measure: str) -> Comparison:
        differences = (
            Difference("joint", "generated", 20, 50.0, 55.0, -1.0, 11.0),
            Difference(measure, mode, 20, 50.0, 60.0, 2.0, 18.0),
        )
        return Comparison(("a", "b"), records, records, 0, "generated", differences, ())

    records = {f"{i}": Record.from_json(passing(i, METRICS)) for i in range(20)}
    assert judge_comparison(make("teacher_forced", "joint")) == (
        "B is better on joint by 10 [2, 18] (teacher-forced). No certain difference on 1 of 1 metrics "
        "(generated answers)."
    )
    assert judge_comparison(make("generated", "all")).startswith(
        "B is better on harmonic mean of all 8 by 10 [2, 18] (generated answers)."
    )


def test_a_long_verdict_names_the_largest(tmp_path: Path) -> None:
    names = METRICS[:5]
    a = [[m for k, m in enumerate(METRICS) if m not in names or i >= 20 - k] for i in range(20)]
    verdict = judge_comparison(compare(*make_runs(tmp_path, a, [METRICS] * 20)))
    assert verdict.startswith("B is better on Reliability by 100 [100, 100], T-Generality by 95 ")
    assert "and 2 more (generated answers)" in verdict


@given(st.floats(-1000, 1000))
def test_numbers_read_as_in_the_tables(value: float) -> None:
    assert float(format_number(value)) == float(f"{value:.1f}")
    assert not format_number(value).endswith(".0")
    assert format_number(value) != "-0"


def test_rows_that_differ_come_first_and_the_rest_is_folded(tmp_path: Path) -> None:
    a = [all_but("same_question") if i < 9 else all_but("joint") if i < 10 else METRICS for i in range(20)]
    found = compare(*make_runs(tmp_path, a, [METRICS] * 20))
    page = build_comparison_page(found, {})
    (table,) = page.tables
    equal = {(d.measure, d.mode) for d in found.differences if d.a == d.b}
    assert len(table.rest) == len(equal) == 14
    assert len(table.rows) == len(found.differences) - len(equal)
    marks = [row[-1].notes[-1] for row in table.rows]
    assert marks == sorted(marks), "those that are certain first"
    assert set(marks) == {"B is better", "not certain"}
    assert {row[-1].notes[-1] for row in table.rest} == {"equal"}
    assert (table.rows[0][0].text, table.rows[0][1].text, table.rows[0][2].text) == (
        "same question",
        "55.0",
        "100.0",
    )
    path = write_comparison(found, tmp_path / "a", tmp_path / "page.html")
    html = path.read_text()
    folded = html[html.index('<details class="rest">') :]
    assert "14 rows with equal means" in folded
    assert html.index(">same question <") < html.index('<details class="rest">')
    assert "T-Generality <" not in html[: html.index('<details class="rest">')]
    # Both runs' probes, in a row of dots each.
    assert "A: 7 of 8 probes pass; same question fails" in dots_of(shown_text(path))
    assert "B: 8 of 8 probes pass" in dots_of(shown_text(path))


def test_the_command_prints_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_runs(tmp_path, [all_but("joint")] * 8, [METRICS] * 8)
    assert compare_main(["compare", str(a), str(b)]) == 0
    assert "B is better on joint by 100 [100, 100] (generated answers)." in capsys.readouterr().out


# ---------------------------------------------------------------- colours


def read_colours(scheme: str) -> dict[str, tuple[float, ...]]:
    """Of the light or dark theme: six or three hexadecimal digits, as fractions."""
    style = (TEMPLATES / "page.css").read_text()
    light, dark = (re.findall(r"--(\w+): #(\w+);", part) for part in style.split("* {")[0].split("@media"))
    found = dict(light) | (dict(dark) if scheme == "dark" else {})
    full = {k: v if len(v) == 6 else "".join(2 * c for c in v) for k, v in found.items()}
    return {k: tuple(int(v[i : i + 2], 16) / 255 for i in (0, 2, 4)) for k, v in full.items()}


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG 2.2's contrast ratio."""

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(scheme: str) -> None:
    colours = read_colours(scheme)
    for text in ("front", "soft", "good", "fair", "bad", "k0", "k1", "link"):
        for ground in ("back", "card"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast((1, 1, 1), (0, 0, 0)) == pytest.approx(21)
    assert contrast(colours["line"], colours["back"]) < 4.5, "and some cannot"
