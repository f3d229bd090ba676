"""Labelled photographs of a folder, and which of them are kept from training.

Two kinds are held out: all photographs of some names, and one photograph of each other name that has two or
more. Of names with three or more another one is for validation: what training keeps is chosen by these. The
choice depends on the names and contents alone, not on where the folder lies.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unike.datasets.answers import normalise_answer
from unike.own.benchmark import SUFFIXES
from unike.system.text import one_line
from unike.types import UserError

# ImageNet's way to name files: the synset, in some sets a number, the name.
_SYNSET = re.compile(r"n\d{8}_(?:\d+_)?(?P<name>\D.*)")
SPLITS = ("train", "validation", "held_photographs", "held_names")


@dataclass(frozen=True)
class Photo:
    """A photograph with the name of what it shows; ``key`` is a checksum of its content."""

    path: Path
    name: str
    key: str


def read_name(path: Path, root: Path) -> str:
    """The name in a file's name, as ImageNet's sets have it, or else that of its folder below ``root``.

    UserError where it has neither.
    """
    found = _SYNSET.fullmatch(path.stem)
    if found is None and path.parent == root:
        raise UserError(
            f"{one_line(path)}: has no name; expected a subfolder for each name, or files named as "
            "n01443537_goldfish.jpg"
        )
    return (found["name"] if found else path.parent.name).replace("_", " ").strip()


def read_photos(folders: Sequence[Path]) -> list[Photo]:
    """All photographs below the folders, each content once. UserError where there is none."""
    photos: dict[str, Photo] = {}
    for root in folders:
        if not root.is_dir():
            raise UserError(f"--images {one_line(root)}: no such folder; expected a folder of photographs")
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise UserError(f"--images {one_line(root)}: holds no photograph; expected {', '.join(SUFFIXES)}")
        for path in files:
            key = hashlib.sha256(path.read_bytes()).hexdigest()[:24]
            photos.setdefault(key, Photo(path, read_name(path, root), key))
    return list(photos.values())


def split_photos(photos: Sequence[Photo], seed: int, names_share: float) -> dict[str, list[Photo]]:
    """The photographs by split, see ``SPLITS``; ``names_share`` of the names are held out as a whole."""
    split: dict[str, list[Photo]] = {name: [] for name in SPLITS}
    for name, group in _group(photos):
        if _draw(f"{seed}/{name}") < names_share:
            split["held_names"] += group
            continue
        # The order of the checksums is as good as a draw, and the same wherever the photographs lie.
        group = sorted(group, key=lambda photo: _draw(f"{seed}/{photo.key}"))
        held = min(2, len(group) - 1)
        split["held_photographs"] += group[: min(1, held)]
        split["validation"] += group[1:held]
        split["train"] += group[held:]
    if not split["train"]:
        raise UserError("--images: every name is held out; expected more photographs, or a smaller share")
    return split


def _group(photos: Sequence[Photo]) -> Iterator[tuple[str, list[Photo]]]:
    groups: dict[str, list[Photo]] = {}
    for photo in photos:
        groups.setdefault(normalise_answer(photo.name), []).append(photo)
    yield from sorted(groups.items())


def _draw(text: str) -> float:
    """A number in [0, 1) that the text alone decides."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12
