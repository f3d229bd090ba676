"""Claims about a table's rows, checked on their records: a verdict with its figures for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from unike.evaluation.summary import MODES
from unike.report.measures import ALL, MEASURE_TITLES, Row, compare_rows

HOLDS, FAILS, UNCLEAR = "holds", "does not hold", "cannot be told"


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds, with the figures that say so."""

    claim: str
    verdict: str
    figures: str = ""

    def __str__(self) -> str:
        return f"{self.claim}: {self.verdict}" + (f" ({self.figures})" if self.figures else "")


def check_order(rows: Sequence[Row], reference: str, seed: int) -> list[Verdict]:
    """Whether ``reference`` lies on the published side of every row that has a published counterpart."""
    best = next((row for row in rows if row.name == reference), None)
    if best is None or not best.published or not best.complete:
        return []
    others = [r for r in rows if r is not best and r.published and r.complete]
    return [_check_order(best, row, seed) for row in others]


def check_best_of_ours(rows: Sequence[Row], seed: int) -> list[Verdict]:
    """Whether one of our rows has the best harmonic mean of all eight metrics, in each evaluation mode, by
    more than the interval of its difference from the best of the others."""
    out = []
    for mode in MODES:
        ranked = [(row.find_mean(ALL, mode), row) for row in rows if row.complete]
        known = sorted(((m, r) for m, r in ranked if m is not None), key=lambda pair: -pair[0])
        ours = next((row for _, row in known if row.ours), None)
        rival = next((row for _, row in known if not row.ours), None)
        found = compare_rows(ours, rival, ALL, seed, mode) if ours and rival else None
        if ours and rival and found:
            verdict = _judge(found, 1.0)
            means = (
                f"{ours.name} {ours.find_mean(ALL, mode):.1f}, {rival.name} {rival.find_mean(ALL, mode):.1f}"
            )
            figures = f"{means}; difference {found[0]:.1f} [{found[1]:.1f}, {found[2]:.1f}]"
            out.append(Verdict(f"A row of ours has the best HM8, {mode.replace('_', '-')}", verdict, figures))
    return out


def check_baselines(rows: Sequence[Row]) -> list[Verdict]:
    """Whether each baseline behaves as published, by the means."""
    named = {row.name: row for row in rows if row.complete}
    out = []
    for claim, needed, check in _BASELINES:
        if all(name in named and named[name].find_mean("m_locality") is not None for name in needed):
            holds, figures = check(named)
            out.append(Verdict(claim, HOLDS if holds else FAILS, figures))
    return out


def _judge(found: tuple[float, float, float], sign: float) -> str:
    _, low, high = found
    if low <= 0.0 <= high:
        return UNCLEAR
    return HOLDS if (low > 0.0) == (sign > 0.0) else FAILS


def _check_order(best: Row, row: Row, seed: int) -> Verdict:
    measures: dict[str, list[str]] = {FAILS: [], UNCLEAR: [], HOLDS: []}
    for measure, published in row.published.items():
        stated = best.published.get(measure)
        found = compare_rows(best, row, measure, seed) if stated not in (None, published) else None
        if stated is None or found is None:
            continue
        verdict = _judge(found, stated - published)
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


def _require_mean(row: Row, measure: str) -> float:
    found = row.find_mean(measure)
    if found is None:
        raise ValueError(f"{row.name} has no {measure}")
    return found


_Rows = Mapping[str, Row]


def _check_ike(rows: _Rows) -> tuple[bool, str]:
    ike, others = rows["IKE"], [r for r in rows.values() if r.name != "IKE" and r.published]
    gen, loc = _require_mean(ike, "generality"), _require_mean(ike, "m_locality")
    lowest = min((_require_mean(r, "m_locality") for r in others), default=float("inf"))
    return gen >= 90.0 and loc < lowest, f"{gen:.1f}; M-Loc {loc:.1f}, lowest of the others {lowest:.1f}"


def _check_serac(rows: _Rows) -> tuple[bool, str]:
    text = _require_mean(rows["SERAC"], "m_locality")
    return text < 50.0, f"{text:.1f}"


def _check_multimodal(rows: _Rows) -> tuple[bool, str]:
    text, both = (
        _require_mean(rows["SERAC"], "m_locality"),
        _require_mean(rows["SERAC, multimodal"], "m_locality"),
    )
    return both > text, f"{both:.1f} > {text:.1f}" if both > text else f"{both:.1f}, text {text:.1f}"


def _check_mend(rows: _Rows) -> tuple[bool, str]:
    rel, t_gen, m_gen = (
        _require_mean(rows["MEND"], m) for m in ("reliability", "t_generality", "m_generality")
    )
    return rel >= 90.0 and m_gen < t_gen, f"Rel {rel:.1f}; M-Gen {m_gen:.1f}, T-Gen {t_gen:.1f}"


def _check_ft(rows: _Rows) -> tuple[bool, str]:
    ft, ours = (
        _require_mean(rows["FT (last layer)"], "locality"),
        _require_mean(rows["UniKE, scoped"], "locality"),
    )
    return ft < ours, f"{ft:.1f}, UniKE, scoped {ours:.1f}"


def _check_tpatcher(rows: _Rows) -> tuple[bool, str]:
    loc, gen = (_require_mean(rows["T-Patcher"], m) for m in ("locality", "generality"))
    return loc > gen, f"{loc:.1f}, mean generality {gen:.1f}"


_BASELINES: tuple[tuple[str, tuple[str, ...], Callable[[_Rows], tuple[bool, str]]], ...] = (
    ("IKE: mean generality is 90 or more, and M-Loc the lowest of the published rows", ("IKE",), _check_ike),
    ("SERAC, which reads the text: M-Loc is below 50", ("SERAC",), _check_serac),
    ("SERAC, multimodal: M-Loc is above SERAC's", ("SERAC", "SERAC, multimodal"), _check_multimodal),
    ("MEND: reliability is 90 or more, and M-Gen below T-Gen", ("MEND",), _check_mend),
    ("FT: mean locality is below that of UniKE, scoped", ("FT (last layer)", "UniKE, scoped"), _check_ft),
    ("T-Patcher: mean locality is above mean generality", ("T-Patcher",), _check_tpatcher),
)
