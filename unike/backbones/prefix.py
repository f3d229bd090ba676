"""Prefix states kept per query: what lies below the edited layers is computed once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from unike.backbones.base import IGNORED, Backbone, PrefixState, encode_queries
from unike.backbones.images import content_key
from unike.types import Query


@dataclass(frozen=True)
class _Row:
    hidden: torch.Tensor
    labels: torch.Tensor
    question_end: int

    @property
    def nbytes(self) -> int:
        return self.hidden.nbytes + self.labels.nbytes


class PrefixCache:
    """Hidden states at the door of layer ``first``, by query; the oldest go when ``max_bytes`` are full.

    The states are the untouched base model's: never fill the cache while an edit is applied.
    """

    def __init__(self, backbone: Backbone, first: int, max_bytes: int = 2 << 30, batch: int = 32) -> None:
        self.backbone, self.first, self.max_bytes, self.batch = backbone, first, max_bytes, batch
        self.computed = 0
        self._rows: OrderedDict[Any, _Row] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def state(self, queries: Sequence[Query]) -> PrefixState:
        """The queries as one right-padded batch."""
        keys = [_key(q) for q in queries]
        rows = {k: self._rows[k] for k in keys if k in self._rows}
        todo = list({k: q for k, q in zip(keys, queries, strict=True) if k not in rows}.items())
        for start in range(0, len(todo), self.batch):
            part = todo[start : start + self.batch]
            for (key, _), row in zip(part, self._compute([q for _, q in part]), strict=True):
                rows[key] = row
                self._keep(key, row)
        state = self._collate([rows[k] for k in keys])
        return replace(state, prompts=tuple(q.prompt for q in queries))

    def _compute(self, queries: list[Query]) -> list[_Row]:
        state = self.backbone.prefix(encode_queries(self.backbone, queries), self.first)
        lengths = state.attention_mask.sum(1).tolist()
        self.computed += len(queries)
        return [
            _Row(state.hidden[i, :n].clone(), state.labels[i, :n].clone(), int(state.question_end[i]))
            for i, n in enumerate(lengths)
        ]

    def _keep(self, key: Any, row: _Row) -> None:
        self._rows[key] = row
        self._bytes += row.nbytes
        while self._bytes > self.max_bytes and len(self._rows) > 1:
            _, old = self._rows.popitem(last=False)
            self._bytes -= old.nbytes

    def _collate(self, rows: list[_Row]) -> PrefixState:
        width = max(len(r.labels) for r in rows)
        hidden = rows[0].hidden.new_zeros(len(rows), width, rows[0].hidden.shape[-1])
        labels = rows[0].labels.new_full((len(rows), width), IGNORED)
        mask = torch.zeros_like(labels)
        for i, row in enumerate(rows):
            hidden[i, : len(row.labels)] = row.hidden
            labels[i, : len(row.labels)] = row.labels
            mask[i, : len(row.labels)] = 1
        ends = torch.tensor([r.question_end for r in rows], device=hidden.device)
        return PrefixState(hidden, mask, labels, ends, self.first, self.backbone.layer_inputs(mask))


def _key(query: Query) -> Any:
    image = None if query.image is None else content_key(query.image)
    return image, query.prompt, query.target
