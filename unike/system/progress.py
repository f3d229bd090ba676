"""Progress bars: one per stage of a job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

# Called with a stage of a job and how many of its steps are done since the last call.
Tick = Callable[[str, int], None]


def ignore_progress(stage: str, count: int) -> None:
    """A ``Tick`` that shows nothing."""


@contextmanager
def bars(totals: Mapping[str, int], progress: bool = True) -> Iterator[Tick]:
    """A callback ``tick(stage, n)`` that draws a bar per stage, of the stage's total where it is known."""
    drawn: dict[str, tqdm[Any]] = {}

    def tick(what: str, n: int) -> None:
        if what not in drawn:
            for bar in drawn.values():
                bar.close()
            drawn[what] = tqdm(desc=what, total=totals.get(what), disable=not progress)
        drawn[what].update(n)

    try:
        yield tick
    finally:
        for bar in drawn.values():
            bar.close()
