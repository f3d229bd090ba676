"""The states that a scope classifier is trained on, of many prompts: in memory up to a limit, then on disk.

Rows are as long as their prompts, and in half precision. What is on disk has no name there: it is gone with
the process, however that ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch
from torch.nn.utils.rnn import pad_sequence

from unike.knowledge.scope import ScopeSamples, pool_tokens

GB = 10**9


class StateRows:
    """Rows of states, each ``(t, d)`` with its own ``t``; all of one ``d``.

    The first ``memory`` bytes are kept in memory, up to ``disk`` more in a file in ``folder``. Without a
    folder all are kept in memory. OverflowError, with the amounts in words, where that is too little.
    """

    def __init__(self, folder: Path | None = None, memory: int = 2 * GB, disk: int = 0) -> None:
        self.folder, self.memory, self.disk = folder, memory, disk
        self.memory_bytes = self.disk_bytes = 0
        self._rows: list[torch.Tensor | tuple[int, int]] = []
        self._file: IO[bytes] | None = None
        self._width = 0

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, row: torch.Tensor) -> None:
        """Adds a row ``(t, d)``, rounded to half precision."""
        # A copy: a view would keep its whole batch in memory.
        row = row.detach().to("cpu", torch.float16, copy=True).contiguous()
        self._width = row.shape[1]
        if self.folder is None or self.memory_bytes + row.nbytes <= self.memory:
            self._rows.append(row)
            self.memory_bytes += row.nbytes
            return
        if self.disk_bytes + row.nbytes > self.disk:
            raise OverflowError(self._describe_room(self.memory_bytes + self.disk_bytes + row.nbytes))
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
        self._file.seek(self.disk_bytes)
        self._file.write(row.numpy().data)
        self._rows.append((self.disk_bytes, len(row)))
        self.disk_bytes += row.nbytes

    def require_room(self, count: int) -> None:
        """OverflowError where ``count`` rows of the mean length of those that are there would not fit."""
        needed = (self.memory_bytes + self.disk_bytes) // max(1, len(self)) * count
        if self.folder is not None and needed > self.memory + self.disk:
            raise OverflowError(self._describe_room(needed))

    def _describe_room(self, needed: int) -> str:
        room = f"{self.memory / GB:.3g} GB of memory and {self.disk / GB:.3g} GB of disk are for them"
        return f"they take {needed / GB:.3g} GB; {room}"

    def read(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        """The rows of these numbers, each ``(t, d)``."""
        return [self._read(self._rows[number]) for number in numbers]

    def _read(self, row: torch.Tensor | tuple[int, int]) -> torch.Tensor:
        if isinstance(row, torch.Tensor):
            return row
        assert self._file is not None
        offset, tokens = row
        self._file.seek(offset)
        size = tokens * self._width * torch.float16.itemsize
        kept = bytearray(self._file.read(size))
        return torch.frombuffer(kept, dtype=torch.float16).view(tokens, self._width)


@dataclass(frozen=True)
class ScopeStates:
    """``n`` edits with ``v`` queries each, as ``ScopeSamples`` has them: row ``i * v + j`` of ``rows`` is
    query ``j`` of edit ``i``. ``numbers (n)`` are the edits of the rows that are meant; None: all."""

    rows: StateRows
    queries: int
    inside: int
    wrong: torch.Tensor | None = None
    few: torch.Tensor | None = None
    numbers: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows) // self.queries if self.numbers is None else len(self.numbers)

    def select(self, index: torch.Tensor) -> ScopeStates:
        """The edits of these numbers; nothing is loaded."""
        numbers = index if self.numbers is None else self.numbers[index]
        wrong, few = (None if known is None else known[index] for known in (self.wrong, self.few))
        return replace(self, numbers=numbers, wrong=wrong, few=few)

    def load(self, index: torch.Tensor) -> ScopeSamples:
        """The states of the edits of these numbers, padded to the longest of them."""
        some = self.select(index)
        assert some.numbers is not None
        places = (some.numbers[:, None] * self.queries + torch.arange(self.queries)).flatten()
        rows = self.rows.read(places.tolist())
        states = pad_sequence(rows, batch_first=True)
        mask = torch.arange(states.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        shape = (len(some), self.queries, states.shape[1])
        return ScopeSamples(states.view(*shape, -1), mask.view(shape), self.inside, some.wrong, some.few)

    def load_all(self) -> ScopeSamples:
        """All edits at once."""
        return self.load(torch.arange(len(self)))


def pool_prompt(states: torch.Tensor, tokens: int | None) -> torch.Tensor:
    """One prompt's states ``(t, d)`` as a classifier of ``tokens`` pools them; None: as they are."""
    if tokens is None or len(states) <= tokens:
        return states
    mask = torch.ones(1, len(states), dtype=torch.bool, device=states.device)
    return pool_tokens(states[None], mask, tokens)[0][0]
