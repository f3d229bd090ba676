"""The fuzzer's edit folders: damaged, or changed with matching checksums."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks import models, mutants
from benchmarks.mutants import require
from unike.backbones.base import encode_queries
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.edits import (  # fmt: skip
    Edit,
    EditRecord,
    Fact,
    LayerShare,
    LowRankDelta,
    Origin,
    PromptEdit,
    PromptText,
    RoutedEdit,
    Routing,
    WeightDelta,
)
from unike.edits.deltas import ffn_sites
from unike.edits.files import INDEX, TENSORS, read_edit, sign
from unike.knowledge.patch import KeyValuePatch
from unike.types import Query


@lru_cache(maxsize=1)
def make_backbone() -> VisionLanguageBackbone:
    config = models.make_opt_config(width=64, layers=5, vision_layers=2, vision_width=64, side=2, queries=4)
    return models.make_random_backbone(config)


def make_sound_edits() -> Iterator[Edit]:
    """One edit of each kind that needs nothing else, and several composed."""
    model, generator = make_backbone(), torch.Generator().manual_seed(1)
    layers, width = model.layout.last(2), model.layout.width

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def record(name: str) -> EditRecord:
        shares = {}
        for i in layers:
            site = model.layout.ffn(i)
            patch = KeyValuePatch(width, 3, site.activation, site.gated, generator=generator)
            patch.values.data.copy_(draw(3, width))
            shares[i] = LayerShare(draw(width), draw(width), patch.requires_grad_(False))
        return EditRecord(name, shares)

    site, module = next(iter(ffn_sites(model, layers).items()))
    name, weight = next((n, p) for n, p in model.model.named_parameters() if n.endswith("fc2.bias"))
    hparams = HyperParams(model_name="blip2", name="any").decisive()
    edits: list[Edit] = [
        RoutedEdit((record("fox"), record("cat")), Routing(external="none")),
        RoutedEdit((record("owl"),), Routing(memory="edit", alpha=0.5, scope_gate="threshold")),
        WeightDelta({name: weight.detach() + 1}),
        LowRankDelta({site: (draw(2, module.in_features), draw(2, module.out_features))}),
        PromptEdit(
            (Fact("bee", PromptText("New Fact: a bee\n", 5), (PromptText("New Fact: an ant\n", 5),)),), 40
        ),
    ]
    for i, edit in enumerate(edits):
        asked = (f"what is {i}?", "a fox", f"{i}.png", "key")
        edit.origins = (Origin(f"e{i}", "unike", *asked, hparams, model.fingerprint, "any", {"steps": 3}),)
    yield from edits
    yield edits[0] | edits[2] | edits[4]


def mutate_edit(folder: Path, draw: random.Random) -> Callable[[], bool]:
    """An edit folder that must load as what its index says, or be refused; a folder that is only damaged must
    load as the undamaged edit."""
    sound = folder / "sound"
    if not sound.exists():
        for i, edit in enumerate(make_sound_edits()):
            edit.save(sound / str(i))
    source, own = draw.choice(sorted(sound.iterdir())), folder / "edit"
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(source, own)
    damaged = draw.random() < 0.4
    if damaged:
        path = own / draw.choice((INDEX, TENSORS))
        path.write_bytes(mutants.damage(path.read_bytes(), draw))
    else:
        index = json.loads((own / INDEX).read_text("utf-8"))
        if draw.random() < 0.4:
            save_file(mutants.change_tensors(load_file(own / TENSORS), draw), own / TENSORS)
        else:
            name = "values" if draw.random() < 0.6 else draw.choice(sorted(index))
            index[name] = mutants.change_value(index[name], draw)
        _sign(own, index)
    return lambda: _load_edit(own, source if damaged else own)


def _sign(own: Path, index: dict) -> None:
    """Makes the checksums match if possible."""
    data = (own / TENSORS).read_bytes()
    index |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    try:
        index = sign(index)
    except ValueError:
        # A hostile file can hold values that JSON cannot express.
        index["checksum"] = "0"
    (own / INDEX).write_text(json.dumps(index), "utf-8")


def _load_edit(own: Path, like: Path) -> bool:
    """Loads the folder, compares it with the folder ``like``, and runs the model with it."""
    model, query = make_backbone(), Query(None, "what is it?", "a fox")
    edit, expected = Edit.load(own, model), read_edit(like)
    packed, tensors = edit.pack(), expected.tensors()
    require(json.loads(json.dumps(packed.values)) == expected.values, "its values differ")
    require(packed.tensors.keys() == tensors.keys(), "its tensors differ")
    require(all(torch.equal(t, tensors[n]) for n, t in packed.tensors.items()), "its numbers differ")
    require((edit.id, edit.origins) == (expected.id, expected.origins), "its origin differs")
    with torch.no_grad(), edit.applied(model):
        model(encode_queries(model, [edit.rewrite(query)]))
    return True
