"""Asking an edited model: both answers, and what is said of the edits and items that were active."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from worlds import BASE, COLORS, World, query

from unike.backbones.base import Backbone
from unike.backbones.hooks import capture, tape, transform
from unike.config.hparams import HyperParams
from unike.editor import MultimodalEditor
from unike.edits import Edit
from unike.edits.activity import Activity
from unike.edits.base import Inspection
from unike.edits.content import Content, Shared
from unike.edits.explain import EditReport, Explanation, describe_activity
from unike.methods.preparation.knowledge import load_states, save_items, save_knowledge
from unike.types import UserError

PROMPT = query(0).prompt
TPATCHER = ("tpatcher", {"activation_loss": 0.1})


@pytest.fixture
def editor(world: World) -> Iterator[MultimodalEditor]:
    made = MultimodalEditor(HyperParams.from_dict(BASE), world.backbone, progress=False)
    yield made
    made._slot.put(())


def asked_under(editor: MultimodalEditor, *edits: Edit, i: int = 0, top: int = 5) -> Explanation:
    editor._slot.put(())
    for edit in edits:
        editor.attach(edit)
    return editor.ask(query(i).image, PROMPT, top)


def only(asked: Explanation) -> EditReport:
    (active,) = asked.edits
    return active


# ---------------------------------------------------------------- answers


def test_both_answers_are_those_of_the_two_models(world: World, editor: MultimodalEditor) -> None:
    image, edit = query(0).image, world.edit(("unike", {}))
    base = editor.generate(image, PROMPT)
    nothing = editor.ask(image, PROMPT)
    assert (nothing.before, nothing.after, nothing.edits, nothing.layers) == (base, base, (), ())
    asked = asked_under(editor, edit)
    assert asked.before == base
    assert asked.after == editor.generate(image, PROMPT, edited=True) != base
    assert editor.generate(image, PROMPT) == base
    assert editor.edits == (edit,)
    assert json.loads(json.dumps(asked.to_dict()))["after"] == asked.after


# ---------------------------------------------------------------- routed edits


def test_retrieved_items_are_named(world: World, editor: MultimodalEditor) -> None:
    edit = world.edit(("unike", {}))
    asked = asked_under(editor, edit)
    assert [layer.layer for layer in asked.layers] == edit.layers
    for layer in asked.layers:
        assert layer.alpha == pytest.approx(edit.trace[layer.layer].alpha.item())
        assert layer.retrieved == len(layer.items) == BASE["k"]
        assert sum(item.weight for item in layer.items) == pytest.approx(1, abs=1e-5)
        assert [i.weight for i in layer.items] == sorted((i.weight for i in layer.items), reverse=True)
    (own,) = [item for item in asked.layers[0].items if item.edit is not None]
    assert (own.edit, own.place, own.prompt, own.answer) == ("e0", 0, PROMPT, "a fox")
    assert own.similarity == pytest.approx(1, abs=1e-4)
    others = [item for item in asked.layers[0].items if item.edit is None]
    assert all((item.prompt, item.answer) == (PROMPT, "two dogs") for item in others)
    assert all(0 <= item.place < len(COLORS) for item in others)
    elsewhere = asked_under(editor, edit, i=3)
    assert elsewhere.layers[0].items != asked.layers[0].items
    assert len(asked_under(editor, edit, top=1).layers[0].items) == 1


def test_extra_pairs_are_told_by_what_they_add(world: World, editor: MultimodalEditor) -> None:
    """In the first edited layer nothing else differs: what is added is the difference of the outputs."""
    edit, backbone = world.edit(TPATCHER), world.backbone
    first, asked = edit.layers[0], asked_under(editor, edit)
    batch = backbone.encode([query(0).image], [PROMPT])

    @torch.no_grad()
    def left() -> torch.Tensor:
        with tape({0: backbone.layout.ffn(first).value}) as seen:
            backbone(batch)
        return seen[0].outputs.reshape(-1, seen[0].outputs.shape[-1])[int(batch.question_end[0])].clone()

    edited = left()
    editor.detach("e0")
    with capture({0: backbone.layout.ffn(first).keys[0]}) as entered, torch.no_grad():
        backbone(batch)
    patch = edit.records[0].layers[first].patch
    state = entered[0].reshape(-1, entered[0].shape[-1])[int(batch.question_end[0])]
    scores = state @ patch.keys + (0 if patch.bias is None else patch.bias)
    fired = patch.activation(scores) * (1 if patch.up is None else state @ patch.up)
    added = (edited - left()).norm() / edited.norm()
    neurons = only(asked).neurons
    assert [n.layer for n in neurons] == edit.layers
    assert neurons[0].share == pytest.approx(added.item(), rel=1e-3)
    assert neurons[0].share > 0
    assert neurons[0].firing == int((scores > 0).sum())
    assert neurons[0].strongest == pytest.approx(fired.abs().max().item(), rel=1e-4)
    assert all(0 <= n.firing <= n.count == BASE["n_keys"] for n in neurons)
    assert asked.layers == (), "T-Patcher retrieves nothing"


def test_a_gate_says_how_near_each_edit_is(world: World, editor: MultimodalEditor) -> None:
    row = ("unike", {"scope_gate": "nearest", "scope_threshold": 0.9})
    edits = [world.edit(row, 0), world.edit(row, 3)]
    asked = asked_under(editor, *edits)
    assert [e.active for e in asked.edits] == [True, False]
    assert asked.edits[0].scope == pytest.approx(1, abs=1e-4)
    assert asked.edits[1].scope < asked.edits[0].scope
    assert asked.gates == {"cosine": 0.9}
    assert [e.active for e in asked_under(editor, *edits, i=3).edits] == [False, True]


# ---------------------------------------------------------------- the other methods


def test_changed_weights_are_told_by_their_norm(world: World, editor: MultimodalEditor) -> None:
    row = ("ft", {"layers": 1})
    one, other = world.edit(row, 0), world.edit(row, 1)
    asked = asked_under(editor, one, other)
    assert [e.active for e in asked.edits] == [False, True], "the later values hold"
    told = only(asked_under(editor, one)).weights
    editor.detach(one.id)
    base = world.backbone.model.state_dict()
    assert [moved.name for moved in told] == list(one.weights)
    for moved in told:
        own, change = base[moved.name].norm(), (one.weights[moved.name] - base[moved.name]).norm()
        assert moved.norm == pytest.approx(change.item(), rel=1e-4, abs=1e-6)
        assert (moved.share is None) == (not own)
        assert moved.share is None or moved.share == pytest.approx((change / own).item(), rel=1e-4, abs=1e-6)
    assert max(moved.norm for moved in told) > 0


def test_factors_are_told_by_the_norm_of_their_product(world: World, editor: MultimodalEditor) -> None:
    edit = world.edit(("mend", {}))
    told = {moved.name: moved for moved in only(asked_under(editor, edit)).weights}
    for (i, role), (left, right) in edit.factors.items():
        wanted = (right.double().T @ left.double()).norm().item()
        assert told[f"{i}.{role}"].norm == pytest.approx(wanted, rel=1e-4)


def test_seracs_probability_and_ikes_texts_are_told(world: World, editor: MultimodalEditor) -> None:
    serac = world.edit(("serac", {"serac_scope": "multimodal"}))
    own = only(asked_under(editor, serac))
    assert own.scope == pytest.approx(serac.scopes.item())
    assert own.active == (own.scope > 0.5)
    assert own.method == "serac"
    asked = asked_under(editor, world.edit(("ike", {"ike_retriever": "states", "ike_demonstrations": 2})))
    assert only(asked).shown
    assert all(text in asked.asked for text in only(asked).shown)
    assert asked.asked.endswith(f"Prompt: {PROMPT}")


def test_edits_of_all_kinds_are_told_in_their_order(world: World, editor: MultimodalEditor) -> None:
    rows = [("unike", {}), ("ft", {"layers": 1}), ("ke", {}), ("serac", {"serac_scope": "multimodal"})]
    edits = [world.edit(row, i) for i, row in enumerate(rows)]
    asked = asked_under(editor, *edits)
    assert [(e.id, e.method) for e in asked.edits] == [(f"e{i}", row[0]) for i, row in enumerate(rows)]


class OwnKind(Edit):
    """A kind of edit that somebody else wrote: all states of the last layer, moved a little."""

    kind = "own"

    def __init__(self, name: str, by: float) -> None:
        self.id, self.by, self.info = name, by, {}

    @contextmanager
    def applied(self, backbone: Backbone) -> Iterator[None]:
        last = backbone.layout.layer(len(backbone.layout) - 1)
        with transform([(last, last, lambda _, output: output + self.by)]):
            yield

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def joined(self, other: Edit) -> Edit | None:
        return None

    def packed(self) -> Content:
        return Content({}, {})

    @classmethod
    def unpacked(cls, content: Content, backbone: Backbone, shared: Shared) -> Edit:
        return cls("mine", 0.0)


class TalkingKind(OwnKind):
    """It says what it did."""

    kind = "talking"

    def describe_prompt(self, inspection: Inspection) -> tuple[Activity, ...]:
        return (Activity(self.by > 1, scope=0.25, notes=(f"moved by {self.by}",)),)


def test_a_kind_of_ones_own_is_reported_too(world: World, editor: MultimodalEditor) -> None:
    """What it did is unknown unless it says so; the edits beside it are reported as ever."""
    edits = [
        OwnKind("mute", 2.0),
        world.edit(("unike", {})),
        TalkingKind("loud", 2.0),
        TalkingKind("low", 0.5),
    ]
    asked = asked_under(editor, *edits)
    assert [e.id for e in asked.edits] == ["mute", "e0", "loud", "low"]
    mute, unike, loud, low = asked.edits
    assert (mute.active, mute.method, mute.scope) == (True, None, None)
    assert describe_activity(mute) == "active, unknown: this kind of edit does not say what it did"
    assert describe_activity(loud) == "moved by 2.0"
    assert describe_activity(low) == "inactive\nmoved by 0.5"
    assert (loud.active, low.active, low.scope) == (True, False, 0.25)
    assert unike.neurons
    assert asked.layers
    assert asked.to_dict()["edits"][0]["notes"] == mute.notes


def test_two_scope_classifiers_have_a_gate_each(world: World, editor: MultimodalEditor) -> None:
    row = ("unike", {"scope_gate": "nearest", "scope_threshold": 0.9})
    one, other = world.edit(row, 0), world.edit(row, 3)
    other.routing = replace(other.routing, scope_threshold=0.8)
    asked = asked_under(editor, one, other)
    assert asked.gates == {"cosine": 0.9, "cosine 2": 0.8}
    assert asked.edits[0].scope == pytest.approx(1, abs=1e-4)


# ---------------------------------------------------------------- what items are of


def test_texts_of_items_are_kept_beside_their_states(world: World, tmp_path: Path) -> None:
    states, encoders, reports = world.built
    save_knowledge(tmp_path, states, encoders, reports, {"layers": [4, 5]})
    read, _ = load_states(tmp_path, torch.device("cpu"))
    assert read[4].items == states[4].items
    assert len(read[4].items) == len(COLORS)
    save_items(tmp_path, states[4].items[1:])
    with pytest.raises(UserError, match=r"items\.jsonl has 5 lines for 6 items"):
        load_states(tmp_path, torch.device("cpu"))
    save_items(tmp_path, ())
    assert load_states(tmp_path, torch.device("cpu"))[0][4].items == ()
