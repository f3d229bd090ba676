"""Fine-tuning of the last decoder layer: the field's plain baseline."""

from __future__ import annotations

from torch import nn

from unike.backbones.base import Backbone
from unike.backbones.prefix import PrefixCache
from unike.edits import Edit, WeightDelta
from unike.hparams import HyperParams
from unike.methods.base import Knowledge, edited_layers, register
from unike.methods.training import train_to_target
from unike.types import EditRequest


@register("ft")
class FineTuning:
    """Trains the weights of the YAML's ``layers`` (one, as published) until the target is predicted."""

    def __init__(self, hparams: HyperParams, knowledge: Knowledge) -> None:
        self.hparams = hparams

    def layers(self, backbone: Backbone) -> list[int]:
        return edited_layers(self.hparams, backbone)

    def edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None = None
    ) -> WeightDelta:
        """New values of the layers' weights, started from those of ``history``."""
        hp = self.hparams
        former = history.weights if isinstance(history, WeightDelta) else {}
        weights: dict[str, nn.Parameter] = {}
        for name, parameter in backbone.model.named_parameters():
            if any(
                parameter is own
                for i in self.layers(backbone)
                for own in backbone.layout.layer(i).parameters()
            ):
                start = former.get(name, parameter)
                weights[name] = nn.Parameter(start.detach().clone())
        edit = WeightDelta(weights)
        with edit.applied(backbone):
            trained = train_to_target(
                backbone, prefixes.state([request.query]), list(weights.values()), hp.lr, hp.max_steps,
                hp.stop_loss, hp.clip_norm,
            )  # fmt: skip
        edit.info.update(steps=trained.steps, loss=trained.loss, reached=trained.reached)
        for parameter in weights.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        return edit
