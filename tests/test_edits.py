"""UniKE and fine-tuning on small random backbones: what an edit changes, and that nothing else does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import diverging
from original_files import FAMILIES, make_spec
from PIL import Image
from untouched import assert_untouched, hook_count, weights_of

from unike.backbones import load_backbone
from unike.backbones.base import Batch, answer_loss, encode_queries
from unike.backbones.prefix import PrefixCache
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.datasets.triplets import Triplet
from unike.edits import RoutedEdit, compose, shares
from unike.edits.content import digest
from unike.edits.deltas import WeightDelta
from unike.knowledge.memory import KnowledgeMemory
from unike.knowledge.scope import ScopeEncoder, ScopeMeasure
from unike.methods.base import build
from unike.methods.preparation.knowledge import build_knowledge, make_knowledge
from unike.types import EditRequest, Query

COLORS = ("teal", "navy", "olive", "maroon", "gold", "gray")
BASE = {
    "model_name": "blip2", "name": "unused", "layers": 2, "k": 3, "beta": 0.5, "max_steps": 25, "lr": 2e-2,
    "encoder_steps": 5, "encoder_batch": 4, "eval_batch": 4, "n_keys": 4,
}  # fmt: skip
SETTINGS = {
    "paper": {},
    "intrinsic": {"external": "none", "zeta": "none"},
    "latent": {"intrinsic": False, "alpha": 0.5},
    "plain": {"attention": "plain", "alpha": 0.3, "tau": 0.1, "similarity_bias": 5.0},
    "prompt": {"external": "prompt", "zeta": "random"},
    "scoped": {"scope_gate": "nearest", "memory": "edit", "tau": 0.2},
    "trained": {
        "scope_gate": "nearest", "scope_measure": "trained", "scope_halves": "both", "memory": "edit",
        "scope_threshold": 0.99, "alpha": 0.5,
    },
    "semantic": {"zeta": "semantic", "memory": "bank"},
    "patcher": {
        "external": "none", "zeta": "none", "key_init": "query", "activation_loss": 0.1, "memory_loss": 0.1,
    },
    "ft": {"method": "ft", "layers": 1},
}  # fmt: skip
LATENT = ("paper", "latent", "plain", "semantic")


def picture(color: str) -> Image.Image:
    return Image.new("RGB", (84, 84), color)


def query(i: int, answer: str = "a fox") -> Query:
    return Query(picture(COLORS[i]), f"Question: what is number {i}? Short answer:", answer)


class World:
    """A random backbone with knowledge about a few pictures."""

    def __init__(self, family: str) -> None:
        self.backbone: VisionLanguageBackbone = load_backbone(make_spec(family))
        self.triplets = [Triplet(query(i, "two dogs"), "a fox") for i in range(len(COLORS))]
        hparams = HyperParams.from_dict(BASE)
        self.states, self.encoders, self.reports = build_knowledge(
            self.backbone, self.triplets, [4, 5], hparams
        )

    def method(self, setting: str, scope_seed: int = 0, **changes):
        hparams = HyperParams.from_dict({**BASE, **SETTINGS[setting], **changes})
        known = make_knowledge(self.states, self.encoders, hparams)
        torch.manual_seed(scope_seed)
        # Untrained: what the gate measures with is another matter than what it does.
        encoder = ScopeEncoder(self.backbone.layout.width, 16, 8, 2).eval().requires_grad_(False)
        known[4] = replace(known[4], scope=ScopeMeasure(encoder, {1: 0.9}))
        return build(hparams, known)

    def edit(self, setting: str, i: int = 0, history=None, **changes):
        method = self.method(setting, **changes)
        prefixes = PrefixCache(self.backbone, method.layers(self.backbone)[0])
        return method.edit(self.backbone, EditRequest(f"e{i}", query(i)), prefixes, history)

    def logits(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return self.backbone(batch).logits


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    return {}


@pytest.fixture(params=FAMILIES)
def world(request: pytest.FixtureRequest, worlds: dict[str, World]) -> World:
    if request.param not in worlds:
        worlds[request.param] = World(request.param)
    return worlds[request.param]


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_edit_changes_answers_while_applied_and_nothing_after(world: World, setting: str) -> None:
    backbone = world.backbone
    before, hooks = weights_of(backbone), hook_count(backbone.model)
    batch = encode_queries(backbone, [query(0), query(1)])
    base = world.logits(batch)
    edit = world.edit(setting)
    asked = encode_queries(backbone, [edit.rewrite(query(0)), edit.rewrite(query(1))])
    with edit.applied(backbone):
        inside = world.logits(asked)
    assert inside.shape != base.shape or not torch.equal(inside, base)
    assert torch.equal(world.logits(batch), base)
    assert_untouched(backbone, before, hooks)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_base_is_whole_after_an_exception_in_the_middle(world: World, setting: str) -> None:
    backbone = world.backbone
    edit = world.edit(setting)
    before, hooks = weights_of(backbone), hook_count(backbone.model)

    def ask_and_fail() -> None:
        with edit.applied(backbone):
            world.logits(encode_queries(backbone, [query(0)]))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask_and_fail()
    assert_untouched(backbone, before, hooks)


def test_the_base_is_whole_when_making_the_edit_fails(world: World, monkeypatch) -> None:
    backbone = world.backbone
    before, hooks = weights_of(backbone), hook_count(backbone.model)
    monkeypatch.setattr("unike.methods.training._score_rows", diverging(float("nan")))
    for setting in ("paper", "ft"):
        with pytest.raises(FloatingPointError, match="nan after 0 steps"):
            world.edit(setting)
    assert_untouched(backbone, before, hooks)


@pytest.mark.parametrize("setting", ["paper", "intrinsic", "scoped", "patcher", "ft"])
def test_training_lowers_the_edits_loss(world: World, setting: str) -> None:
    backbone, method = world.backbone, world.method(setting)
    prefixes = PrefixCache(backbone, method.layers(backbone)[0])
    state = prefixes.state([query(0)])
    start = answer_loss(backbone.suffix(state), state.labels).item()
    edit = world.edit(setting)
    assert edit.info["steps"] > 0
    assert edit.info["loss"] < 0.7 * start
    with edit.applied(backbone):
        again = answer_loss(backbone.suffix(state), state.labels).item()
    assert again == pytest.approx(edit.info["loss"], rel=1e-3, abs=1e-5)


def test_an_edit_tells_what_it_retrieved(world: World) -> None:
    edit = world.edit("paper", k=len(COLORS) + 1)
    with edit.applied(world.backbone):
        world.logits(encode_queries(world.backbone, [query(0), replace(query(3), image=None)]))
    about, elsewhere = edit.explain()["retrieved"]
    assert about["own item"] == pytest.approx(1, abs=1e-5)
    assert elsewhere.get("own item", 0) < 0.999
    for told in (about, elsewhere):
        assert len(told) == 3
        assert list(told.values()) == sorted(told.values(), reverse=True)


@pytest.mark.parametrize("setting", SETTINGS)
def test_padding_and_batch_size_change_nothing_under_an_edit(world: World, setting: str) -> None:
    # All items are retrieved: which of two that are equally near is among the k is chance.
    backbone, edit = world.backbone, world.edit(setting, k=len(COLORS) + 1)
    asked = [edit.rewrite(q) for q in (query(0), query(1, "two dogs there"), replace(query(2), image=None))]
    images, prompts, targets = zip(*((q.image, q.prompt, q.target) for q in asked), strict=True)
    right = backbone.encode(images, prompts, targets)
    left = backbone.encode(images, prompts, targets, "left")
    with edit.applied(backbone):
        right_logits, left_logits = world.logits(right), world.logits(left)
        for row, one in enumerate(asked):
            alone = encode_queries(backbone, [one])
            expected = world.logits(alone)[0]
            for batch, logits in ((right, right_logits), (left, left_logits)):
                got = logits[row][batch.attention_mask[row].bool()]
                torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_cached_decoding_agrees_with_teacher_forcing(world: World, setting: str) -> None:
    backbone, edit, steps = world.backbone, world.edit(setting), 6
    one = edit.rewrite(query(0))
    batch = backbone.encode([one.image], [one.prompt])
    lm = backbone.model.language_model
    with edit.applied(backbone), torch.no_grad():
        with backbone.prompt.asking(batch):
            out = lm.generate(
                inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask, do_sample=False,
                max_new_tokens=steps, eos_token_id=None, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        written = lm.get_input_embeddings()(out.sequences)
        embeds = torch.cat([batch.inputs_embeds, written], 1)
        whole = replace(
            batch, inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long)
        )
        forced = backbone(whole).logits[0, -steps - 1 : -1]
    torch.testing.assert_close(forced, torch.cat(out.logits), atol=2e-5, rtol=0)


@pytest.mark.parametrize("setting", ["paper", "intrinsic", "scoped", "trained"])
def test_composed_edits_are_both_in_force(world: World, setting: str) -> None:
    backbone = world.backbone
    first = world.edit(setting, 0)
    second = world.edit(setting, 1, history=first)
    both = compose([first, second])
    assert isinstance(both, RoutedEdit)
    assert [r.id for r in both.records] == ["e0", "e1"]
    state = PrefixCache(backbone, both.layers[0]).state([query(0), query(1)])
    with both.applied(backbone):
        together = backbone.suffix(state)
    for edit in (first, second):
        with edit.applied(backbone):
            assert not torch.equal(backbone.suffix(state), together)


def test_edits_of_two_scope_classifiers_stay_apart(world: World) -> None:
    """As one edit, the first would be found by the other's classifier with its own key."""
    backbone, first = world.backbone, world.edit("trained", 0)
    other = world.edit("trained", 1, scope_seed=1)
    assert first.needs()["scope"] != other.needs()["scope"]
    both = first | other
    assert [part.kind for part in both.parts] == ["routed", "routed"]
    assert first.together([first, other]) is None
    with both.applied(backbone):
        for i, part in enumerate(both.parts):
            world.logits(encode_queries(backbone, [query(i)]))
            assert part.scopes.item() == pytest.approx(1, abs=1e-5)
    alike = first | world.edit("trained", 1)
    assert isinstance(alike, RoutedEdit)
    assert len((both | alike).parts) == 2, "each joins its like, wherever that stands"


def test_edits_of_two_memories_stay_apart(world: World) -> None:
    """Of equal length, and with equal encoders."""
    first, other = world.edit("paper", 0), world.edit("paper", 1)
    assert isinstance(first | other, RoutedEdit)
    bank = other.knowledge[5].bank
    changed = KnowledgeMemory(bank.keys, bank.values.flip(0))
    other.knowledge = {**other.knowledge, 5: replace(other.knowledge[5], bank=changed)}
    assert [part.kind for part in (first | other).parts] == ["routed", "routed"]
    assert first.together([first, other]) is None


def test_joining_many_edits_takes_few_checksums(world: World, monkeypatch) -> None:
    """One for each object that edits share; none where it is the same object."""
    taken = []
    monkeypatch.setattr(shares, "digest", lambda tensors: taken.append(1) or digest(tensors))
    edits = [replace(world.edit("trained", 0, alpha="adaptive")) for _ in range(2)]
    assert edits[0].knowledge[4] is not edits[1].knowledge[4]
    whole = compose([edits[i % 2] for i in range(50)])
    assert len(whole.records) == 50
    # Of two layers and one scope classifier, twice.
    assert len(taken) == 2 * 3
    again = compose([edits[0]] * 50)
    assert len(again.records) == 50
    assert len(taken) == 2 * 3


def test_a_later_weight_delta_starts_from_the_former(world: World) -> None:
    first = world.edit("ft", 0)
    second = world.edit("ft", 1, history=first)
    both = first | second
    assert isinstance(both, WeightDelta)
    assert all(torch.equal(both.weights[n], second.weights[n]) for n in second.weights)
    assert any(not torch.equal(first.weights[n], second.weights[n]) for n in second.weights)


def test_a_closed_gate_leaves_the_base_bit_for_bit(world: World) -> None:
    backbone, edit = world.backbone, world.edit("scoped")
    batch = encode_queries(backbone, [query(1)])
    base = world.logits(batch)
    for threshold, same in ((1.1, True), (-1.0, False)):
        routing = replace(edit.routing, external="none", scope_threshold=threshold)
        with replace(edit, routing=routing).applied(backbone):
            assert torch.equal(world.logits(batch), base) == same


def test_a_closed_gate_closes_both_halves(world: World) -> None:
    backbone, edit = world.backbone, world.edit("trained")
    batch = encode_queries(backbone, [query(1)])
    base = world.logits(batch)
    for halves, threshold, same in (
        ("both", 1.1, True),
        ("both", -1.1, False),
        # The knowledge states speak behind a gate that closes the extra pairs alone.
        ("intrinsic", 1.1, False),
    ):
        routing = replace(edit.routing, scope_halves=halves, scope_threshold=threshold)
        with replace(edit, routing=routing).applied(backbone):
            assert torch.equal(world.logits(batch), base) == same


def test_a_gated_edit_leaves_the_bank_to_every_prompt(world: World) -> None:
    backbone, edit = world.backbone, world.edit("trained")
    batch = encode_queries(backbone, [query(1)])
    base = world.logits(batch)
    routing = replace(edit.routing, scope_threshold=1.1, memory="both")
    gated, bank = replace(edit, routing=routing), replace(edit, routing=replace(routing, memory="bank"))
    with gated.applied(backbone):
        given = world.logits(batch)
    assert not torch.equal(given, base)
    with bank.applied(backbone):
        torch.testing.assert_close(world.logits(batch), given, atol=1e-6, rtol=0)


def test_the_trained_gate_finds_the_edits_own_prompt(world: World) -> None:
    backbone, edit = world.backbone, world.edit("trained")
    with edit.applied(backbone):
        world.logits(backbone.encode([picture(COLORS[0])] * 2, [query(0).prompt, "what?"], None, "left"))
    own, other = edit.explain()["scope"]
    assert own == pytest.approx(1, abs=1e-5)
    assert other < own
    assert "e0.scope_key" in edit.state_dict()


def test_a_measure_of_the_yaml_is_needed(world: World) -> None:
    edit = world.edit("trained")
    for changes in ({"scope_measure": "cosine", "scope_threshold": None}, {"scope_measure": "trained"}):
        known = {} if changes["scope_measure"] == "trained" else edit.knowledge
        broken = replace(edit, routing=replace(edit.routing, **changes), knowledge=known)
        with pytest.raises(ValueError, match="scope_measure"), broken.applied(world.backbone):
            pass


def test_only_the_nearest_edit_speaks(world: World) -> None:
    backbone = world.backbone
    both = compose([world.edit("scoped", 0), world.edit("scoped", 1)])
    routing = replace(both.routing, external="none", scope_threshold=-1.0)
    alone = replace(both, records=both.records[1:], routing=routing)
    batch = encode_queries(backbone, [query(1)])
    with replace(both, routing=routing).applied(backbone):
        nearest = world.logits(batch)
    with alone.applied(backbone):
        torch.testing.assert_close(world.logits(batch), nearest, atol=1e-6, rtol=0)
    with replace(both, routing=replace(routing, scope_gate="threshold")).applied(backbone):
        assert not torch.allclose(world.logits(batch), nearest, atol=1e-6)


def test_an_edit_is_the_same_for_the_same_seed(world: World) -> None:
    one, other = world.edit("paper"), world.edit("paper")
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert one.nbytes == sum(t.nbytes for t in one.state_dict().values())


@pytest.mark.parametrize("setting", LATENT)
def test_alpha_is_a_share_and_the_edits_own_item_is_found(world: World, setting: str) -> None:
    backbone, edit = world.backbone, world.edit(setting)
    with edit.applied(backbone):
        world.logits(encode_queries(backbone, [query(0)]))
    for decision in edit.trace.values():
        assert 0 <= decision.alpha.item() <= 1
    first = edit.trace[edit.layers[0]].retrieved
    if setting != "semantic":
        # The first edited layer receives the base model's state, so the own key matches exactly.
        assert first.similarity[0, 0].item() == pytest.approx(1, abs=1e-4)
        assert len(COLORS) in first.index[0].tolist()
