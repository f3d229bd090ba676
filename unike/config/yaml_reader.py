"""YAML texts as values: repeated keys, the lines of keys, and limits on what a text may hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from unike.system.text import describe_value, shorten
from unike.types import UserError

# Far above any real file; the parser takes seconds for what is larger.
_FILE_BYTES, _SCALAR, _NODES = 1 << 18, 1 << 14, 100_000


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


def _check_size(root: yaml.Node) -> None:
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


def parse_yaml(text: str, source: str) -> tuple[object, dict[object, str], list[str]]:
    """The value of a YAML text, where its top-level keys stand, and its repeated keys."""
    where: dict[object, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _check_size(node)
        if isinstance(node, yaml.MappingNode):
            keys = (key for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            where = {key.value: f"{source}:{key.start_mark.line + 1}" for key in keys}
        value = None if node is None else loader.construct_document(node)
    except _YAML_FAULTS as fault:
        raise UserError(f"{source}: not valid YAML: {shorten(fault, 300)}") from None
    problems = [
        f"{source}:{line}: {shorten(key)}: given twice, first in line {first}"
        for key, line, first in loader.repeated
    ]
    return value, where, problems


def read_yaml(source: str) -> tuple[dict[object, object], dict[object, str], list[str]]:
    """The mapping in a YAML file, where its keys stand, and its repeated keys."""
    path = Path(source)
    # ``os.path``, which answers for names, too, that no file system takes.
    if os.path.isdir(path):
        raise UserError(f"{source}: is a folder; expected a YAML file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{source}: is not a regular file; expected a YAML file")
    try:
        if path.stat().st_size > _FILE_BYTES:
            raise UserError(
                f"{source}: more than {_FILE_BYTES} bytes; expected a YAML file of hyper-parameters"
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{source}: no such file; expected a YAML file of hyper-parameters") from None
    except OSError as fault:
        raise UserError(f"{shorten(source, 80)}: cannot be read: {fault.strerror}") from None
    except ValueError as fault:
        raise UserError(f"{source}: cannot be read as text: {fault}") from None
    values, where, problems = parse_yaml(text, source)
    if values is None:
        raise UserError(f"{source}: is empty; expected at least model_name and name")
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected lines of `key: value`, got {describe_value(values)}")
    return values, where, problems
