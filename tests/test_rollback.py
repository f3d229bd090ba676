"""Edits of all methods attached and taken back in any order: what is left is what was never touched."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from test_methods import ROWS
from untouched import assert_untouched
from worlds import BASE, COLORS, World, case, load_small, query, snapshot

from unike.backbones.base import encode_queries
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.editor import MultimodalEditor
from unike.edits import Edit, EditRecord, LayerShare, RoutedEdit, compose
from unike.edits.routed import RecordStacks
from unike.knowledge.patch import KeyValuePatch
from unike.types import Query, UserError

ANSWERS = ("a fox", "two dogs", "the sea", "green", "a red fox")
ASKED = [query(0), query(3, "two dogs"), Query(None, "where is it?", "there")]


@pytest.fixture
def editor(world: World) -> MultimodalEditor:
    return MultimodalEditor(HyperParams.from_dict(BASE), world.backbone, progress=False)


def crowd(world: World, count: int) -> list[Edit]:
    """Edits of all ways of all methods in turn, each made from the base model, with an id of its own."""
    methods = [world.method(*row) for row in ROWS]
    prefixes = [world.prefixes(method) for method in methods]
    edits = []
    for n in range(count):
        request = case(n % len(COLORS), ANSWERS[n % len(ANSWERS)]).request
        method = methods[n % len(ROWS)]
        made = method.edit(world.backbone, replace(request, id=f"e{n}"), prefixes[n % len(ROWS)])
        edits.append(made)
    return edits


@torch.no_grad()
def logits(backbone: VisionLanguageBackbone, whole: Edit | None) -> list[torch.Tensor]:
    """One query at a time: what an edit puts before the prompt would need padding."""
    asked = ASKED if whole is None else [whole.rewrite(q) for q in ASKED]
    return [backbone(encode_queries(backbone, [q])).logits for q in asked]


@torch.no_grad()
def of_fresh_model(fresh: VisionLanguageBackbone, edits: Sequence[Edit]) -> list[torch.Tensor]:
    whole = compose(edits)
    if whole is None:
        return logits(fresh, None)
    with whole.applied(fresh):
        return logits(fresh, whole)


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def wander(
    world: World, editor: MultimodalEditor, edits: Sequence[Edit], operations: int, every: int, clear: int
) -> None:
    """Random attaching and detaching. A model that never carried anything else is asked at every ``every``
    operations, and everything is taken back at every ``clear``."""
    fresh = load_small(world.family)
    fresh.max_new_tokens = world.backbone.max_new_tokens
    before, hooks = snapshot(world.backbone)
    base, chooser, seen = logits(world.backbone, None), random.Random(0), set()
    attached: list[Edit] = []
    for n in range(1, operations + 1):
        out = [edit for edit in edits if edit not in attached]
        if out and (not attached or chooser.random() < 0.55):
            attached.append(chooser.choice(out))
            editor.attach(attached[-1])
        else:
            gone = attached.pop(chooser.randrange(len(attached)))
            assert editor.detach(gone.id) is gone
        if n % clear == 0:
            chooser.shuffle(attached)
            while attached:
                editor.detach(attached.pop().id)
        assert [e.id for e in editor.edits] == [e.id for e in attached]
        if not attached:
            assert_untouched(world.backbone, before, hooks)
            assert same(logits(world.backbone, None), base)
        elif n % every == 0:
            found = logits(world.backbone, editor._slot.whole)
            assert all(t.isfinite().all() for t in found)
            assert same(found, of_fresh_model(fresh, attached)), [e.id for e in attached]
            assert not same(found, base)
            seen.add(frozenset(e.id for e in attached))
    assert len(seen) > operations // every // 2
    for edit in attached:
        editor.detach(edit.id)
    assert_untouched(world.backbone, before, hooks)


def test_any_subset_answers_as_a_fresh_model_with_it(world: World, editor: MultimodalEditor) -> None:
    wander(world, editor, crowd(world, len(ROWS)), operations=40, every=4, clear=20)


@pytest.mark.slow
def test_a_thousand_operations_leave_nothing_behind(world: World, editor: MultimodalEditor) -> None:
    wander(world, editor, crowd(world, 50), operations=1000, every=25, clear=100)


# ---------------------------------------------------------------- many edits


def many(edit: RoutedEdit, count: int) -> list[RoutedEdit]:
    """Edits of one kind whose tensors are drawn around one that was trained."""
    generator = torch.Generator().manual_seed(0)

    def near(tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=generator)
        return tensor.detach() + 0.05 * noise * tensor.detach().std().nan_to_num()

    (record,), out = edit.records, []
    for n in range(count):
        layers = {}
        for i, share in record.layers.items():
            old = share.patch
            assert old is not None
            width, pairs = old.keys.shape
            patch = KeyValuePatch(width, pairs, old.activation, old.gated, old.zeta, old.beta)
            patch.load_state_dict({name: near(t) for name, t in old.state_dict().items()})
            layers[i] = LayerShare(near(share.key), near(share.value), patch.requires_grad_(False))
        one = replace(edit, records=(EditRecord(f"m{n}", layers),))
        one.id = f"m{n}"
        out.append(one)
    return out


def removed(world: World, editor: MultimodalEditor, count: int, place: int) -> None:
    edits = many(world.edit(("unike", {})), count)
    before, hooks = snapshot(world.backbone)
    for edit in edits:
        editor.attach(edit)
    everything = logits(world.backbone, editor._slot.whole)
    editor.detach(f"m{place}")
    fresh = load_small(world.family)
    left = logits(world.backbone, editor._slot.whole)
    assert same(left, of_fresh_model(fresh, edits[:place] + edits[place + 1 :]))
    assert not same(left, everything)
    editor._slot.put(())
    assert_untouched(world.backbone, before, hooks)


def test_one_of_a_few_is_as_if_it_had_never_been(world: World, editor: MultimodalEditor) -> None:
    removed(world, editor, 9, 4)


@pytest.mark.slow
def test_one_of_a_thousand_and_one_is_as_if_it_had_never_been(world: World, editor: MultimodalEditor) -> None:
    removed(world, editor, 1001, 500)


def test_attaching_one_more_builds_nothing_anew(
    world: World, editor: MultimodalEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = many(world.edit(("unike", {})), 6)
    built = []
    make = RecordStacks.__init__
    monkeypatch.setattr(RecordStacks, "__init__", lambda self, r: (built.append(len(r)), make(self, r))[1])
    for edit in edits:
        editor.attach(edit)
    assert built == [1], "the first alone; the others are added to it"
    editor.generate(None, "what is it?")
    assert built == [1], "asking the base model takes nothing apart"
    editor.detach("m2")
    editor.attach(edits[2])
    assert [e.id for e in editor.edits] == ["m0", "m1", "m3", "m4", "m5", "m2"]
    editor._slot.put(())


# ---------------------------------------------------------------- what is refused


def test_what_cannot_be_attached_or_detached_changes_nothing(world: World, editor: MultimodalEditor) -> None:
    edit, other = world.edit(("unike", {})), world.edit(("ft", {"layers": 1}), 1)
    broken = world.edit(("ft", {"layers": 1}), 2)
    editor.attach(edit)
    whole = logits(world.backbone, editor._slot.whole)
    with pytest.raises(UserError, match="edit e0: is attached already"):
        editor.attach(edit)
    with pytest.raises(UserError, match=r"edit e: is not attached; did you mean 'e0'\?"):
        editor.detach("e")
    other.origins = tuple(replace(origin, backbone="another") for origin in other.origins)
    with pytest.raises(UserError, match="edit e1: was made on another backbone"):
        editor.attach(other)
    broken.weights["nowhere.weight"] = torch.zeros(1)
    with pytest.raises(AttributeError):
        editor.attach(broken)
    assert editor.edits == (edit,)
    assert same(logits(world.backbone, editor._slot.whole), whole)
    editor.detach("e0")
    assert editor.edits == ()


def test_the_order_is_kept_and_the_last_weights_hold(world: World, editor: MultimodalEditor) -> None:
    row = ("ft", {"layers": 1})
    one, other, patch = world.edit(row, 0), world.edit(row, 1), world.edit(("unike", {}), 2)
    alone = {e.id: of_fresh_model(world.backbone, [e]) for e in (one, other)}
    for edit in (one, patch, other):
        editor.attach(edit)
    assert [e.id for e in editor.edits] == ["e0", "e2", "e1"]
    editor.detach("e2")
    assert same(logits(world.backbone, editor._slot.whole), alone["e1"])
    editor.detach("e1")
    assert same(logits(world.backbone, editor._slot.whole), alone["e0"])
    editor.detach("e0")


def test_edits_of_other_settings_stay_apart(world: World) -> None:
    """One adapter must not speak with another one's settings."""
    settings = [("unike", {}), ("tpatcher", {"activation_loss": 0.1}), ("unike", {"k": 2}), ("unike", {})]
    whole = compose([world.edit(row, i) for i, row in enumerate(settings)])
    assert whole is not None
    assert [[r.id for r in part.records] for part in whole.parts] == [["e0", "e3"], ["e1"], ["e2"]]
