"""Files by address: asked for from the byte at which the last attempt ended."""

from __future__ import annotations

import base64
import http.client
import re
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from unike.fetch.remote import GO_ON, Count, Remote, describe_fault
from unike.system.text import one_line
from unike.types import UserError

# Seconds without a byte after which a connection counts as broken.
TIMEOUT = 30.0
_BLOCK = 1 << 20
_RANGE_REFUSED = 416


class _BrokenError(Exception):
    """A connection that ended before the file did."""


def find_remote(url: str, name: str, sums: Mapping[str, str]) -> Remote:
    """The file at an address, with the size and the checksum that its server states."""
    with _open(url, name, {}, method="HEAD") as response:
        headers = response.headers
    stated = _read_sums(headers)
    version = headers.get("ETag") or headers.get("Last-Modified") or url
    validator = headers.get("ETag", "")
    size = _read_size(headers)

    def save(part: Path, count: Count) -> None:
        known = {} if not validator or validator.startswith("W/") else {"If-Range": validator}
        save_file(url, name, part, size, count, known)

    return Remote(name, size, {**stated, **sums}, version, save)


def save_file(
    url: str,
    name: str,
    part: Path,
    size: int | None,
    count: Count,
    resuming: Mapping[str, str] | None = None,
    login: str | None = None,
) -> None:
    """Brings a file to ``part``, going on after the bytes that are there.

    A connection that breaks is opened anew as long as bytes arrive. ``resuming`` are headers of a request
    that goes on; ``login`` is a header that is sent to the address's own host alone. UserError where the file
    cannot be had.
    """
    while True:
        had = part.stat().st_size if part.exists() else 0
        if size is not None and had > size:
            part.unlink()
            had = 0
        if size is not None and had == size and part.exists():
            return
        headers = {"Range": f"bytes={had}-", **(resuming or {})} if had else {}
        try:
            _receive(url, name, part, had, headers, count, login)
            return
        except _BrokenError as error:
            if not part.exists() or part.stat().st_size <= had:
                raise UserError(f"{name}: {urlsplit(url).hostname}: {error}; {GO_ON}") from error


def _receive(
    url: str, name: str, part: Path, had: int, headers: dict[str, str], count: Count, login: str | None
) -> None:
    with _open(url, name, headers, login=login) as response:
        if had and not _goes_on(response, had):
            # The server sends all of it, or has another file by now.
            had = 0
        expected, arrived = _read_size(response.headers), 0
        with part.open("ab" if had else "wb") as file:
            while True:
                try:
                    block = response.read(_BLOCK)
                except (OSError, http.client.HTTPException) as error:
                    raise _BrokenError(describe_fault(error) or one_line(error)) from error
                if not block:
                    break
                file.write(block)
                arrived += len(block)
                count(len(block))
    if expected is not None and arrived < expected:
        raise _BrokenError(f"the connection broke after {arrived} of {expected} bytes")


def _goes_on(response: http.client.HTTPResponse, had: int) -> bool:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return response.status == http.client.PARTIAL_CONTENT and found is not None and int(found[1]) == had


def _open(
    url: str, name: str, headers: Mapping[str, str], method: str = "GET", login: str | None = None
) -> http.client.HTTPResponse:
    host = urlsplit(url).hostname
    request = Request(
        url, headers={"Accept-Encoding": "identity", "User-Agent": "unike", **headers}, method=method
    )
    if login is not None:
        # Not sent on when the hub redirects to where it stores large files.
        request.add_unredirected_header("Authorization", login)
    try:
        response: http.client.HTTPResponse = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == _RANGE_REFUSED and "Range" in headers:
            return _open(url, name, {}, method, login)
        raise UserError(
            f"{name}: {host}: answers {error.code} {one_line(error.reason, 80)}; {GO_ON}"
        ) from error
    except (URLError, OSError, http.client.HTTPException) as error:
        reason = describe_fault(error) or one_line(error)
        raise UserError(f"{name}: {host}: {reason}; {GO_ON}") from error
    return response


def _read_size(headers: Message) -> int | None:
    text = headers.get("Content-Length") or ""
    return int(text) if text.isdigit() else None


def _read_sums(headers: Message) -> dict[str, str]:
    """The MD5 that Google's storage states of a file."""
    for value in headers.get_all("x-goog-hash") or ():
        for entry in value.split(","):
            algorithm, _, text = entry.strip().partition("=")
            if algorithm == "md5":
                return {"md5": base64.b64decode(text).hex()}
    return {}
