"""What failed is reported: exit codes, reasons, edits that ended at max_steps, and which mean is which."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finished_runs import as_records, ended, save_run
from helpers import Project
from original_files import FAMILIES
from test_faults import FULL
from test_methods import IDS, ROWS, TRAINED
from test_processes import ended as ended_with
from test_processes import shell
from test_run_edit import start
from worlds import World, case, world_of

from scripts import workers
from unike.evaluation.metrics import harmonic_mean
from unike.evaluation.protocols import run_one_step
from unike.evaluation.reader import Reader
from unike.evaluation.record import Record
from unike.evaluation.summary import summarise
from unike.methods import EditMethod
from unike.report import write_report
from unike.report.compare import build_table, compare
from unike.report.terminal import as_text, describe_costs, list_failures, summary_table
from unike.runs.records import RECORDS, read_lines
from unike.system import launching
from unike.types import METRICS

pytestmark = pytest.mark.usefixtures("one_thread")

DIVERGING = "lr=1e30"
PROTOCOLS = {
    "one step": ("--task", "vqa"),
    "one by one": ("--task", "vqa", "edit_batch_size=1"),
    "sequential": ("--task", "vqa", "--protocol", "sequential", "--sequence_length", "2", "--sequences", "2"),
    "cross-task": (
        "--task", "cross", "--protocol", "cross_task", "--sequence_length", "2", "--sequences", "2"
    ),
}  # fmt: skip


# ---------------------------------------------------------------- exit codes and reasons


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_run_without_a_success_ends_with_1_and_the_reason(
    copied: Project, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    output = ("--output", str(copied.root / "run"))
    arguments = (*PROTOCOLS[protocol], *output)
    assert start(copied, *arguments, DIVERGING) == 1
    shown = capsys.readouterr()
    assert "4 of 4 records failed: the loss is nan after " in shown.out
    assert "error: no record succeeded" in shown.err.splitlines()
    assert all(r["status"] == "failed" for r in read_lines(copied.root / "run"))
    # All is recorded as failed: nothing is left to do, and nothing has succeeded.
    assert start(copied, *arguments, DIVERGING, "--resume") == 1
    assert "4 of 4 records failed: the loss is nan after " in capsys.readouterr().out


def test_a_run_with_a_success_ends_with_0_and_says_what_failed(
    copied: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_many = EditMethod.edit_many

    def fail_some(method: Any, backbone: Any, requests: Any, prefixes: Any) -> Any:
        made = edit_many(method, backbone, requests, prefixes)
        failed = {"vqa-0": "the loss is nan after 3 steps", "vqa-2": "the loss is nan after 17 steps"}
        return [
            FloatingPointError(failed[r.id]) if r.id in failed else e
            for r, e in zip(requests, made, strict=True)
        ]

    monkeypatch.setattr(EditMethod, "edit_many", fail_some)
    assert start(copied, "--task", "vqa", "--report", "--output", str(copied.root / "run")) == 0
    shown = capsys.readouterr()
    assert "2 of 4 records failed: the loss is nan after 3 steps\n" in shown.out
    assert "no record succeeded" not in shown.err
    assert "2 of 4 records failed: the loss is nan after 3 steps" in (
        copied.root / "run" / "report.html"
    ).read_text("utf-8")
    summary = json.loads((copied.root / "run" / "summary.json").read_text())
    assert summary["failures"] == [{"reason": "the loss is nan after 3 steps", "n": 2}]


def test_full_memory_is_the_reason_on_the_terminal(
    copied: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EditMethod, "edit_many", lambda *_: FULL["cpu"]())
    assert start(copied, "--task", "vqa", "--size", "1", "--output", str(copied.root / "run")) == 1
    (line,) = (s for s in capsys.readouterr().out.splitlines() if "1 of 1 records failed" in s)
    assert line.startswith("1 of 1 records failed: out of memory: ")
    assert "n_keys" in line


@pytest.mark.parametrize("kind", FULL)
def test_full_memory_is_an_error_of_the_edit_in_python(
    world: World, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    method = world.method("unike", {})
    reader = Reader(world.backbone, world.prefixes(method), generated=False)
    monkeypatch.setattr(method, "_edit", lambda *_: FULL[kind]())
    outcome = run_one_step(world.backbone, method, case(0), reader)
    assert (outcome.edit, outcome.record.status, outcome.record.error) == (None, "failed", "out of memory")

    def bug(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(method, "_edit", bug)
    with pytest.raises(RuntimeError, match="shapes cannot"):
        run_one_step(world.backbone, method, case(0), reader)


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize(("option", "code"), [(DIVERGING, 1), ("lr=5e-2", 0)])
def test_several_processes_have_the_code_of_one(copied: Project, option: str, code: int) -> None:
    arguments = ("--task", "vqa", "edit_batch_size=1", option, "--output", "two", "--num_processes", "2")
    out, err = ended_with(shell(copied, *arguments), code)
    assert ("4 of 4 records failed: the loss is nan" in out) == (code == 1)
    assert "ended with code" not in err, "no process died"
    assert err.count("no record succeeded") == code
    if code:
        # What has failed has failed after a resume, too.
        ended_with(shell(copied, *arguments, "--resume"), code)


@pytest.mark.parametrize(
    ("codes", "code"),
    [([4, 0], 1), ([0, 0], 0), ([4, 130], 1), ([4, 3], 1), ([2, 0], 2), ([7, 4], 1)],
)
def test_the_code_of_all_processes(codes: list[int], code: int) -> None:
    assert launching._choose_exit_code(codes) == code


def test_fine_tuning_in_half_precision_from_the_command_line(copied: Project) -> None:
    for dtype in ("float16", "bfloat16"):
        for target in ("layers", "projection"):
            output = copied.root / f"{dtype}-{target}"
            options = (f"dtype={dtype}", "method=ft", "layers=1", f"ft_target={target}", "lr=1e-2")
            assert start(copied, "--task", "vqa", "--output", str(output), *options) == 0
            assert all(r["status"] == "ok" and r["steps"] > 0 for r in read_lines(output))


@pytest.mark.parametrize("done", [0, 1])
def test_a_row_of_a_table_without_a_success_has_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, done: int
) -> None:
    found = {"n": done, "failed": 2, "failures": [{"reason": "nan", "n": 2}], "interrupted": False}
    monkeypatch.setattr("unike.backbones.load_backbone", lambda *_: None)
    for name in ("inputs.open_datasets", "runs.assemble", "_Readers.get"):
        monkeypatch.setattr(f"scripts.workers.{name}", lambda *_, **__: None)
    monkeypatch.setattr(workers.runs, "open_run", lambda *_, **__: nullcontext())
    monkeypatch.setattr(workers.runs, "run_cases", lambda *_, **__: found)
    row = SimpleNamespace(name="row", hparams=None, task="vqa", size=None, folder=tmp_path)
    reports: list[tuple[str, Any]] = []
    workers.run_group([row], nullcontext(), lambda kind, what: reports.append((kind, what)), lambda: False)
    ((kind, what),) = reports
    assert (kind, what[0]) == ("done" if done else "failed", "row")
    assert ("no record succeeded: nan" in what) == (not done)


def test_many_reasons_are_the_most_frequent_ones() -> None:
    failed = [
        Record(str(i), "vqa", "failed", error=reason)
        for i, reason in enumerate([*"abcdefg", "b", "lost 1", "lost 22", "lost 3"])
    ]
    summary = summarise(failed, 1)
    lines = list_failures(summary)
    assert lines[:2] == ["3 of 11 records failed: lost 1", "2 of 11 records failed: b"]
    assert lines[-1] == "3 of 11 records failed for 3 other reasons"
    assert list_failures({}) == list_failures(summarise([], 1)) == []
    hostile = summarise(
        [Record("0", "vqa", "failed", error="a\n\x1b[31mred"), Record("1", "vqa", "failed")], 1
    )
    assert all(line.isprintable() for line in list_failures(hostile))


# ---------------------------------------------------------------- edits that ended at max_steps


@pytest.fixture(params=FAMILIES)
def world(request: pytest.FixtureRequest, worlds: dict[str, World], monkeypatch) -> World:
    return world_of(request.param, worlds, monkeypatch)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_record_says_whether_training_reached_its_target(world: World, row: tuple[str, dict]) -> None:
    trained = row in TRAINED.values() or row[0] in ("tpatcher_published", "wise") or "ike_patches" in row[1]
    # WISE's loss has the margin in it.
    easy: dict[str, float] = {"stop_loss": 8.0 if row[0] == "wise" else 3.0, "max_steps": 150}
    hopeless = {"max_steps": 1, "lr": 1e-9}
    for options in (easy, hopeless) if trained else ({},):
        method = world.method(row[0], row[1] | options)
        reader = Reader(world.backbone, world.prefixes(method), generated=False)
        outcome = run_one_step(world.backbone, method, case(0), reader)
        record = Record.from_json(json.loads(json.dumps(outcome.record.to_json())))
        if not trained:
            assert (record.loss, record.reached) == (None, None)
            assert record.steps in (0, 1)
            continue
        # In a random model GRACE's one state does not reach an answer of several tokens.
        if "ft_target" not in row[1] and row[0] != "grace":
            assert record.reached is (options is easy)
        assert record.loss == pytest.approx(outcome.edit.info["loss"])
        assert (record.get_scores("teacher_forced")["reliability"].after == 1) is record.reached
        assert record.steps < 150 if record.reached else record.steps == options["max_steps"]


def test_unreached_edits_are_counted_where_it_is_known(tmp_path: Path) -> None:
    rows = [ended(0, reached=True), ended(1, reached=False), ended(2), ended(3, reached=False)]
    failed = {"id": "9", "task": "vqa", "status": "failed", "error": "nan"}
    summary = summarise(as_records([*rows, failed]), 1)
    assert summary["unreached"] == {"n": 2, "of": 3}
    assert "2 of 3 edits ended at max_steps" in describe_costs(summary)
    assert "2 of 3 edits ended at max_steps" in " ".join(as_text(summary_table(summary, "x")).split())
    page = write_report(save_run(tmp_path / "run", rows)).read_text(encoding="utf-8")
    assert "2 of 3 edits ended at max_steps" in page
    assert page.count("reached the target") == 1
    # Written before these fields were: it loads, and claims nothing.
    former = summarise(as_records([ended(0), ended(1)]), 1)
    assert former["unreached"] is None
    assert "max_steps" not in describe_costs(former)
    assert "max_steps" not in describe_costs({k: v for k, v in former.items() if k != "unreached"})
    other = summarise(as_records([ended(0, reached="yes"), ended(1, reached=None)]), 1)
    assert other["unreached"] is None


def test_a_summary_of_edits_that_all_arrived_says_so() -> None:
    assert "0 of 1 edits ended at max_steps" in describe_costs(
        summarise(as_records([ended(0, reached=True)]), 1)
    )


# ---------------------------------------------------------------- which harmonic mean


def with_hard_probes(number: int, hard: float) -> dict[str, Any]:
    row = ended(number)
    for mode in row["scores"].values():
        mode |= {name: {"before": 1.0, "after": hard} for name in METRICS[5:]}
    row["answers"] |= dict.fromkeys(METRICS[5:], row["answers"]["reliability"])
    return row


def test_both_harmonic_means_are_shown_by_name(tmp_path: Path) -> None:
    rows = [with_hard_probes(0, 0.5), with_hard_probes(1, 0.0)]
    summary = summarise(as_records(rows), 1)
    wanted = {
        "harmonic mean of 5": 100.0,
        "harmonic mean of all 8": harmonic_mean([100.0] * 5 + [25.0] * 3),
    }
    text = as_text(summary_table(summary, "x"))
    for title, value in wanted.items():
        (line,) = (line for line in text.splitlines() if title in line)
        assert f"{value:.1f} [" in line
    assert sum("harmonic mean" in line for line in text.splitlines()) == 2
    folders = [save_run(tmp_path / name, rows) for name in "ab"]
    page = write_report(folders[0]).read_text(encoding="utf-8")
    assert all(page.count(title) == 1 for title in wanted)
    table = as_text(build_table(compare(*folders)), 120)
    assert all(title in table for title in wanted)
    assert "HM" not in table
    # Five alone: the other mean is not there, rather than wrong.
    five = as_text(summary_table(summarise(as_records([ended(0)]), 1), "x"))
    assert "harmonic mean of 5" in five
    assert "all 8" not in five


def test_the_records_of_a_failed_run_are_whole(copied: Project) -> None:
    assert start(copied, "--task", "vqa", "--output", str(copied.root / "run"), DIVERGING) == 1
    lines = (copied.root / "run" / RECORDS).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"vqa-{i}" for i in range(4)]
