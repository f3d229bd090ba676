"""Pixels for the vision tower, and its features, cached by image content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unike.backbones.checkpoint_files import explain_read_errors
from unike.backbones.store import RowStore, row_key
from unike.datasets.image_inputs import Drawn, resolve_image
from unike.datasets.images import open_image
from unike.system.cache import BoundedCache
from unike.system.faults import release_memory
from unike.system.hub import is_hub_id
from unike.system.text import one_line
from unike.types import ImageLike, UserError

# An image, or what the vision side computed of it: tensors by name.
Parts = Mapping[str, torch.Tensor]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def load_image_processor(folder: str | None, size: int) -> Any:
    """The folder's own image processor at ``size`` pixels, or CLIP's normalisation without one."""
    # Here, because LAVIS needs a `transformers` that has no such class yet.
    from transformers import BlipImageProcessorPil

    square = {"height": size, "width": size}
    if folder is not None and _has_settings(folder):
        with explain_read_errors(f"{folder}: preprocessor_config.json cannot be read"):
            return BlipImageProcessorPil.from_pretrained(folder, size=square)
    return BlipImageProcessorPil(size=square, image_mean=CLIP_MEAN, image_std=CLIP_STD)


def _has_settings(folder: str) -> bool:
    """Whether a folder, or an id of the hub, has an image processor's settings."""
    if not is_hub_id(folder):
        return (Path(folder) / "preprocessor_config.json").is_file()
    from transformers.utils import cached_file

    missing = {"_raise_exceptions_for_missing_entries": False}
    return cached_file(folder, "preprocessor_config.json", **missing) is not None


def normalise(image: ImageLike, read: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    """``(3, H, W)`` as ``read`` makes it of an image; a float tensor is taken as it is.

    Raises UserError for a float tensor of another shape, and for an image that cannot be read.
    """
    return check_pixels(image) if is_pixels(image) else read(open_image(image))


def is_pixels(image: ImageLike) -> bool:
    """Whether an image is a float tensor: pixels as a model takes them, already normalised."""
    return isinstance(image, torch.Tensor) and image.is_floating_point()


def check_pixels(image: torch.Tensor) -> torch.Tensor:
    """The normalised floats ``(3, H, W)``; UserError for another shape and for what are no numbers."""
    pixels = image[0] if image.ndim == 4 and len(image) == 1 else image
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.numel():
        raise UserError(
            f"image tensor: expected normalised floats (3, H, W), got {tuple(image.shape)} {image.dtype}"
        )
    if not pixels.isfinite().all():
        raise UserError("image tensor: holds NaN or infinity; expected normalised floats (3, H, W)")
    return pixels


def take_image(image: ImageLike | None) -> ImageLike | None:
    """An image as it is kept until it is encoded: paths and PIL images as they are, float tensors checked,
    all else decoded now, as a PIL image. None stays None.

    What a user changes or closes afterwards changes nothing. UserError for what is no image.
    """
    if image is None:
        return None
    if is_pixels(image):
        return check_pixels(image)
    found = resolve_image(image)
    if isinstance(found, (str, os.PathLike)):
        return found
    return image if image is found else open_image(found)


class FeatureCache:
    """Vision features by image content: an image in many queries is encoded once.

    Features stay in memory up to ``max_bytes``, those that were not asked for longest go first; with a
    ``store`` they are on disk too. ``computed`` counts images that were encoded. With ``alone`` each image is
    encoded by itself: in a batch the last bits of its features depend on the other images.
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
        self._kept = BoundedCache[str, Parts](max_bytes, _count_bytes)

    def get(
        self,
        images: Sequence[ImageLike],
        pixels: Callable[[ImageLike], Parts],
        batch: int = 32,
        device: torch.device | None = None,
    ) -> list[Parts]:
        """What ``compute`` gives for each image, on ``device``, or where it is computed."""
        keys = [content_key(i) for i in images]
        found = {k: parts for k in keys if (parts := self._kept.get(k)) is not None}
        found.update(self._load([k for k in dict.fromkeys(keys) if k not in found], device))
        waiting = list({k: i for k, i in zip(keys, images, strict=True) if k not in found}.items())
        step = 1 if self.alone else batch
        for start in range(0, len(waiting), step):
            part = waiting[start : start + step]
            # Tensors of inference mode carry no gradients, and these are kept for later.
            with torch.inference_mode(False):
                states = self.compute([pixels(image) for _, image in part])
                self.computed += len(part)
                # Copies: a view would keep its whole batch in memory.
                new: dict[str, Parts] = {
                    key: {name: tensor.clone().to(device) for name, tensor in state.items()}
                    for (key, _), state in zip(part, states, strict=True)
                }
            found.update(new)
            if self.store is not None:
                self.store.put({row_key(k): state for k, state in new.items()})
        if waiting:
            release_memory()
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


def _count_bytes(parts: Parts) -> int:
    return sum(tensor.nbytes for tensor in parts.values())


def content_key(image: ImageLike) -> str:
    """A key of an image's content: the same for a file, its copy under another name, and its PIL image.

    A file is decoded once as long as its times and size stay the same. A float tensor's key is that of its
    numbers. Raises UserError for an image that cannot be read.
    """
    if is_pixels(image):
        raw = check_pixels(image).detach().cpu().contiguous()
        about = f"{raw.dtype} {tuple(raw.shape)}"
        return f"{hashlib.sha1(raw.reshape(-1).view(torch.uint8).numpy().data).hexdigest()} {about}"
    if isinstance(image, Drawn):
        first, second, *changes = image.key
        made_of = [content_key(first), "" if second is None else content_key(second)]
        return f"{' '.join(made_of)} {changes}"
    if not isinstance(image, (str, os.PathLike)):
        return _hash_image(image)
    path = Path(image)
    try:
        stat = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        resolve_image(image)
        raise UserError(f"{one_line(path)}: no such image ({one_line(reason)})") from error
    # A copying program may set back the time of the last change, but not that of the entry itself.
    times = stat.st_mtime_ns, stat.st_ctime_ns
    return _hash_file(path, stat.st_dev, stat.st_ino, *times, stat.st_size)


@lru_cache(maxsize=1 << 16)
def _hash_file(path: Path, *stat: int) -> str:
    return _hash_image(path)


def _hash_image(image: ImageLike) -> str:
    opened = open_image(image)
    return f"{hashlib.sha1(opened.tobytes()).hexdigest()} {opened.size}"
