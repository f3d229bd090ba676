"""Draws a stand-in for each image that annotations name, so that their text can be asked without the images.

python -m scripts.stand_in_images FILE [FILE ...] --into FOLDER

A stand-in shows nothing: its colours follow from the image's name alone. What a model answers about one is no
figure of a method.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from unike.datasets.images import lies_outside
from unike.datasets.mmedit import IMAGE_FIELDS, load_records
from unike.datasets.probe_files import read_probes
from unike.system.arguments import ArgumentParser
from unike.system.text import one_line
from unike.types import UserError

SIDE, CELLS = 64, 4
# Says of a folder that nothing in it is an image of somebody's.
MARKER = "STAND_INS.txt"
NOTE = (
    "Stand-ins that scripts.stand_in_images drew: their colours follow from their names, they show nothing.\n"
)


def list_image_names(path: Path, probes: Path | None = None) -> list[str]:
    """The images that a file of annotations names, with those of its derived probes, sorted. UserError as
    ``load_records`` and ``read_probes``."""
    names = {
        name
        for record in load_records(path)
        if isinstance(record, dict)
        for field in IMAGE_FIELDS
        if isinstance(name := record.get(field), str) and name.strip()
    }
    if probes is not None:
        rows = read_probes(probes, path)
        names |= {p.image for row in rows for p in row.probes.values() if p is not None and p.image}
    return sorted(names)


def draw_stand_in(name: str) -> Image.Image:
    """``CELLS`` by ``CELLS`` colours from the name's checksum, ``SIDE`` pixels a side."""
    found = hashlib.shake_256(name.encode("utf-8", "surrogatepass")).digest(CELLS * CELLS * 3)
    colours = np.frombuffer(found, np.uint8).reshape(CELLS, CELLS, 3)
    return Image.fromarray(colours.repeat(SIDE // CELLS, 0).repeat(SIDE // CELLS, 1))


def draw_all(names: Iterable[str], folder: Path) -> int:
    """Draws those that are not there yet; how many were drawn. No file is ever replaced.

    UserError for a folder with files of somebody else's, and for a name that leads out of the folder;
    nothing is drawn then.
    """
    names = list(names)
    _require_own(folder)
    if outside := [name for name in names if lies_outside(folder, name)]:
        raise UserError(f"{one_line(outside[0])}: lies outside of {one_line(folder)}; expected a name inside")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text(NOTE, encoding="utf-8")
        return sum(_draw(name, folder / name) for name in names)
    except (OSError, ValueError) as error:
        raise UserError(f"{one_line(folder)}: cannot be written: {one_line(error)}") from error


def _require_own(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{one_line(folder)}: is a file; expected a new folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        expected = "expected a new or empty folder, or one of stand-ins"
        raise UserError(f"{one_line(folder)}: has files of its own; {expected}")


def _draw(name: str, path: Path) -> bool:
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    encoded = io.BytesIO()
    draw_stand_in(name).save(encoded, kind if kind in ("JPEG", "PNG", "BMP", "WEBP", "GIF") else "PNG")
    with path.open("xb") as file:
        file.write(encoded.getvalue())
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 2 with one line for unusable input."""
    parser = ArgumentParser(
        description="Draw a stand-in for each image that annotations name; it shows nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="annotations in MMEdit's layout")
    parser.add_argument("--into", required=True, metavar="FOLDER", help="a new folder for the stand-ins")
    arguments = parser.parse_args(argv)
    try:
        names: set[str] = set()
        for file in map(Path, arguments.files):
            probes = file.with_suffix(".probes.json")
            names |= set(list_image_names(file, probes if probes.is_file() else None))
        drawn = draw_all(sorted(names), Path(arguments.into))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{drawn} of {len(names)} drawn, the others were there: {arguments.into}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
