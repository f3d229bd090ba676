"""Images as users hand them over: arrays, tensors, bytes, open files, rows of Hugging Face `datasets`.

Everything but a path becomes a PIL image here. No array or tensor library is imported but NumPy: a tensor
is known by its methods.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from unike.system.text import one_line
from unike.types import UserError

EXPECTED = "expected a path, a PIL image, an array, a tensor, bytes or an open file"
_ADDRESS = re.compile(r"(?:[a-z][a-z0-9+.-]+://|data:[a-z]+/)", re.IGNORECASE)
# An encoded image of this size would hold hundreds of millions of pixels.
_FILE_BYTES = 1 << 30
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# This distinguishes PyTorch's order, channels first, from NumPy's.
_CHANNELS = (1, 2, 3, 4)


@runtime_checkable
class Drawn(Protocol):
    """An image that is drawn when it is read; ``key`` is the same for equal ones."""

    def draw_image(self) -> Image.Image: ...

    @property
    def key(self) -> tuple[Any, ...]:
        """The images that it is made of, and what is done to them."""
        ...


def resolve_image(source: object) -> str | os.PathLike[str] | io.BytesIO | Image.Image:
    """What an image is read from: a path, encoded bytes, or a PIL image.

    Taken are paths; PIL images; bytes, bytearrays, memoryviews and open binary files of an encoded image;
    mappings with ``bytes`` or ``path``, as `datasets` gives undecoded images; arrays ``(H, W)`` or
    ``(H, W, C)`` of 1 to 4 channels, whose numbers are booleans, whole numbers from 0 to 255, 16-bit levels
    (uint16) or floats from 0 to 1; and uint8 tensors ``(C, H, W)``.

    Raises:
        UserError: one line, for a web address, for numbers of another range, and for everything else.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _check_path(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _wrap_bytes(bytes(source))
    if isinstance(source, Mapping):
        return _resolve_mapping(source)
    if isinstance(source, Drawn):
        return source.draw_image()
    if callable(getattr(source, "read", None)):
        return _wrap_bytes(_read_file(source))
    if is_tensor(source):
        return make_image(_read_tensor(source))
    if hasattr(source, "__array__") and not isinstance(source, type):
        return make_image(_read_array(source))
    raise UserError(f"image: {EXPECTED}, got {type(source).__name__}")


def is_tensor(value: object) -> bool:
    """Whether a value is a tensor of PyTorch, known without importing it."""
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "is_floating_point")


def _check_path(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    text = os.fspath(path)
    if not isinstance(text, str):
        raise UserError("image: expected a path of text, got a path of bytes")
    if _ADDRESS.match(text):
        raise UserError(
            f"image: {one_line(text, 80)}: addresses are not fetched; expected a file on this machine"
        )
    return path


def _resolve_mapping(value: Mapping[Any, Any]) -> str | os.PathLike[str] | io.BytesIO | Image.Image:
    """`datasets` gives an undecoded image as ``{"bytes": ..., "path": ...}``, one of them None."""
    if not {"bytes", "path"} & set(value) or set(value) - {"bytes", "path"}:
        names = ", ".join(sorted(one_line(key, 20) for key in value)[:6]) or "nothing"
        raise UserError(f"image: expected a mapping with bytes or path, got {names}")
    data, path = value.get("bytes"), value.get("path")
    if data is not None:
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise UserError(f"image['bytes']: expected bytes, got {type(data).__name__}")
        return _wrap_bytes(bytes(data))
    if isinstance(path, (str, os.PathLike)):
        return _check_path(path)
    raise UserError("image: its bytes and its path are both missing; expected one of them")


def _wrap_bytes(data: bytes) -> io.BytesIO:
    if not data:
        raise UserError("image: no bytes; expected those of an encoded image")
    return io.BytesIO(data)


def _read_file(file: Any) -> bytes:
    """All bytes of an open file, which stays where it was."""
    if getattr(file, "closed", False):
        raise UserError("image: the file is closed; expected an open one")
    try:
        place = file.tell() if file.seekable() else None
        if place is not None:
            file.seek(0)
        data = file.read(_FILE_BYTES + 1)
        if place is not None:
            file.seek(place)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"image: the open file cannot be read: {one_line(error)}") from error
    if not isinstance(data, bytes):
        raise UserError("image: the file is open for text; expected mode 'rb'")
    if len(data) > _FILE_BYTES:
        raise UserError(f"image: more than {_FILE_BYTES} bytes; expected an encoded image")
    return data


# ---------------------------------------------------------------- numbers


def _read_tensor(tensor: Any) -> np.ndarray:
    """A tensor of whole numbers ``(C, H, W)`` or ``(H, W)`` as an array ``(H, W, C)``."""
    found = tuple(tensor.shape)
    if tensor.is_floating_point() or tensor.is_complex():
        raise UserError(f"image tensor: expected uint8 (C, H, W), got {tensor.dtype} {found}")
    array: np.ndarray = tensor.detach().cpu().numpy()
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[0] not in _CHANNELS:
        raise UserError(f"image tensor: expected uint8 (C, H, W) of 1 to 4 channels, got {found}")
    return array.transpose(1, 2, 0) if array.ndim == 3 else array


def _read_array(value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:  # whatever another library raises
        raise UserError(f"image: {type(value).__name__} is no array: {one_line(error)}") from error


def make_image(array: np.ndarray) -> Image.Image:
    """An array ``(H, W)`` or ``(H, W, C)`` as a PIL image; UserError as ``resolve_image``."""
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    levels = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    channels = 1 if levels.ndim == 2 else levels.shape[-1] if levels.ndim == 3 else 0
    if channels not in _MODES:
        hint = ""
        if array.ndim == 3 and array.shape[0] in _CHANNELS:
            hint = "; transpose(1, 2, 0) puts the channels last"
        raise UserError(
            f"image array: expected (H, W) or (H, W, C) of 1 to 4 channels, got {array.shape}{hint}"
        )
    if 0 in levels.shape:
        raise UserError(f"image array: {array.shape} holds no pixels")
    return Image.fromarray(np.ascontiguousarray(_scale_levels(levels)), _MODES[channels])


def _scale_levels(levels: np.ndarray) -> np.ndarray:
    """Numbers as levels from 0 to 255 (uint8)."""
    kind = levels.dtype.kind
    if levels.dtype == np.uint8:
        return levels
    if kind == "b":
        return levels.astype(np.uint8) * np.uint8(255)
    if levels.dtype == np.uint16:
        return np.rint(levels / 257.0).astype(np.uint8)
    if kind not in "iuf":
        raise UserError(f"image array: expected numbers, got {levels.dtype}")
    highest, scale = (1, 255.0) if kind == "f" else (255, 1.0)
    if not (np.isfinite(levels).all() and levels.min() >= 0 and levels.max() <= highest):
        what = "floats" if kind == "f" else "whole numbers"
        raise UserError(
            f"image array: expected {what} from 0 to {highest}, "
            f"got {one_line(levels.min())} to {one_line(levels.max())}"
        )
    return np.rint(levels.astype(np.float64) * scale).astype(np.uint8)
