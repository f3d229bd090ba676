"""What a run reads, checked before anything is loaded: weights, annotations, pictures, train records."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from unike.backbones.checking import require_files
from unike.backbones.placement import check_placement, pick_device
from unike.backbones.prefix import check_prefix_dir
from unike.config.combined import TrainSplitOptions
from unike.config.hparams import HyperParams
from unike.config.sections import DataOptions, KnowledgeOptions
from unike.datasets.mmedit import CaptionDataset, CapVQADataset, VQADataset
from unike.datasets.triplets import Triplet, triplets_of
from unike.evaluation.sequences import sequences_of
from unike.knowledge.index import check_faiss
from unike.methods import MethodNeeds, check_method, resolve_needs, resolve_needs_if_valid
from unike.methods.preparation.editors import wants_cases
from unike.runs.tracking import check_trackers
from unike.types import Case, UserError

logger = logging.getLogger("unike")

TASKS = ("vqa", "caption", "cross")
_Dataset = VQADataset | CaptionDataset | CapVQADataset
_DATASETS: dict[str, type[VQADataset] | type[CaptionDataset]] = {"vqa": VQADataset, "caption": CaptionDataset}


# ---------------------------------------------------------------- checks before anything is loaded


def problems_of(*checks: Callable[[], object]) -> list[str]:
    """All lines of the UserErrors that the checks raise, in order, each once."""
    found: list[str] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found += error.problems
    return list(dict.fromkeys(found))


def require(*checks: Callable[[], object]) -> None:
    """Runs all checks, then raises one UserError with everything that they found."""
    if found := problems_of(*checks):
        raise UserError(*found)


def require_backbone(hparams: HyperParams) -> None:
    """UserError with all that is wrong with method, device and weight files."""
    require(
        lambda: check_method(hparams),
        lambda: pick_device(hparams.device),
        lambda: check_placement(hparams.backbone),
        lambda: require_files(hparams.backbone),
        lambda: check_prefix_dir(hparams),
        lambda: check_faiss(hparams.retrieval, hparams.source),
        lambda: check_trackers(hparams),
    )


def preflight(
    hparams: HyperParams, task: str, size: int | None = None, skip_broken: bool = False
) -> Sequence[Case]:
    """The eval cases of a run whose inputs are all there; one UserError with every problem otherwise."""
    opened: list[Sequence[Case]] = []
    needs = resolve_needs_if_valid(hparams)
    require(
        lambda: require_backbone(hparams),
        lambda: opened.append(open_datasets(hparams, task, size, skip_broken)),
        lambda: wants_triplets(hparams, needs) and knowledge_triplets(hparams, skip_broken),
        lambda: (needs.cases or wants_cases(hparams, needs)) and train_cases(hparams, skip_broken),
        lambda: opened and hparams.protocol != "one_step" and sequences_of(hparams, opened[0]),
    )
    return opened[0]


def wants_triplets(hparams: KnowledgeOptions, needs: MethodNeeds) -> bool:
    """Whether the train annotations may be needed: not where ``knowledge_dir`` is such a folder itself."""
    if not needs.knowledge:
        return False
    if hparams.knowledge_dir is None:
        raise UserError(
            f"{hparams.source}: knowledge_dir: missing; expected a folder for memory and encoders"
        )
    return not (Path(hparams.knowledge_dir) / "knowledge.json").is_file()


# ---------------------------------------------------------------- data


def parts_of(task: str) -> tuple[str, ...]:
    """The data sets behind a task; UserError for an unknown one."""
    if task not in TASKS:
        raise UserError(f"task: {task!r} is unknown; expected {', '.join(TASKS)}")
    return ("vqa", "caption") if task == "cross" else (task,)


def annotation_file(hparams: DataOptions, task: str, split: str) -> str:
    """The file under ``data.<task>.<split>``; UserError naming that key where it is missing."""
    at, path = f"{hparams.source}: data.{task}.{split}", (hparams.data.get(task) or {}).get(split)
    expected = "expected a JSON file in MMEdit's layout"
    if path is None:
        raise UserError(f"{at}: missing; {expected}")
    if os.path.isdir(path):
        raise UserError(f"{at}: {path}: is a directory; {expected}")
    if not os.path.isfile(path):
        remedy = "draw it with scripts/tiny/make_data.py" if hparams.generate_data else "see data/README.md"
        raise UserError(f"{at}: {path}: no such file; {expected} ({remedy})")
    return path


def open_datasets(
    hparams: DataOptions, task: str, size: int | None = None, skip_broken: bool = False
) -> Sequence[Case]:
    """The eval cases of a task, all their pictures in place; UserError naming the YAML keys otherwise.

    ``skip_broken`` leaves out broken records and those that lack a picture, with a warning that
    counts them.
    """
    names = parts_of(task)
    require(*(lambda n=name: annotation_file(hparams, n, "eval") for name in names), lambda: _roots(hparams))
    # Records without their pictures are found after reading, so that all must be read.
    dataset = eval_split(hparams, task, None if skip_broken else size, skip_broken)
    where = ", ".join(annotation_file(hparams, name, "eval") for name in names)
    cases: Sequence[Case] = dataset
    if skip_broken:
        cases, lacking = _with_pictures(dataset, size)
        if skipped := [*dataset.skipped, *lacking]:
            logger.warning("%s: %d records are skipped, the first: %s", where, len(skipped), skipped[0])
    else:
        _require_pictures(where, dataset.missing_images())
    if not cases:
        raise UserError(f"{where}: no record is left to edit")
    return cases


def eval_split(
    hparams: DataOptions, task: str, size: int | None = None, skip_broken: bool = False
) -> _Dataset:
    """The eval records of a task, whether or not their pictures are there; errors as ``open_datasets``."""
    files = {name: annotation_file(hparams, name, "eval") for name in parts_of(task)}
    options: dict[str, Any] = {
        "image_root": hparams.image_root,
        "rephrase_root": hparams.rephrase_root,
        "size": size,
        "clean": hparams.clean,
        "skip_broken": skip_broken,
        "allow_outside": hparams.allow_outside,
    }
    return _opened(files, options)


def _opened(files: Mapping[str, str], options: Mapping[str, Any]) -> _Dataset:
    """One data set, or both in turn."""
    if len(files) == len(_DATASETS):
        return CapVQADataset(files["vqa"], files["caption"], **options)
    ((name, path),) = files.items()
    return _DATASETS[name](path, **options)


def _roots(hparams: DataOptions) -> None:
    named = [("image_root", hparams.image_root), ("rephrase_root", hparams.rephrase_root)]
    lost = [(key, root) for key, root in named if root is not None and not os.path.isdir(root)]
    if lost:
        raise UserError(
            *(f"{hparams.source}: {k}: {r}: no such folder; expected the pictures" for k, r in lost)
        )


def _require_pictures(where: str, missing: Sequence[str]) -> None:
    if missing:
        # The end of a path tells more than its beginning.
        shown = [path if len(path) <= 300 else f"...{path[-300:]}" for path in missing[:3]]
        few = ", ".join(shown) + (", ..." if len(missing) > 3 else "")
        found = f"{len(missing)} missing picture{'s' if len(missing) > 1 else ''}"
        raise UserError(f"{where}: {found}: {few}; --skip_broken leaves such records out")


def _with_pictures(cases: Iterable[Case], size: int | None) -> tuple[list[Case], list[str]]:
    kept: list[Case] = []
    lacking: list[str] = []
    for case in cases:
        if size is not None and len(kept) == size:
            break
        queries = (case.request.query, *(probe.query for probe in case.probes))
        absent = [q.image for q in queries if q.image is not None and not os.path.isfile(q.image)]
        if absent:
            lacking.append(f"{case.request.id}: picture {absent[0]} does not exist")
        else:
            kept.append(case)
    return kept, lacking


# ---------------------------------------------------------------- knowledge


def train_files(hparams: DataOptions) -> dict[str, str]:
    """Train annotations by task, for every task in ``data`` that has some."""
    names = [n for n, files in hparams.data.items() if files.get("train")] or list(hparams.data) or ["vqa"]
    require(*(lambda n=name: annotation_file(hparams, n, "train") for name in names), lambda: _roots(hparams))
    return {name: annotation_file(hparams, name, "train") for name in names}


def train_cases(
    hparams: HyperParams, skip_broken: bool = False, given: Iterable[Case] | None = None
) -> Sequence[Case]:
    """What the method wants of the train annotations, the tasks in turn, or of ``given`` cases: all of
    them to learn from, or the first ``hparams.triplets`` to show."""
    needs = resolve_needs(hparams)
    if needs.training or needs.scope:
        return training_cases(hparams, skip_broken) if given is None else list(given)
    return list(islice(_train_split(hparams, skip_broken) if given is None else given, hparams.triplets))


def _train_split(hparams: TrainSplitOptions, skip_broken: bool, whole: bool = False) -> _Dataset:
    files = train_files(hparams)
    if not whole and hparams.triplets == 0:
        raise UserError(f"{hparams.source}: triplets: 0; the method needs some of the train annotations")
    # A record whose own answer is right has no wrong one to learn from.
    common: dict[str, Any] = {"image_root": hparams.image_root, "rephrase_root": hparams.rephrase_root}
    common["allow_outside"] = hparams.allow_outside
    return _opened(files, common | {"clean": not whole, "skip_broken": skip_broken})


def knowledge_triplets(hparams: TrainSplitOptions, skip_broken: bool = False) -> list[Triplet]:
    """``hparams.triplets`` knowledge triplets from the train annotations, the tasks in turn."""
    triplets = triplets_of(_train_split(hparams, skip_broken), hparams.triplets)
    lost = {str(t.query.image) for t in triplets if not os.path.isfile(str(t.query.image))}
    if skip_broken:
        return [t for t in triplets if t.query.image not in lost]
    _require_pictures(", ".join(train_files(hparams).values()), sorted(lost))
    return triplets


def training_cases(hparams: TrainSplitOptions, skip_broken: bool = False) -> list[Case]:
    """Every train case that the YAML names, the tasks in turn."""
    dataset = _train_split(hparams, skip_broken, whole=True)
    if skip_broken:
        return _with_pictures(dataset, None)[0]
    _require_pictures(", ".join(train_files(hparams).values()), dataset.missing_images())
    return list(dataset)
