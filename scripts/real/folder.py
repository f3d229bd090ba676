"""The folder of smol: in Hugging Face's layout, with the projector as a shard of its own.

``projector.safetensors`` and ``projector.json`` are what was trained, and what a repository may ship. All
else is converted from packages. A folder is whole once it has its index, which is written last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from unike.backbones.efficientnet import EfficientNetLiteConfig
from unike.backbones.smol import SmolConfig
from unike.config.hparams import HyperParams
from unike.system.files import compute_sha256, replace_atomically, write_json, write_text
from unike.types import UserError

HOME = Path(__file__).resolve().parents[2] / "hugging_cache" / "smol"
LANGUAGE, VISION, PROJECTOR = "language.safetensors", "vision.safetensors", "projector.safetensors"
ABOUT, INDEX, RECORD = "projector.json", "model.safetensors.index.json", "converted.json"
_PREFIXES = {
    LANGUAGE: "language_model.",
    VISION: "vision_tower.",
    PROJECTOR: "multi_modal_projector.",
}
# The tower's own normalisation: (x - 127) / 128 of bytes.
_PIXELS = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}


@dataclass(frozen=True)
class About:
    """What a projector is: its ``names`` in the order of their scores, its shape, how it was ``trained``."""

    names: Sequence[str]
    slots: int
    hidden: int
    grid: int
    trained: Mapping[str, Any] = field(default_factory=dict)


def require_smol(hparams: HyperParams) -> None:
    """UserError for a YAML of another backbone."""
    if hparams.model_name != "smol":
        raise UserError(f"{hparams.source}: model_name: {hparams.model_name}; expected smol")


def save_shard(folder: Path, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a shard whole or not at all."""
    named = {f"{_PREFIXES[file]}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    with replace_atomically(folder / file) as temporary:
        save_file(named, temporary, metadata={"format": "pt"})


def load_tensor(folder: Path, file: str, name: str) -> torch.Tensor:
    """A tensor of a shard in float32. UserError where the shard is missing."""
    if not (folder / file).is_file():
        raise UserError(f"{folder / file}: is missing; run python -m scripts.real")
    with safe_open(folder / file, framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(f"{_PREFIXES[file]}{name}")
        return tensor.float()


def save_projector(folder: Path, tensors: Mapping[str, torch.Tensor], about: About) -> None:
    """Writes the projector in half precision, and what it is."""
    save_shard(folder, PROJECTOR, {name: tensor.half() for name, tensor in tensors.items()})
    write_json(folder / ABOUT, vars(about))


def read_about(folder: Path) -> About:
    """UserError where the file is damaged."""
    try:
        return About(**json.loads((folder / ABOUT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder / ABOUT}: is missing or damaged; delete {PROJECTOR} and {ABOUT}, then run "
            "python -m scripts.real"
        ) from error


def write_config(folder: Path, text: Mapping[str, Any]) -> None:
    """Writes ``config.json``, the image processor's settings, and last the index, by the projector that lies
    there; ``text`` are the language model's values."""
    about = read_about(folder)
    tower = EfficientNetLiteConfig(grid=about.grid)
    config = SmolConfig(
        text_config=dict(text),
        vision_config=tower,
        names=len(about.names),
        slots=about.slots,
        projector_hidden=about.hidden,
        dtype="float16",
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    write_text(folder / "config.json", config.to_json_string(use_diff=False))
    size = tower.image_size
    pixels = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        **_PIXELS,
    }
    write_json(folder / "preprocessor_config.json", pixels)
    where: dict[str, str] = {}
    for file in _PREFIXES:
        with safe_open(folder / file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    total = sum((folder / file).stat().st_size for file in _PREFIXES)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def write_record(folder: Path, sources: Mapping[str, str]) -> None:
    """Notes which files, by checksum, were made of which."""
    files = {file: compute_sha256(folder / file) for file in (LANGUAGE, VISION)}
    write_json(folder / RECORD, {"sources": dict(sources), "files": files})


def is_whole(folder: Path, sources: Mapping[str, str]) -> bool:
    """Whether the folder was converted from these sources, and nothing in it has changed since."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        same = record["sources"] == dict(sources)
        return same and all(compute_sha256(folder / f) == sha for f, sha in record["files"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
