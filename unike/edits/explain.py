"""Asking an edited model, and why it answers what it answers: which edits and items were active.

All figures are of the prompt's last token, where an edit decides and from which the answer's first token
comes. Shapes: ``E`` edits, ``K`` retrieved items, ``d`` width, ``n`` extra pairs of an edit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from unike.backbones.base import Backbone
from unike.backbones.hooks import capture, tape
from unike.edits import Edit, LowRankDelta, PromptEdit, RoutedEdit, WeightDelta
from unike.edits.attached import Slot
from unike.edits.counterfactual import SeracEdit
from unike.edits.deltas import ffn_sites
from unike.knowledge.adapter import Shift, knowledge_weights
from unike.system.text import one_line
from unike.types import ImageLike, KnowledgeItem, Query


@dataclass(frozen=True)
class Item:
    """A knowledge item that a layer retrieved: ``edit``'s own, or the bank's at ``place``.

    ``similarity``: cosine with the prompt; ``weight``: its share of the knowledge's attention, in [0, 1],
    the mean over heads. ``prompt`` and ``answer`` are None where nothing is known of the item.
    """

    similarity: float
    weight: float
    edit: str | None
    place: int
    prompt: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Layer:
    """What a layer's attention got from memory: the share ``alpha`` in [0, 1], and of the ``retrieved``
    items the most attended ones."""

    layer: int
    alpha: float
    retrieved: int
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Neurons:
    """An edit's extra pairs in a layer: how many of ``count`` keys answer (score above 0), the strongest
    activation, and what they add, as a share of the norm of the network's output."""

    layer: int
    firing: int
    count: int
    strongest: float
    share: float


@dataclass(frozen=True)
class Moved:
    """How far an edit moves a weight: the norm of the change, and that as a share of the weight's own norm,
    None for a weight of zeros."""

    name: str
    norm: float
    share: float | None


@dataclass(frozen=True)
class Active:
    """One edit that is attached.

    ``active``: whether it could speak for this prompt. ``scope``: its similarity with the prompt where a
    gate is on, or SERAC's probability. ``weights``: what it moves; ``shown``: texts put before the prompt.
    """

    id: str
    method: str | None
    prompt: str | None
    target: str | None
    active: bool
    scope: float | None = None
    neurons: tuple[Neurons, ...] = ()
    weights: tuple[Moved, ...] = ()
    shown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """The answers ``before`` and ``after`` the attached edits, and what was active for this prompt.

    ``asked`` is the prompt with what the edits put before it; ``image`` the picture's path, None without a
    path. ``gates`` holds the similarity from which on a gate opens, by the name of its measure.
    """

    image: str | None
    prompt: str
    asked: str
    before: str
    after: str
    edits: tuple[Active, ...] = ()
    layers: tuple[Layer, ...] = ()
    gates: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Seen:
    """What one forward pass left at the prompt's last token, by layer ``(d)``: what enters attention and
    the feed-forward network, and what leaves the latter."""

    attention: Mapping[int, torch.Tensor]
    ffn: Mapping[int, torch.Tensor]
    output: Mapping[int, torch.Tensor]


@torch.no_grad()
def ask(slot: Slot, image: ImageLike | None, prompt: str, top: int = 5) -> Asked:
    """Asks without and with what is attached; of each layer's items the ``top`` most attended are told."""
    before, after = (slot.generate(edits, image, prompt) for edits in ((), slot.edits))
    path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
    if slot.whole is None:
        return Asked(path, prompt, prompt, before, after)
    parts = [part for edit in slot.edits for part in edit.parts]
    with slot.only(()):
        changes = {id(part): _changes(slot.backbone, part) for part in parts}
    query = slot.whole.rewrite(Query(image, prompt))
    seen, routed = _read(slot.backbone, slot.whole, query), _routed(slot.whole)
    names = {id(thing): name for name, thing, _ in _things(slot.edits)}
    return Asked(
        path, prompt, query.prompt, before, after,
        tuple(
            Active(name, *_about(edit, thing), **_found(slot.whole, thing, seen, changes))
            for name, thing, edit in _things(slot.edits)
        ),
        tuple(layer for part in routed for layer in _layers(slot, part, seen, names, top)),
        {part.routing.scope_measure: part.gate.threshold for part in routed if part.gate is not None},
    )  # fmt: skip


def _read(backbone: Backbone, whole: Edit, query: Query) -> _Seen:
    """One forward pass over the query, after which the edits know what they decided."""
    layers = sorted({i for part in _routed(whole) for i in part.layers})
    site = backbone.layout.ffn
    batch = backbone.encode([query.image], [query.prompt])
    with (
        capture({i: backbone.layout.attention(i).module for i in layers}) as attention,
        capture({i: site(i).keys[0] for i in layers}) as ffn,
        tape({i: site(i).value for i in layers}) as left,
    ):
        backbone(batch)
    end = int(batch.question_end[0])

    def at_end(states: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        # OPT hands its feed-forward network all rows' tokens in one dimension.
        return {i: x.reshape(-1, x.shape[-1])[end] for i, x in states.items()}

    return _Seen(at_end(attention), at_end(ffn), at_end({i: p.outputs for i, p in left.items()}))


def _routed(whole: Edit) -> list[RoutedEdit]:
    return [part for part in whole.parts if isinstance(part, RoutedEdit)]


def _records(part: Edit) -> Sequence[Any]:
    """What a part is made of, an entry per request where the part tells them apart."""
    if isinstance(part, (RoutedEdit, SeracEdit)):
        return part.records
    return part.facts if isinstance(part, PromptEdit) else (part,)


def _things(edits: Sequence[Edit]) -> Iterator[tuple[str, Any, Edit]]:
    """Records, facts and weights of the edits in order, each with its name and the edit that it is of."""
    for edit in edits:
        things = [thing for part in edit.parts for thing in _records(part)]
        for thing in things:
            yield (edit.id if len(things) == 1 else getattr(thing, "id", edit.id)), thing, edit


# ---------------------------------------------------------------- edits


def _about(edit: Edit, thing: Any) -> tuple[str | None, str | None, str | None]:
    """Method, prompt and target of the request behind a record."""
    one = len(edit.origins) == 1
    own = next((o for o in edit.origins if one or o.id == getattr(thing, "id", None)), None)
    return (None, None, None) if own is None else (own.method, own.prompt, own.target)


def _found(whole: Edit, thing: Any, seen: _Seen, changes: Mapping[int, tuple[Moved, ...]]) -> dict[str, Any]:
    """What a record, a fact or a part did, as ``Active`` has it."""
    for part in whole.parts:
        place = next((i for i, record in enumerate(_records(part)) if record is thing), None)
        if isinstance(part, RoutedEdit) and place is not None:
            active, scope = _gated(part, place)
            shown = () if thing.demonstration is None else (thing.demonstration,)
            return {"active": active, "scope": scope, "neurons": _neurons(thing, seen), "shown": shown}
        if isinstance(part, SeracEdit) and place is not None:
            assert part.probabilities is not None
            assert part.chosen is not None
            scope = part.probabilities[0, place].item()
            return {"active": int(part.chosen[0]) == place and scope > 0.5, "scope": scope}
        if isinstance(part, PromptEdit) and place is not None:
            own = {id(piece) for piece in (thing.fact, *thing.demonstrations)}
            texts = tuple(piece.text for piece in part.shown() if id(piece) in own)
            return {"active": bool(texts), "shown": texts}
        if isinstance(part, WeightDelta) and isinstance(thing, WeightDelta):
            # A later edit's values may have taken the place of this one's.
            held = any(part.weights[n] is tensor for n, tensor in thing.weights.items())
            return {"active": held, "weights": changes[id(thing)]}
    return {"active": True, "weights": changes[id(thing)]}


def _gated(part: RoutedEdit, place: int) -> tuple[bool, float | None]:
    """Whether the gate is open for an edit, and how similar it is to the prompt."""
    if part.gate is None:
        return True, None
    assert part.gate.similarity is not None
    return bool(part.gate.open[0, place]), part.gate.similarity[0, place].item()


def _neurons(record: Any, seen: _Seen) -> tuple[Neurons, ...]:
    out = []
    for i, share in sorted(record.layers.items()):
        if (patch := share.patch) is not None:
            query, pairs = seen.ffn[i].to(patch.keys.dtype), patch.pairs
            fired, added = pairs.activations(query), pairs(query)
            firing = int((pairs.scores(query) > 0).sum())
            part = added.norm() / seen.output[i].float().norm().clamp(min=1e-12)
            out.append(Neurons(i, firing, len(fired), fired.abs().max().item(), part.item()))
    return tuple(out)


def _changes(backbone: Backbone, part: Edit) -> tuple[Moved, ...]:
    """How far an edit moves each weight; asked while nothing is attached."""
    out = []
    if isinstance(part, WeightDelta):
        for name, new in part.weights.items():
            base = backbone.model.get_parameter(name)
            out.append(_moved(name, (new.float() - base.float()).norm(), base))
    if isinstance(part, LowRankDelta):
        modules = ffn_sites(backbone, sorted({i for i, _ in part.factors}))
        for (i, role), pair in part.factors.items():
            # The norm of their product, without building it.
            left, right = (factor.double() for factor in pair)
            square = ((left @ left.T) * (right @ right.T)).sum().clamp(min=0)
            out.append(_moved(f"{i}.{role}", square.sqrt(), modules[i, role].weight))
    return tuple(out)


def _moved(name: str, change: torch.Tensor, weight: torch.Tensor) -> Moved:
    norm, own = change.item(), weight.float().norm().item()
    return Moved(name, norm, norm / own if own else None)


# ---------------------------------------------------------------- retrieved items


def _layers(slot: Slot, part: RoutedEdit, seen: _Seen, names: Mapping[int, str], top: int) -> Iterator[Layer]:
    known = part.knowledge.get(part.layers[0])
    bank = 0 if known is None or part.routing.memory == "edit" else len(known.bank)
    texts: Sequence[KnowledgeItem] = () if known is None else known.items
    requests = {o.id: o for edit in slot.edits for o in edit.origins}

    def item(place: int, similarity: float, weight: float) -> Item:
        if place < bank:
            text = texts[place] if texts else None
            about = (None, None) if text is None else (text.prompt, text.target)
            return Item(similarity, weight, None, place, *about)
        record = part.records[place - bank]
        origin = requests.get(record.id)
        about = (None, None) if origin is None else (origin.prompt, origin.target)
        return Item(similarity, weight, names[id(record)], place - bank, *about)

    for i, decision in sorted(part.trace.items()):
        if decision.retrieved.similarity.shape[1]:
            site = slot.backbone.layout.attention(i)
            weights = knowledge_weights(site, seen.attention[i][None, None], decision)[0, 0].float()
            yield Layer(i, decision.alpha[0].item(), len(weights), _best(decision, weights, top, item))


def _best(decision: Shift, weights: torch.Tensor, top: int, item: Any) -> tuple[Item, ...]:
    found = decision.retrieved
    best = weights.topk(min(top, len(weights))).indices.tolist()
    return tuple(item(int(found.index[0, k]), found.similarity[0, k].item(), weights[k].item()) for k in best)


def strength(edit: Active) -> float:
    """What edits are sorted by: roughly, how much they had to say."""
    return sum(n.share for n in edit.neurons) + (edit.scope or 0) + sum(moved.norm for moved in edit.weights)


def deeds(edit: Active) -> str:
    """What an edit did to this prompt, a line for each layer, weight and text."""
    lines = [] if edit.active else ["silent"]
    lines += [
        f"layer {n.layer}: {n.firing} of {n.count} pairs fire, strongest {n.strongest:.3g}, "
        f"{n.share:.1%} of the output"
        for n in edit.neurons
    ]
    lines += [
        f"{m.name}: moved by {m.norm:.3g}" + ("" if m.share is None else f", {m.share:.2%} of its norm")
        for m in edit.weights
    ]
    lines += [f"shown: {one_line(text, 80)}" for text in edit.shown]
    return "\n".join(lines) or "answered"


def whose(item: Item) -> str:
    """Where a retrieved item comes from, and its question and answer where they are known."""
    owner = f"item {item.place} of the bank" if item.edit is None else f"edit {item.edit}"
    return owner if item.prompt is None else f"{owner}: {item.prompt} {item.answer}"
