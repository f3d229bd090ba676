"""Checks of a run's data and folders that look further than at names: sizes, records, images, models."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from unike.config.hparams import OPTIONS, HyperParams
from unike.config.live import ExpertOptions
from unike.config.patcher import NeuronOptions
from unike.config.rivals import CodebookOptions, LoraOptions, SideMemoryOptions
from unike.config.schema import list_own_options
from unike.config.scope_sections import ScopeStorageOptions, ScopeTrainingOptions
from unike.config.sections import (
    EditorOptions,
    EditorTrainingOptions,
    EditTrainingOptions,
    FineTuningOptions,
    IKEOptions,
    PatchLossOptions,
    PatchOptions,
    UniKEOptions,
)
from unike.datasets.images import open_image
from unike.datasets.lengths import find_long_texts, list_queries, may_be_long, read_limit
from unike.evaluation.sequences import draw_run_sequences
from unike.methods.catalogue import BUILT_IN, uses_own_gate
from unike.methods.preparation.folders import (
    find_shipped_knowledge,
    find_shipped_model,
    read_knowledge_width,
    require_place,
    require_shares,
)
from unike.methods.registry import MethodNeeds, resolve_needs, resolve_needs_if_valid
from unike.runs.costs import read_model_size
from unike.runs.records import RECORDS, read_records
from unike.system.files import compute_sha256
from unike.system.findings import collect_problems
from unike.system.hub import find_model_folder
from unike.system.text import one_line
from unike.types import BackboneSpec, Case, UserError

_SHOWN = 3
# What is found of each kind, from its folder on.
_KEPT = {
    "knowledge_dir": ("knowledge.json", "*/knowledge.json"),
    "scope_dir": ("*/scope.json",),
    "editor_dir": ("*/*/editor.json",),
}
# What distinguishes a model's folder.
_MODEL_FILES = ("config.json", "model.safetensors")


# ---------------------------------------------------------------- options


def check_effects(hparams: HyperParams, given: Sequence[str]) -> None:
    """UserError, a line for each, for options of the command line that this run would not look at."""
    problems = []
    needs = _resolve_scope_needs(hparams)
    for key in dict.fromkeys(given):
        if key in _PROTOCOL_KEYS and hparams.protocol == "one_step":
            remedy = "add --protocol sequential, or cross_task"
            problems.append(f"{hparams.source}: {key}: has no effect with protocol: one_step; {remedy}")
        if key == "scope_overlap_tokens" and hparams.scope_overlap is None:
            problems.append(f"{hparams.source}: {key}: has no effect with scope_overlap: null; give both")
        if key == "scope_val_every" and hparams.scope_patience is None:
            problems.append(f"{hparams.source}: {key}: has no effect with scope_patience: null; give both")
        if key == "benchmark_version" and not hparams.generate_data:
            problems.append(
                f"{hparams.source}: {key}: has no effect with generate_data: false; nothing is drawn"
            )
        for methods, own in _METHOD_KEYS.items():
            if key in _TRAINED_PAIRS and hparams.method == "ike" and hparams.ike_patches:
                continue
            if key in own and hparams.method in _METHODS - set(methods):
                what = f"{key}: has no effect with method: {hparams.method}"
                problems.append(f"{hparams.source}: {what}; it belongs to method: {', '.join(methods)}")
        if (why := _explain_idle_scope(hparams, needs, key)) is not None:
            problems.append(f"{hparams.source}: {key}: has no effect {why}")
        if key == "own" and hparams.method in _METHODS:
            what = f"own: has no effect with method: {hparams.method}"
            problems.append(f"{hparams.source}: {what}; it holds options of a method of your own")
        if key in _ORIGINAL_KEYS and not _has_original_files(hparams.backbone):
            what = f"{key}: has no effect with the folder {one_line(hparams.name)}, which has its own"
            problems.append(f"{hparams.source}: {what}; leave {key} out")
    if problems:
        raise UserError(*problems)


_PROTOCOL_KEYS = {"sequence_length", "sequences", "gap", "curve_cases"}
_METHODS = set(BUILT_IN)
_EDITOR_KEYS = {*list_own_options(EditorOptions), *list_own_options(EditorTrainingOptions)}
# T-Patcher starts its keys in one way only.
_UNIKE_KEYS = {*list_own_options(UniKEOptions), "scope_halves", "key_init", "alpha_overlap"}
_CLASSIFIER_KEYS = {*list_own_options(ScopeTrainingOptions), *list_own_options(ScopeStorageOptions)}
_TRAINED_PAIRS = {
    *list_own_options(PatchOptions),
    *list_own_options(PatchLossOptions),
    *list_own_options(EditTrainingOptions),
    "key_init",
}
_METHOD_KEYS = {
    ("ft",): set(list_own_options(FineTuningOptions)),
    ("ike",): set(list_own_options(IKEOptions)),
    ("ke",): {"ke_margin"},
    ("mend",): {"mend_scale_lr"},
    ("serac",): {"serac_scope"},
    ("liveedit",): set(list_own_options(ExpertOptions)),
    ("ke", "mend", "serac"): {"edit_scale"},
    ("ke", "mend", "serac", "liveedit"): _EDITOR_KEYS
    - {"ke_margin", "mend_scale_lr", "serac_scope", "edit_scale"},
    ("unike",): _UNIKE_KEYS,
    ("unike", "tpatcher"): set(list_own_options(PatchOptions)) - _UNIKE_KEYS,
    ("unike", "tpatcher", "tpatcher_published"): set(list_own_options(PatchLossOptions)),
    ("tpatcher_published",): set(list_own_options(NeuronOptions)),
    ("lora",): set(list_own_options(LoraOptions)),
    ("grace",): set(list_own_options(CodebookOptions)),
    ("wise",): set(list_own_options(SideMemoryOptions)),
    ("unike", "tpatcher", "ft", "lora", "grace", "wise"): {"stop_loss"},
    ("unike", "tpatcher", "ft", "lora", "grace", "wise", "tpatcher_published"): set(
        list_own_options(EditTrainingOptions)
    )
    - {"stop_loss"},
}
_AROUND_KEYS = {"scope_layer", "scope_recall", "scope_recall_few"}
_GATE_KEYS = {"scope_measure", "scope_threshold", "scope_halves", *_AROUND_KEYS}
_ORIGINAL_KEYS = {"vision_config", "qformer_config"}


def _resolve_scope_needs(hparams: HyperParams) -> MethodNeeds | None:
    """What the gate of one of the package's methods needs; None for a user's own, which may read each option
    as it likes, and for a YAML that its method refuses, which the check of the method says."""
    if hparams.method not in _METHODS:
        return None
    try:
        return resolve_needs(hparams)
    except UserError:
        return None


def _explain_idle_scope(hparams: HyperParams, needs: MethodNeeds | None, key: str) -> str | None:
    """Why nothing reads an option of the scope gate or of its classifier; None where something does."""
    if needs is None:
        return None
    measure, own = hparams.scope_measure, hparams.method == "unike" and uses_own_gate(hparams)
    if key in _CLASSIFIER_KEYS and not needs.scope:
        return "without a trained scope classifier; it needs a scope_gate, and scope_measure: trained or both"
    if key == "scope_halves" and hparams.method != "unike":
        # The table of methods has it.
        return None
    if key in _GATE_KEYS and hparams.scope_gate == "none":
        return "with scope_gate: none; give both"
    if key == "scope_measure" and not (own or needs.gate):
        return f"with method: {hparams.method}: {measure} is UniKE's own, and scope_overlap decides"
    if key == "scope_threshold" and not (own or needs.gate_scope):
        return f"with scope_measure: {measure}; it is scope_overlap that overlaps are compared with"
    if key == "scope_halves" and not own:
        return f"with scope_measure: {measure}; such a gate is around the whole edit"
    if key in _AROUND_KEYS and not needs.gate_scope:
        return f"with scope_measure: {measure}; no scope classifier is around these edits"
    return None


def _has_original_files(spec: BackboneSpec) -> bool:
    return spec.original_files or spec.pretrained_ckpt is not None


def check_shapes(hparams: HyperParams) -> None:
    """UserError, a line for each, for layers that the decoder has not, and for images smaller than a patch,
    as far as the model's folder shows."""
    try:
        config = json.loads((find_model_folder(hparams.name) / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config") or config
        count, patch = text.get("num_hidden_layers"), (config.get("vision_config") or {}).get("patch_size")
    except (OSError, ValueError, AttributeError, RecursionError):
        # The check of the weights says what is wrong with the folder.
        return
    problems = []
    if isinstance(count, int):
        problems += collect_problems(lambda: hparams.list_layers(count))
        if resolve_needs_if_valid(hparams).gate_scope:
            problems += collect_problems(lambda: hparams.find_scope_layer(count, 0))
    size = hparams.image_size
    if isinstance(patch, int) and size is not None and size < patch:
        expected = f"expected at least {patch}, the side of a patch"
        problems.append(f"{hparams.source}: image_size: {size}; {expected}")
    if problems:
        raise UserError(*problems)


# ---------------------------------------------------------------- folders


def list_folders(hparams: HyperParams, needs: MethodNeeds) -> dict[str, str]:
    """The folders of what is prepared that this method reads, by their keys."""
    wanted = {
        "knowledge_dir": needs.knowledge,
        "scope_dir": needs.scope,
        "editor_dir": needs.training,
    }
    return {key: folder for key, is_read in wanted.items() if is_read and (folder := getattr(hparams, key))}


def check_folders(hparams: HyperParams, needs: MethodNeeds) -> None:
    """UserError, a line for each, for folders that cannot be read or made, and for those of another model."""
    problems: list[str] = []
    for key, folder in list_folders(hparams, needs).items():
        try:
            # Where something is kept, it may be all that is needed; only the model shows it.
            is_kept = os.path.isdir(folder) and any(any(Path(folder).glob(p)) for p in _KEPT[key])
            require_place(f"{hparams.source}: {key}: ", folder, is_written=not is_kept)
            _require_same_model(hparams, key, folder)
            if key == "knowledge_dir":
                _require_same_width(hparams)
            if key == "scope_dir" and needs.gate_scope:
                require_shares(hparams)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)


def _require_same_model(hparams: HyperParams, key: str, folder: str) -> None:
    """UserError where what is shipped was made for another model than the YAML's."""
    shipped = find_shipped_model(folder)
    if shipped is None or _are_same_models(shipped, find_model_folder(hparams.name)):
        return
    at = f"{hparams.source}: {key}: {folder}"
    raise UserError(
        f"{at}: was made for the model in {shipped.name}, not for name: {hparams.name}; name another {key}"
    )


def _require_same_width(hparams: HyperParams) -> None:
    """UserError where ``knowledge_dir`` holds knowledge of a decoder of another width, such as a copy of what
    is shipped with a toy. Only loading shows whether it is of the same weights."""
    folder, size = find_shipped_knowledge(hparams), read_model_size(hparams)
    width = None if folder is None else read_knowledge_width(folder)
    if size is not None and width is not None and width != size.width:
        at = f"{hparams.source}: knowledge_dir: {folder}"
        raise UserError(
            f"{at}: was made for a decoder of width {width}, and that of name: {hparams.name} has "
            f"{size.width}; name another knowledge_dir"
        )


def _are_same_models(one: Path, other: Path) -> bool:
    if os.path.isdir(other) and os.path.samefile(one, other):
        return True
    files = [(one / name, other / name) for name in _MODEL_FILES]
    if not all(a.is_file() and b.is_file() for a, b in files):
        return False
    return all(compute_sha256(a) == compute_sha256(b) for a, b in files)


# ---------------------------------------------------------------- records


def check_recorded(directory: Path, hparams: HyperParams, cases: Sequence[Case]) -> None:
    """UserError where a run to resume has records that are not of these cases: then ``--size`` or the data
    differ."""
    if not os.path.isfile(directory / RECORDS):
        return
    # Imported late, as torch comes with it.
    from unike.evaluation.protocols import name_record

    records = read_records(directory)
    if hparams.protocol == "one_step":
        known = {case.request.id: case.request.id for case in cases}
    else:
        known = {
            name_record(number, position, kind): case.request.id
            for number, drawn in enumerate(draw_run_sequences(hparams, cases))
            for position, case in enumerate(drawn, 1)
            for kind in ("step", "final")
        }
    foreign = [r.id for r in records if known.get(r.id) != r.case]
    if foreign:
        found = f"{len(records)} records, among them {one_line(foreign[0], 60)}"
        raise UserError(
            f"{directory}: holds {found}, which is not of this run's {len(cases)} cases; resume with the "
            "--size that it was started with, or name another --output"
        )


# ---------------------------------------------------------------- images and texts


def list_images(cases: Sequence[Case]) -> dict[str, str]:
    """The files of the cases' images, each with the id of the first case that has it."""
    seen: dict[str, str] = {}
    for case in cases:
        for query in (case.request.query, *(probe.query for probe in case.probes)):
            if isinstance(query.image, (str, os.PathLike)):
                seen.setdefault(os.fspath(query.image), case.request.id)
    return seen


def find_broken_images(images: Mapping[str, str]) -> list[tuple[str, str]]:
    """The images that cannot be read, by the id that they come with, and why; each is decoded once."""
    broken = []
    for image, name in images.items():
        try:
            open_image(image)
        except UserError as error:
            broken.append((name, str(error)))
    return broken


def describe_broken_images(broken: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each of the first, and one for the others."""
    lines = [
        f"record {one_line(name, 60)}: {reason}" if name else f"train record: {reason}"
        for name, reason in broken[:_SHOWN]
    ]
    if len(broken) > _SHOWN:
        lines.append(f"{len(broken) - _SHOWN} more images cannot be read; the data doctor lists them all")
    return lines


def list_long_cases(hparams: HyperParams, cases: Sequence[Case]) -> list[str]:
    """A line for each record with a text that the model's context does not take; none where the model's
    folder does not tell its limit."""
    limit = read_limit(hparams.name) if any(may_be_long(q) for c in cases for q in list_queries(c)) else None
    if limit is None:
        return []
    lines = [
        f"record {one_line(case.request.id, 60)}: {line}"
        for case in cases
        for line in find_long_texts(case, limit)
    ]
    if (more := len(lines) - _SHOWN) > 0:
        lines[_SHOWN:] = [f"{more} more texts are too long; the data doctor lists them all"]
    return lines


def list_option_names(texts: Sequence[str]) -> tuple[str, ...]:
    """The options that ``key=value`` texts set, by their own names."""
    aliases = {alias: option.name for option in OPTIONS.values() for alias in option.aliases}
    keys = (text.partition("=")[0].partition(".")[0].strip() for text in texts)
    return tuple(aliases.get(key, key) for key in keys)
