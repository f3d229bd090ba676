"""Archives, unpacked without leaving the folder that they are unpacked in."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from unike.fetch.remote import GO_ON
from unike.system.text import one_line
from unike.types import UserError

_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_BROKEN = (OSError, EOFError, ValueError, zipfile.BadZipFile, tarfile.TarError, NotImplementedError)


def is_archive(name: str) -> bool:
    """Whether a file's name is that of an archive that ``unpack`` reads."""
    return name.lower().endswith(_SUFFIXES)


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks regular files below ``folder``. UserError for a damaged archive, for a path that leads out of
    the folder, and where the disk has no room."""
    shown = one_line(archive.name)
    with _open(archive, shown) as opened:
        try:
            members = list(_list_members(opened))
        except _BROKEN as error:
            raise UserError(f"{shown}: is damaged: {one_line(error, 120)}") from error
        require_room(folder, sum(size for _, size, _ in members), shown)
        places = [folder / _require_inside(name, shown) for name, _, _ in members]
        for path, (_, _, member) in zip(places, members, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            _copy(opened, member, path, shown)


def require_room(folder: Path, needed: int, what: str) -> None:
    """UserError where the disk of ``folder`` has fewer bytes free than are needed."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise UserError(
            f"{what}: needs {format_size(needed)} in {one_line(folder)}, and {format_size(free)} are free "
            f"there; free some space; {GO_ON}"
        )


def format_size(size: int) -> str:
    """Bytes in decimal units, as the hub shows them."""
    value, unit = float(size), "B"
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit in ("B", "KB") else f"{value:.1f} {unit}"


_Archive = zipfile.ZipFile | tarfile.TarFile
_Member = zipfile.ZipInfo | tarfile.TarInfo


def _open(archive: Path, shown: str) -> _Archive:
    try:
        if zipfile.is_zipfile(archive):
            return zipfile.ZipFile(archive)
        return tarfile.TarFile.open(archive)
    except _BROKEN as error:
        raise UserError(f"{shown}: is no archive, or is damaged: {one_line(error, 120)}") from error


def _list_members(opened: _Archive) -> Iterator[tuple[str, int, _Member]]:
    """Regular files alone: a link could lead out of the folder."""
    if isinstance(opened, zipfile.ZipFile):
        for entry in opened.infolist():
            if not entry.is_dir() and (entry.external_attr >> 28) in (0, 8):
                yield entry.filename, entry.file_size, entry
    else:
        for member in opened:
            if member.isreg():
                yield member.name, member.size, member


def _require_inside(name: str, shown: str) -> PurePosixPath:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts or ":" in path.parts[0]:
        raise UserError(f"{shown}: {one_line(name, 100)}: leads out of the folder; nothing of it is unpacked")
    return path


def _copy(opened: _Archive, member: _Member, path: Path, shown: str) -> None:
    try:
        source: IO[bytes] | None
        if isinstance(opened, zipfile.ZipFile):
            assert isinstance(member, zipfile.ZipInfo)
            source = opened.open(member)
        else:
            assert isinstance(member, tarfile.TarInfo)
            source = opened.extractfile(member)
    except (*_BROKEN, RuntimeError) as error:
        raise UserError(f"{shown}: is damaged: {one_line(error, 120)}") from error
    assert source is not None
    with source, path.open("wb") as file:
        try:
            shutil.copyfileobj(source, file, 1 << 20)
        except (EOFError, zipfile.BadZipFile, tarfile.TarError, ValueError) as error:
            raise UserError(f"{shown}: is damaged: {one_line(error, 120)}") from error
