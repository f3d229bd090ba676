"""Versions of Python and of the packages that numbers depend on."""

from __future__ import annotations

import platform
import sys
from importlib import metadata


def collect_versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that numbers depend on; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "unike"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = getattr(sys.modules.get(package), "__version__", None)
    return found
