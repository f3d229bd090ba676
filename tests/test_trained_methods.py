"""Methods that learn to edit, on small random backbones: the contract of their edits, and training
that can be killed at any moment."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from original_files import FAMILIES, make_spec
from PIL import Image
from untouched import assert_untouched, hook_count, weights_of

from unike.backbones import load_backbone
from unike.backbones.base import Batch, encode_queries
from unike.backbones.prefix import PrefixCache
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.edits.deltas import LowRankDelta
from unike.methods.base import build
from unike.methods.meta_training import Lessons, TrainableMethod, compute_edit_losses, meta_train
from unike.methods.preparation.editors import ensure_editor, find_editor, load_editor
from unike.types import Case, EditRequest, Probe, Query, UserError

METHODS = ("mend", "serac", "ke")
COLORS = ("teal", "navy", "olive", "maroon", "gold", "gray")
BASE = {
    "model_name": "blip2", "name": "unused", "layers": 2, "editor_rank": 6, "edit_scale": 1e-2,
    "editor_lr": 1e-2, "editor_steps": 5, "editor_batch": 2, "editor_val_every": 2, "c_edit": 1.0,
}  # fmt: skip


def query(i: int, answer: str = "a fox") -> Query:
    picture = Image.new("RGB", (84, 84), COLORS[i % len(COLORS)])
    return Query(picture, f"Question: what is number {i}? Short answer:", answer)


def case(i: int) -> Case:
    own, other = query(i), query(i + 1, "two dogs")
    probes = (
        Probe("reliability", own, "target"),
        Probe("t_generality", replace(own, prompt=f"Question: name number {i}! Short answer:"), "target"),
        Probe("m_generality", replace(own, image=query(i + 2).image), "target"),
        Probe("t_locality", Query(None, "who was king?", "a man"), "unchanged"),
        Probe("m_locality", other, "unchanged"),
        Probe("same_image", replace(own, prompt="Question: which color? Short answer:"), "unchanged"),
    )
    return Case(EditRequest(f"c{i}", own, "nothing"), probes)


CASES = [case(i) for i in range(5)]


def hparams(method: str, **changes) -> HyperParams:
    return HyperParams.from_dict({**BASE, "method": method, **changes})


class World:
    def __init__(self, family: str, folder: Path) -> None:
        self.backbone: VisionLanguageBackbone = load_backbone(make_spec(family))
        self.folder = folder
        self.trained: dict[str, TrainableMethod] = {}

    def method(self, name: str) -> TrainableMethod:
        if name not in self.trained:
            method = build(hparams(name))
            assert isinstance(method, TrainableMethod)
            meta_train(method, self.backbone, CASES, CASES[:2], method.hparams, self.folder / name)
            self.trained[name] = method
        return self.trained[name]

    def prefixes(self, name: str) -> PrefixCache:
        return PrefixCache(self.backbone, self.method(name).layers(self.backbone)[0])

    def edit(self, name: str, i: int = 0, history=None):
        method = self.method(name)
        return method.edit(self.backbone, EditRequest(f"e{i}", query(i)), self.prefixes(name), history)

    def logits(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return self.backbone(batch).logits


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, World]:
    return {family: World(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def world(request: pytest.FixtureRequest, worlds: dict[str, World]) -> World:
    return worlds[request.param]


# ---------------------------------------------------------------- the contract of an edit


@pytest.mark.parametrize("name", METHODS)
def test_an_edit_changes_answers_while_applied_and_nothing_after(world: World, name: str) -> None:
    backbone = world.backbone
    before, hooks = weights_of(backbone), hook_count(backbone.model)
    batch = encode_queries(backbone, [query(0), query(1)])
    base, edit = world.logits(batch), world.edit(name)
    with edit.applied(backbone):
        inside = world.logits(batch)
    assert not torch.equal(inside, base)
    assert torch.equal(world.logits(batch), base)
    assert_untouched(backbone, before, hooks)
    assert not any(t.requires_grad for t in edit.state_dict().values())
    assert edit.nbytes == sum(t.nbytes for t in edit.state_dict().values()) > 0


@pytest.mark.parametrize("name", METHODS)
def test_the_base_is_whole_after_an_exception_in_the_middle(world: World, name: str) -> None:
    backbone, edit = world.backbone, world.edit(name)
    before, hooks = weights_of(backbone), hook_count(backbone.model)

    def ask_and_fail() -> None:
        with edit.applied(backbone):
            world.logits(encode_queries(backbone, [query(0)]))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask_and_fail()
    assert_untouched(backbone, before, hooks)


@pytest.mark.parametrize("name", METHODS)
def test_an_edit_is_the_same_each_time(world: World, name: str) -> None:
    one, other = world.edit(name).state_dict(), world.edit(name).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("name", METHODS)
def test_composed_edits_are_both_in_force(world: World, name: str) -> None:
    backbone = world.backbone
    first = world.edit(name, 0)
    second = world.edit(name, 1, history=first)
    batch = encode_queries(backbone, [query(0), query(1)])
    both = first | second
    assert both.nbytes == first.nbytes + second.nbytes
    with both.applied(backbone):
        together = world.logits(batch)
    if not isinstance(both, LowRankDelta):
        # Not a sum: the nearest edit answers.
        assert [r.id for r in both.records] == ["e0", "e1"]
        return
    with first.applied(backbone), second.applied(backbone):
        torch.testing.assert_close(world.logits(batch), together, atol=2e-5, rtol=0)
    for alone in (first, second):
        with alone.applied(backbone):
            assert not torch.equal(world.logits(batch), together)


@pytest.mark.parametrize("name", METHODS)
def test_padding_and_batch_size_change_nothing_under_an_edit(world: World, name: str) -> None:
    backbone, edit = world.backbone, world.edit(name)
    asked = [query(0), query(1, "two dogs there"), replace(query(2), image=None)]
    images, prompts, targets = zip(*((q.image, q.prompt, q.target) for q in asked), strict=True)
    batches = [backbone.encode(images, prompts, targets, side) for side in ("right", "left")]
    with edit.applied(backbone):
        whole = [world.logits(batch) for batch in batches]
        for row, one in enumerate(asked):
            alone = world.logits(encode_queries(backbone, [one]))[0]
            for batch, logits in zip(batches, whole, strict=True):
                got = logits[row][batch.attention_mask[row].bool()]
                torch.testing.assert_close(got, alone, atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_cached_decoding_agrees_with_teacher_forcing(world: World, name: str) -> None:
    backbone, edit, steps = world.backbone, world.edit(name), 5
    batch = backbone.encode([query(0).image], [query(0).prompt])
    lm = backbone.model.language_model
    with edit.applied(backbone), torch.no_grad():
        with backbone.prompt.asking(batch):
            out = lm.generate(
                inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask, do_sample=False,
                max_new_tokens=steps, eos_token_id=None, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        written = lm.get_input_embeddings()(out.sequences)
        embeds = torch.cat([batch.inputs_embeds, written], 1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        whole = backbone(replace(batch, inputs_embeds=embeds, attention_mask=mask)).logits
    forced = whole[0, -steps - 1 : -1]
    torch.testing.assert_close(forced, torch.cat(out.logits), atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_an_untrained_method_says_what_trains_it(world: World, name: str) -> None:
    method = build(hparams(name))
    with pytest.raises(UserError, match=r"scripts/prepare\.py"):
        method.edit(world.backbone, EditRequest("e", query(0)), world.prefixes(name))


# ---------------------------------------------------------------- training


class KilledError(Exception):
    pass


def killer(after: int):
    ticks = iter(range(after))

    def tick(what: str, count: int) -> None:
        if next(ticks, None) is None:
            raise KilledError

    return tick


def weights(method: TrainableMethod) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in method.trained.state_dict().items()}


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_training_goes_on_to_the_same_editor(worlds, name: str, tmp_path: Path) -> None:
    backbone = worlds["blip2"].backbone
    whole = build(hparams(name))
    expected = meta_train(whole, backbone, CASES, CASES[:2], whole.hparams, tmp_path / "whole")
    # 5 steps of 2 cases, 3 validations of 2: from the first case of all to the last held-out one.
    for after in (0, 1, 3, 5, 6, 7, 10, 14, 15):
        folder = tmp_path / str(after)
        method = build(hparams(name))
        with pytest.raises(KilledError):
            meta_train(method, backbone, CASES, CASES[:2], method.hparams, folder, killer(after))
        again = build(hparams(name))
        progress = meta_train(again, backbone, CASES, CASES[:2], again.hparams, folder)
        assert progress == expected
        assert all(torch.equal(v, weights(whole)[k]) for k, v in weights(again).items()), after


def test_a_kill_while_the_checkpoint_is_written_leaves_the_former_one(worlds, monkeypatch, tmp_path) -> None:
    backbone, name = worlds["blip2"].backbone, METHODS[0]
    whole = build(hparams(name))
    meta_train(whole, backbone, CASES, CASES[:2], whole.hparams, tmp_path / "whole")
    calls: list[str] = []

    def fail_second(source: Path, target: Path, real=os.replace) -> None:
        calls.append(str(target))
        if len(calls) == 2:
            raise KilledError
        real(source, target)

    method = build(hparams(name))
    with monkeypatch.context() as patch:
        patch.setattr("unike.system.files.os.replace", fail_second)
        with pytest.raises(KilledError):
            meta_train(method, backbone, CASES, CASES[:2], method.hparams, tmp_path / "killed")
    assert json.loads((tmp_path / "killed/checkpoint.json").read_text())["progress"]["step"] == 2
    again = build(hparams(name))
    meta_train(again, backbone, CASES, CASES[:2], again.hparams, tmp_path / "killed")
    assert all(torch.equal(v, weights(whole)[k]) for k, v in weights(again).items())


def test_a_checkpoint_of_other_cases_is_not_taken(worlds, tmp_path: Path) -> None:
    backbone, name = worlds["blip2"].backbone, METHODS[0]
    method = build(hparams(name))
    meta_train(method, backbone, CASES, CASES[:2], method.hparams, tmp_path)
    seen: list[int] = []
    other = build(hparams(name))
    meta_train(other, backbone, CASES[1:], CASES[:2], other.hparams, tmp_path, lambda _, n: seen.append(n))
    assert sum(seen) == BASE["editor_steps"] * BASE["editor_batch"]


@pytest.mark.parametrize("name", METHODS)
def test_training_lowers_what_it_is_judged_by(world: World, name: str, tmp_path: Path) -> None:
    backbone, method = world.backbone, build(hparams(name, editor_steps=12, editor_val_every=2))
    prefixes = PrefixCache(backbone, method.layers(backbone)[0], batch=1)
    before, hooks = weights_of(backbone), hook_count(backbone.model)
    progress = meta_train(method, backbone, CASES, CASES, method.hparams, tmp_path)
    assert progress.best < progress.losses[0]
    assert progress.step == 12
    with torch.no_grad():
        lessons = Lessons(backbone, prefixes)
        again = [method.validation(backbone, lessons.adapt(c), prefixes).item() for c in CASES]
    assert sum(again) / len(again) == pytest.approx(progress.best)
    assert_untouched(backbone, before, hooks)


def test_training_stops_where_validation_no_longer_improves(worlds, monkeypatch, tmp_path: Path) -> None:
    method = build(hparams(METHODS[0], editor_steps=50, editor_val_every=1, editor_patience=3))
    values = iter([3.0, 2.0, *[2.5] * 50])
    monkeypatch.setattr(type(method), "validation", lambda *_: torch.tensor(next(values)))
    progress = meta_train(method, worlds["blip2"].backbone, CASES, CASES[:1], method.hparams, tmp_path)
    assert (progress.step, progress.best_step, progress.best) == (5, 2, 2.0)


def test_a_loss_that_is_no_number_ends_training(worlds, monkeypatch, tmp_path: Path) -> None:
    method = build(hparams(METHODS[0]))
    monkeypatch.setattr(type(method), "loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError, match="nan after 0 steps"):
        meta_train(method, worlds["blip2"].backbone, CASES, CASES, method.hparams, tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_an_editor_is_kept_under_its_weights_and_options(worlds, name: str, tmp_path: Path) -> None:
    backbone, asked = worlds["blip2"].backbone, []

    def cases() -> list[Case]:
        asked.append(1)
        return [case(i) for i in range(11)]

    options = hparams(name, editor_dir=str(tmp_path), editor_steps=2)
    assert find_editor(options) is None
    one = build(options)
    folder = ensure_editor(one, backbone, cases)
    assert find_editor(options) == folder
    assert sorted(p.name for p in folder.iterdir()) == ["editor.json", "editor.safetensors"]
    two = build(options)
    assert ensure_editor(two, backbone, cases) == folder
    assert len(asked) == 1
    assert all(torch.equal(v, weights(one)[k]) for k, v in weights(two).items())
    assert find_editor(hparams(name, editor_dir=str(tmp_path), editor_steps=3)) is None
    content = (folder / "editor.safetensors").read_bytes()
    (folder / "editor.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"editor\.safetensors: is damaged: its checksum"):
        load_editor(two, backbone, folder)
    with pytest.raises(UserError, match="editor_dir: missing"):
        find_editor(hparams(name))


def test_an_edit_to_what_the_base_says_anyway_is_turned_round(worlds, monkeypatch) -> None:
    backbone = worlds["blip2"].backbone
    prefixes = PrefixCache(backbone, 4, batch=1)
    assert Lessons(backbone, prefixes).adapt(CASES[0]) is CASES[0]
    labels = prefixes.state([query(0)]).labels
    said = torch.nn.functional.one_hot(labels.roll(-1, 1).clamp(min=0)).float()
    monkeypatch.setattr(backbone, "suffix", lambda _: said)
    turned = Lessons(backbone, prefixes).adapt(CASES[0])
    assert turned.request.query.target == "nothing"
    targets = {p.name: p.query.target for p in turned.probes}
    assert {targets[n] for n in ("reliability", "t_generality", "m_generality")} == {"nothing"}
    assert (targets["t_locality"], targets["m_locality"]) == ("a man", "two dogs")


def test_locality_is_measured_on_answers_alone(world: World) -> None:
    backbone, edit = world.backbone, world.edit("mend")
    prefixes = world.prefixes("mend")
    nll, change = compute_edit_losses(backbone, edit, CASES[0], prefixes)
    outside = [p.query for p in CASES[0].probes if p.name in ("t_locality", "m_locality")]
    rows = []
    for one in outside:
        state = prefixes.state([one])
        at = state.answer_mask
        before = backbone.suffix(state)[:, :-1][at].log_softmax(-1)
        with edit.applied(backbone):
            after = backbone.suffix(state)[:, :-1][at].log_softmax(-1)
        rows.append((before.exp() * (before - after)).sum(-1))
    torch.testing.assert_close(change, torch.cat(rows).mean(), atol=1e-6, rtol=1e-4)
    assert nll.item() > 0
