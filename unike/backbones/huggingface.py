"""Backbones of today's ``transformers``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)
from transformers.utils import logging

from unike.backbones.answer_texts import find_stops
from unike.backbones.architecture import Architecture
from unike.backbones.checking import list_decoders
from unike.backbones.checkpoint_files import explain_read_errors, get_dtype
from unike.backbones.checkpoints import load_original
from unike.backbones.dialogue import Chat, Dialogue
from unike.backbones.original import require_whole
from unike.backbones.placement import build_quantization_config, dispatch, map_devices
from unike.backbones.smol import SmolForConditionalGeneration
from unike.backbones.vision import (
    Blip2Vision,
    GridVision,
    InstructVision,
    PooledVision,
    ProjectorVision,
    SplitVision,
)
from unike.backbones.vlm import VisionLanguageBackbone
from unike.types import BackboneSpec, UserError

SMALL_BYTES = 100 << 20
# BLIP2-OPT: the image's tokens stand alone before the prompt.
BLIP2_OPT = Architecture(
    Blip2ForConditionalGeneration, Blip2Vision, decoder="language_model", dialogue=Dialogue()
)
_QWEN_IMAGE = "<|image_pad|>"
ARCHITECTURES = {
    "blip2": BLIP2_OPT,
    # The same vision side with one projection; the image stands in a dialogue.
    "minigpt4": replace(
        BLIP2_OPT,
        dialogue=Dialogue(
            before_image="###Human: <Img>", after_image="</Img> ", stops=find_stops("minigpt4")
        ),
    ),
    "llava": Architecture(LlavaForConditionalGeneration, ProjectorVision),
    "llava_onevision": Architecture(LlavaOnevisionForConditionalGeneration, SplitVision),
    "qwen2_vl": Architecture(Qwen2VLForConditionalGeneration, GridVision, image=_QWEN_IMAGE),
    "qwen2_5_vl": Architecture(Qwen2_5_VLForConditionalGeneration, GridVision, image=_QWEN_IMAGE),
    # The image's tokens, BOS, the prompt, which the Q-Former reads too.
    "instructblip": Architecture(
        InstructBlipForConditionalGeneration,
        InstructVision,
        decoder="language_model",
        dialogue=Dialogue(bos=True),
    ),
    # The image's tokens are a sentence's: with a name in their place, the language model repeats it.
    "smol": Architecture(
        SmolForConditionalGeneration,
        PooledVision,
        decoder="language_model",
        dialogue=Dialogue(before_image="Picture: a", after_image=".\n"),
    ),
}


def load_huggingface(
    spec: BackboneSpec, device: torch.device, layers: int | tuple[int, ...], limit: int
) -> VisionLanguageBackbone:
    """A backbone of ``transformers``' classes, from a folder, a hub name or the original files.

    ``layers`` are those that will be edited, ``limit`` the most new tokens of an answer.
    """
    architecture = ARCHITECTURES[spec.model_name]
    model: Any
    if spec.original_files:
        model, folder = load_original(spec, device), None
        if spec.device_map is not None:
            depth = model.language_model.config.num_hidden_layers
            placed = map_devices(model, get_dtype(spec.dtype), _count_last_layers(layers, depth))
            model = dispatch(model, placed)
    else:
        model, folder = _load_folder(spec, architecture, device, layers), spec.name
    decoder = model.config.get_text_config().model_type
    if decoder not in list_decoders(spec):
        expected = " or ".join(list_decoders(spec))
        raise UserError(
            f"{spec.source}: name: {spec.name} holds a {decoder} decoder; "
            f"model_name {spec.model_name} expects {expected}"
        )
    with explain_read_errors(f"{spec.source}: name: {spec.name}: the tokenizer does not load"):
        tokenizer = AutoTokenizer.from_pretrained(spec.name)
    if spec.device_map is None and not getattr(model, "is_quantized", False):
        model.to(device)
    size = None if spec.original_files else spec.image_size
    with explain_read_errors(f"{spec.source}: name: {spec.name}: the files other than weights do not load"):
        dialogue = architecture.dialogue or _read_chat(spec, architecture, tokenizer)
        return VisionLanguageBackbone(model, tokenizer, architecture, dialogue, folder, size, limit)


def _read_chat(spec: BackboneSpec, architecture: Architecture, tokenizer: PreTrainedTokenizerBase) -> Chat:
    """The checkpoint's chat template: its processor's, or else its tokeniser's."""
    template = ProcessorMixin.get_processor_dict(spec.name)[0].get("chat_template") or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise UserError(f"{spec.source}: name: {spec.name} has no chat template")
    chat, at = Chat(template, architecture.image), f"{spec.source}: name: {spec.name}"
    if len(tokenizer(chat.image, add_special_tokens=False).input_ids) != 1:
        raise UserError(f"{at}: its tokenizer has no token {chat.image}")
    # Otherwise a template that does not work would end a run at its first question.
    for shown in (False, True):
        with explain_read_errors(f"{at}: its chat template does not work"):
            written = chat.text(tokenizer, "a", shown).count(chat.image)
        if written != shown:
            raise UserError(f"{at}: its chat template writes {written} {chat.image} for {int(shown)} images")
    return chat


def _count_last_layers(layers: int | tuple[int, ...], depth: int) -> int:
    """How many of the decoder's layers are edited, or lie above an edited one."""
    return layers if isinstance(layers, int) else depth - min(layers)


def _load_folder(
    spec: BackboneSpec, architecture: Architecture, device: torch.device, layers: int | tuple[int, ...]
) -> PreTrainedModel:
    dtype, more = get_dtype(spec.dtype), {}
    kind = "folder" if Path(spec.name).exists() else "hub name"
    with explain_read_errors(f"{spec.source}: name: {kind} {spec.name} cannot be loaded"):
        if (config := build_quantization_config(spec, dtype)) is not None:
            more = {"quantization_config": config, "device_map": {"": device}}
        elif spec.device_map is not None:
            with torch.device("meta"):
                skeleton: Any = architecture.model(AutoConfig.from_pretrained(spec.name))
            depth = skeleton.config.get_text_config().num_hidden_layers
            more = {"device_map": map_devices(skeleton, dtype, _count_last_layers(layers, depth))}
        with _silence(Path(spec.name)):
            loader: Any = architecture.model
            model, info = loader.from_pretrained(spec.name, dtype=dtype, output_loading_info=True, **more)
    require_whole(spec, info)
    return model


@contextmanager
def _silence(folder: Path) -> Iterator[None]:
    """Silences transformers' report of wrong weights, which our error line repeats, and its progress bar
    where the weights load in a moment."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    shown = logging.is_progress_bar_enabled()
    if folder.is_dir() and size < SMALL_BYTES:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
