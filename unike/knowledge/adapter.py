"""The external half: in-context knowledge inserted in latent space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from unike.knowledge.memory import KnowledgeMemory, Retrieved


class Projections(Protocol):
    """A self-attention's own projections (see ``backbones.layout.AttentionSite``)."""

    def queries(self, x: torch.Tensor) -> torch.Tensor: ...
    def keys(self, states: torch.Tensor) -> torch.Tensor: ...
    def values(self, states: torch.Tensor) -> torch.Tensor: ...
    def output(self, heads: torch.Tensor) -> torch.Tensor: ...


def knowledge_attention(
    site: Projections, x: torch.Tensor, states: torch.Tensor, logit_bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``h_know = Attn(x; H_pos, H_pos)``, the knowledge's share of attention, Eq. (2).

    ``x (B, T, d)`` queries, ``states (B, K, d)`` retrieved knowledge states, ``logit_bias (B, K)``
    added to the attention logits (minus infinity drops a state). Through the layer's own
    projections, without positions. Returns ``(B, T, d)``.
    """
    return attend(site, x, site.keys(states), site.values(states), logit_bias)


def attend(
    site: Projections,
    x: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    logit_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``knowledge_attention`` for states that are projected already, ``keys`` and ``values (B, H, K, h)``."""
    return site.output(_weigh(site.queries(x), keys, logit_bias) @ values)


def _weigh(queries: torch.Tensor, keys: torch.Tensor, logit_bias: torch.Tensor | None) -> torch.Tensor:
    """Attention weights ``softmax(Q K^T + bias)``, for ``queries (B, ..., T, h)`` and ``keys (B, ..., K,
    h)``."""
    logits = queries @ keys.transpose(-1, -2)
    if logit_bias is not None:
        logits = logits + logit_bias.reshape(len(logit_bias), *[1] * (logits.ndim - 2), -1)
    return logits.float().softmax(-1).to(queries.dtype)


def plain_attention(
    x: torch.Tensor, states: torch.Tensor, logit_bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``softmax(x H^T) H``, unscaled as in the authors' release; shapes as ``knowledge_attention``."""
    return _weigh(x, states, logit_bias) @ states


def shift(output: torch.Tensor, knowledge: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """``(1 - alpha) h_input + alpha h_know``, with one ``alpha (B)`` per prompt.

    A departure from the print: alpha weighs the knowledge, as in the paper's analysis and figures; its Eq. 7
    is printed the other way round.
    """
    weight = alpha.to(output.dtype)[:, None, None]
    return (1 - weight) * output + weight * knowledge


@dataclass(frozen=True)
class Shift:
    """What an adapter decided for a batch of prompts at their last token.

    ``alpha (B)``; the ``retrieved`` items; ``bias (B, K)``, added to the knowledge's attention logits;
    ``projected``, keys and values ``(B, H, K, h)`` of the retrieved states, where attention is projected.
    """

    alpha: torch.Tensor
    retrieved: Retrieved
    bias: torch.Tensor
    projected: tuple[torch.Tensor, torch.Tensor] | None = None


def knowledge_weights(site: Projections, x: torch.Tensor, decision: Shift) -> torch.Tensor:
    """Each retrieved item's share of the knowledge's attention, the mean over heads: ``x (B, T, d)`` to
    ``(B, T, K)``, which sums to 1."""
    if decision.projected is not None:
        return _weigh(site.queries(x), decision.projected[0], decision.bias).mean(1)
    return _weigh(x, decision.retrieved.states.to(x.dtype), decision.bias)


class AdapterLayer:
    """The external half of one layer: retrieve at the prompt's end, shift every token's attention.

    ``alpha`` is ``"adaptive"`` or a fixed share in [0, 1]. Items less similar than ``tau`` are dropped.
    ``similarity_bias`` lets the best items outweigh many half-relevant ones. ValueError for adaptive alpha
    without the ``semantic`` encoder, and for an unknown ``attention``.
    """

    def __init__(
        self,
        site: Projections,
        memory: KnowledgeMemory,
        semantic: Callable[[torch.Tensor], torch.Tensor] | None,
        k: int = 40,
        alpha: float | str = "adaptive",
        attention: str = "projected",
        tau: float | None = None,
        similarity_bias: float = 0.0,
    ) -> None:
        if alpha == "adaptive" and semantic is None:
            raise ValueError("adaptive alpha needs the semantic encoder")
        if attention not in ("projected", "plain"):
            raise ValueError(f"attention {attention!r}: expected 'projected' or 'plain'")
        self.site, self.memory, self.semantic = site, memory, semantic
        self.k, self.alpha, self.attention = k, alpha, attention
        self.tau, self.similarity_bias = tau, similarity_bias

    def decide(self, query: torch.Tensor, allowed: torch.Tensor | None = None) -> Shift:
        """Retrieval and alpha for prompts, from the state of their last token, ``query (B, d)``. ``allowed``
        is that of ``KnowledgeMemory.retrieve``."""
        found = self.memory.retrieve(query, self.k, allowed)
        bias = self.similarity_bias * (found.similarity - found.similarity[:, :1])
        kept = found.similarity >= (-torch.inf if self.tau is None else self.tau)
        if found.allowed is not None:
            kept &= found.allowed
        left = kept.any(1)
        # With nothing left alpha is 0, and a softmax over minus infinities must not give NaN.
        bias = bias.masked_fill(~kept & left[:, None], -torch.inf)
        projected = None
        if self.attention == "projected":
            # Once per prompt: decoding a token does not project the retrieved states again.
            states = found.states.to(query.dtype)
            projected = (self.site.keys(states), self.site.values(states))
        return Shift(self._compute_alpha(query, found, bias) * left, found, bias, projected)

    def _compute_alpha(self, query: torch.Tensor, found: Retrieved, bias: torch.Tensor) -> torch.Tensor:
        """``cos(Enc_sem(mixture of H_pos at p), x[p])`` clamped to [0, 1], or the fixed share: Eq. (7)."""
        if not isinstance(self.alpha, str):
            return torch.full((len(query),), float(self.alpha), device=query.device)
        assert self.semantic is not None
        mixture = plain_attention(query[:, None], found.states.to(query.dtype), bias)[:, 0]
        return F.cosine_similarity(self.semantic(mixture.float()), query.float(), dim=-1).clamp(0, 1)

    def apply(self, x: torch.Tensor, output: torch.Tensor, decision: Shift) -> torch.Tensor:
        """The attention's output, shifted; ``x``, what enters it, and ``output`` are ``(B, T, d)``."""
        if decision.projected is not None:
            return shift(output, attend(self.site, x, *decision.projected, decision.bias), decision.alpha)
        states = decision.retrieved.states.to(x.dtype)
        return shift(output, plain_attention(x, states, decision.bias), decision.alpha)
