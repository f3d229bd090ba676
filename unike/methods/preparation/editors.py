"""Meta-learned editors as files: one folder per weights and options.

``<editor_dir>/<method>/<key>/`` holds ``editor.safetensors`` and ``editor.json``, and during training
a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file

from unike.backbones.base import Backbone
from unike.backbones.prefix import AnswerCache
from unike.methods.meta_training import CAP, Progress, TrainableMethod, copy_tensors, meta_train
from unike.methods.preparation.folders import (
    Facts,
    choose_place,
    find_editor,
    hash_facts,
    list_editor_options,
    require_own_files,
)
from unike.methods.preparation.hard_cases import harden_cases
from unike.methods.preparation.training_cases import make_training_cases
from unike.system import processes
from unike.system.files import check_tensors, replace_atomically, write_index
from unike.system.progress import Tick, ignore_progress
from unike.types import Case, UserError

logger = logging.getLogger("unike")

HELD_OUT = 10


def describe_editor(backbone: Backbone, method: TrainableMethod) -> Facts:
    """The backbone's weights, the layers and the options that a trained editor fits."""
    return {
        "backbone": backbone.fingerprint,
        "layers": method.layers(backbone),
        "options": list_editor_options(method.hparams),
    }


def save_editor(method: TrainableMethod, facts: Facts, progress: Progress, folder: Path) -> None:
    """Writes the trained network, its index last, and deletes the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "editor.safetensors"
    with replace_atomically(path) as temporary:
        save_file(copy_tensors(method.trained.state_dict()), temporary)
    write_index(folder / "editor.json", {**facts, "training": asdict(progress)}, path)
    for left in (folder / "checkpoint.json", *folder.glob("checkpoint-*.safetensors")):
        left.unlink(missing_ok=True)


def load_editor(method: TrainableMethod, backbone: Backbone, folder: Path) -> None:
    """Reads a saved network into ``method``. UserError where the file does not fit or is damaged."""
    method.start(backbone)
    path = folder / "editor.safetensors"
    check_tensors(folder / "editor.json", path)
    try:
        method.trained.load_state_dict(load_file(path))
    except Exception as error:
        raise UserError(f"{path}: expected an editor as scripts/prepare.py writes it: {error}") from error
    method.trained.requires_grad_(False)


def ensure_editor(
    method: TrainableMethod,
    backbone: Backbone,
    cases: Callable[[], Sequence[Case]],
    tick: Tick = ignore_progress,
) -> Path:
    """Loads the YAML's editor, or trains it on ``cases`` and saves it; returns its folder.

    Every tenth case is held out; the first ``editor_val_cases`` of these validate. Several processes
    train one editor together. A training that ends at the cap of its steps is warned of. UserError where no
    case is left to hold out.
    """
    hparams, facts = method.hparams, describe_editor(backbone, method)
    folder = processes.run_once(lambda: find_editor(hparams, facts))
    if folder is None:
        parent = choose_place(Path(str(hparams.editor_dir), hparams.method))
        trained = folder = parent / hash_facts(facts)
        require_own_files(folder, "editor.safetensors", "editor.json", "checkpoint.json")
        records = cases()
        if hparams.editor_probes in ("recombined", "hard"):
            records = make_training_cases(records)
        if hparams.editor_probes == "hard":
            kept = AnswerCache.open(hparams, backbone)
            records = processes.run_once(
                lambda: harden_cases(records, backbone, hparams.seed, tick, kept=kept)
            )
        held_out = [case for i, case in enumerate(records) if i % HELD_OUT == HELD_OUT - 1]
        train = [case for i, case in enumerate(records) if i % HELD_OUT != HELD_OUT - 1]
        if not held_out:
            raise UserError(
                f"{hparams.source}: data: {len(records)} train records; expected {HELD_OUT} or more"
            )
        val = held_out[: hparams.editor_val_cases]
        progress = meta_train(method, backbone, train, val, hparams, folder, tick, facts)
        processes.run_once(lambda: save_editor(method, facts, progress, trained))
        if progress.stopped == CAP and processes.is_main():
            logger.warning(
                "%s: editor_steps: %d: training ended at this cap, before editor_patience: the best "
                "validation was at step %d; a higher cap may give a better editor",
                hparams.source,
                hparams.editor_steps,
                progress.best_step,
            )
    load_editor(method, backbone, folder)
    return folder
