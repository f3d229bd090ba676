"""From a YAML (or its values) to a backbone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Blip2ForConditionalGeneration
from transformers.utils import logging

from unike.backbones.blip2_opt import BLIP2_OPT
from unike.backbones.checkpoints import DTYPES, load_original, require_files
from unike.backbones.hf import VisionLanguageBackbone
from unike.backbones.minigpt4 import MINIGPT4
from unike.hparams import HyperParams
from unike.types import BackboneSpec, UserError

SMALL_BYTES = 100 << 20
DIALOGUES = {"blip2": BLIP2_OPT, "minigpt4": MINIGPT4}


def pick_device(wanted: str) -> torch.device:
    """``auto`` takes CUDA where there is one; UserError where the wanted device is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device: {wanted}; found {torch.cuda.device_count()} CUDA devices, expected auto or cpu"
        )
    return device


def load_backbone(source: str | os.PathLike[str] | HyperParams | BackboneSpec) -> VisionLanguageBackbone:
    """A frozen backbone from a YAML file, hyper-parameters or a spec.

    Raises UserError, with every problem at once and before anything is loaded, for missing or wrong
    weight files.
    """
    if isinstance(source, (str, os.PathLike)):
        source = HyperParams.from_hparams(source)
    limit = source.max_new_tokens if isinstance(source, HyperParams) else 16
    spec = source.backbone if isinstance(source, HyperParams) else source
    device = pick_device(spec.device)
    require_files(spec)
    dialogue = DIALOGUES[spec.model_name]
    if spec.original_files:
        model, folder = load_original(spec), None
    else:
        model, folder = _load_folder(spec), spec.name
    text: Any = model.config.text_config
    decoder = text.model_type
    if decoder not in dialogue.decoders:
        expected = " or ".join(dialogue.decoders)
        raise UserError(
            f"{spec.source}: name: {spec.name} holds a {decoder} decoder; "
            f"model_name {spec.model_name} expects {expected}"
        )
    tokenizer = AutoTokenizer.from_pretrained(spec.name)
    model.to(device)  # type: ignore[arg-type]
    return VisionLanguageBackbone(
        model, tokenizer, dialogue, folder, None if spec.original_files else spec.image_size, limit
    )


def _load_folder(spec: BackboneSpec) -> Blip2ForConditionalGeneration:
    try:
        with _quiet_if_small(Path(spec.name)):
            return Blip2ForConditionalGeneration.from_pretrained(spec.name, dtype=DTYPES[spec.dtype])
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        kind = "folder" if Path(spec.name).exists() else "hub name"
        raise UserError(f"{spec.source}: name: {kind} {spec.name} cannot be loaded: {first}") from error


@contextmanager
def _quiet_if_small(folder: Path) -> Iterator[None]:
    """A progress bar for weights that load in a moment is noise."""
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    shown = logging.is_progress_bar_enabled()
    if folder.is_dir() and size < SMALL_BYTES:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
