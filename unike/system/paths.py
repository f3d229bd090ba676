"""Paths as users hand them over."""

from __future__ import annotations

import os
import re

from unike.system.text import describe_value, one_line
from unike.types import UserError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def check_path(value: object, at: str, expected: str = "a path") -> str:
    """The path as text. UserError, in one line, for what is none; a number would name an open file."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise UserError(f"{at}: expected {expected}, got {describe_value(value)}")
    try:
        known = "\0" not in os.fsdecode(os.fsencode(text))
    except UnicodeError:
        known = False
    if not known:
        raise UserError(
            f"{at}: {one_line(text, 80)}: does not exist, no file has such a name; expected {expected}"
        )
    if not text.strip():
        raise UserError(f"{at}: is empty; expected {expected}")
    if _ADDRESS.match(text):
        raise UserError(f"{at}: {one_line(text, 80)}: is an address; expected {expected} on this machine")
    return str(text)
