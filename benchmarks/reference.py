"""The reference for UniKE's edits: the procedure as published, written naively.

The whole model with its vision encoder runs at every training step and at every probe, before and after the
edit. The edited layers' feed-forward weights are concatenated with the extra pairs at each forward pass.
Nothing is cached between passes, and records are edited one at a time. Optimiser, initial patches, stopping
rule and retrieval are those of ``unike``, so both must give the same results. As in the published loaders,
images are opened and normalised once per record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from unike.backbones.base import IGNORED, Batch
from unike.backbones.hooks import capture
from unike.backbones.vlm import VisionLanguageBackbone
from unike.edits import EditRecord, LayerShare, RoutedEdit
from unike.knowledge.patch import KeyValuePatch
from unike.methods.patching import OwnStates, draw_patches
from unike.methods.unike import UniKE
from unike.types import Case, Query


@dataclass(frozen=True)
class ReferenceRecord:
    """A record of the reference: ``losses`` before each step and after the last; the logits at each probe's
    answer positions ``(T, v)``, ``before`` and ``after`` the edit."""

    losses: list[float]
    before: list[torch.Tensor]
    after: list[torch.Tensor]

    @property
    def steps(self) -> int:
        return len(self.losses) - 1


class WholeModel:
    """A backbone run on one query at a time, from the pixels on; ``passes`` counts the forward passes."""

    def __init__(self, backbone: VisionLanguageBackbone) -> None:
        self.backbone, self.passes = backbone, 0
        self._opened: dict[int, torch.Tensor] = {}

    def open(self, queries: Sequence[Query]) -> None:
        """Normalises the images of a record, and forgets those of the last record."""
        shown = [q.image for q in queries if q.image is not None]
        self._opened = {id(image): self.backbone.vision.pixels(image)["pixel_values"] for image in shown}

    def __call__(self, query: Query) -> tuple[torch.Tensor, Batch]:
        """Logits ``(1, s, v)`` of a query with its target, and its batch."""
        self.passes += 1
        batch = self.encode(query)
        return self.backbone(batch).logits, batch

    def encode(self, query: Query) -> Batch:
        """The query's embeddings: vision encoder, Q-Former, projection, tokens."""
        backbone, model = self.backbone, self.backbone.model
        embed = model.language_model.get_input_embeddings()
        asked, answer = backbone.prompt_and_answer(query.prompt, query.target)

        def words(ids: list[int]) -> torch.Tensor:
            return embed(torch.tensor([ids], dtype=torch.long, device=backbone.device))

        parts = [words(asked + answer)]
        if query.image is not None:
            seen = model.get_image_features(
                self._opened[id(query.image)][None].to(backbone.device, model.vision_model.dtype)
            ).pooler_output
            before, after = backbone.dialogue.before_image, backbone.dialogue.after_image
            parts = [words(backbone.tokens(before)), seen, words(backbone.tokens(after)), *parts]
        embeds = torch.cat([p.to(backbone.dtype) for p in parts], dim=1)
        labels = torch.full(embeds.shape[:2], IGNORED, device=backbone.device)
        labels[0, -len(answer) :] = torch.tensor(answer, device=backbone.device)
        end = torch.tensor([embeds.shape[1] - len(answer) - 1], device=backbone.device)
        return Batch(embeds, torch.ones_like(labels), labels, end, (query.prompt,))


def select_answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The logits ``(T, v)`` that predict one row's answer tokens; ``logits (s, v)``, ``labels (s)``."""
    return logits[:-1][labels[1:] != IGNORED].float()


class Reference:
    """Edits one case at a time with ``method``'s settings, seed and knowledge.

    Raises ValueError unless the method is the paper's preset: both halves, no gate, none of T-Patcher's
    losses.
    """

    def __init__(self, backbone: VisionLanguageBackbone, method: UniKE) -> None:
        hp = method.hparams
        if not (hp.intrinsic and hp.external == "latent" and hp.scope_gate == "none"):
            raise ValueError("the reference has both halves and no gate")
        if hp.activation_loss or hp.memory_loss:
            raise ValueError("the reference has only the answer's loss")
        self.backbone, self.method, self.hparams = backbone, method, hp
        self.whole = WholeModel(backbone)

    def record(self, case: Case, nudge: float = 0.0) -> ReferenceRecord:
        """One edit from the base model, with all of the case's probes before and after.

        ``nudge`` changes the first keys by that share, to measure the effect of rounding alone.

        Raises FloatingPointError if the loss is no longer a number.
        """
        queries = [p.query for p in case.probes]
        self.whole.open([case.request.query, *queries])
        before = [self.compute_logits(q) for q in queries]
        states = self.compute_own_states(case.request.query)
        patches = draw_patches(self.backbone, case.request, states, self.hparams, self.method.knowledge)
        for patch in patches.values():
            patch.keys.data.mul_(1 + nudge)
        shares = {i: LayerShare(s.sem, s.pos) for i, s in states.items()}
        # Without patches a routed edit is only the attention shift.
        shift = RoutedEdit((EditRecord(case.request.id, shares),), self.method.routing, self.method.knowledge)
        with shift.applied(self.backbone), concatenate_patches(self.backbone, patches):
            losses = self.train(case.request.query, patches)
            after = [self.compute_logits(q) for q in queries]
        return ReferenceRecord(losses, before, after)

    @torch.no_grad()
    def compute_logits(self, query: Query) -> torch.Tensor:
        """Logits at the answer's positions, ``(T, v)``."""
        logits, batch = self.whole(query)
        return select_answers(logits[0], batch.labels[0])

    @torch.no_grad()
    def compute_own_states(self, query: Query) -> dict[int, OwnStates]:
        """The states for the edit's own pair and its first keys, from a whole pass."""
        layers, layout = self.method.layers(self.backbone), self.backbone.layout
        attention = {i: layout.attention(i).module for i in layers}
        with capture(attention) as x, capture({i: layout.ffn(i).keys[0] for i in layers}) as y:
            _, batch = self.whole(query)
        end = int(batch.question_end)
        states = {}
        for i in layers:
            asked = x[i][0, : end + 1]
            states[i] = OwnStates(asked, asked[-1], x[i][0, -1], y[i].flatten(0, -2)[end:-1])
        return states

    def train(self, query: Query, patches: Mapping[int, KeyValuePatch]) -> list[float]:
        """Adam on the answer's loss through whole passes; the loss before each step and at the end."""
        hp, losses = self.hparams, []
        parameters = [p for patch in patches.values() for p in patch.parameters()]
        optimiser = torch.optim.Adam(parameters, lr=hp.lr)
        while True:
            logits, batch = self.whole(query)
            answers, goal = select_answers(logits[0], batch.labels[0]), batch.labels[batch.labels != IGNORED]
            loss = F.cross_entropy(answers, goal)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} after {len(losses) - 1} steps")
            reached = bool((answers.argmax(-1) == goal).all()) and losses[-1] <= hp.stop_loss
            if reached or len(losses) > hp.max_steps:
                return losses
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, hp.clip_norm)
            optimiser.step()


@contextmanager
def concatenate_patches(
    backbone: VisionLanguageBackbone, patches: Mapping[int, KeyValuePatch]
) -> Iterator[None]:
    """Feed-forward networks run on ``[W_K; keys]`` and ``[W_V; values]``, concatenated at each forward."""
    with ExitStack() as stack:
        for index, patch in patches.items():
            site = backbone.layout.ffn(index)
            first = [patch.keys] if patch.up is None else [patch.keys, patch.up]
            for linear, extra in zip(site.keys, first, strict=True):
                _swap(stack, linear, _make_keys_forward(linear, extra, patch.bias))
            _swap(stack, site.value, _make_values_forward(site.value, patch))
        yield


def _swap(stack: ExitStack, module: nn.Module, forward: Any) -> None:
    # An instance's own ``forward`` hides the class's until it is deleted.
    module.forward = forward
    stack.callback(delattr, module, "forward")


def _make_keys_forward(linear: Any, keys: nn.Parameter, bias: nn.Parameter | None) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        weight = torch.cat([linear.weight, keys.T.to(linear.weight.dtype)])
        if linear.bias is None:
            return F.linear(x, weight)
        extra = linear.bias.new_zeros(keys.shape[1]) if bias is None else bias.to(linear.bias.dtype)
        return F.linear(x, weight, torch.cat([linear.bias, extra]))

    return forward


def _make_values_forward(linear: Any, patch: KeyValuePatch) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        values = patch.edited_values.T.to(linear.weight.dtype)
        return F.linear(x, torch.cat([linear.weight, values], dim=1), linear.bias)

    return forward
