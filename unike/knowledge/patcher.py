"""T-Patcher as published (Huang et al. 2023): its neurons, its losses, and when it stops.

The source is the paper, and where it is silent the release (ZeroYuHuang/Transformer-Patcher, commit fec629a).
``activation_loss`` and ``memory_loss`` of ``unike.knowledge.patch`` are another form of the same idea.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from unike.knowledge.patch import Activation, KeyValuePatch

# A validation is better than the best one before it where its loss is lower by more than this.
LEAST_GAIN = 1e-3


class NeuronPatch(KeyValuePatch):
    """Neurons in training: the values are ``values * amplifier``, and both factors ``(n, d)`` are trained.

    ``queries (n, d)`` are the feed-forward inputs at the wrong tokens, a neuron each. A key starts as
    ``q / |q|^2`` with a bias of 0: it scores 1 on its own query. Values are drawn from the standard normal
    distribution, the amplifier is constant. In a gated network, which the paper does not have, ``up`` starts
    as the key does.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        activation: Activation,
        gated: bool,
        amplify: float,
        generator: torch.Generator,
    ) -> None:
        count, width = queries.shape
        super().__init__(width, count, activation, gated, generator=generator)
        with torch.no_grad():
            found = queries.detach().float().cpu()
            keys = (found / found.norm(dim=-1, keepdim=True).clamp(min=1e-6) ** 2).T
            self.keys.copy_(keys)
            if self.up is not None:
                self.up.copy_(keys)
            self.values.copy_(torch.randn(count, width, generator=generator))
        self.amplifier = nn.Parameter(torch.full((count, width), float(amplify)))

    @property
    def edited_values(self) -> torch.Tensor:
        """The values as they are added, ``(n, d)``."""
        return self.values * self.amplifier

    @torch.no_grad()
    def freeze(self) -> KeyValuePatch:
        """The neurons as a plain patch, which adds the same."""
        width, count = self.keys.shape
        out = KeyValuePatch(width, count, self.activation, self.gated, generator=torch.Generator())
        own = {"keys": self.keys, "values": self.edited_values, "up": self.up, "bias": self.bias}
        kept = {name: tensor.detach().clone() for name, tensor in own.items() if tensor is not None}
        out.load_state_dict(kept, assign=True)
        return out.requires_grad_(False)


def activation_loss(active: torch.Tensor, top: int = 5) -> torch.Tensor:
    """The mean of the ``top`` largest ``exp(-a)``, of ``active (n)``: each neuron's score, before the
    activation, at its own token."""
    return _average_largest(torch.exp(-active), top)


def memory_loss(
    remembered: torch.Tensor, active: torch.Tensor, margin: float = 3.0, top: int = 1000
) -> torch.Tensor:
    """Two means of the ``top`` largest over memory and neurons: of ``exp(r - a + margin)`` and of
    ``exp(r + margin)``.

    ``remembered (M, n)`` are the neurons' scores on remembered queries, ``active (n)`` those at their own
    tokens. A remembered query shall score ``margin`` less than the neuron's own, and at most ``-margin``.
    """
    below_own = _average_largest(torch.exp(remembered - active + margin), top)
    return below_own + _average_largest(torch.exp(remembered + margin), top)


def _average_largest(values: torch.Tensor, top: int) -> torch.Tensor:
    """The mean of the ``top`` largest, or of all where there are fewer; 0 where there is none."""
    flat = values.flatten()
    return flat.topk(min(top, len(flat))).values.mean() if len(flat) else flat.new_zeros(())


def smoothed_loss(logits: torch.Tensor, wanted: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The answer's mean loss with ``smoothing``: of a token's probability mass, so much is spread evenly over
    all other tokens. ``logits (N, v)``, ``wanted (N)``."""
    # PyTorch spreads it over all tokens, the wanted one among them.
    tokens = logits.shape[-1]
    return F.cross_entropy(
        logits.float(), wanted, label_smoothing=min(smoothing * tokens / (tokens - 1), 1.0)
    )


def has_stalled(losses: Sequence[float], patience: int) -> bool:
    """Whether the best of these validations is ``patience`` or more before the last."""
    best = 0
    for place, loss in enumerate(losses):
        if loss < losses[best] - LEAST_GAIN:
            best = place
    return best < len(losses) - patience
