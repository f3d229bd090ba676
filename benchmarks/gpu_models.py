"""Models with random weights that are drawn on a device: full dimensions, or the same in miniature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from benchmarks.models import PRESET, draw_knowledge, locate_tokenizer, make_full_config, make_opt_config
from unike.backbones.dialogue import Dialogue
from unike.backbones.huggingface import ARCHITECTURES
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.methods import build
from unike.methods.unike import UniKE

# As published, by the names that tables use.
TITLES = {"blip2": "BLIP2-OPT-2.7B", "minigpt4": "MiniGPT-4-7B", "llava": "LLaVA-1.5-7B"}
_DIALOGUES: Mapping[str, Dialogue] = {"llava": Dialogue(before_image="USER: ", after_image="\n", bos=True)}


@dataclass(frozen=True)
class Scale:
    """How large the models are: ``full``, as published, or ``small``, in which the whole script takes seconds
    on a CPU. ``items`` is the number of knowledge items in each layer's memory."""

    name: str
    items: int
    steps: int

    @property
    def is_full(self) -> bool:
        return self.name == "full"


SCALES = {"full": Scale("full", 2000, 10), "small": Scale("small", 20, 2)}


def make_config(family: str, scale: Scale) -> Any:
    """The model's configuration: the families' own dimensions, or a few layers of width 64."""
    if family != "llava":
        if scale.is_full:
            return make_full_config(family)
        return make_opt_config(width=64, layers=5, vision_layers=2, vision_width=64, side=2, queries=4)
    text = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    eye = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    side, vocabulary = 336, 32064
    if not scale.is_full:
        text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 2}
        eye, side, vocabulary = text, 28, 1400
    return LlavaConfig(
        vision_config={**eye, "model_type": "clip_vision_model", "image_size": side, "patch_size": 14},
        text_config={**text, "model_type": "llama", "vocab_size": vocabulary, "tie_word_embeddings": False},
        image_token_index=vocabulary - 1, image_seq_length=(side // 14) ** 2,
    )  # fmt: skip


def draw_backbone(
    family: str, scale: Scale, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> VisionLanguageBackbone:
    """A backbone whose weights are drawn on ``device``, so that no file is written or read.

    Matrices keep the size of activations; norms are one and biases zero, as in ``benchmarks.models``.
    """
    kind: Any = LlavaForConditionalGeneration if family == "llava" else Blip2ForConditionalGeneration
    config = make_config(family, scale)
    config.dtype = dtype
    with torch.device("meta"):
        model = kind(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(float("norm" in name.lower() and "weight" in name))
            else:
                embeds = "embed" in name or "query_tokens" in name
                weight.normal_(0, 0.02 if embeds else 0.5 / math.sqrt(weight[0].numel()), generator=generator)
    _fill_buffers(model, kind, config, device)
    architecture = ARCHITECTURES[family]
    tokenizer = AutoTokenizer.from_pretrained(locate_tokenizer(family if family == "blip2" else "minigpt4"))
    dialogue = _DIALOGUES.get(family) or architecture.dialogue or Dialogue()
    if family != "llava":
        return VisionLanguageBackbone(model, tokenizer, architecture, dialogue)
    # Its vision side reads the image processor of a folder.
    side = config.vision_config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        return VisionLanguageBackbone(model, tokenizer, architecture, dialogue, folder)


def _fill_buffers(model: torch.nn.Module, kind: Any, config: Any, device: torch.device) -> None:
    """Buffers, such as position ids and rotary frequencies, as a model of one layer computes them."""
    small = type(config).from_dict(config.to_dict())
    for part in (small.get_text_config(), small.vision_config):
        part.num_hidden_layers = 1
    known = dict(kind(small).named_buffers())
    for name, buffer in model.named_buffers():
        source = known.get(name)
        if source is None:
            raise RuntimeError(f"{name}: a buffer of a layer of its own; its values are not known")
        buffer.copy_(source.to(device, buffer.dtype))


def make_method(backbone: VisionLanguageBackbone, scale: Scale, **changes: Any) -> UniKE:
    """UniKE with the paper's preset, a fixed number of steps, and random knowledge on the device."""
    hidden = HyperParams.from_hparams("blip2").encoder_hidden if scale.is_full else 64
    fixed = {"beta": 0.1, "max_steps": scale.steps, "stop_loss": 0.0, "encoder_hidden": hidden, "k": 10}
    hparams = HyperParams.from_dict({**PRESET, **fixed, **changes})
    layers = backbone.layout.last(PRESET["layers"])
    method = build(hparams, draw_knowledge(backbone, layers, hparams, scale.items))
    assert isinstance(method, UniKE)
    return method
