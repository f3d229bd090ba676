"""Images made of others: restyled, or with one half of another image. They are drawn when they are read.

What learns which prompts an edit applies to is shown them beside a train record's own images: the same
content in another style, and other content in the same style.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from unike.datasets.images import open_image
from unike.types import ImageLike

HALVES = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Step:
    """One change of an image: its name, how strong it is, and the seed of what is random about it."""

    name: str
    strength: float
    seed: int = 0


@dataclass(frozen=True)
class ChangedImage:
    """An image after ``steps``; with ``other`` its ``half`` is first replaced by that half of the other one.

    Any function that takes an image takes it.
    """

    image: ImageLike
    steps: tuple[Step, ...] = ()
    other: ImageLike | None = None
    half: str | None = None

    def draw_image(self) -> Image.Image:
        """The image, 8-bit RGB. UserError where one that it is made of cannot be read."""
        out = open_image(self.image)
        if self.other is not None and self.half is not None:
            out = _replace_half(out, open_image(self.other), self.half)
        for step in self.steps:
            out = _CHANGES[step.name](out, step)
        return out

    @property
    def key(self) -> tuple[Any, ...]:
        """The images that it is made of, and what is done to them."""
        return self.image, self.other, self.half, *((s.name, s.strength, s.seed) for s in self.steps)


def restyle(image: ImageLike, rng: random.Random) -> ChangedImage:
    """The image in another style: one or two of ``STRENGTHS``, at a strength drawn from there."""
    names = rng.sample(sorted(STRENGTHS), rng.choice((1, 1, 2)))
    steps = (Step(name, rng.choice(STRENGTHS[name]), rng.randrange(1 << 30)) for name in names)
    return ChangedImage(image, tuple(steps))


def replace_half(image: ImageLike, other: ImageLike, half: str) -> ChangedImage:
    """The image with one of its ``HALVES`` taken from another one."""
    return ChangedImage(image, other=other, half=half)


def make_thumbnail(image: ImageLike, side: int = 8) -> np.ndarray:
    """A coarse view of an image, ``(3 * side * side)``, of mean 0 and length 1: alike for images of the same
    colors at the same places."""
    small = open_image(image).resize((side, side), Image.Resampling.BOX)
    values = np.asarray(small, dtype=np.float32).reshape(-1)
    values = values - values.mean()
    length: float = float(np.linalg.norm(values))
    return values / max(length, 1e-6)


def _replace_half(image: Image.Image, other: Image.Image, half: str) -> Image.Image:
    width, height = image.size
    boxes = {
        "left": (0, 0, width // 2, height),
        "right": (width // 2, 0, width, height),
        "top": (0, 0, width, height // 2),
        "bottom": (0, height // 2, width, height),
    }
    box = boxes[half]
    out = image.copy()
    out.paste(other.resize(image.size).crop(box), box[:2])
    return out


# ---------------------------------------------------------------- styles


def _apply_gamma(image: Image.Image, step: Step) -> Image.Image:
    table = [round(255 * (level / 255) ** step.strength) for level in range(256)]
    return image.point(table * 3)


def _shift_hue(image: Image.Image, step: Step) -> Image.Image:
    values = np.asarray(image.convert("HSV")).copy()
    values[..., 0] = (values[..., 0].astype(np.int32) + round(step.strength)) % 256
    return Image.fromarray(values, "HSV").convert("RGB")


def _posterize(image: Image.Image, step: Step) -> Image.Image:
    return ImageOps.posterize(image, round(step.strength))


def _compress(image: Image.Image, step: Step) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=round(step.strength))
    return Image.open(buffer).convert("RGB")


def _add_noise(image: Image.Image, step: Step) -> Image.Image:
    values = np.asarray(image, dtype=np.float32)
    noise = np.random.default_rng(step.seed).normal(0, step.strength, values.shape)
    return Image.fromarray(np.clip(np.rint(values + noise), 0, 255).astype(np.uint8))


def _sharpen(image: Image.Image, step: Step) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(step.strength)


def _saturate(image: Image.Image, step: Step) -> Image.Image:
    return ImageEnhance.Color(image).enhance(step.strength)


def _brighten(image: Image.Image, step: Step) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(step.strength)


def _pixelate(image: Image.Image, step: Step) -> Image.Image:
    width, height = image.size
    small = (max(1, round(width * step.strength)), max(1, round(height * step.strength)))
    return image.resize(small, Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.NEAREST)


_CHANGES: dict[str, Callable[[Image.Image, Step], Image.Image]] = {
    "gamma": _apply_gamma,
    "hue": _shift_hue,
    "posterize": _posterize,
    "jpeg": _compress,
    "noise": _add_noise,
    "sharpen": _sharpen,
    "saturate": _saturate,
    "brighten": _brighten,
    "pixelate": _pixelate,
}
# None of these is a style of the benchmark (``types.IMAGE_STYLES``); gamma above 1 darkens as ``dark`` does,
# and pixels lose detail as in ``blur``.
STRENGTHS: dict[str, Sequence[float]] = {
    "gamma": (0.6, 0.75, 1.35, 1.7),
    "hue": (-14, -9, 9, 14),
    "posterize": (3, 4),
    "jpeg": (15, 25, 40),
    "noise": (12, 22),
    "sharpen": (3.0, 5.0),
    "saturate": (1.6, 2.2),
    "brighten": (1.3, 1.6),
    "pixelate": (0.625,),
}
