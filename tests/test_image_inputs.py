"""Images as users hand them over: each kind gives the pixels that its file gives, or one clear line."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unike.backbones.images import content_key, take_image
from unike.datasets.images import open_image
from unike.types import UserError

PIXELS = np.random.default_rng(2).integers(0, 256, (7, 9, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]


def encode(pixels: np.ndarray = PIXELS, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


class ArrayLike:
    """What other array libraries hand over."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return PIXELS


class Stream(io.RawIOBase):
    """An open file that cannot go back."""

    def __init__(self, data: bytes) -> None:
        self.left = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def read(self, size: int = -1) -> bytes:
        return self.left.read(size)


SAME: dict[str, Any] = {
    "array": lambda p: PIXELS,
    "a view of an array": lambda p: PIXELS[:, ::-1][:, ::-1],
    "a batch of one": lambda p: PIXELS[None],
    "whole numbers": lambda p: PIXELS.astype(np.int64),
    "floats": lambda p: PIXELS.astype(np.float32) / 255,
    "another library's": lambda p: ArrayLike(),
    "tensor": lambda p: torch.from_numpy(PIXELS).permute(2, 0, 1),
    "tensor of a batch of one": lambda p: torch.from_numpy(PIXELS).permute(2, 0, 1)[None],
    "bytes": lambda p: encode(),
    "bytearray": lambda p: bytearray(encode()),
    "memoryview": lambda p: memoryview(encode()),
    "BytesIO": lambda p: io.BytesIO(encode()),
    "stream": lambda p: Stream(encode()),
    "Hugging Face's bytes": lambda p: {"bytes": encode(), "path": None},
    "Hugging Face's path": lambda p: {"bytes": None, "path": str(p)},
    "Hugging Face's both": lambda p: {"bytes": encode(), "path": "gone.png"},
    "NumPy's text": lambda p: np.str_(p),
    "PIL": lambda p: Image.fromarray(PIXELS),
    "opened by PIL": lambda p: Image.open(p),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(encode())
    return tmp_path / "a.png"


@pytest.mark.parametrize("kind", SAME)
def test_each_kind_gives_the_files_pixels(kind: str, path: Path) -> None:
    given = SAME[kind](path)
    taken = take_image(given)
    np.testing.assert_array_equal(np.asarray(open_image(taken)), PIXELS)
    assert content_key(taken) == content_key(path)


def test_another_image_has_another_key(path: Path) -> None:
    changed = PIXELS.copy()
    changed[0, 0, 0] ^= 1
    assert content_key(take_image(changed)) != content_key(path)


def test_an_open_file_stays_where_it_was(path: Path) -> None:
    with open(path, "rb") as file:
        file.read(5)
        np.testing.assert_array_equal(np.asarray(open_image(take_image(file))), PIXELS)
        assert file.tell() == 5
        assert content_key(file) == content_key(path), "also where it was not taken first"


def test_what_is_changed_afterwards_changes_nothing(path: Path) -> None:
    given, buffer = PIXELS.copy(), io.BytesIO(encode())
    taken = take_image(given), take_image(buffer)
    given[:] = 0
    buffer.close()
    assert {content_key(image) for image in taken} == {content_key(path)}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (GREY, GREY[..., None].repeat(3, 2)),
        (GREY[..., None], GREY[..., None].repeat(3, 2)),
        (GREY > 99, np.where(GREY > 99, 255, 0)[..., None].repeat(3, 2)),
        (GREY.astype(np.uint16) * 257, GREY[..., None].repeat(3, 2)),
        (np.dstack([PIXELS, np.full_like(GREY, 255)]), PIXELS),
        (np.dstack([PIXELS, np.zeros_like(GREY)]), np.full_like(PIXELS, 255)),
        (np.dstack([GREY, np.full_like(GREY, 255)]), GREY[..., None].repeat(3, 2)),
        (torch.from_numpy(GREY), GREY[..., None].repeat(3, 2)),
    ],
    ids=[
        "grey",
        "one channel",
        "black and white",
        "16 bits",
        "opaque",
        "transparent",
        "grey opaque",
        "tensor",
    ],
)
def test_other_channels_become_rgb(given: Any, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(open_image(given)), expected)


MODES = "1 L LA La P PA RGB RGBA RGBX RGBa CMYK YCbCr LAB HSV I I;16 I;16B F"


@pytest.mark.parametrize("mode", MODES.split())
def test_pil_images_are_taken_in_every_mode(mode: str) -> None:
    taken = take_image(Image.new(mode, (5, 4)))
    assert open_image(taken).mode == "RGB"
    assert content_key(taken)


REFUSED: dict[str, tuple[Any, str]] = {
    "a number": (3, "got int"),
    "a class": (np.ndarray, "got type"),
    "an address": ("https://example.org/a.png", "addresses are not fetched"),
    "data": ("data:image/png;base64,AAAA", "addresses are not fetched"),
    "a bucket": ("s3://bucket/a.png", "addresses are not fetched"),
    "no bytes": (b"", "no bytes"),
    "other bytes": (b"abc", "not an image in a known format"),
    "half an image": (encode()[:60], "image cannot be read"),
    "text": (io.StringIO("a"), "open for text"),
    "an empty mapping": ({}, "bytes or path, got nothing"),
    "another mapping": ({"url": "a"}, "bytes or path, got url"),
    "a mapping of nothing": ({"bytes": None, "path": None}, "both missing"),
    "a mapping of texts": ({"bytes": "abc", "path": None}, "expected bytes, got str"),
    "channels first": (PIXELS.transpose(2, 0, 1), "transpose(1, 2, 0)"),
    "a vector": (np.zeros(3, np.uint8), "got (3,)"),
    "no pixels": (np.zeros((0, 4, 3), np.uint8), "no pixels"),
    "no pixels of PIL": (Image.new("RGB", (0, 3)), "0 x 3 pixels"),
    "texts": (np.array([["a"]]), "expected numbers"),
    "objects": (np.array([[None]]), "expected numbers"),
    "complex": (np.zeros((2, 2), complex), "expected numbers"),
    "floats to 255": (PIXELS.astype(float), "floats from 0 to 1"),
    "negative": (-PIXELS.astype(int), "whole numbers from 0 to 255"),
    "NaN": (np.full((2, 2), np.nan), "floats from 0 to 1"),
    "NaN in a tensor": (torch.full((3, 4, 4), torch.nan), "NaN"),
    "a tensor of one channel": (torch.zeros(1, 4, 4), "(3, H, W)"),
    "an empty tensor": (torch.zeros(3, 0, 0), "(3, H, W)"),
    "a complex tensor": (torch.zeros(3, 4, 4, dtype=torch.complex64), "uint8 (C, H, W)"),
    "channels last": (torch.from_numpy(PIXELS), "uint8 (C, H, W)"),
    "a path of bytes": (Path, "got type"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_image_is_one_line(kind: str) -> None:
    given, expected = REFUSED[kind]
    with pytest.raises(UserError) as caught:
        open_image(take_image(given))
    (line,) = caught.value.problems
    assert expected in line
    assert "\n" not in line


def test_a_closed_file_is_named(path: Path) -> None:
    with open(path, "rb") as file:
        pass
    with pytest.raises(UserError, match="closed"):
        take_image(file)


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 300 + ".png"])
def test_a_name_that_no_file_has_is_one_line(name: str) -> None:
    for read in (open_image, content_key):
        with pytest.raises(UserError) as caught:
            read(name)
        assert len(caught.value.problems) == 1
