"""GRACE (Hartvigsen et al. 2023): a codebook at one layer, whose values are trained and whose weights stay.

``grace_radius: balanced`` is BalancEdit's radius (2025): between the distance of a rephrased prompt from the
key, and that of the same prompt with a black image.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import cast

import torch
from PIL import Image
from torch import nn

from unike.backbones.base import Backbone, PrefixState, narrow
from unike.backbones.hooks import capture
from unike.backbones.prefix import PrefixCache
from unike.datasets.images import open_image
from unike.edits import CodebookEdit, CodebookEntry, Edit
from unike.edits.codebook import Ball, find_nearest, measure_distances, replace_outputs
from unike.methods.base import EditMethod, unwrap
from unike.methods.training import Limits, Trained, train
from unike.types import EditRequest, ImageLike, Query, UserError

# Sides of the black image where the request's own has no size yet.
_BLACK_SIDE = 224


class GRACE(EditMethod):
    """Trains one value for each edit. What happens where edits meet is the codebook's rule."""

    def _edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None
    ) -> CodebookEdit:
        return unwrap(self._make_edits(backbone, [request], prefixes, history)[0])

    def _edit_many(
        self, backbone: Backbone, requests: Sequence[EditRequest], prefixes: PrefixCache
    ) -> list[CodebookEdit | FloatingPointError]:
        return self._make_edits(backbone, requests, prefixes, None)

    def _make_edits(
        self,
        backbone: Backbone,
        requests: Sequence[EditRequest],
        prefixes: PrefixCache,
        history: Edit | None,
    ) -> list[CodebookEdit | FloatingPointError]:
        (layer,) = self.layers(backbone)
        # Keys do not depend on what else is in the batch.
        keys = [_read_key(backbone, layer, prefixes, r.query, history) for r in requests]
        radii = [
            self._find_radius(backbone, layer, prefixes, request, key)
            for request, key in zip(requests, keys, strict=True)
        ]
        state = prefixes.state([self.write_lesson(r) for r in requests])
        starts = self._start_values(backbone, layer, requests, keys)
        for i, (request, key, radius) in enumerate(zip(requests, keys, radii, strict=True)):
            if (ball := _find_own_ball(history, layer, request, key, radius)) is not None:
                starts[i] = ball.value
        learner = _Values(backbone, layer, state, starts, history)
        trained = train(learner, state.labels, Limits.of(self.hparams))
        out: list[CodebookEdit | FloatingPointError] = []
        for request, key, radius, how, value in zip(
            requests, keys, radii, trained, learner.finished, strict=True
        ):
            if isinstance(how, Trained):
                entry = CodebookEntry(request.id, str(request.query.target), key, value, radius)
                out.append(CodebookEdit((entry,), layer, vars(how) | {"radius": radius}))
            else:
                out.append(how)
        return out

    def _find_radius(
        self,
        backbone: Backbone,
        layer: int,
        prefixes: PrefixCache,
        request: EditRequest,
        key: torch.Tensor,
    ) -> float:
        """``grace_eps``, or ``(1 - a) d(rephrased, key) + a d(black image, key)``; without an image there is
        no black one."""
        hp, query = self.hparams, request.query
        if hp.grace_radius == "fixed" or query.image is None:
            return hp.grace_eps
        near = replace(query, prompt=hp.grace_rephrase.replace("{}", query.prompt))
        far = replace(query, image=paint_black(query.image))
        states = torch.stack([_read_key(backbone, layer, prefixes, q, None) for q in (near, far)])
        positive, negative = measure_distances(states, key[None])[:, 0].tolist()
        return balance_radius(positive, negative, hp.grace_balance)

    def _start_values(
        self, backbone: Backbone, layer: int, requests: Sequence[EditRequest], keys: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """``(B, d)``: drawn from the run's seed and the edit's id, or what the network gives there."""
        if self.hparams.grace_init == "warm":
            module = cast(nn.Linear, backbone.layout.ffn(layer).value)
            with torch.no_grad():
                return torch.stack([module(key[None].to(module.weight.dtype))[0].float() for key in keys])
        values = [self._draw(request.id, backbone.layout.width) for request in requests]
        return torch.stack(values).to(keys[0])

    def _draw(self, name: str, width: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.hparams.seed + zlib.crc32(name.encode()))
        return torch.rand(width, generator=generator)


def _find_own_ball(
    history: Edit | None, layer: int, request: EditRequest, key: torch.Tensor, radius: float
) -> Ball | None:
    """The ball of ``history`` with the same target, which will expand to the new key."""
    for balls in _iterate_codebooks(history, layer):
        distances = measure_distances(key[None], torch.stack([ball.key for ball in balls]))
        ball = balls[int(find_nearest(distances)[0])]
        if distances.amin().item() <= ball.radius + radius and ball.target == request.query.target:
            return ball
    return None


def _iterate_codebooks(history: Edit | None, layer: int) -> Iterator[Sequence[Ball]]:
    for part in () if history is None else history.parts:
        if isinstance(part, CodebookEdit) and part.layer == layer:
            yield part.balls


def balance_radius(positive: float, negative: float, balance: float) -> float:
    """BalancEdit's radius from the distances of a prompt that the edit is for, and of one that it is not."""
    return (1 - balance) * positive + balance * negative


def paint_black(image: ImageLike) -> Image.Image:
    """A black image of the size of the given one."""
    try:
        size = image.size if isinstance(image, Image.Image) else open_image(image).size
    except UserError:
        # Already as the model reads it.
        size = (_BLACK_SIDE, _BLACK_SIDE)
    return Image.new("RGB", size)


@torch.no_grad()
def _read_key(
    backbone: Backbone, layer: int, prefixes: PrefixCache, query: Query, history: Edit | None
) -> torch.Tensor:
    """What enters the last projection at the end of a prompt, ``(w)``."""
    state = prefixes.state([replace(query, target=None)])
    module = {"value": backbone.layout.ffn(layer).value}
    with ExitStack() as stack:
        if history is not None:
            stack.enter_context(history.applied(backbone))
        seen = stack.enter_context(capture(module))
        backbone.suffix_hidden(state)
    inputs = seen["value"].reshape(*state.labels.shape, -1)
    return inputs[0, int(state.question_end[0])].float().clone()


class _Values:
    """Values of independent edits in training, ``(B, d)``, a row of ``state`` each."""

    def __init__(
        self,
        backbone: Backbone,
        layer: int,
        state: PrefixState,
        starts: torch.Tensor,
        history: Edit | None,
    ) -> None:
        self.backbone, self.layer, self.state, self.history = backbone, layer, state, history
        self.values = starts.clone().requires_grad_()
        self.rows = list(range(len(starts)))
        self.finished: list[torch.Tensor] = list(starts)

    def parameters(self) -> list[torch.Tensor]:
        return [self.values]

    def logits(self) -> torch.Tensor:
        def choose(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.ones(len(states), dtype=torch.bool, device=states.device), self.values

        with ExitStack() as stack:
            if self.history is not None:
                stack.enter_context(self.history.applied(self.backbone))
            stack.enter_context(replace_outputs(self.backbone, self.layer, choose))
            return self.backbone.answer_logits(self.state)

    def extra_loss(self) -> None:
        return None

    def keep(self, rows: torch.Tensor) -> None:
        staying = rows.tolist()
        for i, row in enumerate(self.rows):
            if i not in staying:
                self.finished[row] = self.values.detach()[i].clone()
        self.rows = [self.rows[i] for i in staying]
        self.values = self.values.detach()[rows].requires_grad_()
        if staying:
            self.state = narrow(self.backbone, self.state, rows)
