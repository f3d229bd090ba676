"""What is claimed of a table's rows, checked on their records: one verdict and its figures per claim."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from unike.evaluation.summary import MODES
from unike.report.measures import ALL, MEASURE_TITLES, Row, difference

HOLDS, FAILS, UNCLEAR = "holds", "does not hold", "cannot be told"


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds, with the figures that say so."""

    claim: str
    verdict: str
    figures: str = ""

    def __str__(self) -> str:
        return f"{self.claim}: {self.verdict}" + (f" ({self.figures})" if self.figures else "")


def order(rows: Sequence[Row], reference: str, seed: int) -> list[Verdict]:
    """Whether ``reference`` lies on the published side of every row that has a published counterpart."""
    best = next((row for row in rows if row.name == reference), None)
    if best is None or not best.published or not best.complete:
        return []
    others = [r for r in rows if r is not best and r.published and r.complete]
    return [_order(best, row, seed) for row in others]


def best_of_ours(rows: Sequence[Row], seed: int) -> list[Verdict]:
    """Whether one of our rows has the best harmonic mean of all eight metrics, in each reading, by more
    than the interval of its difference from the best of the others."""
    out = []
    for mode in MODES:
        ranked = [(row.mean(ALL, mode), row) for row in rows if row.complete]
        known = sorted(((m, r) for m, r in ranked if m is not None), key=lambda pair: -pair[0])
        ours = next((row for _, row in known if row.ours), None)
        rival = next((row for _, row in known if not row.ours), None)
        found = difference(ours, rival, ALL, seed, mode) if ours and rival else None
        if ours and rival and found:
            verdict = _verdict(found, 1.0)
            means = f"{ours.name} {ours.mean(ALL, mode):.1f}, {rival.name} {rival.mean(ALL, mode):.1f}"
            figures = f"{means}; difference {found[0]:.1f} [{found[1]:.1f}, {found[2]:.1f}]"
            out.append(Verdict(f"A row of ours has the best HM8, {mode.replace('_', '-')}", verdict, figures))
    return out


def baselines(rows: Sequence[Row]) -> list[Verdict]:
    """Whether each baseline behaves as published, told from the means."""
    named = {row.name: row for row in rows if row.complete}
    out = []
    for claim, needed, told in _BASELINES:
        if all(name in named and named[name].mean("m_locality") is not None for name in needed):
            holds, figures = told(named)
            out.append(Verdict(claim, HOLDS if holds else FAILS, figures))
    return out


def _verdict(found: tuple[float, float, float], sign: float) -> str:
    _, low, high = found
    if low <= 0.0 <= high:
        return UNCLEAR
    return HOLDS if (low > 0.0) == (sign > 0.0) else FAILS


def _order(best: Row, row: Row, seed: int) -> Verdict:
    told: dict[str, list[str]] = {FAILS: [], UNCLEAR: [], HOLDS: []}
    for measure, published in row.published.items():
        stated = best.published.get(measure)
        found = difference(best, row, measure, seed) if stated not in (None, published) else None
        if stated is None or found is None:
            continue
        verdict = _verdict(found, stated - published)
        ours, other = best.mean(measure), row.mean(measure)
        figures = f" (paper {_compared(stated, published)}, ours {_compared(ours, other)})"
        told[verdict].append(MEASURE_TITLES[measure] + ("" if verdict == HOLDS else figures))
    if not told[FAILS] and not told[UNCLEAR]:
        return Verdict(f"{best.name} against {row.name}", HOLDS)
    parts = [f"{verdict}: {', '.join(which)}" for verdict, which in told.items() if which]
    return Verdict(f"{best.name} against {row.name}", "; ".join(parts))


def _compared(one: float | None, other: float | None) -> str:
    left, right = f"{one:.1f}", f"{other:.1f}"
    return f"{left} {'=' if left == right else '>' if float(left) > float(right) else '<'} {right}"


def _number(row: Row, measure: str) -> float:
    found = row.mean(measure)
    if found is None:
        raise ValueError(f"{row.name} has no {measure}")
    return found


_Rows = Mapping[str, Row]


def _ike(rows: _Rows) -> tuple[bool, str]:
    ike, others = rows["IKE"], [r for r in rows.values() if r.name != "IKE" and r.published]
    gen, loc = _number(ike, "generality"), _number(ike, "m_locality")
    lowest = min((_number(r, "m_locality") for r in others), default=float("inf"))
    return gen >= 90.0 and loc < lowest, f"{gen:.1f}; M-Loc {loc:.1f}, lowest of the others {lowest:.1f}"


def _serac(rows: _Rows) -> tuple[bool, str]:
    text = _number(rows["SERAC"], "m_locality")
    return text < 50.0, f"{text:.1f}"


def _multimodal(rows: _Rows) -> tuple[bool, str]:
    text, both = _number(rows["SERAC"], "m_locality"), _number(rows["SERAC, multimodal"], "m_locality")
    return both > text, f"{both:.1f} > {text:.1f}" if both > text else f"{both:.1f}, text {text:.1f}"


def _mend(rows: _Rows) -> tuple[bool, str]:
    rel, t_gen, m_gen = (_number(rows["MEND"], m) for m in ("reliability", "t_generality", "m_generality"))
    return rel >= 90.0 and m_gen < t_gen, f"Rel {rel:.1f}; M-Gen {m_gen:.1f}, T-Gen {t_gen:.1f}"


def _ft(rows: _Rows) -> tuple[bool, str]:
    ft, ours = _number(rows["FT (last layer)"], "locality"), _number(rows["UniKE, scoped"], "locality")
    return ft < ours, f"{ft:.1f}, UniKE, scoped {ours:.1f}"


def _tpatcher(rows: _Rows) -> tuple[bool, str]:
    loc, gen = (_number(rows["T-Patcher"], m) for m in ("locality", "generality"))
    return loc > gen, f"{loc:.1f}, mean generality {gen:.1f}"


_BASELINES: tuple[tuple[str, tuple[str, ...], Callable[[_Rows], tuple[bool, str]]], ...] = (
    ("IKE: mean generality is 90 or more, and M-Loc the lowest of the published rows", ("IKE",), _ike),
    ("SERAC, which reads the text: M-Loc is below 50", ("SERAC",), _serac),
    ("SERAC, multimodal: M-Loc is above SERAC's", ("SERAC", "SERAC, multimodal"), _multimodal),
    ("MEND: reliability is 90 or more, and M-Gen below T-Gen", ("MEND",), _mend),
    ("FT: mean locality is below that of UniKE, scoped", ("FT (last layer)", "UniKE, scoped"), _ft),
    ("T-Patcher: mean locality is above mean generality", ("T-Patcher",), _tpatcher),
)
