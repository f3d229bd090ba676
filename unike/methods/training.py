"""The gradient loop that UniKE, T-Patcher and fine-tuning share, and the one gradient of KE and MEND."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from unike.backbones.base import IGNORED, Backbone, PrefixState, answer_loss
from unike.edits import Edit
from unike.hooks import tape

K = TypeVar("K")


@dataclass(frozen=True)
class Trained:
    """``steps`` taken, the last ``loss``, and whether the target was ``reached``."""

    steps: int
    loss: float
    reached: bool


def train_to_target(
    backbone: Backbone,
    state: PrefixState,
    parameters: Sequence[torch.Tensor],
    lr: float,
    max_steps: int,
    stop_loss: float,
    clip_norm: float,
    extra_loss: Callable[[], torch.Tensor] | None = None,
) -> Trained:
    """``train`` where only the suffix must run at each step."""
    return train(
        lambda: backbone.suffix(state), state.labels, parameters, lr, max_steps, stop_loss, clip_norm,
        extra_loss,
    )  # fmt: skip


def train(
    logits_of: Callable[[], torch.Tensor],
    labels: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    lr: float,
    max_steps: int,
    stop_loss: float,
    clip_norm: float,
    extra_loss: Callable[[], torch.Tensor] | None = None,
) -> Trained:
    """Adam on the answer's negative log-likelihood until every target token is predicted and the
    loss is at most ``stop_loss``.

    ``logits_of`` is called at each step. Raises FloatingPointError where the loss is no longer a
    number.
    """
    optimiser = torch.optim.Adam(list(parameters), lr=lr)
    goal = labels[:, 1:]
    at = goal != IGNORED
    for step in range(max_steps + 1):
        logits = logits_of()
        loss = answer_loss(logits, labels).mean()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} after {step} steps")
        reached = bool((logits[:, :-1].argmax(-1) == goal)[at].all()) and value <= stop_loss
        if reached or step == max_steps:
            return Trained(step, value, reached)
        if extra_loss is not None:
            loss = loss + extra_loss()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters), clip_norm)
        optimiser.step()
    raise AssertionError("unreachable: the loop returns at its last step")


def answer_gradients(
    backbone: Backbone, state: PrefixState, modules: Mapping[K, nn.Module], history: Edit | None = None
) -> dict[K, tuple[torch.Tensor, torch.Tensor]]:
    """Input ``(T, in)`` and output gradient ``(T, out)`` of each linear module, by its key, for the
    answer's loss under ``history``; the module's weight gradient is their product, summed over ``T``.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if history is not None:
            stack.enter_context(history.applied(backbone))
        passed = stack.enter_context(tape(modules))
        loss = answer_loss(backbone.suffix(state), state.labels).mean()
    gradients = torch.autograd.grad(loss, [p.outputs for p in passed.values()])
    return {
        key: (p.inputs.detach().float().flatten(0, -2), d.float().flatten(0, -2))
        for (key, p), d in zip(passed.items(), gradients, strict=True)
    }
