"""Rows of tensors on disk by key, shared between runs and between processes that run at the same time."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from unike.system.files import replace_atomically

logger = logging.getLogger("unike")

Row = Mapping[str, torch.Tensor]
_START, _END = "rows-", ".safetensors"
_UNREADABLE = (SafetensorError, OSError, ValueError, LookupError, RuntimeError)
_LEFT_BEHIND_SECONDS = 3600.0


class RowStore:
    """Rows under ``root/name``, one file for each batch that is put; keys are file-safe texts.

    A file appears whole or not at all, and only its header is read until a row of it is needed. Each row has
    a checksum: a broken file is logged and removed, and its rows are missing from then on. All stores below
    one ``root`` share ``max_bytes``: files that were not used for longest go first, this store's own stay,
    and nothing more is written where that leaves no room. After a write error the store goes on without
    writing.
    """

    def __init__(self, root: str | os.PathLike[str], name: str, max_bytes: int) -> None:
        self.root, self.name, self.max_bytes = Path(root), name, max_bytes
        self.folder = self.root / name
        self.writing = True
        self._files: set[str] = set()
        self._where: dict[str, str] = {}
        self._used: set[Path] = set()
        self._stamp = -1
        self._bytes: int | None = None

    def move(self, owner: str) -> RowStore:
        """The store of the same name and limit below another ``owner``, the first part of the name."""
        return RowStore(self.root, f"{owner}/{self.name.partition('/')[2]}", self.max_bytes)

    def get(self, keys: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
        """The rows of those ``keys`` that are kept, in memory of their own."""
        if any(key not in self._where for key in keys):
            self._look()
        wanted: dict[str, list[str]] = {}
        for key in dict.fromkeys(keys):
            if key in self._where:
                wanted.setdefault(self._where[key], []).append(key)
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, some in wanted.items():
            found.update(self._read(name, some))
        return found

    def put(self, rows: Mapping[str, Row]) -> None:
        """Keeps rows in one file; the tensors may be on any device."""
        if not rows or not self.writing:
            return
        own = {
            key: {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in row.items()}
            for key, row in rows.items()
        }
        size = sum(t.nbytes for row in own.values() for t in row.values())
        if not self._make_room(size):
            logger.warning(
                "%s: %.3g GB are full; further states are not kept", self.root, self.max_bytes / 1e9
            )
            self.writing = False
            return
        name = f"{_START}{hashlib.sha256(repr(sorted(own)).encode()).hexdigest()[:32]}{_END}"
        tensors = {f"{key}.{n}": t for key, row in own.items() for n, t in row.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            before = os.stat(self.folder).st_mtime_ns
            # Not durable: rows that a crash loses are computed again.
            with replace_atomically(self.folder / name, is_durable=False) as temporary:
                save_file(tensors, temporary, metadata={key: _checksum(row) for key, row in own.items()})
            # Only files that others wrote in between have to be looked for.
            self._stamp = os.stat(self.folder).st_mtime_ns if before == self._stamp else -1
        except (OSError, SafetensorError) as error:
            logger.warning("%s: states cannot be kept there: %s", self.folder, error)
            self.writing = False
        else:
            self._bytes = (self._bytes or 0) + size
            self._files.add(name)
            self._used.add(self.folder / name)
            self._where.update(dict.fromkeys(own, name))

    def _look(self) -> None:
        """Takes up files that this store or another process has written since."""
        try:
            stamp = os.stat(self.folder).st_mtime_ns
            if stamp == self._stamp:
                return
            names = os.listdir(self.folder)
        except OSError:
            return
        self._stamp = stamp
        for name in names:
            if name.endswith(".tmp") and name.startswith(f".{_START}"):
                _remove_old(self.folder / name)
            elif name.startswith(_START) and name.endswith(_END) and name not in self._files:
                self._files.add(name)
                self._take_up(name)

    def _take_up(self, name: str) -> None:
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                for key in file.metadata() or {}:
                    self._where.setdefault(key, name)
        except FileNotFoundError:
            self._files.discard(name)
        except _UNREADABLE as error:
            self._drop(name, error)

    def _read(self, name: str, keys: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
        path = self.folder / name
        found: dict[str, dict[str, torch.Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                sums = file.metadata() or {}
                rows: dict[str, dict[str, torch.Tensor]] = {key: {} for key in keys}
                for full in file.keys():  # noqa: SIM118 (the file itself cannot be iterated)
                    key, _, part = full.rpartition(".")
                    if key in rows:
                        # A copy: the mapped file would keep its whole batch in memory.
                        rows[key][part] = file.get_tensor(full).clone()
            for key, row in rows.items():
                if sums[key] != _checksum(row):
                    raise ValueError(f"the checksum of {key} is another one")
                found[key] = row
        except FileNotFoundError:
            self._forget(name)
        except _UNREADABLE as error:
            self._drop(name, error)
            # After one bad row none of the file is trusted.
            found = {}
        else:
            if path not in self._used:
                self._used.add(path)
                with suppress(OSError):
                    os.utime(path)
        return found

    def _drop(self, name: str, error: Exception) -> None:
        logger.warning("%s: is broken and is left out: %s", self.folder / name, error)
        self._forget(name)
        with suppress(OSError):
            (self.folder / name).unlink(missing_ok=True)

    def _forget(self, name: str) -> None:
        self._files.discard(name)
        self._where = {key: at for key, at in self._where.items() if at != name}

    def _make_room(self, size: int) -> bool:
        """Whether ``size`` more bytes fit; old files of the same root are removed where they do not."""
        if self._bytes is not None and self._bytes + size <= self.max_bytes:
            return True
        files = []
        # By their own name: the folder may hold a user's files too.
        for path in self.root.glob(f"*/*/{_START}*{_END}"):
            with suppress(OSError):
                stat = path.stat()
                files.append((stat.st_mtime_ns, stat.st_size, path))
        self._bytes = sum(length for _, length, _ in files)
        for _, length, path in sorted(files):
            if self._bytes + size <= self.max_bytes:
                break
            if path not in self._used:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                    self._bytes -= length
        return self._bytes + size <= self.max_bytes


def row_key(what: object) -> str:
    """A short checksum of a plain value, as a key."""
    return hashlib.sha256(repr(what).encode(errors="surrogatepass")).hexdigest()[:32]


def _checksum(row: Row) -> str:
    total = 0
    for name in sorted(row):
        tensor = row[name].contiguous()
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _remove_old(temporary: Path) -> None:
    """Removes the file of a killed process; a recent one may still be written by another process."""
    with suppress(OSError):
        if time.time() - temporary.stat().st_mtime > _LEFT_BEHIND_SECONDS:
            temporary.unlink()
