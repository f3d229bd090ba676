"""The intrinsic half: extra key-value pairs beside a frozen feed-forward network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

Activation = Callable[[torch.Tensor], torch.Tensor]
# T-Patcher's keys answer their own query with 1; the bias keeps what is less alike below zero.
QUERY_BIAS = -0.7


class KeyValuePatch(nn.Module):
    """``n`` extra pairs: ``act(q W_K + b_K) (W_V + beta * W_zeta zeta)``, Eq. (3).

    ``W_K (d, n)``, ``b_K (n)``, ``W_V (n, d)``, ``W_zeta (d_zeta, d)``; where the network is gated,
    ``act(q W_gate) * (q W_up)`` stands in place of ``act(q W_K + b_K)``. Parameters are fp32
    whatever the base model's type. At ``W_V = 0`` and ``beta = 0`` the patch adds exact zeros.
    """

    def __init__(
        self,
        width: int,
        n_keys: int,
        activation: Activation,
        gated: bool = False,
        zeta: torch.Tensor | None = None,
        beta: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gated = gated
        self.beta = beta if zeta is not None else 0.0
        scale = width**-0.5

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * scale)

        self.keys = draw(width, n_keys)
        self.up = draw(width, n_keys) if gated else None
        self.bias = None if gated else nn.Parameter(torch.zeros(n_keys))
        self.values = nn.Parameter(torch.zeros(n_keys, width))
        self.zeta_projection = nn.Parameter(torch.zeros(len(zeta), width)) if zeta is not None else None
        self.zeta: torch.Tensor | None
        self.register_buffer("zeta", None if zeta is None else zeta.detach().float())

    @torch.no_grad()
    def start_at_queries(
        self, queries: torch.Tensor, noise: float = 0.1, generator: torch.Generator | None = None
    ) -> None:
        """T-Patcher's initialisation: each key is ``q / |q|^2`` of one of the edit's own FFN inputs
        ``(T, d)``, with a little noise so that keys of one query differ."""
        n_keys = self.keys.shape[1]
        chosen = queries[torch.arange(n_keys, device=queries.device) % len(queries)].float()
        keys = chosen / chosen.norm(dim=-1, keepdim=True).clamp(min=1e-6) ** 2
        spread = keys.norm(dim=-1, keepdim=True) * noise * self.keys.shape[0] ** -0.5
        drawn = torch.randn(keys.shape, generator=generator).to(keys)
        self.keys.copy_((keys + spread * drawn).T)
        if self.bias is not None:
            self.bias.fill_(QUERY_BIAS)

    def edited_values(self) -> torch.Tensor:
        """``W_V + beta * zeta'`` with ``zeta' = W_zeta zeta``, the same for every pair, Eq. (6)."""
        if self.zeta is None or self.zeta_projection is None or self.beta == 0.0:
            return self.values
        return self.values + self.beta * (self.zeta @ self.zeta_projection)

    def scores(self, queries: torch.Tensor) -> torch.Tensor:
        """How strongly each key answers, before the activation: ``(..., d) -> (..., n)``."""
        scores = queries @ self.keys
        return scores if self.bias is None else scores + self.bias

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        """The branch's contribution, ``(..., d) -> (..., d)``, in the queries' own type."""
        wide = queries.to(self.keys.dtype)
        fired = self.activation(self.scores(wide))
        if self.up is not None:
            fired = fired * (wide @ self.up)
        return (fired @ self.edited_values()).to(queries.dtype)


def activation_loss(scores: torch.Tensor, top: int = 5) -> torch.Tensor:
    """T-Patcher: the keys that answer the edit's own queries best must fire.

    ``scores (T, n)`` of the edit's answer positions; the mean of ``exp(-score)`` over each
    position's ``top`` keys.
    """
    best = scores.topk(min(top, scores.shape[-1]), dim=-1).values
    return torch.exp(-best).mean()


def memory_loss(scores: torch.Tensor, margin: float = 0.0, top: int = 5) -> torch.Tensor:
    """T-Patcher: on remembered out-of-scope queries the keys must stay silent.

    ``scores (M, n)``; the mean of ``exp(score + margin)`` over each query's ``top`` keys.
    """
    best = scores.topk(min(top, scores.shape[-1]), dim=-1).values
    return torch.exp(best + margin).mean()


class PatchStack:
    """Many frozen patches of one layer as one: ``E`` edits, one matmul each way.

    Raises ValueError where the patches differ in kind.
    """

    def __init__(self, patches: Sequence[KeyValuePatch]) -> None:
        if len({(p.gated, p.keys.shape) for p in patches}) > 1:
            raise ValueError("patches of one stack must agree in width, number of keys and gating")
        first = patches[0]
        self.activation, self.n_keys = first.activation, first.keys.shape[1]
        self.keys = torch.cat([p.keys.detach() for p in patches], dim=1)
        self.up = (
            torch.cat([p.up.detach() for p in patches if p.up is not None], dim=1) if first.gated else None
        )
        self.bias = (
            None if first.gated else torch.cat([p.bias.detach() for p in patches if p.bias is not None])
        )
        self.values = torch.cat([p.edited_values().detach() for p in patches])

    def __call__(self, queries: torch.Tensor, open_gates: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of all branches, ``(B, T, d) -> (B, T, d)``; ``open_gates (B, E)`` silences the others."""
        wide = queries.to(self.keys.dtype)
        scores = wide @ self.keys
        fired = self.activation(scores if self.bias is None else scores + self.bias)
        if self.up is not None:
            fired = fired * (wide @ self.up)
        if open_gates is not None:
            fired = fired * open_gates.to(fired.dtype).repeat_interleave(self.n_keys, dim=1)[:, None]
        return (fired @ self.values).to(queries.dtype)
