"""LiveEdit: its losses against whole models, its edits and their routing, its training."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from original_files import FAMILIES
from reference import rows, softmax
from test_liveedit_equations import slow_product
from test_trained_methods import CASES, KilledError, case, killer, query
from todays import OWN, TODAY
from untouched import assert_untouched, hook_count, weights_of
from worlds import load_small

from unike.backbones.base import PromptRows, answer_loss, encode_queries
from unike.backbones.hooks import transform
from unike.backbones.prefix import PrefixCache
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.edits import compose
from unike.edits.expert_network import ExpertNetwork, compare_each, compare_features
from unike.edits.experts import ExpertEdit, ExpertRecord, find_parts
from unike.methods import build
from unike.methods.liveedit import LiveEdit, _Draw, _Parts
from unike.methods.meta_training import meta_train
from unike.methods.preparation.folders import list_editor_options
from unike.types import Case, EditRequest, Probe, Query, UserError

ROOT = Path(__file__).parents[1]
BASE = {
    "model_name": "blip2", "name": "unused", "method": "liveedit", "layers": [4], "editor_rank": 6,
    "live_heads": 2, "live_image_tokens": 5, "live_scale": 1.0, "live_rank": 8, "editor_lr": 2e-3,
    "editor_steps": 4, "editor_batch": 3, "editor_val_every": 2, "c_edit": 1.0,
}  # fmt: skip


def hparams(**changes) -> HyperParams:
    return HyperParams.from_dict({**BASE, **changes})


@pytest.fixture(scope="module", params=FAMILIES)
def method(request: pytest.FixtureRequest) -> LiveEdit:
    """Untrained, with its backbone as an attribute."""
    backbone, made = load_small(request.param), build(hparams())
    assert isinstance(made, LiveEdit)
    made.start(backbone)
    made.backbone = backbone  # type: ignore[attr-defined]
    return made


def prefixes_of(method: LiveEdit) -> PrefixCache:
    return PrefixCache(method.backbone, 4, alone=True)  # type: ignore[attr-defined]


# ---------------------------------------------------------------- which tokens are the image's


@pytest.mark.parametrize("family", [*FAMILIES, *OWN, *TODAY])
def test_the_images_tokens_are_those_that_another_image_changes(family: str) -> None:
    backbone = load_small(family)
    asked = [query(0, "a fox"), replace(query(1, "two dogs there"), prompt="what?"), query(2, "a fox")]
    asked[2] = replace(asked[2], image=None)
    columns = [list(column) for column in zip(*((q.image, q.prompt, q.target) for q in asked), strict=True)]
    for side in ("right", "left"):
        batch = backbone.encode(*columns, side)
        shown = tuple(image is not None for image in batch.images)
        question, image = find_parts(
            backbone, PromptRows(batch.question_end, batch.attention_mask, batch.prompts, shown)
        )
        others = [query(3).image, query(4).image, None]
        changed = (backbone.encode(others, *columns[1:], side).inputs_embeds != batch.inputs_embeds).any(-1)
        assert not (changed & ~image).any()
        # LLaVA-OneVision ends each row of an image with the same learnt vector.
        same = batch.inputs_embeds[image & ~changed]
        assert len(same) == 0 or (family == "llava_onevision" and bool((same == same[0]).all()))
        assert image.any(1).tolist() == question.any(1).tolist() == [True, True, False]
        for row in range(2):
            last = image[row].nonzero()[-1].item()
            expected = list(range(last + 1, int(batch.question_end[row]) + 1))
            assert question[row].nonzero()[:, 0].tolist() == expected


# ---------------------------------------------------------------- edits


def make_edit(method: LiveEdit, i: int, name: str = "") -> ExpertEdit:
    request = EditRequest(name or f"e{i}", query(i))
    edit = method.edit(method.backbone, request, prefixes_of(method))  # type: ignore[attr-defined]
    assert isinstance(edit, ExpertEdit)
    return edit


def open_wide(method: LiveEdit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are kept whatever the image."""
    monkeypatch.setattr(
        "unike.edits.experts.keep_near", lambda s, limit: torch.ones_like(s, dtype=torch.bool)
    )


@torch.no_grad()
def logits_of(backbone: VisionLanguageBackbone, queries: list[Query]) -> torch.Tensor:
    return backbone(encode_queries(backbone, queries)).logits


def slow_answer(method: LiveEdit, edit: ExpertEdit, asked: Query, kept: list[bool]) -> torch.Tensor:
    """The whole model with the experts that are kept, one query alone, without a mask."""
    backbone, network = method.backbone, method.trained  # type: ignore[attr-defined]
    parts = read_alone(backbone, asked)
    features = network.prompts.read_question(parts.question[None], all_of(parts.question))
    similarity = [compare_features(features, r.question[None]).item() for r in edit.records]
    shares = iter(softmax([s for s, own in zip(similarity, kept, strict=True) if own]))
    weights = [
        next(shares) / (1 + math.exp(-s)) if own else 0.0 for s, own in zip(similarity, kept, strict=True)
    ]

    def after(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        normed = network.norm(output)
        for record, weight in zip(edit.records, weights, strict=True):
            output = output + weight * (normed @ record.left.T).relu() @ record.right
        return output

    layer = backbone.layout.layer(4)
    with transform([(layer, layer, after)]):
        return logits_of(backbone, [asked])[0]


def all_of(states: torch.Tensor) -> torch.Tensor:
    return torch.ones(1, len(states), dtype=torch.bool)


@torch.no_grad()
def read_alone(backbone: VisionLanguageBackbone, asked: Query) -> _Parts:
    """What leaves layer 4 of the whole model, cut where the image's tokens change with the image."""
    batch, seen = encode_queries(backbone, [asked]), []
    layer = backbone.layout.layer(4)
    with transform([(layer, layer, lambda x, output: seen.append(output[0]) or output)]):
        backbone(batch)
    other = encode_queries(backbone, [replace(asked, image=query(5).image)])
    image = (other.inputs_embeds != batch.inputs_embeds).any(-1)[0]
    stop, end = int(image.nonzero()[-1]) + 1, int(batch.question_end[0]) + 1
    return _Parts(seen[0][image], seen[0][stop:end], seen[0][end:])


def test_an_edit_is_written_from_what_leaves_the_layer(method: LiveEdit) -> None:
    (record,) = make_edit(method, 0).records
    parts, network = read_alone(method.backbone, query(0)), method.trained  # type: ignore[attr-defined]
    whole = torch.cat([parts.image, parts.question, parts.answer])
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(record.left, network.left(whole[None], all_of(whole))[0], **close)
    torch.testing.assert_close(record.right, network.right(whole[None], all_of(whole))[0], **close)
    both = parts.question[None], all_of(parts.question), parts.image[None], all_of(parts.image)
    torch.testing.assert_close(record.image, network.edits.read_image(*both)[0], **close)
    torch.testing.assert_close(record.question, network.edits.read_question(*both[:2])[0], **close)
    other = network.left(whole[None, :-1], all_of(whole[:-1]))[0]
    assert (record.left - other).abs().max() > 1e-3, "the answer's last token counts"


def test_a_sequence_answers_as_the_equations_say(method: LiveEdit) -> None:
    backbone, edits = method.backbone, [make_edit(method, i) for i in range(3)]  # type: ignore[attr-defined]
    whole = compose(edits)
    assert isinstance(whole, ExpertEdit)
    asked = [query(0), replace(query(1, "two dogs there"), prompt="what is it?"), query(4)]
    base = logits_of(backbone, asked)
    with whole.applied(backbone):
        found = logits_of(backbone, asked)
    kept, network = whole.kept, method.trained
    assert kept is not None
    mask = encode_queries(backbone, asked).attention_mask.bool()
    for b, one in enumerate(asked):
        parts = read_alone(backbone, one)
        both = parts.question[None], all_of(parts.question), parts.image[None], all_of(parts.image)
        seen = network.prompts.read_image(*both)
        limit = compare_each(seen, network.prompts.read_sentinel(*both[:2])).item()
        near = [compare_features(seen, r.image[None]).item() > limit for r in whole.records]
        assert kept[b].tolist() == near
        expected = slow_answer(method, whole, one, near) if any(near) else base[b][mask[b]]
        torch.testing.assert_close(found[b][mask[b]], expected, atol=5e-5, rtol=1e-4)


def test_all_experts_are_fused_where_all_are_kept(method: LiveEdit, monkeypatch) -> None:
    open_wide(method, monkeypatch)
    backbone = method.backbone  # type: ignore[attr-defined]
    whole = compose([make_edit(method, i) for i in range(3)])
    assert isinstance(whole, ExpertEdit)
    calls: list[int] = []
    with whole.applied(backbone), monkeypatch.context() as patch:
        real = ExpertNetwork.apply_experts
        patch.setattr(ExpertNetwork, "apply_experts", lambda *a: calls.append(1) or real(*a))
        found = logits_of(backbone, [query(0)])[0]
    torch.testing.assert_close(found, slow_answer(method, whole, query(0), [True] * 3), atol=5e-5, rtol=1e-4)
    assert (found - logits_of(backbone, [query(0)])[0]).abs().max() > 1e-3
    assert calls == [1], "one pass over all experts"
    decided = whole.explain()
    assert decided["experts"] == [3.0]
    assert decided["weight"] == pytest.approx([whole.strengths.sum().item()])
    assert 0 < decided["weight"][0] < 1


def test_edits_are_added_and_undone_one_by_one_bit_for_bit(method: LiveEdit, monkeypatch) -> None:
    open_wide(method, monkeypatch)
    backbone, edits = method.backbone, [make_edit(method, i) for i in range(4)]  # type: ignore[attr-defined]
    before, hooks = weights_of(backbone), hook_count(backbone.model)
    asked, seen = [query(1), query(3)], []

    def answer(edit) -> torch.Tensor:
        with edit.applied(backbone):
            return logits_of(backbone, asked)

    whole = edits[0]
    for edit in edits[1:]:
        seen.append(answer(whole))
        whole = whole | edit
    full = answer(whole)
    for place in (3, 2, 1):
        whole = whole.drop([place])
        assert torch.equal(answer(whole), seen[place - 1])
        assert not torch.equal(answer(whole), full)
    fresh = compose(edits)
    assert torch.equal(answer(fresh), full)
    middle, direct = fresh.drop([1, 2]), compose([edits[0], edits[3]])
    assert torch.equal(answer(middle), answer(direct))
    assert [r.id for r in middle.records] == ["e0", "e3"]
    assert_untouched(backbone, before, hooks)


def test_without_an_image_nothing_is_edited_and_nothing_can_be(method: LiveEdit, monkeypatch) -> None:
    open_wide(method, monkeypatch)
    backbone, edit = method.backbone, make_edit(method, 0)  # type: ignore[attr-defined]
    text, shown = [Query(None, query(0).prompt, "a fox")], [query(0)]
    base, seen = logits_of(backbone, text), logits_of(backbone, shown)
    with edit.applied(backbone):
        assert torch.equal(logits_of(backbone, text), base)
        assert not torch.equal(logits_of(backbone, shown), seen)
    with pytest.raises(UserError, match="edit t: has no image; expected one"):
        method.edit(backbone, EditRequest("t", text[0]), prefixes_of(method))
    with pytest.raises(UserError, match="record t: has no image; expected one"):
        method.loss(backbone, Case(EditRequest("t", text[0]), CASES[0].probes), prefixes_of(method))


def test_experts_of_a_layer_or_network_of_their_own_stay_apart(method: LiveEdit) -> None:
    one, other = make_edit(method, 0), make_edit(method, 1)
    assert isinstance(one | other, ExpertEdit)
    other.layer = 3
    assert [part.layer for part in (one | other).parts] == [4, 3]
    assert one.batch([one, other]) is None
    assert one.changes_prefix(method.backbone, 5)  # type: ignore[attr-defined]
    assert not one.changes_prefix(method.backbone, 4)  # type: ignore[attr-defined]


# ---------------------------------------------------------------- losses


@torch.no_grad()
def slow_losses(method: LiveEdit, cases: list[Case], seed: int) -> list[float]:
    """By the definitions: every query alone in the whole model, every feature alone."""
    backbone, network = method.backbone, method.trained  # type: ignore[attr-defined]
    rng, hp = random.Random(seed), method.hparams
    lessons = [method._read_lesson(backbone, c, prefixes_of(method)) for c in cases]
    draws = [_Draw.of(lesson, i, len(cases), rng) for i, lesson in enumerate(lessons)]
    own = [make_record(method, read_alone(backbone, c.request.query)) for c in cases]
    near, far, sides = [], [], []
    for lesson, drawn, one in zip(lessons, draws, cases, strict=True):
        asked = [one.request.query, *lesson.inside]
        near.append(make_record(method, read_alone(backbone, asked[drawn.edit_side])))
        far.append(
            make_record(method, read_alone(backbone, lesson.outside[drawn.outside - len(lesson.inside)]))
        )
        sides.append((asked[drawn.prompt_side], lesson.outside[drawn.outside - len(lesson.inside)]))

    def features(asked: Query) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = read_alone(backbone, asked)
        both = parts.question[None], all_of(parts.question), parts.image[None], all_of(parts.image)
        prompts = network.prompts
        return prompts.read_image(*both), prompts.read_sentinel(*both[:2]), prompts.read_question(*both[:2])

    def product(one: torch.Tensor, other: torch.Tensor) -> float:
        return slow_product(rows(one.reshape(-1, one.shape[-1])), rows(other.reshape(-1, other.shape[-1])))

    out = []
    for i, (lesson, drawn) in enumerate(zip(lessons, draws, strict=True)):
        total = 0.0
        for row, asked in enumerate([*lesson.inside, *lesson.outside]):
            edit, kept = ExpertEdit(tuple(own), network, 4), drawn.pools[row].tolist()
            batch = encode_queries(backbone, [asked])
            base = logits_of(backbone, [asked])
            after = slow_answer(method, edit, asked, kept)[None] if any(kept) else base
            if row < len(lesson.inside):
                assert kept[i]
                total += hp.c_edit * answer_loss(after, batch.labels).item()
            else:
                at = batch.labels[:, 1:] != -100
                before, moved = (x[:, :-1][at].log_softmax(-1) for x in (base, after))
                total += hp.c_loc * (before.exp() * (before - moved)).sum(-1).mean().item()
        (image, learnt, question), (far_image, far_learnt, _) = map(features, sides[i])
        keys = [r.image for r in near]
        shares = softmax([product(image, k) for k in keys] + [product(image, learnt)])
        routed = -math.log(shares[i])
        shares = softmax([product(far_image, k) for k in keys] + [product(far_image, far_learnt)])
        routed -= math.log(shares[-1])
        alike = [product(question, r.question) for r in [*near, *far]]
        routed -= math.log(softmax(alike)[i])
        rest = [x for j, x in enumerate(alike) if j != i]
        routed += math.log(1 + math.exp(-alike[i])) + math.log(
            1 + math.exp(rest[int(drawn.negative * len(rest))])
        )
        out.append(total + hp.live_routing * routed)
    return out


def make_record(method: LiveEdit, parts: _Parts) -> ExpertRecord:
    network, whole = method.trained, torch.cat([parts.image, parts.question, parts.answer])
    both = parts.question[None], all_of(parts.question), parts.image[None], all_of(parts.image)
    return ExpertRecord(
        "r",
        network.left(whole[None], all_of(whole))[0],
        network.right(whole[None], all_of(whole))[0],
        network.edits.read_image(*both)[0],
        network.edits.read_question(*both[:2])[0],
    )


def test_losses_are_those_of_whole_models(method: LiveEdit) -> None:
    """The release adds an expert to a layer's output and runs that layer again on it. Here it runs once."""
    backbone, cases = method.backbone, CASES[:3]  # type: ignore[attr-defined]
    expected = slow_losses(method, cases, 5)
    with torch.no_grad():
        found = list(method.losses(backbone, cases, range(3), prefixes_of(method), random.Random(5)))
        other = list(method.losses(backbone, cases, range(3), prefixes_of(method), random.Random(6)))
    assert [x.item() for x in found] == pytest.approx(expected, rel=1e-4)
    assert [x.item() for x in other] != pytest.approx(expected, rel=1e-4)


def test_each_process_computes_its_own_records_losses(method: LiveEdit) -> None:
    """With all records of the step at hand, whoever has which of them."""
    backbone, cases = method.backbone, CASES[:3]  # type: ignore[attr-defined]

    def compute(own: list[int]) -> list[float]:
        found = method.losses(backbone, cases, own, prefixes_of(method), random.Random(1))
        return [loss.item() for loss in found]

    with torch.no_grad():
        assert compute([0, 2]) + compute([1]) == pytest.approx([compute([0, 1, 2])[i] for i in (0, 2, 1)])
        alone = list(method.losses(backbone, cases[:1], [0], prefixes_of(method), random.Random(1)))
    assert alone[0].item() != pytest.approx(compute([0])[0])


def test_every_part_of_the_networks_learns(method: LiveEdit) -> None:
    method.trained.requires_grad_(True)
    method.trained.zero_grad()
    for loss in method.losses(
        method.backbone,
        CASES[:3],
        range(3),
        prefixes_of(method),
        random.Random(0),  # type: ignore[attr-defined]
    ):
        loss.backward(retain_graph=True)
    silent = [n for n, p in method.trained.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    method.trained.zero_grad()
    method.trained.requires_grad_(False)
    # A key's bias moves all scores alike: its gradient is nothing but rounding.
    assert [n for n in silent if not n.endswith("key.bias")] == []


def test_a_record_without_a_query_out_of_scope_is_learnt_from(method: LiveEdit) -> None:
    inside = [p for p in CASES[0].probes if p.expect == "target"]
    text = Probe("t_locality", Query(None, "who was king?", "a man"), "unchanged")
    one = replace(CASES[0], probes=(*inside, text))
    with torch.no_grad():
        loss = method.loss(method.backbone, one, prefixes_of(method))  # type: ignore[attr-defined]
        whole = method.loss(method.backbone, CASES[0], prefixes_of(method))  # type: ignore[attr-defined]
    assert math.isfinite(loss.item())
    assert loss.item() != whole.item()


# ---------------------------------------------------------------- training


def test_a_killed_training_goes_on_to_the_same_networks(tmp_path: Path) -> None:
    backbone, cases = load_small("blip2"), [case(i) for i in range(5)]
    whole = build(hparams())
    expected = meta_train(whole, backbone, cases, cases[:4], whole.hparams, tmp_path / "whole")
    # 4 steps of 3 records, 2 validations of 4: in a step, and in a validation's second group.
    for after in (10, 16, 19):
        again = build(hparams())
        with pytest.raises(KilledError):
            meta_train(again, backbone, cases, cases[:4], again.hparams, tmp_path / str(after), killer(after))
        again = build(hparams())
        assert meta_train(again, backbone, cases, cases[:4], again.hparams, tmp_path / str(after)) == expected
        state = again.trained.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in whole.trained.state_dict().items()), after
    assert expected.best < expected.losses[0] or expected.best_step == 2
    rest = json.loads((tmp_path / "whole/checkpoint.json").read_text())["progress"]
    assert (rest["step"], rest["visits"]) == (4, 12)


def test_validation_is_of_groups_of_a_steps_size(method: LiveEdit, tmp_path: Path) -> None:
    backbone, seen = load_small("blip2"), []
    one = build(hparams(editor_steps=1, editor_val_every=1))
    real = type(one).losses

    def spy(self, backbone, cases, own, *rest):
        seen.append((len(cases), list(own), torch.is_grad_enabled()))
        return real(self, backbone, cases, own, *rest)

    one.losses = spy.__get__(one)  # type: ignore[method-assign]
    meta_train(one, backbone, CASES, CASES, one.hparams, tmp_path)
    assert seen == [(3, [0, 1, 2], True), (3, [0, 1, 2], False), (2, [0, 1], False)]


# ---------------------------------------------------------------- options


def test_an_editors_key_holds_liveedits_options_for_liveedit_alone() -> None:
    own = list_editor_options(hparams())
    assert own["live_rank"] == 8
    assert list_editor_options(hparams(live_rank=9)) != own
    other = HyperParams.from_dict({**BASE, "method": "mend", "layers": 1})
    assert not [name for name in list_editor_options(other) if name.startswith("live_")]
    assert not [name for name in own if name.startswith(("ke_", "mend_", "serac_"))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 2}, "layers: 2; method: liveedit edits one layer"),
        ({"layers": [3, 4]}, r"layers: \(3, 4\); method: liveedit edits one layer"),
        ({"live_heads": 4}, "live_heads: 4; expected a divisor of editor_rank, 6"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(hparams(**changes))


def test_heads_that_do_not_divide_the_decoders_width_are_refused() -> None:
    made = build(hparams(editor_rank=6, live_heads=3))
    with pytest.raises(
        UserError, match="live_heads: 3; expected a divisor of the decoder's width, 40, such as"
    ):
        made.start(load_small("blip2"))


LAYERS = {"smol": 30, "tiny_blip2": 8, "tiny_minigpt4": 8, **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), 28)}


@pytest.mark.parametrize("path", sorted((ROOT / "hparams/liveedit").glob("*.yaml")), ids=lambda p: p.stem)
def test_each_yamls_layer_is_the_published_one_scaled(path: Path) -> None:
    count = LAYERS.get(path.stem, 28 if path.stem == "llava_onevision" else 32)
    made = HyperParams.from_hparams(path)
    assert made.layers == (round(21 * count / 32),)
    assert (made.live_rank, made.live_queries, made.live_heads, made.live_scale) == (4, 4, 8, 5.0)
