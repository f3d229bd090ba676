"""What the tower makes of photographs and scenes in several views, computed once and kept on disk.

A view is a crop of the image, mirrored or not, in other colours; view 0 is the image as the backbone takes
it. Features are kept in half precision by image, view and tower. They are written after every ``CHUNK``
images: an interrupted computation goes on from there.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageEnhance, ImageOps

from unike.backbones.store import RowStore, row_key
from unike.backbones.vlm import VisionLanguageBackbone

CHUNK, BATCH = 64, 8
MOST_BYTES = 8 << 30
# Share of the image's area that a view shows, its sides' ratio, and how far its colours may be off.
AREA, RATIO, COLORS = (0.35, 1.0), (0.75, 4 / 3), 0.4
VERSION = 1


@dataclass(frozen=True)
class Shown:
    """An image by a ``key`` of its content, and how to get it."""

    key: str
    open: Callable[[], Image.Image]


def change_view(image: Image.Image, chooser: random.Random) -> Image.Image:
    """A random crop, mirrored in half of the cases, with other brightness, contrast and colour."""
    width, height = image.size
    share, ratio = chooser.uniform(*AREA), chooser.uniform(*RATIO)
    w = min(width, max(1, round((width * height * share * ratio) ** 0.5)))
    h = min(height, max(1, round((width * height * share / ratio) ** 0.5)))
    left, top = chooser.randint(0, width - w), chooser.randint(0, height - h)
    image = image.crop((left, top, left + w, top + h))
    if chooser.random() < 0.5:
        image = ImageOps.mirror(image)
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = kind(image).enhance(chooser.uniform(1 - COLORS, 1 + COLORS))
    return image


def describe_tower(backbone: VisionLanguageBackbone) -> str:
    """A checksum of the tower's weights and of how it takes images."""
    digest = hashlib.sha256(f"{VERSION} {backbone.vision.settings} {backbone.vision.tower.grid}".encode())
    for parameter in backbone.vision.tower.parameters():
        digest.update(parameter.detach().float().numpy().tobytes())
    return digest.hexdigest()


class ViewStore:
    """Features of images in views, on disk in ``folder``."""

    def __init__(self, folder: Path, backbone: VisionLanguageBackbone) -> None:
        self.backbone = backbone
        self.store = RowStore(folder, f"{describe_tower(backbone)}/views", MOST_BYTES)

    def get(
        self, images: Sequence[Shown], view: int, tick: Callable[[int], object] = lambda n: None
    ) -> torch.Tensor:
        """``(n, 1 + cells, d)`` in half precision; ``tick`` is called with how many images are done."""
        keys = [row_key((view, image.key)) for image in images]
        found = self.store.get(keys)
        tick(len(found))
        waiting = [(key, image) for key, image in zip(keys, images, strict=True) if key not in found]
        for start in range(0, len(waiting), CHUNK):
            chunk = waiting[start : start + CHUNK]
            seen = [
                self._see([i for _, i in chunk[at : at + BATCH]], view) for at in range(0, len(chunk), BATCH)
            ]
            rows = {key: {"features": f} for (key, _), f in zip(chunk, torch.cat(seen), strict=True)}
            self.store.put(rows)
            found.update(rows)
            tick(len(chunk))
        return torch.stack([found[key]["features"] for key in keys])

    def _see(self, images: Sequence[Shown], view: int) -> torch.Tensor:
        vision, opened = self.backbone.vision, [image.open().convert("RGB") for image in images]
        if view:
            choosers = [random.Random(f"{view}/{image.key}") for image in images]
            opened = [change_view(o, c) for o, c in zip(opened, choosers, strict=True)]
        seen = vision.see([vision.pixels(image) for image in opened])
        return torch.stack([parts["features"] for parts in seen]).half()
