"""A small world for whole runs: a random BLIP-2 folder, pictures and annotations, and a YAML on them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from original_files import FILES
from PIL import Image
from todays import OWN, TODAY, save_folder

SIZE = 28
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 4, "layers": 2, "k": 3, "n_keys": 4, "beta": 0.1, "lr": 5e-2, "max_steps": 60,
    "encoder_steps": 4, "encoder_batch": 4, "eval_batch": 8, "triplets": 6, "device": "cpu",
}  # fmt: skip
ANSWERS = ("a red fox", "two dogs", "the sea", "green")


def save_model(folder: Path, family: str) -> Path:
    """A random model of the family, in Hugging Face's layout."""
    if family in (*TODAY, *OWN):
        return save_folder(folder, family)
    from transformers import AutoTokenizer, Blip2Config, Blip2ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(FILES / ("opt" if family == "blip2" else "llama"))
    text: dict[str, Any] = {
        "model_type": "opt" if family == "blip2" else "llama", "vocab_size": len(tokenizer),
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256,
        "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip
    if family == "blip2":
        text |= {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}
    else:
        text |= {"intermediate_size": 64, "num_key_value_heads": 4}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Blip2Config(
        vision_config={**shape, "image_size": SIZE, "patch_size": 14},
        qformer_config={**shape, "vocab_size": 8, "encoder_hidden_size": 32},
        text_config=text, num_query_tokens=4, image_token_index=len(tokenizer) - 1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Blip2ForConditionalGeneration(config)
        # A wider spread than the initial one, so that random models answer differently.
        for parameter in model.language_model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def record(i: int, caption: bool = False) -> dict[str, Any]:
    """An annotation in MMEdit's fields; the pictures are those of ``save_pictures``."""
    return {
        "src": "a photo of" if caption else f"what is number {i}?",
        "rephrase": "this shows" if caption else f"which thing is number {i}?",
        "pred": "nothing", "alt": ANSWERS[i % len(ANSWERS)],
        "image": f"{i}.png", "image_rephrase": f"{i + 1}.png",
        "loc": f"who was the king of {i}?", "loc_ans": "a man",
        "m_loc": f"{i + 2}.png", "m_loc_q": "what color is it?", "m_loc_a": "blue",
    }  # fmt: skip


def save_pictures(folder: Path, count: int = 12) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / f"{i}.png")


@dataclass(frozen=True)
class Project:
    """A folder with everything that a run needs, and its YAML."""

    root: Path
    family: str

    @property
    def yaml(self) -> Path:
        return self.root / "small.yaml"

    @property
    def data(self) -> Path:
        return self.root / "data"

    def options(self, **changes: Any) -> dict[str, Any]:
        return OPTIONS | {
            "model_name": self.family,
            "name": str(self.root / "model"),
            "knowledge_dir": str(self.root / "knowledge"),
            "results_dir": str(self.root / "results"),
            "image_root": str(self.data),
            "data": {
                task: {split: str(self.data / f"{task}_{split}.json") for split in ("train", "eval")}
                for task in ("vqa", "caption")
            },
            **changes,
        }

    def write_yaml(self, **changes: Any) -> Path:
        self.yaml.write_text(yaml.safe_dump(self.options(**changes)))
        return self.yaml

    def write_records(self, records: Any, task: str = "vqa", split: str = "eval") -> Path:
        path = self.data / f"{task}_{split}.json"
        path.write_text(json.dumps(records))
        return path

    def copy(self, root: Path) -> Project:
        """A copy that a test may damage."""
        shutil.copytree(self.root, root, ignore=shutil.ignore_patterns("results"))
        copied = Project(root, self.family)
        copied.write_yaml()
        return copied


def make_project(root: Path, family: str) -> Project:
    project = Project(root, family)
    save_model(root / "model", family)
    save_pictures(project.data)
    for task in ("vqa", "caption"):
        for split, numbers in (("train", range(5)), ("eval", range(5, 9))):
            project.write_records([record(i, task == "caption") for i in numbers], task, split)
    project.write_yaml()
    return project


def diverging(value: float):
    """What ``training`` judges its logits by, where the loss is no longer a number."""
    return lambda _, labels: (torch.full((len(labels),), value), torch.zeros(len(labels), dtype=torch.bool))
