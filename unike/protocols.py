"""Protocols: what is edited, in which order, and what is asked before and after.

A case is read twice: once from the untouched base model (kept, since no edit changes it) and once
under the edit. Each reading is taken in two ways, never mixed: ``teacher_forced`` and ``generated``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from unike.backbones.base import IGNORED, Backbone, encode_queries
from unike.backbones.prefix import PrefixCache
from unike.edits import Edit
from unike.methods.base import EditMethod
from unike.metrics import Reading, base_score, base_score_generated, score, score_generated
from unike.types import Case, Query


@dataclass(frozen=True)
class _Forced:
    """One query under teacher forcing: its target's ids, the argmax at each, and whether decoding
    greedily from the prompt would have written exactly the target."""

    target_ids: tuple[int, ...]
    predicted_ids: tuple[int, ...]
    written: bool


class Reader:
    """Asks a backbone a case's probes, as it is at the moment.

    Greedy decoding is verified rather than run where it can be: if every target token is predicted
    and the answer ends behind it, decoding would have written the target. Under an edit the base's
    own answers serve as further drafts. Only what no draft explains is decoded token by token.
    """

    def __init__(self, backbone: Backbone, prefixes: PrefixCache, generated: bool = True) -> None:
        self.backbone, self.prefixes, self.generated = backbone, prefixes, generated
        self.decoded = 0
        # What the last edit decided for each probe, see ``Edit.explain``.
        self.explained: dict[str, list[float]] = {}
        self._base: dict[str, tuple[Reading, ...]] = {}

    def base(self, case: Case) -> tuple[Reading, ...]:
        """Readings of the untouched model, kept by the case's id."""
        key = f"{case.task}:{case.request.id}"
        if key not in self._base:
            queries = [p.query for p in case.probes]
            self._base[key] = self._read(queries, [None] * len(queries))
        return self._base[key]

    def edited(self, case: Case, edit: Edit, base: Sequence[Reading]) -> tuple[Reading, ...]:
        """Readings with ``edit`` applied."""
        queries = [edit.rewrite(p.query) for p in case.probes]
        drafts = [r.generated or None for r in base]
        if edit.changes_prefix(self.backbone, self.prefixes.first):
            with edit.applied(self.backbone):
                return self._read(queries, drafts, edit, whole=True)
        # Prefixes are the base model's: they are filled before the edit is applied.
        self.prefixes.state(queries)
        if self.generated:
            self.prefixes.state([q for q, _ in _drafted(queries, drafts)])
        with edit.applied(self.backbone):
            return self._read(queries, drafts, edit)

    @torch.no_grad()
    def _read(
        self,
        queries: Sequence[Query],
        drafts: Sequence[str | None],
        edit: Edit | None = None,
        whole: bool = False,
    ) -> tuple[Reading, ...]:
        """``whole`` runs the whole model, where the prefix states that are kept don't hold."""
        extra = _drafted(queries, drafts) if self.generated else []
        asked = [*queries, *(q for q, _ in extra)]
        if whole:
            batch = encode_queries(self.backbone, asked)
            forced = _forced(self.backbone, self.backbone(batch).logits, batch.labels)
        else:
            state = self.prefixes.state(asked)
            forced = _forced(self.backbone, self.backbone.suffix(state), state.labels)
        if edit is not None:
            self.explained = {k: v[: len(queries)] for k, v in edit.explain().items()}
        written: dict[int, str] = {}
        for i, f in enumerate(forced[: len(queries)]):
            if f.written:
                written[i] = self.backbone.decode(f.target_ids)
        for (_, i), f in zip(extra, forced[len(queries) :], strict=True):
            if f.written:
                written.setdefault(i, self.backbone.decode(f.target_ids))
        if self.generated:
            left = [i for i in range(len(queries)) if i not in written]
            self.decoded += len(left)
            if left:
                texts = self.backbone.generate(
                    [queries[i].image for i in left], [queries[i].prompt for i in left]
                )
                written.update(zip(left, texts, strict=True))
        return tuple(
            Reading(
                f.target_ids,
                f.predicted_ids,
                written.get(i) if self.generated else None,
                edited=edit is not None,
            )
            for i, f in enumerate(forced[: len(queries)])
        )


def _drafted(queries: Sequence[Query], drafts: Sequence[str | None]) -> list[tuple[Query, int]]:
    """Queries with a draft answer in place of the target, where the two differ."""
    return [
        (replace(q, target=d), i)
        for i, (q, d) in enumerate(zip(queries, drafts, strict=True))
        if d is not None and d != str(q.target).strip()
    ]


def _forced(backbone: Backbone, logits: torch.Tensor, labels: torch.Tensor) -> list[_Forced]:
    best = logits.argmax(-1)
    out = []
    for i in range(len(labels)):
        at = (labels[i] != IGNORED).nonzero().flatten()
        target = tuple(labels[i, at].tolist())
        predicted = tuple(best[i, at - 1].tolist())
        ends = backbone.ends_answer(int(best[i, at[-1]]))
        out.append(_Forced(target, predicted, predicted == target and ends))
    return out


def one_step(
    backbone: Backbone, method: EditMethod, case: Case, reader: Reader, history: Edit | None = None
) -> dict[str, Any]:
    """Edits one case from the base model, asks its probes, and gives the record of it.

    An edit whose loss stops being a number is recorded as failed; its probes are not asked.
    """
    before = reader.base(case)
    started = time.perf_counter()
    try:
        edit = method.edit(backbone, case.request, reader.prefixes, history)
    except FloatingPointError as error:
        return _record(case, "failed", time.perf_counter() - started, {"error": str(error)})
    seconds = time.perf_counter() - started
    after = reader.edited(case, edit if history is None else history | edit, before)
    record = _record(case, "ok", seconds, {**edit.info, "bytes": edit.nbytes})
    record["scores"] = _scores(case, before, after, reader.generated)
    names = [probe.name for probe in case.probes]
    record["decisions"] = {
        what: {name: round(v, 4) for name, v in zip(names, values, strict=True)}
        for what, values in reader.explained.items()
    }
    record["answers"] = {
        probe.name: {
            "prompt": probe.query.prompt,
            "target": probe.query.target,
            "before": b.generated if reader.generated else backbone.decode(b.predicted_ids),
            "after": a.generated if reader.generated else backbone.decode(a.predicted_ids),
        }
        for probe, b, a in zip(case.probes, before, after, strict=True)
    }
    return record


def _record(case: Case, status: str, seconds: float, info: dict[str, Any]) -> dict[str, Any]:
    return {"id": case.request.id, "task": case.task, "status": status, "seconds": round(seconds, 4), **info}


def _scores(
    case: Case, before: Sequence[Reading], after: Sequence[Reading], generated: bool
) -> dict[str, dict[str, dict[str, float]]]:
    forced, free = {}, {}
    for probe, b, a in zip(case.probes, before, after, strict=True):
        forced[probe.name] = {"before": base_score(probe, b), "after": score(probe, b, a)}
        if generated:
            free[probe.name] = {
                "before": base_score_generated(probe, b),
                "after": score_generated(probe, b, a),
            }
    return {"teacher_forced": forced, "generated": free} if generated else {"teacher_forced": forced}
