"""Pictures from files: any mode that Pillow reads, as 8-bit RGB, or one line saying what is wrong."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from unike.system.text import one_line
from unike.types import UserError

PathLike = str | os.PathLike[str]
# Pillow hands these to Ghostscript or to the system.
_PROGRAMS = ("EPS", "WMF")


def image_path(root: PathLike | None, name: PathLike) -> Path:
    """The file that ``name`` means: relative names lie under ``root``, absolute ones stay as they are."""
    return Path(name) if root is None else Path(root) / name


def lies_outside(root: PathLike | None, name: str) -> bool:
    """Whether ``name`` leads out of the folder ``root``: absolute, by ``..``, or by a symbolic link."""
    if root is None:
        return False
    try:
        real, inside = os.path.realpath(os.path.join(root, name)), os.path.realpath(root)
    except ValueError:
        # No file has such a name: it is missing, which others say.
        return False
    return real != inside and not real.startswith(os.path.join(inside, ""))


def open_image(source: Any, root: PathLike | None = None) -> Image.Image:
    """The picture as a new 8-bit RGB image, upright, transparency laid on white.

    ``source`` is a path, absolute or relative to ``root``, or a PIL image (left untouched). Grey levels
    of 16 bits are scaled to 8, not clipped; of an animation, the first frame.

    Raises:
        UserError: one line naming the file, if it is missing, not a regular file, truncated or not a
            picture, or if ``source`` is something else.
    """
    if isinstance(source, Image.Image):
        name = one_line(getattr(source, "filename", "") or "image in memory")
        return _decode(source, name)
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(f"image: expected a path or a PIL image, got {type(source).__name__}")
    if not os.fspath(source):
        raise UserError("image: path is empty; expected a picture's file name")
    path = image_path(root, source)
    name = one_line(path)
    _require_file(path, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name}: not a picture in a known format") from error
    except Exception as error:  # format plugins raise anything, from struct.error to SyntaxError
        raise UserError(f"{name}: picture cannot be read: {_reason(error)}") from error
    with image:
        if image.format in _PROGRAMS:
            raise UserError(f"{name}: {image.format} pictures are not taken: another program would run them")
        return _decode(image, name)


def _require_file(path: Path, name: str) -> None:
    # os.path, not Path: these also answer False to names that no file system accepts.
    if os.path.isdir(path):
        raise UserError(f"{name}: is a directory; expected a picture")
    if not os.path.exists(path):
        raise UserError(f"{name}: picture does not exist")
    if not os.path.isfile(path):
        raise UserError(f"{name}: is not a regular file; expected a picture")


def _decode(image: Image.Image, name: str) -> Image.Image:
    most, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if most is not None and pixels > most:
        # Pillow itself only warns up to twice as many.
        raise UserError(f"{name}: {pixels} pixels; expected at most {most} (PIL.Image.MAX_IMAGE_PIXELS)")
    try:
        image.load()
        return _to_rgb(_upright(image))
    except Exception as error:  # see open_image
        raise UserError(f"{name}: picture cannot be read: {_reason(error)}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are sound (already loaded); only the metadata is not
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bits(levels: np.ndarray, mode: str) -> np.ndarray:
    """Grey levels ``(H, W)`` of a deep mode as uint8.

    Mode "I;16" has a known range; "I" and "F" say nothing about theirs, so it is the smallest usual
    one (1 for floats, 8 bits, 16 bits, their own maximum) which holds every level.
    """
    values = np.nan_to_num(levels.astype(np.float64), posinf=0.0, neginf=0.0)
    highest = float(values.max(initial=0.0))
    if mode.startswith("I;16"):
        full = 65535.0
    elif mode == "F" and highest <= 1.0:
        full = 1.0
    else:
        full = next((bound for bound in (255.0, 65535.0) if highest <= bound), highest)
    return np.clip(np.rint(values * (255.0 / full)), 0, 255).astype(np.uint8)


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__
