"""Fine-tuning, the plain baseline: of the last decoder layer, or of the vision projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from unike.backbones.base import IGNORED, Backbone, PrefixState, encode_queries, narrow
from unike.backbones.prefix import PrefixCache
from unike.edits import Edit
from unike.edits.deltas import WeightBatch, WeightDelta, make_master
from unike.methods.base import EditMethod, unwrap
from unike.methods.training import Limits, Trained, train
from unike.types import EditRequest, Query, UserError


class FineTuning(EditMethod):
    """Trains the weights of the YAML's ``layers`` (one, as published) until the target is predicted.

    With ``ft_target: projection`` it trains what carries the image into the decoder instead, as MMEdit
    does; each step then runs the whole decoder, and ``layers`` are left as they are.
    """

    def _edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None
    ) -> WeightDelta:
        """New values of the weights, started from those of ``history``."""
        former = {} if history is None else history.weights
        start = {name: former.get(name, p).detach() for name, p in self._find_trained(backbone).items()}
        if self.hparams.ft_target == "layers":
            state = prefixes.state([self.write_lesson(request)])
            return unwrap(self._train(_LayerWeights(backbone, state, start, 1), state.labels)[0])
        if request.query.image is None:
            raise UserError(f"edit {request.id}: has no image; ft_target: projection needs one")
        lesson = self.write_lesson(request)
        learner = _ProjectionWeights(backbone, lesson, start)
        return unwrap(self._train(learner, encode_queries(backbone, [lesson]).labels)[0])

    def _edit_many(
        self, backbone: Backbone, requests: Sequence[EditRequest], prefixes: PrefixCache
    ) -> Sequence[Edit | FloatingPointError]:
        """The layers' edits batched, the projection's one by one."""
        if self.hparams.ft_target == "layers":
            state = prefixes.state([self.write_lesson(r) for r in requests])
            start = {name: p.detach() for name, p in self._find_trained(backbone).items()}
            return self._train(_LayerWeights(backbone, state, start, len(requests)), state.labels)
        return super()._edit_many(backbone, requests, prefixes)

    def _find_trained(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        modules: list[nn.Module] = [backbone.projection]
        if self.hparams.ft_target == "layers":
            modules = [backbone.layout.layer(i) for i in self.layers(backbone)]
        own = {id(p) for module in modules for p in module.parameters()}
        return {name: p for name, p in backbone.model.named_parameters() if id(p) in own}

    def _train(
        self, learner: _LayerWeights | _ProjectionWeights, labels: torch.Tensor
    ) -> list[WeightDelta | FloatingPointError]:
        out: list[WeightDelta | FloatingPointError] = []
        for how, weights in zip(
            train(learner, labels, Limits.of(self.hparams)), learner.finished, strict=True
        ):
            if isinstance(how, Trained):
                info = {"steps": how.steps, "loss": how.loss, "reached": how.reached}
                out.append(WeightDelta(weights, info))
            else:
                out.append(how)
        return out


class _LayerWeights:
    """Weights of ``count`` edits in training, one per row of ``state``; ``finished`` takes the results."""

    def __init__(
        self, backbone: Backbone, state: PrefixState, start: Mapping[str, torch.Tensor], count: int
    ) -> None:
        self.backbone, self.state = backbone, state
        self.together = WeightBatch([start] * count, trained=True)
        self.rows = list(range(count))
        self.finished: list[dict[str, torch.Tensor]] = [{} for _ in self.rows]

    def parameters(self) -> list[torch.Tensor]:
        return list(self.together.weights.values())

    def logits(self) -> torch.Tensor:
        owners = torch.arange(len(self.rows), device=self.state.labels.device)
        with self.together.applied(self.backbone, owners):
            return self.backbone.answer_logits(self.state)

    def extra_loss(self) -> None:
        return None

    def keep(self, rows: torch.Tensor) -> None:
        staying = rows.tolist()
        for i, row in enumerate(self.rows):
            if i not in staying:
                self.finished[row] = self.together.round_row(i)
        self.rows = [self.rows[i] for i in staying]
        self.together.keep(rows)
        if staying:
            self.state = narrow(self.backbone, self.state, rows)


class _ProjectionWeights:
    """The vision projection in training: each step runs the whole decoder."""

    def __init__(self, backbone: Backbone, query: Query, start: Mapping[str, torch.Tensor]) -> None:
        self.backbone, self.query = backbone, query
        self.weights = {name: make_master(tensor.clone()) for name, tensor in start.items()}
        self.types = {name: tensor.dtype for name, tensor in start.items()}
        self.finished = [dict[str, torch.Tensor]()]

    def parameters(self) -> list[torch.Tensor]:
        return list(self.weights.values())

    def logits(self) -> torch.Tensor:
        with WeightDelta(self._round()).applied(self.backbone):
            batch = encode_queries(self.backbone, [self.query])
            return self.backbone(batch).logits[:, :-1][batch.labels[:, 1:] != IGNORED]

    def extra_loss(self) -> None:
        return None

    def keep(self, rows: torch.Tensor) -> None:
        self.finished = [{name: w.detach() for name, w in self._round().items()}]

    def _round(self) -> dict[str, torch.Tensor]:
        """The masters in the model's types."""
        return {name: w.to(self.types[name]) for name, w in self.weights.items()}
