"""How far a gate's two measures could go: against a search over all thresholds, query by query."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from unike.evaluation.record import Record
from unike.evaluation.summary import summarise
from unike.report.measures import Row
from unike.report.paper.bounds import compute_auc, find_bound, list_bounds

SUBJECT = "UniKE + scope gate"


def search(within: NDArray[np.float64], outside: NDArray[np.float64]) -> tuple[float, float]:
    """The definition, one pair of thresholds after the other."""
    queries = [*map(tuple, within), *map(tuple, outside)]
    found = []
    for a in [*(q[0] for q in queries), np.inf]:
        for b in [*(q[1] for q in queries), np.inf]:
            opened = sum(o >= a and s >= b for o, s in within) / len(within)
            shut = sum(o < a or s < b for o, s in outside) / len(outside)
            found.append((min(opened, shut), opened + shut))
    return max(found)


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_is_that_of_the_slow_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    within = np.round(rng.normal(1.0, 1.0, (12, 2)), 1)
    outside = np.round(rng.normal(0.0, 1.0, (9, 2)), 1)
    least, both = search(within, outside)
    bound = find_bound(within, outside)
    assert min(bound) == pytest.approx(least)
    assert sum(bound) == pytest.approx(both)
    pairs = [(a > b) + 0.5 * (a == b) for a in within[:, 0] for b in outside[:, 0]]
    assert compute_auc(within[:, 0], outside[:, 0]) == pytest.approx(np.mean(pairs))


def test_what_differs_in_both_measures_is_told_apart() -> None:
    high, low = np.full((3, 2), 0.9), np.full((2, 2), 0.1)
    assert find_bound(high, low) == (1.0, 1.0)
    assert find_bound(high, high) == pytest.approx((1.0, 0.0)) or find_bound(high, high) == (0.0, 1.0)
    assert compute_auc(high[:, 0], low[:, 0]) == 1.0
    assert compute_auc(high[:, 0], high[:, 0]) == 0.5


def make_row(values: Sequence[tuple[str, float, float]], name: str = SUBJECT) -> Row:
    """Records of a kind with the similarity of the rephrased image and of the minimal pair."""
    records = []
    for i, (kind, within, outside) in enumerate(values):
        measured = {"m_generality": within, "minimal_pair": outside}
        scores = {m: {"before": 0.0, "after": 1.0} for m in measured}
        found = {
            "id": str(i),
            "status": "ok",
            "scores": {"teacher_forced": scores},
            "groups": {"kind": kind},
            "decisions": {"overlap": dict.fromkeys(measured, 0.5), "similarity": measured},
        }
        records.append(Record.from_json(found))
    return Row(name, summarise(records, 0), records=records)


def test_kinds_are_shown_apart_and_with_thresholds_of_their_own() -> None:
    # Of each kind the measure is right, with thresholds that are wrong for the other kind.
    row = make_row([("left", 0.9, 0.7), ("left", 0.9, 0.7), ("yesno", 0.3, 0.1), ("yesno", 0.3, 0.1)])
    grid = list_bounds([row], SUBJECT)
    shown = {name: [cell.shown for cell in cells] for name, cells in grid.rows}
    assert list(shown) == ["all (n = 4)", "all, thresholds of each kind", "left (n = 2)", "yesno (n = 2)"]
    assert shown["left (n = 2)"] == ["0.500", "1.000", "100.0", "100.0"]
    assert shown["all, thresholds of each kind"][2:] == ["100.0", "100.0"]
    assert shown["all (n = 4)"][1:] == ["0.750", "50.0", "100.0"]


def test_rows_without_a_gates_measures_have_no_bound() -> None:
    assert list_bounds([], SUBJECT).rows == ()
    assert list_bounds([make_row([("left", 0.9, 0.7)], "FT")], SUBJECT).rows == ()
    plain = Record.from_json({"id": "0", "status": "ok", "scores": {"teacher_forced": {}}})
    assert list_bounds([Row(SUBJECT, summarise([plain], 0), records=[plain])], SUBJECT).rows == ()
