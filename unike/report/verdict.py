"""What a run, and two runs compared, come to: a sentence or two at the top of a page.

A run is judged by the eight metrics, in the evaluation mode that its page shows. A difference is certain
where its 95% interval excludes 0, and where there are ``LEAST_UNITS`` records (or sequences) or more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from unike.evaluation.record import Record
from unike.evaluation.summary import HARMONIC_TITLES, MODES, TITLES, find_passes
from unike.report.compare import Comparison, Difference
from unike.types import FIVE_METRICS, METRICS

# Fewer give an interval that says nothing, as ``LEAST_SEQUENCES`` of the paper's tables.
LEAST_UNITS = 8
MOST_NAMED, ROUNDING = 3, 1e-9
MODE_TITLES = dict(zip(MODES, ("teacher-forced", "generated answers"), strict=True))


def judge_run(records: Iterable[Record], mode: str) -> str:
    """How many cases pass all probes, how many edits take, and which probe fails most."""
    ends = [record for record in records if not record.is_step]
    passes = [
        {name: ok for name, ok in find_passes(record, mode).items() if name in METRICS}
        for record in ends
        if record.ok
    ]
    judged = [found for found in passes if found]
    if not judged:
        return "No case was evaluated." if ends else "There is no record yet."
    most = max(len(found) for found in judged)
    whole = sum(all(found.values()) for found in judged)
    parts = [f"{whole} of {len(judged)} cases pass {_name_count(most)} ({MODE_TITLES[mode]})."]
    edits = [found[FIVE_METRICS[0]] for found in judged if FIVE_METRICS[0] in found]
    if edits:
        parts.append(f"{sum(edits)} of {len(edits)} edits give the target.")
    failing = Counter(name for found in judged for name, ok in found.items() if not ok)
    if failing:
        worst = max(failing, key=lambda name: (failing[name], -METRICS.index(name)))
        asked = sum(worst in found for found in judged)
        parts.append(f"Most failures: {TITLES[worst]}, {failing[worst]} of {asked}.")
    if broken := len(ends) - len(passes):
        parts.append(f"{broken} of {len(ends)} records failed.")
    return " ".join(parts)


def _name_count(probes: int) -> str:
    return "the one probe" if probes == 1 else f"all {probes} probes"


# ---------------------------------------------------------------- two runs


def is_certain(found: Comparison, difference: Difference) -> bool:
    """Whether the interval excludes 0, of enough records."""
    apart = difference.low > 0 or difference.high < 0
    return apart and count_units(found) >= LEAST_UNITS


def differs(difference: Difference) -> bool:
    """Whether the two means differ by more than rounding does."""
    return abs(difference.value) > ROUNDING


def count_units(found: Comparison) -> int:
    """What the intervals resample: records, or sequences."""
    sequences = {record.sequence for record in found.a.values() if record.sequence is not None}
    return len(sequences) or len(found.a)


def judge_comparison(found: Comparison) -> str:
    """Which run is better on which metrics, and by how much, with the 95% intervals.

    Both evaluation modes are looked at, that of the page first, so that no row that is marked as certain is
    denied here.
    """
    own = [d for d in found.differences if d.mode == found.mode and d.measure in METRICS]
    if not own:
        return "The runs share no metric."
    if not any(map(differs, found.differences)):
        return f"Both runs have the same means on all {len(own)} metrics."
    certain = [d for d in found.differences if is_certain(found, d)]
    if not certain:
        return _describe_doubt(found, max(own, key=lambda d: abs(d.value)))
    first = [d for d in certain if d.mode == found.mode]
    second = [d for d in certain if d.mode != found.mode]
    parts = [_name_better(first, found.mode)] if first else []
    single = [d for d in first if d.measure in METRICS]
    if second and not single:
        parts.append(_name_better(second, second[0].mode))
    if rest := len(own) - len(single):
        parts.append(f"No certain difference on {rest} of {len(own)} metrics ({MODE_TITLES[found.mode]}).")
    return " ".join(parts)


def _name_better(certain: Sequence[Difference], mode: str) -> str:
    """The sides in a sentence, the largest difference first: single metrics, or means where there is none."""
    sides = []
    for name, sign in (("B", 1), ("A", -1)):
        better = [d for d in certain if sign * d.value > 0]
        better = [d for d in better if d.measure in METRICS] or better
        better.sort(key=lambda d: -abs(d.value))
        if better:
            sides.append(f"{name} is better on {_list(better)}")
    return f"{'; '.join(sides)} ({MODE_TITLES[mode]})."


def _describe_doubt(found: Comparison, largest: Difference) -> str:
    units, what = count_units(found), "sequences" if _has_sequences(found) else "records"
    reason = "Every 95% interval includes 0."
    if units < LEAST_UNITS:
        reason = f"{units} {what if units > 1 else what[:-1]}: too few, {LEAST_UNITS} are needed."
    size = f" Largest difference: {_describe(largest)}." if differs(largest) else ""
    return f"Neither run is certainly better. {reason}{size}"


def _has_sequences(found: Comparison) -> bool:
    return any(record.sequence is not None for record in found.a.values())


def _list(better: Sequence[Difference]) -> str:
    titles = {**TITLES, **HARMONIC_TITLES}
    named = [f"{titles[d.measure]} by {_describe_size(d)}" for d in better[:MOST_NAMED]]
    if len(better) > MOST_NAMED:
        named.append(f"{len(better) - MOST_NAMED} more")
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def _describe(difference: Difference) -> str:
    name = "B" if difference.value > 0 else "A"
    return f"{TITLES[difference.measure]}, {name} by {_describe_size(difference)}"


def _describe_size(difference: Difference) -> str:
    """How much the better run has more, with the interval turned to its side."""
    ends = (difference.low, difference.high)
    low, high = ends if difference.value > 0 else (-ends[1], -ends[0])
    return f"{format_number(abs(difference.value))} [{format_number(low)}, {format_number(high)}]"


def format_number(value: float) -> str:
    """With one decimal, as in the tables; whole numbers without. Never ``-0``."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
