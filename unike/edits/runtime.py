"""One decoder layer while routed edits are applied: what is decided at a prompt's end, and done since."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unike.backbones.base import Backbone, Prompt
from unike.backbones.hooks import After, transform
from unike.edits.shares import LayerKnowledge, Routing
from unike.knowledge.adapter import AdapterLayer, Shift
from unike.knowledge.batching import Owners
from unike.knowledge.memory import KnowledgeMemory
from unike.knowledge.patch import OpenEdits
from unike.knowledge.scope import ScopeMeasure, open_edits

Extra = Callable[[torch.Tensor], torch.Tensor]


class ScopeGate:
    """Which edits may speak for a prompt, decided where the edited layers begin.

    The states there are the base model's, whatever edits are applied: the decision depends on the
    prompt alone. ``threshold`` opens every edit whose own key is similar enough; ``nearest`` only the
    most similar of them. Similarity is the cosine of the states at the prompt's last token, or that of
    the trained space. ``keys (E, r)`` are the edits'; with ``owners`` a row meets its own edit's alone.
    ``opened`` says it of the first ``frozen`` of them.
    """

    def __init__(
        self,
        routing: Routing,
        measure: ScopeMeasure | None,
        keys: torch.Tensor,
        owners: Owners | None = None,
        frozen: int = 0,
    ) -> None:
        self.nearest, self.latent = routing.scope_gate == "nearest", routing.scope_halves == "both"
        self.measure, self.owners = measure, owners
        threshold = routing.scope_threshold
        if measure is not None and threshold is None:
            threshold = measure.threshold(1 if owners is not None else len(keys))
        if threshold is None or (routing.scope_measure == "trained") != (measure is not None):
            raise ValueError("scope_measure: trained needs the measure, and cosine a scope_threshold")
        self.threshold = threshold
        self.directions = F.normalize(keys.float(), dim=-1)
        self.open = torch.zeros(0, len(keys), dtype=torch.bool)
        # Each prompt's with each edit, (B, E), or with its own alone, (B, 1).
        self.similarity: torch.Tensor | None = None
        self.frozen, self.opened = frozen, OpenEdits.of(self.open)

    @property
    def scopes(self) -> torch.Tensor | None:
        """Each prompt's similarity with the nearest edit, ``(B)``."""
        return None if self.similarity is None else self.similarity.amax(1)

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
        if self.owners is None:
            similarity = query @ self.directions.T
        else:
            similarity = (query * self.directions[self.owners.index]).sum(-1, keepdim=True)
        self.open = open_edits(similarity, self.threshold, self.nearest)
        self.similarity = similarity
        self.opened = OpenEdits.of(self.open[:, : self.frozen])

    def allowed(self) -> torch.Tensor | None:
        """Which of a memory's last items, the edits' own, a prompt may retrieve; None: all."""
        return self.open if self.latent else None


@dataclass
class LayerRuntime:
    """One layer: ``adapter`` shifts attention, ``extra`` adds to the feed-forward network's output
    ``(B, T, d)``; the ``first`` edited layer asks the gate. ``owned``: the adapter's memory holds the
    edits' own items."""

    prompt: Prompt
    index: int
    first: bool
    gate: ScopeGate | None
    adapter: AdapterLayer | None
    owned: bool
    extra: Extra | None
    trace: dict[int, Shift]
    decided: int = -1
    shift: Shift | None = None

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
        if self.gate is not None and self.first:
            self.gate.decide(x, self.prompt)
        if self.adapter is not None:
            allowed = None
            if self.gate is not None and self.owned:
                allowed = self.gate.allowed()
            self.shift = self.adapter.decide(x[torch.arange(len(x), device=x.device), end], allowed)
            self.trace[self.index] = self.shift

    def after_ffn(self, queries: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        assert self.extra is not None
        # OPT hands its feed-forward network all rows' tokens in one dimension.
        batch = queries.reshape(len(self.prompt.question_end), -1, queries.shape[-1])  # type: ignore[arg-type]
        return output + self.extra(batch).reshape(output.shape)


@contextmanager
def running(backbone: Backbone, runtimes: Mapping[int, LayerRuntime]) -> Iterator[None]:
    """The layers run with their runtimes inside the block."""
    afters: list[tuple[nn.Module, nn.Module, After]] = []
    for index, runtime in sorted(runtimes.items()):
        attention, ffn = backbone.layout.attention(index), backbone.layout.ffn(index)
        afters.append((attention.module, attention.module, runtime.after_attention))
        if runtime.extra is not None:
            afters.append((ffn.keys[0], ffn.value, runtime.after_ffn))
    with transform(afters):
        yield


def adapter_of(
    backbone: Backbone,
    index: int,
    routing: Routing,
    known: LayerKnowledge | None,
    own: Callable[[KnowledgeMemory], KnowledgeMemory],
) -> AdapterLayer | None:
    """The external half of a layer; ``own`` puts the edits' own items behind the bank."""
    if routing.external != "latent":
        return None
    memory = KnowledgeMemory.empty(backbone.layout.width, backbone.device)
    if known is not None and routing.memory != "edit":
        memory = known.bank
    if routing.memory != "bank":
        memory = own(memory)
    return AdapterLayer(
        backbone.layout.attention(index), memory, None if known is None else known.semantic,
        routing.k, routing.alpha, routing.attention, routing.tau, routing.similarity_bias,
    )  # fmt: skip
