"""Reads the configuration of the UniKE release (``hparams/minigpt4.yaml``) as ours.

The release's file holds one flat list for three different trainers, most of which its own code
never looks at; its ``lr`` belongs to meta-training, the rate of an edit is ``edit_lr``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

SAME_NAME = (
    "name",
    "model_name",
    "state_dict_file",
    "qformer_checkpoint",
    "qformer_name_or_path",
    "pretrained_ckpt",
    "coco_image",
    "rephrase_image",
    "beta",
    "seed",
    "results_dir",
    "device",
)
RENAMED: dict[object, str] = {
    "edit_lr": "lr",
    # The limit, which the count below overrides, as the release's own code does.
    "max_add_neuron_num": "n_keys",
    "hyperparams_nn_count": "n_keys",
    "memory_size": "triplets",
}
UNUSED = (
    *("model_class", "tokenizer_class", "tokenizer_name", "inner_params", "l_ike_layers", "alg", "lr"),
    *("lr_lr", "lr_scale", "cedit", "iedit", "cloc", "cbase", "dropout", "train_base", "no_grad_layers"),
    *("one_sided", "n_hidden", "hidden_dim", "init", "norm", "combine", "x_only", "delta_only", "act"),
    *("rank", "mlp_class", "shared", "archive", "batch_size", "model_save_pt", "silent", "max_epochs"),
    *("max_iters", "log_interval", "eval_log_interval", "final_eval", "val_interval"),
    *("early_stop_patience", "early_stop_key", "eval_only", "half", "debug", "save", "verbose", "max_norm"),
    *("val_batch_size", "accumulate_bs", "val_steps", "opt_class", "grad_clip", "freeze_model", "freeze_k"),
    *("freeze_a", "amplify_v", "act_margin_val", "margin_val1", "margin_val2", "hyperparams_nn"),
    *("continuous", "continuous_sample", "multi_task", "do_clip_norm"),
)
# The release spells a loss that is off as a word, where ours is a weight.
LOSSES = {"activate_loss": "activation_loss", "memory_loss": "memory_loss"}
SWITCHED_OFF = "non_use"

RELEASE_ONLY = frozenset(UNUSED) - {"lr"} | set(RENAMED) | {"tp_layers", "activate_loss"}


def read_edited_layers(tp_layers: object) -> list[int]:
    """Layer numbers out of ``{'llama_model.model.layers.31.mlp.up_proj': 'output', ...}``."""
    names = tp_layers if isinstance(tp_layers, (Mapping, list)) else ()
    found = (re.search(r"\.layers\.(\d+)\.", str(name)) for name in names)
    return sorted({int(match.group(1)) for match in found if match})


def translate(
    values: Mapping[object, object], ours: frozenset[str]
) -> tuple[dict[object, object], tuple[str, ...]]:
    """The release's keys as ours, and the names of those that have no counterpart.

    Keys of ours that the release does not know (``ours``) pass through, so that a release file can
    be extended.
    """
    mapped: dict[object, object] = {}
    ignored: list[str] = []
    for key, value in values.items():
        if key == "alg_name":
            mapped["method"] = value
        elif key == "max_add_neuron_num" and "hyperparams_nn_count" in values:
            ignored.append(key)
        elif key in RENAMED:
            mapped[RENAMED[key]] = value
        elif key in SAME_NAME:
            mapped[key] = value
        elif key in LOSSES and value == SWITCHED_OFF:
            mapped[LOSSES[key]] = 0.0
        elif key == "tp_layers" and read_edited_layers(value):
            mapped["layers"] = read_edited_layers(value)
        elif key in ours and key not in UNUSED and key not in LOSSES:
            mapped.setdefault(key, value)
        else:
            ignored.append(str(key))
    return mapped, tuple(sorted(ignored))
