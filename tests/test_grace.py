"""GRACE against slow references: the codebook's rule in plain floats, its training, BalancEdit's radius."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from PIL import Image
from worlds import BASE, World, case, query

from unike.backbones.base import answer_loss
from unike.backbones.hooks import capture, transform
from unike.config.hparams import HyperParams
from unike.edits import CodebookEdit, CodebookEntry, compose
from unike.methods import build
from unike.methods.grace import balance_radius, paint_black
from unike.types import EditRequest, Query, UserError

ROW = ("grace", {"layers": [4], "lr": 0.1, "grace_init": "warm"})


def entry(number: int, key: list[float], target: str = "a", radius: float = 1.0) -> CodebookEntry:
    return CodebookEntry(f"e{number}", target, torch.tensor(key), torch.tensor([float(number)]), radius)


def fold(entries: list[CodebookEntry]) -> list[list]:
    """The codebook in lists of floats: ``[key, value, radius, target]`` each."""
    balls: list[list] = []
    for new in entries:
        key, value = new.key.tolist(), new.value.tolist()
        distances = [math.dist(key, ball[0]) for ball in balls]
        nearest = min(range(len(balls)), key=lambda i: (distances[i], -i), default=None)
        if nearest is None or distances[nearest] > new.radius + balls[nearest][2]:
            balls.append([key, value, new.radius, new.target])
        elif balls[nearest][3] == new.target:
            balls[nearest][1] = value
            balls[nearest][2] = max(balls[nearest][2], distances[nearest])
        else:
            balls[nearest][2] = distances[nearest] / 2
            balls.append([key, value, distances[nearest] / 2, new.target])
    return balls


def look_up(balls: list[list], state: list[float]) -> list[float] | None:
    distances = [math.dist(state, ball[0]) for ball in balls]
    nearest = min(range(len(balls)), key=lambda i: (distances[i], -i))
    return balls[nearest][1] if distances[nearest] <= balls[nearest][2] else None


@pytest.mark.parametrize("seed", range(5))
def test_the_codebook_is_that_of_a_slow_reference(seed: int) -> None:
    drawn = random.Random(seed)
    entries = [
        entry(n, [drawn.uniform(0, 4) for _ in range(3)], drawn.choice("ab"), drawn.uniform(0.2, 1.5))
        for n in range(30)
    ]
    at_once = CodebookEdit(tuple(entries), 0)
    one_by_one = CodebookEdit(tuple(entries[:1]), 0)
    for new in entries[1:]:
        one_by_one = one_by_one.join(CodebookEdit((new,), 0))
    wanted = fold(entries)
    assert 1 < len(wanted) < 30
    for edit in (at_once, one_by_one):
        for ball, (key, value, radius, target) in zip(edit.balls, wanted, strict=True):
            assert (ball.key.tolist(), ball.value.tolist(), ball.target) == (key, value, target)
            assert ball.radius == pytest.approx(radius, rel=1e-5)
        asked = [[drawn.uniform(0, 4) for _ in range(3)] for _ in range(200)]
        chosen, values = edit.choose(torch.tensor(asked))
        found = [v if c else None for c, v in zip(chosen.tolist(), values.tolist(), strict=True)]
        assert found == [look_up(wanted, state) for state in asked]
        assert 20 < sum(chosen.tolist()) < 200


def test_edits_that_meet_expand_or_split_and_come_back_when_one_is_gone() -> None:
    near, agrees = entry(0, [0.0, 0.0]), entry(1, [1.5, 0.0])
    disagrees, far = entry(2, [1.5, 0.0], "b"), entry(3, [2.5, 0.0], "b")
    assert [b.radius for b in CodebookEdit((near, agrees), 0).balls] == [1.5]
    assert CodebookEdit((near, agrees), 0).balls[0].value.tolist() == [1.0]
    assert [b.radius for b in CodebookEdit((near, disagrees), 0).balls] == [0.75, 0.75]
    assert [b.radius for b in CodebookEdit((near, far), 0).balls] == [1.0, 1.0]
    both = CodebookEdit((near, disagrees), 0)
    left = both.keep_units(both.units[:1])
    assert [b.radius for b in left.balls] == [1.0]


def test_of_two_equal_keys_the_newest_answers() -> None:
    edit = CodebookEdit((entry(0, [1.0, 1.0]), entry(1, [1.0, 1.0], "b")), 0)
    chosen, values = edit.choose(torch.tensor([[1.0, 1.0]]))
    assert (chosen.tolist(), values.tolist()) == ([True], [[1.0]])


def test_the_value_stands_at_the_prompts_end_and_nowhere_else(world: World) -> None:
    backbone, edit = world.backbone, world.edit(ROW)
    state = world.prefixes(world.method(*ROW)).state([query(0)])
    module, seen = backbone.layout.ffn(4).value, []

    def see(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.reshape(*state.labels.shape, -1)[0])
        return output

    with torch.no_grad():
        with transform([(module, module, see)]):
            backbone.suffix(state)
        with edit.applied(backbone), transform([(module, module, see)]):
            backbone.suffix(state)
    base, edited = seen
    end = int(state.question_end)
    torch.testing.assert_close(edited[end], edit.entries[0].value)
    assert not torch.allclose(edited[end], base[end])
    others = torch.arange(len(base)) != end
    assert torch.equal(edited[others], base[others])


def test_outside_the_radius_the_base_answers_bit_for_bit(world: World) -> None:
    edit = world.edit(ROW)
    asked = [Query(None, "where is it?", "there")]
    base = world.logits(asked)
    with edit.applied(world.backbone):
        assert torch.equal(world.logits(asked), base)
    distance = edit.explain()["distance"][0]
    wide = CodebookEdit((replace(edit.entries[0], radius=distance * 1.01),), edit.layer)
    with wide.applied(world.backbone):
        assert not torch.equal(world.logits(asked), base)


def test_training_is_that_of_a_slow_reference(world: World) -> None:
    """Four steps of Adam on the value, which a hook of the test's own puts in its place."""
    steps, backbone = 4, world.backbone
    edit = world.edit((ROW[0], ROW[1] | {"stop_loss": 0.0, "max_steps": steps, "clip_norm": 1e9}))
    state = world.prefixes(world.method(*ROW)).state([query(0)])
    module, end = backbone.layout.ffn(4).value, int(state.question_end)
    with torch.no_grad(), capture({0: module}) as seen:
        backbone.suffix(state)
    key = seen[0].reshape(*state.labels.shape, -1)[0, end]
    torch.testing.assert_close(edit.entries[0].key, key, atol=1e-5, rtol=1e-5)
    value = module(key[None])[0].detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([value], lr=0.1)

    def put(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        rows = list(output.reshape(-1, output.shape[-1]).unbind())
        rows[end] = value
        return torch.stack(rows).reshape(output.shape)

    for _ in range(steps):
        with transform([(module, module, put)]):
            loss = answer_loss(backbone.suffix(state), state.labels).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.testing.assert_close(edit.entries[0].value, value.detach(), atol=1e-3, rtol=1e-3)
    assert (value.detach() - module(key[None])[0]).abs().max() > 0.1


def test_a_balanced_radius_lies_between_both_distances(world: World) -> None:
    changes = {"grace_radius": "balanced", "grace_balance": 0.25, "grace_rephrase": "now, {}"}
    edit = world.edit((ROW[0], ROW[1] | changes))
    module, keys = world.backbone.layout.ffn(4).value, []
    prefixes = world.prefixes(world.method(*ROW))
    own = query(0, None)
    for asked in (own, replace(own, prompt="now, what is it?"), replace(own, image=paint_black(own.image))):
        state = prefixes.state([asked])
        with torch.no_grad(), capture({0: module}) as seen:
            world.backbone.suffix(state)
        keys.append(seen[0].reshape(*state.labels.shape, -1)[0, int(state.question_end)].tolist())
    near, far = math.dist(keys[0], keys[1]), math.dist(keys[0], keys[2])
    assert edit.entries[0].radius == pytest.approx(0.75 * near + 0.25 * far, rel=1e-3)
    assert edit.info["radius"] == edit.entries[0].radius != 1.0
    assert balance_radius(2.0, 10.0, 0.1) == pytest.approx(2.8)
    # Without an image there is no black one.
    method = world.method(ROW[0], ROW[1] | changes)
    text = method.edit(world.backbone, EditRequest("t", Query(None, "where?", "here")), prefixes)
    assert text.entries[0].radius == 1.0


def test_a_black_image_has_the_size_of_the_edits_own() -> None:
    black = paint_black(Image.new("RGB", (30, 20), "teal"))
    assert (black.size, black.getextrema()) == ((30, 20), ((0, 0),) * 3)


def test_an_edit_that_agrees_goes_on_from_the_former_value(world: World) -> None:
    """As published: the nearest ball of the same target expands, and its value is trained on."""
    slow = {"stop_loss": 0.0, "max_steps": 1, "lr": 1e-6, "grace_eps": 1e3}
    first = world.edit((ROW[0], ROW[1] | {"grace_eps": 1e3}), 0)
    second = world.edit((ROW[0], ROW[1] | slow), 1, first)
    alone = world.edit((ROW[0], ROW[1] | slow), 1)
    torch.testing.assert_close(second.entries[0].value, first.entries[0].value, atol=1e-4, rtol=0)
    assert not torch.allclose(alone.entries[0].value, first.entries[0].value, atol=1e-2)
    (ball,) = compose([first, second]).balls
    assert ball.places == (0, 1)
    other = EditRequest("o", query(1, "two dogs"))
    method = world.method(ROW[0], ROW[1] | slow)
    apart = method.edit(world.backbone, other, world.prefixes(method), first)
    assert not torch.allclose(apart.entries[0].value, first.entries[0].value, atol=1e-2)
    assert len((first | apart).balls) == 2


def test_values_start_warm_or_cold(world: World) -> None:
    slow = {"stop_loss": 0.0, "max_steps": 1, "lr": 1e-6}
    cold = world.edit((ROW[0], ROW[1] | slow | {"grace_init": "cold"})).entries[0]
    warm = world.edit((ROW[0], ROW[1] | slow)).entries[0]
    assert 0 <= cold.value.min() + 1e-5 < 0.2
    assert 0.8 < cold.value.max() <= 1 + 1e-5
    own = world.backbone.layout.ffn(4).value(warm.key[None])[0]
    torch.testing.assert_close(warm.value, own.detach(), atol=1e-4, rtol=1e-4)
    assert cold.value.shape == warm.value.shape


def test_a_yaml_that_cannot_work_is_one_line_before_a_model_is_loaded() -> None:
    own = {**BASE, "method": "grace"}
    with pytest.raises(UserError, match=r"layers: 2; method: grace edits one layer"):
        build(HyperParams.from_dict(own))
    with pytest.raises(UserError, match=r"grace_rephrase: 'x'; expected a text with one \{\}"):
        build(HyperParams.from_dict({**own, "layers": 1, "grace_radius": "balanced", "grace_rephrase": "x"}))
    build(HyperParams.from_dict({**own, "layers": 1, "grace_rephrase": "x"}))


def test_an_edit_says_how_far_a_prompt_is_from_its_key(world: World) -> None:
    edit = world.edit(ROW)
    with edit.applied(world.backbone):
        world.logits([query(0)])
    assert edit.explain()["distance"] == pytest.approx([0.0], abs=1e-3)
    assert edit.chosen.tolist() == [0]
    assert case(0).request.query.target == edit.entries[0].target
