"""What routed edits decided for a prompt, as it is reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from unike.edits.activity import LayerRetrieval, Neurons, PromptStates, RetrievedItem
from unike.edits.base import Inspection
from unike.edits.shares import LayerKnowledge, Routing
from unike.knowledge.adapter import Shift, knowledge_weights
from unike.knowledge.memory import Retrieved
from unike.knowledge.patch import KeyValuePatch
from unike.types import KnowledgeItem

# Of what was retrieved, how many items are reported, and the name of an edit's own item.
REPORTED, OWN = 3, "own item"


def explained(
    trace: Mapping[int, Shift], scopes: torch.Tensor | None, name: Callable[[int], str]
) -> dict[str, list[Any]]:
    """See ``Edit.explain``; ``name`` gives a memory's item by its place."""
    scope = {} if scopes is None else {"scope": scopes.tolist()}
    decisions = [decision for _, decision in sorted(trace.items())]
    if not decisions or not decisions[0].retrieved.similarity.shape[1]:
        return scope
    alpha = torch.stack([d.alpha.float() for d in decisions]).mean(0)
    best = torch.stack([d.retrieved.similarity[:, 0].float() for d in decisions]).mean(0)
    told = _nearest(decisions[0].retrieved, name)
    return {"alpha": alpha.tolist(), "similarity": best.tolist(), "retrieved": told, **scope}


def _nearest(found: Retrieved, name: Callable[[int], str]) -> list[dict[str, float]]:
    """For each prompt its ``REPORTED`` nearest items that it may have."""
    allowed = torch.ones_like(found.index, dtype=torch.bool) if found.allowed is None else found.allowed
    out = []
    for row in zip(found.index, found.similarity, allowed, strict=True):
        items: dict[str, float] = {}
        for place, similarity, open_to in zip(*(t.tolist() for t in row), strict=True):
            if open_to and len(items) < REPORTED:
                # Several may have one name: the nearest one speaks.
                items.setdefault(name(place), similarity)
        out.append(items)
    return out


def list_retrieved(
    trace: Mapping[int, Shift], inspection: Inspection, describe: Callable[[int, float, float], RetrievedItem]
) -> tuple[LayerRetrieval, ...]:
    """See ``Edit.list_retrieved``; ``describe`` makes an item of its place, similarity and weight."""
    out = []
    for i, decision in sorted(trace.items()):
        found = decision.retrieved
        if not found.similarity.shape[1]:
            continue
        site, x = inspection.backbone.layout.attention(i), inspection.states.attention[i]
        weights = knowledge_weights(site, x[None, None], decision)[0, 0].float()
        best = weights.topk(min(inspection.top, len(weights))).indices.tolist()
        items = tuple(
            describe(int(found.index[0, k]), found.similarity[0, k].item(), weights[k].item()) for k in best
        )
        out.append(LayerRetrieval(i, decision.alpha[0].item(), len(weights), items))
    return tuple(out)


def count_firing(layer: int, patch: KeyValuePatch, states: PromptStates) -> Neurons:
    """What a patch's pairs do at the prompt's last token."""
    query, pairs = states.ffn[layer].to(patch.keys.dtype), patch.pairs
    activations, added = pairs.activations(query), pairs(query)
    firing = int((pairs.scores(query) > 0).sum())
    share = added.norm() / states.output[layer].float().norm().clamp(min=1e-12)
    return Neurons(layer, firing, len(activations), activations.abs().max().item(), share.item())


def bank_items(routing: Routing, known: LayerKnowledge | None) -> tuple[Sequence[KnowledgeItem], int]:
    """The texts of a layer's knowledge memory, where they are known, and how many items of it are retrieved
    from; the edits' own items come after them."""
    if known is None or routing.memory == "edit":
        return (), 0
    return known.items, len(known.bank)


def item_names(routing: Routing, known: LayerKnowledge | None, own: Sequence[str]) -> Callable[[int], str]:
    """What the items of a layer's memory are called: the bank's by their question and answer, those of the
    edits behind it by ``own``."""
    texts, bank = bank_items(routing, known)

    def name(place: int) -> str:
        if place >= bank:
            return own[place - bank]
        return f"{texts[place].prompt} {texts[place].target}" if texts else f"item {place}"

    return name
