"""The command line: whole runs on a small random backbone, and each kind of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import Project, record

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import run_edit  # noqa: E402
from scripts import prepare  # noqa: E402
from unike import runs  # noqa: E402
from unike.config.hparams import HyperParams  # noqa: E402
from unike.runs import batches as loop  # noqa: E402
from unike.runs import inputs, packages  # noqa: E402
from unike.runs.records import RecordWriter, read_lines, read_manifest  # noqa: E402
from unike.types import FIVE_METRICS, UserError  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def start(project: Project, *arguments: str) -> int:
    return run_edit.main(["--hparams_dir", str(project.yaml), *arguments])


def in_shell(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As a user starts it, from another folder."""
    command = [sys.executable, str(ROOT / "run_edit.py"), "--hparams_dir", str(project.yaml), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True)


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def without_costs(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in r.items() if key != "seconds"} for r in records]


# ---------------------------------------------------------------- runs


def test_a_run_from_the_shell(copied: Project) -> None:
    done = in_shell(copied, "--task", "vqa", "--size", "2", "--seed", "7", "--output", "out", "k=2")
    assert done.returncode == 0, done.stderr
    assert "Reliability" in done.stdout
    assert "M-Locality" in done.stdout
    assert "2 records" in done.stdout
    assert "Rel " in done.stderr, "the bar shows running means"
    manifest = read_manifest(copied.root / "out")
    assert manifest["seed"] == manifest["hparams"]["seed"] == 7
    assert manifest["hparams"]["k"] == 2
    assert set(manifest["data"]) == {"data.vqa.eval", "data.vqa.train", "data.caption.train"}
    assert all(len(checksum) == 64 for checksum in manifest["data"].values())
    assert manifest["weights"]["backbone"]
    assert {"torch", "transformers", "python"} <= set(manifest["versions"])


@pytest.mark.parametrize("task", inputs.TASKS)
def test_each_task_on_each_backbone(project: Project, task: str, tmp_path: Path) -> None:
    assert start(project, "--task", task, "--output", str(tmp_path / "run"), "--size", "2") == 0
    records = read_lines(tmp_path / "run")
    tasks = {"vqa": ["vqa", "vqa"], "caption": ["caption", "caption"], "cross": ["vqa", "caption"]}
    assert [r["task"] for r in records] == tasks[task]
    for r in records:
        assert r["status"] == "ok"
        assert set(r["scores"]) == {"teacher_forced", "generated"}
        assert set(r["scores"]["teacher_forced"]) == set(r["answers"]) == set(FIVE_METRICS)
        assert {"before", "after"} <= set(r["answers"]["reliability"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["n"] == 2
    assert summary["metrics"]["reliability"]["teacher_forced"]["after"]["mean"] > 50
    assert not summary["interrupted"]


def test_teacher_forcing_alone(copied: Project) -> None:
    assert start(copied, "--size", "1", "--output", str(copied.root / "run"), "--no_generated") == 0
    assert set(read_lines(copied.root / "run")[0]["scores"]) == {"teacher_forced"}


def test_a_run_resumes(copied: Project, capsys: pytest.CaptureFixture[str]) -> None:
    # One by one: another number of records makes other batches, which are rounded otherwise.
    alone = "edit_batch_size=1"
    assert start(copied, "--size", "4", "--output", str(copied.root / "whole"), alone) == 0
    part = ("--output", str(copied.root / "part"), alone)
    assert start(copied, "--size", "2", *part) == 0
    former = (copied.root / "part" / "records.jsonl").read_bytes()
    capsys.readouterr()
    assert start(copied, "--size", "4", *part) == 2
    assert "--resume" in errors(capsys)[0]
    assert start(copied, "--size", "4", *part, "--resume", "k=2") == 2
    (line,) = errors(capsys)
    assert "k: 3 in the run to resume, 2 now" in line
    assert start(copied, "--size", "4", *part, "--resume") == 0
    assert (copied.root / "part" / "records.jsonl").read_bytes().startswith(former)
    assert without_costs(read_lines(copied.root / "part")) == without_costs(read_lines(copied.root / "whole"))


def test_an_interrupted_run_sums_up_and_resumes(copied: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    output, calls = ("--output", str(copied.root / "run"), "edit_batch_size=1"), []

    def run_one_step_batch(*args: Any) -> list[dict[str, Any]]:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return unpatched(*args)

    unpatched = loop.run_one_step_batch
    monkeypatch.setattr(loop, "run_one_step_batch", run_one_step_batch)
    assert start(copied, *output) == 130
    summary = json.loads((copied.root / "run" / "summary.json").read_text())
    assert summary["interrupted"]
    assert summary["n"] == 2
    assert start(copied, *output, "--resume") == 0
    summary = json.loads((copied.root / "run" / "summary.json").read_text())
    assert not summary["interrupted"]
    assert summary["n"] == 4


@pytest.mark.parametrize("size", ["auto", "3"])
def test_a_run_cut_off_within_a_batch_resumes_to_the_same_bytes(copied: Project, monkeypatch, size) -> None:
    """Batches are made anew as a whole: what is made side by side is rounded alike."""
    start(copied, "--output", str(copied.root / "whole"), f"edit_batch_size={size}")
    write, count = RecordWriter.write, []

    def cut(self: RecordWriter, record: dict[str, Any]) -> None:
        count.append(record)
        if len(count) == 2:
            raise KeyboardInterrupt
        write(self, record)

    part = ("--output", str(copied.root / "part"), f"edit_batch_size={size}")
    with monkeypatch.context() as patched:
        patched.setattr(RecordWriter, "write", cut)
        assert start(copied, *part) == 130
    assert len(read_lines(copied.root / "part")) == 1
    assert start(copied, *part, "--resume") == 0
    found, wanted = (without_costs(read_lines(copied.root / name)) for name in ("part", "whole"))
    assert [json.dumps(r) for r in found] == [json.dumps(r) for r in wanted]


def test_runs_are_numbered(copied: Project) -> None:
    hparams = HyperParams.from_hparams(copied.yaml)
    results = copied.root / "results"
    assert runs.choose_directory(hparams, "vqa") == results / "small-vqa"
    # Another method's YAML for the same backbone has the same name.
    other = replace(hparams, method="ft", protocol="sequential")
    assert runs.choose_directory(other, "vqa") == results / "small-ft-vqa-sequential"
    with pytest.raises(UserError, match="small-vqa: no run to resume"):
        runs.choose_directory(hparams, "vqa", resume=True)
    for name in ("small-vqa", "small-vqa-2"):
        (results / name).mkdir(parents=True)
        (results / name / "records.jsonl").write_text("")
    assert runs.choose_directory(hparams, "vqa") == results / "small-vqa-3"
    assert runs.choose_directory(hparams, "vqa", resume=True) == results / "small-vqa-2"
    assert runs.choose_directory(hparams, "caption") == results / "small-caption"
    with pytest.raises(UserError, match="is not empty"):
        runs.choose_directory(hparams, "vqa", str(results / "small-vqa"))


def test_knowledge_is_built_once(copied: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(copied, "--size", "1") == 0
    folders = list((copied.root / "knowledge").iterdir())
    built = [folder.stat().st_mtime_ns for folder in folders]
    assert start(copied, "--size", "1") == 0
    assert [folder.stat().st_mtime_ns for folder in folders] == built
    assert list((copied.root / "knowledge").iterdir()) == folders


def test_triplets_come_from_all_tasks_in_turn(copied: Project) -> None:
    triplets = inputs.read_triplets(HyperParams.from_hparams(copied.yaml))
    assert len(triplets) == 6
    assert ["photo" in t.query.prompt for t in triplets] == [False, True] * 3


def test_data_is_drawn_on_first_use(copied: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.tiny import make_data

    drawn = []
    monkeypatch.setattr(make_data, "ensure", drawn.append)
    assert start(copied, "--size", "1", "generate_data=true") == 0
    assert len(drawn) == 1


# ---------------------------------------------------------------- bad input


def no_picture(project: Project) -> None:
    (project.data / "5.png").unlink()


def no_alt(project: Project) -> None:
    project.write_records([record(5), {k: v for k, v in record(6).items() if k != "alt"}])


def empty_target(project: Project) -> None:
    project.write_records([record(5) | {"alt": "  "}])


def broken_json(project: Project) -> None:
    (project.data / "vqa_eval.json").write_text('[{"src": ')


def folder_for_file(project: Project) -> None:
    project.write_yaml(
        data={"vqa": {"train": str(project.data / "vqa_train.json"), "eval": str(project.data)}}
    )


def no_key(project: Project) -> None:
    project.write_yaml(data={"vqa": {"train": str(project.data / "vqa_train.json")}})


def no_image_root(project: Project) -> None:
    project.write_yaml(image_root=str(project.root / "nowhere"))


def unknown_key(project: Project) -> None:
    project.write_yaml(n_kyes=3)


def no_weights(project: Project) -> None:
    (project.root / "model" / "model.safetensors").unlink()


def wrong_weights(project: Project) -> None:
    (project.root / "model" / "model.safetensors").write_text("this is not a weight file")


def unknown_method(project: Project) -> None:
    project.write_yaml(method="unik")


def no_knowledge_dir(project: Project) -> None:
    project.write_yaml(knowledge_dir=None)


def broken_train(project: Project) -> None:
    (project.data / "caption_train.json").write_text("{}")


BAD: list[tuple[Callable[[Project], None], tuple[str, ...]]] = [
    (no_picture, ("vqa_eval.json: 1 missing image: ", "5.png")),
    (no_alt, ("vqa_eval.json: record 1: field 'alt' is missing",)),
    (empty_target, ("record 0: field 'alt' is empty",)),
    (broken_json, ("vqa_eval.json: broken JSON at line 1",)),
    (folder_for_file, ("small.yaml: data.vqa.eval: ", "is a directory")),
    (no_key, ("small.yaml: data.vqa.eval: missing",)),
    (no_image_root, ("small.yaml: image_root: ", "no such folder")),
    (unknown_key, ("n_kyes: unknown key; the nearest known key is n_keys",)),
    (no_weights, ("small.yaml: name: ", "holds no weights")),
    (wrong_weights, ("small.yaml: name: ", "model.safetensors")),
    (unknown_method, ("small.yaml: method: 'unik' is unknown; did you mean 'unike'?",)),
    (no_knowledge_dir, ("small.yaml: knowledge_dir: missing",)),
    (broken_train, ("caption_train.json: expected a list of records",)),
]


@pytest.mark.parametrize(("damage", "expected"), BAD, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.usefixtures("nothing_loads")
def test_bad_input_is_one_line_and_exit_code_2(
    copied: Project, capsys: pytest.CaptureFixture[str],
    damage: Callable[[Project], None], expected: tuple[str, ...],
) -> None:  # fmt: skip
    damage(copied)
    files = sorted(copied.root.rglob("*"))
    assert start(copied, "--task", "vqa") == 2
    (line,) = errors(capsys)
    assert all(text in line for text in expected), line
    assert sorted(copied.root.rglob("*")) == files, "nothing is written"


@pytest.mark.usefixtures("nothing_loads")
def test_all_problems_come_at_once(copied: Project, capsys: pytest.CaptureFixture[str]) -> None:
    no_weights(copied)
    broken_train(copied)
    no_picture(copied)
    (copied.data / "vqa_eval.json").unlink()
    (copied.data / "caption_eval.json").unlink()
    assert start(copied, "--task", "cross", "method=unik") == 2
    lines = errors(capsys)
    for text in ("method:", "holds no weights", "data.vqa.eval", "data.caption.eval"):
        assert sum(text in line for line in lines) == 1, lines


def test_bad_input_from_the_shell(copied: Project) -> None:
    done = in_shell(copied, "n_kyes=3", "k=none")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2, done.stderr
    assert done.stdout == ""
    no_weights(copied)
    done = in_shell(copied, "--task", "vqa")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")


def test_broken_records_are_skipped_on_request(copied: Project, caplog: pytest.LogCaptureFixture) -> None:
    no_alt(copied)
    copied.write_records([*json.loads((copied.data / "vqa_eval.json").read_text()), record(99), record(7)])
    output = copied.root / "run"
    assert start(copied, "--skip_broken", "--size", "2", "--output", str(output)) == 0
    assert [r["id"] for r in read_lines(output)] == ["vqa-0", "vqa-3"]
    assert "2 records are skipped" in caplog.text


def test_a_truncated_picture(copied: Project, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied.data / "5.png"
    path.write_bytes(path.read_bytes()[:200])
    output = ("--output", str(copied.root / "run"))
    assert start(copied, *output) == 2
    (line,) = errors(capsys)
    assert "5.png" in line
    assert not (copied.root / "run").exists()
    assert start(copied, *output, "--skip_broken") == 0
    summary = json.loads((copied.root / "run" / "summary.json").read_text())
    assert (summary["n"], summary["failed"]) == (3, 1)


@pytest.mark.parametrize("arguments", [["--task", "all"], ["--size", "many"], ["--unknown"]])
def test_a_wrong_argument_ends_with_2(copied: Project, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        start(copied, *arguments)
    assert ended.value.code == 2


# ---------------------------------------------------------------- --check, scripts, YAMLs


@pytest.mark.usefixtures("nothing_loads")
def test_check_says_what_is_there(copied: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(copied, "--task", "cross", "--check") == 0
    shown = capsys.readouterr().out
    assert "✗" not in shown
    for text in ("✓ method: unike", "✓ data.vqa.eval", "✓ data.caption.eval: ", "✓ torch", "• knowledge_dir"):
        assert text in shown, shown
    assert not (copied.root / "results").exists()


@pytest.mark.usefixtures("nothing_loads")
def test_check_names_remedies(copied: Project, capsys: pytest.CaptureFixture[str]) -> None:
    no_weights(copied)
    no_picture(copied)
    (copied.data / "caption_train.json").unlink()
    assert start(copied, "--check", "--task", "vqa") == 2
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("✗")]
    assert len(wrong) == 3, wrong
    assert "holds no weights" in wrong[0]
    assert "Salesforce/blip2-opt-2.7b" in wrong[0]
    assert "5.png" in wrong[1]
    assert "data.caption.train" in wrong[2]
    assert "data/README.md" in wrong[2]


def test_check_compares_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"torch": "1.13.0", "transformers": "5.21.0", "numpy": "2.4.6"}
    real = packages.metadata.version
    monkeypatch.setattr(packages.metadata, "version", lambda name: found.get(name) or real(name))
    monkeypatch.setattr(packages, "_read_pins", lambda _: {"transformers": "5.24.0", "numpy": "2.4.6"})
    by_name = {finding.what.split()[0]: finding for finding in packages.check_packages()}
    assert not by_name["torch"].ok
    assert by_name["transformers"].ok
    assert by_name["transformers"].remedy == "tested with 5.24.0"
    assert by_name["numpy"].ok
    assert by_name["numpy"].remedy is None


def test_prepare_builds_and_reports(copied: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["--hparams_dir", str(copied.yaml)]) == 0
    shown = capsys.readouterr().out
    assert "top-1" in shown
    assert "6 triplets" in shown
    (folder,) = (copied.root / "knowledge").iterdir()
    assert str(folder) in shown.replace("\n", "")
    assert prepare.main(["--hparams_dir", str(copied.yaml), "method=ft"]) == 2
    assert "needs no knowledge" in errors(capsys)[0]


def test_the_length_of_a_sequence_and_the_retrieved_items_are_two_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    needed = ["--hparams_dir", "x.yaml", "k=7"]
    for flag in ("--sequence_length", "--k"):
        given = run_edit.arguments([*needed, flag, "5"])
        hparams = HyperParams.from_dict(
            {"model_name": "blip2", "name": "x"}, overrides=[*given.overrides, *given.named]
        )
        assert (hparams.sequence_length, hparams.k) == (5, 7)
    with pytest.raises(SystemExit):
        run_edit.arguments(["--help"])
    shown = capsys.readouterr().out
    assert "--sequence_length X" in shown
    assert "--k" not in shown


@pytest.mark.parametrize("name", ["blip2", "minigpt4", "tiny_blip2", "tiny_minigpt4"])
def test_shipped_yamls_load_and_say_how_they_run(name: str) -> None:
    path = ROOT / "hparams" / f"{name}.yaml"
    hparams = HyperParams.from_hparams(path)
    command = path.read_text().splitlines()[0].removeprefix("# python run_edit.py ").split()
    assert command[:2] == ["--hparams_dir", f"hparams/{name}.yaml"]
    run_edit.arguments(command)
    assert hparams.generate_data == name.startswith("tiny")
    assert {*hparams.data} == {"vqa", "caption"}
