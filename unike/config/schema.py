"""What a configuration is declared with: kinds of values, options, and sections of options.

A section is a frozen dataclass whose fields are options::

    @dataclass(frozen=True, kw_only=True)
    class ClipOptions(Section):
        clip_norm: float = option(number(low=0, above=True), "gradient norm limit", 1.0)

``number`` returns a ``Kind[float]`` and ``option`` a float, so that a type checker compares an option's
kind and default with its annotation.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from numbers import Real
from typing import Any, Generic, TypeVar

from unike.types import UserError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
# YAML 1.1 reads 1e-4 as text: a float needs a dot and a signed exponent there.
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
# What file systems take of a path, and of each name in it.
_PATH, _NAME = 1 << 12, 255


# ---------------------------------------------------------------- kinds of values


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
            return f"between {self.low:g} and {self.high:g}"
        if self.low is not None:
            return f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return ""

    def require(self, value: float) -> None:
        """ValueError for a number outside."""
        _require(self.low is None or (value > self.low if self.above else value >= self.low))
        _require(self.high is None or value <= self.high)


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


# ---------------------------------------------------------------- options


@dataclass(frozen=True)
class Option:
    """One key of the YAML: what it means and what it may hold."""

    name: str
    kind: Kind[Any]
    default: Any
    required: bool
    help: str
    aliases: tuple[str, ...] = ()
    group: str = ""

    def read(self, value: object, at: str) -> Any:
        """The value in the option's type. UserError, which says ``at`` which place, where it does not
        fit."""
        try:
            return self.kind.read(value)
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"{at}: expected {self.kind.words}, got {describe_value(value)}") from None


def required(kind: Kind[T], help: str) -> T:
    """A field of a section that every configuration must name."""
    made: T = field(metadata={"kind": kind, "help": help})
    return made


def option(kind: Kind[T], help: str, default: T, aliases: tuple[str, ...] = ()) -> T:
    """A field of a section, with its meaning, its default and its ``aliases``."""
    metadata = {"kind": kind, "help": help, "aliases": aliases}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)  # type: ignore[return-value]
    return field(default=default, metadata=metadata)


def describe_value(value: object) -> str:
    """A value with its type, short enough for one line of an error."""
    return "null" if value is None else f"{type(value).__name__} {shorten(value, 60, repr)}"


def shorten(value: object, limit: int = 60, written: Callable[[Any], str] = str) -> str:
    """A value on one line of at most ``limit`` characters."""
    try:
        text = " ".join(written(value).split())
    except ValueError:
        # Python writes no whole number of more than some thousand digits.
        text = "too long to be written"
    return text if len(text) <= limit else text[: limit - 3] + "..."


# ---------------------------------------------------------------- sections


@dataclass(frozen=True, kw_only=True)
class Section:
    """Options that belong together; ``source`` names them in messages.

    Values are checked, and brought into their own types, however a section is made. UserError with a
    line for each value that does not fit.
    """

    source: str = field(default="hparams", compare=False, repr=False)

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name, known in options_of(type(self)).items():
            try:
                value = known.read(getattr(self, name), f"{self.source}: {name}")
                object.__setattr__(self, name, value)
            except UserError as fault:
                problems += fault.problems
        if problems:
            raise UserError(*problems)

    def get_values(self, section: type[Section]) -> dict[str, Any]:
        """The values, by name, of the options that ``section`` itself declares."""
        return {name: getattr(self, name) for name in own_options(section)}


def options_of(section: type[Section]) -> dict[str, Option]:
    """A section's options by name, with those that it takes from other sections."""
    found = {}
    for f in fields(section):
        if f.metadata:
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            needed = default is MISSING
            found[f.name] = Option(f.name, default=None if needed else default, required=needed, **f.metadata)
    return found


def own_options(section: type[Section]) -> dict[str, Option]:
    """A section's options by name, without those that it takes from other sections."""
    others = {f.name for base in section.__bases__ if is_dataclass(base) for f in fields(base)}
    return {name: known for name, known in options_of(section).items() if name not in others}
