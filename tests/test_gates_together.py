"""Gated edits evaluated in batches: each row under its own gate, prompts observed together, kept on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from original_files import FAMILIES
from test_methods import IDS, ROWS
from test_trained_gate import FT, LAYER, make_scope
from worlds import World, case, query, snapshot, world_of

from unike.backbones import next_tokens
from unike.backbones.store import RowStore
from unike.edits.base import EditBatch
from unike.edits.gate import OVERLAP, Gate, make_reader, observe_prompts
from unike.edits.gated import GatedBatch, GatedEdit
from unike.types import Query, TooLongError

each_row = pytest.mark.parametrize("row", ROWS, ids=IDS)
ASKED = [query(0), query(1, prompt="what color is it?"), Query(None, "where is it?"), query(2)]


@pytest.fixture(params=FAMILIES)
def world(request: pytest.FixtureRequest, worlds: dict[str, World], monkeypatch) -> World:
    return world_of(request.param, worlds, monkeypatch)


@pytest.fixture
def one_world(worlds: dict[str, World], monkeypatch) -> World:
    return world_of(FAMILIES[0], worlds, monkeypatch)


def observe(world: World, gate: Gate, asked: list[Query], scope):
    images, prompts = [q.image for q in asked], [q.prompt for q in asked]
    return observe_prompts(world.backbone, images, prompts, gate, make_reader(gate, scope))


# ---------------------------------------------------------------- a batch of gated edits


def batch_two(world: World, row, gate: Gate) -> tuple[list[GatedEdit], EditBatch | None]:
    scope = make_scope(world) if gate.layer is not None else None
    edits = [
        GatedEdit.wrap(world.edit(row, i), case(i).request, gate, world.backbone, scope) for i in range(2)
    ]
    return edits, edits[0].batch(edits)


@each_row
@pytest.mark.parametrize("overlap", [0.0, 0.9, 1.1], ids=["open", "own", "closed"])
def test_each_row_is_answered_as_by_its_own_gated_edit(world: World, row, overlap: float) -> None:
    """Owners in any order; 0.9 opens each edit for its own prompt alone."""
    gate = Gate(overlap, weighs=True)
    edits, together = batch_two(world, row, gate)
    if together is None:
        assert edits[0].members[0].edit.batch([e.members[0].edit for e in edits]) is None
        return
    if row[1].get("ft_target") == "projection":
        assert edits[0].changes_prefix(world.backbone, 1), "such edits are evaluated one by one"
        return
    owners, asked = [1, 0, 0, 1], [query(1), query(1), query(0), query(0)]
    written = [edits[i].rewrite(q) for i, q in zip(owners, asked, strict=True)]
    before, hooks = snapshot(world.backbone)
    with together.applied(world.backbone, torch.tensor(owners)):
        found = world.logits(written)
    decided = together.explain()[OVERLAP]
    base = world.logits(asked)
    changed = 0
    for i, owner in enumerate(owners):
        with edits[owner].applied(world.backbone):
            expected = world.logits([written[i]])[0]
        assert decided[i] == pytest.approx(edits[owner].measured.values[OVERLAP].item())
        torch.testing.assert_close(found[i, : len(expected)], expected, atol=2e-4, rtol=1e-4)
        length = min(len(expected), base.shape[1])
        changed += not torch.allclose(expected[:length], base[i, :length], atol=2e-4, rtol=1e-4)
    assert changed == 0 if overlap > 1 else changed >= 2
    assert snapshot(world.backbone)[1] == hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(world.backbone)[0].items())


def test_edits_behind_unlike_gates_are_no_batch(one_world: World) -> None:
    scopes = [make_scope(one_world), make_scope(one_world, 1)]
    edit = one_world.edit(FT)

    def wrap(gate: Gate, scope=None) -> GatedEdit:
        return GatedEdit.wrap(edit, case(0).request, gate, one_world.backbone, scope)

    one, trained = wrap(Gate(0.5)), Gate(layer=LAYER, similarity=0.0)
    assert isinstance(one.batch([one, wrap(Gate(0.5))]), GatedBatch)
    assert one.batch([one, wrap(Gate(0.6))]) is None
    assert one.batch([one, edit]) is None
    ours = wrap(trained, scopes[0])
    assert isinstance(ours.batch([ours, wrap(trained, scopes[0])]), GatedBatch)
    assert ours.batch([ours, wrap(trained, scopes[1])]) is None
    both = one | GatedEdit.wrap(edit, case(1).request, Gate(0.5), one_world.backbone)
    assert one.batch([one, both]) is None


# ---------------------------------------------------------------- prompts observed together


@pytest.fixture
def kept(one_world: World, tmp_path: Path):
    """Sets how the world's backbone keeps what it observes; as it was, afterwards."""
    sights = one_world.backbone._sights

    def keep(alone: bool, store: bool) -> None:
        sights.forget()
        sights.alone, sights.store = alone, RowStore(tmp_path, "a/sights", 10**9) if store else None

    former = sights.store, sights.alone
    yield keep
    sights.forget()
    sights.store, sights.alone = former


@pytest.mark.parametrize("tokens", [1, 4])
def test_together_prompts_are_seen_as_alone(one_world: World, kept, monkeypatch, tokens: int) -> None:
    gate, scope = Gate(0.5, tokens, layer=LAYER), make_scope(one_world)
    sizes, observe_some = [], next_tokens._observe

    def count(backbone, asked, *rest):
        sizes.append(len(asked))
        return observe_some(backbone, asked, *rest)

    monkeypatch.setattr(next_tokens, "_observe", count)
    monkeypatch.setattr(next_tokens, "TOGETHER", 3)
    # Of equal prompts one is computed.
    asked = [*ASKED, ASKED[0]]
    kept(alone=True, store=False)
    # Answers of several lengths: one prompt's second token ends them.
    ((_, last),) = [one.ids[:2, 0].tolist() for one in observe(one_world, Gate(0.5, 2), ASKED[:1], None)]
    sizes.clear()
    monkeypatch.setattr(one_world.backbone, "ends_answer", lambda token: token == last)
    alone = observe(one_world, gate, asked, scope)
    assert sizes == [1] * 4
    kept(alone=False, store=False)
    together = observe(one_world, gate, asked, scope)
    assert sizes == [1] * 4 + [3, 1]
    for one, other in zip(alone, together, strict=True):
        assert one.ids[:, 0].tolist() == other.ids[:, 0].tolist()
        torch.testing.assert_close(one.probabilities, other.probabilities, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.vector, other.vector, atol=1e-5, rtol=1e-4)
    assert len({tuple(one.ids[0].tolist()) for one in alone}) > 1
    assert len({len(one.ids) for one in alone}) > 1 or tokens == 1


def test_what_was_seen_comes_back_from_disk(one_world: World, kept, monkeypatch) -> None:
    gate, scope = Gate(0.5, 2, layer=LAYER), make_scope(one_world)
    kept(alone=False, store=True)
    first = observe(one_world, gate, ASKED[:2], scope)
    kept(alone=False, store=True)
    asked: list[int] = []
    observe_some = next_tokens._observe
    monkeypatch.setattr(
        next_tokens,
        "_observe",
        lambda b, some, *rest: asked.append(len(some)) or observe_some(b, some, *rest),
    )
    again = observe(one_world, gate, ASKED, scope)
    assert asked == [2], "two of the four were there"
    for one, other in zip(first, again, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    # Another encoder, layer or number of tokens reads something else.
    for other_gate, other_scope in (
        (gate, make_scope(one_world, 1)),
        (Gate(0.5, 2, layer=LAYER - 1), scope),
        (Gate(0.5, 1, layer=LAYER), scope),
    ):
        asked.clear()
        observe(one_world, other_gate, ASKED[:2], other_scope)
        assert asked == [2]


@pytest.mark.parametrize("store", [True, False], ids=["on disk", "in memory"])
def test_what_is_seen_under_a_hook_is_not_kept(one_world: World, kept, store: bool) -> None:
    gate = Gate(0.5)

    def shift(module, inputs, output):
        changed = output[0] if isinstance(output, tuple) else output
        changed.add_(torch.linspace(-3, 3, changed.shape[-1]))
        return output

    kept(alone=False, store=store)
    handle = one_world.backbone.layout.layer(0).register_forward_hook(shift)
    try:
        hooked = observe(one_world, gate, ASKED[:2], None)
    finally:
        handle.remove()
    # Without the hook the same prompts are computed, and kept from then on.
    plain = observe(one_world, gate, ASKED[:2], None)
    for one, other in zip(hooked, plain, strict=True):
        assert not torch.equal(one.probabilities, other.probabilities)
    if store:
        kept(alone=False, store=True)
    again = observe(one_world, gate, ASKED[:2], None)
    assert all(torch.equal(a.probabilities, b.probabilities) for a, b in zip(plain, again, strict=True))
    assert again[0] is plain[0] or store


def test_a_prompt_too_long_fails_alone(one_world: World, kept) -> None:
    kept(alone=False, store=False)
    room = one_world.backbone.context - len(one_world.backbone.tokens("what is it? "))
    long = Query(None, "very " * (room - 1) + "long?")
    with pytest.raises(TooLongError):
        observe(one_world, Gate(0.5, 16), [ASKED[2], long], None)
    assert len(observe(one_world, Gate(0.5, 16), [ASKED[2]], None)) == 1
