"""Asking an edited model, and why it answers what it answers: which edits and items were active.

All figures are of the prompt's last token, where an edit decides and from which the answer's first token
comes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from unike.backbones.base import Backbone
from unike.backbones.hooks import capture, tape
from unike.edits.activity import LayerRetrieval, Neurons, PromptStates, RetrievedItem, WeightChange
from unike.edits.attached import Slot
from unike.edits.base import Edit, Inspection
from unike.edits.conflicts import Contradiction, leave_out_contradicted, list_contradictions
from unike.system.text import one_line
from unike.types import ImageLike, Query

CONTRADICTED = "left out: a later edit has another answer to the same question about the same image"


@dataclass(frozen=True)
class EditReport:
    """What one attached edit, or one request of several in it, did for the prompt.

    ``active``: whether it could change the answer. ``scope``: its similarity to the prompt where a scope gate
    is on, or SERAC's probability, in [0, 1]. ``neurons`` and ``weights``: what it adds, by layer and by
    weight. ``shown``: texts that it puts before the prompt. ``notes``: further remarks, a line each.
    """

    id: str
    method: str | None
    prompt: str | None
    target: str | None
    active: bool
    scope: float | None = None
    neurons: tuple[Neurons, ...] = ()
    weights: tuple[WeightChange, ...] = ()
    shown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """The answers ``before`` and ``after`` the attached edits, and what was active for this prompt.

    ``asked`` is the prompt with what the edits put before it; ``image`` the image's path, None without a
    path. ``gates`` holds the similarity from which on a gate opens, by the name of its measure.
    ``contradictions`` are pairs of attached edits with two answers to one question: the later one's holds.
    """

    image: str | None
    prompt: str
    asked: str
    before: str
    after: str
    edits: tuple[EditReport, ...] = ()
    layers: tuple[LayerRetrieval, ...] = ()
    gates: Mapping[str, float] = field(default_factory=dict)
    contradictions: tuple[Contradiction, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self)


@torch.no_grad()
def ask(slot: Slot, image: ImageLike | None, prompt: str, top: int = 5) -> Explanation:
    """The answers without and with what is attached, and why; each layer's items are the ``top`` most
    attended ones."""
    path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
    with slot.guard.hold():
        before, after = (slot.generate(edits, image, prompt) for edits in ((), slot.edits))
        with slot.only(slot.edits) as whole:
            if whole is None:
                return Explanation(path, prompt, prompt, before, after)
            query = whole.rewrite(Query(image, prompt))
            states = _read_states(slot.backbone, whole.inspected_layers, query)
            kept = leave_out_contradicted(slot.edits)
            applied = tuple(edit for edit in kept if edit is not None)
            inspection = Inspection(slot.backbone, applied, whole, states, top)
            layers, gates = whole.list_retrieved(inspection), whole.gates
        with slot.only(()):
            pairs = zip(slot.edits, kept, strict=True)
            reports = tuple(report for pair in pairs for report in _report(*pair, inspection))
        contradictions = list_contradictions(slot.edits)
    return Explanation(path, prompt, query.prompt, before, after, reports, layers, gates, contradictions)


def _read_states(backbone: Backbone, layers: Sequence[int], query: Query) -> PromptStates:
    """One forward pass over the query, after which the edits know what they decided."""
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

    return PromptStates(at_end(attention), at_end(ffn), at_end({i: p.outputs for i, p in left.items()}))


def _report(edit: Edit, kept: Edit | None, inspection: Inspection) -> Iterator[EditReport]:
    """What is left of an edit, ``kept``, and after it the requests that a later edit contradicts."""
    if kept is not None:
        yield from _report_applied(kept, inspection)
    if kept is not edit:
        left = () if kept is None else {id(origin) for origin in kept.origins}
        for origin in edit.origins:
            if id(origin) not in left:
                name = edit.id if len(edit.origins) == 1 else origin.id
                about = (name, origin.method, origin.prompt, origin.target)
                yield EditReport(*about, False, notes=(CONTRADICTED,))


def _report_applied(edit: Edit, inspection: Inspection) -> Iterator[EditReport]:
    for unit, did in zip(edit.units, edit.describe_prompt(inspection), strict=True):
        origin = inspection.find_request(unit)
        yield EditReport(
            inspection.name_unit(unit),
            None if origin is None else origin.method,
            None if origin is None else origin.prompt,
            None if origin is None else origin.target,
            *(did.active, did.scope, did.neurons, did.weights, did.shown, did.notes),
        )


# ---------------------------------------------------------------- as text


def rate_strength(edit: EditReport) -> float:
    """What edits are sorted by: roughly, how much they changed."""
    return (
        sum(n.share for n in edit.neurons) + (edit.scope or 0) + sum(change.norm for change in edit.weights)
    )


def describe_activity(edit: EditReport) -> str:
    """What an edit did for this prompt, a line for each layer, weight, text and note."""
    lines = [] if edit.active else ["inactive"]
    lines += [
        f"layer {n.layer}: {n.firing} of {n.count} pairs fire, strongest {n.strongest:.3g}, "
        f"{n.share:.1%} of the output"
        for n in edit.neurons
    ]
    lines += [
        f"{w.name}: moved by {w.norm:.3g}" + ("" if w.share is None else f", {w.share:.2%} of its norm")
        for w in edit.weights
    ]
    lines += [f"shown: {one_line(text, 80)}" for text in edit.shown]
    lines += [one_line(note, 80) for note in edit.notes]
    return "\n".join(lines) or "active"


def describe_item(item: RetrievedItem) -> str:
    """Where a retrieved item comes from, and its question and answer where they are known."""
    owner = f"item {item.place} of the knowledge memory" if item.edit is None else f"edit {item.edit}"
    return owner if item.prompt is None else f"{owner}: {item.prompt} {item.answer}"
