"""Tuning on the validation split: equal numbers of trials, a log that is never run twice, no eval split."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import Project, record

from scripts import tune, tuning, workers
from unike.evaluation.metrics import harmonic_mean
from unike.runs.records import read_manifest
from unike.types import FIVE_METRICS, METRICS, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
FT = {"yaml": "{backbone}.yaml", "set": {"method": "ft", "layers": 1}, "options": {"lr": [0.01, 0.02, 0.03]}}
SERAC = {
    "yaml": "{backbone}.yaml",
    "set": {"method": "serac", "layers": 1, "editor_steps": 6, "editor_val_every": 2, "editor_batch": 2,
            "editor_patience": 2, "editor_probes": "recombined"},
    "options": {"editor_lr": [0.001, 0.01], "editor_rank": [4, 6]},
}  # fmt: skip
PLAN: dict[str, Any] = {
    "trials": 2, "seed": 3, "records": 2, "mode": "teacher_forced", "set": {"max_steps": 2},
    "methods": {"ft": FT, "serac": SERAC},
}  # fmt: skip


@pytest.fixture
def project(copied: Project) -> Project:
    """With a validation split, and train records enough to hold one out."""
    for task in ("vqa", "caption"):
        copied.write_records([record(i % 5, task == "caption") for i in range(10)], task, "train")
        copied.write_records([hard(record(i, task == "caption")) for i in (20, 21)], task, "val")
        for i in (20, 21):
            record_images(copied, i)
    options = copied.options(editor_dir=str(copied.root / "editors"))
    copied.yaml.write_text(yaml.safe_dump(options))
    return copied


def hard(values: dict[str, Any]) -> dict[str, Any]:
    """With the three hard probes."""
    return values | {
        "same_question_image": values["m_loc"], "same_question_a": "a sea", "same_image_q": "is it so?",
        "same_image_a": "no", "joint": True,
    }  # fmt: skip


def record_images(project: Project, number: int) -> None:
    for n in range(number, number + 3):
        (project.data / f"{n}.png").write_bytes((project.data / f"{n % 12}.png").read_bytes())


def write(project: Project, **changes: Any) -> Path:
    path = project.root / "tuning.yaml"
    path.write_text(yaml.safe_dump(PLAN | changes, sort_keys=False))
    return path


def command(project: Project, path: Path, method: str = "ft", *more: str) -> list[str]:
    places = ["--plan", str(path), "--output", str(project.root / "out"), "--log", str(project.root / "log")]
    return ["--method", method, "--backbones", "small", "--jobs", "1", *places, *more]


def log(project: Project, method: str = "ft") -> list[dict[str, Any]]:
    return tuning.read_log(project.root / f"log/small-{method}.jsonl")


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


# ---------------------------------------------------------------- the grid


def test_the_shipped_plan_has_as_many_trials_for_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = tuning.read_tuning()
    learn_or_train = {"ke", "mend", "serac", "serac_multimodal", "ft", "tpatcher", "unike", "scoped"}
    assert plan.methods.keys() >= learn_or_train
    for name in plan.methods:
        drawn = plan.draw(name)
        assert len(drawn) == plan.trials >= 5
        for backbone in ("tiny_blip2", "tiny_minigpt4"):
            base = tuning.read_base(plan, name, backbone, (), Path("hparams"))
            for options in drawn:
                base.replace(**options)
        assert (base.answer_end, base.batch_invariant) == ("none", False)
        if base.method in ("ke", "mend", "serac"):
            assert base.editor_probes == "hard"


def test_settings_are_drawn_without_repetition_and_each_can_be(project: Project) -> None:
    grid = {"yaml": "{backbone}.yaml", "options": {"lr": [1, 2, 3], "k": [1, 2], "beta": [0, 1]}}
    every = [dict(zip(grid["options"], values, strict=True)) for values in product(*grid["options"].values())]
    for trials in (5, 12):
        plan = tuning.read_tuning(write(project, trials=trials, methods={"unike": grid}))
        drawn = plan.draw("unike")
        assert len(drawn) == trials
        assert all(options in every for options in drawn)
        assert len({json.dumps(options) for options in drawn}) == trials
        assert drawn == plan.draw("unike")
    seeds = [
        tuning.read_tuning(write(project, seed=s, methods={"unike": grid})).draw("unike") for s in (1, 2)
    ]
    assert seeds[0] != seeds[1]
    with pytest.raises(UserError, match="ft: options: 3 settings; expected 4 or more"):
        tuning.read_tuning(write(project, trials=4)).draw("ft")


@pytest.mark.parametrize(
    ("changes", "needles"),
    [
        ({"trials": 0}, ["trials: expected a whole number from 1 on, got 0"]),
        ({"trial": 3, "records": "x"}, ["trial: unknown; the nearest known name is trials", "records: exp"]),
        ({"mode": "greedy"}, ["mode: expected teacher_forced or generated, got 'greedy'"]),
        ({"methods": {"ft": {"yaml": "x", "options": {"lrr": [1]}}}}, ["lrr: unknown; the nearest known"]),
        ({"methods": {"ft": {"options": {"lr": 3}}}}, ["ft: yaml: missing", "ft: lr: expected a list"]),
        ({"methods": {"ft": {"yaml": "x", "options": {"lr": [1, 1]}}}}, ["ft: lr: has a value twice"]),
        ({"methods": {"ft": {"yaml": "x"}}}, ["ft: options: missing"]),
        ({"methods": {}}, ["methods: expected grids by name"]),
        ({"methods": {"ft": {**FT, "set": [1]}}}, ["ft: set: expected lines of `key: value`"]),
        ({"methods": {"ft": {**FT, "options": {"lr": [0.1, -1]}}}}, ["lr: expected"]),
        ({"methods": {"ft": {**FT, "yaml": "lost.yaml"}}}, ["lost.yaml: no such file"]),
    ],
)  # fmt: skip
def test_a_bad_plan_is_refused_before_a_model_is_loaded(
    project: Project, changes: dict, needles: list[str], capsys, monkeypatch
) -> None:
    monkeypatch.setattr("unike.backbones.load_backbone", None)
    assert tune.main(command(project, write(project, **changes))) == 2
    lines = errors(capsys)
    assert len(lines) == len(needles)
    assert all(any(needle in line for line in lines) for needle in needles)
    assert not (project.root / "log").exists()


# ---------------------------------------------------------------- the validation split


@pytest.mark.parametrize(
    ("more", "needle"),
    [
        (["--method", "x"], "--method: x: not in"),
        (["--jobs", "0"], "--jobs: 0; expected 1 to"),
        (["--val", "vqa"], "--val: vqa: expected TASK=FILE"),
        (["--val", "vqa=lost.json"], "--val: vqa=lost.json: expected TASK=FILE"),
        (["data.vqa.eval=x.json"], "data.vqa.eval: tuning evaluates the validation split alone"),
        (["--backbones", "lost"], "lost.yaml: no such file"),
    ],
)
def test_bad_input_is_one_line(project: Project, more: list[str], needle: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr("unike.backbones.load_backbone", None)
    assert tune.main(command(project, write(project), "ft", *more)) == 2
    (line,) = errors(capsys)
    assert needle in line


def test_the_eval_split_is_refused(project: Project, capsys, monkeypatch) -> None:
    monkeypatch.setattr("unike.backbones.load_backbone", None)
    path, data = write(project), project.data
    assert tune.main(command(project, path, "ft", "--val", f"vqa={data / 'vqa_eval.json'}")) == 2
    assert "is the eval split, data.vqa.eval" in errors(capsys)[0]
    assert tune.main(command(project, path, "ft", "--val", f"vqa={data / 'vqa_train.json'}")) == 2
    assert "is the train split" in errors(capsys)[0]
    mixed = json.loads((data / "vqa_val.json").read_text()) + json.loads((data / "vqa_eval.json").read_text())
    project.write_records(mixed, "vqa", "val")
    assert tune.main(command(project, path)) == 2
    (line,) = errors(capsys)
    assert "4 of its 6 records are in data.vqa.eval" in line
    for task in ("vqa", "caption"):
        (data / f"{task}_val.json").unlink()
    assert tune.main(command(project, path)) == 2
    assert "no validation split" in errors(capsys)[0]
    assert not (project.root / "log").exists()


def test_no_trial_names_an_eval_file(project: Project) -> None:
    plan = tuning.read_tuning(write(project))
    base = tuning.read_base(plan, "serac", "small", (), project.root)
    val = tuning.find_validation(base, {})
    assert list(val) == ["vqa", "caption"]
    for trial in tuning.make_trials(plan, "serac", base, "small", val, project.root / "out"):
        text = json.dumps(trial.run.hparams.to_dict())
        assert "_eval.json" not in text
        assert trial.run.hparams.data["vqa"]["eval"] == val["vqa"]
        assert str(trial.run.hparams.editor_dir).startswith(str(project.root / "out"))
        assert trial.run.task == "cross"
    (only,) = {
        t.run.task for t in tuning.make_trials(plan, "ft", base, "small", {"vqa": val["vqa"]}, Path("o"))
    }
    assert only == "vqa"


# ---------------------------------------------------------------- trials


def test_trials_are_run_once_and_logged(project: Project, capsys, monkeypatch) -> None:
    path = write(project)
    (project.data / "vqa_eval.json").rename(project.data / "moved.json")
    assert tune.main(command(project, path, "serac")) == 0
    first = capsys.readouterr().out
    entries = log(project, "serac")
    assert [entry["trial"] for entry in entries] == [1, 2]
    plan = tuning.read_tuning(path)
    assert [entry["options"] for entry in entries] == plan.draw("serac")
    for entry in entries:
        forced = entry["validation"]["teacher_forced"]
        # By its definition, of every metric's mean.
        assert entry["hm5"]["teacher_forced"] == pytest.approx(
            harmonic_mean([forced[m] for m in FIVE_METRICS]), abs=0.01
        )
        assert entry["hm8"]["teacher_forced"] == pytest.approx(
            harmonic_mean([forced[m] for m in METRICS]), abs=0.01
        )
        assert (entry["score_of"], entry["score"]) == ("all", entry["hm8"]["teacher_forced"])
        assert entry["hm8_minimal"] == {}
        assert (entry["n"], entry["failed"]) == (2, 0)
        assert entry["visits"] == 2 * entry["steps"] > 0
        assert entry["stopped"] in ("cap", "patience")
        assert entry["train_seconds"] >= 0
        assert entry["data"].keys() == {f"{t}.{s}" for t in ("vqa", "caption") for s in ("train", "val")}
    assert "| 1 | " in first
    assert f"winner: trial {tune.choose_winner(entries)['trial']}: editor_lr=" in first
    monkeypatch.setattr("unike.backbones.load_backbone", None)
    assert tune.main(command(project, path, "serac")) == 0
    assert capsys.readouterr().out == first
    assert log(project, "serac") == entries


def test_what_the_log_has_is_not_run_again_and_what_changed_is(project: Project) -> None:
    path = write(project)
    assert tune.main(command(project, path)) == 0
    first = log(project)
    # Without its records, too: the log alone counts.
    for folder in (project.root / "out/small/ft").iterdir():
        for file in folder.iterdir():
            file.unlink()
    assert tune.main(command(project, write(project, trials=3))) == 0
    more = log(project)
    assert more[:2] == first
    assert [entry["trial"] for entry in more] == [1, 2, 3]
    project.write_records([hard(record(i)) for i in (20, 21, 21)], "vqa", "val")
    assert tune.main(command(project, path)) == 0
    assert len({entry["key"] for entry in log(project)}) == 6, "other data, other trials"


def test_what_was_computed_before_a_kill_is_logged_by_the_next_call(project: Project, monkeypatch) -> None:
    path = write(project)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "log_finished", lambda *_: None)
        assert tune.main(command(project, path)) == 0
    assert not log(project)
    monkeypatch.setattr("unike.backbones.load_backbone", None)
    assert tune.main(command(project, path)) == 0
    assert [entry["trial"] for entry in log(project)] == [1, 2]


def test_ctrl_c_keeps_the_finished_trials(project: Project, capsys, monkeypatch) -> None:
    run_group, path = workers.runs.run_cases, write(project)
    asked: list[int] = []

    def stopped(*arguments: Any, **more: Any) -> Any:
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return run_group(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(workers.runs, "run_cases", stopped)
        assert tune.main(command(project, path)) == 130
    told = capsys.readouterr()
    assert "the same command continues" in told.err
    assert "| 2 | " in told.out
    assert "not run" in told.out
    assert [entry["trial"] for entry in log(project)] == [1]
    assert tune.main(command(project, path)) == 0
    assert [entry["trial"] for entry in log(project)] == [1, 2]


def test_a_trial_whose_loss_diverges_counts_as_one(project: Project, capsys, monkeypatch) -> None:
    assemble = workers.runs.assemble

    def diverge(hparams: Any, *rest: Any, **more: Any) -> Any:
        if hparams.lr == plan.draw("ft")[0]["lr"]:
            raise FloatingPointError("the loss is nan after 3 steps")
        return assemble(hparams, *rest, **more)

    path = write(project)
    plan = tuning.read_tuning(path)
    monkeypatch.setattr(workers.runs, "assemble", diverge)
    assert tune.main(command(project, path)) == 0
    first, second = sorted(log(project), key=lambda entry: entry["trial"])
    assert "the loss is nan after 3 steps" in first["failure"]
    assert first["score"] is None
    assert second["score"] is not None
    out = capsys.readouterr().out
    assert "failed" in out
    assert "winner: trial 2" in out


def test_a_trial_that_cannot_be_run_is_no_trial(project: Project, capsys, monkeypatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(workers.runs, "assemble", broken)
    assert tune.main(command(project, write(project))) == 1
    assert "out of memory" in capsys.readouterr().err
    assert not log(project)


def test_processes_share_the_trials(project: Project, monkeypatch) -> None:
    monkeypatch.setattr(tune, "count_most_processes", lambda: 2)
    path = write(project)
    assert tune.main([*command(project, path, "ft"), "--jobs", "2"]) == 0
    shared = {entry["key"]: entry["validation"] for entry in log(project)}
    alone = project.root / "alone"
    assert tune.main([*command(project, path, "ft"), "--log", str(alone), "--output", str(alone)]) == 0
    assert {e["key"]: e["validation"] for e in tuning.read_log(alone / "small-ft.jsonl")} == shared
    assert len(shared) == 2


def test_what_trials_share_is_prepared_once_and_from_the_same_train_records(project: Project) -> None:
    grid = {"yaml": "{backbone}.yaml", "options": {"lr": [0.01, 0.02]}}
    assert tune.main(command(project, write(project, methods={"unike": grid}), "unike")) == 0
    assert [entry["train_seconds"] for entry in log(project, "unike")] == [None, None]
    assert len(list((project.root / "out").rglob("knowledge.json"))) == 1
    assert list((project.root / "out/small/prefixes").iterdir()), "lower-layer activations are shared, too"


def test_a_manifest_says_that_validation_was_read(project: Project) -> None:
    assert tune.main(command(project, write(project))) == 0
    for folder in (project.root / "out/small/ft").iterdir():
        assert read_manifest(folder)["hparams"]["data"]["vqa"]["eval"].endswith("vqa_val.json")


# ---------------------------------------------------------------- the log and the table


@pytest.mark.parametrize("text", ["{", "[1]\n", '{"key": 1}\n'])
def test_a_damaged_log_is_named(project: Project, text: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr("unike.backbones.load_backbone", None)
    (project.root / "log").mkdir()
    (project.root / "log/small-ft.jsonl").write_text(text)
    assert tune.main(command(project, write(project))) == 2
    (line,) = errors(capsys)
    assert "small-ft.jsonl: line 1: " in line


def entry(trial: int, score: float | None, five: float = 0.0) -> dict[str, Any]:
    return {"trial": trial, "score": score, "hm5": {"teacher_forced": five}}


def test_the_winner_is_the_best_then_the_better_in_five_then_the_first() -> None:
    entries = [
        entry(1, 80.0),
        entry(2, None),
        entry(3, 90.0, 95.0),
        entry(4, 90.0, 96.0),
        entry(5, 90.0, 96.0),
    ]
    assert tune.choose_winner(entries)["trial"] == 4
    assert tune.choose_winner(entries[:3])["trial"] == 3
    assert tune.choose_winner(entries[1:2]) is None


def test_a_binding_cap_is_said_in_a_line(project: Project, capsys) -> None:
    capped = {**SERAC, "set": SERAC["set"] | {"editor_steps": 1}}
    assert tune.main(command(project, write(project, methods={"serac": capped}), "serac")) == 0
    assert "stopped by editor_steps, not by editor_patience: trial 1, 2" in capsys.readouterr().out
