"""What rows are compared by: single metrics, means of them, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from unike.evaluation.metrics import harmonic_mean, mean_of, paired_difference
from unike.evaluation.record import Record
from unike.evaluation.summary import (
    HARMONIC_OF,
    MEANS_OF,
    MODES,
    SHORT_TITLES,
    Estimate,
    Summary,
    get_estimate,
)
from unike.types import METRICS

ALL = "all"


# A number of a row: which metrics it is made of, and how.
MEASURES: dict[str, tuple[tuple[str, ...], Callable[[Sequence[float]], float]]] = {
    **{metric: ((metric,), mean_of) for metric in METRICS},
    **{name: (tuple(metrics), mean_of) for name, metrics in MEANS_OF.items()},
    **{name: (tuple(metrics), harmonic_mean) for name, metrics in HARMONIC_OF.items()},
}


MEASURE_TITLES = {
    **SHORT_TITLES,
    "generality": "mean generality",
    "locality": "mean locality",
    "five": "HM5",
    ALL: "HM8",
}


@dataclass(frozen=True)
class Row:
    """A row of a table: its summary, the records it sums up, and the published figures.

    ``complete`` is off where records are still missing: such a row is shown and not compared.
    """

    name: str
    summary: Summary
    records: Sequence[Record] = field(default=(), repr=False)
    published: Mapping[str, float] = field(default_factory=dict)
    ours: bool = False
    complete: bool = True

    def find_estimate(self, measure: str, mode: str = MODES[0], when: str = "after") -> Estimate | None:
        """``mean, low, high, n`` of a metric, a mean of metrics or a harmonic mean, in percent."""
        if measure in METRICS:
            return get_estimate(self.summary.get("metrics", {}).get(measure, {}), mode, when)
        key: Literal["means", "harmonic_mean"] = "means" if measure in MEANS_OF else "harmonic_mean"
        return get_estimate(self.summary.get(key, {}).get(mode, {}), measure, when)

    def find_mean(self, measure: str, mode: str = MODES[0]) -> float | None:
        found = self.find_estimate(measure, mode)
        return None if found is None else found["mean"]


def compare_rows(
    one: Row, other: Row, measure: str, seed: int, mode: str = MODES[0]
) -> tuple[float, float, float] | None:
    """``one`` less ``other`` in percent, with its 95% interval: the paired bootstrap over the records that
    both have, by whole sequences where there are several. None where they share none."""
    metrics, of = MEASURES[measure]
    known = [_collect(row, metrics, mode) for row in (one, other)]
    shared = [key for key in known[0] if key in known[1]]
    if not shared:
        return None
    columns = [[[values[key][i] for key in shared] for i in range(len(metrics))] for values in known]
    groups = [sequence for sequence, _ in shared]
    grouped = groups if len(set(groups)) > 1 else None
    return paired_difference(columns[0], columns[1], seed, of, groups=grouped)


def _collect(row: Row, metrics: Sequence[str], mode: str) -> dict[tuple[int | None, str], list[float]]:
    """The row's values in percent by sequence and id, of records that have all the metrics."""
    out = {}
    for record in row.records:
        scores = record.get_scores(mode)
        if not record.is_step and all(metric in scores for metric in metrics):
            key = (record.sequence, record.id)
            out[key] = [100.0 * scores[metric].after for metric in metrics]
    return out
