"""Answers as strings: the VQA convention for comparing them, and text fit for a one-line message."""

from __future__ import annotations


def one_line(value: object, limit: int = 300) -> str:
    """``str(value)`` fit for a message: on one line, printable as UTF-8, at most ``limit`` characters."""
    text = " ".join(str(value).split())
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
