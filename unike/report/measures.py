"""What rows are compared in: single metrics, means of them, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unike.evaluation.metrics import harmonic_mean, mean_of, paired_difference
from unike.evaluation.summary import HARMONIC_OF, MEANS_OF, MODES, SHORT_TITLES
from unike.types import METRICS

ALL = "all"


# A number of a row: which metrics it is made of, and how.
MEASURES: dict[str, tuple[tuple[str, ...], Callable[[Sequence[float]], float]]] = {
    **{metric: ((metric,), mean_of) for metric in METRICS},
    **{name: (tuple(metrics), mean_of) for name, metrics in MEANS_OF.items()},
    **{name: (tuple(metrics), harmonic_mean) for name, metrics in HARMONIC_OF.items()},
}


MEASURE_TITLES = {
    **SHORT_TITLES, "generality": "mean generality", "locality": "mean locality", "five": "HM5", ALL: "HM8",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of a table: its summary, the records behind it, and the published figures beside it.

    ``complete`` is off where records are still missing: such a row is shown and not compared.
    """

    name: str
    summary: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    published: Mapping[str, float] = field(default_factory=dict)
    ours: bool = False
    complete: bool = True

    def entry(self, measure: str, mode: str = MODES[0], when: str = "after") -> Mapping[str, float] | None:
        """``mean, low, high, n`` of a metric, a mean of metrics or a harmonic mean, in percent."""
        part = "metrics" if measure in METRICS else "means" if measure in MEANS_OF else "harmonic_mean"
        held = self.summary.get(part, {})
        pair = held.get(measure, {}).get(mode) if part == "metrics" else held.get(mode, {}).get(measure)
        found: Mapping[str, float] | None = (pair or {}).get(when)
        return found

    def mean(self, measure: str, mode: str = MODES[0]) -> float | None:
        found = self.entry(measure, mode)
        return None if found is None else found["mean"]


def difference(
    one: Row, other: Row, measure: str, seed: int, mode: str = MODES[0]
) -> tuple[float, float, float] | None:
    """``one`` less ``other`` in percent, with its 95% interval: the paired bootstrap over the records that
    both hold, by whole sequences where there are several. None where they share none."""
    metrics, of = MEASURES[measure]
    held = [_values(row, metrics, mode) for row in (one, other)]
    shared = [key for key in held[0] if key in held[1]]
    if not shared:
        return None
    columns = [[[values[key][i] for key in shared] for i in range(len(metrics))] for values in held]
    groups = [sequence for sequence, _ in shared]
    grouped = groups if len(set(groups)) > 1 else None
    return paired_difference(columns[0], columns[1], seed, of, groups=grouped)


def _values(row: Row, metrics: Sequence[str], mode: str) -> dict[tuple[Any, str], list[float]]:
    """The row's values in percent by sequence and id, of records that hold all the metrics."""
    out = {}
    for record in row.records:
        scores = record.get("scores", {}).get(mode, {})
        if record.get("kind") == "step" or any(metric not in scores for metric in metrics):
            continue
        key = (record.get("sequence"), str(record["id"]))
        out[key] = [100.0 * scores[metric]["after"] for metric in metrics]
    return out
