"""Indexes of what is learnt once and kept: each vouches for itself and for the tensors beside it.

A damaged file must be refused: with another threshold or other weights an edit would be another one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unike.types import UserError

_SUMS, _OWN = "sha256", "index"


def sha256_of(path: str | os.PathLike[str]) -> str:
    """A file's checksum, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_index(path: Path, values: Mapping[str, Any], tensors: Path) -> None:
    """Writes JSON with the checksums of its ``values`` and of the file ``tensors`` beside it, in one go:
    the file is the former one or the new one, never a part."""
    values = json.loads(json.dumps(values))
    sums = {_OWN: _digest(values), tensors.name: sha256_of(tensors)}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**values, _SUMS: sums}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_index(path: Path) -> dict[str, Any]:
    """The index's values; empty where there is none. UserError where it is damaged."""
    return _read(path)[0] if path.is_file() else {}


def checksum_in(path: Path, tensors: Path) -> str:
    """The checksum of the file that the index at ``path`` has, without reading the file. UserError where
    the index is damaged."""
    return str(_read(path)[1].get(tensors.name))


def check_tensors(path: Path, tensors: Path) -> None:
    """UserError unless the file is the one that the index at ``path`` was written for."""
    if checksum_in(path, tensors) != sha256_of(tensors):
        raise UserError(f"{tensors}: is damaged: its checksum is another one than {path.name} has; {_REMEDY}")


_REMEDY = "delete the folder, and it is made again"


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and checksums."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sums = values.pop(_SUMS)
        if sums[_OWN] != _digest(values):
            raise ValueError("its checksum is another one")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = "it has no checksum" if isinstance(error, KeyError) else str(error)[:200]
        raise UserError(f"{path}: is damaged: {reason}; {_REMEDY}") from error
    return values, sums


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, as ``write_text`` does."""
    write_text(path, json.dumps(_plain(value), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    # ``with_name`` raises for a path without a name, where replacing says that it is a folder.
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """The value in JSON's own types; numpy values, tuples and paths are taken too."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
