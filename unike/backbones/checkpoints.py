"""The original files of LAVIS and MiniGPT-4, loaded as they are into Hugging Face's BLIP-2.

``state_dict_file`` holds EVA ViT-g, ``qformer_checkpoint`` the Q-Former of BLIP-2,
``pretrained_ckpt`` the projection of MiniGPT-4, ``name`` the language model's folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import LayerNorm
from torch.nn.functional import interpolate
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from unike.backbones.checking import check_spec, estimate_memory, require_files
from unike.backbones.checkpoint_files import DTYPE_BYTES, explain_read_errors, get_dtype, load_state
from unike.backbones.original import State, list_names, read_shape, read_states, require_whole
from unike.backbones.placement import build_quantization_config
from unike.types import BackboneSpec, UserError

__all__ = [
    "build_configs",
    "check_spec",
    "convert_eva",
    "convert_qformer",
    "convert_states",
    "estimate_memory",
    "load_original",
    "load_state",
    "require_files",
]


# ---------------------------------------------------------------- converting names

_BLOCK = re.compile(r"blocks\.(\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)")
_BLOCK_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_EMBEDDINGS = {
    "cls_token": "embeddings.class_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}


def _resize_positions(positions: Tensor, side: int) -> Tensor:
    """``[1, 1 + old*old, d]`` -> ``[1, 1 + side*side, d]``, bicubic; the class position stays."""
    old = int((positions.shape[1] - 1) ** 0.5)
    if old == side:
        return positions
    grid = positions[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1)


def convert_eva(state: State, *, depth: int, image_size: int) -> dict[str, Tensor]:
    """EVA ViT's first ``depth`` blocks under the names of ``vision_model``; all else is dropped.

    LAVIS takes the features before EVA's last block and head. EVA has no key bias: it becomes zeros.
    """
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in _EMBEDDINGS:
            out[_EMBEDDINGS[key]] = value
        elif key == "pos_embed":
            side = image_size // int(state["patch_embed.proj.weight"].shape[-1])
            out["embeddings.position_embedding"] = _resize_positions(value, side)
        elif (match := _BLOCK.fullmatch(key)) and int(match[1]) < depth:
            out[f"encoder.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"] = value
    for block in range(depth):
        bias_q, bias_v = (state.get(f"blocks.{block}.attn.{part}_bias") for part in "qv")
        if bias_q is not None and bias_v is not None:
            bias = torch.cat([bias_q, torch.zeros_like(bias_q), bias_v])
            out[f"encoder.layers.{block}.self_attn.qkv.bias"] = bias
    return {f"vision_model.{key}": value for key, value in out.items()}


_QFORMER_LAYER = re.compile(
    r"layer\.\d+\.((cross)?attention\.(self\.(query|key|value)|output\.(dense|LayerNorm))"
    r"|intermediate_query\.dense|output_query\.(dense|LayerNorm))\.(weight|bias)"
)
_PROJECTION = re.compile(r"(llama|opt|t5)_proj\.(weight|bias)")


def convert_qformer(state: State, projection: State | None = None) -> dict[str, Tensor]:
    """BLIP-2's file under the names of ``Blip2ForConditionalGeneration``; text-only parts are dropped.

    ``projection``: the state whose projection counts, where it isn't this file's own (MiniGPT-4).
    """
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        layer = key.removeprefix("Qformer.bert.encoder.")
        if key == "query_tokens":
            out[key] = value
        elif key.startswith("ln_vision."):
            out[key.replace("ln_vision", "vision_model.post_layernorm")] = value
        elif key.startswith("Qformer.bert.embeddings.LayerNorm."):
            out[key.replace("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm")] = value
        elif layer != key and _QFORMER_LAYER.fullmatch(layer):
            name = layer.replace("attention.self.", "attention.attention.")
            out[f"qformer.encoder.{name}"] = value
    for key, value in (state if projection is None else projection).items():
        if match := _PROJECTION.fullmatch(key):
            out[f"language_projection.{match[2]}"] = value
    return out


# ---------------------------------------------------------------- configurations


def build_configs(
    spec: BackboneSpec, text_config: PreTrainedConfig, states: Mapping[str, State]
) -> Blip2Config:
    """The configuration that fits the files (``states``, by YAML key)."""
    known = {
        "vision_config": Blip2VisionConfig.__annotations__,
        "qformer_config": Blip2QFormerConfig.__annotations__,
    }
    shape = read_shape(spec, states, known)
    return Blip2Config(
        vision_config=Blip2VisionConfig(**shape.vision, image_size=shape.image_size),
        qformer_config=Blip2QFormerConfig(**shape.qformer),
        text_config=text_config,
        num_query_tokens=shape.queries,
    )


# ---------------------------------------------------------------- loading


def convert_states(config: Blip2Config, states: Mapping[str, State]) -> dict[str, Tensor]:
    """Everything but the language model, from the files, under the names of BLIP-2."""
    vision: Any = config.vision_config
    depth, image_size = vision.num_hidden_layers, vision.image_size
    weights = convert_eva(states["state_dict_file"], depth=depth, image_size=image_size)
    return weights | convert_qformer(states["qformer_checkpoint"], states.get("pretrained_ckpt"))


def _check_fit(spec: BackboneSpec, model: Blip2ForConditionalGeneration, weights: State) -> None:
    """Every parameter outside the language model has its tensor, of its shape, and none is left over."""
    wanted = {k: v for k, v in model.state_dict().items() if not k.startswith("language_model.")}
    problems = []
    if missing := wanted.keys() - weights.keys():
        problems.append(f"{spec.source}: the original files lack {list_names(missing)}")
    if unexpected := weights.keys() - wanted.keys():
        problems.append(f"{spec.source}: the original files have unexpected {list_names(unexpected)}")
    for key in sorted(wanted.keys() & weights.keys()):
        if wanted[key].shape != weights[key].shape:
            problems.append(
                f"{spec.source}: {key} has shape {list(weights[key].shape)} in the original file, "
                f"but vision_config, qformer_config and `name` ask for {list(wanted[key].shape)}"
            )
            break
    if problems:
        raise UserError(*problems)


def _load_language_model(
    spec: BackboneSpec, dtype: torch.dtype, device: torch.device | None
) -> PreTrainedModel:
    loader: Any = AutoModelForCausalLM
    config = build_quantization_config(spec, dtype)
    more = {} if config is None else {"quantization_config": config, "device_map": {"": device}}
    with explain_read_errors(f"name: {spec.name}: the language model does not load"):
        model, info = loader.from_pretrained(spec.name, dtype=dtype, output_loading_info=True, **more)
    require_whole(spec, info)
    return model


def _choose_dtype(model: Blip2ForConditionalGeneration, key: str, dtype: torch.dtype) -> torch.dtype:
    """In fp16, transformers keeps the Q-Former in fp32 and casts on its borders; so do we."""
    kept = model._keep_in_fp32_modules or ()
    return torch.float32 if dtype == torch.float16 and key.split(".")[0] in kept else dtype


def load_original(spec: BackboneSpec, device: torch.device | None = None) -> Blip2ForConditionalGeneration:
    """The model from the original files, in ``spec.dtype`` on the CPU, frozen and in eval mode; its
    language model on ``device`` where it is quantized.

    Never holds two copies: the skeleton has no memory, and each mapped tensor is copied once.
    """
    if spec.dtype not in DTYPE_BYTES:
        raise UserError(f"{spec.source}: dtype `{spec.dtype}`; expected one of {', '.join(DTYPE_BYTES)}")
    require_files(spec)
    dtype, states = get_dtype(spec.dtype), read_states(spec)
    with explain_read_errors(f"{spec.source}: the configuration does not fit"):
        text_config = AutoConfig.from_pretrained(spec.name)
        config = build_configs(spec, text_config, states)
        with torch.device("meta"):
            model = Blip2ForConditionalGeneration(config)
    weights = convert_states(config, states)
    _check_fit(spec, model, weights)
    states.clear()
    for key in weights:
        weights[key] = weights[key].to(_choose_dtype(model, key, dtype), copy=True).contiguous()
    model.load_state_dict(weights, strict=False, assign=True)
    # The skeleton's language model has buffers on the meta device that no file holds (rotary
    # frequencies), so it is replaced as a whole instead of being filled.
    language_model = _load_language_model(spec, dtype, device)
    model.language_model = language_model
    model.config.text_config = language_model.config
    model.config.dtype = dtype
    # Transformers has the tower's epsilon here, LAVIS and MiniGPT-4 that of torch.
    model.vision_model.post_layernorm.eps = LayerNorm(1).eps
    return model.eval().requires_grad_(False)
