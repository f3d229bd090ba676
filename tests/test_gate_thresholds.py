"""Which threshold a gate with a trained classifier opens an edit at."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from original_files import FAMILIES
from test_trained_gate import FT, LAYER, make_scope
from worlds import World, query, world_of

from unike.edits import Edit
from unike.edits.gated import SIMILARITY, Gate, GatedEdit, GatedMember, observe_prompts
from unike.knowledge.overlap import NextTokens


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
        (sight,) = observe_prompts(one_world.backbone, [asked.image], [asked.prompt], gated.gate, scope)
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
