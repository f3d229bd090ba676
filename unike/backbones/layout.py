"""Where the modules that edits touch lie in a decoder: one table row per family, no branches.

A feed-forward network is a key-value memory, FFN(x) = act(x W_K) W_V, Eq. (1): its parts are the
key projections (two, where it is gated) and the value projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Family:
    """Module paths of a decoder family: ``after_layers`` from the decoder on, the others from a layer."""

    after_layers: tuple[str, ...]
    attention: str
    projections: tuple[str, str, str, str]
    ffn_keys: tuple[str, ...]
    ffn_value: str
    activation: str


_LLAMA = Family(
    after_layers=("norm",),
    attention="self_attn",
    projections=("q_proj", "k_proj", "v_proj", "o_proj"),
    ffn_keys=("mlp.gate_proj", "mlp.up_proj"),
    ffn_value="mlp.down_proj",
    activation="mlp.act_fn",
)
FAMILIES: dict[str, Family] = {
    "opt": Family(
        after_layers=("final_layer_norm", "project_out"),
        attention="self_attn",
        projections=("q_proj", "k_proj", "v_proj", "out_proj"),
        ffn_keys=("fc1",),
        ffn_value="fc2",
        activation="activation_fn",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_vl_text": _LLAMA,
    "qwen2_5_vl_text": _LLAMA,
}


@dataclass(frozen=True)
class FFNSite:
    """The projections of one feed-forward network, and its activation function."""

    keys: tuple[nn.Module, ...]
    value: nn.Module
    activation: Callable[[torch.Tensor], torch.Tensor]

    @property
    def gated(self) -> bool:
        return len(self.keys) == 2


@dataclass(frozen=True)
class AttentionSite:
    """One self-attention: its module and its own projections, without positions.

    Shapes: ``B`` batch, ``H`` heads, ``T`` tokens, ``d`` decoder width, ``h`` head width.
    """

    module: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    head_dim: int

    def _split(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, T, d) -> (B, H, T, h)``, scaled by the root of the head width."""
        return self._split(self.q(x)) * self.head_dim**-0.5

    def keys(self, states: torch.Tensor) -> torch.Tensor:
        """``(..., K, d) -> (..., H, K, h)``; grouped key heads are repeated."""
        return self._repeat(self._split(self.k(states)))

    def values(self, states: torch.Tensor) -> torch.Tensor:
        """``(..., K, d) -> (..., H, K, h)``; grouped value heads are repeated."""
        return self._repeat(self._split(self.v(states)))

    def output(self, heads: torch.Tensor) -> torch.Tensor:
        """``(B, H, T, h) -> (B, T, d)``."""
        return self.o(heads.transpose(-3, -2).flatten(-2))

    def _repeat(self, heads: torch.Tensor) -> torch.Tensor:
        groups = self.q.out_features // self.k.out_features  # type: ignore[operator]
        return heads if groups == 1 else heads.repeat_interleave(groups, dim=-3)


class DecoderLayout:
    """The sites of a causal language model, which may be a vision-language model as a whole.

    Raises ValueError for a family that has no row in ``FAMILIES``.
    """

    def __init__(self, language_model: Any) -> None:
        config = language_model.config
        # LAVIS's `transformers` lacks the method; there the decoder's configuration is that of text.
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        if config.model_type not in FAMILIES:
            raise ValueError(f"no layout for decoder family {config.model_type!r}; known: {sorted(FAMILIES)}")
        self.config, self.family = config, FAMILIES[config.model_type]
        decoder = language_model.get_decoder()
        self.layers: nn.ModuleList = decoder.layers
        self.width: int = config.hidden_size
        # Number of positions that the decoder knows: image, prompt and answer must fit.
        self.context: int = config.max_position_embeddings
        self.head_dim: int = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        after = [getattr(decoder, name, None) for name in self.family.after_layers]
        # The vocabulary at both ends: embeddings of token ids, and what states are compared with.
        self.embeddings: nn.Module = language_model.get_input_embeddings()
        self.unembeddings: nn.Linear = language_model.get_output_embeddings()
        self._after = [m for m in (*after, self.unembeddings) if m is not None]

    def __len__(self) -> int:
        return len(self.layers)

    def last(self, count: int) -> list[int]:
        """The indices of the last ``count`` layers; ValueError if there are fewer."""
        if not 1 <= count <= len(self):
            raise ValueError(f"layers: {count} of {len(self)}")
        return list(range(len(self) - count, len(self)))

    def layer(self, index: int) -> nn.Module:
        return self.layers[index]

    def ffn(self, index: int) -> FFNSite:
        layer, family = self.layer(index), self.family
        return FFNSite(
            tuple(layer.get_submodule(path) for path in family.ffn_keys),
            layer.get_submodule(family.ffn_value),
            layer.get_submodule(family.activation),
        )

    def attention(self, index: int) -> AttentionSite:
        module = self.layer(index).get_submodule(self.family.attention)
        q, k, v, o = (module.get_submodule(name) for name in self.family.projections)
        return AttentionSite(module, q, k, v, o, self.head_dim)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """What follows the last layer: final norm, output projection, vocabulary ``(..., v)``."""
        for module in self._after:
            hidden = module(hidden)
        return hidden
