"""Where answers end: what is trained after a target, and the one meaning of max_new_tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Project
from original_files import FAMILIES
from PIL import Image
from test_decoding import CASES
from test_methods import IDS, ROWS, STEPWISE, TRAINED
from test_run_edit import start
from worlds import BASE, SETTINGS, World, case, query, world_of

from scripts.plan import read_plan
from unike import MultimodalEditor, load_backbone
from unike.backbones.base import answer_loss, encode_queries
from unike.backbones.prefix import PrefixCache
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.evaluation.metrics import token_accuracy
from unike.evaluation.protocols import run_one_step
from unike.evaluation.reader import Reader
from unike.methods.meta_training import split_by_scope
from unike.methods.preparation.folders import list_editor_options
from unike.runs.records import MANIFEST, read_lines, read_manifest
from unike.types import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
# The tokenisers of the small random models have no line break; those of the bundled ones do.
ENDS = ("eos",)
BUNDLED = ("tiny_blip2", "tiny_minigpt4")
each_trained = pytest.mark.parametrize("row", TRAINED.values(), ids=TRAINED)
# The projection of random models learns little: only its loss is compared.
ENOUGH = {"max_steps": 150, "lr": 2e-2, "stop_loss": 2.3}


@pytest.fixture(params=FAMILIES)
def world(request: pytest.FixtureRequest, worlds: dict[str, World], monkeypatch) -> World:
    return world_of(request.param, worlds, monkeypatch)


# ---------------------------------------------------------------- what is encoded


@pytest.fixture(params=BUNDLED)
def bundled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> VisionLanguageBackbone:
    monkeypatch.chdir(ROOT)
    return load_backbone(f"hparams/{request.param}.yaml")


@pytest.mark.parametrize("end", ["eos", "line_break"])
@pytest.mark.parametrize("prompt", ["what is it?", "what\n"])
def test_the_end_follows_the_target_and_nothing_else_moves(
    bundled: VisionLanguageBackbone, end: str, prompt: str
) -> None:
    backbone, plain = bundled, query(0, "two red dogs", prompt)
    ended = replace(plain, end=end)
    one, other = (encode_queries(backbone, [q]) for q in (plain, ended))
    n = one.labels.shape[1]
    assert other.labels.shape[1] == n + 1
    assert torch.equal(other.labels[:, :n], one.labels)
    assert torch.equal(other.inputs_embeds[:, :n], one.inputs_embeds)
    assert torch.equal(other.question_end, one.question_end)
    last = int(other.labels[0, -1])
    assert backbone.ends_answer(last)
    assert (last in backbone.eos_ids) == (end == "eos")
    # One batch of both, on either side.
    columns = list(zip(*((q.image, q.prompt, q.target) for q in (plain, ended)), strict=True))
    for side in ("left", "right"):
        both = backbone.encode(*columns, side, ends=["none", end])
        assert (both.labels != -100).sum(1).tolist() == [
            (b.labels != -100).sum().item() for b in (one, other)
        ]


def test_a_tokenizer_without_line_breaks_is_one_line(world: World) -> None:
    with pytest.raises(UserError, match=r"answer_end: line_break: the model's tokenizer has no such token"):
        world.edit(("unike", {"answer_end": "line_break"}))


@pytest.mark.parametrize("end", ["eos", "line_break"])
@pytest.mark.parametrize("yaml", ["", "ft/"])
def test_a_bundled_model_ends_a_long_answer_to_a_short_question(
    bundled: VisionLanguageBackbone, end: str, yaml: str
) -> None:
    """The row of the faults: without an end the model goes on, and answers again."""
    image, prompt = Image.new("RGB", (64, 64), "red"), "Question: What is this? Short answer:"
    target = "a fox and a dog on a green background"
    family = "tiny_blip2" if bundled.dialogue.stops == ("\n",) else "tiny_minigpt4"
    answers = {}
    for how in ("none", end):
        hparams = HyperParams.from_hparams(f"hparams/{yaml}{family}.yaml", [f"answer_end={how}"])
        editor = MultimodalEditor(hparams, bundled, progress=False)
        (metric,), edited, _ = editor.edit(prompt, target, image)
        assert metric["post"] == {"rewrite_acc": 1.0}
        assert metric["steps"] > 0
        answers[how] = edited.generate(image, prompt)
        edited.remove()
    assert answers[end] == target
    if family == "tiny_blip2":
        assert answers["none"] == f"{target} a dog on a green background"


@pytest.mark.parametrize("end", ENDS)
def test_states_of_a_query_with_and_without_its_end_are_kept_apart(world: World, end: str) -> None:
    cache, plain = PrefixCache(world.backbone, 4), query(0, "two dogs")
    for _ in range(2):
        assert (
            cache.state([plain]).labels.shape[1] + 1 == cache.state([replace(plain, end=end)]).labels.shape[1]
        )
    assert len(cache) == 2


# ---------------------------------------------------------------- what is trained


@each_trained
@pytest.mark.parametrize("end", ENDS)
def test_an_edit_learns_to_end_its_answer(world: World, row: tuple[str, dict], end: str) -> None:
    backbone, asked = world.backbone, replace(query(0, "two red dogs there"), end=end)
    request = replace(case(0).request, query=query(0, "two red dogs there"))
    losses = {}
    for how in ("none", end):
        method = world.method(row[0], row[1] | ENOUGH | {"answer_end": how})
        edit = method.edit(backbone, request, world.prefixes(method))
        shown, labels = edit.rewrite(asked), encode_queries(backbone, [asked]).labels
        with edit.applied(backbone):
            logits = world.logits([shown])
            last = logits[0, :-1][labels[0, 1:] != -100][-1]
            losses[how] = -last.float().log_softmax(-1)[labels[0, -1]].item()
            forced = answer_loss(logits, labels).item()
        if how != "none":
            assert forced == pytest.approx(edit.info["loss"], rel=1e-3, abs=1e-4)
            if edit.info["reached"]:
                assert last.argmax() == labels[0, -1]
                with edit.applied(backbone):
                    written = backbone.generate([asked.image], [shown.prompt], 12)
                assert written == ["two red dogs there"]
            # In a random model one state, which GRACE has, does not reach an answer of several tokens.
            assert edit.info["reached"] or row[1].get("ft_target") == "projection" or row[0] == "grace"
    assert losses[end] < losses["none"]


@each_trained
def test_without_an_end_edits_are_what_they_were(world: World, row: tuple[str, dict]) -> None:
    plain, named = (world.method(row[0], row[1] | o) for o in ({}, {"answer_end": "none"}))
    ended = world.method(row[0], row[1] | {"answer_end": "eos"})
    one, other, third = (
        m.edit(world.backbone, case(0).request, world.prefixes(m)) for m in (plain, named, ended)
    )
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())
    assert not all(torch.equal(t, third.state_dict()[n]) for n, t in one.state_dict().items())


def test_knowledge_of_an_edit_is_of_its_target_not_of_its_end(world: World) -> None:
    """The states that an edit adds to memory are the same, whatever is trained after the target."""
    edits = []
    for end in ("none", *ENDS):
        method = world.method("unike", {"answer_end": end, "intrinsic": False, "zeta": "none"})
        edits.append(method.edit(world.backbone, case(0).request, world.prefixes(method)))
    for edit in edits[1:]:
        for index, share in edit.records[0].layers.items():
            torch.testing.assert_close(share.key, edits[0].records[0].layers[index].key, atol=1e-5, rtol=0)
            torch.testing.assert_close(
                share.value, edits[0].records[0].layers[index].value, atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", ["ke", "liveedit", "mend", "serac"])
def test_an_editors_edit_takes_the_end_in(world: World, name: str, end: str) -> None:
    method = world.method(name, SETTINGS[name][0])
    plain = method.edit(world.backbone, case(0).request, world.prefixes(method))
    hparams = method.hparams
    method.hparams = HyperParams.from_dict(hparams.to_dict() | {"answer_end": end})
    try:
        ended = method.edit(world.backbone, case(0).request, world.prefixes(method))
        loss = method.loss(world.backbone, case(0), world.prefixes(method))
    finally:
        method.hparams = hparams
    assert torch.isfinite(loss)
    assert loss.item() != method.loss(world.backbone, case(0), world.prefixes(method)).item()
    one, other = plain.state_dict(), ended.state_dict()
    assert any(one[n].shape != other[n].shape or not torch.equal(one[n], other[n]) for n in one)


def test_an_editor_is_found_by_what_it_was_trained_to_write() -> None:
    plain = HyperParams.from_dict({**BASE, "method": "mend"})
    ended = HyperParams.from_dict({**BASE, "method": "mend", "answer_end": "eos"})
    assert "answer_end" not in list_editor_options(plain)
    assert list_editor_options(ended) == list_editor_options(plain) | {"answer_end": "eos"}
    inside, outside = split_by_scope(case(0), "all", "eos")
    assert {q.end for q in inside} == {"eos"}
    assert {q.end for q in outside} == {"none"}
    assert {q.end for side in split_by_scope(case(0)) for q in side} == {"none"}


# ---------------------------------------------------------------- what is measured


@pytest.mark.parametrize("row", ROWS, ids=IDS)
@pytest.mark.parametrize("end", ["none", *ENDS])
def test_metrics_are_of_the_targets_own_tokens(world: World, row: tuple[str, dict], end: str) -> None:
    if row not in TRAINED.values():
        end = "none"
    method = world.method(row[0], row[1] | {"answer_end": end})
    reader = Reader(world.backbone, world.prefixes(method))
    outcome = run_one_step(world.backbone, method, case(0), reader)
    found = reader.predict_edited(case(0), outcome.edit, reader.predict_base(case(0))).predictions
    labels = encode_queries(world.backbone, [case(0).request.query]).labels
    own = labels[labels != -100].tolist()
    assert list(found[0].target_ids) == own
    assert not any(world.backbone.ends_answer(token) for token in own)
    with outcome.edit.applied(world.backbone):
        shown = outcome.edit.rewrite(case(0).request.query)
        labels = encode_queries(world.backbone, [shown]).labels[0]
        predicted = world.logits([shown])[0, :-1][labels[1:] != -100].argmax(-1).tolist()
    score = outcome.record.scores["teacher_forced"]["reliability"].after
    assert score == token_accuracy(predicted, own)


# ---------------------------------------------------------------- max_new_tokens

LONG = "two red dogs and a fox there"


@pytest.mark.parametrize("row", [row for _, row in CASES], ids=[name for name, _ in CASES])
@pytest.mark.parametrize("limit", [1, 3, 12])
def test_the_generated_mode_writes_what_generate_writes(
    world: World, row: tuple[str, dict], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = world.backbone
    monkeypatch.setattr(backbone, "max_new_tokens", limit)
    one = case(0, LONG)
    options = {"max_steps": 60} if row in TRAINED.values() else {}
    method = world.method(row[0], row[1] | options)
    reader = Reader(backbone, world.prefixes(method))
    base = reader.predict_base(one)
    asked = [p.query for p in one.probes]
    assert [p.generated for p in base] == backbone.generate(
        [q.image for q in asked], [q.prompt for q in asked]
    )
    edit = method.edit(backbone, one.request, reader.prefixes)
    found = reader.predict_edited(one, edit, base).predictions
    shown = [edit.rewrite(q) for q in asked]
    with edit.applied(backbone):
        for answer, q in zip(found, shown, strict=True):
            (written,) = backbone.generate([q.image], [q.prompt])
            assert answer.generated == written


def test_a_target_that_is_longer_than_answers_is_cut_without_decoding(world: World) -> None:
    """The row of the faults: four tokens where the target has ten."""
    backbone = world.backbone
    backbone.max_new_tokens, former = 2, backbone.max_new_tokens
    try:
        method = world.method("ft", {"layers": 1} | ENOUGH)
        one = case(0, "two red dogs there")
        reader = Reader(backbone, world.prefixes(method))
        edit = method.edit(backbone, one.request, reader.prefixes)
        assert edit.info["reached"]
        reader.predict_base(one)
        before = reader.decoded
        found = reader.predict_edited(one, edit, reader.predict_base(one)).predictions[0]
        assert found.predicted_ids == found.target_ids
        assert found.generated == backbone.decode(found.target_ids[:2])
        assert "two red dogs there".startswith(found.generated)
        assert found.generated != "two red dogs there"
        assert reader.decoded - before < len(one.probes), "the edit's own answer is verified, not decoded"
    finally:
        backbone.max_new_tokens = former


# ---------------------------------------------------------------- runs


def test_a_run_from_before_the_option_goes_on(copied: Project, capsys: pytest.CaptureFixture[str]) -> None:
    output = copied.root / "run"
    arguments = ("--task", "vqa", "--output", str(output))
    assert start(copied, *arguments, "--size", "2") == 0
    manifest = read_manifest(output)
    assert manifest["hparams"].pop("answer_end") == "none"
    (output / MANIFEST).write_text(json.dumps(manifest))
    assert start(copied, *arguments, "--resume", "answer_end=eos") == 2
    assert "answer_end: 'none' in the run to resume, 'eos' now" in capsys.readouterr().err
    assert start(copied, *arguments, "--resume", "--size", "3") == 0
    assert len(read_lines(output)) == 3


def test_a_value_that_is_no_end_is_one_line() -> None:
    for wrong in ("eot", True, None, 3):
        with pytest.raises(UserError, match=r"answer_end: expected one of none, eos, line_break, got"):
            HyperParams.from_dict({**BASE, "answer_end": wrong})
    assert HyperParams.from_dict({**BASE, "answer_end": "EOS"}).answer_end == "eos"


def test_tables_train_the_target_alone_and_the_yamls_its_end_too() -> None:
    tiny = [*BUNDLED, "blip2"]
    planned = read_plan(tables=["all"], backbones=tiny)
    assert {run.hparams.method for run in planned} >= {"unike", "ft", "tpatcher", "mend"}
    assert {run.hparams.answer_end for run in planned} == {"none"}
    ends = {
        path.relative_to(ROOT / "hparams").as_posix(): HyperParams.from_hparams(path)
        for path in (ROOT / "hparams").glob("**/*.yaml")
        if not path.name.startswith(("tables", "tuning"))
    }
    for name, hparams in ends.items():
        has_line = hparams.model_name in ("blip2", "smol") and "tiny" not in name
        own = "line_break" if has_line else "eos"
        trained = hparams.method in (*STEPWISE, "tpatcher_published", "wise")
        assert hparams.answer_end == (own if trained else "none"), name
