"""The small original files (random weights, real layout), and specs and copies of them for tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from unike.types import BackboneSpec

FILES = Path(__file__).parent / "fixtures" / "original_checkpoints"
FAMILIES = ("blip2", "minigpt4")


def make_spec(family: str, folder: Path = FILES, **changes: Any) -> BackboneSpec:
    """The spec of the small files, whose head counts aren't the originals'."""
    minigpt4 = family == "minigpt4"
    spec = BackboneSpec(
        model_name=family,
        name=str(folder / ("llama" if minigpt4 else "opt")),
        state_dict_file=str(folder / "eva_vit.pth"),
        qformer_checkpoint=str(
            folder / ("blip2_pretrained_flant5xxl.pth" if minigpt4 else "blip2_pretrained_opt.pth")
        ),
        pretrained_ckpt=str(folder / "pretrained_minigpt4.pth") if minigpt4 else None,
        image_size=84,
        vision_config={"num_hidden_layers": 3, "num_attention_heads": 4},
        qformer_config={"num_attention_heads": 4},
        source="small.yaml",
    )
    return dataclasses.replace(spec, **changes)
