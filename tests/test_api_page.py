"""The API page covers every public name, and what it shows has a docstring."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

import unike

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
ENTRY = re.compile(r"^::: ([\w.]+)\n((?: +.*\n)*)", re.M)


def read_entries(text: str) -> dict[str, dict[str, Any]]:
    """The names that a page takes from the code, each with its options."""
    return {name: (yaml.safe_load(block) or {}).get("options", {}) for name, block in ENTRY.findall(text)}


ENTRIES = read_entries(PAGE.read_text(encoding="utf-8"))


def locate(name: str) -> tuple[str, str]:
    """The module and the attribute of a full name."""
    module, _, attribute = name.rpartition(".")
    return module, attribute


def read_attribute_docs(source: str) -> dict[str, str]:
    """The texts that stand after assignments at a module's top, by the assigned name."""
    body = ast.parse(source).body
    return {
        ast.unparse(first.targets[0]): after.value.value
        for first, after in pairwise(body)
        if isinstance(first, ast.Assign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }


def find_docstring(name: str) -> str | None:
    """Of a class or function, its own; of another value, the text after its assignment."""
    module, attribute = locate(name)
    found = getattr(importlib.import_module(module), attribute)
    if inspect.isclass(found) or inspect.isroutine(found):
        # A dataclass without one gets its signature.
        doc = found.__dict__.get("__doc__") if inspect.isclass(found) else found.__doc__
        return None if doc and doc.startswith(f"{found.__name__}(") else doc
    return read_attribute_docs(inspect.getsource(importlib.import_module(module))).get(attribute)


def list_undocumented(cls: type, members: Any = None) -> list[str]:
    """The public methods and properties that a class defines itself, or those named, without a docstring;
    one that overrides a base's may have the base's."""
    own = [n for n, v in vars(cls).items() if n[0] != "_" and (callable(v) or hasattr(v, "__get__"))]
    names = own if members is None else members or []
    return [n for n in names if not inspect.getdoc(inspect.getattr_static(cls, n))] if names else []


def test_every_public_name_is_on_the_page() -> None:
    wanted = {f"unike.{name}" for name in dir(unike)}
    assert "unike.MultimodalEditor" in wanted
    assert wanted - ENTRIES.keys() == set()


@pytest.mark.parametrize("name", ENTRIES)
def test_what_the_page_shows_has_a_docstring(name: str) -> None:
    assert find_docstring(name), f"{name}: has no docstring"
    module, attribute = locate(name)
    found = getattr(importlib.import_module(module), attribute)
    if inspect.isclass(found):
        assert list_undocumented(found, ENTRIES[name].get("members")) == []


def test_gaps_are_noticed() -> None:
    class Bare:
        """Something."""

        def walk(self) -> None: ...

        @property
        def size(self) -> int:
            """How large it is."""
            return 0

    assert list_undocumented(Bare) == ["walk"]
    assert list_undocumented(Bare, ["size"]) == []
    text = "::: a.b\n    options:\n      members: [c]\n\n::: a.d\n"
    assert read_entries(text) == {"a.b": {"members": ["c"]}, "a.d": {}}
    assert read_attribute_docs('A = 1\n"""One."""\nB = 2\n') == {"A": "One."}
    assert find_docstring("unike.types.BACKBONES") is None
