"""Pictures: every mode comes out as upright 8-bit RGB, every bad file as one line naming it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unike.datasets import images
from unike.datasets.images import image_path, open_image
from unike.types import UserError


def gradient(height: int = 6, width: int = 8) -> np.ndarray:
    return np.linspace(0, 255, height * width * 3).reshape(height, width, 3).astype(np.uint8)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(gradient()).save(path)
    return path


def one_problem(*args: object) -> str:
    with pytest.raises(UserError) as caught:
        open_image(*args)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", [str, Path, Image.open])
def test_path_string_and_pil_image_give_the_same_pixels(picture, kind):
    opened = open_image(kind(picture))
    assert opened.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(opened), gradient())


def test_a_pil_image_is_left_untouched(picture):
    source = Image.fromarray(gradient())
    opened = open_image(source)
    opened.putpixel((0, 0), (9, 9, 9))
    np.testing.assert_array_equal(np.asarray(source), gradient())


def test_relative_names_lie_under_the_root_and_absolute_ones_do_not(picture):
    assert image_path("/data", "val/a.jpg") == Path("/data/val/a.jpg")
    assert image_path("/data", picture) == picture
    assert image_path(None, "a.jpg") == Path("a.jpg")
    assert open_image("picture.png", picture.parent).size == (8, 6)
    assert open_image(picture, "/nowhere").size == (8, 6)


def test_cmyk_jpeg(tmp_path):
    path = tmp_path / "cmyk.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, quality=100)
    assert Image.open(path).mode == "CMYK"
    red, green, blue = np.asarray(open_image(path)).reshape(-1, 3).mean(0)
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path, suffix):
    levels = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(levels).save(path)
    pixels = np.asarray(open_image(path))
    np.testing.assert_array_equal(pixels, np.array([[0, 1, 128, 255]])[..., None].repeat(3, -1))


def test_dark_sixteen_bit_picture_stays_dark():
    levels = np.full((2, 2), 200, dtype=np.uint16)
    assert np.asarray(open_image(Image.fromarray(levels))).max() == 1


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
        (np.array([[0, 257 * 128, 65535]], np.int32), [0, 128, 255]),
        (np.array([[-5, 0, 2_000_000]], np.int32), [0, 0, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, np.nan, np.inf]], np.float32), [0, 0, 0]),
        (np.array([[0.0, 17.0, 255.0]], np.float32), [0, 17, 255]),
    ],
)
def test_other_deep_grey_modes(levels, expected):
    np.testing.assert_array_equal(np.asarray(open_image(Image.fromarray(levels)))[0, :, 0], expected)


def test_transparency_is_laid_on_white(tmp_path):
    rgba = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (255, 0, 0, 255))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    for opened in (open_image(rgba), open_image(tmp_path / "palette.png")):
        assert opened.getpixel((0, 0)) == (255, 255, 255)
        assert opened.getpixel((1, 0)) == (255, 0, 0)
    assert open_image(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)


def test_opaque_palette(tmp_path):
    path = tmp_path / "picture.gif"
    Image.new("RGB", (4, 4), (0, 0, 255)).quantize().save(path)
    assert open_image(path).getpixel((1, 1)) == (0, 0, 255)


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    image.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    assert opened.size == (2, 4)
    assert opened.getpixel((1, 0)) == (255, 255, 255)
    assert open_image(opened).size == (2, 4)


def test_broken_exif_does_not_cost_the_picture(picture, monkeypatch):
    monkeypatch.setattr(images.ImageOps, "exif_transpose", lambda image: 1 / 0)
    assert open_image(picture).size == (8, 6)


def test_missing_file_directory_and_empty_name(tmp_path):
    assert one_problem("gone.png", tmp_path) == f"{tmp_path / 'gone.png'}: picture does not exist"
    assert str(tmp_path) in one_problem(tmp_path)
    assert "directory" in one_problem(tmp_path)
    assert "empty" in one_problem("", tmp_path)
    assert "int" in one_problem(3)
    assert "NoneType" in one_problem(None)


@pytest.mark.parametrize("name", ["nul\0byte.png", "x" * 5000, "two\nlines.png", "lone\udc80.png"])
def test_names_that_no_file_has(tmp_path, name):
    one_problem(name, tmp_path).encode()


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp"])
def test_truncated_picture(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(path) in one_problem(path)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_unreadable_content(tmp_path, content):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    assert str(path) in one_problem(path)


def test_a_lazily_opened_truncated_pil_image_names_its_file(picture):
    picture.write_bytes(picture.read_bytes()[:60])
    assert str(picture) in one_problem(Image.open(picture))


def test_decompression_bomb(picture, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert str(picture) in one_problem(picture)
