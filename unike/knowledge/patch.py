"""The intrinsic half: extra key-value pairs beside a frozen feed-forward network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from unike.knowledge.memory import GrowingRows

Activation = Callable[[torch.Tensor], torch.Tensor]
# T-Patcher's keys answer their own query with 1; the bias keeps what is less alike below zero.
QUERY_BIAS = -0.7


@dataclass(frozen=True)
class Pairs:
    """``n`` extra pairs: ``act(q W_K + b_K) W_V``, Eq. (3).

    ``keys (..., d, n)``, ``values (..., n, d)``, ``bias (n)`` or ``(..., 1, n)``; leading dimensions as the
    queries have them. Where the network is gated, ``act(q W_K) * (q W_up)``, with ``up`` of the keys' shape
    and no bias, stands in place of the activation.
    """

    activation: Activation
    keys: torch.Tensor
    values: torch.Tensor
    up: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def scores(self, queries: torch.Tensor) -> torch.Tensor:
        """How well each key matches, before the activation: ``(..., d) -> (..., n)``."""
        scores = queries @ self.keys
        return scores if self.bias is None else scores + self.bias

    def activations(self, queries: torch.Tensor) -> torch.Tensor:
        """The weight of each value: ``(..., d) -> (..., n)``."""
        activations = self.activation(self.scores(queries))
        return activations if self.up is None else activations * (queries @ self.up)

    def __call__(self, queries: torch.Tensor) -> torch.Tensor:
        """What the pairs add, ``(..., d) -> (..., d)``, computed in the keys' type and given in the
        queries'."""
        return (self.activations(queries.to(self.keys.dtype)) @ self.values).to(queries.dtype)


def move_values(
    values: torch.Tensor, beta: float, zeta: torch.Tensor | None, projection: torch.Tensor | None
) -> torch.Tensor:
    """``W_V + beta * zeta'`` with ``zeta' = W_zeta zeta``, the same for every pair, Eq. (6).

    ``values (..., n, d)``, ``zeta (d_zeta)``, ``projection (..., d_zeta, d)``; the values themselves without
    one of the latter two, or at ``beta`` 0.
    """
    if zeta is None or projection is None or beta == 0.0:
        return values
    return values + beta * (zeta @ projection).unsqueeze(-2)


class KeyValuePatch(nn.Module):
    """``n`` extra pairs of one edit in one layer, as trained: ``W_K (d, n)``, ``b_K (n)``, ``W_V (n, d)``,
    ``W_zeta (d_zeta, d)``, and ``W_up (d, n)`` in place of ``b_K`` where the network is gated.

    Parameters are fp32 whatever the base model's type. At ``W_V = 0`` and ``beta = 0`` the patch adds exact
    zeros.
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

    @property
    def edited_values(self) -> torch.Tensor:
        """The values with zeta's share in them, ``(n, d)``; see ``move_values``."""
        return move_values(self.values, self.beta, self.zeta, self.zeta_projection)

    @property
    def pairs(self) -> Pairs:
        """The pairs as they stand now, with gradients to the parameters."""
        return Pairs(self.activation, self.keys, self.edited_values, self.up, self.bias)

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        """What the patch adds, ``(..., d) -> (..., d)``, in the queries' own type."""
        added: torch.Tensor = self.pairs(queries)
        return added


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


@dataclass(frozen=True)
class OpenEdits:
    """Of ``E`` edits those that apply to each of ``B`` prompts: ``chosen (B, M)``, filled up with others,
    which ``closed (B, M)`` marks."""

    chosen: torch.Tensor
    closed: torch.Tensor

    @classmethod
    def of(cls, open_gates: torch.Tensor) -> OpenEdits:
        """From ``open_gates (B, E)``."""
        most = int(open_gates.sum(1).max()) if open_gates.numel() else 0
        chosen = open_gates.int().topk(most, dim=1).indices
        return cls(chosen, ~open_gates.gather(1, chosen))


class PatchStack:
    """Frozen patches of one layer as one block that grows: ``E`` edits of ``n`` pairs, a pair per row.

    ``rows`` are by name ``keys``, ``values`` and, where the network is gated, ``up (E, n, d)``, else
    ``bias (E, n)``. Raises ValueError where the patches differ in kind.
    """

    def __init__(self, patches: Sequence[KeyValuePatch]) -> None:
        _require_alike(patches)
        self.activation = patches[0].activation
        self.rows = {name: GrowingRows(rows) for name, rows in _stack_pairs(patches).items()}

    def __len__(self) -> int:
        return len(self.rows["keys"])

    def extended(self, patches: Sequence[KeyValuePatch]) -> PatchStack:
        """This stack with further patches after it; what is there is shared."""
        _require_alike(patches, ("up" in self.rows, self.rows["keys"].tensor.shape[1:]))
        out = object.__new__(PatchStack)
        out.activation = self.activation
        out.rows = {name: self.rows[name].extended(more) for name, more in _stack_pairs(patches).items()}
        return out

    def __call__(self, queries: torch.Tensor, opened: OpenEdits | None = None) -> torch.Tensor:
        """What all patches add, ``(B, T, d) -> (B, T, d)``. With ``opened`` only the edits that apply to a
        prompt are computed: the cost does not grow with ``E``."""
        if opened is not None and not opened.chosen.shape[1]:
            return torch.zeros_like(queries)
        taken = {
            name: rows.tensor.flatten(0, 1) if opened is None else rows.tensor[opened.chosen].flatten(1, 2)
            for name, rows in self.rows.items()
        }
        values = taken["values"]
        if opened is not None:
            pairs = self.rows["keys"].tensor.shape[1]
            values = values.masked_fill(opened.closed.repeat_interleave(pairs, 1)[..., None], 0)
        keys = taken["keys"].transpose(-1, -2)
        up = taken["up"].transpose(-1, -2) if "up" in taken else None
        bias = taken["bias"].unsqueeze(-2) if "bias" in taken else None
        return Pairs(self.activation, keys, values, up, bias)(queries)


class PatchBatch:
    """Patches of ``B`` independent edits, batched: each parameter of ``KeyValuePatch`` with a leading
    dimension ``B``, by name in ``tensors``. What is trained here goes back to the patches by ``restore``."""

    def __init__(self, patches: Sequence[KeyValuePatch]) -> None:
        _require_alike(patches)
        self.patches = list(patches)
        first = patches[0]
        self.activation, self.beta, self.zeta = first.activation, first.beta, first.zeta
        self.tensors: dict[str, torch.Tensor] = {}
        for name, _ in first.named_parameters():
            tensor = torch.stack([p.get_parameter(name).detach() for p in patches])
            self.tensors[name] = tensor.requires_grad_(first.keys.requires_grad)

    def parameters(self) -> list[torch.Tensor]:
        """Each with a row per edit."""
        return list(self.tensors.values())

    @property
    def pairs(self) -> Pairs:
        """The pairs as they stand now, for queries ``(B, T, d)``, or ``(T, d)`` that all edits get."""
        tensors = self.tensors
        values = move_values(tensors["values"], self.beta, self.zeta, tensors.get("zeta_projection"))
        bias = tensors["bias"][:, None] if "bias" in tensors else None
        return Pairs(self.activation, tensors["keys"], values, tensors.get("up"), bias)

    def keep(self, rows: torch.Tensor) -> None:
        """Restores all edits but ``rows``, which stay, in tensors of their own."""
        staying = set(rows.tolist())
        self.restore([i for i in range(len(self.patches)) if i not in staying])
        self.patches = [self.patches[i] for i in rows.tolist()]
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.detach()[rows].requires_grad_(tensor.requires_grad)

    @torch.no_grad()
    def restore(self, rows: Sequence[int]) -> None:
        """Writes these rows into the patches that they came from."""
        for i in rows:
            for name, tensor in self.tensors.items():
                self.patches[i].get_parameter(name).copy_(tensor[i])

    def __call__(self, queries: torch.Tensor) -> torch.Tensor:
        """``(B, T, d) -> (B, T, d)``."""
        return self.pairs(queries)


def _require_alike(patches: Sequence[KeyValuePatch], kind: tuple[bool, torch.Size] | None = None) -> None:
    kinds = {(p.gated, p.keys.T.shape) for p in patches} | ({kind} if kind else set())
    if len(kinds) > 1:
        raise ValueError("patches of one stack must agree in width, number of keys and gating")


def _stack_pairs(patches: Sequence[KeyValuePatch]) -> dict[str, torch.Tensor]:
    """The patches' pairs, a row each, without gradients."""
    pairs = [patch.pairs for patch in patches]
    rows = {"keys": [p.keys.T for p in pairs], "values": [p.values for p in pairs]}
    if patches[0].gated:
        rows["up"] = [p.up.T for p in pairs if p.up is not None]
    else:
        rows["bias"] = [p.bias for p in pairs if p.bias is not None]
    return {name: torch.stack([t.detach() for t in tensors]) for name, tensors in rows.items()}
