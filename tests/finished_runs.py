"""Run folders as they are when a run has ended, made by hand: no model is asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers import OPTIONS, record, save_pictures

from unike.config.hparams import HyperParams
from unike.datasets.declarations import list_metrics
from unike.evaluation.record import Record
from unike.runs.records import MANIFEST, RECORDS
from unike.system.files import compute_sha256
from unike.types import FIVE_METRICS

UNCHANGED_PROBES = {metric.name for metric in list_metrics() if metric.expect == "unchanged"}

PER_CASE = {
    "reliability": "image",
    "t_generality": "image",
    "m_generality": "image_rephrase",
    "m_locality": "m_loc",
}


def ended(number: int, passing: Sequence[str] = FIVE_METRICS, **more: Any) -> dict[str, Any]:
    """A record of which the probes in ``passing`` pass."""
    data = record(number)
    scores = {
        mode: {
            m: {"before": float(m in UNCHANGED_PROBES), "after": float(m in passing)} for m in FIVE_METRICS
        }
        for mode in ("teacher_forced", "generated")
    }
    answers = {
        m: {
            "prompt": f"Question: {data['src']} Short answer:", "target": data["alt"], "before": "nothing",
            "after": data["alt"] if (m in passing) != (m in UNCHANGED_PROBES) else "nothing",
        }
        for m in FIVE_METRICS
    }  # fmt: skip
    decisions = {"alpha": {m: 0.1 * number + 0.05 * i for i, m in enumerate(FIVE_METRICS)}}
    made = {
        "id": f"vqa-{number}",
        "task": "vqa",
        "status": "ok",
        "seconds": 0.25,
        "steps": number + 1,
        "loss": 0.01,
    }
    return {**made, "bytes": 2048, "scores": scores, "decisions": decisions, "answers": answers, **more}


def as_records(values: Sequence[dict[str, Any]]) -> list[Record]:
    """The records of JSON objects."""
    return [Record.from_json(one) for one in values]


def save_run(
    folder: Path, records: Sequence[dict[str, Any]], data: Path | None = None, **manifest: Any
) -> Path:
    """A run's folder; with ``data`` the run names annotations and pictures there, which are made."""
    options = OPTIONS | {"model_name": "blip2", "name": "model", "knowledge_dir": "knowledge"}
    checksums = {}
    if data is not None:
        annotations = data / "vqa_eval.json"
        if not annotations.exists():
            save_pictures(data)
            annotations.write_text(json.dumps([record(i) for i in range(9)]))
        options |= {"image_root": str(data), "data": {"vqa": {"eval": str(annotations)}}}
        checksums = {"data.vqa.eval": compute_sha256(annotations)}
    hparams = HyperParams.from_dict(options).decisive() | {"task": "vqa", "generated": True}
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "hparams": hparams,
        "data": checksums,
        "seed": 1,
        "started": "2024-01-01T00:00:00+00:00",
    } | manifest
    (folder / MANIFEST).write_text(json.dumps(made))
    (folder / RECORDS).write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder
