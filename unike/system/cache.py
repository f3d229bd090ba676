"""A cache that forgets what was not asked for longest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BoundedCache(Generic[K, V]):
    """Values by key, up to a ``limit`` of their sizes together; each counts 1 unless ``size_of`` says more
    (its bytes, say).

    Where the limit is passed, the values that were not asked for longest go; the newest one stays, however
    large it is.
    """

    def __init__(self, limit: int, size_of: Callable[[V], int] = lambda _: 1) -> None:
        self.limit, self.size = limit, 0
        self._size_of = size_of
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """The value, which counts as asked for; None where there is none."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: K, value: V) -> None:
        """Keeps a value in the place of a former one of that key."""
        if key in self._values:
            self.size -= self._size_of(self._values.pop(key))
        self._values[key] = value
        self.size += self._size_of(value)
        while self.size > self.limit and len(self._values) > 1:
            _, oldest = self._values.popitem(last=False)
            self.size -= self._size_of(oldest)

    def clear(self) -> None:
        self._values.clear()
        self.size = 0
