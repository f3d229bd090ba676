"""Fine-tuning, the field's plain baseline: of the last decoder layer, or of the vision projection."""

from __future__ import annotations

from torch import nn

from unike.backbones.base import Backbone, encode_queries
from unike.backbones.prefix import PrefixCache
from unike.deltas import WeightDelta
from unike.edits import Edit
from unike.hparams import HyperParams
from unike.methods.base import Knowledge, edited_layers, register
from unike.methods.training import Trained, train, train_to_target
from unike.types import EditRequest, UserError


def _has_plain_weights(hparams: HyperParams) -> None:
    if hparams.quantization != "none" and hparams.ft_target == "layers":
        raise UserError(
            f"{hparams.source}: method: ft trains the weights of `layers`; expected quantization: none, "
            "or ft_target: projection"
        )


@register("ft", check=_has_plain_weights)
class FineTuning:
    """Trains the weights of the YAML's ``layers`` (one, as published) until the target is predicted.

    With ``ft_target: projection`` it trains what carries the picture into the decoder instead, as
    MMEdit does; each step then runs the whole decoder.
    """

    def __init__(self, hparams: HyperParams, knowledge: Knowledge) -> None:
        self.hparams = hparams

    def layers(self, backbone: Backbone) -> list[int]:
        """The trained layers, or the last ones, untouched, where the projection is trained."""
        return edited_layers(self.hparams, backbone)

    def edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None = None
    ) -> WeightDelta:
        """New values of the weights, started from those of ``history``."""
        former = history.weights if isinstance(history, WeightDelta) else {}
        own = {id(p) for module in self._trained(backbone) for p in module.parameters()}
        weights: dict[str, nn.Parameter] = {}
        for name, parameter in backbone.model.named_parameters():
            if id(parameter) in own:
                start = former.get(name, parameter)
                weights[name] = nn.Parameter(start.detach().clone())
        edit = WeightDelta(weights)
        with edit.applied(backbone):
            trained = self._train(backbone, request, prefixes, list(weights.values()))
        edit.info.update(steps=trained.steps, loss=trained.loss, reached=trained.reached)
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
        return edit

    def _trained(self, backbone: Backbone) -> list[nn.Module]:
        if self.hparams.ft_target == "projection":
            return [backbone.projection]
        return [backbone.layout.layer(i) for i in self.layers(backbone)]

    def _train(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, weights: list[nn.Parameter]
    ) -> Trained:
        hp, query = self.hparams, request.query
        limits = (hp.lr, hp.max_steps, hp.stop_loss, hp.clip_norm)
        if hp.ft_target == "layers":
            return train_to_target(backbone, prefixes.state([query]), weights, *limits)
        if query.image is None:
            raise UserError(f"edit {request.id}: has no picture; ft_target: projection needs one")
        labels = encode_queries(backbone, [query]).labels
        return train(lambda: backbone(encode_queries(backbone, [query])).logits, labels, weights, *limits)
