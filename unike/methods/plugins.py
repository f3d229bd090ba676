"""Methods that are not in this package: a user's files and modules, and installed packages."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from importlib.metadata import entry_points
from pathlib import Path

from unike.types import UserError

# Files (``my_method.py``) or modules (``my_package.method``), separated like the entries of PATH. A
# variable, since processes that share a run inherit it; not a key of the YAML, which must never run code.
VARIABLE = "UNIKE_METHODS"
GROUP = "unike.methods"
# Names that are imported, and ``GROUP`` once all of its entry points are.
_LOADED: set[str] = set()


def load_own_methods() -> None:
    """Imports what ``UNIKE_METHODS`` and the entry points of ``unike.methods`` name, each once; what is
    imported registers itself. UserError where that fails.

    Installed packages are searched once per process; the variable is read anew in every call.
    """
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        _load(name, VARIABLE)
    if GROUP not in _LOADED:
        for point in entry_points(group=GROUP):
            _load(point.value, f"entry point {point.name} of {GROUP}")
        _LOADED.add(GROUP)


def _load(name: str, source: str) -> None:
    if name in _LOADED:
        return
    try:
        if name.endswith(".py"):
            _load_file(Path(name))
        else:
            importlib.import_module(name.partition(":")[0])
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = (__file__, importlib.__file__)
        theirs = [f for f in frames if f.filename not in ours and not f.filename.startswith("<frozen")]
        at = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
        raise UserError(
            f"{source}: {name} cannot be imported: {type(error).__name__}: {error}{at}"
        ) from error
    _LOADED.add(name)


def _load_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError("no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, "a file that ends in .py has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look the module of a class up by name.
    former = sys.modules.get(path.stem)
    if former is not None:
        raise ImportError(f"a module named {path.stem} is there already; give the file another name")
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
