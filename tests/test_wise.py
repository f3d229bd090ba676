"""WISE against slow references: margins, masks, merging, training, and the routing by activations."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from test_methods import STEPWISE
from worlds import BASE, SETTINGS, World, case, query

from unike.backbones.base import answer_loss
from unike.backbones.hooks import capture, transform
from unike.config.hparams import HyperParams
from unike.edits import SideMemoryEdit, SideRecord, compose
from unike.edits.side_memory import merge_shards, sum_shards
from unike.methods import build
from unike.methods.wise import draw_mask, find_records, margin_loss
from unike.types import Query, UserError

ROW = ("wise", SETTINGS["wise"][0])


def make(world: World, i: int = 0, history=None, **changes) -> SideMemoryEdit:
    edit = world.edit((ROW[0], ROW[1] | changes), i, history)
    assert isinstance(edit, SideMemoryEdit)
    return edit


def record(places: list[int], values: list[float], shard: int = 0, activation: float = 1.0) -> SideRecord:
    return SideRecord("e", shard, torch.tensor(places).int(), torch.tensor(values), activation)


def read_inputs(world: World, asked: Query) -> list[list[float]]:
    """What enters the matrix at each of a prompt's tokens, in the base model."""
    state = world.prefixes(world.method(*ROW)).state([replace(asked, target=None)])
    with torch.no_grad(), capture({0: world.backbone.layout.ffn(4).value}) as seen:
        world.backbone.suffix(state)
    inputs = seen[0].reshape(*state.labels.shape, -1)[0]
    return inputs[: int(state.question_end) + 1].tolist()


def activation(change: torch.Tensor, inputs: list[list[float]]) -> float:
    """The mean over tokens of the norm of ``x (W' - W)``, in plain floats."""
    rows = change.tolist()
    norms = [math.hypot(*(sum(map(float.__mul__, row, x)) for row in rows)) for x in inputs]
    return sum(norms) / len(norms)


# ---------------------------------------------------------------- equations


def test_the_margin_loss_is_its_three_terms() -> None:
    drawn = random.Random(0)
    for _ in range(20):
        e, us = drawn.uniform(0, 30), [drawn.uniform(0, 30) for _ in range(3)]
        terms = (
            [max(0, u - 5) for u in us],
            [max(0, 20 - e) for _ in us],
            [max(0, 10 - (e - u)) for u in us],
        )
        wanted = sum(sum(term) / 3 for term in terms)
        found = margin_loss(torch.tensor(e), torch.tensor(us), 5.0, 20.0, 10.0).item()
        assert found == pytest.approx(wanted, rel=1e-5)
    assert margin_loss(torch.tensor(20.0), torch.tensor([5.0]), 5.0, 20.0, 10.0).item() == 0


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_shards_are_merged_as_a_slow_reference_does(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shards = [torch.randn(4, 5, generator=generator) for _ in range(3)]
    shards[0][1] = 0.0
    kept = []
    for shard in shards:
        flat = shard.flatten().tolist()
        count = int(density * len(flat))
        largest = sorted(range(len(flat)), key=lambda i, f=flat: -abs(f[i]))[:count]
        kept.append([v if i in largest else 0.0 for i, v in enumerate(flat)])
    wanted = []
    for column in zip(*kept, strict=True):
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [v for v in column if v * sign > 0]
        wanted.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    found = merge_shards(shards, density)
    torch.testing.assert_close(found.flatten(), torch.tensor(wanted))
    assert not torch.allclose(found, sum(shards) / 3)
    assert merge_shards(shards[:1], density) is shards[0]


def test_edits_of_a_shard_add_up_and_shards_stay_apart() -> None:
    records = [record([0, 3], [1.0, 2.0]), record([3, 4], [5.0, 1.0]), record([0], [7.0], 1)]
    shards = sum_shards(records, (2, 3))
    assert shards[0].tolist() == [[1.0, 0.0, 0.0], [7.0, 1.0, 0.0]]
    assert shards[1].tolist() == [[7.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_a_mask_is_of_the_seed_and_the_shard() -> None:
    mask = draw_mask((100, 100), 0.2, 1, 0)
    assert 0.18 < mask.float().mean() < 0.22
    assert torch.equal(mask, draw_mask((100, 100), 0.2, 1, 0))
    for other in (draw_mask((100, 100), 0.2, 1, 1), draw_mask((100, 100), 0.2, 2, 0)):
        assert 0.02 < (mask & other).float().mean() < 0.06


# ---------------------------------------------------------------- an edit


def test_training_is_that_of_a_slow_reference(world: World) -> None:
    """Three steps of gradient descent on the copied matrix itself, masked and clamped."""
    steps, backbone = 3, world.backbone
    changes = {"stop_loss": 0.0, "max_steps": steps, "wise_clamp": 0.05, "wise_unrelated": 2}
    edit = make(world, **changes)
    method = world.method(ROW[0], ROW[1] | changes)
    module = backbone.layout.ffn(4).value
    base = module.weight.detach()
    copied, mask = base.clone().requires_grad_(), draw_mask(tuple(base.shape), 0.2, 42, 0)
    state = world.prefixes(method).state([query(0)])
    prompts = [query(0), *method.draw_unrelated(case(0).request)]
    inputs = [torch.tensor(read_inputs(world, asked)) for asked in prompts]

    def run(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output + x @ (copied - base).T

    for _ in range(steps):
        with transform([(module, module, run)]):
            loss = answer_loss(backbone.suffix(state), state.labels).sum()
        own, *others = [(x @ (copied - base).T).norm(dim=1).mean() for x in inputs]
        settings = (ROW[1]["wise_alpha"], ROW[1]["wise_beta"], ROW[1]["wise_gamma"])
        loss = loss + margin_loss(own, torch.stack(others), *settings)
        (gradient,) = torch.autograd.grad(loss, copied)
        with torch.no_grad():
            copied -= ROW[1]["lr"] * gradient * mask
            copied.copy_(torch.maximum(torch.minimum(copied, base + 0.05), base - 0.05))
    wanted = copied.detach() - base
    torch.testing.assert_close(edit.change, wanted, atol=1e-4, rtol=1e-3)
    assert not edit.change[~mask].any()
    assert 1e-3 < edit.change.abs().max() <= 0.05
    assert edit.records[0].activation == pytest.approx(
        activation(edit.change, read_inputs(world, query(0))), rel=1e-3
    )


def test_a_prompt_is_routed_by_its_activation(world: World) -> None:
    edit, asked = make(world), [query(0), Query(None, "where is it?", "there")]
    base = [world.logits([one]) for one in asked]
    own, far = (activation(edit.change, read_inputs(world, one)) for one in asked)
    assert edit.threshold == pytest.approx(0.88 * own, rel=1e-3)
    assert far < edit.threshold
    with edit.applied(world.backbone):
        found = [world.logits([one]) for one in asked]
        assert edit.explain()["activation"] == pytest.approx([far], rel=1e-3)
    assert not torch.allclose(found[0], base[0], atol=1e-3)
    assert torch.equal(found[1], base[1])
    open_ = replace(edit, ratio=0.99 * far / own)
    with open_.applied(world.backbone):
        assert not torch.allclose(world.logits(asked[1:]), base[1], atol=1e-3)


def test_inside_its_scope_the_side_memory_is_the_changed_matrix(world: World) -> None:
    edit, module = make(world), world.backbone.layout.ffn(4).value
    with edit.applied(world.backbone):
        found = world.logits([query(0)])
    with torch.no_grad():
        kept = module.weight.clone()
        module.weight += edit.change
        wanted = world.logits([query(0)])
        module.weight.copy_(kept)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- sequences


def test_edits_of_a_sequence_train_their_shard_on_and_open_new_ones(world: World) -> None:
    changes = {"wise_shard_edits": 2}
    first = make(world, 0, **changes)
    second = make(world, 1, first, stop_loss=0.0, max_steps=3, **changes)
    third = make(world, 2, first | second, **changes)
    whole = compose([first, second, third])
    assert [r.shard for r in find_records(whole, 4)] == [0, 0, 1]
    # The second one starts where the first has left the shard; alone it is what it adds.
    fresh = make(world, 1, stop_loss=0.0, max_steps=3, **changes)
    assert not torch.allclose(second.change, fresh.change, atol=1e-3)
    shards = sum_shards(whole.records, whole.shape)
    torch.testing.assert_close(shards[0], first.change + second.change)
    torch.testing.assert_close(shards[1], third.change)
    torch.testing.assert_close(whole.change, merge_shards([shards[0], shards[1]], 0.53))
    assert whole.threshold == 0.88 * min(e.records[0].activation for e in (first, second, third))
    left = whole.drop([1])
    assert [r.id for r in left.records] == ["e0", "e2"]


def test_training_questions_are_needed_and_none_is_one_line(world: World) -> None:
    hparams = HyperParams.from_dict({**BASE, "method": "wise", **ROW[1]})
    method = build(hparams, {}, tuple)
    with pytest.raises(UserError, match="no training record has unrelated questions"):
        method.edit(world.backbone, case(0).request, world.prefixes(method))
    drawn = world.method(*ROW).draw_unrelated(case(0).request)
    known = {(p.query.prompt) for c in world.train for p in c.probes if p.expect == "unchanged"}
    assert {q.prompt for q in drawn} <= known
    assert all(q.target is None for q in drawn)
    with pytest.raises(UserError, match="layers: 2; method: wise edits one layer"):
        build(replace(hparams, layers=2), {}, tuple)
    assert "wise" not in STEPWISE
