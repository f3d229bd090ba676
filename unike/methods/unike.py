"""UniKE: extra key-value pairs and in-context knowledge states in the same last layers."""

from __future__ import annotations

from unike.backbones.base import Backbone
from unike.backbones.prefix import PrefixCache
from unike.edits import Edit, EditRecord, LayerShare, RoutedEdit, Routing
from unike.hparams import HyperParams
from unike.methods.base import Knowledge, edited_layers, register
from unike.methods.patching import fresh_patches, own_states, train_patches
from unike.types import EditRequest


def uses_knowledge(hparams: HyperParams) -> bool:
    """Whether the bank or the encoders are read at all."""
    latent = hparams.external == "latent" and (hparams.memory != "edit" or hparams.alpha == "adaptive")
    zeta = hparams.intrinsic and hparams.zeta != "none" and hparams.beta > 0
    return latent or zeta or hparams.memory_loss > 0


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
        patches = {}
        if self.hparams.intrinsic:
            patches = fresh_patches(backbone, request, states, self.hparams, self.knowledge)
        shares = {i: LayerShare(s.sem, s.pos, patches.get(i)) for i, s in states.items()}
        shown = None
        if self.hparams.external == "prompt":
            shown = f"{request.query.prompt} {str(request.query.target).strip()}"
        record = EditRecord(request.id, shares, shown)
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
