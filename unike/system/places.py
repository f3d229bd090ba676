"""Places that are written to: whether a name can be one, and whether what is there is this program's own.

Nothing is written over a file that the program did not write, and nothing through a link in its place.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from unike.system.text import one_line
from unike.types import UserError

PathLike = str | os.PathLike[str]
# What file systems take of each name in a path, and of the whole.
_NAME, _PATH = 255, 1 << 12
# What a lock that is no flock leaves: the number of its process.
_LOCK_TEXT = re.compile(rb"\d+\s[\x20-\x7e\s]{0,256}")


def check_name(path: PathLike) -> None:
    """UserError for a path that no file system takes."""
    text = os.fspath(path)
    raw = os.fsencode(text)
    if b"\0" in raw or len(raw) >= _PATH or any(len(name) > _NAME for name in raw.split(os.sep.encode())):
        raise UserError(f"{one_line(text, 80)}: is no valid path: a name in it is too long")


def find_existing(path: PathLike) -> Path:
    """The path itself where it exists, else the nearest of its parents that does."""
    whole = Path(os.path.abspath(path))
    return next((p for p in (whole, *whole.parents) if os.path.lexists(p)), whole)


def require_folder(path: PathLike, at: str = "") -> None:
    """UserError, beginning with ``at``, where ``path`` is no folder that can be written to, nor can be made
    one."""
    check_name(path)
    there = find_existing(path)
    shown = one_line(os.fspath(path))
    if not os.path.isdir(there):
        what = "is a file" if os.path.exists(there) else "is a link to nothing"
        raise UserError(f"{at}{one_line(there)}: {what}; expected a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{at}{shown}: cannot be made a folder: {one_line(there)} cannot be written")


def require_own(path: PathLike, is_own: Callable[[Path], bool], remedy: str = "name another file") -> None:
    """UserError where something is at ``path`` that ``is_own`` does not know as written by this program, or a
    link."""
    check_name(path)
    place = Path(path)
    if not os.path.lexists(place):
        return
    shown = one_line(place)
    if os.path.islink(place):
        raise UserError(f"{shown}: is a symbolic link; nothing is written through it; {remedy}")
    if os.path.isdir(place):
        raise UserError(f"{shown}: cannot be written: {os.strerror(errno.EISDIR)}")
    try:
        own = os.path.isfile(place) and is_own(place)
    except (OSError, ValueError):
        own = False
    if not own:
        raise UserError(f"{shown}: is there already, and was not written by this program; {remedy}")


def refuse_link(path: PathLike) -> None:
    """UserError where ``path`` is a symbolic link, or something else than a file."""
    if os.path.islink(path):
        raise UserError(f"{one_line(os.fspath(path))}: is a symbolic link; expected a file of this program")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{one_line(os.fspath(path))}: is not a regular file")


# ---------------------------------------------------------------- what this program wrote


def is_tensor_file(path: Path) -> bool:
    """Whether a file is empty, or begins as safetensors do."""
    with open(path, "rb") as file:
        start = file.read(9)
    size = int.from_bytes(start[:8], "little")
    return not start or (len(start) == 9 and start[8:] == b"{" and size < 1 << 30)


def is_index(path: Path) -> bool:
    """Whether a file is a JSON object with checksums, as ``unike.system.files.write_index`` writes it."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(values, dict) and isinstance(values.get("sha256"), dict)


def contains(text: str, within: int = 1 << 12) -> Callable[[Path], bool]:
    """Whether a file has this text near its beginning."""

    def look(path: Path) -> bool:
        with open(path, "rb") as file:
            return text.encode() in file.read(within)

    return look


# ---------------------------------------------------------------- locks


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Inside the block no other process holds the lock file ``path``. UserError as ``check_lock``."""
    check_lock(path)
    with FileLock(path):
        yield


def check_lock(path: Path) -> None:
    """UserError where a link, or a file with something in it, is in a lock's place: some versions of filelock
    empty what they lock."""
    refuse_link(path)
    try:
        about = os.lstat(path)
    except FileNotFoundError:
        pass
    else:
        if stat.S_ISREG(about.st_mode) and about.st_size:
            with open(path, "rb") as file:
                text = file.read(1024)
            if not _LOCK_TEXT.fullmatch(text):
                raise UserError(f"{one_line(path)}: has something in it; expected an empty file, for a lock")
