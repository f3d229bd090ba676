"""Edits: what a method hands over. Applied for the length of a ``with`` block, then gone.

No edit changes, copies or concatenates a base weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from unike.backbones.base import Backbone, Prompt
from unike.hooks import After, transform
from unike.knowledge.adapter import AdapterLayer, Shift
from unike.knowledge.encoders import Disentangler
from unike.knowledge.memory import KnowledgeMemory
from unike.knowledge.patch import KeyValuePatch, PatchStack
from unike.knowledge.scope import ScopeMeasure, open_edits
from unike.types import Query


class Edit(ABC):
    """A change to what a backbone answers.

    ``info`` holds what the method reports of making it: steps, final loss, seconds.
    """

    info: dict[str, Any]

    @abstractmethod
    def applied(self, backbone: Backbone) -> AbstractContextManager[None]:
        """The backbone answers edited inside the block, and is as it was after it."""

    @abstractmethod
    def state_dict(self) -> dict[str, torch.Tensor]:
        """All tensors of the edit."""

    @abstractmethod
    def __or__(self, other: Any) -> Edit:
        """Both edits, this one first."""

    def rewrite(self, query: Query) -> Query:
        """The query as the edited model is asked it: the same, unless the edit lives in the prompt."""
        return query

    def changes_prefix(self, backbone: Backbone, first: int) -> bool:
        """Whether the edit changes what enters decoder layer ``first``.

        The base model's prefix states then say nothing about the edited model's answers.
        """
        return False

    def explain(self) -> dict[str, list[float]]:
        """What the edit decided for each prompt of the last forward pass: the mean over its layers of
        ``alpha`` and of the best ``similarity`` in memory; empty where it decides nothing."""
        return {}

    @property
    def nbytes(self) -> int:
        """Bytes of the edit's own tensors."""
        return sum(t.nbytes for t in self.state_dict().values())


class Shown(NamedTuple):
    """A text in a prompt, with the number of its tokens."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Fact:
    """An edit as text, and its demonstrations, the best first."""

    id: str
    fact: Shown
    demonstrations: tuple[Shown, ...] = ()


@dataclass
class PromptEdit(Edit):
    """Edits that stand in the prompt: what the model is asked changes, the model doesn't.

    Before a question come the last edit's demonstrations, the best last, then all facts in order. If
    they have more than ``room`` tokens, the worst demonstrations go first, then the oldest facts; the
    last fact stays.
    """

    facts: tuple[Fact, ...]
    room: int
    info: dict[str, Any] = field(default_factory=dict)

    def applied(self, backbone: Backbone) -> AbstractContextManager[None]:
        return nullcontext()

    def rewrite(self, query: Query) -> Query:
        newest = self.facts[-1]
        pieces = [*(f.fact for f in reversed(self.facts)), *newest.demonstrations]
        shown, room = [newest.fact.text], self.room - newest.fact.tokens
        for piece in pieces[1:]:
            room -= piece.tokens
            if room < 0:
                break
            shown.insert(0, piece.text)
        return replace(query, prompt=f"{''.join(shown)}Prompt: {query.prompt}")

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def __or__(self, other: Any) -> Edit:
        if not isinstance(other, PromptEdit):
            return NotImplemented
        return PromptEdit(self.facts + other.facts, other.room, self.info | other.info)


@dataclass(frozen=True)
class LayerKnowledge:
    """One layer's bank, encoders, zeta, and remembered feed-forward inputs ``(m, d)``; in the first
    edited layer the trained measure of scope, if one is used."""

    bank: KnowledgeMemory
    encoders: Disentangler
    ffn_queries: torch.Tensor
    zeta: torch.Tensor | None = None
    scope: ScopeMeasure | None = None


@dataclass(frozen=True)
class LayerShare:
    """What one edit owns in one layer: its own pair ``key = h_sem``, ``value = h_pos`` ``(d)``, and
    its patch if the intrinsic half is on."""

    key: torch.Tensor
    value: torch.Tensor
    patch: KeyValuePatch | None = None


@dataclass(frozen=True)
class EditRecord:
    """One edit of a routed edit: its shares by layer, and its key ``(r)`` in the trained space of
    scope."""

    id: str
    layers: Mapping[int, LayerShare]
    demonstration: str | None = None
    scope_key: torch.Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """How a routed edit answers; the fields are the YAML's keys."""

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


@dataclass
class RoutedEdit(Edit):
    """UniKE's edit: patches beside feed-forward networks, shifted attention, and who may speak.

    ``records`` share the ``knowledge`` (bank and encoders by layer) and the ``routing``. After a
    forward pass ``trace`` holds each layer's decision for the last batch of prompts, and ``scopes``
    each prompt's similarity with the nearest edit where a gate is on.
    """

    records: tuple[EditRecord, ...]
    routing: Routing
    knowledge: Mapping[int, LayerKnowledge] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    trace: dict[int, Shift] = field(default_factory=dict, repr=False)
    scopes: torch.Tensor | None = field(default=None, repr=False)

    @property
    def layers(self) -> list[int]:
        return sorted(self.records[0].layers)

    @contextmanager
    def applied(self, backbone: Backbone) -> Iterator[None]:
        gate = ScopeGate(self) if self.routing.scope_gate != "none" else None
        afters: list[tuple[nn.Module, nn.Module, After]] = []
        for index in self.layers:
            runtime = _Layer(self, backbone, index, gate)
            attention, ffn = backbone.layout.attention(index), backbone.layout.ffn(index)
            afters.append((attention.module, attention.module, runtime.after_attention))
            if runtime.patched:
                afters.append((ffn.keys[0], ffn.value, runtime.after_ffn))
        with ExitStack() as stack:
            stack.enter_context(transform(afters))
            yield

    def changes_prefix(self, backbone: Backbone, first: int) -> bool:
        return self.layers[0] < first

    def state_dict(self) -> dict[str, torch.Tensor]:
        out = {}
        for record in self.records:
            for index, share in record.layers.items():
                at = f"{record.id}.{index}"
                out[f"{at}.key"], out[f"{at}.value"] = share.key, share.value
                if share.patch is not None:
                    out |= {f"{at}.patch.{k}": v.detach() for k, v in share.patch.state_dict().items()}
            if record.scope_key is not None:
                out[f"{record.id}.scope_key"] = record.scope_key
        return out

    def explain(self) -> dict[str, list[float]]:
        scope = {} if self.scopes is None else {"scope": self.scopes.tolist()}
        decisions = list(self.trace.values())
        if not decisions or not decisions[0].retrieved.similarity.shape[1]:
            return scope
        alpha = torch.stack([d.alpha.float() for d in decisions]).mean(0)
        best = torch.stack([d.retrieved.similarity[:, 0].float() for d in decisions]).mean(0)
        return {"alpha": alpha.tolist(), "similarity": best.tolist(), **scope}

    def rewrite(self, query: Query) -> Query:
        shown = [r.demonstration for r in self.records if r.demonstration is not None]
        if not shown:
            return query
        facts = "\n".join(f"New Fact: {text}" for text in shown)
        return replace(query, prompt=f"{facts}\nPrompt: {query.prompt}")

    def __or__(self, other: Any) -> Edit:
        if not isinstance(other, RoutedEdit):
            return NotImplemented
        return RoutedEdit(self.records + other.records, other.routing, other.knowledge, other.info)


class ScopeGate:
    """Which edits may speak for a prompt, decided where the edited layers begin.

    The states there are the base model's, whatever edits are applied: the decision depends on the
    prompt alone. ``threshold`` opens every edit whose own key is similar enough; ``nearest`` only the
    most similar of them. Similarity is the cosine of the states at the prompt's last token, or that of
    the trained space.
    """

    def __init__(self, edit: RoutedEdit) -> None:
        self.edit, self.first = edit, edit.layers[0]
        self.nearest = edit.routing.scope_gate == "nearest"
        self.latent = edit.routing.scope_halves == "both"
        known = edit.knowledge.get(self.first)
        trained = edit.routing.scope_measure == "trained"
        self.measure = known.scope if trained and known is not None else None
        threshold = edit.routing.scope_threshold
        if self.measure is not None:
            keys = torch.stack([r.scope_key for r in edit.records if r.scope_key is not None])
            threshold = self.measure.threshold(len(keys)) if threshold is None else threshold
        else:
            keys = torch.stack([r.layers[self.first].key for r in edit.records])
        if threshold is None or trained != (self.measure is not None) or len(keys) != len(edit.records):
            raise ValueError("scope_measure: trained needs the measure, and cosine a scope_threshold")
        self.threshold = threshold
        self.directions = F.normalize(keys.float(), dim=-1)
        self.open = torch.zeros(0, len(edit.records), dtype=torch.bool)

    @torch.no_grad()
    def decide(self, x: torch.Tensor, prompt: Prompt) -> None:
        """What enters the first edited layer, ``x (B, T, d)``: sets ``open (B, E)``."""
        end = prompt.question_end
        assert end is not None
        assert prompt.attention_mask is not None
        if self.measure is None:
            query = F.normalize(x[torch.arange(len(x), device=x.device), end].float(), dim=-1)
        else:
            places = torch.arange(x.shape[1], device=x.device)
            asked = prompt.attention_mask.bool() & (places <= end[:, None])
            query = self.measure.encoder(x, asked)
        similarity = query @ self.directions.T
        self.open = open_edits(similarity, self.threshold, self.nearest)
        self.edit.scopes = similarity.amax(1)

    def allowed(self, items: int) -> torch.Tensor | None:
        """Which of a memory's ``items``, the edits' own the last of them, a prompt may retrieve."""
        if not self.latent:
            return None
        bank = self.open.new_ones(len(self.open), items - self.open.shape[1])
        return torch.cat([bank, self.open], 1)


class _Layer:
    """One layer of a routed edit while it is applied."""

    def __init__(self, edit: RoutedEdit, backbone: Backbone, index: int, gate: ScopeGate | None) -> None:
        self.prompt, self.index, self.gate, self.trace = backbone.prompt, index, gate, edit.trace
        self.decided = -1
        self.shift: Shift | None = None
        self.adapter = _adapter(edit, backbone, index) if edit.routing.external == "latent" else None
        self.owned = edit.routing.memory != "bank"
        patches = [(e, r.layers[index].patch) for e, r in enumerate(edit.records)]
        owned = [(e, p) for e, p in patches if p is not None]
        # A stack is built once; a patch in training must be read anew at every step.
        frozen = [(e, p) for e, p in owned if not p.keys.requires_grad]
        self.live = [(e, p) for e, p in owned if p.keys.requires_grad]
        self.frozen = [e for e, _ in frozen]
        self.stack = PatchStack([p for _, p in frozen]) if frozen else None
        self.patched = bool(owned)

    def after_attention(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self.decided != self.prompt.number:
            self._decide(x)
        if self.adapter is None or self.shift is None:
            return output
        return self.adapter.apply(x, output, self.shift)

    def _decide(self, x: torch.Tensor) -> None:
        """Once per prompt, at its last token; kept while the answer is decoded."""
        self.decided = self.prompt.number
        end = self.prompt.question_end
        assert end is not None, "an edit must be asked through its backbone"
        if self.gate is not None and self.index == self.gate.first:
            self.gate.decide(x, self.prompt)
        if self.adapter is not None:
            allowed = None
            if self.gate is not None and self.owned:
                allowed = self.gate.allowed(len(self.adapter.memory))
            self.shift = self.adapter.decide(x[torch.arange(len(x), device=x.device), end], allowed)
            self.trace[self.index] = self.shift

    def after_ffn(self, queries: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        batch = queries.reshape(len(self.prompt.question_end), -1, queries.shape[-1])  # type: ignore[arg-type]
        extra = torch.zeros_like(batch)
        open_gates = None if self.gate is None else self.gate.open
        if self.stack is not None:
            extra = extra + self.stack(batch, None if open_gates is None else open_gates[:, self.frozen])
        for e, patch in self.live:
            branch = patch(batch)
            extra = extra + (branch if open_gates is None else branch * open_gates[:, e, None, None])
        return output + extra.reshape(output.shape)


def _adapter(edit: RoutedEdit, backbone: Backbone, index: int) -> AdapterLayer:
    routing, known = edit.routing, edit.knowledge.get(index)
    shares = [r.layers[index] for r in edit.records]
    memory = KnowledgeMemory.empty(backbone.layout.width, backbone.device)
    if known is not None and routing.memory != "edit":
        memory = known.bank
    if routing.memory != "bank":
        memory = memory.extended(torch.stack([s.key for s in shares]), torch.stack([s.value for s in shares]))
    return AdapterLayer(
        backbone.layout.attention(index), memory, None if known is None else known.encoders.semantic,
        routing.k, routing.alpha, routing.attention, routing.tau, routing.similarity_bias,
    )  # fmt: skip


def compose(edits: Sequence[Edit]) -> Edit | None:
    """All edits in order, or None without any."""
    whole: Edit | None = None
    for edit in edits:
        whole = edit if whole is None else whole | edit
    return whole
