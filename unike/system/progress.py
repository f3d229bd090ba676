"""Progress bars: one per stage of a job, and one of work that is done in batches."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

# A stage's time is reported after so long, where more than so much is left.
_MEASURED_SECONDS, _LONG_SECONDS = 3.0, 60.0
# Between two looks at a terminal's clock while a batch is at work.
_TICK_SECONDS = 1.0
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


class BatchClock:
    """The time left of work in batches of ``sizes`` units, where a unit takes as long in one as in another.

    What a bar counts may be less than that: a batch of which a former run recorded a part is done again as a
    whole. The clock starts when it is made.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self.done = 0
        self._started = self._last = time.monotonic()

    def finish(self) -> None:
        """The batch at work is done, and the next one begins."""
        self.done += 1
        self._last = time.monotonic()

    def estimate(self) -> float | None:
        """Seconds left, those that the batch at work has taken already taken off; None before the first one
        is done. A batch that takes longer than expected has 0 left."""
        if self.done >= len(self.sizes):
            return 0.0
        units = sum(self.sizes[: self.done])
        if not units:
            return None
        each, running = (self._last - self._started) / units, self.sizes[self.done]
        here = max(0.0, each * running - (time.monotonic() - self._last))
        return here + each * sum(self.sizes[self.done + 1 :])

    def describe(self) -> str:
        """The time left, and which batch is at work where there are batches of several units."""
        left = self.estimate()
        text = "?" if left is None else tqdm.format_interval(round(left))
        if max(self.sizes, default=1) == 1 or self.done >= len(self.sizes):
            return text
        return f"{text}, batch {self.done + 1} of {len(self.sizes)}"


class BatchBar(tqdm):  # type: ignore[type-arg]
    """A bar that moves when a batch of ``sizes`` is done, with the ``BatchClock``'s time left.

    tqdm expects that each step of a bar takes as long as the last ones. Its time stands still during a batch,
    and is many times too long after a batch of which most was recorded before. On a terminal this one counts
    down within a batch.
    """

    def __init__(self, sizes: Sequence[int], **options: Any) -> None:
        self.clock = BatchClock(sizes)
        self._ended = threading.Event()
        bar = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}{postfix}]"
        super().__init__(bar_format=bar, miniters=1, **options)
        if not self.disable and self.fp.isatty():
            threading.Thread(target=self._count_down, daemon=True).start()

    @property
    def format_dict(self) -> dict[str, Any]:
        """tqdm's, and the time ``left``."""
        return {**super().format_dict, "left": self.clock.describe()}

    def advance(self, n: int) -> None:
        """A batch is done, of which the bar counts ``n``."""
        self.clock.finish()
        self.update(n)

    def close(self) -> None:
        self._ended.set()
        super().close()

    def _count_down(self) -> None:
        while not self._ended.wait(_TICK_SECONDS):
            self.refresh()
