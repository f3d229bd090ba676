"""Batches in which each row belongs to one of several independent edits.

Shapes: ``R`` rows of a batch, ``B`` independent edits, ``w`` most rows of one edit, ``d`` width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from unike.knowledge.memory import KnowledgeMemory, Retrieved


class Owners:
    """Which of ``count`` independent edits each row of a batch is evaluated under: ``index (R)``."""

    def __init__(self, index: torch.Tensor, count: int) -> None:
        self.index, self.count = index, count
        rows = torch.bincount(index, minlength=count)
        self.width = int(rows.max()) if len(index) else 0
        even = torch.arange(count, device=index.device).repeat_interleave(self.width)
        self.regular = len(even) == len(index) and bool((even == index).all())
        order = index.argsort(stable=True)
        # A row's place among the rows of its edit.
        self.place = torch.empty_like(index)
        self.place[order] = (
            torch.arange(len(index), device=index.device) - (rows.cumsum(0) - rows)[index[order]]
        )

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """Groups rows by edit, ``(R, ...) -> (B, w, ...)``, padded with zeros."""
        if self.regular:
            return x.reshape(self.count, self.width, *x.shape[1:])
        return x.new_zeros(self.count, self.width, *x.shape[1:]).index_put((self.index, self.place), x)

    def unfold(self, y: torch.Tensor) -> torch.Tensor:
        """Undoes ``fold``, ``(B, w, ...) -> (R, ...)``."""
        return y.flatten(0, 1) if self.regular else y[self.index, self.place]


class OwnedMemory(KnowledgeMemory):
    """A memory, followed by one item for each row of a batch that only this row can retrieve.

    ``keys (R, d)``, ``values (R, d)``; the item's index is the length of ``bank``, the memory before it.
    """

    def __init__(self, bank: KnowledgeMemory, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__(keys, values)
        self.bank = bank

    def __len__(self) -> int:
        return len(self.bank) + 1

    def similarities(self, queries: torch.Tensor) -> torch.Tensor:
        """``(R, d) -> (R, m + 1)``."""
        return torch.cat([self.bank.similarities(queries), self._compare_own(queries)], dim=-1)

    def retrieve(self, queries: torch.Tensor, k: int, allowed: torch.Tensor | None = None) -> Retrieved:
        """As ``KnowledgeMemory.retrieve``; of ``allowed (R, n)`` only the last column is used."""
        found = self.bank.retrieve(queries, k)
        own = self._compare_own(queries)
        rank = own if allowed is None else own.masked_fill(~allowed[:, -1:], -torch.inf)
        order = torch.cat([found.similarity, rank], 1).topk(min(k, len(self)), dim=-1).indices
        similarity = torch.cat([found.similarity, own], 1).gather(1, order)
        index = torch.cat([found.index, torch.full_like(own, len(self.bank), dtype=torch.long)], 1)
        states = torch.cat([found.states, self.values[:, None].to(found.states.dtype)], 1)
        rows = torch.arange(len(order), device=order.device)[:, None]
        index = index.gather(1, order)
        open_to = None if allowed is None else allowed[:, -1:] | (index < len(self.bank))
        return Retrieved(similarity, index, states[rows, order], open_to)

    def _compare_own(self, queries: torch.Tensor) -> torch.Tensor:
        """Cosine of each row's query with its own key, ``(R, 1)``."""
        return (F.normalize(queries.float(), dim=-1) * self.directions).sum(-1, keepdim=True)
