"""Runs followed in TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from finished_runs import as_records, ended
from helpers import OPTIONS

from unike.config.hparams import HyperParams
from unike.evaluation.summary import RunningMeans
from unike.runs import checks, tracking
from unike.runs.records import RecordWriter
from unike.runs.tracking import Tracker, name_run, track
from unike.system import findings
from unike.types import FIVE_METRICS, UserError


def hparams(**changes: Any) -> HyperParams:
    return HyperParams.from_dict(OPTIONS | {"model_name": "blip2", "name": "model", **changes})


class Kept(list[tuple[int, dict[str, float]]]):
    def log(self, values: Any, step: int) -> None:
        self.append((step, dict(values)))


def follow(folder: Path, records: list[dict[str, Any]], resume: bool = False, **changes: Any) -> None:
    """As runs do it."""
    hp, means = hparams(**changes), RunningMeans([])
    with RecordWriter(folder, resume, hp.decisive()) as writer, track(hp, writer) as tracker:
        for record in as_records(records):
            writer.write(record.to_json())
            means.add(record)
            tracker.add(record, means)


@pytest.mark.parametrize(
    ("value", "found"),
    [([], ()), ("wandb", ("wandb",)), (["TensorBoard", "wandb"], ("tensorboard", "wandb"))],
)
def test_the_option(value: Any, found: tuple[str, ...]) -> None:
    assert hparams(log_to=value).log_to == found
    assert "log_to" not in hparams(log_to=value).decisive(), "a run may be resumed with another one"


@pytest.mark.parametrize("value", ["mlflow", ["wandb", "wandb"], 3, None, ["tensorboard", 1]])
def test_a_wrong_option(value: Any) -> None:
    with pytest.raises(
        UserError, match="log_to: expected a list of different names out of tensorboard, wandb"
    ):
        hparams(log_to=value)


def test_what_is_told() -> None:
    kept, means = Kept(), RunningMeans([])
    tracker = Tracker([kept], 5)
    failed = {"id": "x", "status": "failed", "seconds": 2.0, "loss": None}
    for record in as_records([ended(0), ended(1, ["reliability"]), failed]):
        means.add(record)
        tracker.add(record, means)
    assert [step for step, _ in kept] == [6, 7, 8]
    assert kept[0][1] == {f"after/{m}": 100.0 for m in FIVE_METRICS} | {
        "edit/loss": 0.01, "edit/steps": 1.0, "edit/seconds": 0.25, "edit/bytes": 2048.0,
    }  # fmt: skip
    assert kept[1][1]["after/m_locality"] == 50.0
    assert kept[1][1]["after/reliability"] == 100.0
    assert kept[2][1]["edit/seconds"] == 2.0
    assert "edit/loss" not in kept[2][1]


def test_what_is_not_installed_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    hp = hparams(log_to=["tensorboard", "wandb"], name="nowhere")
    problems = findings.collect_problems(lambda: checks.require_backbone(hp))
    problems = [p for p in problems if "log_to" in p]
    assert problems == [
        f"hparams: log_to: {name} is not installed; pip install '.[logging]'"
        for name in ("tensorboard", "wandb")
    ]
    others = findings.collect_problems(lambda: checks.require_backbone(hparams()))
    assert not [p for p in others if "log_to" in p]


def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    follow(tmp_path / "run", [ended(0)])
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["manifest.json", "records.jsonl"]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow(tmp_path / "run", [ended(0), ended(1, ["reliability"])], log_to="tensorboard")
    follow(tmp_path / "run", [ended(2)], resume=True, log_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = {
        tag: [(e.step, round(e.value, 3)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert found["edit/steps"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert found["after/m_locality"][:2] == [(1, 100.0), (2, 50.0)]
    assert set(found) == {f"after/{m}" for m in FIVE_METRICS} | {
        f"edit/{k}" for k in ("loss", "steps", "seconds", "bytes")
    }


def test_wandb_keeps_its_run(tmp_path: Path) -> None:
    manifest = {"started": "2024-01-01"}
    assert name_run(tmp_path, manifest) == name_run(tmp_path / "x" / "..", manifest)
    assert name_run(tmp_path, manifest) != name_run(tmp_path, {"started": "2024-01-02"})


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    follow(tmp_path / "run", [ended(0), ended(1)], log_to="wandb")
    name = name_run(tmp_path / "run", json.loads((tmp_path / "run" / "manifest.json").read_text()))
    (kept,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb")
    # Its own process writes the file, a little after the run is finished.
    until = time.monotonic() + 60
    while b"after/reliability" not in kept.read_bytes() and time.monotonic() < until:
        time.sleep(0.2)
    assert b"after/reliability" in kept.read_bytes()
