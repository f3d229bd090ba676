"""Models of the Hugging Face hub by their ids: which of their files lie on this machine."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from unike.system.text import one_line
from unike.types import UserError

# An owner has no underscore and no dot.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[\w.-]+")
# Far above any real configuration.
_CONFIG_BYTES = 1 << 24


def is_hub_id(name: str) -> bool:
    """Whether a model's name is an id of the hub, such as ``Qwen/Qwen2.5-VL-7B-Instruct``, and no path: a
    folder that is there makes ``a/b`` a path."""
    path = Path(name)
    return _ID.fullmatch(name) is not None and not os.path.exists(path) and not os.path.isdir(path.parent)


def find_model_folder(name: str) -> Path:
    """The folder of a model's files: ``name`` itself or, of an id, where the hub's files lie on this machine.
    The network is not asked; of an id that was never fetched the folder does not exist."""
    if is_hub_id(name):
        # Imported late: most names are folders.
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
        if isinstance(found, str):
            return Path(found).parent
    return Path(name)


def read_model_config(name: str) -> dict[str, Any]:
    """The ``config.json`` of a folder, or of an id: the hub is asked where it is not on this machine.

    UserError, in one line, where there is none.
    """
    path = find_model_folder(name) / "config.json"
    if is_hub_id(name) and not os.path.isfile(path):
        path = _fetch(name, "config.json")
    expected = "expected the folder of a Hugging Face model, or its id on the hub (owner/model)"
    if not os.path.isfile(path):
        what = "holds no config.json" if os.path.isdir(path.parent) else "no such folder"
        raise UserError(f"model: {one_line(name, 200)}: {what}; {expected}")
    try:
        if path.stat().st_size > _CONFIG_BYTES:
            raise ValueError("it is too large")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model: {one_line(path, 200)}: cannot be read: {one_line(error, 80)}") from error
    if not isinstance(config, dict):
        raise UserError(f"model: {one_line(path, 200)}: holds no object; {expected}")
    return config


def _fetch(name: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except Exception as error:  # of the hub, of HTTP, of the disk: they have no common type
        reason = one_line(error, 120) or type(error).__name__
        raise UserError(
            f"model: {name}: no folder of this name, and the Hugging Face hub does not give its {file} "
            f"({reason}); expected a folder, or the id of a model that can be reached"
        ) from error
