"""Two runs compared: paired differences, flips, and runs that cannot be compared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_runs import ended, save_run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import HOSTILE, assert_self_contained, shown_text

from unike.report.compare import compare, describe_flips
from unike.report.compare_page import GAINED, LOST, build_comparison_page
from unike.tables import main
from unike.types import FIVE_METRICS, UserError

ROOT = Path(__file__).parents[1]
WITHOUT = {m: [x for x in FIVE_METRICS if x != m] for m in FIVE_METRICS}


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """B fails reliability of 1, A the M-locality of 2 and 3; 4 is in A alone, 5 failed in B."""
    a = [
        ended(0),
        ended(1),
        ended(2, WITHOUT["m_locality"]),
        ended(3, WITHOUT["m_locality"]),
        ended(4),
        ended(5),
    ]
    b = [ended(0), ended(1, WITHOUT["reliability"]), ended(2), ended(3), {"id": "vqa-5", "status": "failed"}]
    data = tmp_path / "data"
    return save_run(tmp_path / "a", a, data), save_run(tmp_path / "b", b, data)


def test_differences_are_paired(runs: tuple[Path, Path]) -> None:
    found = compare(*runs)
    assert (found.names, list(found.a), found.apart) == (("a", "b"), [f"vqa-{i}" for i in range(4)], 2)
    by = {(d.measure, d.mode): d for d in found.differences}
    one = by["m_locality", "generated"]
    assert (one.n, one.a, one.b, one.value) == (4, 50.0, 100.0, 50.0)
    # A naive paired bootstrap of the four differences.
    drawn = np.random.default_rng(1).integers(0, 4, (2000, 4))
    assert (one.low, one.high) == tuple(
        np.quantile(np.array([0, 0, 100, 100])[drawn].mean(1), [0.025, 0.975])
    )
    assert by["reliability", "teacher_forced"].value == -25.0
    assert (by["t_generality", "generated"].low, by["t_generality", "generated"].high) == (0.0, 0.0)
    assert by["five", "generated"].value == pytest.approx(500 / (4 + 1 / 0.75) - 500 / (4 + 2))
    assert ("all", "generated") not in by, "the hard probes were not asked"
    assert ("joint", "generated") not in by


def test_flips(runs: tuple[Path, Path]) -> None:
    found = compare(*runs)
    assert [(f.id, f.probe, f.to_b) for f in found.flips] == [
        ("vqa-1", "reliability", False), ("vqa-2", "m_locality", True), ("vqa-3", "m_locality", True),
    ]  # fmt: skip
    assert "3 probes of 3 cases flipped (generated): 2 pass in B alone, 1 in A alone" in describe_flips(found)


@settings(max_examples=6, deadline=None)
@given(
    st.lists(
        st.tuples(st.sets(st.sampled_from(FIVE_METRICS)), st.sets(st.sampled_from(FIVE_METRICS))),
        min_size=1,
        max_size=6,
    )
)
def test_turned_round_the_differences_are_too(
    tmp_path_factory: pytest.TempPathFactory, passing: list[tuple[set[str], set[str]]]
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    a = save_run(folder / "a", [ended(i, list(one)) for i, (one, _) in enumerate(passing)])
    b = save_run(folder / "b", [ended(i, list(other)) for i, (_, other) in enumerate(passing)])
    there, back, same = compare(a, b, 0), compare(b, a, 0), compare(a, a, 0)
    for d, e in zip(there.differences, back.differences, strict=True):
        assert (d.value, d.low, d.high) == pytest.approx((-e.value, -e.high, -e.low))
    assert {(f.id, f.probe, not f.to_b) for f in there.flips} == {(f.id, f.probe, f.to_b) for f in back.flips}
    assert len(there.flips) == sum(len(one ^ other) for one, other in passing)
    assert not same.flips
    assert {(d.value, d.low, d.high) for d in same.differences} == {(0.0, 0.0, 0.0)}


def test_runs_without_generated_answers_are_compared_by_tokens(tmp_path: Path) -> None:
    record = ended(0)
    del record["scores"]["generated"]
    found = compare(
        save_run(tmp_path / "a", [record]), save_run(tmp_path / "b", [ended(0, WITHOUT["reliability"])])
    )
    assert found.mode == "teacher_forced"
    assert {d.mode for d in found.differences} == {"teacher_forced"}
    assert [f.probe for f in found.flips] == ["reliability"]


def test_steps_of_sequences_are_left_out(tmp_path: Path) -> None:
    place = {"sequence": 0, "position": 1, "case": "vqa-0", "former": {}}
    records = [ended(0, id="0/1/step", kind="step", **place), ended(0, id="0/1/final", kind="final", **place)]
    run = save_run(tmp_path / "a", records)
    assert list(compare(run, run).a) == ["0/1/final"]


def test_runs_that_cannot_be_compared(runs: tuple[Path, Path], tmp_path: Path) -> None:
    a, _ = runs
    with pytest.raises(UserError, match="share no record"):
        compare(a, save_run(tmp_path / "others", [ended(8)]))
    with pytest.raises(UserError, match="share no record"):
        compare(a, save_run(tmp_path / "none", []))
    asked = ended(1)
    asked["answers"]["m_locality"]["prompt"] = "another question"
    with pytest.raises(UserError, match=r"1 of 2 records ask other questions than in .*, the first is vqa-1"):
        compare(a, save_run(tmp_path / "asked", [ended(0), asked]))
    with pytest.raises(UserError, match="no such file"):
        compare(a, tmp_path / "nowhere")


# ---------------------------------------------------------------- the page and the command


def test_the_page_has_the_flips_with_their_pictures(runs: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["compare", *map(str, runs), "--html", str(page), "--most", "1"]) == 0
    read = shown_text(page)
    assert_self_contained(read)
    assert "A is a, B is b" in read.text
    assert "passes in B alone: M-Locality" in read.text
    assert "another image and question" in read.text
    assert len([a for a in read.of("li") if a.get("class") == "case"]) == 3
    assert len([a for a in read.of("img") if a.get("alt")]) == 3
    assert "Neither run is certainly better. 4 records: too few, 8 are needed." in read.text
    found = compare(*runs)
    tags = [view.tags for view in build_comparison_page(found, {}).cases]
    assert [(GAINED in t, LOST in t) for t in tags] == [(False, True), (True, False), (True, False)]


def test_bad_options_are_one_line_each(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *map(str, runs), "--most", "-1", "--seed", "-2"]) == 2
    said = capsys.readouterr()
    assert said.err == "error: most: -1; expected 0 or more\nerror: seed: -2; expected 0 or more\n"
    assert said.out == ""
    assert main(["compare", *map(str, runs), "--html", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: cannot be written: Is a directory\n"


def test_hostile_answers_are_inert(tmp_path: Path) -> None:
    records: list[list[dict[str, Any]]] = [[ended(0)], [ended(0, WITHOUT["reliability"])]]
    for (record,) in records:
        for answer in record["answers"].values():
            answer.update(prompt=HOSTILE, target=HOSTILE, before=HOSTILE, after=HOSTILE)
    runs = [save_run(tmp_path / name, r) for name, r in zip("ab", records, strict=True)]
    assert main(["compare", *map(str, runs), "--html", str(tmp_path / "page.html")]) == 0
    read = shown_text(tmp_path / "page.html")
    assert_self_contained(read)
    assert HOSTILE in read.text


def test_the_command(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """As a user starts it."""

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "unike.tables", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = start("compare", "a", "b")
    assert done.returncode == 0, done.stderr
    assert "+50.0 [+0.0, +100.0]" in done.stdout
    assert "vqa-3" in done.stdout
    wrong = start("compare", "a", "nowhere")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("error: nowhere")
