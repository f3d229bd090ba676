"""Reading a backbone: a case's probes asked before an edit and under it.

Each reading is taken in two ways, never mixed: ``teacher_forced`` and ``generated``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from unike.backbones.base import IGNORED, Backbone, Batch, PrefixState, encode_queries
from unike.backbones.prefix import PrefixCache
from unike.edits import Edit, EditBatch
from unike.evaluation.metrics import RANKS, Reading, needs_ranks
from unike.types import Case, Query

V = TypeVar("V")


@dataclass(frozen=True)
class Asked:
    """A case's readings under an edit, with what the edit decided for each probe, see ``Edit.explain``."""

    readings: tuple[Reading, ...]
    decisions: Mapping[str, list[Any]]


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
        self.explained: Mapping[str, list[Any]] = {}
        self._ranks = needs_ranks(self.presets)
        self._base: dict[str, tuple[Reading, ...]] = {}

    def base(self, case: Case) -> tuple[Reading, ...]:
        """Readings of the untouched model, kept by the case's id."""
        key = _name(case)
        if key not in self._base:
            self.learn_base([case])
        return self._base[key]

    def learn_base(self, cases: Sequence[Case]) -> None:
        """Reads the untouched model on those cases that it has not been read on, as many at a time as
        a forward pass takes."""
        left = {_name(c): c for c in cases if _name(c) not in self._base}
        for some in self._passes(list(left.values())):
            queries = [p.query for case in some for p in case.probes]
            readings, _ = self._read(queries, [None] * len(queries), None, self.generated)
            for case, own in zip(some, _shared_out(some, readings), strict=True):
                self._base[_name(case)] = tuple(own)

    def learn_from(self, other: Reader) -> bool:
        """From now on both know what either reads of the untouched model. False, and nothing is shared,
        where the other one reads less, or where last bits would tell them apart that must not differ."""
        mine, theirs = self.prefixes, other.prefixes
        alike = mine.alone == theirs.alone and (mine.first == theirs.first or not mine.alone)
        enough = other._ranks >= self._ranks and other.generated == self.generated
        if other.backbone is not self.backbone or not (alike and enough):
            return False
        self._base = other._base
        return True

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
        self.learn_base(cases)
        for some in self._passes(cases):
            drafts = [r.generated or None for case in some for r in self.base(case)]
            yield from zip(some, self._ask(some, edit, drafts, generated), strict=True)

    def edited_each(self, cases: Sequence[Case], edits: Sequence[Edit]) -> list[Asked]:
        """Each case under the edit of its own, side by side where the edits can be."""
        out: list[Asked] = []
        self.learn_base(cases)
        for some in self._passes(cases):
            own = edits[len(out) : len(out) + len(some)]
            drafts = [[r.generated or None for r in self.base(case)] for case in some]
            together = None
            if len(some) > 1 and not any(e.changes_prefix(self.backbone, self.prefixes.first) for e in own):
                together = own[0].batch(own)
            if together is None:
                for case, edit, draft in zip(some, own, drafts, strict=True):
                    out += self._ask([case], edit, draft, self.generated)
            else:
                flat = [d for draft in drafts for d in draft]
                out += self._ask_each(some, own, together, flat)
        return out

    def _passes(self, cases: Sequence[Case]) -> Iterator[list[Case]]:
        """The cases, one by one where states don't depend on batches either, else as many at a time as
        the prefix cache takes queries."""
        some: list[Case] = []
        for case in cases:
            full = self.prefixes.alone or sum(len(c.probes) for c in [*some, case]) > self.prefixes.batch
            if some and full:
                yield some
                some = []
            some.append(case)
        if some:
            yield some

    def _ask_each(
        self, cases: Sequence[Case], edits: Sequence[Edit], together: EditBatch, drafts: Sequence[str | None]
    ) -> list[Asked]:
        owner = [i for i, case in enumerate(cases) for _ in case.probes]
        probes = [p.query for case in cases for p in case.probes]
        queries = [edits[i].rewrite(q) for i, q in zip(owner, probes, strict=True)]
        self._fill(queries, drafts, self.generated)

        def under(rows: Sequence[int]) -> AbstractContextManager[None]:
            owners = torch.tensor([owner[i] for i in rows], device=self.backbone.device)
            return together.applied(self.backbone, owners)

        readings, explained = self._read(queries, drafts, together, self.generated, under=under)
        return _asked(cases, readings, explained)

    def _fill(self, queries: Sequence[Query], drafts: Sequence[str | None], generated: bool) -> None:
        """Prefixes are the base model's: they are filled before an edit is applied."""
        self.prefixes.state(queries)
        if generated and (drafted := _drafted(queries, drafts)):
            self.prefixes.state([q for q, _ in drafted])

    def _ask(
        self, cases: Sequence[Case], edit: Edit, drafts: Sequence[str | None], generated: bool
    ) -> list[Asked]:
        queries = [edit.rewrite(p.query) for case in cases for p in case.probes]
        whole = edit.changes_prefix(self.backbone, self.prefixes.first)
        if not whole:
            self._fill(queries, drafts, generated)
        with edit.applied(self.backbone):
            readings, explained = self._read(queries, drafts, edit, generated, whole)
        return _asked(cases, readings, explained)

    def _forward(self, asked: Sequence[Query], ranked: int, whole: bool) -> list[_Forced]:
        """All queries; the first ``ranked`` of them with the tokens that lead at each position."""
        given: Batch | PrefixState
        head = self.backbone.layout.head
        if whole:
            given = encode_queries(self.backbone, asked)
            logits = self.backbone(given).logits
            at = _places(given.labels)
            best = logits[at].argmax(-1)
        else:
            given = self.prefixes.state(asked)
            hidden = self.backbone.suffix_hidden(given)
            at = _places(given.labels)
            # The head is a third of the work: without ranks it is asked for few positions.
            logits = head(hidden[:ranked])
            best = head(hidden[at]).argmax(-1)
        masks = given.attention_mask.bool()
        leading = [leaders(logits[i, masks[i]]) for i in range(ranked)]
        tokens = [row.tolist() for row in best.split(at.sum(1).tolist())]
        return _judged(self.backbone, tokens, given.labels, leading)

    @torch.no_grad()
    def _read(
        self,
        queries: Sequence[Query],
        drafts: Sequence[str | None],
        edit: Edit | EditBatch | None,
        generated: bool,
        whole: bool = False,
        under: Callable[[Sequence[int]], AbstractContextManager[None]] = lambda rows: nullcontext(),
    ) -> tuple[tuple[Reading, ...], dict[str, list[Any]]]:
        """``whole`` runs the whole model, where the prefix states that are kept don't hold; ``under``
        applies the edits of the given queries for a forward pass over them."""
        extra = _drafted(queries, drafts) if generated else []
        asked = [*queries, *(q for q, _ in extra)]
        ranked = len(queries) if self._ranks else 0
        with under([*range(len(queries)), *(i for _, i in extra)]):
            forced = self._forward(asked, ranked, whole)
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
                with under(left):
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


def _name(case: Case) -> str:
    return f"{case.task}:{case.request.id}"


def _shared_out(cases: Sequence[Case], values: Sequence[V]) -> list[Sequence[V]]:
    """One value per probe of all cases, by case."""
    out, start = [], 0
    for case in cases:
        out.append(values[start : start + len(case.probes)])
        start += len(case.probes)
    return out


def _asked(
    cases: Sequence[Case], readings: Sequence[Reading], explained: Mapping[str, list[Any]]
) -> list[Asked]:
    decisions = {what: _shared_out(cases, values[: len(readings)]) for what, values in explained.items()}
    return [
        Asked(tuple(own), {what: list(values[i]) for what, values in decisions.items()})
        for i, own in enumerate(_shared_out(cases, readings))
    ]


def _judged(
    backbone: Backbone,
    best: Sequence[Sequence[int]],
    labels: torch.Tensor,
    leading: Sequence[tuple[Any, Any]],
) -> list[_Forced]:
    """``best``: of each row the most probable token at every answer position and behind the answer."""
    out = []
    for i, tokens in enumerate(best):
        target = tuple(labels[i, labels[i] != IGNORED].tolist())
        predicted = tuple(tokens[: len(target)])
        written = predicted == target and backbone.ends_answer(tokens[-1])
        out.append(_Forced(target, predicted, written, *(leading[i] if i < len(leading) else (None, None))))
    return out


def _places(labels: torch.Tensor) -> torch.Tensor:
    """``(b, s)``, true where a logit predicts an answer token or what follows the answer."""
    answer = labels != IGNORED
    before = torch.zeros_like(answer)
    before[:, :-1] = answer[:, 1:]
    return answer | before


def leaders(logits: torch.Tensor) -> tuple[Any, Any]:
    """The most probable token at each position of ``logits (s, v)``, ``(s)``, and the ``RANKS`` most
    probable ones, ``(s, RANKS)``, as the presets' owners take them: topk of the softmax in float32."""
    probable = torch.softmax(logits.float(), dim=-1)
    top = probable.topk(min(RANKS, logits.shape[-1]), dim=-1).indices
    best = probable.topk(1, dim=-1).indices[:, 0]
    return best.to(torch.int32).cpu().numpy(), top.to(torch.int32).cpu().numpy()
