"""Edits of any method behind a gate with a trained scope classifier, alone or beside the overlap."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Project, record
from original_files import FAMILIES
from test_gated import close_at
from test_methods import IDS, ROWS
from test_run_edit import errors, in_shell, start
from worlds import World, case, query, snapshot, world_of

from unike.backbones.base import encode_queries
from unike.backbones.hooks import watch
from unike.config.hparams import HyperParams
from unike.editor import MultimodalEditor
from unike.edits import Edit, EditStore, compose, explain
from unike.edits.attached import Slot
from unike.edits.gate import OVERLAP, SIMILARITY, Gate, make_reader, observe_prompts
from unike.edits.gated import GatedEdit, GatedMember
from unike.edits.shares import Shared, sign_scope
from unike.evaluation.protocols import run_sequence
from unike.evaluation.reader import Reader
from unike.knowledge.overlap import NextTokens
from unike.knowledge.scope import ScopeEncoder, TrainedScope
from unike.methods.catalogue import Entry
from unike.methods.preparation.scope import collect_scope_samples
from unike.methods.registry import gates_edits
from unike.runs.inputs import read_train_cases
from unike.runs.records import read_records
from unike.types import Query, UserError

each_row = pytest.mark.parametrize("row", ROWS, ids=IDS)
FT = ("ft", {"layers": 1})
LAYER = 3
ALWAYS, NEVER = Gate(layer=LAYER, similarity=-1.0), Gate(layer=LAYER, similarity=1.01)
TRAINED = {**FT[1], "scope_gate": "nearest", "scope_measure": "trained", "scope_layer": LAYER}


@pytest.fixture(params=FAMILIES)
def world(request: pytest.FixtureRequest, worlds: dict[str, World], monkeypatch) -> World:
    return world_of(request.param, worlds, monkeypatch)


@pytest.fixture
def one_world(worlds: dict[str, World], monkeypatch) -> World:
    return world_of(FAMILIES[0], worlds, monkeypatch)


def make_scope(world: World, seed: int = 0, thresholds: dict[int, float] | None = None) -> TrainedScope:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = ScopeEncoder(world.backbone.layout.width, 16, 6, 2)
    return TrainedScope(encoder.eval().requires_grad_(False), thresholds or {1: 0.5})


def wrap(world: World, row=FT, gate: Gate = ALWAYS, scope: TrainedScope | None = None, i: int = 0):
    edit = world.edit(row, i)
    gated = GatedEdit.wrap(edit, case(i).request, gate, world.backbone, scope or make_scope(world))
    gated.origins = edit.origins
    return gated


def answer(world: World, edit: Edit, asked: list[Query]) -> torch.Tensor:
    texts = [edit.rewrite(q) for q in asked]
    with edit.applied(world.backbone):
        return world.logits(texts)


def place_slowly(world: World, scope: TrainedScope, asked: Query, layer: int) -> torch.Tensor:
    """A prompt's place: the encoder on what enters the layer's attention in a plain forward pass."""
    backbone, states = world.backbone, list[torch.Tensor]()
    batch = encode_queries(backbone, [replace(asked, target=None)])
    with watch(backbone.layout.attention(layer).module, states.append), torch.no_grad():
        backbone(batch)
    (own,) = states
    return scope.encoder(own, batch.attention_mask.bool())[0]


# ---------------------------------------------------------------- what the classifier reads


@pytest.mark.parametrize("layer", [0, LAYER])
def test_a_prompts_vector_is_the_encoder_on_its_states(world: World, layer: int) -> None:
    scope, gate = make_scope(world), Gate(layer=layer)
    asked = [query(0), query(1, prompt="what color is it?"), Query(None, "where is it?")]
    with world.edit(FT).applied(world.backbone):
        seen_as = world.backbone, [q.image for q in asked], [q.prompt for q in asked]
        found = observe_prompts(*seen_as, gate, make_reader(gate, scope))
    for sight, one in zip(found, asked, strict=True):
        torch.testing.assert_close(sight.vector, place_slowly(world, scope, one, layer), atol=1e-5, rtol=0)
    near = torch.stack([sight.vector for sight in found])
    assert (near @ near.T - 1).abs().sum() > 1e-3, "prompts lie at several places"


def test_it_reads_what_it_is_trained_on(world: World) -> None:
    # The first probe of a train record is the edit itself.
    samples = collect_scope_samples(world.backbone, world.train, LAYER)
    scope = make_scope(world)
    part = samples.load(torch.arange(2))
    encoded = scope.encoder(part.states[:, 0].float(), part.mask[:, 0])
    for i in range(2):
        asked = world.train[i].request.query
        seen_as = world.backbone, [asked.image], [asked.prompt]
        (sight,) = observe_prompts(*seen_as, ALWAYS, make_reader(ALWAYS, scope))
        # Those of training are kept in half precision.
        torch.testing.assert_close(encoded[i], sight.vector, atol=5e-3, rtol=0)


def test_a_prompt_is_read_once_for_overlap_and_classifier(world: World) -> None:
    backbone, scope = world.backbone, make_scope(world)
    gated = wrap(world, gate=Gate(0.0, layer=LAYER, similarity=-1.0), scope=scope)
    asked = query(2, prompt="who is there?")
    calls: list[int] = []
    counter = backbone.layout.layer(0).register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        spent = []
        for _ in range(2):
            calls.clear()
            gated.choose([asked.image], [asked.prompt])
            spent.append(len(calls))
        calls.clear()
        backbone.observe([asked.image], [asked.prompt], 1, 64)
        alone = len(calls)
        # Another classifier reads for itself.
        calls.clear()
        wrap(world, scope=make_scope(world, 1)).choose([asked.image], [asked.prompt])
        again = len(calls)
    finally:
        counter.remove()
    assert spent == [alone, 0]
    assert alone > 0
    assert again > 0


# ---------------------------------------------------------------- edits


@each_row
def test_open_it_answers_as_the_edit_and_closed_as_the_base(world: World, row) -> None:
    backbone, edit, scope = world.backbone, world.edit(row), make_scope(world)
    asked = [query(0), query(0, prompt="what?")]
    before, hooks = snapshot(backbone)
    base, inside = world.logits(asked), answer(world, edit, asked)
    for gate, expected in ((ALWAYS, inside), (NEVER, base)):
        gated = GatedEdit.wrap(edit, case(0).request, gate, backbone, scope)
        assert torch.equal(answer(world, gated, asked), expected)
        # Each row is decided on once, by the prompt as it was before the edit was shown in it.
        similarity = gated.measured.values[SIMILARITY][:, 0]
        assert similarity[0].item() == pytest.approx(1, abs=1e-5)
        assert len(similarity) == 2
        # Prompts that nobody has seen yet are observed in the midst of the batch.
        texts = [gated.rewrite(q) for q in asked]
        with gated.applied(backbone):
            backbone._sights.forget()
            assert torch.equal(world.logits(texts), expected)
            assert torch.equal(gated.measured.values[SIMILARITY][:, 0], similarity)
    assert inside.shape != base.shape or not torch.equal(inside, base)
    assert snapshot(backbone)[1] == hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(backbone)[0].items())


def part_at(world: World, edit: Edit, scope: TrainedScope, closed: Query) -> GatedEdit:
    """The edit of ``query(0)`` behind a gate between its own prompt's place and another's."""
    open_ = GatedEdit.wrap(edit, case(0).request, ALWAYS, world.backbone, scope)
    open_.choose([closed.image], [closed.prompt])
    middle = (1 + open_.measured.values[SIMILARITY].item()) / 2
    assert middle < 1 - 1e-4
    gate = replace(ALWAYS, similarity=middle)
    return GatedEdit(open_.members, gate, world.backbone, scope)


@each_row
def test_each_row_of_a_batch_has_its_own_gate_and_so_it_has_when_loaded(
    world: World, row, tmp_path: Path
) -> None:
    backbone, edit, scope = world.backbone, world.edit(row), make_scope(world)
    far = Query(None, "where is it?", "there")
    gated = part_at(world, edit, scope, far)
    gated.origins = edit.origins
    both = answer(world, gated, [query(0), far])
    own, base = answer(world, edit, [query(0)]), world.logits([far])
    torch.testing.assert_close(both[:1, : own.shape[1]], own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[1:, : base.shape[1]], base, atol=1e-4, rtol=1e-4)
    gated.save(tmp_path / "edit")
    shared = world.method(*row).get_shared_parts()
    loaded = Edit.load(tmp_path / "edit", backbone, shared.knowledge, shared.network, scope)
    assert loaded.gate == gated.gate
    assert torch.equal(answer(world, loaded, [query(0), far]), both)


def test_an_edit_needs_its_own_classifier(world: World, tmp_path: Path) -> None:
    scope = make_scope(world)
    gated = wrap(world, scope=scope)
    gated.save(tmp_path / "edit")
    store = EditStore(tmp_path / "store")
    store.add(gated)
    expected = answer(world, gated, [query(0)])
    same = replace(scope, encoder=copy.deepcopy(scope.encoder))
    for read in (
        lambda own: Edit.load(tmp_path / "edit", world.backbone, scope=own),
        lambda own: store.load(gated.id, world.backbone, scope=own),
        lambda own: pickle.loads(pickle.dumps(gated)).restore(world.backbone, scope=own),
    ):
        assert torch.equal(answer(world, read(same), [query(0)]), expected)
        with pytest.raises(UserError, match="gate: needs the scope classifier"):
            read(None)
        for other in (
            make_scope(world, 1),
            replace(scope, passing={"few": (0.1, 0.9)}),
            make_scope(world, 0, {1: 0.6}),
        ):
            with pytest.raises(UserError, match=r"was made with gate .*another one is given"):
                read(other)
    with pytest.raises(UserError, match="scope: expected a trained scope classifier, got ScopeEncoder"):
        Edit.load(tmp_path / "edit", world.backbone, scope=scope.encoder)


def test_edits_of_one_classifier_are_one_and_of_two_stay_apart(world: World) -> None:
    scope = make_scope(world)
    first = wrap(world, scope=scope)
    equal = wrap(world, scope=replace(scope, encoder=copy.deepcopy(scope.encoder)), i=1)
    other = wrap(world, scope=make_scope(world, 1), i=1)
    whole = first | equal
    assert isinstance(whole, GatedEdit)
    assert len(whole.members) == 2
    mixed = first | other
    assert not isinstance(mixed, GatedEdit)
    assert len(mixed.parts) == 2
    assert [part.scope for part in mixed.parts] == [first.scope, other.scope]
    assert first.needs()["gate"] == equal.needs()["gate"] == sign_scope(scope) != other.needs()["gate"]
    assert len((first | wrap(world, gate=replace(ALWAYS, layer=2), scope=scope, i=1)).parts) == 2


def test_the_nearest_by_the_classifier_alone_applies(world: World) -> None:
    scope, gate = make_scope(world), replace(ALWAYS, nearest=True, overlap=0.0)
    both = compose([wrap(world, gate=gate, scope=scope, i=i) for i in range(2)])
    for i in range(2):
        assert both.choose([query(i).image], [query(i).prompt]) == [(i,)]
    free = GatedEdit(both.members, ALWAYS, world.backbone, scope)
    assert free.choose([query(0).image], [query(0).prompt]) == [(0, 1)]
    # Where both are given, the classifier says which is nearest, whatever the overlap is.
    first, second = both.members
    swapped = GatedEdit(
        (replace(first, vector=second.vector), replace(second, vector=first.vector)),
        gate,
        world.backbone,
        scope,
    )
    assert swapped.choose([query(0).image], [query(0).prompt]) == [(1,)]
    assert swapped.measured.values[OVERLAP][0, 0] > swapped.measured.values[OVERLAP][0, 1]
    twice = GatedEdit((first, replace(first, id="again")), gate, world.backbone, scope)
    assert twice.choose([query(0).image], [query(0).prompt]) == [(1,)]


@pytest.mark.parametrize("measure", ["trained", "both"])
def test_a_sequence_keeps_each_of_its_edits(world: World, measure: str) -> None:
    options = {**TRAINED, "scope_measure": measure, "scope_threshold": -1.0}
    method = world.method("ft", options | ({"scope_overlap": 0.0} if measure == "both" else {}))
    method.scope = make_scope(world)
    reader = Reader(world.backbone, world.prefixes(method))
    outcomes = list(run_sequence(world.backbone, method, [case(i) for i in range(3)], reader))
    ends = [o.record for o in outcomes if not o.record.is_step]
    assert [r.get_scores("teacher_forced")["reliability"].after for r in ends] == [1.0] * 3
    made = [o.edit for o in outcomes if o.edit is not None]
    assert {edit.gate.measure for edit in made} == {SIMILARITY}
    names = {SIMILARITY, OVERLAP} if measure == "both" else {SIMILARITY}
    assert all(r.decisions.keys() == names for r in ends)


# ---------------------------------------------------------------- thresholds


def test_a_gate_with_both_opens_where_both_do(one_world: World) -> None:
    world, scope = one_world, make_scope(one_world)
    edit, far = world.edit(FT), Query(None, "where is it?", "there")
    by_overlap = close_at(world, edit, far).gate.overlap
    by_place = part_at(world, edit, scope, far).gate.similarity
    for overlap, similarity, expected in (
        (0.0, -1.0, True),
        (by_overlap, -1.0, False),
        (0.0, by_place, False),
        (by_overlap, by_place, False),
    ):
        gate = Gate(overlap, layer=LAYER, similarity=similarity)
        gated = GatedEdit.wrap(edit, case(0).request, gate, world.backbone, scope)
        assert gated.choose([query(0).image, None], [query(0).prompt, far.prompt]) == [
            (0,),
            (0,) if expected else (),
        ]
        assert gated.measured.values.keys() == {OVERLAP, SIMILARITY}


def test_asking_names_the_similarity(world: World) -> None:
    backbone, scope = world.backbone, make_scope(world, 0, {1: 0.9999})
    slot = Slot(backbone)
    try:
        for i in range(2):
            slot.attach(wrap(world, gate=Gate(layer=LAYER), scope=scope, i=i))
        found = explain.ask(slot, query(0).image, query(0).prompt)
    finally:
        slot.put(())
    assert found.gates == {SIMILARITY: 0.9999}
    assert [report.active for report in found.edits] == [True, False]
    assert found.edits[0].scope == pytest.approx(1.0, abs=1e-5)
    assert found.edits[1].scope < 0.9999


# ---------------------------------------------------------------- damaged files


def test_a_gate_has_a_classifier_where_it_has_a_layer(one_world: World) -> None:
    member = GatedMember("a", one_world.edit(FT), NextTokens(torch.tensor([[1]]), torch.ones(1, 1)))
    for gate, scope in ((ALWAYS, None), (Gate(0.5), make_scope(one_world))):
        with pytest.raises(ValueError, match="a layer together with a scope classifier"):
            GatedEdit((member,), gate, one_world.backbone, scope)
    # An edit that no classifier has read is not compared.
    gated = GatedEdit((member,), ALWAYS, one_world.backbone, make_scope(one_world))
    with pytest.raises(ValueError, match="was not read by the scope classifier"):
        gated.choose([None], ["who?"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.values["gate"].update(layer=99), "layer: 99; the decoder has"),
        (lambda c: c.values["gate"].update(layer=-1), "layer: expected"),
        (lambda c: c.values["gate"].update(layer=True), "layer: expected"),
        (lambda c: c.values["gate"].update(layer=None), "expected an overlap, a layer, or both"),
        (lambda c: c.values["gate"].update(similarity=2), "similarity: expected a number in"),
        (lambda c: c.values["gate"].update(overlap="x"), "overlap: expected a number in"),
        (lambda c: c.values["gate"].update(more=1), "gate: expected overlap, tokens"),
        (lambda c: c.tensors.update({"next.0.scope": torch.ones(7)}), "next.0.scope: shape"),
        (lambda c: c.tensors.update({"next.0.scope": torch.full((6,), torch.nan)}), "not finite"),
        (lambda c: c.tensors.pop("next.0.scope"), "next.0.scope: missing"),
    ],
)
def test_a_damaged_gate_is_refused(one_world: World, change, expected: str) -> None:
    scope = make_scope(one_world)
    content = wrap(one_world, gate=Gate(layer=LAYER), scope=scope).pack()
    change(content)
    with pytest.raises((ValueError, TypeError), match=expected):
        GatedEdit.unpack(content, one_world.backbone, Shared(scope=scope))


# ---------------------------------------------------------------- runs

GATED = ("method=ft", "layers=1", "lr=0.05", "knowledge_dir=null", "scope_gate=nearest")
SMALL = ("scope_steps=2", "scope_batch=4", "scope_dim=6", "scope_hidden=8", "scope_threshold=null")


@pytest.fixture(scope="module")
def taught(blip2_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with as many train records as a classifier needs."""
    project = blip2_project.copy(tmp_path_factory.mktemp("taught") / "project")
    for task in ("vqa", "caption"):
        records = [record(i % 9, task == "caption") | {"alt": f"a {i}"} for i in range(12)]
        project.write_records(records, task, "train")
    return project


def test_a_run_trains_the_classifier_once(taught: Project, tmp_path: Path, capsys) -> None:
    scope = f"scope_dir={taught.root / 'scope'}"
    trained = (*GATED, "scope_measure=trained", scope, *SMALL)
    done = in_shell(taught, "--size", "2", "--output", str(tmp_path / "trained"), *trained)
    assert done.returncode == 0, done.stderr
    (kept,) = taught.root.glob("scope/*/scope.json")
    index = json.loads(kept.read_text())
    assert index["layer"] == 2
    assert index["records"] == 24
    written = kept.with_name("scope.safetensors").stat().st_mtime_ns
    runs = {"both": (*GATED, "scope_measure=both", "scope_overlap=0.2", scope, *SMALL)}
    runs["overlap"] = (*GATED, "scope_measure=overlap", "scope_overlap=0.2")
    # An edit that is a text in the prompt: some rows have it, others not.
    ike = ("method=ike", "ike_retriever=states", "ike_demonstrations=1", "knowledge_dir=null")
    runs["ike"] = (*ike, "scope_gate=threshold", "scope_measure=overlap", "scope_overlap=0.8")
    for name, options in runs.items():
        assert start(taught, "--size", "2", "--output", str(tmp_path / name), *options) == 0
    decided = {}
    for name in ("trained", *runs):
        records = read_records(tmp_path / name)
        assert [r.status for r in records] == ["ok", "ok"]
        decided[name] = {key for r in records for key in r.decisions}
        assert all(
            r.decisions[key]["reliability"] == pytest.approx(1) for r in records for key in r.decisions
        )
    expected = {"trained": {SIMILARITY}, "overlap": {OVERLAP}, "both": {SIMILARITY, OVERLAP}}
    assert decided == {**expected, "ike": {OVERLAP}}
    assert [p.stat().st_mtime_ns for p in taught.root.glob("scope/*/*.safetensors")] == [written]
    # Without train records it is read all the same, and another layer's is not there.
    for split in taught.data.glob("*_train.json"):
        split.rename(split.with_suffix(".away"))
    try:
        again = ("--output", str(tmp_path / "again"), "--size", "1", *trained)
        assert start(taught, *again) == 0
    finally:
        for split in taught.data.glob("*_train.away"):
            split.rename(split.with_suffix(".json"))


def test_an_editor_restores_a_pickled_edit_with_its_classifier(taught: Project, caplog) -> None:
    options = (*GATED, "scope_measure=trained", f"scope_dir={taught.root / 'own'}", *SMALL)
    hparams = HyperParams.from_hparams(taught.yaml, list(options))
    editor = MultimodalEditor.from_hparams(hparams, progress=False)
    asked = (str(taught.data / "1.png"), "what is number 1?")
    _, model, _ = editor.edit(prompts=asked[1], targets="two dogs", image=asked[0])
    (edit,) = model.edits
    expected = editor.generate(*asked, edited=True)
    assert expected != editor.generate(*asked)
    pickled = pickle.dumps(edit)
    editor.detach(edit.id)
    editor.attach(pickle.loads(pickled))
    assert editor.generate(*asked, edited=True) == expected
    # What is learnt already is not learnt from other records.
    editor.prepare(train_ds=read_train_cases(hparams))
    assert "what is learnt from train data is there already" in caplog.text
    plain = MultimodalEditor.from_hparams(replace(hparams, scope_gate="none"), progress=False)
    with pytest.raises(UserError, match="gate: needs the scope classifier"):
        plain.attach(pickle.loads(pickled))
    editor._slot.put(())


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["scope_measure=cosine"],
            "cosine: is UniKE's own; expected trained, overlap or both",
        ),
        (["scope_measure=overlap"], "scope_measure: overlap: expected a number as scope_overlap"),
        (["scope_measure=both", "scope_dir=s"], "scope_measure: both: expected a number as scope_overlap"),
        (["scope_measure=trained"], "scope_dir: missing; expected a folder for trained scope classifiers"),
        (
            ["scope_measure=trained", "scope_dir=s", "scope_layer=3"],
            "scope_layer: 3; expected a number from 0 to 2",
        ),
    ],
)
def test_gates_that_cannot_be_are_refused_in_a_line(
    taught: Project, tmp_path: Path, capsys, options: list[str], expected: str
) -> None:
    assert start(taught, "--output", str(tmp_path / "run"), *GATED, *options) == 2
    (line,) = errors(capsys)
    assert line.endswith(expected)
    assert not (tmp_path / "run").exists()


def test_a_users_own_method_reads_the_cosine_itself() -> None:
    """Only the package's other methods are known not to compute it."""
    base = {"model_name": "blip2", "name": "unused", "scope_gate": "nearest"}
    mine = HyperParams.from_dict({**base, "method": "mine"})
    assert not gates_edits(mine, Entry(object))
    assert gates_edits(
        HyperParams.from_dict({**base, "method": "mine", "scope_measure": "both"}), Entry(object)
    )
    assert gates_edits(HyperParams.from_dict({**base, "method": "ft"}), Entry(object))
