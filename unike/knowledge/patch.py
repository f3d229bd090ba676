"""The intrinsic half: extra key-value pairs beside a frozen feed-forward network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from unike.knowledge.memory import Growing

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

    def fired(self, queries: torch.Tensor) -> torch.Tensor:
        """What each pair answers with, the weight of its value: ``(..., d) -> (..., n)``."""
        fired = self.activation(self.scores(queries))
        return fired if self.up is None else fired * (queries @ self.up)

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        """The branch's contribution, ``(..., d) -> (..., d)``, in the queries' own type."""
        return (self.fired(queries.to(self.keys.dtype)) @ self.edited_values()).to(queries.dtype)


def activation_loss(scores: torch.Tensor, at: torch.Tensor, top: int = 5) -> torch.Tensor:
    """T-Patcher: the keys that answer an edit's own queries best must fire, ``(B)``.

    ``scores (B, T, n)`` of ``B`` edits, ``at (B, T)`` true at the answer's positions; the mean of
    ``exp(-score)`` over each such position's ``top`` keys.
    """
    best = scores.topk(min(top, scores.shape[-1]), dim=-1).values
    missed = torch.exp(-best.masked_fill(~at[..., None], 0)).mean(-1)
    return (missed * at).sum(1) / at.sum(1)


def memory_loss(scores: torch.Tensor, margin: float = 0.0, top: int = 5) -> torch.Tensor:
    """T-Patcher: on remembered out-of-scope queries the keys must stay silent, ``(B)``.

    ``scores (B, M, n)``; the mean of ``exp(score + margin)`` over each query's ``top`` keys.
    """
    best = scores.topk(min(top, scores.shape[-1]), dim=-1).values
    return torch.exp(best + margin).mean((-2, -1))


def branch(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    activation: Activation,
    bias: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the extra pairs add for ``queries (..., T, d)``; ``keys`` and ``up (..., d, N)``, ``bias``
    ``(..., 1, N)``, ``values (..., N, d)``."""
    scores = queries @ keys
    fired = activation(scores if bias is None else scores + bias)
    return (fired if up is None else fired * (queries @ up)) @ values


@dataclass(frozen=True)
class Opened:
    """Of ``E`` edits those that speak for each of ``B`` prompts: ``chosen (B, M)``, filled up with
    others, which ``shut (B, M)`` marks."""

    chosen: torch.Tensor
    shut: torch.Tensor

    @classmethod
    def of(cls, open_gates: torch.Tensor) -> Opened:
        """From ``open_gates (B, E)``."""
        most = int(open_gates.sum(1).max()) if open_gates.numel() else 0
        chosen = open_gates.int().topk(most, dim=1).indices
        return cls(chosen, ~open_gates.gather(1, chosen))


class PatchStack:
    """Frozen patches of one layer as one block that grows: ``E`` edits of ``n`` pairs, a pair per row.

    ``keys``, ``up`` and ``values (E, n, d)``, ``bias (E, n)``. Raises ValueError where the patches
    differ in kind.
    """

    def __init__(self, patches: Sequence[KeyValuePatch]) -> None:
        _alike(patches)
        self.activation = patches[0].activation
        self.keys, self.values = Growing(_rows(patches)[0]), Growing(_rows(patches)[1])
        self.up = Growing(_up(patches)) if patches[0].gated else None
        self.bias = None if patches[0].gated else Growing(_bias(patches))

    def __len__(self) -> int:
        return len(self.keys)

    def extended(self, patches: Sequence[KeyValuePatch]) -> PatchStack:
        """This stack with further patches behind it; what is there is shared."""
        _alike(patches, (self.up is not None, self.keys.rows.shape[1:]))
        out = object.__new__(PatchStack)
        out.activation = self.activation
        keys, values = _rows(patches)
        out.keys, out.values = self.keys.extended(keys), self.values.extended(values)
        out.up = None if self.up is None else self.up.extended(_up(patches))
        out.bias = None if self.bias is None else self.bias.extended(_bias(patches))
        return out

    def __call__(self, queries: torch.Tensor, opened: Opened | None = None) -> torch.Tensor:
        """Sum of all branches, ``(B, T, d) -> (B, T, d)``. With ``opened`` those alone are computed that
        speak for a prompt: what it costs does not grow with ``E``."""
        if opened is not None and not opened.chosen.shape[1]:
            return torch.zeros_like(queries)

        def taken(part: Growing) -> torch.Tensor:
            """``(E n, ...)``, or ``(B, M n, ...)`` of those that are opened."""
            return part.rows.flatten(0, 1) if opened is None else part.rows[opened.chosen].flatten(1, 2)

        wide, values = queries.to(self.keys.rows.dtype), taken(self.values)
        bias = None if self.bias is None else taken(self.bias).unsqueeze(-2)
        up = None if self.up is None else taken(self.up).transpose(-1, -2)
        if opened is not None:
            pairs = self.keys.rows.shape[1]
            values = values.masked_fill(opened.shut.repeat_interleave(pairs, 1)[..., None], 0)
        keys = taken(self.keys).transpose(-1, -2)
        return branch(wide, keys, values, self.activation, bias, up).to(queries.dtype)


class PatchBatch:
    """Patches of ``B`` independent edits side by side: ``keys`` and ``up (B, d, n)``, ``bias``
    ``(B, 1, n)``, ``values (B, n, d)``. Trained here, they are handed back by ``restore``."""

    def __init__(self, patches: Sequence[KeyValuePatch]) -> None:
        _alike(patches)
        self.patches = list(patches)
        self.activation, self.beta = patches[0].activation, patches[0].beta
        first = patches[0]
        self.zeta = first.zeta
        self._names = [name for name, _ in first.named_parameters()]
        self.held: dict[str, torch.Tensor] = {}
        for name in self._names:
            tensor = torch.stack([p.get_parameter(name).detach() for p in patches])
            self.held[name] = tensor.requires_grad_(first.keys.requires_grad)

    def parameters(self) -> list[torch.Tensor]:
        """Each with a row per edit."""
        return list(self.held.values())

    def keep(self, rows: torch.Tensor) -> None:
        """Hands back all edits but ``rows``, which stay, in tensors of their own."""
        staying = set(rows.tolist())
        self.restore([i for i in range(len(self.patches)) if i not in staying])
        self.patches = [self.patches[i] for i in rows.tolist()]
        for name, tensor in self.held.items():
            self.held[name] = tensor.detach()[rows].requires_grad_(tensor.requires_grad)

    @torch.no_grad()
    def restore(self, rows: Sequence[int]) -> None:
        """Writes these rows into the patches that they came from."""
        for i in rows:
            for name, tensor in self.held.items():
                self.patches[i].get_parameter(name).copy_(tensor[i])

    def scores(self, queries: torch.Tensor) -> torch.Tensor:
        """``(B, T, d)`` or ``(T, d)`` to ``(B, T, n)``: how strongly each key answers."""
        scores = queries @ self.held["keys"]
        return scores + self.held["bias"][:, None] if "bias" in self.held else scores

    def __call__(self, queries: torch.Tensor) -> torch.Tensor:
        """``(B, T, d) -> (B, T, d)``."""
        held, values = self.held, self.held["values"]
        if self.zeta is not None and self.beta and "zeta_projection" in held:
            values = values + self.beta * (self.zeta @ held["zeta_projection"])[:, None]
        bias = held["bias"][:, None] if "bias" in held else None
        wide = queries.to(values.dtype)
        return branch(wide, held["keys"], values, self.activation, bias, held.get("up")).to(queries.dtype)


def _alike(patches: Sequence[KeyValuePatch], kind: tuple[bool, torch.Size] | None = None) -> None:
    kinds = {(p.gated, p.keys.T.shape) for p in patches} | ({kind} if kind else set())
    if len(kinds) > 1:
        raise ValueError("patches of one stack must agree in width, number of keys and gating")


def _rows(patches: Sequence[KeyValuePatch]) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.stack([p.keys.detach().T for p in patches])
    return keys, torch.stack([p.edited_values().detach() for p in patches])


def _up(patches: Sequence[KeyValuePatch]) -> torch.Tensor:
    return torch.stack([p.up.detach().T for p in patches if p.up is not None])


def _bias(patches: Sequence[KeyValuePatch]) -> torch.Tensor:
    return torch.stack([p.bias.detach() for p in patches if p.bias is not None])
