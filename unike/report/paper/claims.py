"""Claims about a table's rows, checked on their records: a verdict with its figures for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unike.evaluation.record import Record
from unike.evaluation.summary import MODES
from unike.report.measures import ALL, ALL_MINIMAL, MEASURE_TITLES, Difference, Row, average, compare_rows

HOLDS, FAILS, LOST, UNCLEAR = "holds", "does not hold", "lost", "cannot be told"
AS_PUBLISHED, DIFFERS = "as published", "differs"
# In percentage points: the half-width of the 95% interval of a share of 85% over 200 records, a table's size.
# What lies nearer could not be told apart from what was published.
DISTANCE = 5.0
YES_NO = "yesno"


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds, with the figures that say so."""

    claim: str
    verdict: str
    figures: str = ""

    def __str__(self) -> str:
        return f"{self.claim}: {self.verdict}" + (f" ({self.figures})" if self.figures else "")


def judge(found: Difference, lost: str = LOST) -> str:
    """What a difference with its interval says: above 0, below 0, or neither, as without an interval."""
    _, low, high = found
    if math.isnan(low) or math.isnan(high) or low <= 0.0 <= high:
        return UNCLEAR
    return HOLDS if low > 0.0 else lost


def choose_hm8(rows: Sequence[Row]) -> str:
    """The harmonic mean of eight that a block shows: with minimal pairs where a row has them."""
    has_pairs = any(row.find_estimate(ALL_MINIMAL) is not None for row in rows)
    return ALL_MINIMAL if has_pairs else ALL


def is_no_yes_no(record: Record) -> bool:
    """Whether a record is of another kind than a yes/no question."""
    return record.groups.get("kind") != YES_NO


def check_order(rows: Sequence[Row], reference: str, seed: int) -> list[Verdict]:
    """Whether ``reference`` lies on the published side of every row that has a published counterpart."""
    best = next((row for row in rows if row.name == reference), None)
    if best is None or not best.published or not best.complete:
        return []
    others = [r for r in rows if r is not best and r.published and r.complete]
    return [_check_order(best, row, seed) for row in others]


def check_best_of_ours(rows: Sequence[Row], seed: int) -> list[Verdict]:
    """Whether one of our rows has the best HM5 and HM8, in each evaluation mode, by more than the interval of
    its difference from the best of the others; HM8 once more without yes/no questions, and once more with the
    rivals that have our gate around them."""
    out: list[Verdict | None] = []
    hm8 = choose_hm8(rows)
    plain = [row for row in rows if row.gate_of is None]
    kinds = {record.groups.get("kind") for row in rows for record in row.records}
    for mode in MODES:
        out += [_check_best(plain, measure, mode, seed) for measure in ("five", hm8)]
        if YES_NO in kinds and len(kinds) > 1:
            out.append(_check_best(plain, hm8, mode, seed, ", without yes/no questions", is_no_yes_no))
        if plain != list(rows):
            out.append(_check_best(rows, hm8, mode, seed, ", rivals with the same gate included"))
    return [verdict for verdict in out if verdict is not None]


def check_gate(rows: Sequence[Row], subject: str, seed: int) -> list[Verdict]:
    """Whose the win is: ``subject`` against each rival that has the same gate around it, in HM8."""
    ours = next((row for row in rows if row.name == subject and row.complete), None)
    gated = [row for row in rows if row.gate_of is not None and row.complete]
    hm8, out = choose_hm8(rows), []
    for mode in MODES if ours is not None else ():
        for row in gated:
            found = compare_rows(ours, row, hm8, seed, mode) if ours else None
            if found is None:
                continue
            alone = next((r.find_mean(hm8, mode) for r in rows if r.name == row.gate_of), None)
            own = f"{MEASURE_TITLES[hm8]} {row.find_mean(hm8, mode):.1f}"
            before = "" if alone is None else f", {alone:.1f} without it"
            claim = f"With the same gate around {row.gate_of}, {subject} is better, {_name_mode(mode)}"
            out.append(Verdict(claim, judge(found), f"{own}{before}; {describe(found)}"))
    return out


def judge_distance(ours: float, published: float) -> str:
    """Whether a figure is within ``DISTANCE`` of what was published."""
    difference = ours - published
    return AS_PUBLISHED if abs(difference) <= DISTANCE else f"{DIFFERS} ({difference:+.1f})"


def describe(found: Difference) -> str:
    """A difference with its interval."""
    if math.isnan(found[1]):
        return f"difference {found[0]:.1f}, no interval: too few sequences"
    return f"difference {found[0]:.1f} [{found[1]:.1f}, {found[2]:.1f}]"


def _check_best(
    rows: Sequence[Row],
    measure: str,
    mode: str,
    seed: int,
    where: str = "",
    keep: Callable[[Record], bool] | None = None,
) -> Verdict | None:
    """None where no row of ours, or none of the others, has the measure."""

    def measure_row(row: Row) -> float | None:
        return row.find_mean(measure, mode) if keep is None else average(row, measure, mode, keep)

    ranked = [(measure_row(row), row) for row in rows if row.complete]
    known = sorted(((m, r) for m, r in ranked if m is not None), key=lambda pair: -pair[0])
    ours = next(((m, r) for m, r in known if r.ours), None)
    rival = next(((m, r) for m, r in known if not r.ours), None)
    found = compare_rows(ours[1], rival[1], measure, seed, mode, keep) if ours and rival else None
    if ours is None or rival is None or found is None:
        return None
    means = f"{ours[1].name} {ours[0]:.1f}, {rival[1].name} {rival[0]:.1f}"
    claim = f"A row of ours has the best {MEASURE_TITLES[measure]}, {_name_mode(mode)}{where}"
    return Verdict(claim, judge(found), f"{means}; {describe(found)}")


def _name_mode(mode: str) -> str:
    return mode.replace("_", "-")


def _check_order(best: Row, row: Row, seed: int) -> Verdict:
    measures: dict[str, list[str]] = {FAILS: [], UNCLEAR: [], HOLDS: []}
    for measure, published in row.published.items():
        stated = best.published.get(measure)
        if stated is None or stated == published:
            continue
        pair = (best, row) if stated > published else (row, best)
        found = compare_rows(*pair, measure, seed)
        if found is None:
            continue
        verdict = judge(found, FAILS)
        ours, other = best.find_mean(measure), row.find_mean(measure)
        figures = f" (paper {_relate(stated, published)}, ours {_relate(ours, other)})"
        measures[verdict].append(MEASURE_TITLES[measure] + ("" if verdict == HOLDS else figures))
    if not measures[FAILS] and not measures[UNCLEAR]:
        return Verdict(f"{best.name} against {row.name}", HOLDS)
    parts = [f"{verdict}: {', '.join(which)}" for verdict, which in measures.items() if which]
    return Verdict(f"{best.name} against {row.name}", "; ".join(parts))


def _relate(one: float | None, other: float | None) -> str:
    left, right = f"{one:.1f}", f"{other:.1f}"
    return f"{left} {'=' if left == right else '>' if float(left) > float(right) else '<'} {right}"
