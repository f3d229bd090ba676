"""What routed edits consist of: each edit's own part in each layer, and what all of them share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from unike.config.combined import RoutingOptions
from unike.edits.content import digest
from unike.knowledge.memory import KnowledgeMemory
from unike.knowledge.patch import KeyValuePatch
from unike.knowledge.scope import TrainedScope
from unike.types import KnowledgeItem


@dataclass(frozen=True)
class LayerKnowledge:
    """One layer's knowledge memory (``bank``), semantic encoder, zeta, and remembered feed-forward inputs
    ``(m, d)``; in the first edited layer also the scope classifier, if one is used. ``origin`` is the
    checksum of the file that memory and encoder come from, if any; ``items`` are the memory's texts."""

    bank: KnowledgeMemory
    semantic: nn.Module
    ffn_queries: torch.Tensor
    zeta: torch.Tensor | None = None
    scope: TrainedScope | None = None
    origin: str = ""
    items: Sequence[KnowledgeItem] = ()

    @cached_property
    def checksum(self) -> str:
        """Of memory and semantic encoder: the file's, or that of their numbers."""
        own = {"keys": self.bank.keys, "values": self.bank.values, **self.semantic.state_dict()}
        return self.origin or digest(own)

    @cached_property
    def scope_checksum(self) -> str:
        """Of the scope classifier's numbers and thresholds; empty without one."""
        if self.scope is None:
            return ""
        return sign_scope(self.scope)


def sign_scope(scope: TrainedScope) -> str:
    """A checksum of a scope classifier's numbers and thresholds."""
    levels = sorted(scope.thresholds.items())
    text = f"{digest(scope.encoder.state_dict())} {levels}"
    # Classifiers from before shares were measured have none.
    if scope.passing:
        text += f" {sorted((name, list(marks)) for name, marks in scope.passing.items())}"
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Shared:
    """What many edits share and none of them keeps: ``knowledge`` by layer, the ``network`` of a meta-learned
    editor, and the ``scope`` classifier of a gate around edits."""

    knowledge: Mapping[int, LayerKnowledge] = field(default_factory=dict)
    network: nn.Module | None = None
    scope: TrainedScope | None = None


@dataclass(frozen=True)
class LayerShare:
    """One edit's own part in one layer: its pair ``key = h_sem``, ``value = h_pos`` ``(d)``, and its patch if
    the intrinsic half is on. ``inputs (T, d)`` are its own feed-forward inputs, where later edits must be
    silent on them."""

    key: torch.Tensor
    value: torch.Tensor
    patch: KeyValuePatch | None = None
    inputs: torch.Tensor | None = None

    @property
    def kind(self) -> tuple[bool, int] | None:
        """Of the patch: whether it is gated, and its number of pairs; the same in all edits of one model."""
        return None if self.patch is None else (self.patch.gated, self.patch.keys.shape[1])


@dataclass(frozen=True)
class EditRecord:
    """One request's part of a routed edit: its shares by layer, and its key ``(r)`` for the scope
    classifier."""

    id: str
    layers: Mapping[int, LayerShare]
    demonstration: str | None = None
    scope_key: torch.Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """How a routed edit answers; the fields are keys of the YAML."""

    external: str = "latent"
    memory: str = "both"
    k: int = 40
    alpha: float | str = "adaptive"
    attention: str = "projected"
    tau: float | None = None
    similarity_bias: float = 0.0
    scope_gate: str = "none"
    scope_threshold: float | None = 0.5
    scope_measure: str = "cosine"
    scope_halves: str = "intrinsic"

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Routing:
        """From plain values; UserError for values that no YAML may have, ValueError for unknown names."""
        if values.keys() != cls.__dataclass_fields__.keys():
            raise ValueError(f"routing: expected {', '.join(cls.__dataclass_fields__)}")
        options = RoutingOptions(**values, source="routing")
        routing = cls(**{name: getattr(options, name) for name in values})
        cosine = routing.scope_gate != "none" and routing.scope_measure == "cosine"
        if cosine and routing.scope_threshold is None:
            raise ValueError("routing: scope_threshold: null; expected a number")
        return routing


def find_classifier(
    routing: Routing, knowledge: Mapping[int, LayerKnowledge], first: int
) -> TrainedScope | None:
    """The scope classifier, where the routing uses one."""
    known = knowledge.get(first)
    return known.scope if routing.scope_measure == "trained" and known is not None else None
