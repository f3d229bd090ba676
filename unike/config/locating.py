"""Where the relative paths of a YAML lead: from the working folder, the YAML's folder, or the project's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from unike.system.hub import is_hub_id

# What is read. Folders of results and of caches stay relative to the working folder.
_FILES = ("name", "state_dict_file", "qformer_checkpoint", "pretrained_ckpt", "ike_model")
_FOLDERS = ("knowledge_dir", "scope_dir", "editor_dir", "image_root", "rephrase_root")
_PROJECT_HAS = "run_edit.py"
# Where the hub's models are downloaded to, each into a folder of its own.
_DOWNLOADS = "hugging_cache"


def locate_paths(values: Mapping[object, object], yaml: str) -> dict[object, object]:
    """The values of a YAML file, each relative path that is not in the working folder replaced by the one
    in the YAML's folder or its project, where it is there.

    Folders and annotations that are nowhere yet, such as a benchmark that is drawn on first use, belong to
    the project in which another path was found.
    """
    bases = list(_list_bases(Path(yaml)))
    values = {**values, "name": find_download(values["name"], bases)} if "name" in values else values
    found: dict[str, Path] = {}
    for path in _list_paths(values):
        if not os.path.isabs(path) and not _exists(path):
            base = next((b for b in bases if _exists(b / path)), None)
            if base is not None:
                found[path] = base
    if not found:
        return dict(values)
    home = next(iter(found.values()))
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
    places = [os.getcwd(), *(str(base) for base in _list_bases(Path(source)))]
    return f" (looked for in {', '.join(dict.fromkeys(places))})"


def _list_bases(yaml: Path) -> Iterator[Path]:
    """The YAML's folder and its project: the nearest folder above with ``run_edit.py``, else this code's."""
    if not os.path.isfile(yaml):
        return
    folder = Path(os.path.abspath(yaml)).parent
    yield folder
    project = next((p for p in folder.parents if (p / _PROJECT_HAS).is_file()), None)
    own = Path(__file__).resolve().parents[2]
    for base in (project, own):
        if base is not None and (base / _PROJECT_HAS).is_file():
            yield base


def _list_paths(values: Mapping[object, object]) -> Iterator[str]:
    wanted = [values.get(key) for key in (*_FILES, *_FOLDERS)]
    data = values.get("data")
    for files in data.values() if isinstance(data, Mapping) else ():
        wanted += files.values() if isinstance(files, Mapping) else ()
    yield from (path for path in wanted if isinstance(path, str) and path)


def _exists(path: str | os.PathLike[str]) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:
        return False


def _join(base: Path | None, path: object) -> object:
    return path if base is None else os.path.normpath(base / str(path))


def _place(path: object, found: Mapping[str, Path], home: Path) -> object:
    """The path in the base where it was found, or at home where it is nowhere."""
    if not isinstance(path, str) or os.path.isabs(path) or (path not in found and _exists(path)):
        return path
    return _join(found.get(path, home), path)
