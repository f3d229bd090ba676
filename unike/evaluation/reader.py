"""A case's probes evaluated on a backbone, before an edit and under it.

Each in two evaluation modes, never mixed: ``teacher_forced`` and ``generated``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from unike.backbones.base import IGNORED, Backbone, Batch, PrefixState, encode_queries
from unike.backbones.guard import Guard
from unike.backbones.prefix import PrefixCache
from unike.edits import Edit, EditBatch
from unike.evaluation.likelihoods import measure_likelihoods
from unike.evaluation.metrics import RANKS, Prediction, needs_ranks
from unike.evaluation.record import Change
from unike.types import Case, Query

V = TypeVar("V")


# What an edit decided for each of several queries, as ``Edit.explain`` gives it.
QueryDecisions = Mapping[str, list[Any]]


@dataclass(frozen=True)
class CasePredictions:
    """A case's predictions under an edit, one per probe, with what the edit decided for each of them:
    ``decisions`` are numbers by name, ``retrieved`` the nearest items with their similarity."""

    predictions: tuple[Prediction, ...]
    decisions: Mapping[str, Sequence[float]]
    retrieved: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class _Forced:
    """One query under teacher forcing: its target's ids, the argmax at each, and what decoding greedily from
    the prompt would have ``written`` where that is the target, or the beginning of it that is as long as
    answers may be; ``best`` and ``ranked`` as in ``Prediction``."""

    target_ids: tuple[int, ...]
    predicted_ids: tuple[int, ...]
    written: str | None
    best: np.ndarray | None = None
    ranked: np.ndarray | None = None


class Reader:
    """Evaluates a case's probes on a backbone, unedited or under an edit.

    Greedy decoding is verified rather than run where it can be: if every target token is predicted
    and the answer ends after it, decoding would have written the target; if it is longer than answers may be,
    its beginning. Under an edit the base
    model's own answers serve as further drafts. Only what no draft explains is decoded token by token.

    One forward pass serves all ``presets`` of the metrics: no logits are kept, only the tokens that
    lead at each position.
    """

    def __init__(
        self,
        backbone: Backbone,
        prefixes: PrefixCache,
        generated: bool = True,
        presets: Sequence[str] = ("paper",),
        likelihoods: bool = False,
    ) -> None:
        self.backbone, self.prefixes, self.generated = backbone, prefixes, generated
        self.presets = tuple(presets)
        self.likelihoods = likelihoods
        self.decoded = 0
        self._ranks = needs_ranks(self.presets)
        self._base: dict[tuple[str, ...], tuple[Prediction, ...]] = {}
        self._guard = Guard.of(backbone)
        self._epoch = self._guard.epoch

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Inside the block the backbone is the base model, of whose former weights nothing is kept."""
        with self._guard.bare():
            if self._epoch != self._guard.epoch:
                self._epoch = self._guard.epoch
                self._base.clear()
            yield

    def predict_base(self, case: Case) -> tuple[Prediction, ...]:
        """Predictions of the untouched model, kept by the case's id and its probes."""
        key = _name_case(case)
        with self._bare():
            if key not in self._base:
                self.cache_base([case])
            return self._base[key]

    def cache_base(self, cases: Sequence[Case]) -> None:
        """Evaluates the untouched model on those cases whose predictions are not kept yet, as many at a
        time as a forward pass takes."""
        with self._bare():
            left = {_name_case(c): c for c in cases if _name_case(c) not in self._base}
            for some in self._split(list(left.values())):
                queries = [p.query for case in some for p in case.probes]
                predictions, _ = self._predict(queries, [None] * len(queries), None, self.generated)
                for case, own in zip(some, _share_out(some, predictions), strict=True):
                    self._base[_name_case(case)] = tuple(own)

    def share_base(self, other: Reader) -> bool:
        """From now on both keep the untouched model's predictions together. False, and nothing is shared,
        where the other one predicts less, or where last bits would differ that must not."""
        mine, theirs = self.prefixes, other.prefixes
        alike = mine.alone == theirs.alone and (mine.first == theirs.first or not mine.alone)
        enough = other._ranks >= self._ranks and other.generated == self.generated
        if other.backbone is not self.backbone or not (alike and enough):
            return False
        self._base = other._base
        return True

    def predict_edited(self, case: Case, edit: Edit, base: Sequence[Prediction]) -> CasePredictions:
        """Predictions with ``edit`` applied."""
        (found,) = self._predict_under([case], edit, [p.generated or None for p in base], self.generated)
        return found

    def predict_all(
        self, cases: Sequence[Case], edit: Edit, generated: bool | None = None
    ) -> Iterator[tuple[Case, CasePredictions]]:
        """Each case with its predictions under ``edit``, as many cases in a forward pass as the prefix
        cache takes queries; ``generated`` may leave out that evaluation mode."""
        generated = self.generated if generated is None else generated
        self.cache_base(cases)
        for some in self._split(cases):
            drafts = [p.generated or None for case in some for p in self.predict_base(case)]
            yield from zip(some, self._predict_under(some, edit, drafts, generated), strict=True)

    def predict_each(self, cases: Sequence[Case], edits: Sequence[Edit]) -> list[CasePredictions]:
        """Each case under the edit of its own, batched where the edits can be."""
        out: list[CasePredictions] = []
        self.cache_base(cases)
        for some in self._split(cases):
            own = edits[len(out) : len(out) + len(some)]
            drafts = [[p.generated or None for p in self.predict_base(case)] for case in some]
            together = None
            if len(some) > 1 and not any(e.changes_prefix(self.backbone, self.prefixes.first) for e in own):
                together = own[0].batch(own)
            if together is None:
                for case, edit, draft in zip(some, own, drafts, strict=True):
                    out += self._predict_under([case], edit, draft, self.generated)
            else:
                flat = [d for draft in drafts for d in draft]
                out += self._predict_together(some, own, together, flat)
        return out

    def measure_numbers(self, case: Case, edit: Edit) -> dict[str, dict[str, Change]]:
        """The case's margins and divergences under ``edit``, by name and probe; none where they are not
        asked for. Each case by itself: its numbers are the same whatever is evaluated with it."""
        if not self.likelihoods:
            return {}
        with self._bare():
            return measure_likelihoods(self.backbone, self.prefixes, case, edit)

    def _split(self, cases: Sequence[Case]) -> Iterator[list[Case]]:
        """The cases by forward pass: one each where states must not depend on their batch, else as many
        as the prefix cache takes queries."""
        some: list[Case] = []
        for case in cases:
            full = self.prefixes.alone or sum(len(c.probes) for c in [*some, case]) > self.prefixes.batch
            if some and full:
                yield some
                some = []
            some.append(case)
        if some:
            yield some

    def _predict_together(
        self, cases: Sequence[Case], edits: Sequence[Edit], together: EditBatch, drafts: Sequence[str | None]
    ) -> list[CasePredictions]:
        owner = [i for i, case in enumerate(cases) for _ in case.probes]
        rewritten = (
            edit.rewrite_all([p.query for p in case.probes]) for edit, case in zip(edits, cases, strict=True)
        )
        queries = [query for own in rewritten for query in own]
        self._fill(queries, drafts, self.generated)

        def under(rows: Sequence[int]) -> AbstractContextManager[None]:
            owners = torch.tensor([owner[i] for i in rows], device=self.backbone.device)
            return together.applied(self.backbone, owners)

        with self._bare():
            predictions, explained = self._predict(queries, drafts, together, self.generated, under=under)
        return _group_by_case(cases, predictions, explained)

    def _fill(self, queries: Sequence[Query], drafts: Sequence[str | None], generated: bool) -> None:
        """Prefixes are the base model's: they are filled before an edit is applied."""
        self.prefixes.state(queries)
        if generated and (drafted := _pair_drafts(queries, drafts)):
            self.prefixes.state([q for q, _ in drafted])

    def _predict_under(
        self, cases: Sequence[Case], edit: Edit, drafts: Sequence[str | None], generated: bool
    ) -> list[CasePredictions]:
        queries = edit.rewrite_all([p.query for case in cases for p in case.probes])
        whole = edit.changes_prefix(self.backbone, self.prefixes.first)
        if not whole:
            self._fill(queries, drafts, generated)
        with self._bare(), edit.applied(self.backbone):
            predictions, explained = self._predict(queries, drafts, edit, generated, whole)
        return _group_by_case(cases, predictions, explained)

    def _forward(self, queries: Sequence[Query], ranked: int, whole: bool) -> list[_Forced]:
        """All queries; the first ``ranked`` of them with the tokens that lead at each position."""
        given: Batch | PrefixState
        head = self.backbone.layout.head
        if whole:
            given = encode_queries(self.backbone, queries)
            logits = self.backbone(given).logits
            at = _find_answers(given.labels)
            best = logits[at].argmax(-1)
        else:
            given = self.prefixes.state(queries)
            hidden = self.backbone.suffix_hidden(given)
            at = _find_answers(given.labels)
            # The head is a third of the work: without ranks it runs at few positions.
            logits = head(hidden[:ranked])
            best = head(hidden[at]).argmax(-1)
        masks = given.attention_mask.bool()
        leading = [find_leaders(logits[i, masks[i]]) for i in range(ranked)]
        tokens = [row.tolist() for row in best.split(at.sum(1).tolist())]
        return _judge(self.backbone, tokens, given.labels, leading)

    @torch.no_grad()
    def _predict(
        self,
        queries: Sequence[Query],
        drafts: Sequence[str | None],
        edit: Edit | EditBatch | None,
        generated: bool,
        whole: bool = False,
        under: Callable[[Sequence[int]], AbstractContextManager[None]] = lambda rows: nullcontext(),
    ) -> tuple[tuple[Prediction, ...], QueryDecisions]:
        """``whole`` runs the whole model, where the cached lower-layer activations don't apply; ``under``
        applies the edits of the given queries for a forward pass over them."""
        extra = _pair_drafts(queries, drafts) if generated else []
        drafted = [*queries, *(q for q, _ in extra)]
        ranked = len(queries) if self._ranks else 0
        with under([*range(len(queries)), *(i for _, i in extra)]):
            forced = self._forward(drafted, ranked, whole)
        # Taken before anything is decoded: it is about the last forward pass.
        explained = {} if edit is None else edit.explain()
        written: dict[int, str] = {}
        for i, f in enumerate(forced[: len(queries)]):
            if f.written is not None:
                written[i] = f.written
        for (_, i), f in zip(extra, forced[len(queries) :], strict=True):
            if f.written is not None:
                written.setdefault(i, f.written)
        if generated:
            left = [i for i in range(len(queries)) if i not in written]
            self.decoded += len(left)
            if left:
                with under(left):
                    texts = self.backbone.generate(
                        [queries[i].image for i in left], [queries[i].prompt for i in left]
                    )
                written.update(zip(left, texts, strict=True))
        predictions = (
            Prediction(
                f.target_ids,
                f.predicted_ids,
                written.get(i) if generated else None,
                edited=edit is not None,
                best=f.best,
                ranked=f.ranked,
            )
            for i, f in enumerate(forced[: len(queries)])
        )
        return tuple(predictions), explained


def _pair_drafts(queries: Sequence[Query], drafts: Sequence[str | None]) -> list[tuple[Query, int]]:
    """Queries with a draft answer in place of the target, where the two differ."""
    return [
        (replace(q, target=d), i)
        for i, (q, d) in enumerate(zip(queries, drafts, strict=True))
        if d is not None and d != str(q.target).strip()
    ]


def _name_case(case: Case) -> tuple[str, ...]:
    """The case and the names of its probes: of readers that share predictions, one may ask a case more."""
    return (f"{case.task}:{case.request.id}", *(probe.name for probe in case.probes))


def _share_out(cases: Sequence[Case], values: Sequence[V]) -> list[Sequence[V]]:
    """One value per probe of all cases, by case."""
    out, start = [], 0
    for case in cases:
        out.append(values[start : start + len(case.probes)])
        start += len(case.probes)
    return out


def _group_by_case(
    cases: Sequence[Case], predictions: Sequence[Prediction], explained: QueryDecisions
) -> list[CasePredictions]:
    count = len(predictions)
    decided = {what: values[:count] for what, values in explained.items() if what != "retrieved"}
    decisions = {what: _share_out(cases, values) for what, values in decided.items()}
    items = explained["retrieved"][:count] if "retrieved" in explained else [{}] * count
    return [
        CasePredictions(tuple(own), {what: values[i] for what, values in decisions.items()}, near)
        for i, (own, near) in enumerate(
            zip(_share_out(cases, predictions), _share_out(cases, items), strict=True)
        )
    ]


def _judge(
    backbone: Backbone,
    best: Sequence[Sequence[int]],
    labels: torch.Tensor,
    leading: Sequence[tuple[np.ndarray, np.ndarray]],
) -> list[_Forced]:
    """``best``: of each row the most probable token at every answer position and after the answer."""
    out = []
    for i, tokens in enumerate(best):
        target = tuple(labels[i, labels[i] != IGNORED].tolist())
        predicted = tuple(tokens[: len(target)])
        best_here, ranked = leading[i] if i < len(leading) else (None, None)
        written = _find_written(backbone, target, tokens)
        out.append(_Forced(target, predicted, written, best_here, ranked))
    return out


def _find_written(backbone: Backbone, target: Sequence[int], tokens: Sequence[int]) -> str | None:
    """What decoding greedily would write: the target, up to the most tokens of an answer. None where it would
    leave the target, by the most probable ``tokens`` at the target's positions and after them."""
    ended = next((i for i, token in enumerate(target) if token in backbone.eos_ids), len(target))
    # Of as many tokens as an answer may have nothing follows; neither does after an end token.
    last = min(ended + 1, backbone.max_new_tokens)
    if last <= len(target):
        return backbone.decode(target[:last]) if tuple(tokens[:last]) == tuple(target[:last]) else None
    whole = tuple(tokens[:-1]) == tuple(target) and backbone.ends_answer(tokens[-1])
    return backbone.decode(target) if whole else None


def _find_answers(labels: torch.Tensor) -> torch.Tensor:
    """``(b, s)``, true where a logit predicts an answer token or what follows the answer."""
    answer = labels != IGNORED
    before = torch.zeros_like(answer)
    before[:, :-1] = answer[:, 1:]
    return answer | before


def find_leaders(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The most probable token at each position of ``logits (s, v)``, ``(s)``, and the ``RANKS`` most
    probable ones, ``(s, RANKS)``, as the presets' owners take them: topk of the softmax in float32."""
    probable = torch.softmax(logits.float(), dim=-1)
    top = probable.topk(min(RANKS, logits.shape[-1]), dim=-1).indices
    best = probable.topk(1, dim=-1).indices[:, 0]
    return best.to(torch.int32).cpu().numpy(), top.to(torch.int32).cpu().numpy()
