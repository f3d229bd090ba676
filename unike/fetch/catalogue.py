"""What can be fetched: names, places, sizes and licences, as ``catalogue.json`` lists them.

A size, a checksum or a licence that no source states is null there, and "not stated" where it is shown.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from unike.system.text import one_line
from unike.types import UserError

NOT_STATED = "not stated"
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Piece:
    """One source of files, of ``kind`` hub, url, drive or drive_folder.

    ``to`` is the folder that they are put in, below the working folder; for a ``url`` it is the file.
    ``bytes`` and ``licence`` are None where no source states them. ``folders`` are those of an archive that
    are wanted; with ``unpack`` the archives among a repository's files are unpacked in place. ``sha256``
    holds checksums by file.
    """

    kind: str
    to: str
    sources: tuple[str, ...]
    bytes: int | None = None
    licence: str | None = None
    repository: str = ""
    type: str = "model"
    url: str = ""
    id: str = ""
    file: str = ""
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    unpack: bool = False
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Where its files come from, in a few words."""
        if self.kind == "hub":
            return f"Hugging Face: {self.repository}"
        if self.kind == "url":
            return f"{urlsplit(self.url).hostname}: {PurePosixPath(self.to).name}"
        return f"Google Drive: {self.file or ', '.join(self.files)}"


@dataclass(frozen=True)
class Item:
    """What one name fetches."""

    name: str
    title: str
    pieces: tuple[Piece, ...]


def read_catalogue() -> dict[str, Item]:
    """All items by name."""
    text = (files("unike.fetch") / "catalogue.json").read_text(encoding="utf-8")
    return {name: _parse_item(name, values) for name, values in json.loads(text).items()}


def find_item(name: str) -> Item:
    """The item of a name, or a whole repository of the hub by ``owner/name``; else a UserError."""
    items = read_catalogue()
    if name in items:
        return items[name]
    if _REPOSITORY.fullmatch(name):
        place = f"hugging_cache/{PurePosixPath(name).name}"
        return Item(name, "a repository of the hub", (Piece("hub", place, (), repository=name),))
    near = difflib.get_close_matches(name, items, n=1, cutoff=0.0)
    raise UserError(
        f"{one_line(name, 80)}: is not in the catalogue; the nearest name is {near[0]}; expected one of "
        f"{', '.join(items)}, or owner/name of a repository on the hub"
    )


def _parse_item(name: str, values: Mapping[str, Any]) -> Item:
    return Item(name, values["title"], tuple(_parse_piece(piece) for piece in values["pieces"]))


def _parse_piece(values: Mapping[str, Any]) -> Piece:
    known: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    return Piece(**{**known, "sha256": known.get("sha256") or {}})
