"""What one edit takes of memory, from the YAML and the model's config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unike.backbones.checking import count_parameters, format_size
from unike.backbones.checkpoint_files import DTYPE_BYTES
from unike.config.hparams import HyperParams
from unike.methods.registry import resolve_needs
from unike.runs.costs import TEXT_TOKENS, read_model_config, read_model_size
from unike.system.findings import Finding
from unike.types import UserError

# Bytes of torch and transformers themselves, measured on a CPU (benchmarks/full_size.py).
RUNTIME = 400_000_000
# Tokens of an image of 640 x 480 pixels, of models whose image tokens depend on the image's size.
PHOTO_TOKENS = {"llava_onevision": 2929, "qwen2_vl": 391, "qwen2_5_vl": 391}
# Of a trained number: itself, its gradient, and Adam's two moments, in single precision.
_TRAINED_BYTES = 4 * 4
# Of a remembered number: a key's in single precision, a value's in half.
_FLOAT_BYTES = _KEY_BYTES = 4
_VALUE_BYTES = 2
# What a decoder layer keeps of each token for the backward pass, in widths of the decoder and of its
# feed-forward network; tests/test_edit_memory.py compares this with what torch keeps.
_KEPT_WIDTHS = 16
_PAIRS = ("unike", "tpatcher")
_BASIS = "estimated from the config, for one image of 640 x 480 pixels at a time"


@dataclass(frozen=True)
class EditMemory:
    """Bytes of one edit: the model's ``weights``; the ``knowledge`` memory with its encoders; what is
    ``trained``, with gradients and Adam's moments; and ``working`` memory, the larger of what the backward
    pass needs and of the cache while an answer is generated."""

    weights: int
    knowledge: int
    trained: int
    working: int

    @property
    def peak(self) -> int:
        """All of it, with the libraries."""
        return self.weights + self.knowledge + self.trained + self.working + RUNTIME


@dataclass(frozen=True)
class _Shape:
    """Of a decoder: its width, layers, width of keys and values, inner width, and whether it is gated."""

    width: int
    depth: int
    kept: int
    inner: int
    gated: bool

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> _Shape:
        text = config.get("text_config") or config
        width, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
        kept = int(text.get("num_key_value_heads") or heads) * width // heads
        gated = "ffn_dim" not in text
        inner = int(text["intermediate_size"] if gated else text["ffn_dim"])
        return cls(width, int(text["num_hidden_layers"]), kept, inner, gated)

    @property
    def layer(self) -> int:
        """Parameters of a decoder layer, without its norms and biases."""
        return self.width * (2 * self.width + 2 * self.kept + (3 if self.gated else 2) * self.inner)


def estimate_edit_memory(hparams: HyperParams, parameters: int) -> EditMemory | None:
    """What one edit of the YAML takes at most, of a model with so many ``parameters``. None where its config
    does not tell, for quantized weights, and for methods other than UniKE, T-Patcher and the fine-tuning of
    decoder layers."""
    size = read_model_size(hparams)
    if size is None or hparams.quantization != "none":
        return None
    shape = _Shape.read(read_model_config(hparams.name))
    layers = hparams.layers if isinstance(hparams.layers, int) else len(hparams.layers)
    if hparams.method == "ft" and hparams.ft_target == "layers":
        # In half precision each step rounds the trained copy to a second one.
        rounded = 0 if hparams.dtype == "float32" else DTYPE_BYTES[hparams.dtype]
        trained = layers * shape.layer * (_TRAINED_BYTES + rounded)
    elif hparams.method in _PAIRS and hparams.intrinsic:
        trained = layers * _count_pair_numbers(hparams, shape) * _TRAINED_BYTES
    else:
        return None
    knowledge = 0
    if resolve_needs(hparams).knowledge:
        encoder = 2 * shape.width * (hparams.encoder_hidden or 2 * shape.width) * _FLOAT_BYTES
        items = hparams.triplets * shape.width * (_KEY_BYTES + _VALUE_BYTES)
        knowledge = layers * (items + encoder)
    tokens = (PHOTO_TOKENS.get(hparams.model_name) or size.image_tokens) + TEXT_TOKENS
    inner = (3 if shape.gated else 1) * shape.inner
    kept = layers * tokens * (_KEPT_WIDTHS * shape.width + inner)
    cache = 2 * shape.depth * (tokens + hparams.max_new_tokens) * shape.kept
    number = DTYPE_BYTES[hparams.dtype]
    return EditMemory(parameters * number, knowledge, trained, max(kept, cache) * number)


def _count_pair_numbers(hparams: HyperParams, shape: _Shape) -> int:
    """The numbers of a layer's extra pairs: keys, values and biases; in a gated network a second key in place
    of the bias; and the projection of zeta."""
    own = 2 * shape.width + (shape.width if shape.gated else 1)
    moved = hparams.method == "unike" and hparams.zeta != "none" and bool(hparams.beta)
    return hparams.n_keys * own + (hparams.encoder_dim or shape.width) * shape.width * moved


def describe_edit_memory(hparams: HyperParams) -> list[Finding]:
    """A note of the peak of one edit, where it is known."""
    try:
        found = estimate_edit_memory(hparams, count_parameters(hparams.backbone))
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        # The checks of the files and of the method have it.
        return []
    if found is None:
        return []
    more = {
        "the knowledge memory and its encoders": found.knowledge,
        "what is trained, with gradients and Adam's moments": found.trained,
        "activations": found.working,
        "torch and transformers": RUNTIME,
    }
    parts = ", ".join(f"{format_size(count)} for {name}" for name, count in more.items() if count)
    return [Finding(True, f"one edit: at most {format_size(found.peak)}: the weights, {parts}", _BASIS)]
