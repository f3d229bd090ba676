"""Images from files: any mode that Pillow reads, as 8-bit RGB, or one line saying what is wrong."""

from __future__ import annotations

import difflib
import os
import warnings
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageCms, ImageOps

from unike.datasets.image_inputs import resolve_image
from unike.system.paths import check_path
from unike.system.shipped import find_shipped
from unike.system.text import one_line
from unike.types import UserError

PathLike = str | os.PathLike[str]
# Each pixel takes some 20 bytes until an image is small: more would take gigabytes, from a file of kilobytes.
MOST_PIXELS = 1 << 25
# Formats that hold images of other sizes than the one that is announced.
_NESTED = ("ICO", "ICNS")
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


# Of a folder's names so many are looked through for one that was mistyped.
_MOST_NAMES = 10_000


def open_image(source: object, root: PathLike | None = None) -> Image.Image:
    """The file as a new 8-bit RGB image, upright, transparency laid on white.

    ``source`` is a path, absolute or relative to ``root``, a PIL image (left untouched), or what
    ``resolve_image`` takes. Grey levels of 16 bits are scaled to 8, not clipped; of an animation, the first
    frame.

    Raises:
        UserError: one line naming the file, if it is missing, not a regular file, truncated, not an image
            or of more than ``MOST_PIXELS``, or if ``source`` is something else.
    """
    found = resolve_image(source)
    if root is not None:
        check_path(root, "image_root", "a folder of images")
    if isinstance(found, Image.Image):
        return _decode(found, one_line(getattr(found, "filename", "") or "image in memory"))
    if not isinstance(found, (str, os.PathLike)):
        return _open(found, "image in memory")
    if not os.fspath(found):
        raise UserError("image: path is empty; expected an image's file name")
    path = image_path(root, found)
    if root is None:
        # The example images of an installed package.
        path = Path(find_shipped(os.fspath(path)))
    name = one_line(path)
    _require_file(path, name)
    return _open(path, name)


def _open(file: Path | IO[bytes], name: str) -> Image.Image:
    """An encoded image, from a file or from memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image in a known format") from error
    except Exception as error:  # format plugins raise anything, from struct.error to SyntaxError
        raise UserError(f"{name}: image cannot be read: {_describe_error(error)}") from error
    with image:
        if image.format in _PROGRAMS:
            raise UserError(
                f"{name}: {image.format} images are not supported: another program would run them"
            )
        return _decode(image, name)


def _require_file(path: Path, name: str) -> None:
    # os.path, not Path: these also answer False to names that no file system accepts.
    if os.path.isdir(path):
        raise UserError(f"{name}: is a directory; expected an image")
    if not os.path.exists(path):
        raise UserError(f"{name}: image does not exist{_find_alike(path)}")
    if not os.path.isfile(path):
        raise UserError(f"{name}: is not a regular file; expected an image")


def _find_alike(path: Path) -> str:
    """The nearest name among the files beside a missing one, as the end of a message."""
    try:
        beside = [entry.name for entry in islice(os.scandir(path.parent), _MOST_NAMES)]
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.8)
    return f"; the nearest name there is {one_line(close[0], 80)}" if close else ""


def _decode(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height == 0:
        raise UserError(f"{name}: {image.width} x {image.height} pixels; expected some")
    most, pixels = MOST_PIXELS, image.width * image.height
    if Image.MAX_IMAGE_PIXELS is not None:
        # Pillow itself only warns up to twice as many.
        most = min(most, Image.MAX_IMAGE_PIXELS)
    if pixels > most:
        raise UserError(f"{name}: {pixels} pixels; expected at most {most}; make it smaller")
    try:
        with warnings.catch_warnings():
            if image.format in _NESTED:
                warnings.simplefilter("error", Image.DecompressionBombWarning)
            image.load()
        return _convert_to_rgb(_turn_upright(image))
    except Exception as error:  # see open_image
        raise UserError(f"{name}: image cannot be read: {_describe_error(error)}") from error


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are sound (already loaded); only the metadata is not
        return image


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_scale_to_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "LAB":
        return _convert_lab(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _convert_lab(image: Image.Image) -> Image.Image:
    # Pillow itself converts no such image.
    profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
    converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    assert converted is not None
    return converted


def _scale_to_eight_bits(levels: np.ndarray, mode: str) -> np.ndarray:
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


def _describe_error(error: Exception) -> str:
    return one_line(error) or type(error).__name__
