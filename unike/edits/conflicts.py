"""Edits that contradict each other: one question about one image, and different answers.

One rule holds for all methods: the edit that is made or attached last answers. The earlier one is left out as
long as the later one is there, as if it had never been attached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from unike.edits.origin import Origin
from unike.system.text import one_line


class Requested(Protocol):
    """What an edit is here: requests, of which some may be dropped."""

    origins: tuple[Origin, ...]

    @property
    def id(self) -> str: ...

    def drop(self, places: Sequence[int]) -> Any: ...


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
    for edit, origin in _list_origins((*edits, newest) if newest is not None else edits):
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


def _list_origins(edits: Iterable[AnyEdit]) -> Iterator[tuple[AnyEdit, Origin]]:
    return ((edit, origin) for edit in edits for origin in edit.origins)


def _name(edit: Requested, origin: Origin) -> str:
    return edit.id if len(edit.origins) == 1 else origin.id
