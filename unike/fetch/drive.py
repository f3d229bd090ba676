"""Files of Google Drive, by ``gdown``: an optional package that is imported where one is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from unike.fetch.remote import GO_ON, Count, Remote, describe_fault
from unike.fetch.web import TIMEOUT
from unike.system.text import one_line
from unike.types import UserError

_WEB_PAGE = (b"<!doc", b"<html", b"<!DOC", b"<HTML")


def require_gdown() -> Any:
    """The package. UserError where it is not installed."""
    try:
        import gdown
    except ImportError as error:
        raise UserError(
            "gdown: not installed; files on Google Drive need it: pip install 'gdown>=6'"
        ) from error
    return gdown


def find_remote(identifier: str, name: str, sums: Mapping[str, str]) -> Remote:
    """A file by its identifier. Its size is not known before it arrives."""
    require_gdown()

    def save(part: Path, count: Count) -> None:
        _save(identifier, name, part, count)

    return Remote(name, None, sums, identifier, save)


def list_folder(
    identifier: str, names: tuple[str, ...], sums: Mapping[str, Mapping[str, str]]
) -> list[Remote]:
    """The files of these names in a folder; ``sums`` by name. UserError where one is missing."""
    gdown = require_gdown()
    with _Explained(", ".join(names)):
        listed = gdown.download_folder(id=identifier, skip_download=True, quiet=True, use_cookies=False)
    found = {PurePosixPath(str(entry.path)).name: str(entry.id) for entry in listed or ()}
    if lost := [name for name in names if name not in found]:
        there = ", ".join(sorted(found)) or "nothing"
        raise UserError(
            f"Google Drive: the folder {identifier} has no {', '.join(lost)}; it has {one_line(there)}"
        )
    return [find_remote(found[name], name, sums.get(name, {})) for name in names]


def _save(identifier: str, name: str, part: Path, count: Count) -> None:
    arrived = 0

    def tick(so_far: int, total: int | None) -> None:
        nonlocal arrived
        count(so_far - arrived)
        arrived = so_far

    with _Explained(name):
        # Interrupted, it leaves a file next to ``part``, which it goes on with.
        done = require_gdown().download(
            id=identifier,
            output=str(part),
            quiet=True,
            use_cookies=False,
            resume=True,
            timeout=TIMEOUT,
            progress=tick,
        )
    if done is None or not part.is_file():
        raise UserError(f"{name}: Google Drive: nothing arrived; {GO_ON}")
    with part.open("rb") as file:
        if file.read(64).lstrip().startswith(_WEB_PAGE):
            part.unlink()
            raise UserError(
                f"{name}: Google Drive: sent a web page instead of the file (too many downloads today?); "
                "try again later"
            )


class _Explained:
    """What ``gdown`` raises inside the block becomes a UserError of one line."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, UserError) or not isinstance(error, Exception):
            return
        # The package's own errors have no common base in all of its versions.
        reason = describe_fault(error) or one_line(str(error).partition("\n")[0], 200)
        raise UserError(f"{self.name}: Google Drive: {reason}; {GO_ON}") from error
