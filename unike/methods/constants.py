"""What the base model gives for a train record: the same at every step of an editor's training."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar, cast, runtime_checkable

from unike.system.cache import BoundedCache
from unike.types import Case, EditRequest

T = TypeVar("T")


@runtime_checkable
class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


class Constants:
    """Values that are computed once for each key, and kept up to ``max_bytes`` of their tensors; those that
    were not asked for longest go first. With 0 bytes only the newest is kept.

    They hold for one backbone, whose weights stay as they are, and one set of train records.
    """

    def __init__(self, max_bytes: int) -> None:
        self.computed = 0
        self._kept = BoundedCache[Hashable, object](max_bytes, _count_bytes)

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value of a key."""
        if (found := self._kept.get(key)) is None:
            found = compute()
            self.computed += 1
            self._kept.put(key, found)
        return cast(T, found)


def name_request(request: EditRequest) -> tuple[str, str, str | None]:
    """What tells a training's edits apart: the target may have been replaced by the wrong answer."""
    return request.id, request.query.prompt, request.query.target


def name_case(case: Case) -> tuple[str, ...]:
    """What tells a training's cases apart, of which some probes may have been drawn."""
    return case.task, *map(str, name_request(case.request)), *(probe.name for probe in case.probes)


def _count_bytes(value: object) -> int:
    if isinstance(value, _Sized):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_count_bytes, value.values()))
    return sum(map(_count_bytes, value)) if isinstance(value, (tuple, list)) else 0
