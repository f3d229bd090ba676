"""Edits of models in half precision: what is trained is trained in single precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from original_files import FAMILIES
from test_methods import IDS, ROWS
from untouched import assert_untouched
from worlds import BASE, SETTINGS, World, case, load_small, query, snapshot

from unike.backbones.base import answer_loss, encode_queries
from unike.config.hparams import HyperParams
from unike.datasets.triplets import make_triplets
from unike.edits import Edit
from unike.methods.meta_training import TrainableMethod, meta_train
from unike.methods.preparation.knowledge import build_knowledge

TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SMALL_STEP = {"float16": 2e-5, "bfloat16": 1e-4}


class HalfWorld(World):
    """A small world whose backbone is in half precision."""

    def __init__(self, family: str, dtype: torch.dtype) -> None:
        self.family, self.backbone = family, load_small(family)
        self.backbone.model.to(dtype)
        self.backbone.max_new_tokens = 3
        self.train = [case(i, "two dogs") for i in range(6)]
        self.built = build_knowledge(
            self.backbone, make_triplets(self.train), [4, 5], HyperParams.from_dict(BASE)
        )
        self.learnt: dict[str, TrainableMethod] = {}


KEPT: dict[tuple[str, str], HalfWorld] = {}


@pytest.fixture(params=[(f, t) for f in FAMILIES for t in TYPES], ids="-".join)
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HalfWorld:
    monkeypatch.setattr("unike.methods.ike.RESERVED_TOKENS", 40)
    family, dtype = request.param
    if request.param not in KEPT:
        KEPT[request.param] = HalfWorld(family, TYPES[dtype])
    return KEPT[request.param]


def loss_under(world: World, edit: Edit) -> float:
    asked = edit.rewrite(query(0))
    labels = encode_queries(world.backbone, [asked]).labels
    with edit.applied(world.backbone):
        return answer_loss(world.logits([asked]), labels).item()


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_an_edit_is_made_and_leaves_the_base(world: HalfWorld, row: tuple[str, dict]) -> None:
    before, hooks = snapshot(world.backbone)
    start = answer_loss(world.logits([query(0)]), encode_queries(world.backbone, [query(0)]).labels).item()
    edit = world.edit(row)
    assert all(torch.isfinite(t).all() for t in edit.state_dict().values())
    after = loss_under(world, edit)
    if "reached" in edit.info:
        assert edit.info["steps"] > 0
        assert after < (0.95 if row[0] == "grace" else 0.8) * start
        # The edit is what was measured in training: rounding it afterwards changes nothing. T-Patcher as
        # published measures with smoothed labels.
        if row[0] != "tpatcher_published":
            assert after == pytest.approx(edit.info["loss"], rel=0.05, abs=5e-3)
    assert_untouched(world.backbone, before, hooks)
    kept = dict(world.backbone.model.named_parameters())
    assert all(t.dtype == kept[n].dtype for n, t in edit.weights.items())


@pytest.mark.parametrize("target", ["layers", "projection"])
@pytest.mark.parametrize("dtype", TYPES)
def test_steps_too_small_for_the_type_add_up(target: str, dtype: str) -> None:
    """Fine-tuning with a step below what rounding leaves of a weight: without masters it goes nowhere."""
    world = HalfWorld("blip2", TYPES[dtype])
    small = {"ft_target": target, "layers": 1, "lr": SMALL_STEP[dtype], "max_steps": 60}
    edit = world.edit(("ft", small))
    base = dict(world.backbone.model.named_parameters())
    large = {n: p.detach() for n, p in base.items() if n in edit.weights and p.abs().max() > 0.1}
    # No single step reaches the next number that the type has there.
    assert all(torch.equal(p + small["lr"], p) for p in (w[w.abs() > 0.1] for w in large.values()))
    moved = [bool((edit.weights[n] != p)[p.abs() > 0.1].any()) for n, p in large.items()]
    assert large
    assert any(moved)
    start = answer_loss(world.logits([query(0)]), encode_queries(world.backbone, [query(0)]).labels).item()
    assert loss_under(world, edit) < start


def test_batched_edits_are_those_made_alone(world: HalfWorld) -> None:
    method = world.method("ft", {"layers": 1, "max_steps": 6})
    prefixes = world.prefixes(method)
    requests = [case(i, answer).request for i, answer in enumerate(("a fox", "two red dogs"))]
    together = method.edit_many(world.backbone, requests, prefixes)
    for request, edit in zip(requests, together, strict=True):
        alone = method.edit(world.backbone, request, prefixes)
        assert edit.info["loss"] == pytest.approx(alone.info["loss"], rel=0.1, abs=0.02)


@pytest.mark.parametrize("name", ["ke", "liveedit", "mend", "serac"])
def test_an_editor_learns_on_a_model_in_half_precision(world: HalfWorld, tmp_path: Path, name: str) -> None:
    changes = {"method": name, **SETTINGS[name][0], "editor_steps": 20, "editor_val_every": 5}
    hparams = HyperParams.from_dict({**BASE, **changes})
    method = world.method(name, changes)
    fresh = type(method)(hparams, method.knowledge)
    progress = meta_train(fresh, world.backbone, world.train, world.train[:2], hparams, tmp_path)
    assert all(torch.isfinite(p).all() for p in fresh.trained.parameters())
    assert all(p.dtype == torch.float32 for p in fresh.trained.parameters())
    assert min(progress.losses[1:]) < progress.losses[0]
