"""A run of one process or of several: how each one's share ends, and how all are summed up."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

import torch

from unike.evaluation.summary import Summary, summarise
from unike.runs.records import RecordWriter, read_records
from unike.system import processes
from unike.system.processes import LostError, SharedError
from unike.types import UserError

T = TypeVar("T")


class SharedRun:
    """Carries how this process's share of a run went to the run's end, where all shares meet."""

    def __init__(self, writer: RecordWriter) -> None:
        self.writer = writer
        self.interrupted = False
        self.problems: tuple[str, ...] = ()

    def take_until_stopped(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until another process of the run is interrupted or fails."""
        for item in items:
            if self.writer.is_stopped():
                return
            yield item

    @contextmanager
    def catch_end(self) -> Iterator[None]:
        """Ctrl-C ends the block, and so does a UserError, which ``sum_up`` raises after the summary."""
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted = True
            self.writer.stop()
        except UserError as error:
            self.problems = error.problems
            self.writer.stop()

    def sum_up(self, seed: int, presets: Sequence[str], order: Sequence[str]) -> Summary:
        """Merges all processes' records in the ``order`` of their ids, and writes and gives the summary.

        The main process does this when all have ended their share, or when one has died or failed: then
        it raises LostError, or SharedError with the problems of all, after the summary of what there is.
        """
        mine = (self.interrupted, self.problems, measure_peak_memory())
        self.writer.close()
        parts, lost = [mine], False
        try:
            parts, late = processes.gather_at_end(mine)
            self.interrupted = late or any(interrupted for interrupted, _, _ in parts)
        except LostError:
            lost = True
        except KeyboardInterrupt:
            self.interrupted = True
        found = dict.fromkeys(line for _, lines, _ in parts for line in lines)
        interrupted = self.interrupted or lost or bool(found)
        summary: Summary = {"interrupted": interrupted}
        if processes.is_main():
            peaks = {kind: _find_most(peak[kind] for _, _, peak in parts) for kind in mine[2]}
            try:
                self.writer.finish(order)
                records = read_records(self.writer.directory)
                summary = summarise(records, seed, presets)
                summary["interrupted"], summary["peak_memory_bytes"] = interrupted, peaks
                self.writer.write_summary(summary)
            except UserError as error:
                # A full disk takes no summary either; what ended the run is reported first.
                found |= dict.fromkeys(error.problems)
        if lost:
            raise LostError
        if found:
            raise SharedError(*found)
        return summary


def _find_most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def measure_peak_memory() -> dict[str, int | None]:
    """The most bytes that this process has used so far: ``resident`` in the machine's memory, and on
    its CUDA ``device``; None where there is none, or the system does not report it."""
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    try:
        resource: Any = import_module("resource")
    except ImportError:
        return {"resident": None, "device": device}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return {"resident": most if sys.platform == "darwin" else most * 1024, "device": device}
