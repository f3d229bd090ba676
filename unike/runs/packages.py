"""The packages that running needs: which are too old, or missing."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from unike.system.findings import Finding

CONSTRAINTS, LAVIS = (
    Path(__file__).resolve().parents[2] / name for name in ("constraints.txt", "requirements-lavis.txt")
)
# What the numbers of a run depend on.
TESTED = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow")


def check_packages(backend: str = "transformers") -> list[Finding]:
    """Each package that running needs, of LAVIS where it is installed: too old is a problem, another version
    than the tested one a note."""
    if backend == "lavis":
        pins = _read_pins(LAVIS) if importlib.util.find_spec("lavis") else {}
        return [_check_version(Requirement(name), tested) for name, tested in pins.items()]
    tested = _read_pins(CONSTRAINTS)
    found = []
    for line in _list_requirements():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        found.append(_check_version(needed, tested.get(needed.name.lower())))
    return found


def _list_requirements() -> list[str]:
    """As the installed package has them; none where it runs from a folder without being installed."""
    try:
        return metadata.requires("unike") or []
    except metadata.PackageNotFoundError:
        return []


def _check_version(needed: Requirement, tested: str | None) -> Finding:
    try:
        version = metadata.version(needed.name)
    except metadata.PackageNotFoundError:
        return Finding(False, f"{needed.name}: is not installed", f"pip install '{needed}'")
    if not needed.specifier.contains(version, prereleases=True):
        return Finding(False, f"{needed.name} {version}: expected {needed.specifier}", "upgrade it")
    # A local part (2.13.0+cpu) says how it was built, not which version it is.
    if needed.name in TESTED and tested is not None and version.split("+")[0] != tested:
        return Finding(True, f"{needed.name} {version}", f"tested with {tested}")
    return Finding(True, f"{needed.name} {version}")


def _read_pins(path: Path) -> dict[str, str]:
    """Pinned versions by package; empty where the package is installed without its repository."""
    if not path.is_file():
        return {}
    lines = (line.partition(";")[0].partition("#")[0].strip() for line in path.read_text().splitlines())
    pairs = (line.partition("==") for line in lines)
    return {name.lower(): version for name, equal, version in pairs if equal}
