"""UniKE: extra key-value pairs and in-context knowledge states in the same last layers."""

from __future__ import annotations

import torch

from unike.backbones.base import Backbone
from unike.backbones.prefix import PrefixCache
from unike.edits import Edit, EditRecord, LayerShare, RoutedEdit, Routing
from unike.hparams import HyperParams
from unike.methods.base import Knowledge, edited_layers, register
from unike.methods.patching import fresh_patches, own_states, train_patches
from unike.types import EditRequest, UserError


def uses_knowledge(hparams: HyperParams) -> bool:
    """Whether the bank or the encoders are read at all."""
    latent = hparams.external == "latent" and (hparams.memory != "edit" or hparams.alpha == "adaptive")
    zeta = hparams.intrinsic and hparams.zeta != "none" and hparams.beta > 0
    return latent or zeta or hparams.memory_loss > 0 or measures_scope(hparams)


def measures_scope(hparams: HyperParams) -> bool:
    """Whether the gate uses the trained measure."""
    return hparams.scope_gate != "none" and hparams.scope_measure == "trained"


def check_scope(hparams: HyperParams) -> None:
    """UserError for a gate without a threshold to open at."""
    gated = hparams.scope_gate != "none" and not measures_scope(hparams)
    if gated and hparams.scope_threshold is None:
        at = f"{hparams.source}: scope_threshold: null"
        raise UserError(f"{at}; expected a number with scope_measure: {hparams.scope_measure}")


@register("unike", uses_knowledge, check=check_scope, needs_scope=measures_scope)
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
        patches = {}
        if self.hparams.intrinsic:
            patches = fresh_patches(backbone, request, states, self.hparams, self.knowledge)
        shares = {i: LayerShare(s.sem, s.pos, patches.get(i)) for i, s in states.items()}
        shown = None
        if self.hparams.external == "prompt":
            shown = f"{request.query.prompt} {str(request.query.target).strip()}"
        record = EditRecord(request.id, shares, shown, self._scope_key(layers[0], states[layers[0]].asked))
        edit = RoutedEdit((record,), self.routing, self.knowledge)
        if patches:
            if shown is not None:
                state = prefixes.state([edit.rewrite(request.query)])
            whole = edit if history is None else history | edit
            trained = train_patches(backbone, state, patches, whole, self.hparams, self.knowledge)
            edit.info.update(steps=trained.steps, loss=trained.loss, reached=trained.reached)
        else:
            edit.info.update(steps=0)
        return edit

    def _scope_key(self, first: int, asked: torch.Tensor) -> torch.Tensor | None:
        """Where the edit lies in the trained space of scope, ``(r)``."""
        if not measures_scope(self.hparams):
            return None
        measure = self.knowledge[first].scope
        assert measure is not None, "runs.prepare learns it first"
        return measure.encoder(asked[None], torch.ones(1, len(asked), dtype=torch.bool, device=asked.device))[
            0
        ]
