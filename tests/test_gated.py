"""Edits of any method behind a gate: where it is closed the base model answers, where it is open the edit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import Project
from original_files import FAMILIES
from test_methods import IDS, ROWS
from worlds import World, case, query, snapshot, world_of

import run_edit
from unike.backbones.base import encode_queries
from unike.edits import Edit, explain
from unike.edits.attached import Slot
from unike.edits.gate import TOP, Gate
from unike.edits.gated import GatedEdit, GatedMember
from unike.edits.shares import Shared
from unike.evaluation.protocols import run_sequence
from unike.evaluation.reader import Reader
from unike.knowledge.overlap import NextTokens, measure_overlap
from unike.runs.records import read_records
from unike.types import Query, UserError

each_row = pytest.mark.parametrize("row", ROWS, ids=IDS)
NEVER, ALWAYS = Gate(1.0, nearest=True), Gate(0.0)


@pytest.fixture(params=FAMILIES)
def world(request: pytest.FixtureRequest, worlds: dict[str, World], monkeypatch) -> World:
    return world_of(request.param, worlds, monkeypatch)


def close_at(world: World, edit: Edit, closed: Query) -> GatedEdit:
    """The edit of ``query(0)`` behind a gate that lies between its own prompt's overlap and another's."""
    gated = GatedEdit.wrap(edit, case(0).request, ALWAYS, world.backbone)
    (key,) = [member.key for member in gated.members]
    other = NextTokens(*world.backbone.observe([closed.image], [closed.prompt], 1, TOP)[0][:2])
    overlap = measure_overlap(other, [key]).item()
    return GatedEdit(gated.members, Gate((1 + overlap) / 2), world.backbone)


# ---------------------------------------------------------------- overlap


def overlap_slowly(one: list[dict[int, float]], other: list[dict[int, float]]) -> float:
    """The least Bhattacharyya coefficient along two greedy answers, as far as the other one's goes, and up to
    where they part."""
    found = []
    for p, q in zip(one, other, strict=False):
        p, q = ({token: value / sum(side.values()) for token, value in side.items()} for side in (p, q))
        found.append(sum(math.sqrt(p[token] * q[token]) for token in p if token in q))
        if max(p, key=lambda t: p[t]) != max(q, key=lambda t: q[t]):
            break
    return min(found)


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_overlap_is_its_definition(tokens):
    generator = torch.Generator().manual_seed(tokens)
    kept = []
    for _ in range(12):
        # Few tokens, so that greedy answers agree now and then.
        best = torch.softmax(2 * torch.randn(tokens, 6, generator=generator), -1).topk(4)
        kept.append(NextTokens(best.indices, best.values))
    plain = [
        [dict(zip(i, p, strict=True)) for i, p in zip(k.ids.tolist(), k.probabilities.tolist(), strict=True)]
        for k in kept
    ]
    values = set()
    for one, rows in zip(kept, plain, strict=True):
        found = measure_overlap(one, kept).tolist()
        assert found == pytest.approx([overlap_slowly(rows, other) for other in plain], abs=1e-6)
        values |= {round(value, 3) for value in found}
    assert len(values) > 10
    whole = NextTokens(torch.arange(6)[None], torch.full((1, 6), 1 / 6))
    assert measure_overlap(whole, [whole]).item() == pytest.approx(1.0)


def test_next_tokens_are_the_base_models_whatever_is_applied(world: World):
    backbone = world.backbone
    asked = query(0)
    logits = world.logits([Query(asked.image, asked.prompt, "a fox")])
    batch = encode_queries(backbone, [asked])
    expected = torch.softmax(logits[0, batch.question_end[0]].float(), -1).topk(TOP)
    backbone._sights.forget()
    with world.edit(("ft", {"layers": 1})).applied(backbone):
        ((ids, probabilities, _),) = backbone.observe([asked.image], [asked.prompt], 1, TOP)
    assert ids[0, :5].tolist() == expected.indices[:5].tolist()
    torch.testing.assert_close(probabilities[0], expected.values, atol=1e-5, rtol=1e-4)
    with world.edit(("ft", {"layers": 1})).applied(backbone):
        edited = world.logits([Query(asked.image, asked.prompt, "a fox")])
    assert not torch.equal(edited, logits)


def test_tokens_follow_the_base_models_greedy_answer(world: World):
    asked = query(0)
    ((ids, _, _),) = world.backbone.observe([asked.image], [asked.prompt], 3, 4)
    said = world.backbone.generate([asked.image], [asked.prompt], max_new_tokens=3)
    assert ids.shape == (3, 4)
    text = world.backbone.decode(ids[:, 0].tolist())
    assert text.startswith(said[0]) or said[0].startswith(text)


# ---------------------------------------------------------------- edits


@each_row
def test_an_open_gate_answers_as_the_edit_and_a_closed_one_as_the_base(world: World, row):
    backbone = world.backbone
    edit = world.edit(row)
    asked = [query(0), query(0, prompt="what?")]
    before, hooks = snapshot(backbone)
    base = world.logits(asked)
    written = [edit.rewrite(q) for q in asked]
    with edit.applied(backbone):
        inside = world.logits(written)
    for gate, expected in ((ALWAYS, inside), (Gate(1.0 + 1e-3), base)):
        gated = GatedEdit.wrap(edit, case(0).request, gate, backbone)
        texts = [gated.rewrite(q) for q in asked]
        with gated.applied(backbone):
            found = world.logits(texts)
        assert torch.equal(found, expected)
    assert inside.shape != base.shape or not torch.equal(inside, base)
    assert torch.equal(world.logits(asked), base)
    assert snapshot(backbone)[1] == hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(backbone)[0].items())


@each_row
def test_rows_of_one_batch_are_answered_each_by_its_own_gate(world: World, row):
    backbone = world.backbone
    edit = world.edit(row)
    far = Query(None, "where is it?", "there")
    gated = close_at(world, edit, far)
    asked = [query(0), far]
    with gated.applied(backbone):
        texts = [gated.rewrite(q) for q in asked]
        both = world.logits(texts)
        answers = backbone.generate([q.image for q in texts], [q.prompt for q in texts])
    assert texts[1] == far
    with edit.applied(backbone):
        own = world.logits([edit.rewrite(query(0))])
        said = backbone.generate([texts[0].image], [texts[0].prompt])
    base = world.logits([far])
    torch.testing.assert_close(both[:1, : own.shape[1]], own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[1:, : base.shape[1]], base, atol=1e-4, rtol=1e-4)
    assert answers == [*said, *backbone.generate([None], [far.prompt])]


@each_row
def test_a_gated_edit_is_the_same_when_loaded(world: World, row, tmp_path):
    backbone = world.backbone
    method = world.method(*row)
    edit = world.edit(row)
    gated = GatedEdit.wrap(edit, case(0).request, Gate(0.4, 2), backbone)
    gated.origins = edit.origins
    gated.save(tmp_path / "edit")
    shared = method.get_shared_parts()
    loaded = Edit.load(tmp_path / "edit", backbone, shared.knowledge, shared.network)
    assert isinstance(loaded, GatedEdit)
    assert loaded.gate == gated.gate
    asked = [query(0), query(1)]
    found = []
    for one in (gated, loaded):
        texts = [one.rewrite(q) for q in asked]
        with one.applied(backbone):
            found.append(world.logits(texts))
    assert torch.equal(*found)


def test_the_nearest_edit_alone_applies(world: World):
    backbone = world.backbone
    edits = [world.edit(("ft", {"layers": 1}), i) for i in range(2)]
    whole = [
        GatedEdit.wrap(e, case(i).request, Gate(0.0, nearest=True), backbone) for i, e in enumerate(edits)
    ]
    both = whole[0] | whole[1]
    assert isinstance(both, GatedEdit)
    for i in range(2):
        assert both.choose([query(i).image], [query(i).prompt]) == [(i,)]
    free = GatedEdit(both.members, ALWAYS, backbone)
    assert free.choose([query(0).image], [query(0).prompt]) == [(0, 1)]
    # Of two edits of one prompt the last one made.
    again = GatedMember("again", edits[1], both.members[0].key)
    twice = GatedEdit((both.members[0], again), both.gate, backbone)
    assert twice.choose([query(0).image], [query(0).prompt]) == [(1,)]


def test_a_sequence_of_gated_edits_keeps_each_of_them(world: World):
    method = world.method("ft", {"layers": 1, "scope_overlap": 0.999, "scope_gate": "nearest"})
    reader = Reader(world.backbone, world.prefixes(method))
    outcomes = list(run_sequence(world.backbone, method, [case(i) for i in range(3)], reader))
    ends = [o.record for o in outcomes if not o.record.is_step]
    assert [r.get_scores("teacher_forced")["reliability"].after for r in ends] == [1.0] * 3
    assert all(isinstance(o.edit, GatedEdit) for o in outcomes if o.edit is not None)


def test_a_gate_says_what_it_decided(world: World):
    slot = Slot(world.backbone)
    backbone, row = world.backbone, ("ft", {"layers": 1})
    gated = [GatedEdit.wrap(world.edit(row, i), case(i).request, Gate(0.9999), backbone) for i in range(2)]
    for i, edit in enumerate(gated):
        edit.origins = world.edit(("ft", {"layers": 1}), i).origins
        slot.attach(edit)
    try:
        found = explain.ask(slot, query(0).image, query(0).prompt)
    finally:
        slot.put(())
    assert [report.active for report in found.edits] == [True, False]
    assert found.edits[0].scope == pytest.approx(1.0)
    assert found.edits[1].scope < 0.9999
    assert found.gates == {"overlap": 0.9999}


def test_a_rewritten_prompt_is_known_by_the_images_content(world: World):
    row = ROWS[[name for name, _ in ROWS].index("ike")]
    gated = GatedEdit.wrap(world.edit(row), case(0).request, Gate(0.9999), world.backbone)
    shown = gated.rewrite(query(0))
    assert shown.prompt != query(0).prompt
    # Another object with the same content, as a caller's next image would be.
    assert gated.choose([query(0).image], [shown.prompt]) == [(0,)]
    assert gated.choose([query(1).image], [shown.prompt]) != [(0,)]


def test_a_copied_model_has_its_own_gate(world: World):
    asked = [query(0)]
    edit = world.edit(("ft", {"layers": 1}))
    gated = GatedEdit.wrap(edit, case(0).request, ALWAYS, world.backbone)
    copied = copy.deepcopy(world.backbone)
    with edit.applied(world.backbone):
        expected = world.logits(asked)
    base = world.logits(asked)
    with gated.applied(copied), torch.no_grad():
        found = copied(encode_queries(copied, asked)).logits
        assert torch.equal(world.logits(asked), base), "the original is as it was"
    assert torch.equal(found, expected)
    assert not torch.equal(found, base)


@pytest.mark.parametrize(("least", "changed"), [("0", True), ("1", False)])
def test_a_run_with_a_gate(blip2_project: Project, tmp_path, least: str, changed: bool):
    options = ["method=ft", "layers=1", "lr=0.05", f"scope_overlap={least}"]
    arguments = ["--hparams_dir", str(blip2_project.yaml), "--size", "2", "--output", str(tmp_path / "run")]
    assert run_edit.main([*arguments, *options]) == 0
    records = read_records(tmp_path / "run")
    assert all(record.decisions["overlap"]["reliability"] == pytest.approx(1) for record in records)
    assert all(record.get_scores("teacher_forced")["reliability"].after == 1 for record in records)
    # Another wording has another overlap than the edit's own.
    elsewhere = [record.get_scores("teacher_forced")["t_generality"] for record in records]
    assert any(score.after != score.before for score in elsewhere) == changed


def test_a_model_called_by_itself_is_refused(world: World):
    backbone = world.backbone
    gated = GatedEdit.wrap(world.edit(("ft", {"layers": 1})), case(0).request, ALWAYS, backbone)
    batch = encode_queries(backbone, [query(0)])
    arguments = backbone._decoder_arguments(batch)
    backbone.decoder(**arguments)
    with gated.applied(backbone), pytest.raises(UserError, match="decides by the prompt"):
        backbone.decoder(**arguments)


def test_a_gate_as_it_was_first_written_is_read(worlds, monkeypatch):
    world = world_of("blip2", worlds, monkeypatch)
    gate = Gate(0.5, 2, True)
    content = GatedEdit.wrap(world.edit(("ft", {"layers": 1})), case(0).request, gate, world.backbone).pack()
    content.values["gate"] = [0.5, 2, True]
    loaded = GatedEdit.unpack(content, world.backbone, Shared())
    assert (loaded.gate, loaded.scope) == (gate, None)
    content.require_empty()


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(gate=[2.0, 1, False]),
        lambda values: values.update(gate=[0.5, 0, False]),
        lambda values: values.update(gate=[0.5, 1]),
        lambda values: values.update(next=[[[1.5]]]),
        lambda values: values.update(next=[]),
        lambda values: values.update(kinds=["other"]),
    ],
)
def test_damaged_content_is_refused(worlds, monkeypatch, change):
    world = world_of("blip2", worlds, monkeypatch)
    gated = GatedEdit.wrap(world.edit(("ft", {"layers": 1})), case(0).request, Gate(0.5), world.backbone)
    content = gated.pack()
    GatedEdit.unpack(gated.pack(), world.backbone, Shared())
    change(content.values)
    with pytest.raises((ValueError, LookupError)):
        GatedEdit.unpack(content, world.backbone, Shared())
