"""What rows are compared by: single metrics, means of them, and differences with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from unike.evaluation.metrics import harmonic_mean, mean_of, paired_difference
from unike.evaluation.record import Record
from unike.evaluation.summary import (
    HARMONIC_OF,
    MEANS_OF,
    MODES,
    Estimate,
    Spread,
    Summary,
    get_estimate,
)
from unike.evaluation.titles import MetricTitles

ALL, ALL_MINIMAL = "all", "all_minimal"
# Fewer sequences give no interval: their own number, not their records', is what can be resampled.
LEAST_SEQUENCES = {20: 10, math.inf: 8}


# A number of a row: which metrics it is made of, and how.
_COMBINED: dict[str, tuple[tuple[str, ...], Callable[[Sequence[float]], float]]] = {
    **{name: (tuple(metrics), mean_of) for name, metrics in MEANS_OF.items()},
    **{name: (tuple(metrics), harmonic_mean) for name, metrics in HARMONIC_OF.items()},
}


MEASURE_TITLES = MetricTitles(
    {
        "same_question": "same Q (far)",
        "minimal_pair": "same Q (min. pair)",
        "generality": "mean generality",
        "locality": "mean locality",
        "five": "HM5",
        ALL: "HM8 (far)",
        ALL_MINIMAL: "HM8 (min. pair)",
    },
    is_short=True,
)
Difference = tuple[float, float, float]


def get_parts(measure: str) -> tuple[tuple[str, ...], Callable[[Sequence[float]], float]]:
    """The metrics that a measure is made of, and how: of a metric, itself."""
    return _COMBINED.get(measure) or ((measure,), mean_of)


def count_least_sequences(edits: int) -> int:
    """How many sequences of so many edits an interval needs; 0 for single edits."""
    return 0 if edits == 1 else next(n for most, n in LEAST_SEQUENCES.items() if edits <= most)


class Training(NamedTuple):
    """How something that a row needs was trained; ``stopped`` is ``patience`` or ``cap``."""

    part: str
    steps: int
    visits: int
    seconds: float
    best_step: int
    stopped: str


@dataclass(frozen=True)
class Row:
    """A row of a table: its summary, the records it sums up, and the published figures.

    ``complete`` is off where records are still missing: such a row is shown and not compared. ``edits`` are
    those of a sequence: with fewer sequences than ``count_least_sequences`` says, the ends of intervals are
    NaN. ``strata`` says for each record which seed of the whole pipeline it is of, ``by_seed`` has their
    summaries. ``gate_of`` names the row that this one is with our gate around it. ``trainings`` are of each
    seed what the row's method trains.
    """

    name: str
    summary: Summary
    records: Sequence[Record] = field(default=(), repr=False)
    published: Mapping[str, float] = field(default_factory=dict)
    ours: bool = False
    complete: bool = True
    edits: int = 1
    strata: Sequence[int] | None = field(default=None, repr=False)
    by_seed: Mapping[int, Summary] = field(default_factory=dict, repr=False)
    gate_of: str | None = None
    trainings: Sequence[Training] = ()

    @property
    def has_intervals(self) -> bool:
        """Whether there are enough sequences."""
        return self.count_sequences() >= count_least_sequences(self.edits)

    def count_sequences(self) -> int:
        """How many sequences there are, of all seeds; 0 of single edits."""
        found = self.summary.get("sequences")
        return found["n"] if found else 0

    def find_estimate(self, measure: str, mode: str = MODES[0], when: str = "after") -> Estimate | None:
        """``mean, low, high, n`` of a metric, a mean of metrics or a harmonic mean, in percent."""
        if measure not in MEANS_OF and measure not in HARMONIC_OF:
            found = get_estimate(self.summary.get("metrics", {}).get(measure, {}), mode, when)
        else:
            key: Literal["means", "harmonic_mean"] = "means" if measure in MEANS_OF else "harmonic_mean"
            found = get_estimate(self.summary.get(key, {}).get(mode, {}), measure, when)
        if found is None or self.has_intervals:
            return found
        return {**found, "low": math.nan, "high": math.nan}

    def find_cost(self, name: str) -> Spread | None:
        """Steps or seconds per edit."""
        found = self.summary.get("costs", {}).get(name)
        if found is None or self.has_intervals:
            return found
        return {"mean": found["mean"], "low": math.nan, "high": math.nan}

    def find_mean(self, measure: str, mode: str = MODES[0]) -> float | None:
        found = self.find_estimate(measure, mode)
        return None if found is None else found["mean"]

    def list_parts(self) -> list[tuple[int, Record]]:
        """The records with their seeds."""
        return list(zip(self.strata or [0] * len(self.records), self.records, strict=True))


def compare_rows(
    one: Row,
    other: Row,
    measure: str,
    seed: int,
    mode: str = MODES[0],
    keep: Callable[[Record], bool] | None = None,
) -> Difference | None:
    """``one`` less ``other`` in percent, with its 95% interval: the paired bootstrap over the records that
    both have (and that one ``keep``s), by whole sequences where there are several, and by seeds first where
    there are several of these. None where they share none. The ends are NaN where a row has no intervals."""
    metrics, of = get_parts(measure)
    known = [_collect(row, metrics, mode, keep) for row in (one, other)]
    shared = [key for key in known[0] if key in known[1]]
    if not shared:
        return None
    columns = [[[values[key][i] for key in shared] for i in range(len(metrics))] for values in known]
    strata, groups = [stratum for stratum, _, _ in shared], [sequence for _, sequence, _ in shared]
    grouped = groups if len(set(zip(strata, groups, strict=True))) > len(set(strata)) else None
    found = paired_difference(columns[0], columns[1], seed, of, groups=grouped, strata=strata)
    if one.has_intervals and other.has_intervals:
        return found
    return found[0], math.nan, math.nan


def average(row: Row, measure: str, mode: str, keep: Callable[[Record], bool]) -> float | None:
    """A measure in percent over those of a row's records that one ``keep``s; None without any."""
    metrics, of = get_parts(measure)
    scores = [r.get_scores(mode) for r in row.records if r.ok and not r.is_step and keep(r)]
    columns = [[100.0 * found[metric].after for found in scores if metric in found] for metric in metrics]
    return of([mean_of(column) for column in columns]) if all(columns) else None


def _collect(
    row: Row, metrics: Sequence[str], mode: str, keep: Callable[[Record], bool] | None
) -> dict[tuple[int, int | None, str], list[float]]:
    """The row's values in percent by seed, sequence and id, of records that have all the metrics."""
    out = {}
    for stratum, record in row.list_parts():
        scores = record.get_scores(mode)
        kept = keep is None or keep(record)
        if kept and not record.is_step and all(metric in scores for metric in metrics):
            key = (stratum, record.sequence, record.id)
            out[key] = [100.0 * scores[metric].after for metric in metrics]
    return out
