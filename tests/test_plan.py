"""One command per table: plans are read strictly, runs shared, checked and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import Project, record

from scripts import plan, tables, workers
from unike.runs import batches as loop
from unike.runs.records import RECORDS, read_lines

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
FT = {"name": "FT", "yaml": "{backbone}.yaml", "set": {"method": "ft", "layers": 1}}
INTRIN = {"name": "only Intrin", "yaml": "{backbone}.yaml", "set": {"external": "none", "zeta": "none"}}
UNIKE = {"name": "UniKE", "yaml": "{backbone}.yaml"}


def write_plan(project: Project, rows: list[dict[str, Any]], second: list[dict] | None = None) -> Path:
    first = {"title": "One-step", "protocol": "one_step", "paper": "table1_one_step", "rows": rows}
    found = {"1": first}
    if second is not None:
        found["2"] = {"title": "Sequences", "protocol": "sequential", "lengths": [1, 2], "rows": second,
                      "set": {"sequences": 2, "curve_cases": 1}}  # fmt: skip
    path = project.root / "plan.yaml"
    path.write_text(yaml.safe_dump({"tables": found}))
    return path


def read(project: Project, path: Path, **more: Any) -> list[plan.Run]:
    return plan.read_plan(path, backbones=["small"], output=project.root / "out", **more)


def command(project: Project, path: Path, *more: str, output: str = "out") -> list[str]:
    """A command line; what ``more`` has takes the place of what is here."""
    given = [["--table", "1"], ["--backbones", "small"], ["--plan", str(path)]]
    given.append(["--output", str(project.root / output)])
    return [*(word for words in given if words[0] not in more for word in words), *more]


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def measured(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All records below a folder, without the times."""
    return {
        str(path.parent.relative_to(folder)): [
            {k: v for k, v in r.items() if k != "seconds"} for r in read_lines(path.parent)
        ]
        for path in sorted(folder.glob(f"*/*/{RECORDS}"))
    }


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("name", "figures", "collaboration", "preset"),
    [
        ("tables.yaml", ["figure2a", "figure4a"], "collaboration", "UniKE, paper preset"),
        ("tables_v1.yaml", ["figure4a"], "5", "UniKE"),
    ],
)
def test_the_shipped_plans_are_valid(
    name: str, figures: list[str], collaboration: str, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    runs = plan.read_plan(Path("hparams") / name, tables=["all", *figures, "figure4b"])
    assert {run.table for run in runs} >= {"1", "2", "3", "4", "5", collaboration, "lifelong", *figures}
    by_name = {(r.table, r.row.name, r.backbone, r.task, r.length, r.seed): r for r in runs}
    assert len(by_name) == len(runs)
    at = ("tiny_blip2", "vqa", 1, runs[0].seed)
    assert by_name[("1", preset, *at)].folder == by_name[("4", preset, *at)].folder
    seed = next(run.seed for run in runs if run.table == "lifelong")
    others = [r for r in runs if (r.row.name, r.table != "lifelong") == ("T-Patcher", True)]
    tpatcher = {r.folder for r in others if r.name.startswith("tiny_blip2, vqa, one_step")}
    assert by_name[("lifelong", "T-Patcher", "tiny_blip2", "vqa", 1, seed)].folder in tpatcher
    assert len({run.folder for run in runs if run.table == "1"}) == sum(run.table == "1" for run in runs)
    sequential = by_name["2", "UniKE", "tiny_blip2", "vqa", 20, seed].hparams
    assert (sequential.protocol, sequential.sequence_length, sequential.sequences) == ("sequential", 20, 10)
    assert all(run.is_drawn == (run.seed is not None) for run in runs)


def test_rows_that_mean_the_same_run_share_it(copied: Project) -> None:
    again = {**UNIKE, "name": "the same", "set": {"k": copied.options()["k"]}}
    path = write_plan(copied, [FT, UNIKE, again], [UNIKE])
    runs = read(copied, path)
    folder = {(r.table, r.row.name, r.length): r.folder for r in runs}
    assert folder["1", "UniKE", 1] == folder["1", "the same", 1] == folder["2", "UniKE", 1]
    assert len(set(folder.values())) == 3
    assert folder["1", "UniKE", 1].parent.name == "small-vqa-one_step"
    assert folder["2", "UniKE", 2].parent.name == "small-vqa-sequential-2"
    for more in ({"size": 2}, {"overrides": ["k=2"]}):
        changed = {r.folder for r in read(copied, path, **more) if r.row.name == "UniKE"}
        assert not changed & set(folder.values())
    # The name of a row is for readers: another name finds what is there.
    folder["1", "UniKE", 1].mkdir(parents=True)
    assert folder["1", "UniKE", 1] in {r.folder for r in read(copied, write_plan(copied, [again]))}


@pytest.mark.parametrize(
    ("rows", "needles"),
    [
        ([{**UNIKE, "set": {"aplha": 0.5}}], ["UniKE: aplha: unknown key; the nearest known key is alpha"]),
        ([{"name": "x", "yaml": "lost/{backbone}.yaml"}], ["lost/small.yaml: no such file"]),
        ([{**UNIKE, "sett": {}}], ["1: row 1: sett: unknown key; the nearest known key is set"]),
        ([UNIKE, UNIKE], ["1: UniKE: two rows of that name"]),
        ([{"name": "x"}], ["1: row 1: yaml: missing"]),
        ([{**UNIKE, "set": [1]}], ["1: row 1: set: expected lines of `key: value`, got [1]"]),
        ([], ["1: rows: missing"]),
        ([{**UNIKE, "set": {"k": 0}}, {"name": "y", "yaml": "no.yaml"}], ["UniKE: k: ", "no.yaml: no such"]),
    ],
)
def test_a_bad_plan_is_refused_line_by_line(
    copied: Project, rows: list, needles: list[str], capsys, monkeypatch
) -> None:
    monkeypatch.setattr("unike.backbones.load_backbone", None)
    assert tables.main(command(copied, write_plan(copied, rows))) == 2
    lines = errors(capsys)
    assert len(lines) == len(needles)
    assert all(needle in line for needle, line in zip(needles, lines, strict=True))


@pytest.mark.parametrize(
    ("more", "needle"),
    [
        (["--table", "9"], "--table: 9: not in"),
        (["--size", "0"], "--size: 0; expected 1 or more"),
        (["--jobs", "0"], "--jobs: 0; expected 1 or more"),
        (["kk=3"], "kk: unknown key; the nearest known key is k"),
        (["--backbones", "small", "kk=3"], "kk: unknown key; the nearest known key is k"),
        (["--write", "lost.md"], "--write: lost.md: cannot be read"),
        (["--plan", "lost.yaml"], "lost.yaml: no such file"),
        (["name=lost"], "lost"),
    ],
)
def test_bad_input_is_one_line(copied: Project, more: list[str], needle: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr("unike.backbones.load_backbone", None)
    assert tables.main(command(copied, write_plan(copied, [UNIKE]), *more)) == 2
    (line,) = errors(capsys)
    assert needle in line


def test_missing_data_and_editors_are_found_together_before_a_model_is_loaded(
    copied: Project, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("unike.backbones.load_backbone", None)
    (copied.data / "vqa_eval.json").unlink()
    path = write_plan(copied, [UNIKE, {"name": "MEND", "yaml": "small.yaml", "set": {"method": "mend"}}])
    assert tables.main(command(copied, path)) == 2
    lines = errors(capsys)
    assert len(lines) == 2
    assert "data.vqa.eval" in lines[0]
    assert "editor_dir: missing" in lines[1]


# ---------------------------------------------------------------- runs


def test_a_table_is_run_once_and_then_read(copied: Project, capsys, monkeypatch) -> None:
    path = write_plan(copied, [FT, UNIKE], [UNIKE])
    page = copied.root / "page.md"
    page.write_text("prose\n<!-- table 1 -->\n<!-- end of table 1 -->\nmore prose\n")
    whole = command(copied, path, "--size", "2", "--jobs", "1", "--write", str(page))
    assert tables.main(whole) == 0
    first = capsys.readouterr()
    assert "## Table 1: One-step" in first.out
    assert "small, vqa, one_step, UniKE: 2 records" in first.err
    text = page.read_text()
    assert text.startswith("prose\n<!-- table 1 -->\n\nIn percent")
    assert text.endswith("<!-- end of table 1 -->\nmore prose\n")
    assert "| UniKE |" in text
    monkeypatch.setattr("unike.backbones.load_backbone", None)
    assert tables.main(whole) == 0
    assert capsys.readouterr().out == first.out
    assert page.read_text() == text
    assert tables.main([*whole, "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("table,backbone,task")
    assert tables.main([*whole, "--format", "latex"]) == 0
    assert r"\begin{tabular}" in capsys.readouterr().out
    copied.write_records([record(i) for i in range(3, 7)])
    assert tables.main(whole) == 2
    assert all("data.vqa.eval: changed since" in line for line in errors(capsys))


def test_sequences_are_run_too(copied: Project) -> None:
    runs = [run for run in read(copied, write_plan(copied, [FT], [FT]), tables=["2"]) if run.length == 2]
    assert workers.ensure(runs, 1) == workers.WorkOutcome()
    found = plan.summarise_run(runs[0])
    assert found["sequences"] == {"n": 2, "length": 2}
    assert plan.is_complete(runs[0])


def test_a_row_that_fails_leaves_the_others(copied: Project, capsys, monkeypatch) -> None:
    assemble = workers.runs.assemble

    def broken(hparams: Any, *rest: Any, **more: Any) -> Any:
        if hparams.method == "ft":
            raise RuntimeError("out of memory")
        return assemble(hparams, *rest, **more)

    monkeypatch.setattr(workers.runs, "assemble", broken)
    page = copied.root / "page.md"
    page.write_text("<!-- table 1 -->\n<!-- end of table 1 -->\n")
    path = write_plan(copied, [FT, INTRIN])
    assert tables.main(command(copied, path, "--size", "1", "--jobs", "1", "--write", str(page))) == 1
    told = capsys.readouterr()
    assert "| FT (not run) |" in told.out
    assert "| only Intrin |" in told.out
    assert "RuntimeError('out of memory')" in told.err
    assert "| FT" not in page.read_text(), "what is not whole is not published"


def test_ctrl_c_keeps_what_is_there(copied: Project, capsys, monkeypatch) -> None:
    path = write_plan(copied, [FT, INTRIN])
    run_one_step_batch, asked = loop.run_one_step_batch, []

    def stopped(*arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return run_one_step_batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_one_step_batch", stopped)
        assert tables.main(command(copied, path, "--size", "2", "--jobs", "1", "edit_batch_size=1")) == 130
    assert [len(r) for r in measured(copied.root / "out").values()] == [2, 1]
    assert "the same command continues" in capsys.readouterr().err
    assert tables.main(command(copied, path, "--size", "2", "--jobs", "1")) == 0
    assert [len(r) for r in measured(copied.root / "out").values()] == [2, 2]


# ---------------------------------------------------------------- processes


def shell(project: Project, path: Path, output: str) -> subprocess.Popen[str]:
    arguments = command(project, path, "--jobs", "2", "--table", "all", output=output)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "tables.py"), *arguments],
        cwd=project.root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def lines_in(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(f"*/*/{RECORDS}"))


def until(folder: Path, lines: int) -> None:
    deadline = time.monotonic() + 200
    while lines_in(folder) < lines:
        assert time.monotonic() < deadline, "nothing is recorded"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.longest
def test_a_run_that_was_cut_off_goes_on(copied: Project) -> None:
    copied.write_records([record(i % 8) for i in range(12)])
    path = write_plan(copied, [FT, UNIKE], [INTRIN])
    before = {}
    for with_signal in (signal.SIGKILL, signal.SIGINT):
        output = f"cut-{with_signal.name}"
        cut = shell(copied, path, output)
        until(copied.root / output, 3)
        cut.send_signal(with_signal)
        out, err = cut.communicate(timeout=200)
        if with_signal == signal.SIGINT:
            assert cut.returncode == 130, err
            assert "Traceback" not in err
            assert "up to now" in out or "not run" in out
        # The children of a killed process end by themselves.
        time.sleep(1.0)
        before[output] = lines_in(copied.root / output)
        time.sleep(1.0)
        assert lines_in(copied.root / output) == before[output]
    for output in (*before, "whole"):
        again = shell(copied, path, output)
        out, err = again.communicate(timeout=500)
        assert again.returncode == 0, err
    for output, lines in before.items():
        assert lines < lines_in(copied.root / "whole"), "it was cut off too late to show anything"
        assert measured(copied.root / output) == measured(copied.root / "whole")
