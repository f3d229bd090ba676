"""Layouts of benchmarks whose fields are not MMEdit's: what a record edits and asks, in one form for all.

A ``Layout`` reads a file with what lies beside it, finds what is wrong with a record, and describes a sound
one. ``unike.datasets.benchmarks`` turns descriptions into ``Case``s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from unike.datasets.images import PathLike
from unike.datasets.mmedit import (
    REQUIRED_FIELDS,
    TEXT_LENGTH,
    VQA_TEMPLATE,
    diagnose_text,
    find_shape_problem,
)
from unike.datasets.vlkeb import is_text
from unike.system.text import describe_value, one_line
from unike.types import Match


@dataclass(frozen=True)
class Asked:
    """A question of a record for the metric of that name.

    ``image`` is a name under the folder of images (of the rephrased ones where ``is_rephrased``), or None:
    asked without an image. ``is_plain`` texts are prompts already; others go into the data set's template, or
    into their own ``template`` where the user has named none. ``aliases`` and ``match`` are the probe's.
    """

    metric: str
    text: str
    answer: str
    image: str | None = None
    is_rephrased: bool = False
    is_plain: bool = False
    template: str | None = None
    aliases: tuple[str, ...] = ()
    match: Match = "equal"


class Described(NamedTuple):
    """A record: its edit, the model's own answer where the file has it, its questions and its groups."""

    edit: Asked
    wrong: str | None
    probes: tuple[Asked, ...]
    groups: Mapping[str, str] = {}


class Joined(NamedTuple):
    """A record as the file has it, with what was found for it in the files beside."""

    record: object
    beside: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Layout:
    """A benchmark's layout. ``name`` is the YAML's, ``title`` what messages call it, ``known`` the fields
    that are read, ``marks`` those by any of which it is recognised, ``template`` the default one."""

    name: str
    title: str
    known: tuple[str, ...]
    marks: tuple[str, ...]
    read: Callable[[PathLike], Sequence[Joined]]
    find_problems: Callable[[Joined], list[str | None]]
    describe: Callable[[Joined], Described]
    template: str = VQA_TEMPLATE

    @property
    def has_mmedit(self) -> bool:
        """Whether its records have all fields of MMEdit's, too."""
        return set(REQUIRED_FIELDS) <= set(self.known)

    def list_problems(self, joined: Joined, index: int) -> list[str]:
        """What keeps a record from being a case, one line each; empty for a sound record."""
        problems: Iterable[str | None] = [find_shape_problem(joined.record, self.title)]
        if not any(problems):
            problems = self.find_problems(joined)
        return [f"record {index}: {problem}" for problem in problems if problem]


# ---------------------------------------------------------------- checks that several layouts share


def find_list_problem(record: Mapping[str, Any], name: str, at: str = "", count: int = 1) -> str | None:
    """What is wrong with a field that should be a list of ``count`` texts at least."""
    where, value = f"{at}field {name!r}", record.get(name)
    if not isinstance(value, list) or not all(is_text(text, TEXT_LENGTH) for text in value):
        return f"{where}: expected a list of texts, got {describe_value(value)}"
    if len(value) < count:
        return f"{where}: expected {count} or more texts, got {len(value)}"
    return None


def find_text_problems(
    record: Mapping[str, Any], names: Sequence[str], known: Sequence[str]
) -> list[str | None]:
    """What is wrong with fields that should be texts."""
    return [diagnose_text(dict(record), name, known) for name in names]


def find_optional_problem(record: Mapping[str, Any], name: str) -> str | None:
    """What is wrong with a field that may be a text, empty, null or missing."""
    value = record.get(name)
    if value is None or (isinstance(value, str) and len(value) <= TEXT_LENGTH):
        return None
    return f"field {name!r}: expected a string or null, got {describe_value(value)}"


def find_choice_problem(record: Mapping[str, Any], name: str, choices: Sequence[str]) -> str | None:
    """What is wrong with a field that should be one of some texts."""
    value = record.get(name)
    if isinstance(value, str) and value in choices:
        return None
    return f"field {name!r}: expected {', '.join(choices)}, got {one_line(describe_value(value), 80)}"


def strip_or_none(value: object) -> str | None:
    """The text without white space around it; None for an empty one and for what is no text."""
    return (value.strip() or None) if isinstance(value, str) else None
