"""Pixels for the vision tower, and its features kept by image content."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from transformers import BlipImageProcessorPil

from unike.datasets.images import open_image
from unike.types import ImageLike, UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def image_processor(folder: str | None, size: int) -> BlipImageProcessorPil:
    """The folder's own image processor at ``size`` pixels, or CLIP's normalisation without one."""
    square = {"height": size, "width": size}
    if folder is not None and (Path(folder) / "preprocessor_config.json").is_file():
        return BlipImageProcessorPil.from_pretrained(folder, size=square)
    return BlipImageProcessorPil(size=square, image_mean=CLIP_MEAN, image_std=CLIP_STD)


def pixels(image: ImageLike, processor: BlipImageProcessorPil) -> torch.Tensor:
    """``(3, H, W)`` normalised; a float tensor is taken as it is.

    Raises UserError for a tensor of another shape and for a picture that cannot be read.
    """
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise UserError(
                f"image tensor: expected normalised floats (3, H, W), got {tuple(image.shape)} {image.dtype}"
            )
        return image
    return processor(open_image(image), return_tensors="pt")["pixel_values"][0]


class FeatureCache:
    """Vision features by image content, so that a picture used by many queries is seen once."""

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor], capacity: int = 8192) -> None:
        self.compute = compute
        self.capacity = capacity
        self.computed = 0
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def features(
        self, images: list[ImageLike], processor: BlipImageProcessorPil, batch: int = 32
    ) -> torch.Tensor:
        """``(len(images), image tokens, d)``."""
        keys = [content_key(i) for i in images]
        todo = {k: i for k, i in zip(keys, images, strict=True) if k not in self._kept}
        found = {k: self._kept[k] for k in keys if k in self._kept}
        waiting = list(todo.items())
        for start in range(0, len(waiting), batch):
            part = waiting[start : start + batch]
            states = self.compute(torch.stack([pixels(image, processor) for _, image in part]))
            self.computed += len(part)
            found.update({key: state for (key, _), state in zip(part, states, strict=True)})
        for key in keys:
            self._kept[key] = found[key]
            self._kept.move_to_end(key)
        while len(self._kept) > self.capacity:
            self._kept.popitem(last=False)
        return torch.stack([found[k] for k in keys])


def content_key(image: ImageLike) -> str:
    """The same for equal pictures, whatever they are given as; a path counts with time and size."""
    if isinstance(image, torch.Tensor):
        raw = image.detach().cpu().contiguous()
        return hashlib.sha1(raw.numpy().tobytes()).hexdigest() + str(tuple(raw.shape))
    if isinstance(image, Image.Image):
        return hashlib.sha1(image.tobytes()).hexdigest() + image.mode + str(image.size)
    path = Path(image)
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: no such picture ({error.strerror})") from error
    return f"{path.resolve()}:{stat.st_mtime_ns}:{stat.st_size}"
