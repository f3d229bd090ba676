"""What summaries have besides single metrics: groups of metrics, and numbers that are no shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import TypedDict, TypeVar

from unike.datasets.declarations import MetricGroup, list_group
from unike.evaluation.metrics import mean_of
from unike.evaluation.record import KL, MARGIN, Record

E = TypeVar("E")
# A number of a record, None where it has none.
Pick = Callable[[Record], float | None]

# Metric groups that are summed up: their metrics are one claim, asked in several ways.
GROUP_MEANS: tuple[MetricGroup, ...] = ("consistency",)


class Spread(TypedDict):
    """A mean with the ends of its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


class NumberSummary(TypedDict, total=False):
    """A probe's number over ``n`` records: means with 95% intervals, and the share above 0 in percent of the
    numbers that have a value ``before``."""

    before: Spread
    after: Spread
    n: int
    positive: dict[str, float]


# What a record's numbers are called in tables. All are in nats.
NUMBER_TITLES = {MARGIN: "margin of the target over the old answer", KL: "KL divergence from the base"}


def summarise_numbers(
    records: Sequence[Record], estimate: Callable[[Pick], Spread | None]
) -> dict[str, dict[str, NumberSummary]]:
    """By name and probe, in the records' unit, of any size; ``estimate`` gives ``mean, low, high``."""
    out: dict[str, dict[str, NumberSummary]] = {}
    for name in dict.fromkeys(name for record in records for name in record.numbers):
        probes = dict.fromkeys(p for record in records for p in record.numbers.get(name, {}))
        for probe in probes:
            found: NumberSummary = {"n": sum(probe in record.numbers.get(name, {}) for record in records)}
            if (before := estimate(_pick_number(name, probe, "before"))) is not None:
                found["before"] = before
                shares = {when: estimate(_pick_positive(name, probe, when)) for when in ("before", "after")}
                found["positive"] = {w: 100.0 * share["mean"] for w, share in shares.items() if share}
            if (after := estimate(_pick_number(name, probe, "after"))) is not None:
                found["after"] = after
            out.setdefault(name, {})[probe] = found
    return out


def _pick_number(name: str, probe: str, when: str) -> Pick:
    def pick(record: Record) -> float | None:
        change = record.numbers.get(name, {}).get(probe)
        return None if change is None else change.before if when == "before" else change.after

    return pick


def _pick_positive(name: str, probe: str, when: str) -> Pick:
    number = _pick_number(name, probe, when)

    def pick(record: Record) -> float | None:
        value = number(record)
        return None if value is None else float(value > 0)

    return pick


def summarise_metric_groups(
    estimate: Callable[[Pick], E | None], modes: Sequence[str], when: Sequence[str]
) -> dict[str, dict[str, dict[str, dict[str, E]]]]:
    """By group of ``GROUP_MEANS``, evaluation mode, ``mean`` or ``all``, and ``before`` or ``after``: an
    ``estimate`` of the mean of a record's metrics of the group, and of whether all of them are 1."""
    out: dict[str, dict[str, dict[str, dict[str, E]]]] = {}
    for group, mode in product(GROUP_MEANS, modes):
        for name, of in (("mean", mean_of), ("all", _are_all_right)):
            pairs = {at: estimate(_pick_group(group, mode, at, of)) for at in when}
            if kept := {at: found for at, found in pairs.items() if found is not None}:
                out.setdefault(group, {}).setdefault(mode, {})[name] = kept
    return out


def _are_all_right(values: Sequence[float]) -> float:
    return float(min(values) == 1)


def _pick_group(group: MetricGroup, mode: str, when: str, of: Callable[[Sequence[float]], float]) -> Pick:
    metrics = list_group(group)

    def pick(record: Record) -> float | None:
        scores = record.get_scores(mode)
        found = [scores[metric] for metric in metrics if metric in scores]
        values = [score.before if when == "before" else score.after for score in found]
        known = [value for value in values if value is not None]
        return of(known) if known else None

    return pick


def count_skipped(done: Sequence[Record]) -> dict[str, int]:
    """How many records lack each metric of ``GROUP_MEANS``, which could not be asked of them."""
    names = [name for group in GROUP_MEANS for name in list_group(group)]
    missing = {
        name: sum(all(name not in scores for scores in record.scores.values()) for record in done)
        for name in names
    }
    return {name: n for name, n in missing.items() if n}
