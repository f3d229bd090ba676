"""The project's own files besides its code: hyper-parameters, toy models, drawing code, example records.

A clone has them at its top, a wheel in ``unike/shipped``. Nothing is written into an installed package: what
would be goes to the same place in a cache folder.
"""

from __future__ import annotations

import os
from pathlib import Path

PathLike = str | os.PathLike[str]
PACKAGED = Path(__file__).resolve().parents[1] / "shipped"
# Only a clone has it at its top.
CHECKOUT_FILE = "run_edit.py"
CACHE_VARIABLE = "UNIKE_CACHE"
# The example's folder, with records of the bundled benchmark that need no drawing.
EXAMPLE = "data/example"
EXAMPLE_IMAGE = "kangaroo.png"


def is_there(path: PathLike) -> bool:
    """Whether a path exists; False for a name that no file system takes."""
    try:
        return os.path.exists(path)
    except ValueError:
        return False


def is_packaged() -> bool:
    """Whether this code comes from a wheel, with the project's files inside the package."""
    return PACKAGED.is_dir()


def find_home() -> Path | None:
    """The folder with ``hparams/``, ``hugging_cache/``, ``scripts/`` and ``data/``: the clone's top, or the
    wheel's ``unike/shipped``. None where the code was installed without them."""
    if is_packaged():
        return PACKAGED
    top = Path(__file__).resolve().parents[2]
    return top if (top / CHECKOUT_FILE).is_file() else None


def find_shipped(path: str) -> str:
    """A relative path in the working folder where it is there, else in the project's files where it is there,
    else as it is."""
    home = find_home()
    if home is None or os.path.isabs(path) or is_there(path) or not is_there(home / path):
        return path
    return str(home / path)


def is_bundled(model: PathLike) -> bool:
    """Whether a model's folder is one of the two that come with the project."""
    home = find_home()
    if home is None:
        return False
    folder = Path(find_shipped(os.fspath(model))).resolve()
    return folder.parent == (home / "hugging_cache").resolve() and (folder / ".shipped").is_file()


def choose_cache_folder() -> Path:
    """Where an installed package writes: ``$UNIKE_CACHE``, else ``unike`` in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(os.path.abspath(named))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "unike")


def choose_writable(path: PathLike) -> Path:
    """The path itself; of one in the installed package, the same place in the cache folder."""
    if not is_packaged():
        return Path(path)
    whole = Path(path).resolve()
    return (
        choose_cache_folder() / whole.relative_to(PACKAGED) if whole.is_relative_to(PACKAGED) else Path(path)
    )


def find_example_image() -> str:
    """The path of an example image, 64 x 64 pixels: the toy model takes its kangaroo for a deer.

    Drawing: OpenMoji, CC BY-SA 4.0. FileNotFoundError where the project's files were not installed.
    """
    home = find_home()
    path = None if home is None else home / EXAMPLE / EXAMPLE_IMAGE
    if path is None or not path.is_file():
        raise FileNotFoundError(f"{EXAMPLE}/{EXAMPLE_IMAGE}: not installed with this package")
    return str(path)


def name_extra(extra: str) -> str:
    """What pip installs for an optional feature: from the clone's folder, or by the package's name."""
    return f"'unike[{extra}]'" if is_packaged() else f"'.[{extra}]'"
