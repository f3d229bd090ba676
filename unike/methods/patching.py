"""Extra key-value pairs as UniKE and T-Patcher make and train them, and an edit's own states."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from unike.backbones.base import Backbone, PrefixState
from unike.edits import Edit
from unike.hooks import capture
from unike.hparams import HyperParams
from unike.knowledge.patch import KeyValuePatch, activation_loss, memory_loss
from unike.methods.base import Knowledge
from unike.methods.training import Trained, train_to_target
from unike.types import EditRequest


@dataclass(frozen=True)
class OwnStates:
    """An edit's own states in one layer, from the base model: ``asked (p + 1, d)`` of the prompt,
    ``sem (d)`` at its end, ``pos (d)`` at the end of prompt + target, ``ffn (T, d)``, the
    feed-forward network's inputs that predict the answer."""

    asked: torch.Tensor
    sem: torch.Tensor
    pos: torch.Tensor
    ffn: torch.Tensor


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
        asked = x[i][0, : end + 1].clone()
        out[i] = OwnStates(asked, asked[-1], x[i][0, last].clone(), ffn.clone())
    return out


def fresh_patches(
    backbone: Backbone,
    request: EditRequest,
    states: dict[int, OwnStates],
    hparams: HyperParams,
    knowledge: Knowledge,
) -> dict[int, KeyValuePatch]:
    """A patch per layer, drawn from the run's seed and the edit's id."""
    generator = torch.Generator().manual_seed(hparams.seed + zlib.crc32(request.id.encode()))
    patches = {}
    for index, own in states.items():
        site = backbone.layout.ffn(index)
        zeta = knowledge[index].zeta if hparams.beta and index in knowledge else None
        patch = KeyValuePatch(
            backbone.layout.width, hparams.n_keys, site.activation, site.gated, zeta, hparams.beta, generator
        ).to(backbone.device)
        if hparams.key_init == "query":
            patch.start_at_queries(own.ffn, generator=generator)
        patches[index] = patch
    return patches


def train_patches(
    backbone: Backbone,
    state: PrefixState,
    patches: dict[int, KeyValuePatch],
    edit: Edit,
    hparams: HyperParams,
    knowledge: Knowledge,
) -> Trained:
    """Trains the patches under ``edit``, which holds them, and freezes them."""
    parameters = [p for patch in patches.values() for p in patch.parameters()]
    with ExitStack() as stack:
        stack.enter_context(edit.applied(backbone))
        extra = None
        if hparams.activation_loss or hparams.memory_loss:
            readers = {i: backbone.layout.ffn(i).keys[0] for i in patches}
            seen = stack.enter_context(capture(readers))
            extra = patcher_losses(patches, seen, state, hparams, knowledge)
        trained = train_to_target(
            backbone, state, parameters, hparams.lr, hparams.max_steps, hparams.stop_loss, hparams.clip_norm,
            extra,
        )  # fmt: skip
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    return trained


def patcher_losses(
    patches: dict[int, KeyValuePatch],
    seen: dict[int, torch.Tensor],
    state: PrefixState,
    hparams: HyperParams,
    knowledge: Knowledge,
) -> Callable[[], torch.Tensor]:
    """T-Patcher's activation and memory losses, weighted as in the YAML."""

    def loss() -> torch.Tensor:
        total = state.hidden.new_zeros((), dtype=torch.float32)
        for index, patch in patches.items():
            queries = seen[index].reshape(len(state), -1, seen[index].shape[-1])[:, :-1]
            if hparams.activation_loss:
                fired = patch.scores(queries[state.answer_mask].float())
                total = total + hparams.activation_loss * activation_loss(fired)
            if hparams.memory_loss:
                silent = patch.scores(knowledge[index].ffn_queries.float())
                total = total + hparams.memory_loss * memory_loss(silent)
        return total

    return loss
