"""Files that are whole or not there: the one atomic writer, and indexes that vouch for themselves.

A damaged index must be refused: with another threshold or other weights an edit would be another one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from unike.types import UserError

_SUMS, _OWN = "sha256", "index"
_REMEDY = "delete the folder, and it is made again"
# Characters of a target's name in its temporary one: the whole must be a valid file name, too.
_NAME_LENGTH = 48
# What file systems answer that cannot flush a folder.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}


# ---------------------------------------------------------------- writing


@contextmanager
def replace_atomically(target: Path, is_folder: bool = False, is_durable: bool = True) -> Iterator[Path]:
    """Gives a path beside ``target``; what the block writes there takes the target's place at its end.

    A reader sees the former file or the new one, never a part, whenever the process is killed. The path
    is unique to the call, so that several processes may write the same target: the last one's stays. It
    begins with a dot and ends in ``.tmp``. With ``is_folder`` it is a new folder, whose target must be
    absent or empty. ``is_durable`` waits until all is on the disk. After an error nothing of it is left.
    """
    # ``with_name`` raises for a path without a name, where replacing says that it is a folder.
    temporary = target.parent / f".{target.name[:_NAME_LENGTH]}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        if is_folder:
            temporary.mkdir()
        yield temporary
        if is_durable:
            for path in (*temporary.rglob("*"), temporary):
                _sync(path)
        os.replace(temporary, target)
        if is_durable:
            _sync(target.parent)
    finally:
        if is_folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's entries, are on the disk, where the system can."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (is_folder and error.errno in _NO_FOLDER_SYNC):
            raise
    finally:
        os.close(handle)


def move_into_place(source: Path, target: Path) -> None:
    """Moves a whole file or folder to a free name on the same disk, once all of it is on that disk.

    UserError where something is there already.
    """
    if os.path.lexists(target):
        raise UserError(f"{target}: is there already; move it away")
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in (*source.rglob("*"), source):
        _sync(path)
    os.replace(source, target)
    _sync(target.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replace_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Writes a JSON file atomically; values as ``to_json_types`` takes them."""
    write_text(path, json.dumps(to_json_types(value), indent=2) + "\n")


def to_json_types(value: object) -> Any:
    """The value in JSON's own types; numpy values, tuples and paths are taken too, NaN becomes null."""
    if isinstance(value, Mapping):
        return {str(key): to_json_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_types(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return to_json_types(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- indexes with checksums


def compute_sha256(path: str | os.PathLike[str]) -> str:
    """A file's checksum, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_index(path: Path, values: Mapping[str, object], tensors: Path) -> None:
    """Writes JSON atomically, with the checksums of its ``values`` and of the file ``tensors`` beside it."""
    values = json.loads(json.dumps(values))
    sums = {_OWN: _digest(values), tensors.name: compute_sha256(tensors)}
    write_text(path, json.dumps({**values, _SUMS: sums}, indent=1) + "\n")


def read_index(path: Path) -> dict[str, Any]:
    """The index's values; empty where there is none. UserError where it is damaged."""
    return _read(path)[0] if path.is_file() else {}


def read_checksum(path: Path, tensors: Path) -> str:
    """The checksum of the file that the index at ``path`` has, without reading the file. UserError where
    the index is damaged."""
    return str(_read(path)[1].get(tensors.name))


def check_tensors(path: Path, tensors: Path) -> None:
    """UserError unless the file is the one that the index at ``path`` was written for."""
    if read_checksum(path, tensors) != compute_sha256(tensors):
        raise UserError(f"{tensors}: is damaged: its checksum is another one than {path.name} has; {_REMEDY}")


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


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
