"""Kinds of values that an option may hold: what a message says is expected, and how a value is read."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Generic, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
# YAML 1.1 reads 1e-4 as text: a float needs a dot and a signed exponent there.
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
# What file systems take of a path, and of each name in it.
_PATH, _NAME = 1 << 12, 255
# What any number may be at most, where an option has no limit of its own: more counts no elements, and
# overflows in 32 bits.
MOST, MOST_REAL = 2**31 - 1, 1e30


class TooLargeError(ValueError):
    """A number above ``MOST`` or ``MOST_REAL``, which it carries."""


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` (or ``above`` it) to ``high``; None where a side has no limit."""

    low: float | None = None
    high: float | None = None
    above: bool = False

    @property
    def words(self) -> str:
        """The range as a message names it, empty where there is no limit."""
        if self.low is not None and self.high is not None:
            return f"between {self.low:g} and {self.high:.10g}"
        if self.low is not None:
            return f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return ""

    def require(self, value: float) -> None:
        """ValueError for a number outside."""
        _require(self.low is None or (value > self.low if self.above else value >= self.low))
        _require(self.high is None or value <= self.high)
        most = MOST if isinstance(value, int) else MOST_REAL
        if self.high is None and value > most:
            raise TooLargeError(f"{most:.10g}")


@dataclass(frozen=True)
class Kind(Generic[T_co]):
    """What an option may hold: ``words`` for messages, and how a value is ``read``.

    ``read`` returns the value in the option's type. It raises ValueError, TypeError or OverflowError
    for a value of another kind.
    """

    noun: str
    read: Callable[[object], T_co]
    range: Range = Range()
    choices: tuple[str, ...] = ()
    nullable: bool = False

    @property
    def words(self) -> str:
        """What is expected, in words."""
        return " ".join(filter(None, (self.noun, self.range.words, "or null" if self.nullable else "")))


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def read_text(value: object) -> str:
    """A text that is not blank, and that a file system takes as a path."""
    if not isinstance(value, str):
        raise TypeError
    _require(bool(value.strip()) and "\0" not in value)
    # Of lone surrogates this makes a UnicodeEncodeError, a ValueError.
    names = value.encode().split(b"/")
    _require(len(value) <= _PATH and all(len(name) <= _NAME for name in names))
    return value


def read_whole(value: object) -> int:
    """A whole number; True and 1.0 are none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    return value


def read_number(value: object) -> float:
    """A finite number, or the text of one."""
    text = isinstance(value, str) and _NUMBER.fullmatch(value) is not None
    if not (text or isinstance(value, Real)) or isinstance(value, bool):
        raise TypeError
    number = float(value)  # type: ignore[arg-type]
    _require(math.isfinite(number))
    return number


def read_mapping(value: object) -> dict[str, Any]:
    """A copy of a mapping that JSON can hold."""
    if not isinstance(value, Mapping):
        raise TypeError
    _require(_fits_json(value))
    return copy.deepcopy(dict(value))


def _fits_json(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _fits_json(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_fits_json, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (str, int))


def text() -> Kind[str]:
    """Any text."""
    return Kind("text", read_text)


def whole(low: float | None = None, high: float | None = None) -> Kind[int]:
    """A whole number in a range."""
    limits = Range(low, high)

    def read(value: object) -> int:
        number = read_whole(value)
        limits.require(number)
        return number

    return Kind("a whole number", read, limits)


def number(low: float | None = None, high: float | None = None, above: bool = False) -> Kind[float]:
    """A finite number in a range."""
    limits = Range(low, high, above)

    def read(value: object) -> float:
        number = read_number(value)
        limits.require(number)
        return number

    return Kind("a number", read, limits)


def switch() -> Kind[bool]:
    """True or false."""

    def read(value: object) -> bool:
        if not isinstance(value, bool):
            raise TypeError
        return value

    return Kind("true or false", read)


def mapping() -> Kind[dict[str, Any]]:
    """Names with values of any kind that JSON has."""
    return Kind("a mapping of names to values", read_mapping)


def choice(*names: str) -> Kind[str]:
    """One of these names, in any case."""

    def read(value: object) -> str:
        name = read_text(value).lower()
        _require(name in names)
        return name

    return Kind(names[0] if len(names) == 1 else f"one of {', '.join(names)}", read, choices=names)


def choices(*names: str, least: int = 0) -> Kind[tuple[str, ...]]:
    """At least ``least`` different names out of these, in any case; one of them may stand alone."""

    def read(value: object) -> tuple[str, ...]:
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, (list, tuple)):
            raise TypeError
        chosen = tuple(read_text(name).lower() for name in given)
        _require(set(chosen) <= set(names) and len(set(chosen)) == len(chosen) >= least)
        return chosen

    return Kind(f"a list of different names out of {', '.join(names)}", read)


def word_or(word: str, kind: Kind[T]) -> Kind[str | T]:
    """This word, in any case, or a value of another kind."""

    def read(value: object) -> str | T:
        return word if isinstance(value, str) and value.lower() == word else kind.read(value)

    return Kind(f"{word} or {kind.words}", read)


def nullable(kind: Kind[T]) -> Kind[T | None]:
    """Null, or a value of another kind."""

    def read(value: object) -> T | None:
        return None if value is None else kind.read(value)

    return replace(kind, read=read, nullable=True)  # type: ignore[arg-type, return-value]


# ---------------------------------------------------------------- kinds that one option has


def _read_device(value: object) -> str:
    name = value.lower() if isinstance(value, str) else f"cuda:{read_whole(value)}"
    if re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:[0-9]{1,3})?", name) is None:
        raise ValueError
    return name


DEVICE = Kind("auto, cpu, cuda, cuda:N, the number N, mps or xpu", _read_device)


def _read_layers(value: object) -> int | tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        count = read_whole(value)
        if count < 1:
            raise ValueError
        return count
    numbers = sorted(read_whole(number) for number in value)
    if not numbers or numbers[0] < 0 or len(set(numbers)) < len(numbers):
        raise ValueError
    return tuple(numbers)


METHOD = Kind("the name of a method", lambda value: read_text(value).lower())
LAYERS = Kind("a number of layers from 1 on, or a list of different layer numbers", _read_layers)


# Files by task and split.
Annotations = dict[str, dict[str, str | None]]


def _read_annotations(value: object) -> Annotations:
    tasks = read_mapping(value)
    if not set(tasks) <= {"vqa", "caption"}:
        raise ValueError
    for files in tasks.values():
        if not isinstance(files, Mapping) or not set(files) <= {"train", "eval", "probes"}:
            raise ValueError
        for path in files.values():
            if path is not None:
                read_text(path)
    return tasks


ANNOTATIONS = Kind(
    "{vqa: {train: file, eval: file, probes: file}, caption: {the same}}, each optional", _read_annotations
)
