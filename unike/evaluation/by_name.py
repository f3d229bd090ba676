"""Several probes of one name are one metric of a record: their mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from unike.datasets.declarations import list_metrics
from unike.evaluation.record import Score

V = TypeVar("V")


def average_by_name(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of the values of each name, in the order of the names."""
    found: dict[str, list[float]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return {name: _mean(values) for name, values in found.items()}


def keep_first(pairs: Iterable[tuple[str, V]]) -> dict[str, V]:
    """The first value of each name, for what has no mean."""
    found: dict[str, V] = {}
    for name, value in pairs:
        found.setdefault(name, value)
    return found


def combine_scores(pairs: Iterable[tuple[str, float, float]]) -> dict[str, Score]:
    """Scores by metric of a name's values before and after the edit, with the metrics that are declared to be
    the mean of others, where all of these are there."""
    known = list(pairs)
    before = average_by_name((name, value) for name, value, _ in known)
    after = average_by_name((name, value) for name, _, value in known)
    scores = {name: Score(before[name], after[name]) for name in after}
    for metric in list_metrics():
        if metric.mean_of and scores.keys() >= set(metric.mean_of):
            values = [_mean([part[name] for name in metric.mean_of]) for part in (before, after)]
            scores[metric.name] = Score(values[0], values[1])
    return scores


def _mean(values: Sequence[float]) -> float:
    # One alone stays what it is, whole numbers included.
    return values[0] if len(values) == 1 else sum(values) / len(values)
