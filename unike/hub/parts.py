"""What is trained once for a model, as folders of safetensors and JSON: found, and checked before it is
pushed or put in place.

Nothing here imports torch, and nothing of a file is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unike.system.files import check_tensors, read_index
from unike.system.text import one_line
from unike.types import UserError

ITEMS = "items.jsonl"
# By kind: the stem of index and tensors, where its folders stand in a repository, and what its index has.
KINDS: dict[str, tuple[str, str, Mapping[str, type]]] = {
    "knowledge": ("knowledge", "knowledge", {"backbone": str, "layers": list, "options": dict, "fit": dict}),
    "editor": ("editor", "editors", {"backbone": str, "layers": list, "options": dict, "training": dict}),
    "scope": ("scope", "scope", {"backbone": str, "layer": int, "options": dict, "thresholds": dict}),
}
# The fields of ``unike.types.KnowledgeItem``.
ITEM_FIELDS = {"prompt", "target", "wrong", "image"}
_NAME = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"
_PLACE = re.compile(rf"(knowledge/{_NAME}|scope/{_NAME}|editors/{_NAME}/{_NAME})/({_NAME})")
_LARGEST_INDEX, _LARGEST_ITEMS = 64 << 20, 1 << 30


@dataclass(frozen=True)
class TrainedPart:
    """A checked folder: its kind, its place in a repository, and what its index says."""

    kind: str
    folder: Path
    place: str
    index: Mapping[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        """Index, tensors, and the texts of a knowledge memory."""
        names = list_names(self.kind)
        return tuple(path for name in names if (path := self.folder / name).is_file())

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it is for; of a scope classifier, the one whose input it reads."""
        return tuple(self.index["layers"]) if self.kind != "scope" else (self.index["layer"],)


def list_names(kind: str) -> tuple[str, ...]:
    """The files that a part of this kind may have, its index first."""
    stem = KINDS[kind][0]
    return (f"{stem}.json", f"{stem}.safetensors", *((ITEMS,) if kind == "knowledge" else ()))


def find_parts(paths: Sequence[Path]) -> list[TrainedPart]:
    """The checked parts in folders, or anywhere below them. UserError where there are none, and where one is
    damaged."""
    found: dict[Path, TrainedPart] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(
                f"{one_line(path)}: no such folder; expected knowledge, editors or scope classifiers"
            )
        here = {folder: kind for kind in KINDS for folder in _list_folders(path, kind)}
        if not here:
            names = ", ".join(list_names(kind)[0] for kind in KINDS)
            raise UserError(
                f"{one_line(path)}: holds nothing that was trained; expected {names} in it or below"
            )
        found |= {folder.resolve(): read_part(folder, kind) for folder, kind in sorted(here.items())}
    parts = list(found.values())
    places = [part.place for part in parts]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise UserError(f"{twice}: two of the folders would have this place; push them one at a time")
    return parts


def _list_folders(path: Path, kind: str) -> Iterator[Path]:
    return (index.parent for index in path.rglob(list_names(kind)[0]) if index.is_file())


def group_files(names: Sequence[str]) -> dict[str, list[str]]:
    """Of a repository's files those of parts, by the place of the part; all others are left out."""
    found: dict[str, list[str]] = {}
    for name in names:
        match = _PLACE.fullmatch(name)
        if match and ".." not in name and match[2] in list_names(get_kind(match[1])):
            found.setdefault(match[1], []).append(name)
    return {place: files for place, files in found.items() if _has_both(place, files)}


def get_kind(place: str) -> str:
    """The kind of the part that stands at this place."""
    top = place.split("/")[0]
    return next(kind for kind, (_, folder, _) in KINDS.items() if folder == top)


def _has_both(place: str, files: Sequence[str]) -> bool:
    return {f"{place}/{name}" for name in list_names(get_kind(place))[:2]} <= {*files}


# ---------------------------------------------------------------- checks


def read_part(folder: Path, kind: str) -> TrainedPart:
    """The part in a folder. UserError where anything of it is missing or damaged."""
    _, top, fields = KINDS[kind]
    index_name, tensors_name, *rest = list_names(kind)
    index, tensors = folder / index_name, folder / tensors_name
    for path, most in (
        (index, _LARGEST_INDEX),
        (tensors, None),
        *((folder / n, _LARGEST_ITEMS) for n in rest),
    ):
        _require_file(path, most, is_optional=path.name == ITEMS)
    values = read_index(index)
    for name, type_ in fields.items():
        if not isinstance(values.get(name), type_) or isinstance(values[name], bool):
            raise UserError(f"{one_line(index)}: is damaged: {name}: expected {type_.__name__}")
    check_tensors(index, tensors)
    rows = _read_header(tensors)
    if (folder / ITEMS).is_file() and kind == "knowledge":
        _check_items(folder / ITEMS, rows)
    name = _name_folder(folder, kind, values)
    place = f"{top}/{values['options'].get('method')}/{name}" if kind == "editor" else f"{top}/{name}"
    if not _PLACE.fullmatch(f"{place}/{index_name}"):
        raise UserError(f"{one_line(folder)}: {one_line(place, 80)}: is no place in a repository")
    return TrainedPart(kind, folder, place, values)


def _name_folder(folder: Path, kind: str, values: Mapping[str, Any]) -> str:
    """The folder's own name, which says what it was trained for; of a shipped memory the model's."""
    name = folder.resolve().name
    return str(values["backbone"]) if name == KINDS[kind][1] else name


def _require_file(path: Path, most: int | None, is_optional: bool) -> None:
    if is_optional and not path.exists():
        return
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{one_line(path)}: is missing, or is no regular file")
    if most is not None and (size := path.stat().st_size) > most:
        raise UserError(f"{one_line(path)}: {size} bytes; expected {most} or fewer")


def _read_header(path: Path) -> int | None:
    """Checks that a file is safetensors; the number of items of a memory, None for other parts."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            memory = next((name for name in names if name.endswith(".sem")), None)
            rows = None if memory is None else int(file.get_slice(memory).get_shape()[0])
    except Exception as error:  # the library's errors have no common type
        raise UserError(f"{one_line(path)}: is no safetensors file: {one_line(error, 160)}") from error
    if not names:
        raise UserError(f"{one_line(path)}: holds no tensors")
    return rows


def _check_items(path: Path, rows: int | None) -> None:
    """UserError unless each line is an item, and there are as many as states."""
    count = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for count, line in enumerate(lines, 1):
                item = json.loads(line)
                texts = isinstance(item, dict) and all(v is None or isinstance(v, str) for v in item.values())
                if not texts or item.keys() != ITEM_FIELDS:
                    raise ValueError(f"line {count} is no item")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{one_line(path)}: is damaged: {one_line(error, 160)}") from error
    if rows is not None and count != rows:
        raise UserError(f"{one_line(path)}: is damaged: {count} lines for {rows} items")
