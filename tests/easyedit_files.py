"""YAMLs with the keys of EasyEdit's multimodal ones, written here for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MODELS: dict[str, dict[str, Any]] = {
    "blip2": {"model_name": "blip2", "name": "cache/opt", "tokenizer_class": "GPT2Tokenizer"},
    "minigpt4": {
        "model_name": "minigpt4",
        "name": "cache/vicuna",
        "tokenizer_class": "LlamaTokenizer",
        "pretrained_ckpt": "cache/minigpt4.pth",
    },
}
FILES = {
    "qformer_checkpoint": "cache/qformer.pth",
    "qformer_name_or_path": "bert-base-uncased",
    "state_dict_file": "cache/eva.pth",
    "coco_image": "../",
    "rephrase_image": "../",
    "results_dir": "./results",
    "device": 0,
}
PARAMETERS = {
    "blip2": [f"opt_model.model.decoder.layers.{i}.fc{n}.weight" for i in (30, 31) for n in (1, 2)],
    "minigpt4": [
        f"llama_model.model.layers.{i}.mlp.{n}_proj.weight" for i in (30, 31) for n in ("up", "down")
    ],
}
TRAINING = {
    "lr": 1e-6, "lr_lr": 1e-4, "cedit": 0.1, "iedit": 0.1, "cloc": 1.0, "cbase": 1.0, "dropout": 0.0,
    "train_base": False, "no_grad_layers": None, "archive": None, "batch_size": 1, "model_save_pt": 5000,
    "silent": False, "max_iters": 30000, "log_interval": 100, "final_eval": True, "val_interval": 5000,
    "early_stop_patience": 20000, "early_stop_key": "loss/total_edit_val", "eval_only": False, "half": False,
    "debug": False, "save": False, "val_batch_size": 1, "accumulate_bs": 2, "val_steps": 500, "opt": "Adam",
    "grad_clip": 100.0, "exact_match": True,
}  # fmt: skip
MEND = {
    "edit_lr": 1e-4, "seed": 42, "one_sided": False, "n_hidden": 1, "hidden_dim": None, "init": "id",
    "norm": True, "combine": True, "x_only": False, "delta_only": False, "act": "relu", "rank": 1920,
    "mlp_class": "IDMLP", "shared": True, "verbose": True, "eval_log_interval": 1000,
}  # fmt: skip
SERAC = {
    "edit_lr": 1e-2, "seed": 0, "small_name": "cache/small", "cls_name": "distilbert-base-cased",
    "cls_class": "AutoModel", "supervised": False, "soft_weighting": False, "checkpoint_grad": False,
    "cross_attend": False, "cos": False, "freeze": None, "square": True, "bound_embeds": False,
    "use_all_negatives": False, "freeze_cntr": False, "dist_heads": 1, "lora": None, "edit_bs": 1,
    "log_errors": False, "unlikelihood": True,
}  # fmt: skip
IKE = {"k": 32, "sentence_model_name": "cache/sentences", "exact_match": True, "task_name": "caption"}
FT = {
    "layers": [31], "num_steps": 25, "batch_size": 1, "max_length": 40, "lr": 5e-4, "weight_decay": 0,
    "kl_factor": 0, "norm_constraint": False, "objective_optimization": "target_new",
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj.weight", "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp", "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm", "lm_head_module": "lm_head", "model_parallel": False,
}  # fmt: skip


def make_values(method: str, model: str = "blip2", training: bool = False, **changes: Any) -> dict[str, Any]:
    """What such a file holds; ``TRAINING`` files name their algorithm under ``alg``, the others under
    ``alg_name``."""
    about = MODELS[model]
    common = {**about, **FILES, "tokenizer_name": about["name"]}
    named = {"alg" if training else "alg_name": {"SERAC": "SERAC_MULTI"}.get(method, method)}
    own: dict[str, Any] = {"IKE": IKE, "FT": FT}.get(method, {})
    if method in ("MEND", "SERAC"):
        own = {**TRAINING, **(MEND if method == "MEND" else SERAC), "model_class": "Blip2OPT",
               "inner_params": PARAMETERS[model], "eval_only": not training}  # fmt: skip
    return {**common, **named, **own, **changes}


def write(path: Path, values: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path
