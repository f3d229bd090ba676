"""Where files arrive: in a hidden folder next to their place, until all of them are whole and checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from unike.fetch import drive, hub, web
from unike.fetch.archives import is_archive, require_room, unpack
from unike.fetch.catalogue import Piece
from unike.fetch.remote import Count, Remote, explain_faults, find_difference
from unike.system.files import move_into_place, write_json
from unike.system.places import lock, require_folder
from unike.system.text import one_line
from unike.types import UserError

# In a fetched folder: which files it has, of which version.
RECORD = ".fetched.json"
# Called with a file's name, its size where it is known, and how much of it is there.
Bar = Callable[[str, int | None, int], AbstractContextManager[Count]]


@dataclass(frozen=True)
class Load:
    """What one piece brings to ``target``, with the licence that is stated; ``missing`` are the files that
    are not there yet."""

    piece: Piece
    target: Path
    licence: str | None
    files: tuple[Remote, ...]
    missing: tuple[Remote, ...]

    @property
    def stage(self) -> Path:
        return self.target.parent / f".{self.target.name}.{self.piece.kind}.fetch"

    @property
    def size(self) -> int | None:
        """Bytes of all files; None where one is not known."""
        sizes = [file.size for file in self.files]
        return self.piece.bytes if None in sizes else sum(size or 0 for size in sizes)

    @property
    def left(self) -> int | None:
        """Bytes that have not arrived; None where they are not known."""
        sizes = [file.size for file in self.missing]
        if None in sizes:
            return None
        return sum(max(0, (file.size or 0) - self._count_arrived(file)) for file in self.missing)

    @property
    def whole(self) -> bool:
        """Whether there is nothing to do."""
        return not self.missing

    def arriving(self, file: Remote) -> Path:
        return self.stage / "parts" / file.key

    def arrived(self, file: Remote) -> Path:
        return self.stage / "files" / file.name

    def _count_arrived(self, file: Remote) -> int:
        places = (self.arriving(file), self.arrived(file))
        return max((path.stat().st_size for path in places if path.is_file()), default=0)


# ---------------------------------------------------------------- what there is to do


def plan(piece: Piece, root: Path) -> Load:
    """What a piece would bring below ``root``. UserError where its source can't be asked, and where other
    files are in its place."""
    target, licence = root / piece.to, piece.licence
    require_folder(target.parent)
    if piece.kind == "url":
        name = target.name
        files: Sequence[Remote] = (
            [] if target.is_file() else [web.find_remote(piece.url, name, _sums(piece, name))]
        )
        return Load(piece, target, licence, tuple(files), tuple(files))
    if piece.kind == "hub":
        found = hub.list_repository(piece.repository, piece.type)
        files = hub.choose_weights(found.files) if piece.type == "model" else found.files
        for file in files:
            require_plain(file.name, piece.repository)
        missing = _find_missing(target, files)
        return Load(piece, target, found.licence or licence, tuple(files), tuple(missing))
    if piece.folders and all((target / folder).is_dir() for folder in piece.folders):
        return Load(piece, target, licence, (), ())
    names = piece.files or (piece.file,)
    if not piece.folders and all((target / name).is_file() for name in names):
        return Load(piece, target, licence, (), ())
    if piece.kind == "drive_folder":
        files = drive.list_folder(piece.id, names, {name: _sums(piece, name) for name in names})
    else:
        files = [drive.find_remote(piece.id, piece.file, _sums(piece, piece.file))]
    missing = [file for file in files if piece.folders or not (target / file.name).is_file()]
    return Load(piece, target, licence, tuple(files), tuple(missing))


def _sums(piece: Piece, name: str) -> dict[str, str]:
    return {"sha256": piece.sha256[name]} if name in piece.sha256 else {}


def require_plain(name: str, repository: str) -> None:
    """UserError for a name that leads out of the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise UserError(f"{one_line(repository, 100)}: {one_line(name, 100)}: leads out of the folder")


def _find_missing(target: Path, files: Sequence[Remote]) -> list[Remote]:
    """The files that the folder lacks. UserError for one that is there and is another one."""
    recorded, missing, other = _read_record(target), [], []
    for file in files:
        path = target / file.name
        if recorded.get(file.name) == file.version and (path.is_file() or is_archive(file.name)):
            continue
        if not path.is_file():
            missing.append(file)
        elif difference := find_difference(path, file):
            other.append(f"{path}: is there already, and is not the hub's: {difference}; move it away")
    if other:
        raise UserError(*other)
    return missing


def _read_record(target: Path) -> dict[str, str]:
    try:
        found = json.loads((target / RECORD).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------- doing it


def bring(load: Load, bar: Bar) -> None:
    """Fetches, checks and puts in place what is missing. Interrupted, it goes on where it was."""
    with gather(load, bar) as files:
        _finish(load, files)


@contextmanager
def gather(load: Load, bar: Bar) -> Iterator[Path]:
    """A hidden folder with all missing files, whole and checked; it is gone after the block, unless that
    raises. UserError for faults of the network and the disk, which leave there what has arrived."""
    with explain_faults(one_line(load.target)):
        load.stage.mkdir(parents=True, exist_ok=True)
        with lock(load.stage / ".lock"):
            if load.left is not None:
                require_room(load.target.parent, load.left, load.piece.title)
            for file in load.missing:
                _fetch(load, file, bar)
            yield load.stage / "files"
        shutil.rmtree(load.stage, ignore_errors=True)


def _fetch(load: Load, file: Remote, bar: Bar) -> None:
    arriving, arrived = load.arriving(file), load.arrived(file)
    if arrived.is_file():
        if find_difference(arrived, file) is None:
            return
        # Another version by now.
        arrived.unlink()
    arriving.parent.mkdir(parents=True, exist_ok=True)
    done = arriving.stat().st_size if arriving.is_file() else 0
    with bar(file.name, file.size, done) as count:
        file.save(arriving, count)
    if difference := find_difference(arriving, file):
        arriving.unlink()
        raise UserError(
            f"{file.name}: arrived damaged, or is another file by now: {difference}; it was deleted, "
            "run the same command again"
        )
    move_into_place(arriving, arrived)


def _finish(load: Load, files: Path) -> None:
    """Puts checked files where they belong."""
    if load.piece.folders:
        _unpack_folders(load, files / load.piece.file)
        return
    if load.piece.kind == "url":
        move_into_place(files / load.target.name, load.target)
        return
    if load.piece.unpack:
        for file in load.missing:
            if is_archive(file.name):
                unpack(files / file.name, files)
                (files / file.name).unlink()
    if load.piece.kind == "hub":
        write_json(
            files / RECORD,
            {"source": load.piece.repository, "files": {f.name: f.version for f in load.files}},
        )
    if not load.target.exists():
        move_into_place(files, load.target)
        return
    (load.target / RECORD).unlink(missing_ok=True)
    for path in sorted(_list_files(files), key=lambda path: path.name == RECORD):
        move_into_place(path, load.target / path.relative_to(files))


def _list_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _unpack_folders(load: Load, archive: Path) -> None:
    """Unpacks an archive and puts the folders that are wanted in place, wherever in it they are."""
    unpacked = load.stage / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir()
    unpack(archive, unpacked)
    found = {}
    for folder in load.piece.folders:
        matches = [path for path in sorted(unpacked.rglob(folder)) if path.is_dir()]
        if matches:
            found[folder] = matches[0]
    if lost := [folder for folder in load.piece.folders if folder not in found]:
        there = ", ".join(sorted(path.name for path in unpacked.iterdir())) or "nothing"
        raise UserError(
            f"{one_line(archive)}: has no folder {', '.join(lost)}; it has {one_line(there, 160)}; unpack it "
            f"by hand into {one_line(load.target)}"
        )
    for folder, path in found.items():
        if not (load.target / folder).is_dir():
            move_into_place(path, load.target / folder)
