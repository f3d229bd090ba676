"""What the models that the YAMLs name by their ids are, before anything of them is on this machine.

Sizes are those of the published files; ``tests/test_published.py`` builds each model from its shape, without
memory, and counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unike.backbones.checkpoint_files import DTYPE_BYTES


@dataclass(frozen=True)
class PublishedModel:
    """A model's ``parameters``, the precision in which its files hold them, and of its config.json what
    decides on its size."""

    parameters: int
    stored: str
    config: Mapping[str, Any]

    @property
    def disk(self) -> int:
        """Bytes to download."""
        return self.parameters * DTYPE_BYTES[self.stored]


def _describe(
    width: int, layers: int, heads: int, inner: int, vocabulary: int, kept: int | None = None
) -> dict[str, Any]:
    values = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
    }
    return values if kept is None else values | {"num_key_value_heads": kept}


_LLAMA = _describe(4096, 32, 32, 11008, 32000)
_OPT = {
    "model_type": "opt",
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "ffn_dim": 10240,
    "vocab_size": 50304,
    "word_embed_proj_dim": 2560,
}
# A line break ends BLIP2-OPT's answers.
_BLIP2_OPT = {**_OPT, "eos_token_id": 50118}
_QWEN = _describe(3584, 28, 28, 18944, 152064, kept=4)
_EVA = {
    "hidden_size": 1408,
    "num_hidden_layers": 39,
    "intermediate_size": 6144,
    "image_size": 224,
    "patch_size": 14,
}
_CLIP = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "intermediate_size": 4096,
    "image_size": 336,
    "patch_size": 14,
}
_SIGLIP = {
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "intermediate_size": 4304,
    "image_size": 384,
    "patch_size": 14,
}
PUBLISHED = {
    "Salesforce/blip2-opt-2.7b": PublishedModel(
        3_744_761_856,
        "float32",
        {"model_type": "blip-2", "num_query_tokens": 32, "vision_config": _EVA, "text_config": _BLIP2_OPT},
    ),
    "Salesforce/instructblip-vicuna-7b": PublishedModel(
        7_913_786_880,
        "float32",
        {
            "model_type": "instructblip",
            "num_query_tokens": 32,
            "vision_config": _EVA,
            "text_config": {**_LLAMA, "model_type": "llama", "vocab_size": 32001},
        },
    ),
    "llava-hf/llava-1.5-7b-hf": PublishedModel(
        7_063_427_072,
        "float16",
        {
            "model_type": "llava",
            "vision_config": _CLIP,
            "text_config": {**_LLAMA, "model_type": "llama", "vocab_size": 32064},
        },
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": PublishedModel(
        8_030_348_832,
        "float16",
        {
            "model_type": "llava_onevision",
            "vision_config": _SIGLIP,
            "text_config": {**_QWEN, "model_type": "qwen2", "vocab_size": 152000},
        },
    ),
    "Qwen/Qwen2-VL-7B-Instruct": PublishedModel(
        8_291_375_616,
        "bfloat16",
        {
            "model_type": "qwen2_vl",
            "vision_config": {"depth": 32, "embed_dim": 1280, "intermediate_size": 5120, "patch_size": 14},
            **_QWEN,
        },
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": PublishedModel(
        8_292_166_656,
        "bfloat16",
        {
            "model_type": "qwen2_5_vl",
            "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "patch_size": 14},
            **_QWEN,
        },
    ),
    "Vision-CAIR/vicuna-7b": PublishedModel(6_738_423_808, "float16", {**_LLAMA, "model_type": "llama"}),
    "facebook/opt-2.7b": PublishedModel(2_651_596_800, "float16", {**_OPT, "vocab_size": 50272}),
}
