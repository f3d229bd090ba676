"""Trained editors as files: one folder per weights and options, found, written and read.

``<editor_dir>/<method>/<key>/`` holds ``editor.safetensors`` and ``editor.json``, and while an
editor is in training its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from unike.backbones.base import Backbone
from unike.config.hparams import OPTIONS, HyperParams
from unike.methods.meta_training import (
    Progress,
    Tick,
    TrainableMethod,
    copy_tensors,
    ignore_progress,
    meta_train,
)
from unike.methods.preparation.scope import kept_scope
from unike.methods.registry import MethodNeeds
from unike.system import processes
from unike.system.files import check_tensors, read_index, write_index
from unike.types import Case, UserError

HELD_OUT = 10


def editor_options(hparams: HyperParams) -> dict[str, Any]:
    """The options that a trained editor depends on."""
    names = [n for n, o in OPTIONS.items() if o.group == "editor" and n != "editor_dir"]
    own = [n for n in names if not n.startswith(("ke_", "serac_")) or n.startswith(f"{hparams.method}_")]
    return {n: getattr(hparams, n) for n in ("method", "clip_norm", "seed", *own)}


def editor_facts(backbone: Backbone, method: TrainableMethod) -> dict[str, Any]:
    """Weights, layers and options that a trained editor belongs to."""
    return {
        "backbone": backbone.fingerprint,
        "layers": method.layers(backbone),
        "options": editor_options(method.hparams),
    }


def wants_cases(hparams: HyperParams, needs: MethodNeeds) -> bool:
    """Whether the train annotations are needed to train an editor or a scope classifier: not where they
    are kept."""
    if needs.training:
        return kept_editor(hparams) is None
    return needs.scope and kept_scope(hparams) is None


def kept_editor(hparams: HyperParams, facts: dict[str, Any] | None = None) -> Path | None:
    """The folder of the YAML's editor under ``editor_dir``, where it has been trained; without
    ``facts`` the weights and layers are not looked at. UserError where ``editor_dir`` is missing."""
    if hparams.editor_dir is None:
        raise UserError(f"{hparams.source}: editor_dir: missing; expected a folder for trained editors")
    wanted = {"options": editor_options(hparams)} if facts is None else facts
    for index in sorted(Path(hparams.editor_dir, hparams.method).glob("*/editor.json")):
        if all(read_index(index).get(k) == v for k, v in wanted.items()):
            return index.parent
    return None


def save_editor(method: TrainableMethod, facts: dict[str, Any], progress: Progress, folder: Path) -> None:
    """Writes the trained network, index last, and takes the checkpoint away."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "editor.safetensors"
    save_file(copy_tensors(method.trained.state_dict()), path)
    write_index(folder / "editor.json", {**facts, "training": asdict(progress)}, path)
    for left in folder.glob("checkpoint*"):
        left.unlink()


def load_editor(method: TrainableMethod, backbone: Backbone, folder: Path) -> None:
    """Puts a saved network in. UserError where the file is not what it should be."""
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
    """Loads the YAML's editor, or trains it on ``cases`` and keeps it; gives its folder.

    Every tenth case is held out; the first ``editor_val_cases`` of these validate. Several processes
    train one editor together.
    """
    hparams, facts = method.hparams, editor_facts(backbone, method)
    folder = processes.first(lambda: kept_editor(hparams, facts))
    if folder is None:
        made = folder = Path(str(hparams.editor_dir), hparams.method, _key(facts))
        given = cases()
        held = [case for i, case in enumerate(given) if i % HELD_OUT == HELD_OUT - 1]
        train = [case for i, case in enumerate(given) if i % HELD_OUT != HELD_OUT - 1]
        if not held:
            raise UserError(
                f"{hparams.source}: data: {len(given)} train records; expected {HELD_OUT} or more"
            )
        val = held[: hparams.editor_val_cases]
        progress = meta_train(method, backbone, train, val, hparams, folder, tick, facts)
        processes.first(lambda: save_editor(method, facts, progress, made))
    load_editor(method, backbone, folder)
    return folder


def _key(facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()[:16]
