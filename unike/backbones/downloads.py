"""What has to be downloaded of a model that is named by its id on the hub: bytes, room for them, minutes."""

from __future__ import annotations

import shutil
from pathlib import Path

from unike.backbones.published import PUBLISHED
from unike.system.findings import Finding

GB = 10**9
# Bytes a second at 100 Mbit/s.
LINE = 100e6 / 8


def describe_download(name: str) -> Finding:
    """A note; a problem where the disk has no room for it."""
    what = f"name: {name}: is no local folder; it will be looked for on the Hugging Face hub"
    offline = "to stay offline, name the folder of a download"
    if name not in PUBLISHED:
        return Finding(True, what, offline)
    size, (place, free) = PUBLISHED[name].disk, measure_cache()
    what = f"{what}, {size / GB:.1f} GB of disk"
    if free < size:
        remedy = "set HF_HOME to a folder on a larger disk"
        return Finding(False, f"{what}; only {free / GB:.1f} GB are free in {place}", remedy)
    minutes = f"about {max(1, round(size / LINE / 60))} minutes at 100 Mbit/s"
    return Finding(True, f"{what} ({free / GB:.1f} GB are free), {minutes}", offline)


def measure_cache() -> tuple[Path, int]:
    """The folder of the hub's cache, and the free bytes there."""
    # Imported late: most names are folders.
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    there = next(p for p in (place, *place.absolute().parents) if p.exists())
    return place, shutil.disk_usage(there).free
