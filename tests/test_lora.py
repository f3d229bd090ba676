"""LoRA against slow references: its factors as dense weights, and its training step by step."""

from __future__ import annotations

import zlib

import pytest
import torch
from worlds import BASE, World, case, query

from unike.backbones.base import answer_loss
from unike.edits import LowRankDelta, WeightDelta, compose
from unike.edits.deltas import attention_sites, ffn_sites
from unike.methods.lora import draw_factors, find_modules
from unike.types import UserError

ROW = ("lora", {"lora_rank": 3, "lora_alpha": 5.0})


def make(world: World, i: int = 0, **changes) -> LowRankDelta:
    edit = world.edit((ROW[0], ROW[1] | changes), i)
    assert isinstance(edit, LowRankDelta)
    return edit


def as_weights(world: World, edits: list[LowRankDelta]) -> WeightDelta:
    """The same change as dense weights: ``W + sum over factors of the outer products``, in loops."""
    names = {id(module): name for name, module in world.backbone.model.named_modules()}
    modules = find_modules(world.backbone, [4, 5], "both")
    weights: dict[str, torch.Tensor] = {}
    for edit in edits:
        for at, (left, right) in edit.factors.items():
            name = f"{names[id(modules[at])]}.weight"
            whole = weights.get(name, modules[at].weight.detach()).clone()
            for row, column in zip(left, right, strict=True):
                for i, value in enumerate(column.tolist()):
                    whole[i] += value * row
            weights[name] = whole
    return WeightDelta(weights)


@pytest.mark.parametrize("target", ["attention", "ffn", "both"])
def test_factors_are_the_dense_change_of_the_named_modules(world: World, target: str) -> None:
    edit = make(world, lora_target=target)
    wanted = {"attention": attention_sites, "ffn": ffn_sites}
    kinds = list(wanted) if target == "both" else [target]
    assert set(edit.factors) == {at for kind in kinds for at in wanted[kind](world.backbone, [4, 5])}
    asked = [query(0), query(1, "two dogs there")]
    with edit.applied(world.backbone):
        found = world.logits(asked)
    with as_weights(world, [edit]).applied(world.backbone):
        torch.testing.assert_close(found, world.logits(asked), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, world.logits(asked), atol=1e-2)


def test_adapters_of_a_sequence_add_up(world: World) -> None:
    edits = [make(world, 0), make(world, 1), make(world, 2)]
    whole, asked = compose(edits), [query(3)]
    with whole.applied(world.backbone):
        found = world.logits(asked)
    with as_weights(world, edits).applied(world.backbone):
        torch.testing.assert_close(found, world.logits(asked), atol=1e-4, rtol=1e-4)
    with edits[-1].applied(world.backbone):
        assert not torch.allclose(found, world.logits(asked), atol=1e-2)


def test_training_is_that_of_a_slow_reference(world: World) -> None:
    """Three steps of Adam on ``A`` and ``B`` themselves, the change built anew as a dense weight."""
    backbone, steps = world.backbone, 3
    edit = make(world, stop_loss=0.0, max_steps=steps, clip_norm=1e9)
    modules = find_modules(backbone, [4, 5], "attention")
    names = {id(module): name for name, module in backbone.model.named_modules()}
    generator = torch.Generator().manual_seed(42 + zlib.crc32(b"e0"))
    down, up = {}, {}
    for at, module in modules.items():
        bound = module.in_features**-0.5
        down[at] = ((torch.rand(3, module.in_features, generator=generator) * 2 - 1) * bound).requires_grad_()
        up[at] = torch.zeros(module.out_features, 3, requires_grad=True)
    optimiser = torch.optim.Adam([*down.values(), *up.values()], lr=BASE["lr"])
    state = world.prefixes(world.method(*ROW)).state([case(0).request.query])
    for _ in range(steps):
        weights = {
            f"{names[id(m)]}.weight": m.weight.detach() + 5.0 / 3 * up[at] @ down[at]
            for at, m in modules.items()
        }
        with WeightDelta(weights).applied(backbone):
            loss = answer_loss(backbone.suffix(state), state.labels).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for at, (left, right) in edit.factors.items():
        torch.testing.assert_close(left, down[at].detach(), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(right, 5.0 / 3 * up[at].detach().T, atol=1e-4, rtol=1e-3)
        assert right.abs().max() > 1e-3


def test_factors_start_at_the_base_and_depend_on_the_edit_and_the_seed(world: World) -> None:
    modules = find_modules(world.backbone, [4], "both")
    hparams = world.method(*ROW).hparams
    factors = draw_factors(modules, "e0", hparams)
    for at, (left, right) in factors.items():
        bound = modules[at].in_features ** -0.5
        assert left.shape == (3, modules[at].in_features)
        assert 0.8 * bound < left.abs().max() <= bound
        assert not right.any()
    first = next(iter(factors))
    assert not torch.equal(factors[first][0], draw_factors(modules, "e1", hparams)[first][0])
    other = draw_factors(modules, "e0", hparams.replace(seed=1))
    assert not torch.equal(factors[first][0], other[first][0])


def test_the_factor_alpha_scales_what_is_learnt(world: World) -> None:
    one = make(world, lora_alpha=1.0, stop_loss=0.0, max_steps=1)
    many = make(world, lora_alpha=4.0, stop_loss=0.0, max_steps=1)
    # Adam's first step is as long whatever the gradient: only the scale differs.
    at = (4, "attention_value")
    torch.testing.assert_close(many.factors[at][1], 4 * one.factors[at][1], atol=1e-4, rtol=1e-2)


def test_a_target_of_another_name_is_one_line() -> None:
    from unike.config.hparams import HyperParams

    with pytest.raises(UserError, match=r"lora_target: expected one of attention, ffn, both, got"):
        HyperParams.from_dict({**BASE, "method": "lora", "lora_target": "query"})
