"""The data that a run reads: annotations, images, train records. What is missing is one line each."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TypedDict

from unike.config.combined import TrainSplitOptions
from unike.config.hparams import HyperParams
from unike.config.locating import describe_search
from unike.config.sections import DataOptions, KnowledgeOptions
from unike.datasets.benchmarks import DATASETS, recognise_layout
from unike.datasets.images import PathLike
from unike.datasets.mmedit import CaptionDataset, CapVQADataset, VQADataset
from unike.datasets.triplets import Triplet, make_triplets
from unike.methods.preparation.folders import find_shipped_knowledge
from unike.methods.registry import MethodNeeds, resolve_needs
from unike.system.findings import require
from unike.types import Case, UserError

logger = logging.getLogger("unike")

TASKS = ("vqa", "caption", "cross")
_Dataset = VQADataset | CaptionDataset | CapVQADataset
_DATASETS: dict[str, type[VQADataset] | type[CaptionDataset]] = {"vqa": VQADataset, "caption": CaptionDataset}


class _ReadingOptions(TypedDict, total=False):
    """Arguments that all data sets take."""

    image_root: PathLike | None
    rephrase_root: PathLike | None
    size: int | None
    clean: bool
    skip_broken: bool
    allow_outside: bool
    second_edit: bool


# ---------------------------------------------------------------- annotation files


def list_parts(task: str) -> tuple[str, ...]:
    """The data sets of a task; UserError for an unknown one."""
    if task not in TASKS:
        raise UserError(f"task: {task!r} is unknown; expected {', '.join(TASKS)}")
    return ("vqa", "caption") if task == "cross" else (task,)


def find_annotations(hparams: DataOptions, task: str, split: str) -> str:
    """The file under ``data.<task>.<split>``; UserError naming that key where it is missing."""
    at, path = f"{hparams.source}: data.{task}.{split}", (hparams.data.get(task) or {}).get(split)
    expected = f"expected a JSON file in {_name_layout(hparams)}'s layout"
    if path is None:
        raise UserError(f"{at}: missing; {expected}")
    if os.path.isdir(path):
        raise UserError(f"{at}: {path}: is a directory; {expected}")
    if not os.path.isfile(path):
        remedy = "draw it with scripts/tiny/make_data.py" if hparams.generate_data else "see data/README.md"
        lost = describe_search(path, hparams.source)
        raise UserError(f"{at}: {path}: no such file{lost}; {expected} ({remedy})")
    return path


def _name_layout(hparams: DataOptions) -> str:
    return DATASETS[hparams.layout].layout.title if hparams.layout in DATASETS else "MMEdit"


def _check_layout(hparams: DataOptions, task: str) -> None:
    """UserError where the task has no data of this layout, and where a file is of another one; a warning
    where it is read as MMEdit's and has more."""
    if hparams.layout in DATASETS and task != "vqa":
        raise UserError(
            f"{hparams.source}: layout: {hparams.layout}: is of the task vqa; expected --task vqa, got {task}"
        )
    for name in list_parts(task):
        path = find_annotations(hparams, name, "eval")
        found = recognise_layout(path)
        if found is None or found.name == hparams.layout:
            continue
        at = f"{hparams.source}: data.{name}.eval: {path}: has {found.title}'s fields"
        if hparams.layout not in DATASETS and found.has_mmedit:
            logger.warning("%s, of which layout: mmedit reads MMEdit's alone; try layout: %s", at, found.name)
            continue
        raise UserError(f"{at}; expected layout: {found.name}, got {hparams.layout}")


def find_train_annotations(hparams: DataOptions) -> dict[str, str]:
    """Train annotations by task, for every task in ``data`` that has some."""
    names = [n for n, files in hparams.data.items() if files.get("train")] or list(hparams.data) or ["vqa"]
    require(
        *(lambda n=name: find_annotations(hparams, n, "train") for name in names),
        lambda: _require_roots(hparams),
    )
    return {name: find_annotations(hparams, name, "train") for name in names}


def _require_roots(hparams: DataOptions) -> None:
    named = [("image_root", hparams.image_root), ("rephrase_root", hparams.rephrase_root)]
    lost = [(key, root) for key, root in named if root is not None and not os.path.isdir(root)]
    if lost:
        raise UserError(
            *(f"{hparams.source}: {k}: {r}: no such folder; expected the images" for k, r in lost)
        )


# ---------------------------------------------------------------- the eval split


def open_datasets(
    hparams: DataOptions, task: str, size: int | None = None, skip_broken: bool = False
) -> Sequence[Case]:
    """The eval cases of a task, all their images in place; UserError naming the YAML keys otherwise.

    ``skip_broken`` leaves out broken records and those that lack an image, with a warning that
    counts them.
    """
    names = list_parts(task)
    require(
        *(lambda n=name: find_annotations(hparams, n, "eval") for name in names),
        *(lambda n=name: find_probes(hparams, n) for name in names),
        lambda: _require_roots(hparams),
    )
    _check_layout(hparams, task)
    # Records without their images are found after reading, so that all must be read.
    dataset = open_eval_split(hparams, task, None if skip_broken else size, skip_broken)
    where = ", ".join(find_annotations(hparams, name, "eval") for name in names)
    cases: Sequence[Case] = dataset
    if skip_broken:
        cases, lacking = _select_complete(dataset, size)
        if skipped := [*dataset.skipped, *lacking]:
            logger.warning("%s: %d records are skipped, the first: %s", where, len(skipped), skipped[0])
    else:
        _require_images(where, dataset.list_missing_images())
    if not cases:
        raise UserError(f"{where}: no record is left to edit")
    if hparams.second_edit and not any(case.second for case in cases):
        raise UserError(f"{where}: second_edit: true; no record has one; expected VLKEB's edit-one-hop file")
    return cases


def open_eval_split(
    hparams: DataOptions, task: str, size: int | None = None, skip_broken: bool = False
) -> _Dataset:
    """The eval records of a task, whether or not their images are there; errors as ``open_datasets``."""
    files = {name: find_annotations(hparams, name, "eval") for name in list_parts(task)}
    options = _list_reading_options(hparams)
    return _open(
        hparams.layout,
        files,
        {
            **options,
            "second_edit": hparams.second_edit,
            "size": size,
            "clean": hparams.clean,
            "skip_broken": skip_broken,
        },
        {name: find_probes(hparams, name) for name in files},
    )


def find_probes(hparams: DataOptions, task: str) -> str | None:
    """The file under ``data.<task>.probes``, None without one; UserError naming that key where it is
    missing."""
    path = (hparams.data.get(task) or {}).get("probes")
    if path is not None and not os.path.isfile(path):
        raise UserError(
            f"{hparams.source}: data.{task}.probes: {path}: no such file; expected further probes (make "
            "them with python -m unike.datasets.derive)"
        )
    return path


def _list_reading_options(hparams: DataOptions) -> _ReadingOptions:
    return {
        "image_root": hparams.image_root,
        "rephrase_root": hparams.rephrase_root,
        "allow_outside": hparams.allow_outside,
    }


def _open(
    layout: str,
    files: Mapping[str, str],
    options: _ReadingOptions,
    probes: Mapping[str, str | None] | None = None,
) -> _Dataset:
    """One data set, or both, interleaved, with their further ``probes``."""
    probes = probes or {}
    if len(files) == len(_DATASETS):
        found = (probes.get("vqa"), probes.get("caption"))
        return CapVQADataset(
            files["vqa"], files["caption"], **options, vqa_probes=found[0], caption_probes=found[1]
        )
    ((name, path),) = files.items()
    return DATASETS.get(layout, _DATASETS[name])(path, **options, probes=probes.get(name))


def _require_images(where: str, missing: Sequence[str]) -> None:
    if missing:
        # The end of a path says more than its beginning.
        shown = [path if len(path) <= 300 else f"...{path[-300:]}" for path in missing[:3]]
        few = ", ".join(shown) + (", ..." if len(missing) > 3 else "")
        found = f"{len(missing)} missing image{'s' if len(missing) > 1 else ''}"
        raise UserError(f"{where}: {found}: {few}; --skip_broken leaves such records out")


def _select_complete(cases: Iterable[Case], size: int | None) -> tuple[list[Case], list[str]]:
    """The first ``size`` cases whose images are all there, and a line for each case passed over."""
    kept: list[Case] = []
    lacking: list[str] = []
    for case in cases:
        if size is not None and len(kept) == size:
            break
        queries = (case.request.query, *(probe.query for probe in case.probes))
        absent = [q.image for q in queries if q.image is not None and not os.path.isfile(q.image)]
        if absent:
            lacking.append(f"{case.request.id}: image {absent[0]} does not exist")
        else:
            kept.append(case)
    return kept, lacking


# ---------------------------------------------------------------- the train split


def wants_triplets(hparams: KnowledgeOptions, needs: MethodNeeds) -> bool:
    """Whether the train annotations may be needed: not where ``knowledge_dir`` is such a folder itself."""
    if not needs.knowledge:
        return False
    if hparams.knowledge_dir is None:
        raise UserError(
            f"{hparams.source}: knowledge_dir: missing; expected a folder for memory and encoders"
        )
    return find_shipped_knowledge(hparams) is None


def read_triplets(hparams: TrainSplitOptions, skip_broken: bool = False) -> list[Triplet]:
    """``hparams.triplets`` knowledge triplets from the train annotations, the tasks interleaved."""
    triplets = make_triplets(_open_train_split(hparams, skip_broken), hparams.triplets)
    lost = {str(t.query.image) for t in triplets if not os.path.isfile(str(t.query.image))}
    if skip_broken:
        return [t for t in triplets if t.query.image not in lost]
    _require_images(", ".join(find_train_annotations(hparams).values()), sorted(lost))
    return triplets


def read_train_cases(hparams: TrainSplitOptions, skip_broken: bool = False) -> list[Case]:
    """Every train case that the YAML names, the tasks interleaved."""
    dataset = _open_train_split(hparams, skip_broken, whole=True)
    if skip_broken:
        return _select_complete(dataset, None)[0]
    _require_images(", ".join(find_train_annotations(hparams).values()), dataset.list_missing_images())
    return list(dataset)


def read_method_cases(
    hparams: HyperParams, skip_broken: bool = False, given: Iterable[Case] | None = None
) -> Sequence[Case]:
    """What the method needs of the train annotations, the tasks interleaved, or of ``given`` cases: all of
    them for training, or the first ``hparams.triplets`` as demonstrations."""
    needs = resolve_needs(hparams)
    if needs.training or needs.scope:
        return read_train_cases(hparams, skip_broken) if given is None else list(given)
    return list(islice(_open_train_split(hparams, skip_broken) if given is None else given, hparams.triplets))


def _open_train_split(hparams: TrainSplitOptions, skip_broken: bool, whole: bool = False) -> _Dataset:
    files = find_train_annotations(hparams)
    if not whole and hparams.triplets == 0:
        raise UserError(f"{hparams.source}: triplets: 0; the method needs some of the train annotations")
    # A record whose own answer is right has no wrong one to learn from.
    options = _list_reading_options(hparams)
    return _open(hparams.layout, files, {**options, "clean": not whole, "skip_broken": skip_broken})
