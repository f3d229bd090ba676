"""What the tests of fetching share: the command, its one line, the files that it leaves."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from unike.fetch import command, run
from unike.fetch.catalogue import Item, Piece
from unike.system.launching import run_guarded


def fetch(*arguments: str) -> int:
    return run_guarded(lambda: run(["--yes", *arguments]))


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of stderr, but for bars."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def list_files(folder: Path = Path()) -> set[str]:
    return {
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and "home" not in p.parts
    }


def offer(monkeypatch: pytest.MonkeyPatch, *pieces: Piece) -> None:
    """Makes these pieces what any name fetches."""
    monkeypatch.setattr(command, "find_item", lambda name: Item(name, name, pieces))


def make_zip(content: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return packed.getvalue()
