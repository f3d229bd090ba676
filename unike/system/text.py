"""Values as text that fits into a one-line message."""

from __future__ import annotations

from collections.abc import Callable


def one_line(value: object, limit: int = 300) -> str:
    """``str(value)`` fit for a message: on one line, printable as UTF-8, at most ``limit`` characters."""
    text = " ".join(str(value).split())
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def describe_value(value: object) -> str:
    """A value with its type, short enough for one line of an error."""
    return "null" if value is None else f"{type(value).__name__} {shorten(value, 60, repr)}"


def shorten(value: object, limit: int = 60, written: Callable[[object], str] = str) -> str:
    """A value on one line of at most ``limit`` characters."""
    try:
        text = " ".join(written(value).split())
    except Exception as error:
        # Python writes no number of more than some thousand digits; a user's class may raise anything.
        text = (
            "too long to be written" if isinstance(error, ValueError) else "something that cannot be written"
        )
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def unwrap_number(value: object) -> object:
    """A number of NumPy's, or of a tensor, as Python's; everything else as it is."""
    if isinstance(value, (bool, int, float, str)) or getattr(value, "shape", None) != ():
        return value
    item = getattr(value, "item", None)
    return item() if callable(item) else value


def is_unicode(text: str) -> bool:
    """Whether a text can be written; half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
