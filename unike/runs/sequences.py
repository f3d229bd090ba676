"""Runs of sequences: which are left to a process, and the outcomes of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

from unike.evaluation.protocols import Outcome, name_record, run_sequence
from unike.evaluation.reader import Reader
from unike.evaluation.record import RecordKind
from unike.evaluation.sequences import draw_run_sequences
from unike.runs.parts import Parts
from unike.runs.sharing import SharedRun
from unike.system import processes
from unike.types import Case, UserError


class Sequences:
    """This process's share of the sequences drawn from ``cases`` that are not recorded to their end.

    An unfinished one is edited from its start, since edits are not kept. ``order`` has the ids of the run's
    records. A progress bar counts to ``total`` edits, from ``already`` on. Each outcome takes its own time:
    none is ``pending``, and ``sizes`` are of one edit each.
    """

    pending = 0

    def __init__(
        self, parts: Parts, cases: Sequence[Case], reader: Reader, done: AbstractSet[str], skip_broken: bool
    ) -> None:
        self.parts, self.reader = parts, reader
        self.tolerated: tuple[type[Exception], ...] = (UserError,) if skip_broken else ()
        self.drawn = draw_run_sequences(parts.hparams, cases)
        length, count = parts.hparams.sequence_length, len(self.drawn)
        gap = parts.hparams.gap
        finals = length if gap is None else length - gap
        whole = [i for i in range(count) if name_record(i, finals, "final") in done]
        self.numbers = processes.share([i for i in range(count) if i not in whole])
        self.already = len(whole) * length
        self.sizes = [1] * (len(self.numbers) * length)
        self.total = self.already + len(self.sizes)
        places: tuple[tuple[RecordKind, int], ...] = (("step", length), ("final", finals))
        self.order = [
            name_record(number, position, kind)
            for number in range(count)
            for kind, positions in places
            for position in range(1, positions + 1)
        ]

    def run(self, shared: SharedRun) -> Iterator[Outcome]:
        """The outcomes of all sequences, recorded or not, until the run is stopped."""
        parts, hparams = self.parts, self.parts.hparams
        for number in self.numbers:
            yield from shared.take_until_stopped(
                run_sequence(
                    parts.backbone,
                    parts.method,
                    self.drawn[number],
                    self.reader,
                    number,
                    hparams.curve_cases,
                    hparams.seed,
                    self.tolerated,
                    hparams.gap,
                )
            )
