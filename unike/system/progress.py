"""Progress bars: one per stage of a job."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

# A stage's time is reported after so long, where more than so much is left.
_MEASURED_SECONDS, _LONG_SECONDS = 3.0, 60.0
# Called with a stage of a job and how many of its steps are done since the last call.
Tick = Callable[[str, int], None]


def ignore_progress(stage: str, count: int) -> None:
    """A ``Tick`` that shows nothing."""


@contextmanager
def show_bytes(
    what: str, total: int | None, done: int, progress: bool = True
) -> Iterator[Callable[[int], object]]:
    """A callback ``count(n)`` that draws a bar of bytes, of which so many are ``done`` already."""
    bar = tqdm(
        desc=what, total=total, initial=done, unit="B", unit_scale=True, disable=None if progress else True
    )
    try:
        yield bar.update
    finally:
        bar.close()


def _describe_time(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"


@contextmanager
def show_progress(totals: Mapping[str, int], progress: bool = True) -> Iterator[Tick]:
    """A callback ``tick(stage, n)`` that draws a bar per stage, of the stage's total where it is known.

    A stage that will take minutes is announced with its time, as soon as its first steps tell.
    """
    drawn: dict[str, tqdm[Any]] = {}
    # By stage, since its first tick: when it was, and how many steps were done. That tick comes after its
    # steps: how long they took is not known.
    clocks: dict[str, tuple[float, int]] = {}

    def tick(what: str, n: int) -> None:
        if what not in drawn:
            for bar in drawn.values():
                bar.close()
            drawn[what] = tqdm(desc=what, total=totals.get(what), disable=not progress)
            clocks[what] = (time.monotonic(), -n)
        drawn[what].update(n)
        if progress and what in clocks and totals.get(what):
            start, done = clocks[what]
            clocks[what] = (start, done + n)
            passed = time.monotonic() - start
            if passed > _MEASURED_SECONDS and done + n > 0:
                del clocks[what]
                left = passed / (done + n) * totals[what]
                if left > _LONG_SECONDS:
                    text = f"{what}: about {_describe_time(left)} for {totals[what]} steps"
                    drawn[what].write(text, file=sys.stderr)

    try:
        yield tick
    finally:
        for bar in drawn.values():
            bar.close()
