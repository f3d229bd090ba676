"""YAMLs that come with the project, by name: ``tiny_blip2``, or ``METHOD/MODEL`` as ``scoped/tiny_blip2``."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from unike.system.shipped import find_home

_FOLDER = "hparams"
# Plans of tables and of tuning lie in the same folder; a YAML of hyper-parameters has this key.
_OWN_KEY = re.compile(r"^model_name:", re.MULTILINE)


def list_names() -> list[str]:
    """The names of all YAMLs of hyper-parameters, those without a folder first."""
    folder = _find_folder()
    if folder is None:
        return []
    found = [path for path in folder.rglob("*.yaml") if _has_hparams(path)]
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in found]
    return sorted(names, key=lambda name: ("/" in name, name))


def find_yaml(path: str) -> str:
    """The file that ``path`` names: a file of the user's, else a shipped YAML, with or without ``hparams/``
    and ``.yaml``; where it is neither, ``path`` itself.

    A shipped YAML below the working folder is named relative to it.
    """
    folder = _find_folder()
    if folder is None or os.path.isabs(path) or os.path.isfile(path):
        return path
    parts = Path(path.removesuffix(".yaml")).parts
    name = "/".join(parts[1:] if parts[:1] == (_FOLDER,) else parts)
    if not re.fullmatch(r"\w+(/\w+)?", name) or not _has_hparams(file := folder / f"{name}.yaml"):
        return path
    here = Path.cwd()
    return str(file.relative_to(here)) if file.is_relative_to(here) else str(file)


def suggest_name(path: str) -> str | None:
    """The shipped YAML whose name is nearest to ``path``; None where none is near."""
    name = path.removesuffix(".yaml").removeprefix(f"{_FOLDER}/")
    return next(iter(difflib.get_close_matches(name, list_names(), n=1, cutoff=0.6)), None)


def _has_hparams(file: Path) -> bool:
    return file.is_file() and _OWN_KEY.search(file.read_text(encoding="utf-8")) is not None


def _find_folder() -> Path | None:
    home = find_home()
    return home / _FOLDER if home is not None and (home / _FOLDER).is_dir() else None
