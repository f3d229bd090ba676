"""Records summed up: means with intervals, costs, curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from unike.evaluation.metrics import (
    FLUENCY,
    PRESETS,
    bootstrap_interval,
    bootstrap_means,
    harmonic_mean,
    mean_of,
    ngram_entropy,
)
from unike.types import FIVE_METRICS, METRICS

MODES = ("teacher_forced", "generated")
WHEN = ("before", "after")
LOCALITY = ("t_locality", "m_locality")
# Probes of which a good edit changes nothing.
KEPT = (*LOCALITY, "same_question", "same_image")
HARMONIC = ("five", "all")
HARMONIC_OF = dict(zip(HARMONIC, (FIVE_METRICS, METRICS), strict=True))
MEANS_OF = {"generality": ("t_generality", "m_generality"), "locality": LOCALITY}
TITLES = {
    "reliability": "Reliability",
    "t_generality": "T-Generality",
    "m_generality": "M-Generality",
    "t_locality": "T-Locality",
    "m_locality": "M-Locality",
    "same_question": "same question",
    "same_image": "same image",
    "joint": "joint",
}
SHORT_TITLES = {
    "reliability": "Rel",
    "t_generality": "T-Gen",
    "m_generality": "M-Gen",
    "t_locality": "T-Loc",
    "m_locality": "M-Loc",
    "same_question": "same Q",
    "same_image": "same I",
    "joint": "joint",
}


def summarise(
    records: Sequence[Mapping[str, Any]], seed: int, presets: Sequence[str] = ("paper",)
) -> dict[str, Any]:
    """Means with 95% bootstrap intervals in percent, as JSON values.

    ``["metrics"][metric][mode]["before" | "after"]`` holds ``mean, low, high, n``, and the entries of
    ``harmonic_mean`` (of the five metrics, and of all eight), of ``presets`` and of ``base_right`` (how
    many of the probes that must not change the base itself answers right) are alike, and those of
    ``means``: of the two generalities and of the two localities. ``fluency`` is the
    mean n-gram entropy of the generated answers. Failed records count in ``failed`` alone. ``seconds``
    and ``steps`` are means per edit, with their intervals under ``costs``, ``bytes`` of what is applied
    at the end; None where unrecorded. ``decisions`` holds what edits decided, as a mean per probe.

    For sequences all this is of the records at the end, and whole sequences are resampled where there
    are two or more; ``curve`` holds the means after each edit.
    """
    steps = [record for record in records if record.get("kind") == "step"]
    ends = [record for record in records if record.get("kind") != "step"]
    done = [record for record in ends if record.get("status", "ok") == "ok"]
    sample = _Sample(done, seed)
    metrics: dict[str, Any] = {}
    for metric in _ordered({m for r in done for mode in r.get("scores", {}).values() for m in mode}):
        for mode in MODES:
            pairs = {when: sample.interval("scores", mode, metric, when) for when in WHEN}
            if found := {when: value for when, value in pairs.items() if value}:
                metrics.setdefault(metric, {})[mode] = found
    summary = {
        "n": len(done),
        "failed": len(ends) - len(done),
        "metrics": metrics,
        "harmonic_mean": sample.combined(HARMONIC_OF, harmonic_mean),
        "means": sample.combined(MEANS_OF, mean_of),
        "presets": {name: _preset(sample, name) for name in presets},
        "base_right": {mode: held for mode in MODES if (held := sample.intervals("base_right", mode))},
        "fluency": _fluency(done),
        "seconds": _mean(done, "seconds"),
        "steps": _mean(done, "steps"),
        "costs": {key: sample.cost(key) for key in ("seconds", "steps")},
        "decisions": _decisions(done),
        "bytes": _mean(done, "bytes"),
    }
    return summary | _sequences(steps, ends) if steps else summary


class RunningMeans:
    """The five metrics after the edit, teacher-forced, in percent, as a bar shows them."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self.sums: dict[str, tuple[float, int]] = {}
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        for metric, value in record.get("scores", {}).get("teacher_forced", {}).items():
            total, n = self.sums.get(metric, (0.0, 0))
            self.sums[metric] = total + value["after"], n + 1

    def values(self) -> dict[str, float]:
        """By metric, those that have been seen."""
        return {m: 100 * self.sums[m][0] / self.sums[m][1] for m in FIVE_METRICS if m in self.sums}

    def __str__(self) -> str:
        return " ".join(f"{SHORT_TITLES[m]} {value:.1f}" for m, value in self.values().items())


def leading_mode(records: Iterable[Mapping[str, Any]]) -> str:
    """``generated`` where all records that have scores hold it, else ``teacher_forced``."""
    found = [record["scores"] for record in records if record.get("scores")]
    return MODES[1] if found and all(MODES[1] in scores for scores in found) else MODES[0]


def held(record: Mapping[str, Any], mode: str) -> dict[str, bool]:
    """By probe whether the edit did in full what a good edit does."""
    scores = record.get("scores", {}).get(mode, {})
    return {name: scores[name].get("after") == 1 for name in _ordered(set(scores))}


def harmonic_of(summary: Mapping[str, Any], mode: str, name: str) -> Mapping[str, float] | None:
    """The harmonic mean after the edit, of the ``five`` metrics or of ``all`` eight."""
    return _entry(summary.get("harmonic_mean", {}).get(mode, {}), name, "after")


class _Sample:
    """Records whose values are averaged and resampled together."""

    def __init__(self, records: Sequence[Mapping[str, Any]], seed: int) -> None:
        self.records, self.seed = records, seed
        # One sequence alone says nothing about others: then its records are resampled.
        self.grouped = len({record.get("sequence") for record in records}) > 1

    def values(self, *keys: str) -> tuple[list[float], list[Any] | None]:
        """What the records hold under ``keys``, in percent, with their sequences."""
        values, groups = [], []
        for record in self.records:
            value: Any = record
            for key in keys:
                value = value.get(key, {})
            if isinstance(value, (int, float)):
                values.append(100.0 * value)
                groups.append(record.get("sequence"))
        return values, groups if self.grouped else None

    def interval(self, *keys: str) -> dict[str, float] | None:
        values, groups = self.values(*keys)
        if not values:
            return None
        # One seed for all: the same resampling of records behind every metric.
        mean, low, high = bootstrap_interval(values, self.seed, groups=groups)
        return {"mean": mean, "low": low, "high": high, "n": len(values)}

    def cost(self, key: str) -> dict[str, float] | None:
        """Mean and interval of a number per edit, as it is recorded."""
        rows = [record for record in self.records if record.get(key) is not None]
        groups = [record.get("sequence") for record in rows] if self.grouped else None
        values = [float(record[key]) for record in rows]
        if not values:
            return None
        found = bootstrap_interval(values, self.seed, groups=groups)
        return dict(zip(("mean", "low", "high"), found, strict=True))

    def intervals(self, *keys: str) -> dict[str, dict[str, float]]:
        """One for each metric that the records hold under ``keys``."""
        names: set[str] = set()
        for record in self.records:
            value: Any = record
            for key in keys:
                value = value.get(key, {})
            names |= set(value)
        return {name: found for name in _ordered(names) if (found := self.interval(*keys, name))}

    def combined(
        self, sets: Mapping[str, Sequence[str]], of: Callable[[Sequence[float]], float]
    ) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
        """By mode and set of metrics: one number ``of`` their means, before and after, where all of the
        set's metrics are there."""
        out: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
        for mode, (name, metrics), when in product(MODES, sets.items(), WHEN):
            pairs = [self.values("scores", mode, metric, when) for metric in metrics]
            if not all(values for values, _ in pairs):
                continue
            mean = of([float(np.mean(values)) for values, _ in pairs])
            drawn = np.stack([bootstrap_means(v, self.seed, groups=g) for v, g in pairs])
            low, high = np.quantile([of(column) for column in drawn.T.tolist()], [0.025, 0.975])
            found = {"mean": mean, "low": float(low), "high": float(high), "n": len(pairs[0][0])}
            out.setdefault(mode, {}).setdefault(name, {})[when] = found
        return out


def _preset(sample: _Sample, name: str) -> dict[str, Any]:
    metrics = sample.intervals("presets", name)
    if name == "paper":
        names = _ordered({m for r in sample.records for m in r.get("scores", {}).get(MODES[0], {})})
        found = {m: sample.interval("scores", MODES[0], m, "after") for m in names}
        metrics = {m: value for m, value in found.items() if value}
    return {"provenance": PRESETS[name].provenance, "metrics": metrics}


def _fluency(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    said = [a for r in records if "generated" in r.get("scores", {}) for a in r.get("answers", {}).values()]
    if not said:
        return None
    means = {when: float(np.mean([ngram_entropy(answer[when] or "") for answer in said])) for when in WHEN}
    return means | {"n": len(said), "source": FLUENCY}


def _sequences(steps: Sequence[Mapping[str, Any]], ends: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many sequences there are, and the curve: in percent, teacher-forced, after each edit."""
    curve = []
    for position in sorted({record["position"] for record in steps}):
        here = [r for r in steps if r["position"] == position and r["status"] == "ok"]
        newest = _percent_means([{m: v["after"] for m, v in r["scores"][MODES[0]].items()} for r in here])
        former = _percent_means([r["former"] for r in here])
        curve.append({"edits": position, "n": len(here), "newest": newest, "former": former})
    numbers = {record["sequence"] for record in ends}
    return {"sequences": {"n": len(numbers), "length": len(curve)}, "curve": curve}


def _percent_means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = _ordered({name for row in rows for name in row})
    return {name: 100.0 * float(np.mean([row[name] for row in rows if name in row])) for name in names}


def _ordered(metrics: set[str]) -> list[str]:
    return [metric for metric in METRICS if metric in metrics] + sorted(metrics - set(METRICS))


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return float(np.mean(values)) if values else None


def _decisions(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for what, by_probe in record.get("decisions", {}).items():
            for probe, value in by_probe.items():
                # Null stands for what was no number.
                if value is None:
                    continue
                found.setdefault(what, {}).setdefault(probe, []).append(value)
    return {what: {probe: float(np.mean(v)) for probe, v in probes.items()} for what, probes in found.items()}


def _entry(modes: Mapping[str, Any], mode: str, when: str) -> Mapping[str, float] | None:
    return modes.get(mode, {}).get(when)
