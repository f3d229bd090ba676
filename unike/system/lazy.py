"""Names that a package hands on without importing their homes before they are used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def load_attribute(package: str, name: str, homes: Mapping[str, str]) -> Any:
    """The attribute ``name`` of the module that ``homes`` has for it; AttributeError where it has none."""
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)
