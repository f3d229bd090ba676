"""What edits did for one prompt, as plain values.

All figures are of the prompt's last token, where an edit decides and from which the answer's first token
comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RetrievedItem:
    """An item that a layer retrieved: ``edit``'s own, or the knowledge memory's at ``place``.

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
class LayerRetrieval:
    """What a layer's attention got from memory: the share ``alpha`` in [0, 1], and of the ``retrieved``
    items the most attended ones."""

    layer: int
    alpha: float
    retrieved: int
    items: tuple[RetrievedItem, ...]


@dataclass(frozen=True)
class Neurons:
    """An edit's extra pairs in a layer: how many of ``count`` keys fire (score above 0), the strongest
    activation, and what they add, as a share of the norm of the network's output."""

    layer: int
    firing: int
    count: int
    strongest: float
    share: float


@dataclass(frozen=True)
class WeightChange:
    """How far an edit moves a weight: the norm of the change, and that as a share of the weight's own norm,
    None for a weight of zeros."""

    name: str
    norm: float
    share: float | None

    @classmethod
    def of(cls, name: str, change: torch.Tensor, weight: torch.Tensor) -> WeightChange:
        """``change`` is the norm of what is added to ``weight``."""
        norm, own = change.item(), weight.float().norm().item()
        return cls(name, norm, norm / own if own else None)


@dataclass(frozen=True)
class Activity:
    """What an edit, or one request of several in it, did for a prompt.

    ``active``: whether it could change the answer. ``scope``: its similarity with the prompt where a gate is
    on, or SERAC's probability. ``weights``: what it moves; ``shown``: texts put before the prompt; ``notes``:
    what else there is to say, a line each.
    """

    active: bool
    scope: float | None = None
    neurons: tuple[Neurons, ...] = ()
    weights: tuple[WeightChange, ...] = ()
    shown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


UNKNOWN = Activity(True, notes=("active, unknown: this kind of edit does not say what it did",))


@dataclass(frozen=True)
class PromptStates:
    """What one forward pass left at the prompt's last token, by layer ``(d)``: what enters attention and
    the feed-forward network, and what leaves the latter."""

    attention: Mapping[int, torch.Tensor]
    ffn: Mapping[int, torch.Tensor]
    output: Mapping[int, torch.Tensor]
