"""When a gated edit applies, and what its gate looks at: what the unedited model computes at a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch

from unike.backbones.base import Backbone, Sight, StateReader
from unike.edits.content import Content, digest
from unike.knowledge.scope import TrainedScope
from unike.types import ImageLike

# The names of what the gate measures.
OVERLAP, SIMILARITY = "overlap", "similarity"
# How many of the most probable next tokens are compared.
TOP = 64
_FORMER_GATE = ("overlap", "tokens", "nearest")


@dataclass(frozen=True)
class Gate:
    """When an edit applies to a prompt; all that is given must hold.

    ``overlap``: the base model's next tokens, at most ``tokens`` along its answer, overlap with those at the
    edit's own prompt by so much or more. ``layer``: a scope classifier that reads the input of this decoder
    layer finds the two prompts as similar as ``similarity``; where that is None, as ``recall`` of the prompts
    in an edit's scope are, or ``recall_few`` where few answers are possible; where that is None, too, as its
    own threshold for so many edits. ``nearest``: no edit is nearer, by the classifier if there is one.
    ``weighs``: an edit's in-context knowledge gets as much of a prompt's attention as the overlap lets it,
    ``alpha * overlap``.
    """

    overlap: float | None = None
    tokens: int = 1
    nearest: bool = False
    layer: int | None = None
    similarity: float | None = None
    recall: float | None = None
    recall_few: float | None = None
    weighs: bool = False

    @property
    def measure(self) -> str:
        """What decides which edit is nearest."""
        return OVERLAP if self.layer is None else SIMILARITY


@dataclass(frozen=True)
class Measured:
    """Each of ``B`` prompts with each of ``E`` edits, ``(B, E)``: which are ``open``, and the values that
    decided, by name."""

    open: torch.Tensor
    values: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _ScopeReader:
    """Reads a prompt's states with a scope classifier's encoder."""

    scope: TrainedScope
    layer: int

    @cached_property
    def key(self) -> str:
        return digest(self.scope.encoder.state_dict())

    def read(self, states: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(1, len(states), dtype=torch.bool, device=states.device)
        vector: torch.Tensor = self.scope.encoder(states[None], mask)[0]
        return vector


def make_reader(gate: Gate, scope: TrainedScope | None) -> StateReader | None:
    """What reads a prompt's states for the gate; None for a gate without a classifier."""
    return None if scope is None or gate.layer is None else _ScopeReader(scope, gate.layer)


def observe_prompts(
    backbone: Backbone,
    images: Sequence[ImageLike | None],
    prompts: Sequence[str],
    gate: Gate,
    reader: StateReader | None,
) -> list[Sight]:
    """Each prompt as the unedited model sees it, with what the gate looks at."""
    return backbone.observe(images, prompts, gate.tokens, TOP, reader)


def read_gate(content: Content) -> Gate:
    """The gate of a saved edit; ValueError, in one line, where it is none."""
    if isinstance(content.values.get("gate"), list):
        # Overlap, tokens and nearest, as gates without a classifier were first written.
        former = content.take_value("gate", list)
        content.values["gate"] = asdict(Gate()) | dict(zip(_FORMER_GATE, former, strict=True))
    values = content.take_value("gate", dict)
    if values.keys() != Gate.__dataclass_fields__.keys():
        raise ValueError(f"gate: expected {', '.join(Gate.__dataclass_fields__)}")
    overlap, similarity = (_read_bound(values[name], name) for name in ("overlap", "similarity"))
    tokens, nearest, layer = values["tokens"], values["nearest"], values["layer"]
    if not _is_count(tokens, 1) or not isinstance(nearest, bool):
        raise ValueError("gate: expected a number of tokens, and whether the nearest edit alone applies")
    if layer is not None and not _is_count(layer, 0):
        raise ValueError("gate: layer: expected a number or null")
    weighs = values["weighs"]
    if overlap is None and (layer is None or weighs):
        raise ValueError("gate: expected an overlap, a layer, or both, and an overlap where alpha has it")
    if not isinstance(weighs, bool):
        raise ValueError("gate: weighs: expected true or false")
    assert isinstance(tokens, int)
    assert layer is None or isinstance(layer, int)
    recall, recall_few = (_read_bound(values[name], name) for name in ("recall", "recall_few"))
    return Gate(overlap, tokens, nearest, layer, similarity, recall, recall_few, weighs)


def _read_bound(value: object, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1 <= value <= 1:
        raise ValueError(f"gate: {name}: expected a number in [-1, 1], or null")
    return float(value)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
