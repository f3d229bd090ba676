"""Records summed up: means with intervals, costs, curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import TypedDict

import numpy as np

from unike.datasets.answers import normalise_answer
from unike.evaluation.metrics import (
    DE_VQA,
    FLUENCY,
    PRESETS,
    bootstrap_interval,
    bootstrap_means,
    harmonic_mean,
    mean_of,
    ngram_entropy,
)
from unike.evaluation.modes import MODES as MODES
from unike.evaluation.modes import list_modes
from unike.evaluation.numbers import (
    NumberSummary,
    count_skipped,
    summarise_metric_groups,
    summarise_numbers,
)
from unike.evaluation.numbers import Spread as Spread
from unike.evaluation.record import ABSENT, ByProbe, Record
from unike.evaluation.titles import SHORT_TITLES as SHORT_TITLES
from unike.evaluation.titles import TITLES as TITLES
from unike.system.text import one_line
from unike.types import DERIVED_METRICS, FIVE_METRICS, METRICS

WHEN = ("before", "after")
LOCALITY = ("t_locality", "m_locality")
# Published means of derived cells: De-VQA's (arXiv 2511.13243), and DECODE's pair (arXiv 2606.17057).
CELL_GROUPS = {
    "RI": ("t1_i3", "t3_i1"),
    "NI": ("t1_i4", "t2_i4"),
    "CI": ("t1_i2", "t2_i1", "t2_i2"),
    "DECODE": ("t1_i4", "t2_i1"),
}
HARMONIC = ("five", "all")
# The eight with a minimal pair in place of "same question", where records have one.
MINIMAL_METRICS = tuple("minimal_pair" if metric == "same_question" else metric for metric in METRICS)
HARMONIC_OF = {"five": FIVE_METRICS, "all": METRICS, "all_minimal": MINIMAL_METRICS}
HARMONIC_TITLES = {
    "five": "harmonic mean of 5",
    "all": "harmonic mean of all 8",
    "all_minimal": "of 8, with minimal pairs",
}
MEANS_OF = {"generality": ("t_generality", "m_generality"), "locality": LOCALITY}


class Estimate(Spread):
    """A mean over ``n`` records, in percent."""

    n: int


class PresetSummary(TypedDict):
    """Metrics as their ``provenance`` computes them."""

    provenance: str
    metrics: dict[str, Estimate]


class Fluency(TypedDict):
    """Mean n-gram entropies of ``n`` generated answers, in bits."""

    before: float
    after: float
    n: int
    source: str


class Unreached(TypedDict):
    """How many of ``of`` trained edits ended at ``max_steps``: without predicting every token of the target,
    or with a loss above ``stop_loss``."""

    n: int
    of: int


class Failure(TypedDict):
    """Why ``n`` records failed. Reasons that differ in numbers alone are one; the first is shown."""

    reason: str
    n: int


class SequenceCount(TypedDict):
    """How many sequences there are, and the edits in each."""

    n: int
    length: int


class CurvePoint(TypedDict):
    """After so many ``edits``, over ``n`` sequences: how the newest edit does and how those before it do, by
    metric, teacher-forced, in percent."""

    edits: int
    n: int
    newest: dict[str, float]
    former: dict[str, float]


class GroupSummary(TypedDict):
    """The records of a group: how many, and the means after the edit by evaluation mode and metric."""

    n: int
    after: dict[str, dict[str, Estimate]]


# By ``before`` and ``after``; and that by evaluation mode and name.
BeforeAfter = dict[str, Estimate]
Combined = dict[str, dict[str, BeforeAfter]]


class Summary(TypedDict, total=False):
    """``summary.json``: what ``summarise`` gives, and what a run adds to it."""

    n: int
    failed: int
    failures: list[Failure]
    unreached: Unreached | None
    metrics: dict[str, dict[str, BeforeAfter]]
    harmonic_mean: Combined
    means: Combined
    presets: dict[str, PresetSummary]
    base_right: dict[str, dict[str, Estimate]]
    de_vqa: dict[str, dict[str, dict[str, Estimate]]]
    fluency: Fluency | None
    seconds: float | None
    steps: float | None
    costs: dict[str, Spread | None]
    decisions: dict[str, dict[str, float]]
    bytes: float | None
    sequences: SequenceCount
    curve: list[CurvePoint]
    groups: dict[str, dict[str, GroupSummary]]
    metric_groups: dict[str, dict[str, dict[str, BeforeAfter]]]
    skipped_probes: dict[str, int]
    numbers: dict[str, dict[str, NumberSummary]]
    interrupted: bool
    peak_memory_bytes: dict[str, int | None]


def summarise(
    records: Sequence[Record],
    seed: int,
    presets: Sequence[str] = ("paper",),
    strata: Sequence[int] | None = None,
) -> Summary:
    """Means with 95% bootstrap intervals in percent, as JSON values.

    ``["metrics"][metric][mode]["before" | "after"]`` holds ``mean, low, high, n``. So do the entries of
    ``harmonic_mean`` (of the five metrics, and of all eight), of ``means`` (of the two generalities and of
    the two localities), of ``presets``, and of ``base_right`` (base-model accuracy on the locality probes).
    ``de_vqa`` is there for derived probes: by evaluation mode ``not_target``, the share that is not the
    edit's target, and ``unchanged``, agreement with the base, by cell and ``CELL_GROUPS``.
    ``metric_groups`` has by ``GROUP_MEANS``, evaluation mode and ``mean`` or ``all`` the mean over records of
    the mean of their metrics of that group, and the share with every one of them right; ``skipped_probes``
    the records that lack a metric of these groups. ``numbers`` are of likelihoods, in nats.
    ``fluency`` is the mean n-gram entropy of the generated answers. Failed records count in ``failed`` alone,
    and by reason in ``failures``. ``unreached`` counts the edits that ended at ``max_steps``; None where none
    was trained step by step.
    ``seconds`` and ``steps`` are means per edit, with their intervals under ``costs``, ``bytes`` of what is
    applied at the end; None where unrecorded. ``decisions`` holds what edits decided, as a mean per probe.

    For sequences all this is of the records at the end, and whole sequences are resampled where there
    are two or more; ``curve`` holds the means after each edit. ``strata`` says for each record which seed of
    the whole pipeline it is of: with several, seeds are resampled first, then what each has.
    """
    steps = [record for record in records if record.is_step]
    ends = [record for record in records if not record.is_step]
    done = [record for record in ends if record.ok]
    stratum_of = None if strata is None else {id(r): s for r, s in zip(records, strata, strict=True)}
    sample = _Sample(done, seed, stratum_of)
    right = {mode: sample.estimate_part(lambda r: r.base_right, mode) for mode in MODES}
    summary: Summary = {
        "n": len(done),
        "failed": len(ends) - len(done),
        "failures": _group_failures(record for record in ends if not record.ok),
        "unreached": _count_unreached(done),
        "metrics": _summarise_metrics(sample),
        "harmonic_mean": sample.combine(HARMONIC_OF, harmonic_mean),
        "means": sample.combine(MEANS_OF, mean_of),
        "presets": {name: _summarise_preset(sample, name) for name in presets},
        "base_right": {mode: found for mode, found in right.items() if found},
        "fluency": _measure_fluency(done),
        "seconds": _average([r.seconds for r in done]),
        "steps": _average([r.steps for r in done]),
        "costs": {
            "seconds": sample.estimate_cost(lambda r: r.seconds),
            "steps": sample.estimate_cost(lambda r: r.steps),
        },
        "decisions": _average_decisions(done),
        "bytes": _average([r.bytes for r in done]),
    }
    summary.update(_summarise_further(sample, done, stratum_of))
    if steps:
        summary["sequences"], summary["curve"] = _summarise_sequences(steps, ends)
        summary["sequences"]["n"] = len({sample.place(record) for record in ends})
    return summary


def _summarise_further(
    sample: _Sample, done: Sequence[Record], stratum_of: Mapping[int, int] | None
) -> Summary:
    """What some runs alone have: derived cells, groups of records and of metrics, likelihoods."""
    found: Summary = {}
    if cells := {mode: values for mode in MODES if (values := _summarise_cells(sample, mode))}:
        found["de_vqa"] = cells
    if groups := _summarise_groups(done, sample.seed, stratum_of):
        found["groups"] = groups
    if metric_groups := summarise_metric_groups(sample.estimate, MODES, WHEN):
        found["metric_groups"] = metric_groups
        found["skipped_probes"] = count_skipped(done)
    if numbers := summarise_numbers(done, sample.estimate_cost):
        found["numbers"] = numbers
    return found


class RunningMeans:
    """The five metrics after the edit, teacher-forced, in percent, as a bar shows them."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.sums: dict[str, tuple[float, int]] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        for metric, value in record.get_scores("teacher_forced").items():
            total, n = self.sums.get(metric, (0.0, 0))
            self.sums[metric] = total + value.after, n + 1

    def values(self) -> dict[str, float]:
        """By metric, those that have been seen."""
        return {m: 100 * self.sums[m][0] / self.sums[m][1] for m in FIVE_METRICS if m in self.sums}

    def __str__(self) -> str:
        return " ".join(f"{SHORT_TITLES[m]} {value:.1f}" for m, value in self.values().items())


def choose_mode(records: Iterable[Record]) -> str:
    """``generated`` where all records that have scores have it, else ``teacher_forced``."""
    found = [record.scores for record in records if record.scores]
    return MODES[1] if found and all(MODES[1] in scores for scores in found) else MODES[0]


def find_passes(record: Record, mode: str) -> dict[str, bool]:
    """By probe whether it passes: the edit did in full what a good edit does."""
    scores = record.get_scores(mode)
    return {name: scores[name].after == 1 for name in order_metrics(set(scores))}


def get_estimate(parts: Mapping[str, BeforeAfter], name: str, when: str) -> Estimate | None:
    """That of a mode or name, where it is there."""
    return parts.get(name, {}).get(when)


def order_metrics(metrics: Iterable[str]) -> list[str]:
    """Metrics in the order of the tables, others after them by name."""
    names = set(metrics)
    return [name for name in TITLES if name in names] + sorted(names - TITLES.keys())


class _Units(TypedDict):
    """What values are resampled by: their sequences, and their seeds of the whole pipeline."""

    groups: list[int | None] | None
    strata: list[int] | None


# A number of a record, None where it has none.
_Pick = Callable[[Record], float | None]
_Part = Callable[[Record], Mapping[str, ByProbe]]


def _pick_score(mode: str, metric: str, when: str) -> _Pick:
    def pick(record: Record) -> float | None:
        scores = record.get_scores(mode)
        if metric not in scores:
            return None
        return scores[metric].before if when == WHEN[0] else scores[metric].after

    return pick


def _pick_from(part: _Part, name: str, metric: str) -> _Pick:
    def pick(record: Record) -> float | None:
        return part(record).get(name, ABSENT).get(metric)

    return pick


class _Sample:
    """Records whose values are averaged and resampled together."""

    def __init__(
        self, records: Sequence[Record], seed: int, stratum_of: Mapping[int, int] | None = None
    ) -> None:
        self.records, self.seed, self.stratum_of = records, seed, stratum_of
        strata = {self.place(record)[0] for record in records}
        # One sequence alone says nothing about others: then its records are resampled.
        self.grouped = len({self.place(record) for record in records}) > max(1, len(strata))

    def place(self, record: Record) -> tuple[int, int | None]:
        """The record's stratum and its sequence within that."""
        return (0 if self.stratum_of is None else self.stratum_of[id(record)]), record.sequence

    def collect(self, pick: _Pick) -> tuple[list[float], _Units]:
        """The records' numbers, and how they are resampled."""
        found = [(value, *self.place(r)) for r in self.records if (value := pick(r)) is not None]
        groups = [group for _, _, group in found] if self.grouped else None
        strata = None if self.stratum_of is None else [stratum for _, stratum, _ in found]
        return [value for value, _, _ in found], {"groups": groups, "strata": strata}

    def estimate(self, pick: _Pick) -> Estimate | None:
        """In percent."""
        values, units = self.collect(pick)
        if not values:
            return None
        # One seed for all: every metric resamples the same records.
        mean, low, high = bootstrap_interval([100.0 * v for v in values], self.seed, **units)
        return {"mean": mean, "low": low, "high": high, "n": len(values)}

    def estimate_cost(self, pick: _Pick) -> Spread | None:
        """Mean and interval of a number per edit, as it is recorded."""
        values, units = self.collect(pick)
        if not values:
            return None
        mean, low, high = bootstrap_interval([float(v) for v in values], self.seed, **units)
        return {"mean": mean, "low": low, "high": high}

    def estimate_part(self, part: _Part, name: str) -> dict[str, Estimate]:
        """One for each metric that the records have under the ``name`` in a ``part`` of theirs."""
        names = {metric for r in self.records for metric in part(r).get(name, ABSENT)}
        pairs = {metric: self.estimate(_pick_from(part, name, metric)) for metric in order_metrics(names)}
        return {metric: found for metric, found in pairs.items() if found}

    def estimate_after(self, mode: str) -> dict[str, Estimate]:
        """One for each metric of an evaluation mode, after the edit."""
        names = order_metrics({m for r in self.records for m in r.get_scores(mode)})
        pairs = {m: self.estimate(_pick_score(mode, m, WHEN[1])) for m in names}
        return {m: found for m, found in pairs.items() if found}

    def combine(self, sets: Mapping[str, Sequence[str]], of: Callable[[Sequence[float]], float]) -> Combined:
        """By evaluation mode and set of metrics: one number ``of`` their means, before and after, where all
        of the set's metrics are there."""
        out: Combined = {}
        for mode, (name, metrics), when in product(list_modes(self.records), sets.items(), WHEN):
            pairs = [self.collect(_pick_score(mode, metric, when)) for metric in metrics]
            if not all(values for values, _ in pairs):
                continue
            columns = [([100.0 * v for v in values], units) for values, units in pairs]
            mean = of([float(np.mean(values)) for values, _ in columns])
            drawn = np.stack([bootstrap_means(v, self.seed, **units) for v, units in columns])
            low, high = np.quantile([of(column) for column in drawn.T.tolist()], [0.025, 0.975])
            found: Estimate = {"mean": mean, "low": float(low), "high": float(high), "n": len(columns[0][0])}
            out.setdefault(mode, {}).setdefault(name, {})[when] = found
        return out


def _summarise_metrics(sample: _Sample) -> dict[str, dict[str, BeforeAfter]]:
    metrics: dict[str, dict[str, BeforeAfter]] = {}
    names = {m for r in sample.records for by_metric in r.scores.values() for m in by_metric}
    for metric, mode in product(order_metrics(names), list_modes(sample.records)):
        pairs = {when: sample.estimate(_pick_score(mode, metric, when)) for when in WHEN}
        if found := {when: value for when, value in pairs.items() if value}:
            metrics.setdefault(metric, {})[mode] = found
    return metrics


def _summarise_preset(sample: _Sample, name: str) -> PresetSummary:
    metrics = sample.estimate_part(lambda r: r.presets, name)
    if name == "paper":
        metrics = sample.estimate_after(MODES[0])
    return {"provenance": PRESETS[name].provenance, "metrics": metrics}


def _group_failures(failed: Iterable[Record]) -> list[Failure]:
    """The most frequent reason first."""
    groups: dict[str, list[str]] = {}
    for record in failed:
        reason = one_line(record.error or "no reason is recorded")
        groups.setdefault(re.sub(r"\d+", "#", reason), []).append(reason)
    found: list[Failure] = [{"reason": own[0], "n": len(own)} for own in groups.values()]
    return sorted(found, key=lambda failure: -failure["n"])


def _count_unreached(done: Sequence[Record]) -> Unreached | None:
    known = [record.reached for record in done if record.reached is not None]
    return {"n": known.count(False), "of": len(known)} if known else None


def _summarise_groups(
    records: Sequence[Record], seed: int, stratum_of: Mapping[int, int] | None
) -> dict[str, dict[str, GroupSummary]]:
    """By name and value of the cases' ``groups``."""
    out: dict[str, dict[str, GroupSummary]] = {}
    for name in dict.fromkeys(name for record in records for name in record.groups):
        for value in sorted({record.groups[name] for record in records if name in record.groups}):
            part = [record for record in records if record.groups.get(name) == value]
            sample = _Sample(part, seed, stratum_of)
            after = {mode: sample.estimate_after(mode) for mode in MODES}
            kept = {mode: found for mode, found in after.items() if found}
            out.setdefault(name, {})[value] = {"n": len(part), "after": kept}
    return out


def _summarise_cells(sample: _Sample, mode: str) -> dict[str, dict[str, Estimate]]:
    """Derived cells and their groups, scored both ways. A record's value in a group is the mean over those
    of its cells that it has."""

    def missed(record: Record) -> ByProbe:
        if mode == MODES[0]:
            return record.presets.get(DE_VQA, ABSENT)
        answers = {cell: record.answers[cell] for cell in DERIVED_METRICS if cell in record.answers}
        return {
            cell: float(normalise_answer(a.after or "") != normalise_answer(a.target or ""))
            for cell, a in answers.items()
            if mode in record.scores
        }

    def kept(record: Record) -> ByProbe:
        scores = record.get_scores(mode)
        return {cell: scores[cell].after for cell in DERIVED_METRICS if cell in scores}

    out: dict[str, dict[str, Estimate]] = {}
    for name, part in (("not_target", missed), ("unchanged", kept)):
        groups = {**{cell: (cell,) for cell in DERIVED_METRICS}, **CELL_GROUPS}
        pairs = {group: sample.estimate(_pick_mean(part, cells)) for group, cells in groups.items()}
        if found := {group: value for group, value in pairs.items() if value}:
            out[name] = found
    return out


def _pick_mean(part: Callable[[Record], ByProbe], cells: Sequence[str]) -> _Pick:
    def pick(record: Record) -> float | None:
        values = [value for cell in cells if (value := part(record).get(cell)) is not None]
        return mean_of(values) if values else None

    return pick


def _measure_fluency(records: Sequence[Record]) -> Fluency | None:
    answers = [answer for r in records if "generated" in r.scores for answer in r.answers.values()]
    if not answers:
        return None
    return {
        "before": float(np.mean([ngram_entropy(answer.before or "") for answer in answers])),
        "after": float(np.mean([ngram_entropy(answer.after or "") for answer in answers])),
        "n": len(answers),
        "source": FLUENCY,
    }


def _summarise_sequences(
    steps: Sequence[Record], ends: Sequence[Record]
) -> tuple[SequenceCount, list[CurvePoint]]:
    """How many sequences there are, and the curve."""
    by_position: dict[int, list[Record]] = {}
    for step in steps:
        if step.place is not None:
            by_position.setdefault(step.place.position, []).append(step)
    curve: list[CurvePoint] = []
    for position in sorted(by_position):
        here = [step for step in by_position[position] if step.ok]
        newest = _average_percent([{m: v.after for m, v in r.get_scores(MODES[0]).items()} for r in here])
        former = _average_percent([r.former for r in here])
        curve.append({"edits": position, "n": len(here), "newest": newest, "former": former})
    return {"n": len({record.sequence for record in ends}), "length": len(curve)}, curve


def _average_percent(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = order_metrics({name for row in rows for name in row})
    return {name: 100.0 * float(np.mean([row[name] for row in rows if name in row])) for name in names}


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _average_decisions(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for what, by_probe in record.decisions.items():
            for probe, value in by_probe.items():
                if value is not None:
                    found.setdefault(what, {}).setdefault(probe, []).append(value)
    return {what: {probe: float(np.mean(v)) for probe, v in probes.items()} for what, probes in found.items()}
