"""A later correction takes effect: of two edits of one question and image the last one made or attached
answers, whatever the method, and the contradiction is reported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Project
from worlds import SETTINGS, World, case, query

from unike.config.hparams import HyperParams
from unike.editor import MultimodalEditor
from unike.edits import Edit, EditStore, LowRankDelta, Mixed, compose
from unike.edits import __main__ as command
from unike.edits.conflicts import leave_out_contradicted, list_contradictions
from unike.evaluation.protocols import run_sequence
from unike.evaluation.reader import Reader
from unike.methods.base import EditMethod
from unike.types import Case, EditRequest, Query, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SCOPED = {"scope_gate": "nearest", "scope_threshold": 0.5, "scope_halves": "both"}
ROWS: list[tuple[str, dict[str, Any]]] = [
    *((name, row) for name, rows in SETTINGS.items() for row in rows),
    ("unike", SCOPED),
    ("unike", {"external": "prompt", "beta": 0.0}),
    ("serac", {"serac_scope": "text"}),
]
NAMES = [f"{name}-{'-'.join(map(str, row.values()))}" for name, row in ROWS]
each_method = pytest.mark.parametrize("row", ROWS, ids=NAMES)
FIRST, LATER = "two dogs", "a fox"
PROMPT = "Question: what is it? Short answer:"


def request(name: str, answer: str, i: int = 0, prompt: str = "what is it?") -> EditRequest:
    return EditRequest(name, query(i, answer, prompt))


LEARNT: dict[tuple[str, str], EditMethod] = {}


def learn(world: World, row: tuple[str, dict]) -> EditMethod:
    """The row's method; SERAC's two scopes are trained apart."""
    at = world.family, str(row)
    if at not in LEARNT:
        former = world.learnt.pop(row[0], None)
        LEARNT[at] = world.method(*row)
        world.learnt.pop(row[0], None)
        if former is not None:
            world.learnt[row[0]] = former
    return LEARNT[at]


def make(world: World, row: tuple[str, dict], wanted: EditRequest, history: Edit | None = None) -> Edit:
    method = learn(world, row)
    return method.edit(world.backbone, wanted, world.prefixes(method), history)


def read(world: World, edit: Edit, asked: Sequence[Query] = ()) -> list[torch.Tensor]:
    """Logits under an edit, of the edited question and of others."""
    out = []
    for q in asked or [query(0), query(1), query(0, prompt="what?"), Query(None, "where is it?", "there")]:
        with edit.applied(world.backbone):
            out.append(world.logits([edit.rewrite(q)]))
    return out


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------- the contract of all methods


@each_method
def test_the_later_of_two_answers_alone(world: World, row) -> None:
    """In sequence and composed, in both orders: as if the earlier one had never been made."""
    first, later = request("k", FIRST), request("g", LATER)
    k, g = make(world, row, first), make(world, row, later)
    one, other = read(world, k), read(world, g)
    assert not same(one, other), "else nothing could be wrong"
    assert same(read(world, k | g), other)
    assert same(read(world, g | k), one)
    on_top = make(world, row, later, history=k)
    assert same(read(world, on_top), other)
    assert same(read(world, k | on_top), other)
    assert [o.id for o in (k | on_top).origins] == ["g"]
    # A third one corrects the second, and the first answer may come back.
    again = make(world, row, request("k2", FIRST), history=k | on_top)
    assert same(read(world, k | on_top | again), read(world, again))


@each_method
def test_other_edits_stay_what_they_are(world: World, row) -> None:
    a, b = make(world, row, request("a", "a fox", 1)), make(world, row, request("b", "a fox", 2))
    k, g = make(world, row, request("k", FIRST)), make(world, row, request("g", LATER))
    wanted = compose([a, b, g])
    assert wanted is not None
    for order in ([a, k, b, g], [k, a, b, g], [a, b, k, g], [a | k, b, g], [k | a | b, g]):
        found = compose(order)
        assert found is not None
        assert same(read(world, found), read(world, wanted))
    kept = leave_out_contradicted([a, k, b, g])
    assert kept == [a, None, b, g]


@each_method
def test_equal_answers_and_other_questions_are_no_contradiction(world: World, row) -> None:
    """These compose as ever: nothing is left out."""
    k = make(world, row, request("k", FIRST))
    others = [
        request("same", f" {FIRST} "),
        request("image", LATER, 1),
        request("prompt", LATER, 0, "what is it not?"),
        EditRequest("text", Query(None, "what is it?", LATER)),
    ]
    if row[1].get("ft_target") == "projection" or row[0] == "liveedit":
        # Neither edits what has no image.
        others.pop()
    for other in others:
        both = k | make(world, row, other)
        assert [o.id for o in both.origins] == ["k", other.id]
        assert not list_contradictions([k, make(world, row, other)])


@pytest.mark.parametrize("prompt", [" what is it?", "what is it? ", "What  is\nit?", "WHAT IS IT?"])
def test_spaces_and_capitals_make_no_other_question(world: World, prompt: str) -> None:
    row = ("serac", {"serac_scope": "text"})
    k, g = make(world, row, request("k", FIRST)), make(world, row, request("g", LATER, 0, prompt))
    assert [o.id for o in (k | g).origins] == ["g"]
    (found,) = list_contradictions([k, g])
    assert (found.earlier, found.later, found.earlier_target, found.later_target) == ("k", "g", FIRST, LATER)


def test_one_image_is_the_same_in_a_file_and_in_memory(world: World, tmp_path: Path) -> None:
    given = query(0)
    given.image.save(tmp_path / "a.png")
    saved = replace(given, image=str(tmp_path / "a.png"), target=LATER)
    row = ROWS[0]
    k, g = make(world, row, EditRequest("k", given)), make(world, row, EditRequest("g", saved))
    assert not list_contradictions([k, g])
    g = make(world, row, EditRequest("g", replace(saved, target=FIRST)))
    assert [(c.earlier, c.later) for c in list_contradictions([k, g])] == [("k", "g")]


@pytest.mark.parametrize("later", [0, 1, 3, 5], ids=lambda i: NAMES[i])
def test_the_later_one_answers_across_methods(world: World, later: int) -> None:
    g = make(world, ROWS[later], request("g", LATER))
    for i, row in enumerate(ROWS[:8]):
        if i != later:
            k, a = make(world, row, request("k", FIRST)), make(world, row, request("a", "a fox", 1))
            assert same(read(world, k | g), read(world, g))
            found, wanted = compose([k, a, g]), compose([a, g])
            assert found is not None
            assert wanted is not None
            assert same(read(world, found), read(world, wanted))


# ---------------------------------------------------------------- SERAC's ties


def test_seracs_newest_of_one_scope_answers(world: World) -> None:
    """The text scope sees words alone: edits of one question about two images have one scope."""
    row = ("serac", {"serac_scope": "text"})
    edits = [make(world, row, request(f"e{i}", a, i)) for i, a in enumerate(("a fox", "two dogs", "there"))]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        whole = compose([edits[i] for i in order])
        assert whole is not None
        read(world, whole, [query(0)])
        assert whole.chosen.tolist() == [2]


# ---------------------------------------------------------------- what is saved


@each_method
def test_saved_edits_keep_the_rule(world: World, row, tmp_path: Path) -> None:
    a, k, g = (
        make(world, row, request(n, t, i))
        for n, t, i in (("a", "a fox", 1), ("k", FIRST, 0), ("g", LATER, 0))
    )
    (a | k).save(tmp_path / "both")
    shared = learn(world, row).get_shared_parts()
    both = Edit.load(tmp_path / "both", world.backbone, shared.knowledge, shared.network)
    if isinstance(both, LowRankDelta):
        with pytest.raises(UserError, match=r"edit g: contradicts k in edit a\+k, .* detach that edit first"):
            both | g
    else:
        assert same(read(world, both | g), read(world, a | g))


def test_mixed_edits_are_taken_apart(world: World, tmp_path: Path) -> None:
    rows = [ROWS[0], ("ft", {"layers": 1}), ("ike", {"ike_retriever": "states", "ike_demonstrations": 2})]
    a, b, c = (make(world, row, request(f"m{i}", "a fox", i)) for i, row in enumerate(rows))
    whole = a | b | c
    assert isinstance(whole, Mixed)
    whole.save(tmp_path / "mixed")
    again = Edit.load(tmp_path / "mixed", world.backbone, world.method(*rows[0]).get_shared_parts().knowledge)
    for i, left in enumerate(([b, c], [a, c], [a, b])):
        g = make(world, rows[0], request("g", "two dogs", i))
        wanted = compose([*left, g])
        assert wanted is not None
        # The kinds stand in the order in which they came first.
        for mixed in (whole, again):
            found = mixed | g
            assert sorted(o.id for o in found.origins) == sorted(o.id for o in wanted.origins)
            assert {part.kind for part in found.parts} == {part.kind for part in wanted.parts}


# ---------------------------------------------------------------- sequences


def cases(targets: Sequence[str]) -> list[Case]:
    out = []
    for n, target in enumerate(targets):
        made = case(0, target)
        out.append(replace(made, request=replace(made.request, id=f"s{n}")))
    return out


@each_method
def test_a_sequence_ends_with_the_last_of_one_question(world: World, row) -> None:
    method, backbone = learn(world, row), world.backbone
    targets = ("two dogs", "there", "a fox")
    reader = Reader(backbone, world.prefixes(method))
    outcomes = list(run_sequence(backbone, method, cases(targets), reader))
    final = [o.record for o in outcomes if o.record.place is not None and o.record.place.kind == "final"]
    answers = {r.answers["reliability"].after for r in final}
    alone = Reader(backbone, world.prefixes(method))
    last = cases(targets)[-1]
    wanted = alone.predict_edited(last, make(world, row, last.request), alone.predict_base(last)).predictions[
        0
    ]
    assert answers == {wanted.generated}
    assert wanted.generated != alone.predict_base(last)[0].generated or row[0] in (
        "ike",
        "ke",
        "mend",
        "serac",
    )


# ---------------------------------------------------------------- an editor, its store and its commands


@pytest.fixture(scope="module")
def editor(blip2_project: Project) -> MultimodalEditor:
    return MultimodalEditor.from_hparams(blip2_project.yaml, progress=False)


EDITORS: dict[str, dict[str, Any]] = {
    "unike": {}, "scoped": SCOPED, "ft": {"method": "ft", "layers": 1},
    "projection": {"method": "ft", "ft_target": "projection"},
    "ike": {"method": "ike", "ike_demonstrations": 0},
    "tpatcher": {"method": "tpatcher", "activation_loss": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", EDITORS)
def test_an_editor_answers_with_the_last(
    editor: MultimodalEditor, blip2_project: Project, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    hparams = HyperParams.from_dict(editor.hparams.to_dict() | EDITORS[name], editor.hparams.source)
    mine = MultimodalEditor(hparams, editor.backbone, progress=False)
    image = str(blip2_project.data / "0.png")
    made, own = [], []
    for target in ("two dogs", "a red fox"):
        _, edited, _ = mine.edit(PROMPT, target, image)
        own.append(edited.generate(image, PROMPT))
        made += edited.edits
        edited.remove()
    assert own[0] != own[1]
    for order in ((0, 1), (1, 0)):
        caplog.clear()
        for i in order:
            mine.attach(made[i])
        assert mine.generate(image, PROMPT, edited=True) == own[order[1]]
        first, later = (made[i].id for i in order)
        assert f"edit {later} contradicts edit {first}" in caplog.text
        found = mine.ask(image, PROMPT)
        (contradiction,) = found.contradictions
        assert (contradiction.earlier, contradiction.later) == (first, later)
        assert next((e.id, e.active) for e in found.edits) == (first, False)
        assert found.edits[1].id == later
        assert json.dumps(found.to_dict())
        mine.detach(later)
        assert mine.generate(image, PROMPT, edited=True) == own[order[0]], "it is back"
        assert mine.ask(image, PROMPT).contradictions == ()
        mine.detach(first)
    # In sequence.
    caplog.clear()
    for target in ("two dogs", "a red fox"):
        _, edited, _ = mine.edit(PROMPT, target, image, keep_original_weight=False)
    assert edited.generate(image, PROMPT) == own[1]
    assert len(edited.edits) == 2
    assert caplog.text.count("contradicts") == 1
    edited.remove()
    # In one call.
    _, edited, _ = mine.edit([PROMPT] * 2, ["two dogs", "a red fox"], [image] * 2, keep_original_weight=False)
    assert edited.generate(image, PROMPT) == own[1]
    assert caplog.text.count("contradicts") == 2
    edited.remove()


def test_a_store_and_apply_name_the_contradiction(
    editor: MultimodalEditor,
    blip2_project: Project,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image, store = str(blip2_project.data / "0.png"), EditStore(tmp_path / "edits")
    ids = []
    for target, asked in (
        ("two dogs", PROMPT),
        ("the sea", "Question: why? Short answer:"),
        ("a red fox", PROMPT),
    ):
        _, edited, _ = editor.edit(asked, target, image)
        ids.append(edited.edits[0].id)
        # Another process each: what is asked is in the index.
        EditStore(store.folder).add(edited.edits[0])
        edited.remove()
    wanted = f"edit {ids[2]} contradicts edit {ids[0]}"
    assert caplog.text.count("contradicts") == 1
    assert wanted in caplog.text
    command.main(["apply", str(store.folder), "--hparams_dir", str(blip2_project.yaml)])
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("contradicts") == 1
    assert wanted in out
    # An index of before says nothing of questions: the edits' folders do.
    index = store.folder / "index.jsonl"
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    index.write_text("".join(json.dumps({k: v for k, v in li.items() if k != "asks"}) + "\n" for li in lines))
    _, edited, _ = editor.edit(PROMPT, "two dogs there", image)
    edited.remove()
    caplog.clear()
    EditStore(store.folder).add(edited_edit := editor_edit(editor, image))
    assert f"edit {edited_edit.id} contradicts edit {ids[0]}" in caplog.text
    assert f"edit {edited_edit.id} contradicts edit {ids[2]}" in caplog.text
    assert ids[1] not in caplog.text


def editor_edit(editor: MultimodalEditor, image: str) -> Edit:
    _, edited, _ = editor.edit(PROMPT, "two dogs there", image)
    (edit,) = edited.edits
    edited.remove()
    return edit
