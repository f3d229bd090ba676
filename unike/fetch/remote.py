"""A file that is somewhere else: what is known of it, and whether what arrived is that file."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from unike.system.text import one_line
from unike.types import UserError

GO_ON = "what has arrived is kept: run the same command again to go on"
# Called with how many bytes have arrived since the last call.
Count = Callable[[int], object]
# Modules of the libraries whose errors are the network's.
_NETWORK = {
    "httpx",
    "httpx2",
    "httpcore",
    "httpcore2",
    "requests",
    "urllib3",
    "urllib",
    "http",
    "ssl",
    "socket",
}
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


@dataclass(frozen=True)
class Remote:
    """A file to fetch. ``name`` is its path below the folder it is put in, ``size`` its bytes where they are
    known, ``sums`` its checksums by algorithm (``git`` is that of a git blob), ``version`` names its content:
    what has arrived of another version is not gone on with.

    ``save`` brings it to a path, going on after the bytes that are there. It raises UserError where that
    ends early, and keeps what has arrived.
    """

    name: str
    size: int | None
    sums: Mapping[str, str]
    version: str
    save: Callable[[Path, Count], None]

    @property
    def key(self) -> str:
        """The name of the file that it arrives in."""
        return hashlib.sha256(f"{self.name}\n{self.version}".encode()).hexdigest()[:16]


def find_difference(path: Path, remote: Remote) -> str | None:
    """How a file differs from what is known of the remote one; None where it does not."""
    size = path.stat().st_size
    if remote.size is not None and size != remote.size:
        return f"{size} bytes; expected {remote.size}"
    for algorithm, expected in remote.sums.items():
        if (found := compute_sum(path, algorithm)) != expected:
            return f"{algorithm} {found}; expected {expected}"
    return None


def compute_sum(path: Path, algorithm: str) -> str:
    """A file's checksum in hexadecimal: ``sha256``, ``md5``, or ``git``, that of a git blob."""
    digest = hashlib.new("sha1" if algorithm == "git" else algorithm, usedforsecurity=False)
    if algorithm == "git":
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- faults, one line each


@contextmanager
def explain_faults(what: str) -> Iterator[None]:
    """Faults of the network or the disk inside the block become a UserError that begins with ``what``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (line := describe_fault(error)) is None:
            raise
        raise UserError(f"{what}: {line}; {GO_ON}") from error


def describe_fault(error: BaseException) -> str | None:
    """A fault of the network or the disk in one line; None for any other error."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"cannot be written: {os.strerror(errno.ENOSPC)}"
    if type(error).__module__.partition(".")[0] in _NETWORK or isinstance(
        error, (ConnectionError, TimeoutError)
    ):
        reason = getattr(error, "reason", None) or error
        return f"cannot be reached, or the connection broke: {one_line(reason, 160) or type(error).__name__}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{one_line(error.filename)}: {error.strerror}"
    return None
