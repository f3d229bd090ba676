"""Folders of what is prepared: one per checksum of the facts that it depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from unike.system.files import read_index

Facts = dict[str, object]


def hash_facts(facts: Facts) -> str:
    """The name of a folder: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def find_folder(parent: Path, index: str, facts: Facts) -> Path | None:
    """The first folder under ``parent`` whose ``index`` holds these facts."""
    for path in sorted(parent.glob(f"*/{index}")):
        kept = read_index(path)
        if all(kept.get(name) == value for name, value in facts.items()):
            return path.parent
    return None
