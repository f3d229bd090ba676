"""Pairs of knowledge states on disk: memory-mapped, appendable, and intact after a crash."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from unike.system.files import write_text
from unike.system.places import lock, refuse_link, require_own
from unike.types import UserError

ABOUT, LOCK = "pairs.json", "pairs.lock"
_FORMAT = "unike-pairs-1"
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float16, torch.bfloat16)}


class DiskPairs:
    """``keys`` and ``values (m, d)`` in one folder: two raw files, and ``pairs.json``, which counts.

    Opening maps the files and reads nothing. An append is on the disk on return; the count is written last,
    atomically, so that a crash leaves the items from before. Appending locks the folder: several processes
    may append, and see each other's items after ``refresh``.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.about: dict[str, Any] = {}
        self.keys = self.values = torch.zeros(0, 0)
        self.refresh()

    @classmethod
    def create(
        cls, folder: str | os.PathLike[str], width: int, dtype: torch.dtype = torch.float16, origin: str = ""
    ) -> DiskPairs:
        """An empty one; ``origin`` names what the pairs are made from. UserError where one is there
        already."""
        path = Path(folder)
        if (path / ABOUT).exists():
            raise UserError(f"{path}: holds pairs already; expected a new folder")
        path.mkdir(parents=True, exist_ok=True)
        for name in ("keys.bin", "values.bin"):
            # What a process left that was killed before its first item is empty.
            require_own(path / name, lambda file: file.stat().st_size == 0, "expected a new folder")
        for name in ("keys", "values"):
            (path / f"{name}.bin").touch()
        kind = str(dtype).removeprefix("torch.")
        _write_about(path, {"format": _FORMAT, "width": width, "dtype": kind, "items": 0, "origin": origin})
        return cls(path)

    def __len__(self) -> int:
        return len(self.keys)

    def refresh(self) -> None:
        """Maps what was appended since. UserError where the folder is damaged."""
        self.about = about = _read_about(self.folder)
        shape, dtype = (about["items"], about["width"]), _DTYPES[about["dtype"]]
        self.keys, self.values = (
            _map_file(self.folder / f"{n}.bin", shape, dtype) for n in ("keys", "values")
        )

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Adds further pairs ``(n, d)``, in the folder's precision."""
        shape = (len(keys), self.about["width"])
        if keys.shape != shape or values.shape != shape:
            raise ValueError(f"keys {tuple(keys.shape)}, values {tuple(values.shape)}: expected {shape} both")
        with lock(self.folder / LOCK):
            for name in ("keys", "values"):
                refuse_link(self.folder / f"{name}.bin")
            about = _read_about(self.folder)
            dtype = _DTYPES[about["dtype"]]
            start = about["items"] * about["width"] * dtype.itemsize
            for name, tensor in (("keys", keys), ("values", values)):
                raw = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
                with open(self.folder / f"{name}.bin", "r+b") as file:
                    # What a crash left after the counted items is overwritten.
                    file.seek(start)
                    file.write(raw.view(torch.uint8).numpy().data)
                    file.truncate()
                    file.flush()
                    os.fsync(file.fileno())
            _write_about(self.folder, about | {"items": about["items"] + len(keys)})
        self.refresh()


def _map_file(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    count = shape[0] * shape[1]
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected {shape[0]} items") from error
    if size < count * dtype.itemsize:
        raise UserError(f"{path}: {size} bytes; expected {count * dtype.itemsize} for {shape[0]} items")
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    # Not shared: a write into the tensor never reaches the file.
    return torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(shape)


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        sound = about["format"] == _FORMAT and about["dtype"] in _DTYPES
        sound = sound and all(isinstance(about[n], int) and about[n] >= 0 for n in ("items", "width"))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a folder of pairs: {error}") from error
    if not sound:
        raise UserError(f"{path}: expected format {_FORMAT}, width, dtype and items")
    return dict(about)


def _write_about(folder: Path, about: dict[str, Any]) -> None:
    write_text(folder / ABOUT, json.dumps(about))
