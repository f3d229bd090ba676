"""The gradient loop that UniKE, T-Patcher and fine-tuning share, and the one gradient of KE and MEND."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import nn

from unike.backbones.base import IGNORED, Backbone, PrefixState, answer_loss
from unike.backbones.hooks import tape
from unike.config.sections import EditTrainingOptions
from unike.edits import Edit

K = TypeVar("K")


@dataclass(frozen=True)
class Trained:
    """``steps`` taken, the last ``loss``, and whether the target was ``reached``."""

    steps: int
    loss: float
    reached: bool


@dataclass(frozen=True)
class Limits:
    """When training an edit ends, and how large its steps are: the YAML's keys of the same names."""

    lr: float
    max_steps: int
    stop_loss: float
    clip_norm: float

    @classmethod
    def of(cls, hparams: EditTrainingOptions) -> Limits:
        return cls(hparams.lr, hparams.max_steps, hparams.stop_loss, hparams.clip_norm)


class Learner(Protocol):
    """What is trained: a batch of ``B`` independent edits, a row each."""

    def parameters(self) -> Sequence[torch.Tensor]:
        """Each ``(B, ...)``; of a single edit in any shape."""
        ...

    def logits(self) -> torch.Tensor:
        """``(N, v)``, what predicts the rows' answer tokens, row after row."""
        ...

    def extra_loss(self) -> torch.Tensor | None:
        """``(B)``, added to the answer's; called after ``logits``."""
        ...

    def keep(self, rows: torch.Tensor) -> None:
        """Trains these rows alone from now on, in parameters of their own; the others are finished."""
        ...


def train(learner: Learner, labels: torch.Tensor, limits: Limits) -> list[Trained | FloatingPointError]:
    """Adam on each row's answer's mean negative log-likelihood, ``labels (B, s)``, until every target
    token is predicted and the loss is at most ``stop_loss``; clipped, and stopped, row by row.

    A row whose loss is no longer a number ends with a FloatingPointError in its place.
    """
    parameters = list(learner.parameters())
    optimiser = torch.optim.Adam(parameters, lr=limits.lr)
    found: dict[int, Trained | FloatingPointError] = {}
    rows = list(range(len(labels)))
    for step in range(limits.max_steps + 1):
        losses, right = _score_rows(learner.logits(), labels)
        values, rights = losses.tolist(), right.tolist()
        staying = []
        for i, (row, value) in enumerate(zip(rows, values, strict=True)):
            reached = rights[i] and value <= limits.stop_loss
            if not math.isfinite(value):
                found[row] = FloatingPointError(f"the loss is {value} after {step} steps")
            elif reached or step == limits.max_steps:
                found[row] = Trained(step, value, reached)
            else:
                staying.append(i)
        chosen = torch.tensor(staying, dtype=torch.long, device=labels.device)
        if staying:
            extra = learner.extra_loss()
            total = losses if extra is None else losses + extra
            optimiser.zero_grad(set_to_none=True)
            total[chosen].sum().backward()
        if len(staying) < len(rows):
            parameters = _drop_rows(learner, optimiser, parameters, chosen)
            labels, rows = labels[chosen], [rows[i] for i in staying]
        if not staying:
            break
        _clip(parameters, len(rows), limits.clip_norm)
        optimiser.step()
    return [found[row] for row in sorted(found)]


def _score_rows(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's mean loss, and whether all of its answer tokens are predicted."""
    goal = labels[:, 1:]
    at = goal != IGNORED
    row, wanted = at.nonzero()[:, 0], goal[at]
    nll = nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
    losses = nll.new_zeros(len(labels)).index_add(0, row, nll) / at.sum(1)
    wrong = torch.zeros_like(losses).index_add(0, row, (logits.argmax(-1) != wanted).to(losses.dtype))
    return losses, wrong == 0


def _drop_rows(
    learner: Learner, optimiser: torch.optim.Adam, parameters: Sequence[torch.Tensor], rows: torch.Tensor
) -> list[torch.Tensor]:
    """Drops all but ``rows``, with their gradients and moments; the parameters that are left."""
    learner.keep(rows)
    left = list(learner.parameters())
    if not len(rows):
        return left
    for former, parameter in zip(parameters, left, strict=True):
        parameter.grad = None if former.grad is None else former.grad[rows]
        state = optimiser.state.pop(former, {})
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name] = state[name][rows]
        optimiser.state[parameter] = state
    optimiser.param_groups[0]["params"] = left
    return left


def _clip(parameters: Sequence[torch.Tensor], rows: int, limit: float) -> None:
    """Each row's gradient, over all parameters, to a norm of at most ``limit``."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([g.reshape(rows, -1).norm(dim=1) for g in gradients]).norm(dim=0)
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.view(rows, *[1] * (gradient.ndim - 1)))


def compute_answer_gradients(
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
