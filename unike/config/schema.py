"""What a configuration is declared with: options, and sections of options.

A section is a frozen dataclass whose fields are options::

    @dataclass(frozen=True, kw_only=True)
    class ClipOptions(Section):
        clip_norm: float = option(number(low=0, above=True), "gradient norm limit", 1.0)

``number`` returns a ``Kind[float]`` and ``option`` a float, so that a type checker compares an option's
kind and default with its annotation.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import TypeVar

from unike.config.kinds import Kind, TooLargeError
from unike.system.text import describe_value
from unike.types import UserError

T = TypeVar("T")


# ---------------------------------------------------------------- options


@dataclass(frozen=True)
class Option:
    """One key of the YAML: what it means and what it may hold."""

    name: str
    kind: Kind[object]
    default: object
    required: bool
    help: str
    aliases: tuple[str, ...] = ()
    group: str = ""

    def read(self, value: object, at: str) -> object:
        """The value in the option's type. UserError, which says ``at`` which place, where it does not
        fit."""
        try:
            return self.kind.read(value)
        except TooLargeError as error:
            at_most = f"{self.kind.words}, and at most {error}"
            raise UserError(f"{at}: expected {at_most}, got {describe_value(value)}") from None
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
        for name, known in list_options(type(self)).items():
            try:
                value = known.read(getattr(self, name), f"{self.source}: {name}")
                object.__setattr__(self, name, value)
            except UserError as fault:
                problems += fault.problems
        if problems:
            raise UserError(*problems)

    def get_values(self, section: type[Section]) -> dict[str, object]:
        """The values, by name, of the options that ``section`` itself declares."""
        return {name: getattr(self, name) for name in list_own_options(section)}


def list_options(section: type[Section]) -> dict[str, Option]:
    """A section's options by name, with those that it takes from other sections."""
    found = {}
    for f in fields(section):
        if f.metadata:
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            needed = default is MISSING
            found[f.name] = Option(f.name, default=None if needed else default, required=needed, **f.metadata)
    return found


def list_own_options(section: type[Section]) -> dict[str, Option]:
    """A section's options by name, without those that it takes from other sections."""
    others = {f.name for base in section.__bases__ if is_dataclass(base) for f in fields(base)}
    return {name: known for name, known in list_options(section).items() if name not in others}
