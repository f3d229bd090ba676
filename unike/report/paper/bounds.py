"""How far a gate's two measures can go: what any thresholds on them could tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unike.evaluation.record import Record
from unike.report.measures import Row
from unike.report.paper.grids import Cell, Grid

WITHIN, OUTSIDE = "m_generality", "minimal_pair"
GATE_MEASURES = ("overlap", "similarity")
KIND = "kind"


class Bound(NamedTuple):
    """What the best of all thresholds on two measures reach, as shares in [0, 1]: of the queries within an
    edit's scope those for which the gate would open, and of those outside for which it would stay shut."""

    opened: float
    shut: float


def find_bound(within: NDArray[np.float64], outside: NDArray[np.float64]) -> Bound:
    """The thresholds with the largest least of both shares, of these the largest sum.

    ``within`` (n, 2) and ``outside`` (m, 2): both measures of each query. The gate opens where both are at
    least their threshold. Every threshold that separates any two of the queries is tried.
    """
    first, second = (
        np.append(np.unique(np.concatenate([within[:, i], outside[:, i]])), np.inf) for i in (0, 1)
    )

    def share(queries: NDArray[np.float64]) -> NDArray[np.float64]:
        over_first = (queries[:, :1] >= first).astype(np.float64)
        over_second = (queries[:, 1:] >= second).astype(np.float64)
        return over_first.T @ over_second / len(queries)

    opened, shut = share(within), 1 - share(outside)
    best = np.lexsort(((opened + shut).ravel(), np.minimum(opened, shut).ravel()))[-1]
    return Bound(float(opened.ravel()[best]), float(shut.ravel()[best]))


def compute_auc(within: NDArray[np.float64], outside: NDArray[np.float64]) -> float:
    """The chance that a query within has more of the measure than one outside; a tie counts half."""
    more = within[:, None] > outside[None]
    same = within[:, None] == outside[None]
    return float((more + 0.5 * same).mean())


def list_bounds(rows: Sequence[Row], subject: str) -> Grid:
    """For the rephrased images against the minimal pairs, by kind of question, what the subject's gate
    measured of them. Empty where the records lack it."""
    row = next((row for row in rows if row.name == subject and row.complete), None)
    records = [record for record in (row.records if row else ()) if record.ok and _has_all(record)]
    if not records:
        return Grid("", (), ())
    lines, kept = [], []
    for kind in sorted({record.groups.get(KIND, "") for record in records}):
        own = [record for record in records if record.groups.get(KIND, "") == kind]
        found = _bound(own)
        kept.append((len(own), found))
        lines.append((f"{kind or 'all'} (n = {len(own)})", _describe(own, found)))
    if len(kept) > 1:
        whole = _bound(records)
        counts = [count for count, _ in kept]
        apart = Bound(
            *(float(np.average([getattr(b, f) for _, b in kept], weights=counts)) for f in Bound._fields)
        )
        lines.insert(0, (f"all (n = {len(records)})", _describe(records, whole)))
        lines.insert(1, ("all, thresholds of each kind", (Cell(), Cell(), *_show(apart))))
    title = "what the gate's two measures could tell apart: rephrased images and minimal pairs"
    note = (
        "the thresholds are read off these very records, so that no others have more of both; they bound "
        "decisions, not scores: a probe can be right with an open gate, too"
    )
    header = (
        "kind of question",
        "AUC, overlap",
        "AUC, similarity",
        "best: M-Gen opens",
        "best: min. pair shut",
    )
    return Grid(title, header, tuple(lines), note)


def _has_all(record: Record) -> bool:
    return all(
        record.decisions.get(measure, {}).get(probe) is not None
        for measure in GATE_MEASURES
        for probe in (WITHIN, OUTSIDE)
    )


def _read(records: Sequence[Record], probe: str) -> NDArray[np.float64]:
    return np.array(
        [[record.decisions[measure][probe] for measure in GATE_MEASURES] for record in records], float
    )


def _bound(records: Sequence[Record]) -> Bound:
    return find_bound(_read(records, WITHIN), _read(records, OUTSIDE))


def _describe(records: Sequence[Record], found: Bound) -> tuple[Cell, ...]:
    within, outside = _read(records, WITHIN), _read(records, OUTSIDE)
    aucs = [Cell(compute_auc(within[:, i], outside[:, i]), digits=3) for i in range(len(GATE_MEASURES))]
    return (*aucs, *_show(found))


def _show(found: Bound) -> tuple[Cell, ...]:
    return tuple(Cell(100 * share) for share in found)
