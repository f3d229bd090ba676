"""Protocols: what is edited, in which order, and what is evaluated before and after.

A case is evaluated twice: once on the untouched base model (kept, since no edit changes it) and once under
the edit or the sequence of edits; ``unike.evaluation.reader`` does that. Every protocol gives ``Outcome``s.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from unike.backbones.base import Backbone
from unike.datasets.declarations import get_expectation
from unike.datasets.lengths import name_long_field
from unike.edits import Edit
from unike.evaluation.by_name import average_by_name, combine_scores, keep_first
from unike.evaluation.metrics import (
    DE_VQA,
    Prediction,
    base_score,
    base_score_generated,
    holds_old,
    miss_target,
    preset_score,
    right_everywhere,
    right_text,
    score,
    score_generated,
)
from unike.evaluation.reader import CasePredictions, Reader
from unike.evaluation.record import ABSENT, Answer, Place, Record, RecordKind, Score
from unike.methods.base import EditMethod
from unike.system.faults import is_out_of_memory
from unike.types import DERIVED_METRICS, Case, Probe, TooLongError


@dataclass(frozen=True)
class Outcome:
    """A record, and the edit that it is of; None where the edit failed, and with the final records of a
    sequence, whose edits came with their steps."""

    record: Record
    edit: Edit | None = None


# ---------------------------------------------------------------- one step


def run_one_step(
    backbone: Backbone, method: EditMethod, case: Case, reader: Reader, history: Edit | None = None
) -> Outcome:
    """Edits one case from the base model, or on top of ``history``, and evaluates its probes.

    An edit whose loss stops being a number, or for which memory does not suffice, is recorded as failed; its
    probes are not evaluated.
    """
    before = reader.predict_base(case)
    started = time.perf_counter()
    try:
        edit = _make_edit(backbone, method, case, reader, history)
    except (FloatingPointError, RuntimeError, MemoryError) as error:
        full = is_out_of_memory(error)
        if not full and not isinstance(error, FloatingPointError):
            raise
        reason = "out of memory" if full else str(error)
        return Outcome(_describe_failure(case, reason, time.perf_counter() - started))
    seconds = time.perf_counter() - started
    whole = edit if history is None else history | edit
    found = reader.predict_edited(case, whole, before)
    return Outcome(_measure(_describe_edit(case, edit, seconds), backbone, case, found, reader, whole), edit)


def run_one_step_batch(
    backbone: Backbone, method: EditMethod, cases: Sequence[Case], reader: Reader
) -> list[Outcome]:
    """As ``run_one_step`` for each case, edits made and evaluated in one batch where the method can.

    ``seconds`` is each edit's share of what all of them took.
    """
    reader.cache_base(cases)
    started = time.perf_counter()
    edits = list(method.edit_many(backbone, [case.request for case in cases], reader.prefixes))
    for i, (case, first) in enumerate(zip(cases, edits, strict=True)):
        if isinstance(first, Edit):
            try:
                edits[i] = _add_second(backbone, method, case, reader, None, first)
            except FloatingPointError as error:
                edits[i] = error
    seconds = (time.perf_counter() - started) / len(cases)
    made = [(case, edit) for case, edit in zip(cases, edits, strict=True) if isinstance(edit, Edit)]
    found = iter(reader.predict_each([case for case, _ in made], [edit for _, edit in made]))
    out = []
    for case, edit in zip(cases, edits, strict=True):
        if isinstance(edit, FloatingPointError):
            out.append(Outcome(_describe_failure(case, str(edit), seconds)))
        else:
            record = _describe_edit(case, edit, seconds)
            out.append(Outcome(_measure(record, backbone, case, next(found), reader, edit), edit))
    return out


def _make_edit(
    backbone: Backbone, method: EditMethod, case: Case, reader: Reader, history: Edit | None
) -> Edit:
    edit = method.edit(backbone, case.request, reader.prefixes, history)
    return _add_second(backbone, method, case, reader, history, edit)


def _add_second(
    backbone: Backbone, method: EditMethod, case: Case, reader: Reader, history: Edit | None, edit: Edit
) -> Edit:
    """A case's edit with its second one, which is made on top of it; ``info`` stays that of the first."""
    if case.second is None:
        return edit
    before = edit if history is None else history | edit
    info = dict(edit.info)
    both = edit | method.edit(backbone, case.second, reader.prefixes, before)
    both.info = info
    return both


# ---------------------------------------------------------------- sequences


def run_sequence(
    backbone: Backbone,
    method: EditMethod,
    cases: Sequence[Case],
    reader: Reader,
    number: int = 0,
    former: int | None = None,
    seed: int = 0,
    tolerated: tuple[type[Exception], ...] = (),
    gap: int | None = None,
) -> Iterator[Outcome]:
    """Edits the cases in order, each on top of all before it, and gives two records for each of them.

    A ``step`` comes with every edit: how the newest does (``scores``) and how the ones before it still do
    (``former``, means after the edit), both teacher-forced. ``former`` bounds how many of these are
    evaluated, drawn anew by ``seed`` at each step; None takes all. The ``final`` records come at the end:
    every case under all edits, in both evaluation modes. Their means are the five metrics of K-step editing,
    Eq. (16), the localities Eq. (17) and Eq. (18), the generalities Eq. (19) and Eq. (20). Locality is
    against the unedited base. With a ``gap``, each case's comes as soon as so many edits have been made after
    its own, under the edits up to then, and the last ``gap`` cases have none: VLKEB's protocol.

    An edit that fails (its loss stops being a number, memory does not suffice, a question is too long for the
    model, or one of ``tolerated`` is raised) is marked in both of its records and leaves no trace: the next
    one continues from the edits before it. One whose probes cannot be evaluated stays, marked.
    """
    broken = _cache_base(reader, cases, tolerated)
    whole: Edit | None = None
    made: list[tuple[Case, Record]] = []
    chooser = random.Random(f"{seed}/{number}")
    for position, case in enumerate(cases, 1):
        edit: Edit | None = None
        if position in broken:
            record = _describe_failure(case, broken[position], 0.0)
        else:
            record, edit, whole = _edit_on_top(backbone, method, case, reader, whole, tolerated)
        earlier = [c for c, r in made if r.ok]
        if former is not None and len(earlier) > former:
            earlier = chooser.sample(earlier, former)
        step = _place(record, number, position, "step")
        if edit is not None and whole is not None:
            found = _predict_all(reader, [case, *earlier], whole, tolerated, generated=False)
            step = _measure_step(step, case, found, reader)
        yield Outcome(step, edit)
        made.append((case, record))
        due = 0 if gap is None else position - gap
        if due > 0:
            yield from _finish(backbone, made[due - 1 : due], whole, reader, number, tolerated, due)
    if gap is None:
        yield from _finish(backbone, made, whole, reader, number, tolerated)


def _cache_base(
    reader: Reader, cases: Sequence[Case], tolerated: tuple[type[Exception], ...]
) -> dict[int, str]:
    """Evaluates the untouched model; by position why a case cannot be, where that is ``tolerated``."""
    tolerated = (*tolerated, TooLongError)
    try:
        reader.cache_base(cases)
        return {}
    except tolerated:
        broken: dict[int, str] = {}
    for position, case in enumerate(cases, 1):
        try:
            reader.predict_base(case)
        except TooLongError as error:
            broken[position] = f"{name_long_field(case)}: {error}"
        except tolerated as error:
            broken[position] = str(error)
    return broken


def _edit_on_top(
    backbone: Backbone,
    method: EditMethod,
    case: Case,
    reader: Reader,
    whole: Edit | None,
    tolerated: tuple[type[Exception], ...],
) -> tuple[Record, Edit | None, Edit | None]:
    """The record of the next edit of a sequence, without a place in it, the edit, and all edits with it.

    Where it fails, the edit is None and the others are as they were.
    """
    failures: tuple[type[Exception], ...] = (FloatingPointError, TooLongError, *tolerated)
    caught: tuple[type[Exception], ...] = (*failures, RuntimeError, MemoryError)
    started = time.perf_counter()
    try:
        edit = _make_edit(backbone, method, case, reader, whole)
        after = edit if whole is None else whole | edit
        return _describe_edit(case, edit, time.perf_counter() - started), edit, after
    except caught as error:
        full = is_out_of_memory(error)
        if not full and not isinstance(error, failures):
            raise
        reason = "out of memory" if full else str(error)
        return _describe_failure(case, reason, time.perf_counter() - started), None, whole


_Found = Iterator[tuple[Case, CasePredictions | str]]


def _predict_all(
    reader: Reader,
    cases: Sequence[Case],
    whole: Edit,
    tolerated: tuple[type[Exception], ...],
    generated: bool | None = None,
) -> _Found:
    """Each case's predictions under all edits, or why there are none, where ``tolerated`` is raised."""
    caught: tuple[type[Exception], ...] = (*tolerated, TooLongError)
    for some in [[case] for case in cases] if tolerated else [cases]:
        given = 0
        try:
            for found in reader.predict_all(some, whole, generated):
                given += 1
                yield found
        except caught as error:
            if len(some) == 1:
                yield some[0], str(error)
            else:
                yield from _predict_all(reader, some[given:], whole, (TooLongError,), generated)


def _measure_step(step: Record, newest: Case, found: _Found, reader: Reader) -> Record:
    """With how the newest edit does, whose predictions come first, and how the former ones still do."""
    values: dict[str, list[float]] = {}
    count = 0
    for case, predicted in found:
        if isinstance(predicted, str):
            step = _mark_failed(step, predicted) if case is newest else step
            continue
        scores = _score(case, reader.predict_base(case), predicted.predictions, False)
        if case is newest:
            step = replace(step, scores=scores)
            continue
        count += 1
        for metric, value in scores["teacher_forced"].items():
            values.setdefault(metric, []).append(value.after)
    former = {metric: float(np.mean(column)) for metric, column in values.items()}
    return replace(step, former=former, former_cases=count)


def _finish(
    backbone: Backbone,
    made: Sequence[tuple[Case, Record]],
    whole: Edit | None,
    reader: Reader,
    number: int,
    tolerated: tuple[type[Exception], ...],
    start: int = 1,
) -> Iterator[Outcome]:
    """The final records of cases of a sequence, from the position ``start`` on: each under all edits."""
    found: _Found = iter(())
    if whole is not None:
        found = _predict_all(reader, [case for case, record in made if record.ok], whole, tolerated)
    for position, (case, record) in enumerate(made, start):
        final = _place(record, number, position, "final")
        if record.ok and whole is not None:
            _, predicted = next(found)
            final = replace(final, bytes=whole.nbytes)
            if isinstance(predicted, str):
                final = _mark_failed(final, predicted)
            else:
                final = _measure(final, backbone, case, predicted, reader, whole)
        yield Outcome(final)


# ---------------------------------------------------------------- records


def name_record(number: int, position: int, kind: RecordKind) -> str:
    """The id of a sequence's record; cases may come again in another sequence."""
    return f"{number}/{position}/{kind}"


def _place(record: Record, number: int, position: int, kind: RecordKind) -> Record:
    place = Place(record.id, number, position, kind)
    return replace(record, id=name_record(number, position, kind), place=place)


def _describe_edit(case: Case, edit: Edit, seconds: float) -> Record:
    return Record(
        case.request.id,
        case.task,
        "ok",
        round(seconds, 4),
        dict(edit.info),
        bytes=edit.nbytes,
        groups=case.groups or ABSENT,
    )


def _describe_failure(case: Case, reason: str, seconds: float) -> Record:
    return Record(
        case.request.id, case.task, "failed", round(seconds, 4), error=reason, groups=case.groups or ABSENT
    )


def _get_groups(case: Case) -> Mapping[str, str]:
    return case.groups or ABSENT


def _mark_failed(record: Record, reason: str) -> Record:
    return replace(record, status="failed", error=reason)


def _measure(
    record: Record, backbone: Backbone, case: Case, found: CasePredictions, reader: Reader, edit: Edit
) -> Record:
    """The record with what its case's probes gave before and after ``edit``, all that is applied."""
    before, after = reader.predict_base(case), found.predictions
    probes = list(zip(case.probes, before, after, strict=True))
    names = [probe.name for probe in case.probes]
    missed = average_by_name((p.name, miss_target(a)) for p, _, a in probes if p.name in DERIVED_METRICS)
    return replace(
        record,
        scores=_score(case, before, after, reader.generated),
        presets={
            **{
                name: average_by_name((p.name, preset_score(name, p, b, a)) for p, b, a in probes)
                for name in reader.presets
                if name != "paper"
            },
            **({DE_VQA: missed} if missed else {}),
        },
        base_right=_score_base(case, before, reader.generated),
        numbers=reader.measure_numbers(case, edit) or ABSENT,
        decisions={
            what: {name: round(v, 4) for name, v in average_by_name(zip(names, values, strict=True)).items()}
            for what, values in found.decisions.items()
        },
        retrieved={
            name: {item: round(v, 4) for item, v in items.items()}
            for name, items in keep_first(zip(names, found.retrieved, strict=True)).items()
            if items
        },
        answers=_keep_answers(probes, reader.generated, backbone),
    )


def _keep_answers(
    probes: Sequence[tuple[Probe, Prediction, Prediction]], generated: bool, backbone: Backbone
) -> dict[str, Answer]:
    """By probe, what was answered before and after: decoded, or the argmax at the target's positions. The
    first of a name has those of the others with it."""

    def write(prediction: Prediction) -> str | None:
        return prediction.generated if generated else backbone.decode(prediction.predicted_ids)

    found: dict[str, list[Answer]] = {}
    for probe, before, after in probes:
        expect = None if probe.expect == get_expectation(probe.name) else probe.expect
        asked = (probe.query.prompt, probe.query.target)
        answer = Answer(*asked, write(before), write(after), probe.aliases, expect)
        found.setdefault(probe.name, []).append(answer)
    return {name: replace(own[0], others=tuple(own[1:])) for name, own in found.items()}


def _score_base(case: Case, before: Sequence[Prediction], generated: bool) -> dict[str, dict[str, float]]:
    """Whether the base model itself answers the locality probes right, and, as it decodes them, those that
    have an ``implied`` answer as its old answer implies."""
    unchanged = [(p, b) for p, b in zip(case.probes, before, strict=True) if p.expect == "unchanged"]
    right = {"teacher_forced": average_by_name((p.name, right_everywhere(b)) for p, b in unchanged)}
    if generated:
        implied = [(p, b) for p, b in zip(case.probes, before, strict=True) if p.implied is not None]
        right["generated"] = average_by_name(
            (p.name, holds_old(p, b) if p.implied is not None else right_text(p, b))
            for p, b in (*unchanged, *implied)
        )
    return right


def _score(
    case: Case, before: Sequence[Prediction], after: Sequence[Prediction], generated: bool
) -> dict[str, dict[str, Score]]:
    """By evaluation mode and metric."""
    probes = list(zip(case.probes, before, after, strict=True))
    scores = {
        "teacher_forced": combine_scores((p.name, base_score(p, b), score(p, b, a)) for p, b, a in probes)
    }
    if generated:
        scores["generated"] = combine_scores(
            (p.name, base_score_generated(p, b), score_generated(p, b, a)) for p, b, a in probes
        )
    return scores
