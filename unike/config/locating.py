"""Where the relative paths of a YAML lead: from the YAML's folder and its project, the working folder, or
the files that come with this code."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from unike.system.hub import is_hub_id
from unike.system.shipped import CHECKOUT_FILE, choose_writable, find_home, is_there

# What is read. Folders of results and of caches stay relative to the working folder.
_FILES = ("name", "state_dict_file", "qformer_checkpoint", "pretrained_ckpt", "ike_model")
_FOLDERS = ("knowledge_dir", "scope_dir", "editor_dir", "image_root", "rephrase_root")
# The working folder as a base: its paths stay as they are written.
_HERE = Path()
# Where the hub's models are downloaded to, each into a folder of its own.
_DOWNLOADS = "hugging_cache"


def locate_paths(values: Mapping[object, object], yaml: str) -> dict[object, object]:
    """The values of a YAML file, each relative path replaced by the one in the YAML's folder or its project
    where it is there, else left to the working folder where it is there, else replaced by the one among the
    files that come with this code.

    Folders and annotations that are nowhere yet, such as a benchmark that is drawn on first use, belong to
    the place in which another path was found; in an installed package, to the cache folder.
    """
    bases = list(_list_bases(Path(yaml)))
    values = {**values, "name": find_download(values["name"], bases)} if "name" in values else values
    found: dict[str, Path] = {}
    for path in _list_paths(values):
        if not os.path.isabs(path):
            base = next((b for b in bases if is_there(b / path)), None)
            if base is not None:
                found[path] = _HERE if _is_here(base, path) else base
    home = next((base for base in found.values() if base != _HERE), None)
    if home is None:
        return dict(values)
    located: dict[object, object] = dict(values)
    for key in _FILES:
        located |= {key: _join(found.get(str(values[key])), values[key])} if key in values else {}
    for key in _FOLDERS:
        located |= {key: _place(values[key], found, home)} if key in values else {}
    data = values.get("data")
    if isinstance(data, Mapping):
        located["data"] = {
            task: {split: _place(path, found, home) for split, path in files.items()}
            if isinstance(files, Mapping)
            else files
            for task, files in data.items()
        }
    return located


def find_download(name: object, bases: Iterable[Path] = ()) -> object:
    """In place of an id of the Hugging Face hub, the folder of its download, where there is one:
    ``hugging_cache/`` and the model's name, in the working folder or in one of the ``bases``."""
    if not isinstance(name, str) or not is_hub_id(name):
        return name
    folder = f"./{_DOWNLOADS}/{name.partition('/')[2]}"
    places = (folder, *(os.path.normpath(base / folder) for base in bases))
    return next((place for place in places if os.path.isfile(os.path.join(place, "config.json"))), name)


def describe_search(path: str, source: str) -> str:
    """Where a relative path was looked for, for a message; empty for an absolute one."""
    if os.path.isabs(path):
        return ""
    places = [os.path.abspath(base) for base in _list_bases(Path(source))] or [os.getcwd()]
    return f" (looked for in {', '.join(dict.fromkeys(places))})"


def _list_bases(yaml: Path) -> Iterator[Path]:
    """The YAML's folder and its project, the nearest folder above with ``run_edit.py``; the working folder;
    the project's own files. None for values that are in no file."""
    if not os.path.isfile(yaml):
        return
    folder = Path(os.path.abspath(yaml)).parent
    yield folder
    own = find_home()
    tops = (p for p in folder.parents if p == own or (p / CHECKOUT_FILE).is_file())
    if (project := next(tops, None)) is not None:
        yield project
    yield _HERE
    if own is not None:
        yield own


def _list_paths(values: Mapping[object, object]) -> Iterator[str]:
    wanted = [values.get(key) for key in (*_FILES, *_FOLDERS)]
    data = values.get("data")
    for files in data.values() if isinstance(data, Mapping) else ():
        wanted += files.values() if isinstance(files, Mapping) else ()
    yield from (path for path in wanted if isinstance(path, str) and path)


def _is_here(base: Path, path: str) -> bool:
    """Whether a path in ``base`` is the working folder's."""
    return base == _HERE or (is_there(path) and os.path.samefile(base / path, path))


def _join(base: Path | None, path: object) -> object:
    return path if base is None or base == _HERE else os.path.normpath(base / str(path))


def _place(path: object, found: Mapping[str, Path], home: Path) -> object:
    """The path in the base where it was found, or at home where it is nowhere."""
    if not isinstance(path, str) or os.path.isabs(path) or path in found:
        return _join(found.get(str(path)), path)
    placed = _join(home, path)
    return placed if placed == path else str(choose_writable(str(placed)))
