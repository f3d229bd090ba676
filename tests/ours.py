"""Writes what our own BLIP2-OPT computes from the small original files, for tests in another environment.

python tests/ours.py FILE.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from original_files import make_spec
from PIL import Image
from safetensors.torch import save_file

from unike.backbones.base import encode_queries
from unike.types import Query

TARGET, LIMIT = "a fox", 6
PROMPTS = ("Question: what is in the picture? Short answer:", "how many dogs are there?")


def pictures() -> list[Image.Image]:
    """One larger and one smaller than the model sees them."""
    generator = torch.Generator().manual_seed(4)
    sizes = ((120, 97), (50, 61))
    noise = [torch.randint(256, (h, w, 3), generator=generator, dtype=torch.uint8) for w, h in sizes]
    return [Image.fromarray(n.numpy()) for n in noise]


def pixels(backbone: Any) -> torch.Tensor:
    """The pictures as the backbone's processor makes them, ``(2, 3, H, W)``."""
    return torch.stack([backbone.vision.pixels(p)["pixel_values"] for p in pictures()])


def queries(given: torch.Tensor) -> list[Query]:
    """Both pictures, each with a question, and a question without one."""
    asked = [Query(p, prompt, TARGET) for p, prompt in zip(given, PROMPTS, strict=True)]
    return [*asked, Query(None, PROMPTS[0], TARGET)]


@torch.no_grad()
def answers(backbone: Any, given: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the backbone computes for the pictures: the Q-Former's output, logits, and answers as bytes."""
    asked = queries(given)
    batch = encode_queries(backbone, asked)
    logits = backbone(batch).logits
    written = backbone.generate([q.image for q in asked], [q.prompt for q in asked], LIMIT)
    seen = backbone.vision.see([{"pixel_values": p} for p in given])
    return {
        "qformer": torch.stack([s["features"] for s in seen]),
        **{f"logits.{i}": logits[i][batch.attention_mask[i].bool()].clone() for i in range(len(batch))},
        **{f"text.{i}": torch.tensor(list(t.encode()), dtype=torch.uint8) for i, t in enumerate(written)},
    }


def main(target: Path) -> None:
    from unike.backbones import load_backbone

    backbone = load_backbone(make_spec("blip2"))
    given = pixels(backbone)
    with torch.no_grad():
        vision = backbone.model.get_image_features(given).vision_outputs.last_hidden_state
    save_file({"pixels": given, "vision": vision, **answers(backbone, given)}, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
