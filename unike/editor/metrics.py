"""A record in EasyEdit's shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unike.evaluation.record import ABSENT, ByProbe, Record, Score
from unike.types import Case

METRIC_KEYS = {
    "reliability": "rewrite_acc",
    "t_generality": "rephrase_acc",
    "m_generality": "image_rephrase_acc",
    "t_locality": "locality_acc",
    "m_locality": "multimodal_locality_acc",
}


class Value(float):
    """A score in [0, 1]; EasyEdit's users call ``item`` on theirs, which are tensors."""

    def item(self) -> float:
        """The score as a plain number."""
        return float(self)


def describe_metric(number: int, case: Case, record: Record, preset: str | None = None) -> dict[str, Any]:
    """A case's record in EasyEdit's shape; ``post`` is by the definitions of ``preset``, if one is given."""
    query = case.request.query
    rewrite = {"prompt": query.prompt, "target": query.target, "image": query.image}
    metric: dict[str, Any] = {"case_id": number, "requested_rewrite": rewrite, "time": record.seconds}
    scores = {
        METRIC_KEYS.get(m, f"{m}_acc"): value for m, value in record.get_scores("teacher_forced").items()
    }
    metric["pre"] = {k: None if s.before is None else Value(s.before) for k, s in scores.items()}
    metric["post"] = {key: Value(value.after) for key, value in scores.items()}
    metric |= {"steps": record.steps, "loss": record.loss, "reached": record.reached}
    known = {} if preset is None else record.presets.get(preset, {})
    metric["post"] |= {METRIC_KEYS.get(m, f"{m}_acc"): Value(v) for m, v in known.items() if v is not None}
    if record.error is not None:
        metric["error"] = record.error
    return metric


def _name_metric(probe: str) -> str:
    """The metric of a probe: a second probe of a metric has a number after its name."""
    return re.sub(r" [0-9]+$", "", probe)


def merge_probes(record: Record) -> Record:
    """The record with one score for each metric: the mean of those of its probes.

    Answers and retrieved items stay by probe.
    """
    names = {name for scores in record.scores.values() for name in scores}
    if all(_name_metric(name) == name for name in names):
        return record

    def average_scores(scores: Mapping[str, Score]) -> dict[str, Score]:
        return {
            metric: Score(_average([s.before for s in some]), float(_average([s.after for s in some]) or 0))
            for metric, some in _group(scores).items()
        }

    def average(parts: Mapping[str, ByProbe]) -> Mapping[str, ByProbe]:
        if parts is ABSENT:
            return ABSENT
        return {
            name: {m: _average(v) for m, v in _group(by_probe).items()} for name, by_probe in parts.items()
        }

    return replace(
        record,
        scores={mode: average_scores(scores) for mode, scores in record.scores.items()},
        presets=average(record.presets),
        base_right=average(record.base_right),
        decisions=average(record.decisions),
    )


def _group(by_probe: Mapping[str, Any]) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {}
    for name, value in by_probe.items():
        out.setdefault(_name_metric(name), []).append(value)
    return out


def _average(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
