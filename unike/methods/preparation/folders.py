"""Folders of what is prepared: one per checksum of the facts that it depends on.

Nothing here imports torch, so that what is missing is reported at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from unike.config.combined import TrainedPartsOptions
from unike.config.hparams import HyperParams
from unike.config.live import ExpertOptions
from unike.config.scope_sections import ScopeClassifierOptions, ScopeTrainingOptions
from unike.config.sections import (
    EditorOptions,
    EditorTrainingOptions,
    KnowledgeOptions,
)
from unike.methods.catalogue import uses_recall
from unike.methods.registry import MethodNeeds
from unike.system.files import read_index
from unike.system.places import check_name, is_index, is_tensor_file, require_folder, require_own
from unike.system.shipped import choose_writable
from unike.types import UserError

if TYPE_CHECKING:
    from unike.backbones.base import Backbone

Facts = dict[str, object]
# Marks the folder of a model that is shipped with what was trained for it.
SHIPPED = ".shipped"
# The width of a scope classifier's attention, unless the YAML names one: for a decoder of width 4,096 it has
# 4 M parameters then, and 118 M with attention as wide as the decoder.
WIDEST = 512
_TRAINED = ".trained"
# Of each layer's semantic encoder: hidden width times the decoder's.
_FIRST_WEIGHT = "encoders.semantic.0.weight"
_HEADER_BYTES = 1 << 24


def hash_facts(facts: Facts) -> str:
    """The name of a folder: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def find_folder(parent: Path, index: str, facts: Facts) -> Path | None:
    """The first folder under ``parent``, or where it is written to, whose ``index`` holds these facts."""
    return next(iter(find_folders(parent, index, facts)), None)


def find_folders(parent: Path, index: str, facts: Facts) -> Iterator[Path]:
    """All such folders, one after the other."""
    for place in dict.fromkeys((parent, choose_place(parent))):
        for path in sorted(place.glob(f"*/{index}")):
            kept = read_index(path)
            if all(kept.get(name) == value for name, value in facts.items()):
                yield path.parent


# ---------------------------------------------------------------- where things are written


def find_shipped_model(folder: str | os.PathLike[str]) -> Path | None:
    """The folder of a shipped model that ``folder`` is, or is part of."""
    whole = Path(os.path.abspath(folder))
    return next((p for p in (whole, *whole.parents) if os.path.isfile(p / SHIPPED)), None)


def choose_place(folder: str | os.PathLike[str]) -> Path:
    """Where what belongs into ``folder`` is written. Nothing is added to what is shipped: that goes to the
    same place in ``<model>.trained``, next to the shipped model's folder; from an installed package into the
    cache folder."""
    shipped = find_shipped_model(folder)
    if shipped is None:
        return Path(folder)
    trained = shipped.with_name(shipped.name + _TRAINED) / Path(os.path.abspath(folder)).relative_to(shipped)
    return choose_writable(trained)


def require_place(at: str, folder: str | os.PathLike[str], is_written: bool = True) -> None:
    """UserError, beginning with ``at``, where ``folder`` is none, or nothing could be written for it."""
    check_name(folder)
    if os.path.lexists(folder):
        if not os.path.isdir(folder):
            raise UserError(f"{at}{folder}: is a file; expected a folder")
        if not os.access(folder, os.R_OK | os.X_OK):
            raise UserError(f"{at}{folder}: cannot be read")
    if is_written:
        require_folder(choose_place(folder), at)


def require_own_files(folder: Path, *names: str) -> None:
    """UserError for a file of one of these names that this program did not write."""
    remedy = "move it away"
    for name in names:
        is_own = is_index if name.endswith(".json") else _is_items if name.endswith("l") else is_tensor_file
        require_own(folder / name, is_own, remedy)


def _is_items(path: Path) -> bool:
    """Whether a file is empty, or its first line a JSON object."""
    with open(path, encoding="utf-8") as lines:
        first = lines.readline(1 << 20)
    return not first or isinstance(json.loads(first), dict)


def wants_cases(hparams: TrainedPartsOptions, needs: MethodNeeds) -> bool:
    """Whether train annotations are needed for an editor or a scope classifier that is still to be
    trained."""
    if needs.training and find_editor(hparams) is None:
        return True
    return needs.scope and find_scope_classifier(hparams) is None


# ---------------------------------------------------------------- memory and encoders


def find_shipped_knowledge(hparams: KnowledgeOptions) -> Path | None:
    """``knowledge_dir``, where it is a folder of knowledge itself and not the parent of several."""
    folder = None if hparams.knowledge_dir is None else Path(hparams.knowledge_dir)
    return folder if folder is not None and (folder / "knowledge.json").is_file() else None


def list_changed_options(folder: Path, hparams: HyperParams) -> list[str]:
    """The options that knowledge was made with and that the YAML has other values of. UserError where the
    index is damaged. Only the model tells whether its weights and layers fit."""
    index = folder / "knowledge.json"
    options = read_index(index).get("options")
    if not isinstance(options, dict):
        raise UserError(f"{index}: is damaged: it has no options; delete the folder")
    return [name for name, value in options.items() if getattr(hparams, name, None) != value]


def read_knowledge_width(folder: Path) -> int | None:
    """The width of the decoder that a folder of knowledge was made for, from the header of its tensors; None
    where that does not tell."""
    try:
        with open(folder / "knowledge.safetensors", "rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), _HEADER_BYTES)))
        shapes = (entry["shape"] for name, entry in header.items() if name.endswith(_FIRST_WEIGHT))
        return int(next(shapes)[1])
    except (OSError, ValueError, LookupError, TypeError, StopIteration, RecursionError):
        return None


# ---------------------------------------------------------------- meta-learned editors


def list_editor_options(hparams: EditorTrainingOptions) -> Facts:
    """The options that a trained editor depends on: of those that one method alone has, its own."""
    shared: Facts = {"method": hparams.method, "clip_norm": hparams.clip_norm, "seed": hparams.seed}
    if hparams.answer_end != "none":
        # Editors from before this option existed have none.
        shared["answer_end"] = hparams.answer_end
    own = hparams.get_values(EditorTrainingOptions)
    if hparams.method == "liveedit":
        own |= hparams.get_values(ExpertOptions)
    for name in ("editor_queries", "mend_scale_lr"):
        # Likewise.
        if own[name] is None:
            del own[name]
    return shared | {
        n: v
        for n, v in own.items()
        if not n.startswith(("ke_", "mend_", "serac_")) or n.startswith(f"{hparams.method}_")
    }


def find_editor(hparams: EditorOptions, facts: Facts | None = None) -> Path | None:
    """The folder of the YAML's editor under ``editor_dir``, None where it has not been trained.

    Without ``facts`` the editor may be of any weights and layers. UserError where ``editor_dir`` is missing.
    """
    if hparams.editor_dir is None:
        raise UserError(f"{hparams.source}: editor_dir: missing; expected a folder for trained editors")
    wanted: Facts = {"options": list_editor_options(hparams)} if facts is None else facts
    return find_folder(Path(hparams.editor_dir, hparams.method), "editor.json", wanted)


# ---------------------------------------------------------------- scope classifiers


def describe_scope(hparams: ScopeTrainingOptions, backbone: Backbone | None = None, first: int = 0) -> Facts:
    """What a trained classifier belongs to: options, and with ``backbone`` its weights and the layer."""
    options = hparams.get_values(ScopeTrainingOptions) | {"seed": hparams.seed}
    if hparams.scope_patience is None:
        del options["scope_val_every"]
    # Classifiers from before these options existed have none.
    for name in ("scope_width", "scope_tokens", "scope_patience"):
        if options[name] is None:
            del options[name]
    if hparams.scope_probes == "recombined":
        del options["scope_probes"]
    facts: Facts = {"options": options}
    if backbone is not None:
        facts |= {"backbone": backbone.fingerprint, "layer": first}
        if (inner := choose_inner_width(hparams, backbone.layout.width)) is not None:
            facts["width"] = inner
    return facts


def choose_inner_width(hparams: ScopeTrainingOptions, width: int) -> int | None:
    """The width that a decoder's states are projected to, before the classifier attends to them; None where
    it attends to them as they are."""
    wanted = min(width, WIDEST) if hparams.scope_width is None else hparams.scope_width
    return None if wanted == width else wanted


def require_shares(hparams: HyperParams) -> None:
    """UserError where a threshold is set by a share of prompts that pass, and no classifier of these options
    that is there has such shares."""
    if not uses_recall(hparams) or hparams.scope_dir is None:
        return
    kept = list(find_folders(Path(hparams.scope_dir), "scope.json", describe_scope(hparams)))
    if not kept or any(read_index(f / "scope.json").get("passing") for f in kept):
        return
    key = "scope_recall" if hparams.scope_recall is not None else "scope_recall_few"
    raise UserError(
        f"{hparams.source}: {key}: {kept[0] / 'scope.json'} is of an earlier version, without the shares of "
        f"prompts that pass; expected {key}: null, or another scope_dir"
    )


def find_scope_classifier(hparams: ScopeClassifierOptions, facts: Facts | None = None) -> Path | None:
    """The folder of the YAML's classifier, None where it has not been trained.

    Without ``facts`` it may be of any weights and layer. UserError where ``scope_dir`` is missing.
    """
    if hparams.scope_dir is None:
        raise UserError(
            f"{hparams.source}: scope_dir: missing; expected a folder for trained scope classifiers"
        )
    wanted = describe_scope(hparams) if facts is None else facts
    return find_folder(Path(hparams.scope_dir), "scope.json", wanted)
