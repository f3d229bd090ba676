"""UniKE: extra key-value pairs and in-context knowledge states in the same last layers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from unike.backbones.base import Backbone, PrefixState
from unike.backbones.prefix import PrefixCache
from unike.edits import Edit, EditRecord, LayerShare, RoutedEdit, Routing
from unike.hooks import capture
from unike.hparams import HyperParams
from unike.knowledge.patch import KeyValuePatch, activation_loss, memory_loss
from unike.methods.base import Knowledge, edited_layers, register
from unike.methods.training import Trained, train_to_target
from unike.types import EditRequest


def uses_knowledge(hparams: HyperParams) -> bool:
    """Whether the bank or the encoders are read at all."""
    latent = hparams.external == "latent" and (hparams.memory != "edit" or hparams.alpha == "adaptive")
    zeta = hparams.intrinsic and hparams.zeta != "none" and hparams.beta > 0
    return latent or zeta or hparams.memory_loss > 0


@dataclass(frozen=True)
class OwnStates:
    """An edit's own states in one layer, from the base model: ``sem (d)`` at the prompt's end,
    ``pos (d)`` at the end of prompt + target, ``ffn (T, d)``, the feed-forward network's inputs
    that predict the answer."""

    sem: torch.Tensor
    pos: torch.Tensor
    ffn: torch.Tensor


@register("unike", uses_knowledge)
class UniKE:
    """Both halves and their couplings; every ablation is a switch of the YAML."""

    def __init__(self, hparams: HyperParams, knowledge: Knowledge) -> None:
        self.hparams = hparams
        self.knowledge = knowledge
        self.routing = Routing(**{k: getattr(hparams, k) for k in Routing.__dataclass_fields__})

    def layers(self, backbone: Backbone) -> list[int]:
        return edited_layers(self.hparams, backbone)

    def edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None = None
    ) -> RoutedEdit:
        """Inserts the edit's own pair in each layer's memory, then trains its patches, if any."""
        layers = self.layers(backbone)
        state = prefixes.state([request.query])
        states = own_states(backbone, state, layers)
        patches = self._patches(backbone, request, states) if self.hparams.intrinsic else {}
        shares = {i: LayerShare(s.sem, s.pos, patches.get(i)) for i, s in states.items()}
        shown = None
        if self.hparams.external == "prompt":
            shown = f"{request.query.prompt} {str(request.query.target).strip()}"
        record = EditRecord(request.id, shares, shown)
        edit = RoutedEdit((record,), self.routing, self.knowledge)
        if patches:
            if shown is not None:
                state = prefixes.state([edit.rewrite(request.query)])
            trained = self._train(backbone, state, patches, edit if history is None else history | edit)
            edit.info.update(steps=trained.steps, loss=trained.loss, reached=trained.reached)
        else:
            edit.info.update(steps=0)
        return edit

    def _patches(
        self, backbone: Backbone, request: EditRequest, states: dict[int, OwnStates]
    ) -> dict[int, KeyValuePatch]:
        """A fresh patch per layer, drawn from the run's seed and the edit's id."""
        generator = torch.Generator().manual_seed(self.hparams.seed + zlib.crc32(request.id.encode()))
        patches = {}
        for index, own in states.items():
            site = backbone.layout.ffn(index)
            zeta = self.knowledge[index].zeta if self.hparams.beta and index in self.knowledge else None
            patch = KeyValuePatch(
                backbone.layout.width, self.hparams.n_keys, site.activation, site.gated, zeta,
                self.hparams.beta, generator,
            ).to(backbone.device)  # fmt: skip
            if self.hparams.key_init == "query":
                patch.start_at_queries(own.ffn, generator=generator)
            patches[index] = patch
        return patches

    def _train(
        self, backbone: Backbone, state: PrefixState, patches: dict[int, KeyValuePatch], edit: Edit
    ) -> Trained:
        hp = self.hparams
        parameters = [p for patch in patches.values() for p in patch.parameters()]
        with ExitStack() as stack:
            stack.enter_context(edit.applied(backbone))
            extra = None
            if hp.activation_loss or hp.memory_loss:
                readers = {i: backbone.layout.ffn(i).keys[0] for i in patches}
                seen = stack.enter_context(capture(readers))
                extra = self._patcher_losses(patches, seen, state)
            trained = train_to_target(
                backbone, state, parameters, hp.lr, hp.max_steps, hp.stop_loss, hp.clip_norm, extra
            )
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        return trained

    def _patcher_losses(
        self, patches: dict[int, KeyValuePatch], seen: dict[int, torch.Tensor], state: PrefixState
    ) -> Callable[[], torch.Tensor]:
        """T-Patcher's activation and memory losses, weighted as in the YAML."""
        hp = self.hparams

        def loss() -> torch.Tensor:
            total = state.hidden.new_zeros((), dtype=torch.float32)
            for index, patch in patches.items():
                queries = seen[index].reshape(len(state), -1, seen[index].shape[-1])[:, :-1]
                if hp.activation_loss:
                    fired = patch.scores(queries[state.answer_mask].float())
                    total = total + hp.activation_loss * activation_loss(fired)
                if hp.memory_loss:
                    silent = patch.scores(self.knowledge[index].ffn_queries.float())
                    total = total + hp.memory_loss * memory_loss(silent)
            return total

        return loss


@torch.no_grad()
def own_states(backbone: Backbone, state: PrefixState, layers: list[int]) -> dict[int, OwnStates]:
    """Knowledge states of one query with its target (``state`` holds a single row)."""
    attention = {i: backbone.layout.attention(i).module for i in layers}
    readers = {i: backbone.layout.ffn(i).keys[0] for i in layers}
    with capture(attention) as x, capture(readers) as y:
        backbone.suffix(state)
    end = int(state.question_end[0])
    last = int(state.attention_mask[0].sum()) - 1
    out = {}
    for i in layers:
        ffn = y[i].reshape(*state.labels.shape, -1)[0, end:last]
        out[i] = OwnStates(x[i][0, end].clone(), x[i][0, last].clone(), ffn.clone())
    return out
