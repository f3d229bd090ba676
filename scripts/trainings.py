"""What the rows of a table trained, as the files beside the trained tensors say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.plan import Run
from unike.methods.preparation.folders import find_editor, find_scope_classifier
from unike.methods.registry import resolve_needs
from unike.report.measures import Training


def read_trainings(planned: Sequence[Run]) -> list[Training]:
    """The trainings of a row's runs, the editor's before the scope classifier's. What is not there, or says
    nothing of its training, is left out."""
    found = []
    for run in planned:
        needs = resolve_needs(run.hparams)
        if needs.training and run.hparams.editor_dir and (folder := find_editor(run.hparams)):
            report = _read(folder / "editor.json")
            found.append(_make("editor", report, "step", "visits"))
        if needs.scope and run.hparams.scope_dir and (folder := find_scope_classifier(run.hparams)):
            report = _read(folder / "scope.json")
            found.append(_make("scope classifier", report, "steps", "record_visits"))
    return [training for training in found if training is not None]


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")).get("training") or {}


def _make(part: str, report: dict[str, Any], steps: str, visits: str) -> Training | None:
    if not report.get("stopped"):
        return None
    ended = report["seconds"], report["best_step"], report["stopped"]
    return Training(part, report[steps], report[visits], *ended)
