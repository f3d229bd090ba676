"""Protocols: what is edited, in which order, and what is asked before and after.

A case is read twice: once from the untouched base model (kept, since no edit changes it) and once
under the edit or the sequence of edits. See ``unike.evaluation.reader`` for how.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unike.backbones.base import Backbone
from unike.edits import Edit
from unike.evaluation.metrics import (
    Reading,
    base_score,
    base_score_generated,
    preset_score,
    right_everywhere,
    right_text,
    score,
    score_generated,
)
from unike.evaluation.reader import Asked, Reader
from unike.methods.base import EditMethod
from unike.system.faults import out_of_memory
from unike.types import Case

Keep = Callable[[Edit], object]


def forget(edit: Edit) -> None:
    """What is done with an edit that nobody wants to keep."""


def one_step(
    backbone: Backbone, method: EditMethod, case: Case, reader: Reader, history: Edit | None = None
) -> dict[str, Any]:
    """Edits one case from the base model, asks its probes, and gives the record of it.

    An edit whose loss stops being a number is recorded as failed; its probes are not asked.
    """
    before = reader.base(case)
    started = time.perf_counter()
    try:
        edit = method.edit(backbone, case.request, reader.prefixes, history)
    except FloatingPointError as error:
        return _record(case, "failed", time.perf_counter() - started, {"error": str(error)})
    seconds = time.perf_counter() - started
    after = reader.edited(case, edit if history is None else history | edit, before)
    record = _record(case, "ok", seconds, {**edit.info, "bytes": edit.nbytes})
    return record | _measured(backbone, case, Asked(after, reader.explained), reader)


def one_step_many(
    backbone: Backbone, method: EditMethod, cases: Sequence[Case], reader: Reader, keep: Keep = forget
) -> list[dict[str, Any]]:
    """As ``one_step`` for each case, edits made and asked side by side where the method can; ``keep``
    is handed every edit that is made.

    ``seconds`` is each edit's share of what all of them took.
    """
    reader.learn_base(cases)
    started = time.perf_counter()
    edits = method.edit_many(backbone, [case.request for case in cases], reader.prefixes)
    seconds = (time.perf_counter() - started) / len(cases)
    held = [(case, edit) for case, edit in zip(cases, edits, strict=True) if isinstance(edit, Edit)]
    for _, one in held:
        keep(one)
    asked = iter(reader.edited_each([case for case, _ in held], [edit for _, edit in held]))
    out = []
    for case, edit in zip(cases, edits, strict=True):
        if isinstance(edit, FloatingPointError):
            out.append(_record(case, "failed", seconds, {"error": str(edit)}))
            continue
        record = _record(case, "ok", seconds, {**edit.info, "bytes": edit.nbytes})
        out.append(record | _measured(backbone, case, next(asked), reader))
    return out


@dataclass(frozen=True)
class _Made:
    """An edit of a sequence: its case, the seconds it took, and what the method reports of it."""

    case: Case
    seconds: float
    info: Mapping[str, Any]

    @property
    def failed(self) -> bool:
        return "error" in self.info


def sequential(
    backbone: Backbone, method: EditMethod, cases: Sequence[Case], reader: Reader, number: int = 0,
    former: int | None = None, seed: int = 0, tolerated: tuple[type[Exception], ...] = (),
    keep: Keep = forget,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Edits the cases in order, each on top of all before it, and gives two records for each of them.

    A ``step`` follows every edit: how the newest does (``scores``) and how the ones before it still do
    (``former``, means after the edit), both teacher-forced. ``former`` bounds how many of these are
    asked, drawn anew by ``seed`` at each step; None asks all. The ``final`` records come at the end:
    every case under all edits, in both ways of reading. Their means are the five metrics of K-step
    editing, Eq. (16), Eq. (17), Eq. (18), Eq. (19) and Eq. (20). Locality is against the unedited base.

    An edit that fails (its loss stops being a number, memory does not suffice, or one of ``tolerated`` is
    raised) is marked in both of its records and leaves no trace: the next one continues from the edits
    before it. One whose probes cannot be asked (``tolerated``) stays, marked. ``keep`` gets every edit made.
    """
    failures: tuple[type[Exception], ...] = (FloatingPointError, *tolerated)
    caught: tuple[type[Exception], ...] = (*failures, RuntimeError, MemoryError)
    broken = _learn_base(reader, cases, tolerated)
    whole: Edit | None = None
    all_made: list[_Made] = []
    chooser = random.Random(f"{seed}/{number}")
    for position, case in enumerate(cases, 1):
        started = time.perf_counter()
        info: dict[str, Any] = {}
        try:
            if position in broken:
                info = {"error": broken[position]}
            else:
                edit = method.edit(backbone, case.request, reader.prefixes, whole)
                # Before it is in force: an edit that cannot be kept counts as failed, and leaves no trace.
                keep(edit)
                whole = edit if whole is None else whole | edit
                info = {**edit.info, "bytes": edit.nbytes}
        except caught as error:
            full = out_of_memory(error)
            if not full and not isinstance(error, failures):
                raise
            info = {"error": "out of memory" if full else str(error)}
        made = _Made(case, time.perf_counter() - started, info)
        asked = [m.case for m in all_made if not m.failed]
        if former is not None and len(asked) > former:
            asked = chooser.sample(asked, former)
        about = _placed(made, number, position, "step")
        if not made.failed and whole is not None:
            about |= _step(case, _asked(reader, [case, *asked], whole, tolerated, generated=False), reader)
        yield about
        all_made.append(made)
    yield from _finals(backbone, all_made, whole, reader, number, tolerated)


def _learn_base(
    reader: Reader, cases: Sequence[Case], tolerated: tuple[type[Exception], ...]
) -> dict[int, str]:
    """Reads the untouched model; by position why a case cannot be asked, where that is ``tolerated``."""
    try:
        reader.learn_base(cases)
        return {}
    except tolerated:
        broken: dict[int, str] = {}
    for position, case in enumerate(cases, 1):
        try:
            reader.base(case)
        except tolerated as error:
            broken[position] = str(error)
    return broken


_Readings = Iterator[tuple[Case, Asked | str]]


def _asked(
    reader: Reader, cases: Sequence[Case], whole: Edit, tolerated: tuple[type[Exception], ...],
    generated: bool | None = None,
) -> _Readings:  # fmt: skip
    """Each case's readings under all edits, or why there are none, where ``tolerated`` is raised."""
    for some in [[case] for case in cases] if tolerated else [cases]:
        try:
            yield from reader.edited_all(some, whole, generated)
        except tolerated as error:
            yield some[0], str(error)


def _step(case: Case, readings: _Readings, reader: Reader) -> dict[str, Any]:
    """How the newest edit does, whose readings come first, and how the former ones still do."""
    found: dict[str, list[float]] = {}
    newest: dict[str, Any] = {}
    count = 0
    for one, asked in readings:
        if isinstance(asked, str):
            newest |= _unread(asked) if one is case else {}
            continue
        scores = _scores(one, reader.base(one), asked.readings, False)
        if one is case:
            newest = {"scores": scores}
            continue
        count += 1
        for metric, value in scores["teacher_forced"].items():
            found.setdefault(metric, []).append(value["after"])
    still = {metric: float(np.mean(values)) for metric, values in found.items()}
    return newest | {"former": still, "former_cases": count}


def _unread(reason: str) -> dict[str, Any]:
    return {"status": "failed", "error": reason}


def _finals(
    backbone: Backbone, all_made: Sequence[_Made], whole: Edit | None, reader: Reader, number: int,
    tolerated: tuple[type[Exception], ...],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    readings: _Readings = iter(())
    if whole is not None:
        readings = _asked(reader, [m.case for m in all_made if not m.failed], whole, tolerated)
    size = 0 if whole is None else whole.nbytes
    for position, made in enumerate(all_made, 1):
        record = _placed(made, number, position, "final")
        if not made.failed and whole is not None:
            _, asked = next(readings)
            record["bytes"] = size
            if isinstance(asked, str):
                record |= _unread(asked)
            else:
                record |= _measured(backbone, made.case, asked, reader)
        yield record


def _placed(made: _Made, number: int, position: int, kind: str) -> dict[str, Any]:
    """A record of a sequence; ids count sequences and positions, since cases may come again."""
    record = _record(made.case, "failed" if made.failed else "ok", made.seconds, dict(made.info))
    place = {"case": record["id"], "sequence": number, "position": position, "kind": kind}
    return record | {"id": sequence_id(number, position, kind)} | place


def sequence_id(number: int, position: int, kind: str) -> str:
    """The id of a sequence's record; ``kind`` is ``step`` or ``final``."""
    return f"{number}/{position}/{kind}"


def _record(case: Case, status: str, seconds: float, info: dict[str, Any]) -> dict[str, Any]:
    return {"id": case.request.id, "task": case.task, "status": status, "seconds": round(seconds, 4), **info}


def _measured(backbone: Backbone, case: Case, asked: Asked, reader: Reader) -> dict[str, Any]:
    """What a record says of a case's probes, before and after."""
    before, after = reader.base(case), asked.readings
    triples = list(zip(case.probes, before, after, strict=True))
    names = [probe.name for probe in case.probes]
    return {
        "scores": _scores(case, before, after, reader.generated),
        "presets": {
            name: {p.name: preset_score(name, p, b, a) for p, b, a in triples}
            for name in reader.presets
            if name != "paper"
        },
        "base_right": _base_right(case, before, reader.generated),
        "decisions": {
            what: {name: round(v, 4) for name, v in zip(names, values, strict=True)}
            for what, values in asked.decisions.items()
            if what != "retrieved"
        },
        "retrieved": {
            name: {item: round(v, 4) for item, v in items.items()}
            for name, items in zip(names, asked.decisions.get("retrieved", [{}] * len(names)), strict=True)
            if items
        },
        "answers": {
            probe.name: {
                "prompt": probe.query.prompt,
                "target": probe.query.target,
                "before": b.generated if reader.generated else backbone.decode(b.predicted_ids),
                "after": a.generated if reader.generated else backbone.decode(a.predicted_ids),
            }
            for probe, b, a in triples
        },
    }


def _base_right(case: Case, before: Sequence[Reading], generated: bool) -> dict[str, dict[str, float]]:
    """Whether the base model itself answers the probes right that an edit must leave unchanged."""
    held = [(p, b) for p, b in zip(case.probes, before, strict=True) if p.expect == "unchanged"]
    right = {"teacher_forced": {p.name: right_everywhere(b) for p, b in held}}
    return right | {"generated": {p.name: right_text(p, b) for p, b in held}} if generated else right


def _scores(
    case: Case, before: Sequence[Reading], after: Sequence[Reading], generated: bool
) -> dict[str, dict[str, dict[str, float]]]:
    forced, free = {}, {}
    for probe, b, a in zip(case.probes, before, after, strict=True):
        forced[probe.name] = {"before": base_score(probe, b), "after": score(probe, b, a)}
        if generated:
            free[probe.name] = {
                "before": base_score_generated(probe, b),
                "after": score_generated(probe, b, a),
            }
    return {"teacher_forced": forced, "generated": free} if generated else {"teacher_forced": forced}
