"""The time left that a bar of batches shows: after whole, partial and recorded batches, and within one."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Project
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from unike.runs import run as module
from unike.runs.records import RECORDS, read_lines
from unike.system import progress
from unike.system.progress import BatchBar, BatchClock


class Clock:
    """Seconds that pass when a test says so, for bars and for tqdm."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=6), st.floats(0.01, 100), st.data())
def test_the_time_left_is_what_is_left_where_units_take_as_long(
    sizes: list[int], each: float, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        timed = BatchClock(sizes)
        ends = [clock.now + each * sum(sizes[: i + 1]) for i in range(len(sizes))]
        assert timed.estimate() is None, "before a batch is done, nothing is known"
        for i, end in enumerate(ends):
            clock.now = end
            timed.finish()
            within = data.draw(st.floats(0, 1)) * each * (sizes[i + 1] if i + 1 < len(sizes) else 0)
            clock.now += within
            assert timed.estimate() == pytest.approx(ends[-1] - clock.now, abs=1e-6 * ends[-1])


def test_a_late_batch_has_nothing_left_of_its_own(clock: Clock) -> None:
    timed = BatchClock([10, 10, 10])
    clock.now += 20
    timed.finish()
    clock.now += 15
    assert timed.estimate() == pytest.approx(5 + 20)
    clock.now += 15
    assert timed.estimate() == pytest.approx(20), "never less than the batches after it"


def show(sizes: list[int], clock: Clock, work: Callable[[BatchBar], None], **options: int) -> list[str]:
    """What the bar has shown, with its time left."""
    file = io.StringIO()
    with BatchBar(sizes, file=file, desc="edits", mininterval=0, **options) as bar:
        work(bar)
    return [line for line in re.split(r"[\r\n]+", file.getvalue()) if line]


def test_a_resumed_batch_does_not_stretch_the_time(clock: Clock) -> None:
    """Of the first batch of 32 two edits are missing. It is made as a whole, in 32 seconds."""

    def work(bar: BatchBar) -> None:
        clock.now += 32
        bar.advance(2)
        clock.now += 10
        bar.refresh()

    lines = show([32, 32, 4], clock, work, total=68, initial=30)
    assert "30/68 [00:00<?, batch 1 of 3]" in lines[0]
    assert "32/68 [00:32<00:36, batch 2 of 3]" in lines[1]
    assert "32/68 [00:42<00:26, batch 2 of 3]" in lines[2]
    # tqdm alone expects each of the other 36 to take the 16 seconds of these two.
    file = io.StringIO()
    with tqdm(total=68, initial=30, file=file, mininterval=0, miniters=1) as plain:
        clock.now += 32
        plain.update(2)
    assert "<09:36" in file.getvalue()


def test_the_last_and_smaller_batch_is_shown(clock: Clock) -> None:
    def work(bar: BatchBar) -> None:
        for size in (32, 4):
            clock.now += size
            bar.advance(size)

    lines = show([32, 4], clock, work, total=36)
    assert "32/36 [00:32<00:04, batch 2 of 2]" in lines[1]
    assert "36/36 [00:36<00:00]" in lines[-1]


def test_single_edits_have_no_batches(clock: Clock) -> None:
    def work(bar: BatchBar) -> None:
        clock.now += 2
        bar.set_postfix_str("Rel 100.0", refresh=False)
        bar.advance(1)

    lines = show([1, 1, 1], clock, work, total=3)
    assert "1/3 [00:02<00:04, Rel 100.0]" in lines[-1]
    assert "batch" not in "".join(lines)


def test_a_terminal_sees_it_count_down(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(progress, "_TICK_SECONDS", 0.01)
    shown = []
    for file in (Terminal(), io.StringIO()):
        with BatchBar([2, 2], total=4, file=file) as bar:
            if file.isatty():
                started = progress.time.monotonic()
                while file.getvalue().count("\r") < 4 and progress.time.monotonic() < started + 20:
                    bar._ended.wait(0.01)
            else:
                bar._ended.wait(0.2)
        shown.append(file.getvalue().count("\r"))
    assert shown[0] >= 4
    assert shown[1] <= 2, "a log has no line a second"


def test_a_hidden_bar_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with BatchBar([2, 1], total=3, disable=True) as bar:
        bar.advance(2)
        bar.advance(1)
    assert capsys.readouterr().err == ""


def test_a_run_says_how_large_its_batches_are(copied: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are made again: of the first batch one record is missing."""
    from test_bounds import start

    seen: list[tuple[list[int], int, int]] = []

    class Bar(BatchBar):
        def __init__(self, sizes: list[int], **options: int) -> None:
            seen.append((list(sizes), options["total"], options["initial"]))
            super().__init__(sizes, **options)

    monkeypatch.setattr(module, "BatchBar", Bar)
    output = copied.root / "run"
    arguments = ("--no_generated", "edit_batch_size=3", "--output", str(output))
    assert start(copied, *arguments) == 0
    lines = Path(output / RECORDS).read_text().splitlines(keepends=True)
    (output / RECORDS).write_text("".join(lines[:2]))
    assert start(copied, *arguments, "--resume") == 0
    assert seen == [([3, 1], 4, 0), ([3, 1], 4, 2)]
    assert len(read_lines(output)) == 4
