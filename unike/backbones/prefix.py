"""Cached lower-layer activations: what lies below the edited layers is computed once for each query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from unike.backbones.base import IGNORED, Backbone, PrefixState, encode_queries
from unike.backbones.guard import Guard
from unike.backbones.images import content_key
from unike.backbones.store import RowStore, row_key
from unike.config.sections import PrefixOptions
from unike.system.cache import BoundedCache
from unike.types import Query

GB = 10**9
# Image, prompt, target and, where it has one, the answer's end.
QueryKey = tuple[str | None, ...]


@dataclass(frozen=True)
class _CachedRow:
    hidden: torch.Tensor
    labels: torch.Tensor
    question_end: int
    positions: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        own = {"hidden": self.hidden, "labels": self.labels, "end": torch.tensor(self.question_end)}
        return own if self.positions is None else own | {"positions": self.positions}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], device: torch.device) -> _CachedRow:
        """The row whose ``tensors`` these are, on ``device``."""
        there = {name: tensor.to(device) for name, tensor in tensors.items() if name != "end"}
        return cls(question_end=int(tensors["end"]), **there)


class PrefixCache:
    """Hidden states at the input of layer ``first``, by query.

    They stay in memory up to ``max_bytes``, those that were not asked for longest go first; with a ``store``
    every computed state is on disk too, and comes back from there bit for bit. ``computed`` and ``loaded``
    count queries.

    In a batch the last bits of a state depend on what else is in the batch. With ``alone`` every query is
    computed by itself: its state depends on the query only.

    The states are the base model's: what is applied is taken off while they are computed. Where the weights
    have been changed they are computed anew, and where somebody's hook is below layer ``first`` each time.
    """

    def __init__(
        self,
        backbone: Backbone,
        first: int,
        max_bytes: int = 2 << 30,
        batch: int = 32,
        store: RowStore | None = None,
        alone: bool = False,
    ) -> None:
        self.backbone, self.first, self.batch = backbone, first, batch
        self.store, self.alone = store, alone
        self.computed = self.loaded = 0
        self._rows = BoundedCache[QueryKey, _CachedRow](max_bytes, lambda row: row.nbytes)
        self._epoch = Guard.of(backbone).epoch
        self._below = self._list_below()

    def __len__(self) -> int:
        return len(self._rows)

    def state(self, queries: Sequence[Query]) -> PrefixState:
        """The queries as one right-padded batch."""
        guard = Guard.of(self.backbone)
        with guard.hold():
            self._follow_weights(guard.epoch)
            return self._gather(queries, guard)

    def _follow_weights(self, epoch: int) -> None:
        """Forgets the states of other weights than the model has now."""
        if self._epoch == epoch:
            return
        self._rows.clear()
        if self.store is not None:
            self.store = self.store.move(self.backbone.identity)
        self._epoch, self._below = epoch, self._list_below()

    def _list_below(self) -> list[torch.nn.Module]:
        """All modules that a state may depend on: none of the edited layers."""
        layout = self.backbone.layout
        edited = (layout.layer(i).modules() for i in range(self.first, len(layout)))
        edited_ids = {id(module) for modules in edited for module in modules}
        return [m for m in self.backbone.model.modules() if id(m) not in edited_ids]

    def _gather(self, queries: Sequence[Query], guard: Guard) -> PrefixState:
        keys = [_make_key(q) for q in queries]
        rows = {k: row for k in keys if (row := self._rows.get(k)) is not None}
        rows.update(self._load([k for k in dict.fromkeys(keys) if k not in rows]))
        todo = list({k: q for k, q in zip(keys, queries, strict=True) if k not in rows}.items())
        for start in range(0, len(todo), self.batch):
            part = todo[start : start + self.batch]
            with guard.bare():
                plain = guard.watch.are_plain(self._below)
                new = dict(zip([k for k, _ in part], self._compute([q for _, q in part]), strict=True))
            rows.update(new)
            if not plain:
                continue
            if self.store is not None:
                self.store.put({row_key(k): row.tensors() for k, row in new.items()})
            for key, row in new.items():
                self._rows.put(key, row)
        state = self._collate([rows[k] for k in keys])
        return replace(
            state, prompts=tuple(q.prompt for q in queries), images=tuple(q.image for q in queries)
        )

    def _load(self, keys: Sequence[QueryKey]) -> dict[QueryKey, _CachedRow]:
        if self.store is None or not keys:
            return {}
        found, device, rows = self.store.get([row_key(k) for k in keys]), self.backbone.device, {}
        for key in keys:
            if (kept := found.get(row_key(key))) is not None:
                rows[key] = _CachedRow.of(kept, device)
                self._rows.put(key, rows[key])
        self.loaded += len(rows)
        return rows

    def _compute(self, queries: list[Query]) -> list[_CachedRow]:
        if self.alone and len(queries) > 1:
            return [row for query in queries for row in self._compute([query])]
        state = self.backbone.prefix(encode_queries(self.backbone, queries), self.first)
        lengths = state.attention_mask.sum(1).tolist()
        self.computed += len(queries)
        return [
            _CachedRow(
                state.hidden[i, :n].clone(),
                state.labels[i, :n].clone(),
                int(state.question_end[i]),
                None if state.positions is None else state.positions[i, :, :n].clone(),
            )
            for i, n in enumerate(lengths)
        ]

    def _collate(self, rows: list[_CachedRow]) -> PrefixState:
        width = max(len(r.labels) for r in rows)
        hidden = rows[0].hidden.new_zeros(len(rows), width, rows[0].hidden.shape[-1])
        labels = rows[0].labels.new_full((len(rows), width), IGNORED)
        mask = torch.zeros_like(labels)
        placed = rows[0].positions is not None
        positions = labels.new_zeros(len(rows), 3, width) if placed else None
        for i, row in enumerate(rows):
            hidden[i, : len(row.labels)] = row.hidden
            labels[i, : len(row.labels)] = row.labels
            mask[i, : len(row.labels)] = 1
            if positions is not None and row.positions is not None:
                positions[i, :, : len(row.labels)] = row.positions
        ends = torch.tensor([r.question_end for r in rows], device=hidden.device)
        inputs = self.backbone.layer_inputs(mask, positions)
        return PrefixState(hidden, mask, labels, ends, self.first, inputs, positions=positions)


def open_prefixes(
    hparams: PrefixOptions,
    backbone: Backbone,
    first: int,
    batch: int | None = None,
    memory: bool = True,
    alone: bool | None = None,
) -> PrefixCache:
    """The cache that the YAML describes, for layer ``first``; vision features are kept with it.

    Runs, methods and sweeps of one backbone share the folder ``prefix_dir``. Without ``memory`` the
    states are kept on disk alone: for many queries that are asked once. ``alone``: whether each query is
    computed by itself; None: where ``batch_invariant`` is true.
    """
    store, features, sights = None, None, None
    alone = hparams.batch_invariant if alone is None else alone
    if hparams.prefix_dir is not None:
        limit = int(hparams.prefix_disk_gb * GB)
        # What was computed in batches is kept apart from what was computed query by query.
        how = "" if alone else "-batched"
        store = RowStore(hparams.prefix_dir, f"{backbone.identity}/layer-{first}{how}", limit)
        features = RowStore(hparams.prefix_dir, f"{backbone.identity}/pictures{how}", limit)
        sights = RowStore(hparams.prefix_dir, f"{backbone.identity}/sights{how}", limit)
    backbone.keep_features(features, alone, sights)
    kept = int(hparams.prefix_memory_gb * GB) if memory else 0
    return PrefixCache(backbone, first, kept, batch or hparams.eval_batch, store, alone)


class AnswerCache:
    """The unedited model's answers to queries, kept in a ``store``."""

    def __init__(self, store: RowStore, most: int) -> None:
        self._store, self._most = store, most

    @classmethod
    def open(cls, hparams: PrefixOptions, backbone: Backbone) -> AnswerCache | None:
        """The cache that the YAML describes; None without a ``prefix_dir``."""
        if hparams.prefix_dir is None:
            return None
        store = RowStore(hparams.prefix_dir, f"{backbone.identity}/answers", int(hparams.prefix_disk_gb * GB))
        return cls(store, backbone.max_new_tokens)

    def read(self, queries: Sequence[Query]) -> list[str | None]:
        """Their answers; None for those that are not kept."""
        keys = [self._name(query) for query in queries]
        rows = self._store.get(keys)
        return [bytes(rows[key]["text"].tolist()).decode() if key in rows else None for key in keys]

    def write(self, queries: Sequence[Query], answers: Sequence[str]) -> None:
        texts = (torch.tensor(list(answer.encode()), dtype=torch.uint8) for answer in answers)
        self._store.put({self._name(q): {"text": text} for q, text in zip(queries, texts, strict=True)})

    def _name(self, query: Query) -> str:
        return row_key((*_make_key(query)[:2], self._most))


def _make_key(query: Query) -> QueryKey:
    image = None if query.image is None else content_key(query.image)
    return image, query.prompt, query.target, *([] if query.end == "none" else [query.end])
