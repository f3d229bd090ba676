"""The main job as functions: check all inputs, build the knowledge, edit every case, sum up."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from unike.backbones.base import Backbone
from unike.config.combined import RunFolderOptions
from unike.config.hparams import HyperParams
from unike.config.sections import ProtocolOptions
from unike.edits import Edit, EditStore
from unike.evaluation.protocols import one_step_many
from unike.evaluation.reader import Reader
from unike.evaluation.summary import RunningMeans
from unike.methods import resolve_layers, resolve_needs
from unike.methods.preparation.editors import find_editor, wants_cases
from unike.methods.preparation.scope import find_scope_classifier
from unike.runs.inputs import (
    TASKS,
    annotation_file,
    knowledge_triplets,
    open_datasets,
    parts_of,
    preflight,
    problems_of,
    require,
    require_backbone,
    train_cases,
    train_files,
    training_cases,
    wants_triplets,
)
from unike.runs.parts import Parts, assemble, prepare
from unike.runs.records import RecordWriter, read_records
from unike.runs.sequences import run_sequences
from unike.runs.sharing import SharedRun
from unike.runs.tracking import track
from unike.system import faults, processes
from unike.system.files import sha256_of
from unike.types import Case, UserError

__all__ = [
    "TASKS", "Parts", "annotation_file", "assemble", "checksums", "drawn", "edit_store", "knowledge_triplets",
    "open_datasets", "open_run", "parts_of", "preflight", "prepare", "problems_of", "require",
    "require_backbone", "run_cases", "run_directory", "train_cases", "training_cases", "wants_triplets",
]  # fmt: skip

logger = logging.getLogger("unike")

# More edits side by side than this gain nothing; and as many tokens a query is taken to have.
AT_ONCE, TOKENS = 32, 128


def drawn(hparams: HyperParams, draw: Callable[[HyperParams], object]) -> None:
    """Draws the data that the YAML names, once its backbone is known to load."""
    require_backbone(hparams)
    draw(hparams)


# ---------------------------------------------------------------- the run and its folder


def run_directory(
    hparams: RunFolderOptions, task: str, output: str | None = None, resume: bool = False
) -> Path:
    """Where a run is recorded: ``output``, or ``<results_dir>/<yaml>-<task>``, followed by the protocol
    if it is not one-step, with ``-2``, ``-3`` ... where that is taken; ``resume`` takes the latest.

    Raises UserError, before anything is loaded, where ``output`` holds a run and ``resume`` is off, or
    where the folder can't be written.
    """
    if output is not None:
        if _taken(Path(output)) and not resume:
            raise UserError(f"{output}: is not empty; go on with --resume, or name another --output")
        return _writable(Path(output))
    protocol = "" if hparams.protocol == "one_step" else f"-{hparams.protocol}"
    stem = Path(hparams.results_dir) / f"{Path(hparams.source).stem}-{task}{protocol}"
    former = stem
    for number in count(1):
        directory = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        if not _taken(directory):
            return _writable(former if resume else directory)
        former = directory
    raise AssertionError("unreachable: there is always a free number")


def _writable(directory: Path) -> Path:
    there = next((p for p in (directory, *directory.parents) if os.path.exists(p)), directory)
    if not (os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)):
        raise UserError(f"{directory}: cannot be made a run folder: {there} cannot be written")
    return directory


def _taken(directory: Path) -> bool:
    return directory.is_file() or (directory.is_dir() and any(directory.iterdir()))


def edit_store(hparams: ProtocolOptions, folder: str | None) -> EditStore | None:
    """Where ``--save_edits`` keeps a run's edits, if anywhere; UserError for a folder of something else,
    and for several sequences, which may edit a record anew."""
    if folder is None:
        return None
    if hparams.protocol != "one_step" and hparams.sequences > 1:
        at = f"{hparams.source}: sequences: {hparams.sequences}"
        raise UserError(f"{at}; --save_edits keeps one sequence, expected sequences: 1")
    return EditStore(folder)


def checksums(hparams: HyperParams, task: str) -> dict[str, str]:
    """SHA-256 of every data file that a run reads, by YAML key."""
    files = {f"data.{n}.eval": annotation_file(hparams, n, "eval") for n in parts_of(task)}
    needs = resolve_needs(hparams)
    if wants_triplets(hparams, needs) or needs.cases or wants_cases(hparams, needs):
        files |= {f"data.{n}.train": path for n, path in train_files(hparams).items()}
    elif needs.knowledge:
        files["knowledge_dir"] = str(Path(str(hparams.knowledge_dir)) / "knowledge.safetensors")
    elif needs.training:
        files["editor_dir"] = str(Path(str(find_editor(hparams))) / "editor.safetensors")
    if needs.scope and (kept := find_scope_classifier(hparams)) is not None:
        files["scope_dir"] = str(kept / "scope.safetensors")
    return {key: sha256_of(path) for key, path in files.items()}


def open_run(parts: Parts, task: str, directory: Path, resume: bool, generated: bool = True) -> RecordWriter:
    """The run's folder with its manifest; UserError where the run to resume was made differently."""
    return processes.in_turn(
        lambda: RecordWriter(
            directory,
            resume,
            parts.hparams.decisive() | {"task": task, "generated": generated},
            seed=parts.hparams.seed,
            weights={"backbone": parts.backbone.fingerprint},
            data=checksums(parts.hparams, task),
            rank=processes.rank() if processes.joined() else None,
            about={"machine": machine(parts)},
        )
    )


def machine(parts: Parts) -> dict[str, Any]:
    """What a run is made on, for its manifest: types of numbers, device, number of processes."""
    hp = parts.hparams
    return {
        "weights": hp.dtype if hp.quantization == "none" else f"{hp.quantization}, else {hp.dtype}",
        # Patches and their optimiser's state, whatever the weights' type.
        "patches": "float32",
        "device": parts.backbone.device.type,
        "processes": processes.count(),
        "edits_at_once": edits_at_once(hp, parts.backbone),
    }


def run_cases(
    parts: Parts,
    cases: Sequence[Case],
    writer: RecordWriter,
    generated: bool = True,
    skip_broken: bool = False,
    progress: bool = True,
    reader: Reader | None = None,
    store: EditStore | None = None,
) -> dict[str, Any]:
    """Edits each case that is not recorded yet, from the base model or as the YAML's ``protocol`` has
    it, and gives the summary of all records in the folder, ``interrupted`` where Ctrl-C ended it early.
    Where several processes run, each edits its share and all get the summary.

    With a ``store`` every edit is in it before its record is written. A ``reader`` of the same cases and
    first layer may be handed on from run to run: what it knows of the base model is not asked again.

    A picture that cannot be read ends the run after the summary of what there is, or counts as a failed
    case under ``skip_broken``. So does, always, an edit whose loss stops being a number, or for which
    memory does not suffice even alone.
    """
    reader, hp = reader or parts.reader(generated), parts.hparams
    if store is not None and store.backbone not in (None, parts.backbone.fingerprint):
        raise UserError(f"{store.folder}: holds edits of another model; name another --save_edits")
    if hp.protocol != "one_step":
        return run_sequences(
            hp, parts.backbone, parts.method, cases, writer, reader, skip_broken, progress, store
        )
    done, shared = writer.done_ids(), SharedRun(writer)
    means = RunningMeans(read_records(writer.directory) if done else [])
    order, size = [case.request.id for case in cases], edits_at_once(hp, parts.backbone)
    # Whole batches, wherever a former run ended: what is made side by side is rounded alike.
    batches = [cases[start : start + size] for start in range(0, len(cases), size)]
    left = processes.share([b for b in batches if any(c.request.id not in done for c in b)])
    already, mine = sum(name in done for name in order), sum(map(len, left))
    mine -= sum(c.request.id in done for batch in left for c in batch)
    hidden = not (progress and processes.is_main())
    with (
        track(hp, writer) as tracker,
        tqdm(total=already + mine, initial=already, desc="edits", disable=hidden) as bar,
        shared.kept(),
    ):
        for batch in shared.until_stopped(left):
            made: dict[str, Edit] = {}
            for record in _records(parts, batch, reader, skip_broken, made):
                if record["id"] not in done:
                    if store is not None and record["id"] in made:
                        store.add(made[record["id"]], replace=True)
                    writer.write(record)
                    means.add(record)
                    tracker.add(record, means)
                    bar.set_postfix_str(str(means), refresh=False)
                    bar.update()
    return shared.sum_up(hp.seed, hp.metric_presets, order)


def _records(
    parts: Parts, cases: Sequence[Case], reader: Reader, skip_broken: bool, made: dict[str, Edit]
) -> Iterator[dict[str, Any]]:
    """The cases' records, edited side by side; half as many at a time where memory does not suffice or
    one of them can't be read, down to the one that fails. ``made`` takes up the edits by id."""

    def keep(edit: Edit) -> None:
        made[edit.id] = edit

    try:
        yield from one_step_many(parts.backbone, parts.method, cases, reader, keep)
        return
    except (UserError, RuntimeError, MemoryError) as error:
        full = faults.out_of_memory(error)
        if not full and not (skip_broken and isinstance(error, UserError)):
            raise
        reason = "out of memory" if full else str(error)
    # Out here the error is gone, and with it what its frames held in memory.
    free = getattr(torch.get_device_module(parts.backbone.device), "empty_cache", None)
    if full and free is not None:
        free()
    if len(cases) == 1:
        (case,) = cases
        yield {"id": case.request.id, "task": case.task, "status": "failed", "error": reason}
        return
    half = len(cases) // 2
    if full:
        logger.warning("out of memory with %d edits side by side; %d are tried", len(cases), half)
    yield from _records(parts, cases[:half], reader, skip_broken, made)
    yield from _records(parts, cases[half:], reader, skip_broken, made)


def edits_at_once(hparams: HyperParams, backbone: Backbone) -> int:
    """How many independent edits are made side by side: ``edit_batch_size``, or with ``auto`` as many as
    an eighth of the memory takes, at most ``AT_ONCE``: the same on the same machine, whatever else runs."""
    if isinstance(hparams.edit_batch_size, int):
        return hparams.edit_batch_size
    width, layers = backbone.layout.width, len(resolve_layers(hparams, backbone))
    trained = layers * width * (3 * hparams.n_keys + (hparams.encoder_dim or width))
    if hparams.method == "ft":
        edited = (backbone.layout.layer(i) for i in resolve_layers(hparams, backbone))
        trained = sum(p.numel() for layer in edited for p in layer.parameters())
    # Each with its gradient and two moments; and a few dozen states a token and layer for the gradient.
    need = 4 * 4 * trained + 4 * layers * width * 40 * TOKENS
    return max(1, min(AT_ONCE, whole_memory(backbone.device) // 8 // need))


def whole_memory(device: torch.device) -> int:
    """Bytes of a device's memory."""
    about = getattr(torch.get_device_module(device), "get_device_properties", None)
    return int(psutil.virtual_memory().total if about is None else about(device).total_memory)
