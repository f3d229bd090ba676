"""The main job as functions: check all inputs, build the knowledge, edit every case, sum up."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unike.backbones.base import Backbone
from unike.backbones.checkpoint_files import require_files
from unike.backbones.loading import pick_device
from unike.backbones.prefix import PrefixCache
from unike.datasets.mmedit import CaptionDataset, CapVQADataset, VQADataset
from unike.datasets.triplets import Triplet, triplets_of
from unike.hparams import HyperParams
from unike.methods import build, methods, needs_cases, needs_knowledge
from unike.methods.base import CaseSource, EditMethod, Knowledge, check_method
from unike.methods.meta_training import TRAINING, TrainableMethod
from unike.methods.preparation import ensure_knowledge
from unike.methods.trained import ensure_editor, kept_editor, learns, wants_cases
from unike.progress import bars
from unike.protocols import one_step
from unike.reading import Reader
from unike.records import RecordWriter, read_records, sha256_of
from unike.sequences import run_sequences, sequences_of
from unike.tables import RunningMeans, summarise
from unike.types import Case, UserError

logger = logging.getLogger("unike")

TASKS = ("vqa", "caption", "cross")
TripletSource = Callable[[], Sequence[Triplet]]
_Dataset = VQADataset | CaptionDataset | CapVQADataset
_DATASETS: dict[str, type[VQADataset] | type[CaptionDataset]] = {"vqa": VQADataset, "caption": CaptionDataset}


@dataclass
class Parts:
    """What edits are made of: a backbone and a method, with the hyper-parameters of both."""

    hparams: HyperParams
    backbone: Backbone
    method: EditMethod

    def __post_init__(self) -> None:
        first = self.method.layers(self.backbone)[0]
        self.prefixes = PrefixCache(self.backbone, first, batch=self.hparams.eval_batch)

    def reader(self, generated: bool = True) -> Reader:
        """Asks probes. It remembers the base's answers by case id: take a new one for other cases."""
        return Reader(self.backbone, self.prefixes, generated, self.hparams.metric_presets)


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
        lambda: require_files(hparams.backbone),
    )


def preflight(
    hparams: HyperParams, task: str, size: int | None = None, skip_broken: bool = False
) -> Sequence[Case]:
    """The eval cases of a run whose inputs are all there; one UserError with every problem otherwise."""
    opened: list[Sequence[Case]] = []
    require(
        lambda: require_backbone(hparams),
        lambda: opened.append(open_datasets(hparams, task, size, skip_broken)),
        lambda: wants_triplets(hparams) and knowledge_triplets(hparams, skip_broken),
        lambda: (needs_cases(hparams) or wants_cases(hparams)) and train_cases(hparams, skip_broken),
        lambda: opened and hparams.protocol != "one_step" and sequences_of(hparams, opened[0]),
    )
    return opened[0]


def wants_triplets(hparams: HyperParams) -> bool:
    """Whether the train annotations may be needed: not where ``knowledge_dir`` is such a folder itself."""
    if hparams.method not in methods() or not needs_knowledge(hparams):
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


def annotation_file(hparams: HyperParams, task: str, split: str) -> str:
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
    hparams: HyperParams, task: str, size: int | None = None, skip_broken: bool = False
) -> Sequence[Case]:
    """The eval cases of a task, all their pictures in place; UserError naming the YAML keys otherwise.

    ``skip_broken`` leaves out broken records and those that lack a picture, with a warning that
    counts them.
    """
    names = parts_of(task)
    require(*(lambda n=name: annotation_file(hparams, n, "eval") for name in names), lambda: _roots(hparams))
    files = [annotation_file(hparams, name, "eval") for name in names]
    common: dict[str, Any] = {
        "image_root": hparams.image_root,
        "rephrase_root": hparams.rephrase_root,
        # Records without their pictures are found after reading, so that all must be read.
        "size": None if skip_broken else size,
        "clean": hparams.clean,
        "skip_broken": skip_broken,
    }
    dataset = _opened(dict(zip(names, files, strict=True)), common)
    cases: Sequence[Case] = dataset
    where = ", ".join(files)
    if skip_broken:
        cases, lacking = _with_pictures(dataset, size)
        if skipped := [*dataset.skipped, *lacking]:
            logger.warning("%s: %d records are skipped, the first: %s", where, len(skipped), skipped[0])
    else:
        _require_pictures(where, dataset.missing_images())
    if not cases:
        raise UserError(f"{where}: no record is left to edit")
    return cases


def _opened(files: Mapping[str, str], options: Mapping[str, Any]) -> _Dataset:
    """One data set, or both in turn."""
    if len(files) == len(_DATASETS):
        return CapVQADataset(files["vqa"], files["caption"], **options)
    ((name, path),) = files.items()
    return _DATASETS[name](path, **options)


def _roots(hparams: HyperParams) -> None:
    named = [("image_root", hparams.image_root), ("rephrase_root", hparams.rephrase_root)]
    lost = [(key, root) for key, root in named if root is not None and not os.path.isdir(root)]
    if lost:
        raise UserError(
            *(f"{hparams.source}: {k}: {r}: no such folder; expected the pictures" for k, r in lost)
        )


def _require_pictures(where: str, missing: Sequence[str]) -> None:
    if missing:
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
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


def _train_files(hparams: HyperParams) -> dict[str, str]:
    """Train annotations by task, for every task in ``data`` that has some."""
    names = [n for n, files in hparams.data.items() if files.get("train")] or list(hparams.data) or ["vqa"]
    require(*(lambda n=name: annotation_file(hparams, n, "train") for name in names), lambda: _roots(hparams))
    return {name: annotation_file(hparams, name, "train") for name in names}


def train_cases(
    hparams: HyperParams, skip_broken: bool = False, given: Iterable[Case] | None = None
) -> Sequence[Case]:
    """What the method wants of the train annotations, the tasks in turn, or of ``given`` cases: all of
    them to learn from, or the first ``hparams.triplets`` to show."""
    if learns(hparams):
        return training_cases(hparams, skip_broken) if given is None else list(given)
    return list(islice(_train_split(hparams, skip_broken) if given is None else given, hparams.triplets))


def _train_split(hparams: HyperParams, skip_broken: bool, whole: bool = False) -> _Dataset:
    files = _train_files(hparams)
    if not whole and hparams.triplets == 0:
        raise UserError(f"{hparams.source}: triplets: 0; the method needs some of the train annotations")
    # A record whose own answer is right has no wrong one to learn from.
    common: dict[str, Any] = {"image_root": hparams.image_root, "rephrase_root": hparams.rephrase_root}
    return _opened(files, common | {"clean": not whole, "skip_broken": skip_broken})


def knowledge_triplets(hparams: HyperParams, skip_broken: bool = False) -> list[Triplet]:
    """``hparams.triplets`` knowledge triplets from the train annotations, the tasks in turn."""
    triplets = triplets_of(_train_split(hparams, skip_broken), hparams.triplets)
    lost = {str(t.query.image) for t in triplets if not os.path.isfile(str(t.query.image))}
    if skip_broken:
        return [t for t in triplets if t.query.image not in lost]
    _require_pictures(", ".join(_train_files(hparams).values()), sorted(lost))
    return triplets


def training_cases(hparams: HyperParams, skip_broken: bool = False) -> list[Case]:
    """Every train case that the YAML names, the tasks in turn."""
    dataset = _train_split(hparams, skip_broken, whole=True)
    if skip_broken:
        return _with_pictures(dataset, None)[0]
    _require_pictures(", ".join(_train_files(hparams).values()), dataset.missing_images())
    return list(dataset)


def prepare(
    hparams: HyperParams,
    backbone: Backbone,
    layers: Sequence[int],
    progress: bool = True,
    triplets: TripletSource | None = None,
) -> Knowledge:
    """Memory and encoders, read or built; empty where the method wants none.

    ``triplets`` takes the place of the train annotations that the YAML names.
    """
    if not needs_knowledge(hparams):
        return {}
    source = triplets or (lambda: knowledge_triplets(hparams))
    steps = len(layers) * hparams.encoder_steps
    totals = {"extracting knowledge states": hparams.triplets, "training encoders": steps}
    with bars(totals, progress) as tick:
        return ensure_knowledge(backbone, hparams, layers, source, tick)


def assemble(
    hparams: HyperParams,
    backbone: Backbone,
    progress: bool = True,
    triplets: TripletSource | None = None,
    cases: CaseSource | None = None,
) -> Parts:
    """The YAML's method on a backbone, with its knowledge, and trained where it learns to edit.

    ``triplets`` and ``cases`` take the place of the train annotations that the YAML names.
    """
    cases = cases or (lambda: train_cases(hparams))
    layers = build(hparams).layers(backbone)
    method = build(hparams, prepare(hparams, backbone, layers, progress, triplets), cases)
    if isinstance(method, TrainableMethod):
        with bars({TRAINING: hparams.editor_steps * hparams.editor_batch}, progress) as tick:
            ensure_editor(method, backbone, cases, tick)
    return Parts(hparams, backbone, method)


# ---------------------------------------------------------------- the run and its folder


def run_directory(hparams: HyperParams, task: str, output: str | None = None, resume: bool = False) -> Path:
    """Where a run is recorded: ``output``, or ``<results_dir>/<yaml>-<task>``, followed by the protocol
    if it is not one-step, with ``-2``, ``-3`` ... where that is taken; ``resume`` takes the latest.

    Raises UserError, before anything is loaded, where ``output`` holds a run and ``resume`` is off.
    """
    if output is not None:
        if _taken(Path(output)) and not resume:
            raise UserError(f"{output}: is not empty; go on with --resume, or name another --output")
        return Path(output)
    protocol = "" if hparams.protocol == "one_step" else f"-{hparams.protocol}"
    stem = Path(hparams.results_dir) / f"{Path(hparams.source).stem}-{task}{protocol}"
    former = stem
    for number in count(1):
        directory = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        if not _taken(directory):
            return former if resume else directory
        former = directory
    raise AssertionError("unreachable: there is always a free number")


def _taken(directory: Path) -> bool:
    return directory.is_file() or (directory.is_dir() and any(directory.iterdir()))


def checksums(hparams: HyperParams, task: str) -> dict[str, str]:
    """SHA-256 of every data file that a run reads, by YAML key."""
    files = {f"data.{n}.eval": annotation_file(hparams, n, "eval") for n in parts_of(task)}
    if wants_triplets(hparams) or needs_cases(hparams) or wants_cases(hparams):
        files |= {f"data.{n}.train": path for n, path in _train_files(hparams).items()}
    elif needs_knowledge(hparams):
        files["knowledge_dir"] = str(Path(str(hparams.knowledge_dir)) / "knowledge.safetensors")
    elif learns(hparams):
        files["editor_dir"] = str(Path(str(kept_editor(hparams))) / "editor.safetensors")
    return {key: sha256_of(path) for key, path in files.items()}


def open_run(parts: Parts, task: str, directory: Path, resume: bool, generated: bool = True) -> RecordWriter:
    """The run's folder with its manifest; UserError where the run to resume was made differently."""
    return RecordWriter(
        directory,
        resume,
        parts.hparams.to_dict() | {"task": task, "generated": generated},
        seed=parts.hparams.seed,
        weights={"backbone": parts.backbone.fingerprint},
        data=checksums(parts.hparams, task),
    )


def run_cases(
    parts: Parts,
    cases: Sequence[Case],
    writer: RecordWriter,
    generated: bool = True,
    skip_broken: bool = False,
    progress: bool = True,
    reader: Reader | None = None,
) -> dict[str, Any]:
    """Edits each case that is not recorded yet, from the base model or as the YAML's ``protocol`` has
    it, and gives the summary of all records in the folder, ``interrupted`` where Ctrl-C ended it early.

    A ``reader`` of the same cases and first layer may be handed on from run to run: what it knows of
    the base model is not asked again.

    A picture that cannot be read ends the run, or counts as a failed case under ``skip_broken``.
    """
    reader, hp = reader or parts.reader(generated), parts.hparams
    if hp.protocol != "one_step":
        return run_sequences(hp, parts.backbone, parts.method, cases, writer, reader, skip_broken, progress)
    done, interrupted = writer.done_ids(), False
    means = RunningMeans(read_records(writer.directory) if done else [])
    left = [i for i, case in enumerate(cases) if case.request.id not in done]
    with tqdm(total=len(cases), initial=len(cases) - len(left), desc="edits", disable=not progress) as bar:
        try:
            for i in left:
                record = _record(parts, cases[i], reader, skip_broken)
                writer.write(record)
                means.add(record)
                bar.set_postfix_str(str(means), refresh=False)
                bar.update()
        except KeyboardInterrupt:
            interrupted = True
    summary = summarise(read_records(writer.directory), hp.seed, hp.metric_presets)
    summary |= {"interrupted": interrupted}
    writer.write_summary(summary)
    return summary


def _record(parts: Parts, case: Case, reader: Reader, skip_broken: bool) -> dict[str, Any]:
    try:
        return one_step(parts.backbone, parts.method, case, reader)
    except UserError as error:
        if not skip_broken:
            raise
        return {"id": case.request.id, "task": case.task, "status": "failed", "error": str(error)}
