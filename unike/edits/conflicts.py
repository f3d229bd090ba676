"""Edits that contradict each other: one question about one image, and different answers.

One rule holds for all methods: the edit that is made or attached last answers. The earlier one is left out as
long as the later one is there, as if it had never been attached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from unike.edits.origin import Origin
from unike.system.text import one_line
from unike.types import UserError


class Requested(Protocol):
    """What an edit is here: requests, of which some may be dropped."""

    origins: tuple[Origin, ...]

    @property
    def id(self) -> str: ...

    @property
    def parts(self) -> tuple[Any, ...]: ...

    @property
    def units(self) -> tuple[Any, ...]: ...

    def drop(self, places: Sequence[int]) -> Any: ...

    def keep_units(self, units: Sequence[Any]) -> Any: ...

    def yields_to(self, other: Any) -> bool: ...


AnyEdit = TypeVar("AnyEdit", bound=Requested)


@dataclass(frozen=True)
class Contradiction:
    """Two edits of one question and image with different targets, by their ids; the later one answers."""

    earlier: str
    later: str
    prompt: str
    earlier_target: str
    later_target: str

    def __str__(self) -> str:
        was, now = one_line(self.earlier_target, 60), one_line(self.later_target, 60)
        return (
            f"edit {one_line(self.later)} contradicts edit {one_line(self.earlier)}: "
            f"{one_line(self.prompt, 80)!r} about the same image is {was!r} there and {now!r} here; "
            "the later one answers"
        )


def find_contradicted(earlier: Sequence[Origin], later: Iterable[Origin]) -> list[int]:
    """The places among ``earlier`` of those that a later one contradicts."""
    wanted = {origin.question: origin for origin in later}
    return [
        place
        for place, origin in enumerate(earlier)
        if (new := wanted.get(origin.question)) is not None and new.contradicts(origin)
    ]


def list_contradictions(edits: Sequence[AnyEdit], newest: AnyEdit | None = None) -> tuple[Contradiction, ...]:
    """Every pair of consecutive edits of a question that differ; with ``newest``, only its own."""
    last: dict[object, tuple[AnyEdit, Origin]] = {}
    out = []
    wanted = None if newest is None else {origin.question for origin in newest.origins}
    for edit, origin in _list_origins((*edits, newest) if newest is not None else edits):
        if wanted is not None and origin.question not in wanted:
            continue
        former = last.get(origin.question)
        if former is not None and origin.contradicts(former[1]) and (newest is None or newest is edit):
            out.append(
                Contradiction(
                    _name(*former), _name(edit, origin), origin.prompt, former[1].target, origin.target
                )
            )
        last[origin.question] = edit, origin
    return tuple(out)


def leave_out_contradicted(edits: Sequence[AnyEdit]) -> list[AnyEdit | None]:
    """Each edit without the requests that a later one contradicts; None where nothing is left of it."""
    last: dict[object, Origin] = {origin.question: origin for _, origin in _list_origins(edits)}
    out: list[AnyEdit | None] = []
    for edit in edits:
        places = [i for i, o in enumerate(edit.origins) if last[o.question].contradicts(o)]
        out.append(edit.drop(places) if places else edit)
    return out


def require_yielding(edit: Requested, other: Requested, places: Sequence[int]) -> None:
    """UserError where an edit keeps the requests at these places with ``other``, which contradicts them."""
    if edit.yields_to(other):
        return
    names = ", ".join(one_line(edit.origins[i].id) for i in places)
    raise UserError(
        f"edit {one_line(other.id)}: contradicts {names} in edit {one_line(edit.id)}, and that cannot be "
        "taken out of it; detach that edit first"
    )


def drop_units(edit: Requested, places: Sequence[int]) -> Any:
    """An edit without the units of the requests at these places: see ``Edit.drop``."""
    gone = set(places)
    if len(gone) == len(edit.origins):
        return None
    units, names = edit.units, [origin.id for origin in edit.origins]
    if [unit.id for unit in units] == names:
        left = [unit for i, unit in enumerate(units) if i not in gone]
    else:
        lost = {names[i] for i in gone}
        left = [unit for unit in units if unit.id not in lost]
    if not left or len(left) == len(units) or (out := edit.keep_units(left)) is None:
        return edit
    out.origins = tuple(origin for i, origin in enumerate(edit.origins) if i not in gone)
    return out


def drop_from_parts(edit: Requested, places: Sequence[int]) -> list[Any] | None:
    """The parts of a mixed edit without the requests at these places; None where one can't be taken out."""
    gone, found, parts = {id(edit.origins[i]) for i in places}, 0, list[Any]()
    for part in edit.parts:
        own = [i for i, origin in enumerate(part.origins) if id(origin) in gone]
        left = part.drop(own) if own else part
        if left is part and own:
            return None
        found += len(own)
        parts += [] if left is None else [left]
    return None if found < len(gone) else parts


def share_origins(whole: Requested) -> None:
    """Gives each part of an edit its own origins, as far as the names of its requests say which. A request
    of which several parts were made is of each of them."""
    if len(whole.origins) == 1:
        for part in whole.parts:
            part.origins = whole.origins
        return
    named = [{unit.id for unit in part.units if unit is not part} for part in whole.parts]
    left, unnamed = list(whole.origins), list[Any]()
    for i, (part, names) in enumerate(zip(whole.parts, named, strict=True)):
        part.origins = tuple(origin for origin in left if origin.id in names)
        later = set[str]().union(*named[i + 1 :])
        made = Counter(origin.id for origin in whole.origins)
        # One request with a name that a later part has, too, is of both.
        left = [o for o in left if o.id not in names or (o.id in later and made[o.id] == 1)]
        unnamed += [] if names else [part]
    if len(unnamed) == 1:
        given = {id(origin) for part in whole.parts for origin in part.origins}
        unnamed[0].origins = tuple(origin for origin in left if id(origin) not in given)


def _list_origins(edits: Iterable[AnyEdit]) -> Iterator[tuple[AnyEdit, Origin]]:
    return ((edit, origin) for edit in edits for origin in edit.origins)


def _name(edit: Requested, origin: Origin) -> str:
    return edit.id if len(edit.origins) == 1 else origin.id
