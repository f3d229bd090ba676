"""Reads EasyEdit's multimodal YAMLs (MEND, SERAC, IKE, FT, and those of ``TRAINING/``) as ours.

They are known by their algorithm together with keys that no file of ours has. What decides on an edit here
and there is taken over under our name; what has no counterpart is listed, or refused where a run without it
would measure something else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from unike.system.text import describe_value, one_line
from unike.types import UserError

METHODS = {
    "MEND": "mend",
    "SERAC": "serac",
    "SERAC_MULTI": "serac",
    "IKE": "ike",
    "FT": "ft",
    "FT-L": "ft",
    "FT-M": "ft",
    "KE": "ke",
}
# What EasyEdit can do and this project can not.
OTHER_METHODS = (
    *("ROME", "R-ROME", "MEMIT", "EMMET", "PMET", "KN", "GRACE", "WISE", "LORA", "QLORA", "MELO", "MALMEN"),
    *("ALPHAEDIT", "DINM", "DPO", "CORE", "ULTRAEDIT", "DEFER", "SIMIE", "FT-API", "SPHERE", "EAMET"),
)
# Keys that tell its files from ours.
MARKS = frozenset(
    (
        *("alg", "inner_params", "tokenizer_class", "tokenizer_name", "model_class"),
        *("sentence_model_name", "cls_name", "archive", "rewrite_module_tmp", "layer_module_tmp"),
        *("objective_optimization", "model_parallel"),
    )
)
SAME_NAME = (
    *("name", "model_name", "state_dict_file", "qformer_checkpoint", "qformer_name_or_path"),
    *("pretrained_ckpt", "coco_image", "rephrase_image", "seed", "device", "results_dir"),
)
_TRAINED = {
    "lr": "editor_lr",
    "cedit": "c_edit",
    "cloc": "c_loc",
    "max_iters": "editor_steps",
    "val_interval": "editor_val_every",
    "val_steps": "editor_val_cases",
    "grad_clip": "clip_norm",
}
RENAMED: dict[str, dict[str, str]] = {
    "mend": {**_TRAINED, "edit_lr": "edit_scale", "rank": "editor_rank"},
    "ke": {**_TRAINED, "edit_lr": "edit_scale", "rank": "editor_rank"},
    "serac": _TRAINED,
    "ike": {"k": "ike_demonstrations", "sentence_model_name": "ike_model"},
    "ft": {"lr": "lr", "num_steps": "max_steps", "layers": "layers"},
}
# Without a counterpart, and without an effect on what is measured, or off in all published files.
UNUSED = frozenset(
    (
        *("alg", "model_class", "tokenizer_class", "tokenizer_name", "exact_match", "task_name"),
        *("template", "use_icl_examples", "use_chat_template", "model_parallel", "freeze_qformer"),
        *("max_length", "batch_size", "lr_lr", "lr_scale", "iedit", "cbase", "dropout", "train_base"),
        *("no_grad_layers", "one_sided", "n_hidden", "hidden_dim", "init", "norm", "combine", "x_only"),
        *("delta_only", "act", "mlp_class", "shared", "small_name", "cls_name", "cls_class"),
        *("final_eval", "supervised", "soft_weighting", "checkpoint_grad", "cross_attend", "cos"),
        *("freeze", "square", "bound_embeds", "use_all_negatives", "freeze_cntr", "dist_heads", "lora"),
        *("edit_bs", "log_errors", "unlikelihood", "model_save_pt", "silent", "max_epochs"),
        *("log_interval", "eval_log_interval", "early_stop_patience", "early_stop_key", "eval_only"),
        *("half", "debug", "save", "verbose", "val_batch_size", "accumulate_bs", "opt"),
        *("rewrite_module_tmp", "layer_module_tmp", "mlp_module_tmp", "attn_module_tmp", "ln_f_module"),
        *("lm_head_module", "fp16", "objective_optimization", "weight_decay", "kl_factor"),
        *("norm_constraint", "inner_params", "archive", "edit_lr", "rank", "lr", "k"),
    )
)
# In the order in which they are tried: the longer names first.
_FAMILIES = {
    "qwen2.5-vl": "qwen2_5_vl",
    "qwen2_5": "qwen2_5_vl",
    "qwen2.5vl": "qwen2_5_vl",
    "qwen2-vl": "qwen2_vl",
    "qwen2vl": "qwen2_vl",
    "qwen2_vl": "qwen2_vl",
    "llava-onevision": "llava_onevision",
    "llava_onevision": "llava_onevision",
    "llavaov": "llava_onevision",
    "minigpt4": "minigpt4",
    "instructblip": "instructblip",
    "blip2": "blip2",
    "llava": "llava",
}


def find_algorithm(values: Mapping[object, object]) -> str | None:
    """The algorithm of a file of EasyEdit's, in capitals; None for every other file."""
    named = [values.get(key) for key in ("alg_name", "alg")]
    found = [name.strip().upper() for name in named if isinstance(name, str)]
    # Under this name IKE's `k` is its number of demonstrations; `method: ike` is ours.
    is_short = found == ["IKE"] and "k" in values and "alg_name" in values
    if not is_short and not MARKS & {key for key in values if isinstance(key, str)}:
        return None
    return next((name for name in found if name in METHODS or name in OTHER_METHODS), None)


def translate(
    values: Mapping[object, object], ours: frozenset[str], source: str
) -> tuple[dict[object, object], tuple[str, ...]]:
    """EasyEdit's keys as ours, and the names of those that have no counterpart.

    Keys of ours (``ours``) that EasyEdit does not have pass through, so that its file can be extended.
    UserError with all that would make this a run of something else.
    """
    algorithm = find_algorithm(values)
    method = METHODS.get(algorithm or "")
    if method is None:
        known = ", ".join(sorted(set(METHODS.values())))
        raise UserError(
            f"{source}: alg_name: {algorithm} has no counterpart here; methods of EasyEdit's: {known}"
        )
    given = {key: value for key, value in values.items() if value != "."}
    problems = [f"{source}: {line}" for line in _list_problems(given, method)]
    mapped: dict[object, object] = {"method": method, **_find_model(given, source, problems)}
    ignored = []
    renamed: dict[str, str] = RENAMED[method]
    for key, value in given.items():
        if key in renamed:
            mapped[renamed[str(key)]] = value
        elif key in SAME_NAME:
            mapped.setdefault(key, value)
        elif key == "alg_name":
            continue
        elif key in UNUSED:
            ignored.append(str(key))
        else:
            mapped.setdefault(key, value)
    for name, made in _make_others(given, method).items():
        mapped.setdefault(name, made)
    if problems:
        raise UserError(*problems)
    read = {
        "inner_params",
        "archive",
        "early_stop_patience",
        "accumulate_bs",
        "batch_size",
        "half",
        "opt",
        "alg",
        "eval_only",
    }
    return mapped, tuple(sorted(set(ignored) - (read if method in ("mend", "ke", "serac") else {"alg"})))


def _find_model(values: Mapping[object, object], source: str, problems: list[str]) -> dict[object, object]:
    """``model_name`` and ``name``: EasyEdit has a family under the former, or a folder."""
    given = values.get("model_name")
    if not isinstance(given, str):
        return {}
    last = os.path.basename(given.rstrip("/")).lower()
    family = next((ours for theirs, ours in _FAMILIES.items() if theirs in last), None)
    if family is None:
        problems.append(
            f"{source}: model_name: {one_line(given, 80)} names no vision-language model that is known here; "
            f"expected one of {', '.join(sorted(set(_FAMILIES.values())))}"
        )
        return {}
    # A folder is both; a family alone leaves the name missing.
    name = values.get("name", None if given in _FAMILIES else given)
    return {"model_name": family} | ({} if name is None else {"name": name})


def _list_problems(values: Mapping[object, object], method: str) -> list[str]:
    """What cannot be left out without measuring something else, one line each."""
    problems = []
    for key in ("weight_decay", "kl_factor", "norm_constraint", "lora"):
        if values.get(key) not in (None, False, 0, "null"):
            problems.append(f"{key}: {describe_value(values[key])} has no counterpart; remove the key")
    if method == "ft" and values.get("objective_optimization", "target_new") != "target_new":
        problems.append(
            "objective_optimization: expected target_new, all of whose tokens are trained on here"
        )
    if values.get("opt", "Adam") != "Adam":
        problems.append(f"opt: {describe_value(values['opt'])} has no counterpart; expected Adam")
    if method in ("mend", "ke") and values.get("inner_params") and not read_layers(values["inner_params"]):
        first = one_line(_first(values["inner_params"]), 80)
        problems.append(
            f"inner_params: {first} lies in no decoder layer; those alone are edited here (layers)"
        )
    archive = values.get("archive")
    if archive is not None and method in ("mend", "ke", "serac") and not _is_folder(archive):
        problems.append(
            f"archive: {one_line(archive, 80)} is no folder of editors trained here, and EasyEdit's own "
            "checkpoints are not read; archive: null trains one, and MultimodalTrainer.run names its folder"
        )
    return problems


def _first(values: object) -> object:
    return values[0] if isinstance(values, list) else values


def _is_folder(path: object) -> bool:
    return isinstance(path, str) and os.path.isdir(path)


def read_layers(names: object) -> list[int]:
    """Layer numbers out of ``['opt_model.model.decoder.layers.31.fc1.weight', ...]``."""
    listed = names if isinstance(names, list) else [names]
    found = (re.search(r"\.layers\.(\d+)\.", str(name)) for name in listed)
    return sorted({int(match.group(1)) for match in found if match})


def _make_others(values: Mapping[object, object], method: str) -> dict[object, object]:
    """Options that follow from several keys."""
    out: dict[object, object] = {}
    if values.get("half") is True or values.get("fp16") is True:
        out["dtype"] = "float16"
    if method == "ike":
        out["ike_retriever"] = "sentences"
        return out
    if method == "ft":
        return out
    if layers := read_layers(values.get("inner_params")):
        out["layers"] = layers
    # Their patience is in steps, ours in validations; their gradients add up over batches, as ours.
    patience, every = _read_count(values, "early_stop_patience"), _read_count(values, "val_interval")
    if patience and every:
        out["editor_patience"] = max(1, -(-patience // every))
    out["editor_batch"] = (_read_count(values, "batch_size") or 1) * (
        _read_count(values, "accumulate_bs") or 1
    )
    archive, results = values.get("archive"), values.get("results_dir") or "./results"
    out["editor_dir"] = archive if archive is not None else os.path.join(str(results), "models")
    return out


def _read_count(values: Mapping[object, object], key: str) -> int | None:
    value = values.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
