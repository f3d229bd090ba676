"""Progress bars: one per stage of a long preparation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def bars(totals: Mapping[str, int], shown: bool) -> Iterator[Callable[[str, int], None]]:
    """A callback ``(stage, count)`` that draws one bar per stage, with its total where one is known."""
    drawn: dict[str, tqdm[Any]] = {}

    def tick(what: str, n: int) -> None:
        if what not in drawn:
            for bar in drawn.values():
                bar.close()
            drawn[what] = tqdm(desc=what, total=totals.get(what), disable=not shown)
        drawn[what].update(n)

    try:
        yield tick
    finally:
        for bar in drawn.values():
            bar.close()
