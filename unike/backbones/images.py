"""Pixels for the vision tower, and its features kept by image content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unike.backbones.checkpoint_files import reading
from unike.backbones.store import RowStore, row_key
from unike.datasets.images import open_image
from unike.system.cache import BoundedCache
from unike.system.faults import give_back
from unike.types import ImageLike, UserError

# A picture, or what was seen of it: tensors by name.
Parts = Mapping[str, torch.Tensor]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def image_processor(folder: str | None, size: int) -> Any:
    """The folder's own image processor at ``size`` pixels, or CLIP's normalisation without one."""
    # Here, because LAVIS needs a `transformers` that has no such class yet.
    from transformers import BlipImageProcessorPil

    square = {"height": size, "width": size}
    if folder is not None and (Path(folder) / "preprocessor_config.json").is_file():
        with reading(f"{folder}: preprocessor_config.json cannot be read"):
            return BlipImageProcessorPil.from_pretrained(folder, size=square)
    return BlipImageProcessorPil(size=square, image_mean=CLIP_MEAN, image_std=CLIP_STD)


def normalised(image: ImageLike, read: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    """``(3, H, W)`` as ``read`` makes it of a picture; a float tensor is taken as it is.

    Raises UserError for a tensor of another shape and for a picture that cannot be read.
    """
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise UserError(
                f"image tensor: expected normalised floats (3, H, W), got {tuple(image.shape)} {image.dtype}"
            )
        return image
    return read(open_image(image))


class FeatureCache:
    """What a vision side saw, by image content, so that a picture used by many queries is seen once.

    It stays in memory up to ``max_bytes``, what was not asked for longest goes first; with a ``store`` it
    is on disk too. ``computed`` counts pictures that were seen. ``alone`` sees each picture by itself: in
    a batch its features differ in the last bits with the other pictures.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Parts]], list[Parts]],
        max_bytes: int = 1 << 29,
        store: RowStore | None = None,
    ) -> None:
        self.compute, self.store = compute, store
        self.alone = False
        self.computed = 0
        self._kept = BoundedCache[str, Parts](max_bytes, _nbytes)

    def seen(
        self,
        images: Sequence[ImageLike],
        pixels: Callable[[ImageLike], Parts],
        batch: int = 32,
        device: torch.device | None = None,
    ) -> list[Parts]:
        """What ``compute`` gives for each picture, on ``device``, or where it is computed."""
        keys = [content_key(i) for i in images]
        found = {k: parts for k in keys if (parts := self._kept.get(k)) is not None}
        found.update(self._load([k for k in dict.fromkeys(keys) if k not in found], device))
        waiting = list({k: i for k, i in zip(keys, images, strict=True) if k not in found}.items())
        step = 1 if self.alone else batch
        for start in range(0, len(waiting), step):
            part = waiting[start : start + step]
            states = self.compute([pixels(image) for _, image in part])
            self.computed += len(part)
            # Copies: a view would keep its whole batch in memory.
            made: dict[str, Parts] = {
                key: {name: tensor.clone().to(device) for name, tensor in state.items()}
                for (key, _), state in zip(part, states, strict=True)
            }
            found.update(made)
            if self.store is not None:
                self.store.put({row_key(k): state for k, state in made.items()})
        if waiting:
            give_back()
        for key in keys:
            self._kept.put(key, found[key])
        return [found[k] for k in keys]

    def forget(self) -> None:
        """Empties the memory."""
        self._kept.clear()

    def _load(self, keys: list[str], device: torch.device | None) -> dict[str, Parts]:
        if self.store is None or not keys:
            return {}
        rows = self.store.get([row_key(k) for k in keys])
        return {
            k: {name: tensor.to(device) for name, tensor in rows[row_key(k)].items()}
            for k in keys
            if row_key(k) in rows
        }


def _nbytes(parts: Parts) -> int:
    return sum(tensor.nbytes for tensor in parts.values())


def content_key(image: ImageLike) -> str:
    """The same for the same picture: a file, its copy under another name, and its PIL image.

    A file is decoded once as long as its time and size stay. A float tensor counts by its own numbers.
    Raises UserError for a picture that cannot be read.
    """
    if isinstance(image, torch.Tensor):
        raw = image.detach().cpu().contiguous()
        about = f"{raw.dtype} {tuple(raw.shape)}"
        return f"{hashlib.sha1(raw.reshape(-1).view(torch.uint8).numpy().data).hexdigest()} {about}"
    if isinstance(image, Image.Image):
        return _picture_key(image)
    path = Path(image)
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: no such picture ({error.strerror})") from error
    return _file_key(path, stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1 << 16)
def _file_key(path: Path, *stat: int) -> str:
    return _picture_key(path)


def _picture_key(image: ImageLike) -> str:
    opened = open_image(image)
    return f"{hashlib.sha1(opened.tobytes()).hexdigest()} {opened.size}"
