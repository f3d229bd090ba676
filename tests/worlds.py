"""A small random backbone with what editing methods may want, for the tests of methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from original_files import make_spec
from PIL import Image
from todays import OWN, TODAY, save_folder, todays_spec
from untouched import hook_count, weights_of

from unike.backbones import load_backbone
from unike.backbones.base import encode_queries
from unike.backbones.prefix import PrefixCache
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.datasets.triplets import make_triplets
from unike.edits import Edit
from unike.methods import base, build, ike, resolve_needs
from unike.methods.meta_training import TrainableMethod, meta_train
from unike.methods.preparation.knowledge import build_knowledge, make_knowledge
from unike.types import METRICS, Case, EditRequest, Probe, Query

COLORS = ("teal", "navy", "olive", "maroon", "gold", "gray")
BASE = {
    "model_name": "blip2", "name": "unused", "layers": 2, "k": 3, "max_steps": 25, "lr": 2e-2,
    "encoder_steps": 5, "encoder_batch": 4, "eval_batch": 4, "n_keys": 4,
    "editor_rank": 6, "editor_lr": 1e-2, "editor_steps": 5, "editor_batch": 2, "editor_val_every": 5,
    "c_edit": 1.0,
}  # fmt: skip
# By method: what its YAML says, one row per way of working. A method that is registered has one.
SETTINGS = {
    "unike": [{}],
    "ft": [{"layers": 1}, {"ft_target": "projection"}],
    "tpatcher": [{"activation_loss": 0.1, "memory_loss": 0.1}],
    "tpatcher_published": [
        {
            "layers": 1,
            "activation_loss": 1.0,
            "memory_loss": 5.0,
            "lr": 1e-2,
            "max_steps": 60,
            "patcher_min_steps": 20,
            "patcher_check_every": 10,
        }
    ],
    "ike": [
        {"ike_retriever": "states", "ike_demonstrations": 2},
        {"ike_retriever": "states", "ike_demonstrations": 2, "ike_patches": True},
    ],
    # Their other ways of working are in tests/test_grace.py and tests/test_lora.py.
    "grace": [{"layers": [4], "lr": 0.1, "grace_init": "warm"}],
    "lora": [{"lora_rank": 4, "lora_alpha": 8}],
    "wise": [
        {"layers": [4], "lr": 0.2, "max_steps": 60, "wise_beta": 4.0, "wise_alpha": 1.0, "wise_gamma": 2.0}
    ],
    "ke": [{}],
    # A random decoder's states are so alike that larger steps turn all units of a smaller expert off.
    "liveedit": [
        {
            "layers": [4],
            "live_heads": 2,
            "live_image_tokens": 6,
            "live_scale": 1.0,
            "live_rank": 12,
            "editor_lr": 2e-3,
            "editor_steps": 20,
        },
    ],
    "mend": [{}],
    # All cases ask the same question: only the picture tells them apart.
    "serac": [{"serac_scope": "multimodal"}],
}


def query(i: int, answer: str | None = "a fox", prompt: str = "what is it?") -> Query:
    return Query(Image.new("RGB", (84, 84), COLORS[i]), prompt, answer)


def case(i: int, answer: str = "a fox") -> Case:
    asked = query(i, answer)
    queries = [asked, replace(asked, prompt="what?"), query(i - 1), Query(None, "where is it?", "there")]
    probes = [
        Probe(m, q, "target" if n < 3 else "unchanged")
        for n, (m, q) in enumerate(zip(METRICS, queries, strict=False))
    ]
    return Case(EditRequest(f"e{i}", asked, "a dog"), tuple(probes))


def load_small(family: str) -> VisionLanguageBackbone:
    """A random backbone of the family, from original files or, of today's, from a folder."""
    if family not in (*TODAY, *OWN):
        return load_backbone(make_spec(family))
    with TemporaryDirectory() as folder:
        return load_backbone(todays_spec(family, save_folder(Path(folder), family)))


class World:
    """A random backbone with what methods may want: knowledge, and training cases."""

    def __init__(self, family: str) -> None:
        self.family, self.backbone = family, load_small(family)
        self.backbone.max_new_tokens = 3
        self.train = [case(i, "two dogs") for i in range(len(COLORS))]
        self.built = build_knowledge(
            self.backbone, make_triplets(self.train), [4, 5], HyperParams.from_dict(BASE)
        )
        self.learnt: dict[str, TrainableMethod] = {}

    def method(self, name: str, changes: dict) -> base.EditMethod:
        hparams = HyperParams.from_dict({**BASE, "method": name, **changes})
        knowledge = make_knowledge(*self.built[:2], hparams) if resolve_needs(hparams).knowledge else {}
        method = build(hparams, knowledge, lambda: self.train)
        if not isinstance(method, TrainableMethod):
            return method
        if name not in self.learnt:
            with TemporaryDirectory() as folder:
                meta_train(method, self.backbone, self.train, self.train[:2], hparams, Path(folder))
            self.learnt[name] = method
        return self.learnt[name]

    def prefixes(self, method: base.EditMethod) -> PrefixCache:
        return PrefixCache(self.backbone, method.layers(self.backbone)[0])

    def edit(self, row: tuple[str, dict], i: int = 0, history: Edit | None = None) -> Edit:
        method = self.method(*row)
        return method.edit(self.backbone, case(i).request, self.prefixes(method), history)

    @torch.no_grad()
    def logits(self, queries: Sequence[Query]) -> torch.Tensor:
        return self.backbone(encode_queries(self.backbone, queries)).logits


def snapshot(backbone: VisionLanguageBackbone) -> tuple[dict[str, torch.Tensor], int]:
    return weights_of(backbone), hook_count(backbone.model)


def world_of(family: str, worlds: dict[str, World], monkeypatch: pytest.MonkeyPatch) -> World:
    """The family's world, made once."""
    # The small decoders know few positions: less is left for the question.
    monkeypatch.setattr(ike, "RESERVED_TOKENS", 40)
    if family not in worlds:
        worlds[family] = World(family)
    return worlds[family]
