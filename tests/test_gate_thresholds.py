"""Which threshold a gate with a trained classifier opens an edit at, and how much of it then applies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from original_files import FAMILIES
from test_trained_gate import FT, LAYER, make_scope
from worlds import World, case, query, world_of

from unike.edits import Edit
from unike.edits.gate import OVERLAP, SIMILARITY, Gate, observe_prompts
from unike.edits.gated import GatedEdit, GatedMember
from unike.knowledge.overlap import NextTokens
from unike.types import Query


@pytest.fixture
def one_world(worlds: dict[str, World], monkeypatch) -> World:
    return world_of(FAMILIES[0], worlds, monkeypatch)


def make_member(number: int, share: float, width: int, edit: Edit) -> GatedMember:
    """An edit whose two most probable answers take this share, at a place of its own."""
    ids = torch.arange(4)[None]
    rest = (1 - share) / 2
    probabilities = torch.tensor([[share * 0.6, share * 0.4, rest, rest]])
    vector = torch.nn.functional.normalize(
        torch.randn(width, generator=torch.Generator().manual_seed(number)), dim=0
    )
    return GatedMember(f"e{number}", edit, NextTokens(ids, probabilities), vector)


@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("given", [None, 0.25])
@pytest.mark.parametrize("recall", [None, 0.5])
def test_each_edit_opens_by_the_threshold_of_its_kind(one_world: World, count: int, given, recall) -> None:
    passing = {"many": (-0.6, 0.0, 0.4), "few": (0.0, 0.5, 0.9)}
    scope = replace(make_scope(one_world, 0, {1: -0.5, 10: 0.1}), passing=passing)
    shares = [(0.99, 0.5, 0.98)[i % 3] for i in range(count)]
    width, edit = scope.encoder.width, one_world.edit(FT)
    members = [make_member(i, share, width, edit) for i, share in enumerate(shares)]
    gate = Gate(layer=LAYER, similarity=given, recall=recall, recall_few=recall)
    gated = GatedEdit(members, gate, one_world.backbone, scope)
    seen = set()
    for number in range(4):
        asked = query(number)
        gated.choose([asked.image], [asked.prompt])
        seen_as = one_world.backbone, [asked.image], [asked.prompt]
        (sight,) = observe_prompts(*seen_as, gated.gate, gated.reader)
        for i, (member, share) in enumerate(zip(members, shares, strict=True)):
            own = {1: -0.5, 12: 0.1}.get(count)
            if own is None:
                own = -0.5 + 0.6 * torch.log10(torch.tensor(3.0)).item()
            passed = passing["few" if share >= 0.98 else "many"][1]
            least = given if given is not None else own if recall is None else passed
            expected = float(sight.vector @ member.vector) >= least
            assert bool(gated.measured.open[0, i]) == expected
            seen.add((share >= 0.98, expected))
    assert {open_ for _, open_ in seen} == {True, False} or count < 12
    least = given if given is not None else scope.find_threshold(count)
    if given is None and recall is not None:
        least = scope.find_passed(recall, members[-1].key.are_few)
    assert gated.gates == {SIMILARITY: pytest.approx(least)}


# ---------------------------------------------------------------- alpha and overlap


@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_is_multiplied_by_the_overlap(family: str, worlds: dict[str, World], monkeypatch) -> None:
    """Each row against the same edit with a fixed alpha, made smaller by hand."""
    world, alpha = world_of(family, worlds, monkeypatch), 0.8
    edit = world.edit(("unike", {"memory": "edit", "zeta": "none", "alpha": alpha}))
    asked = [query(0), query(1), Query(None, "where is it?", "there")]
    gates = [Gate(0.0, weighs=weighs) for weighs in (True, False)]
    weighed, plain = (GatedEdit.wrap(edit, case(0).request, gate, world.backbone) for gate in gates)
    with weighed.applied(world.backbone):
        found = world.logits(asked)
    overlaps = weighed.measured.values[OVERLAP][:, 0].tolist()
    assert len({round(value, 3) for value in overlaps}) > 1
    with plain.applied(world.backbone):
        whole = world.logits(asked)
    for i, overlap in enumerate(overlaps):
        own = replace(edit, routing=replace(edit.routing, alpha=alpha * overlap))
        with own.applied(world.backbone):
            expected = world.logits([asked[i]])[0]
        length = len(expected)
        torch.testing.assert_close(found[i, :length], expected, atol=1e-4, rtol=1e-4)
        if overlap < 0.99:
            assert not torch.allclose(whole[i, :length], expected, atol=1e-4, rtol=1e-4)
    assert world.backbone.prompt.weights is None


def test_weights_are_those_of_each_prompts_own_rows(one_world: World) -> None:
    prompt, weights = one_world.backbone.prompt, torch.tensor([0.5, 1.0])
    with prompt.weigh(weights):
        assert prompt.spread_weights(2).tolist() == [0.5, 1.0]
        # As many rows for a prompt as there are beams.
        assert prompt.spread_weights(4).tolist() == [0.5, 0.5, 1.0, 1.0]
        for rows in (1, 3):
            with pytest.raises(ValueError, match=f"{rows} rows for 2 weights"):
                prompt.spread_weights(rows)
    assert prompt.spread_weights(3) is None
