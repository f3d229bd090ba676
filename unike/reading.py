"""Reading a backbone: a case's probes asked before an edit and under it.

Each reading is taken in two ways, never mixed: ``teacher_forced`` and ``generated``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from unike.backbones.base import IGNORED, Backbone, Batch, PrefixState, encode_queries
from unike.backbones.prefix import PrefixCache
from unike.edits import Edit
from unike.metrics import RANKS, Reading, needs_ranks
from unike.types import Case, Query


@dataclass(frozen=True)
class Asked:
    """A case's readings under an edit, with what the edit decided for each probe, see ``Edit.explain``."""

    readings: tuple[Reading, ...]
    decisions: Mapping[str, list[float]]


@dataclass(frozen=True)
class _Forced:
    """One query under teacher forcing: its target's ids, the argmax at each, and whether decoding
    greedily from the prompt would have written exactly the target; ``best`` and ``ranked`` as in
    ``Reading``."""

    target_ids: tuple[int, ...]
    predicted_ids: tuple[int, ...]
    written: bool
    best: Any = None
    ranked: Any = None


class Reader:
    """Asks a backbone a case's probes, as it is at the moment.

    Greedy decoding is verified rather than run where it can be: if every target token is predicted
    and the answer ends behind it, decoding would have written the target. Under an edit the base's
    own answers serve as further drafts. Only what no draft explains is decoded token by token.

    One forward pass serves all ``presets`` of the metrics: no logits are kept, only the tokens that
    lead at each position.
    """

    def __init__(
        self,
        backbone: Backbone,
        prefixes: PrefixCache,
        generated: bool = True,
        presets: Sequence[str] = ("paper",),
    ) -> None:
        self.backbone, self.prefixes, self.generated = backbone, prefixes, generated
        self.presets = tuple(presets)
        self.decoded = 0
        # What the last edit decided for each probe, see ``Edit.explain``.
        self.explained: Mapping[str, list[float]] = {}
        self._ranks = needs_ranks(self.presets)
        self._base: dict[str, tuple[Reading, ...]] = {}

    def base(self, case: Case) -> tuple[Reading, ...]:
        """Readings of the untouched model, kept by the case's id."""
        key = f"{case.task}:{case.request.id}"
        if key not in self._base:
            queries = [p.query for p in case.probes]
            self._base[key], _ = self._read(queries, [None] * len(queries), None, self.generated)
        return self._base[key]

    def edited(self, case: Case, edit: Edit, base: Sequence[Reading]) -> tuple[Reading, ...]:
        """Readings with ``edit`` applied."""
        (asked,) = self._ask([case], edit, [r.generated or None for r in base], self.generated)
        self.explained = asked.decisions
        return asked.readings

    def edited_all(
        self, cases: Sequence[Case], edit: Edit, generated: bool | None = None
    ) -> Iterator[tuple[Case, Asked]]:
        """Each case with its readings under ``edit``, as many cases in a forward pass as the prefix
        cache takes queries; ``generated`` may leave out the second way of reading."""
        generated = self.generated if generated is None else generated
        start = 0
        while start < len(cases):
            stop, size = start + 1, len(cases[start].probes)
            while stop < len(cases) and size + len(cases[stop].probes) <= self.prefixes.batch:
                size += len(cases[stop].probes)
                stop += 1
            some = cases[start:stop]
            drafts = [r.generated or None for case in some for r in self.base(case)]
            yield from zip(some, self._ask(some, edit, drafts, generated), strict=True)
            start = stop

    def _ask(
        self, cases: Sequence[Case], edit: Edit, drafts: Sequence[str | None], generated: bool
    ) -> list[Asked]:
        queries = [edit.rewrite(p.query) for case in cases for p in case.probes]
        whole = edit.changes_prefix(self.backbone, self.prefixes.first)
        if not whole:
            # Prefixes are the base model's: they are filled before the edit is applied.
            self.prefixes.state(queries)
            if generated:
                self.prefixes.state([q for q, _ in _drafted(queries, drafts)])
        with edit.applied(self.backbone):
            readings, explained = self._read(queries, drafts, edit, generated, whole)
        out, start = [], 0
        for case in cases:
            at = slice(start, start + len(case.probes))
            out.append(Asked(readings[at], {what: values[at] for what, values in explained.items()}))
            start = at.stop
        return out

    @torch.no_grad()
    def _read(
        self,
        queries: Sequence[Query],
        drafts: Sequence[str | None],
        edit: Edit | None,
        generated: bool,
        whole: bool = False,
    ) -> tuple[tuple[Reading, ...], dict[str, list[float]]]:
        """``whole`` runs the whole model, where the prefix states that are kept don't hold."""
        extra = _drafted(queries, drafts) if generated else []
        asked = [*queries, *(q for q, _ in extra)]
        ranked = len(queries) if self._ranks else 0
        if whole:
            batch = encode_queries(self.backbone, asked)
            forced = _forced(self.backbone, self.backbone(batch).logits, batch, ranked)
        else:
            state = self.prefixes.state(asked)
            forced = _forced(self.backbone, self.backbone.suffix(state), state, ranked)
        # Looked at before anything is decoded: it is about the last forward pass.
        explained = {} if edit is None else edit.explain()
        written: dict[int, str] = {}
        for i, f in enumerate(forced[: len(queries)]):
            if f.written:
                written[i] = self.backbone.decode(f.target_ids)
        for (_, i), f in zip(extra, forced[len(queries) :], strict=True):
            if f.written:
                written.setdefault(i, self.backbone.decode(f.target_ids))
        if generated:
            left = [i for i in range(len(queries)) if i not in written]
            self.decoded += len(left)
            if left:
                texts = self.backbone.generate(
                    [queries[i].image for i in left], [queries[i].prompt for i in left]
                )
                written.update(zip(left, texts, strict=True))
        readings = (
            Reading(
                f.target_ids,
                f.predicted_ids,
                written.get(i) if generated else None,
                edited=edit is not None,
                best=f.best,
                ranked=f.ranked,
            )
            for i, f in enumerate(forced[: len(queries)])
        )
        return tuple(readings), explained


def _drafted(queries: Sequence[Query], drafts: Sequence[str | None]) -> list[tuple[Query, int]]:
    """Queries with a draft answer in place of the target, where the two differ."""
    return [
        (replace(q, target=d), i)
        for i, (q, d) in enumerate(zip(queries, drafts, strict=True))
        if d is not None and d != str(q.target).strip()
    ]


def _forced(
    backbone: Backbone, logits: torch.Tensor, asked: Batch | PrefixState, ranked: int = 0
) -> list[_Forced]:
    """All rows; the first ``ranked`` of them with the tokens that lead at each position."""
    best = logits.argmax(-1)
    out = []
    for i in range(len(asked)):
        at = (asked.labels[i] != IGNORED).nonzero().flatten()
        target = tuple(asked.labels[i, at].tolist())
        predicted = tuple(best[i, at - 1].tolist())
        ends = backbone.ends_answer(int(best[i, at[-1]]))
        leading: tuple[Any, Any] = (None, None)
        if i < ranked:
            leading = leaders(logits[i, asked.attention_mask[i].bool()])
        out.append(_Forced(target, predicted, predicted == target and ends, *leading))
    return out


def leaders(logits: torch.Tensor) -> tuple[Any, Any]:
    """The most probable token at each position of ``logits (s, v)``, ``(s)``, and the ``RANKS`` most
    probable ones, ``(s, RANKS)``, as the presets' owners take them: topk of the softmax in float32."""
    probable = torch.softmax(logits.float(), dim=-1)
    top = probable.topk(min(RANKS, logits.shape[-1]), dim=-1).indices
    best = probable.topk(1, dim=-1).indices[:, 0]
    return best.to(torch.int32).cpu().numpy(), top.to(torch.int32).cpu().numpy()
