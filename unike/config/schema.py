"""What the strict configuration is made of: an option's description, YAML reading, value checks."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from unike.types import METRIC_PRESETS, TRACKERS, UserError

# YAML 1.1 reads 1e-4 as text: a float needs a dot and a signed exponent there.
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_TASKS, _SPLITS = ("vqa", "caption"), ("train", "eval")
# Far above any real file; the parser takes seconds for what is larger.
_FILE_BYTES, _SCALAR, _NODES = 1 << 18, 1 << 14, 100_000
# What file systems take of a path, and of each name in it.
_PATH, _NAME = 1 << 12, 255


@dataclass(frozen=True)
class Option:
    """One key of the YAML: what it means and what it may hold."""

    name: str
    type: str
    default: Any
    required: bool
    group: str
    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def optional(self) -> bool:
        """Whether null is a value."""
        return self.type.endswith("| None")

    @property
    def range(self) -> str:
        """The allowed interval in words, empty where there is none."""
        if self.low is not None and self.high is not None:
            return f"between {self.low:g} and {self.high:g}"
        if self.low is not None:
            return f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return ""


class _Loader(yaml.SafeLoader):
    """Safe YAML that remembers repeated keys."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.repeated: list[tuple[str, int, int]] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Looked at here because merge keys (<<), expanded later, repeat keys lawfully.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if (key.tag, key.value) in first:
                    self.repeated.append((key.value, line, first[key.tag, key.value]))
                first.setdefault((key.tag, key.value), line)
        return node


def _bounded(root: yaml.Node) -> None:
    """ValueError where a text's aliases refer to themselves or make it explode, or a value is too long."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            if sizes[id(node)] < 0:
                raise ValueError("an alias refers to what it stands in")
            return sizes[id(node)]
        if isinstance(node, yaml.ScalarNode):
            if len(node.value) > _SCALAR:
                raise ValueError(f"a value of {len(node.value)} characters; expected at most {_SCALAR}")
            return 1
        sizes[id(node)] = -1
        parts = [p for pair in node.value for p in pair] if isinstance(node, yaml.MappingNode) else node.value
        total = 1 + sum(size(part) for part in parts)
        if total > _NODES:
            raise ValueError(f"more than {_NODES} values, with its aliases written out")
        sizes[id(node)] = total
        return total

    size(root)


# The safe constructors themselves fail on text such as `2024-99-99`, `0x_` or `!!bool maybe`.
_YAML_FAULTS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


def parse_yaml(text: str, source: str) -> tuple[Any, dict[Any, str], list[str]]:
    """The value of a YAML text, where its top-level keys stand, and its repeated keys."""
    where: dict[Any, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _bounded(node)
        if isinstance(node, yaml.MappingNode):
            keys = (key for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            where = {key.value: f"{source}:{key.start_mark.line + 1}" for key in keys}
        value = None if node is None else loader.construct_document(node)
    except _YAML_FAULTS as fault:
        raise UserError(f"{source}: not valid YAML: {short(fault, 300)}") from None
    problems = [
        f"{source}:{line}: {short(key)}: given twice, first in line {first}"
        for key, line, first in loader.repeated
    ]
    return value, where, problems


def read_yaml(source: str) -> tuple[dict[Any, Any], dict[Any, str], list[str]]:
    """The mapping in a YAML file, where its keys stand, and its repeated keys."""
    path = Path(source)
    if path.is_dir():
        raise UserError(f"{source}: is a folder; expected a YAML file")
    try:
        if path.stat().st_size > _FILE_BYTES:
            raise UserError(
                f"{source}: more than {_FILE_BYTES} bytes; expected a YAML file of hyper-parameters"
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{source}: no such file; expected a YAML file of hyper-parameters") from None
    except (OSError, ValueError) as fault:
        raise UserError(f"{source}: cannot be read as text: {fault}") from None
    values, where, problems = parse_yaml(text, source)
    if values is None:
        raise UserError(f"{source}: is empty; expected at least model_name and name")
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected lines of `key: value`, got {shown(values)}")
    return values, where, problems


def shown(value: Any) -> str:
    """A value with its type, short enough for one line of an error."""
    return "null" if value is None else f"{type(value).__name__} {short(value, 60, repr)}"


def short(value: Any, limit: int = 60, written: Callable[[Any], str] = str) -> str:
    """A value on one line of at most ``limit`` characters."""
    try:
        text = " ".join(written(value).split())
    except ValueError:
        # Python writes no whole number of more than some thousand digits.
        text = "too long to be written"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def expected(option: Option) -> str:
    """What an option may hold, in words."""
    if option.choices:
        return f"one of {', '.join(option.choices)}"
    words = _KINDS.get(option.name) or _KINDS[option.type.removesuffix(" | None")]
    return " ".join(filter(None, (words[0], option.range, "or null" if option.optional else "")))


def typed_value(option: Option, value: Any) -> Any:
    """The value in the option's type; raises where it does not fit."""
    if value is None and option.optional:
        return None
    read = (_KINDS.get(option.name) or _KINDS[option.type.removesuffix(" | None")])[1]
    value = read(value)
    if option.choices:
        value = value.lower()
        _require(value in option.choices)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _require(option.low is None or (value > option.low if option.above else value >= option.low))
        _require(option.high is None or value <= option.high)
    return value


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _text(value: Any) -> str:
    _require(isinstance(value, str) and bool(value.strip()) and "\0" not in value)
    # Of lone surrogates this makes a UnicodeEncodeError, a ValueError.
    names = value.encode().split(b"/")
    _require(len(value) <= _PATH and all(len(name) <= _NAME for name in names))
    return value


def _whole(value: Any) -> int:
    _require(isinstance(value, int) and not isinstance(value, bool))
    return value


def _number(value: Any) -> float:
    text = isinstance(value, str) and _NUMBER.fullmatch(value) is not None
    _require(text or (isinstance(value, Real) and not isinstance(value, bool)))
    number = float(value)
    _require(math.isfinite(number))
    return number


def _switch(value: Any) -> bool:
    _require(isinstance(value, bool))
    return value


def _layers(value: Any) -> int | tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        _require(_whole(value) >= 1)
        return value
    numbers = sorted(_whole(number) for number in value)
    _require(bool(numbers) and numbers[0] >= 0 and len(set(numbers)) == len(numbers))
    return tuple(numbers)


def _auto(value: Any) -> str | int:
    return "auto" if isinstance(value, str) and value.lower() == "auto" else _whole(value)


def _alpha(value: Any) -> str | float:
    return "adaptive" if isinstance(value, str) and value.lower() == "adaptive" else _number(value)


def _device(value: Any) -> str:
    if not isinstance(value, str):
        value = f"cuda:{_whole(value)}"
    _require(re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:[0-9]+)?", value.lower()) is not None)
    return value.lower()


def _mapping(value: Any) -> dict[str, Any]:
    _require(isinstance(value, Mapping) and _plain(value))
    return copy.deepcopy(dict(value))


def _plain(value: Any) -> bool:
    """Whether a value is made of what JSON has, too."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (str, int))


def _presets(value: Any) -> tuple[str, ...]:
    names = _names(value, METRIC_PRESETS)
    _require(bool(names))
    return names


def _names(value: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    _require(isinstance(names, (list, tuple)))
    names = tuple(_text(name).lower() for name in names)
    _require(set(names) <= set(known) and len(set(names)) == len(names))
    return names


def _annotations(value: Any) -> dict[str, Any]:
    tasks = _mapping(value)
    _require(set(tasks) <= set(_TASKS))
    for files in tasks.values():
        _require(set(_mapping(files)) <= set(_SPLITS))
        _require(all(path is None or _text(path) for path in files.values()))
    return tasks


# By the option's name where its values have a form of their own, otherwise by its type.
_KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "str": ("text", _text),
    "int": ("a whole number", _whole),
    "float": ("a number", _number),
    "bool": ("true or false", _switch),
    "dict[str, Any]": ("a mapping of names to values", _mapping),
    "method": ("the name of a method", lambda value: _text(value).lower()),
    "layers": ("a number of layers from 1 on, or a list of different layer numbers", _layers),
    "edit_batch_size": ("auto or a whole number", _auto),
    "alpha": ("adaptive or a number", _alpha),
    "device": ("auto, cpu, cuda, cuda:N, the number N, mps or xpu", _device),
    "metric_presets": (f"a list of different names out of {', '.join(METRIC_PRESETS)}", _presets),
    "log_to": (f"a list of different names out of {', '.join(TRACKERS)}", lambda v: _names(v, TRACKERS)),
    "data": ("{vqa: {train: file, eval: file}, caption: {train: file, eval: file}}", _annotations),
}
