"""One decoder layer while routed edits are applied: it decides at a prompt's end, and acts from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

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
from unike.knowledge.scope import TrainedScope, select_edits

Extra = Callable[[torch.Tensor], torch.Tensor]


class ScopeGate:
    """Which edits apply to a prompt, decided where the edited layers begin.

    The states there are the base model's, whatever edits are applied: the decision depends on the prompt
    alone. With ``threshold`` every edit applies whose key is similar enough, with ``nearest`` only the most
    similar of them. Similarity is the cosine of the states at the prompt's last token, or in the learned
    space of the ``classifier``. ``keys (E, r)`` are the edits'; with ``owners`` each row is compared with its
    own edit's key only. ``opened`` is the decision for the first ``frozen`` edits.
    """

    def __init__(
        self,
        routing: Routing,
        classifier: TrainedScope | None,
        keys: torch.Tensor,
        owners: Owners | None = None,
        frozen: int = 0,
    ) -> None:
        self.nearest, self.latent = routing.scope_gate == "nearest", routing.scope_halves == "both"
        self.classifier, self.owners = classifier, owners
        threshold = routing.scope_threshold
        if classifier is not None and threshold is None:
            threshold = classifier.find_threshold(1 if owners is not None else len(keys))
        if threshold is None or (routing.scope_measure == "trained") != (classifier is not None):
            raise ValueError("scope_measure: trained needs a scope classifier, and cosine a scope_threshold")
        self.threshold = threshold
        self.directions = F.normalize(keys.float(), dim=-1)
        self.open = torch.zeros(0, len(keys), dtype=torch.bool)
        # Of each prompt with each edit, (B, E), or with its own edit only, (B, 1).
        self.similarity: torch.Tensor | None = None
        self.frozen, self.opened = frozen, OpenEdits.of(self.open)

    @property
    def scopes(self) -> torch.Tensor | None:
        """Each prompt's similarity with the nearest edit, ``(B)``; None before the first prompt."""
        return None if self.similarity is None else self.similarity.amax(1)

    @torch.no_grad()
    def decide(self, x: torch.Tensor, prompt: Prompt) -> None:
        """Sets ``open (B, E)`` and ``similarity`` by what enters the first edited layer, ``x (B, T, d)``."""
        rows = prompt.spread(len(x))
        end = rows.question_end
        if self.classifier is None:
            query = F.normalize(x[torch.arange(len(x), device=x.device), end].float(), dim=-1)
        else:
            places = torch.arange(x.shape[1], device=x.device)
            asked = rows.attention_mask.bool() & (places <= end[:, None])
            query = self.classifier.encoder(x, asked)
        if self.owners is None:
            similarity = query @ self.directions.T
        else:
            similarity = (query * self.directions[self.owners.index]).sum(-1, keepdim=True)
        self.open = select_edits(similarity, self.threshold, self.nearest)
        self.similarity = similarity
        self.opened = OpenEdits.of(self.open[:, : self.frozen])

    def list_allowed(self) -> torch.Tensor | None:
        """Which of a memory's last items, the edits' own, a prompt may retrieve, ``(B, E)``; None: all."""
        return self.open if self.latent else None


@dataclass
class LayerRuntime:
    """One layer: ``adapter`` shifts attention, ``extra`` adds ``(B, T, d)`` to the feed-forward network's
    output, and in the ``first`` edited layer the gate decides. ``owned``: whether the adapter's memory holds
    the edits' own items."""

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
    rows: int = 0

    def after_attention(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The attention's output, shifted; ``x`` is what enters the attention."""
        self.rows = len(x)
        if self._is_new():
            self._decide(x)
        if self.adapter is None or self.shift is None:
            return output
        return self.adapter.apply(x, output, self.shift)

    def _is_new(self) -> bool:
        """Whether a decision is due. Where the model is called by itself it always is: nothing says whether a
        pass goes on with an answer."""
        return self.decided != self.prompt.number or self.prompt.question_end is None

    def _decide(self, x: torch.Tensor) -> None:
        """Decides once per prompt, at its last token; the decision stays while the answer is decoded.

        Extra pairs alone decide nothing: they work in whatever way the model is called.
        """
        self.decided = self.prompt.number
        if self.gate is None and self.adapter is None:
            return
        end = self.prompt.spread(len(x)).question_end
        if self.gate is not None and self.first:
            self.gate.decide(x, self.prompt)
        if self.adapter is not None:
            allowed = None
            if self.gate is not None and self.owned:
                allowed = self.gate.list_allowed()
            self.shift = self.adapter.decide(x[torch.arange(len(x), device=x.device), end], allowed)
            if (weights := self.prompt.spread_weights(len(x))) is not None:
                self.shift = replace(self.shift, alpha=self.shift.alpha * weights.to(self.shift.alpha))
            self.trace[self.index] = self.shift

    def after_ffn(self, queries: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The feed-forward network's output, with what is added for its inputs ``queries``."""
        assert self.extra is not None
        # OPT hands its feed-forward network all rows' tokens in one dimension.
        batch = queries.reshape(self.rows, -1, queries.shape[-1])
        return output + self.extra(batch).reshape(output.shape)


@contextmanager
def run_layers(backbone: Backbone, runtimes: Mapping[int, LayerRuntime]) -> Iterator[None]:
    """Inside the block the layers run with their runtimes, given by layer."""
    afters: list[tuple[nn.Module, nn.Module, After]] = []
    for index, runtime in sorted(runtimes.items()):
        attention, ffn = backbone.layout.attention(index), backbone.layout.ffn(index)
        afters.append((attention.module, attention.module, runtime.after_attention))
        if runtime.extra is not None:
            afters.append((ffn.keys[0], ffn.value, runtime.after_ffn))
    with transform(afters):
        yield


def build_adapter(
    backbone: Backbone,
    index: int,
    routing: Routing,
    known: LayerKnowledge | None,
    own: Callable[[KnowledgeMemory], KnowledgeMemory],
) -> AdapterLayer | None:
    """The external half of a layer, None where it is off; ``own`` adds the edits' own items after those of
    the knowledge memory."""
    if routing.external != "latent":
        return None
    memory = KnowledgeMemory.empty(backbone.layout.width, backbone.device)
    if known is not None and routing.memory != "edit":
        memory = known.bank
    if routing.memory != "bank":
        memory = own(memory)
    return AdapterLayer(
        backbone.layout.attention(index),
        memory,
        None if known is None else known.semantic,
        routing.k,
        routing.alpha,
        routing.attention,
        routing.tau,
        routing.similarity_bias,
    )
