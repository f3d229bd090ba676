"""Backbones: parity with the original code's outputs, padding, prefix and suffix, generation."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from original_files import FAMILIES, FILES, make_spec
from PIL import Image
from safetensors.torch import load_file

from unike.backbones import load_backbone
from unike.backbones.base import IGNORED, answer_loss, encode_queries
from unike.backbones.prefix import PrefixCache
from unike.backbones.vlm import VisionLanguageBackbone
from unike.system.cache import BoundedCache
from unike.types import Query, UserError

EXPECTED = load_file(FILES / "expected.safetensors")
CASES = json.loads((FILES / "expected.json").read_text())
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> VisionLanguageBackbone:
    return load_backbone(make_spec(request.param))


def family(backbone: VisionLanguageBackbone) -> str:
    return "minigpt4" if backbone.dialogue.before_image else "blip2"


def queries(backbone: VisionLanguageBackbone, text_only: bool = False) -> list[Query]:
    cases = CASES[family(backbone)]
    pictures = [None] * len(cases) if text_only else list(EXPECTED["pixel_values"])
    return [Query(p, c["prompt"], c["target"]) for p, c in zip(pictures, cases, strict=True)]


def real(batch, logits: torch.Tensor, row: int) -> torch.Tensor:
    return logits[row][batch.attention_mask[row].bool()]


@pytest.mark.parametrize("text_only", [False, True])
def test_logits_are_those_of_the_original_code(backbone, text_only: bool) -> None:
    batch = encode_queries(backbone, queries(backbone, text_only))
    logits = backbone(batch).logits
    stem = f"{family(backbone)}_text_only_logits" if text_only else f"{family(backbone)}_logits"
    for row in range(len(batch)):
        torch.testing.assert_close(
            real(batch, logits, row), EXPECTED[f"{stem}.{row}"], atol=TOLERANCE, rtol=0
        )


def test_labels_cover_the_answer_alone(backbone) -> None:
    batch = encode_queries(backbone, queries(backbone))
    for row, case in enumerate(CASES[family(backbone)]):
        answer = case["text_ids"][case["prompt_len"] :]
        labels = batch.labels[row]
        assert labels[labels != IGNORED].tolist() == answer
        assert (labels != IGNORED).nonzero()[0].item() == batch.question_end[row] + 1


def test_padding_side_and_batch_size_change_nothing(backbone) -> None:
    asked = [*queries(backbone), *queries(backbone, text_only=True)]
    together = encode_queries(backbone, asked)
    left = backbone.encode(
        [q.image for q in asked], [q.prompt for q in asked], [q.target for q in asked], "left"
    )
    right_logits, left_logits = backbone(together).logits, backbone(left).logits
    assert together.attention_mask.min() == 0, "the batch must hold padding for this to test anything"
    for row, query in enumerate(asked):
        alone = encode_queries(backbone, [query])
        expected = real(alone, backbone(alone).logits, 0)
        torch.testing.assert_close(real(together, right_logits, row), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(real(left, left_logits, row), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_suffix_of_prefix_is_the_whole_model(backbone, count: int) -> None:
    batch = encode_queries(backbone, queries(backbone))
    state = backbone.prefix(batch, len(backbone.layout) - count)
    torch.testing.assert_close(backbone.suffix(state), backbone(batch).logits, atol=1e-6, rtol=0)


def test_prefix_does_not_ignore_its_input(backbone) -> None:
    first, second = (backbone.prefix(encode_queries(backbone, [q]), 2).hidden for q in queries(backbone))
    assert first.shape != second.shape or not torch.equal(first, second)


def test_prefix_cache_computes_each_query_once(backbone) -> None:
    cache = PrefixCache(backbone, 2)
    asked = [*queries(backbone), *queries(backbone, text_only=True)]
    once = backbone.suffix(cache.state(asked))
    again = backbone.suffix(cache.state([*asked, asked[0]]))
    assert cache.computed == len(asked)
    batch = encode_queries(backbone, asked)
    whole = backbone(batch).logits
    for row in range(len(asked)):
        torch.testing.assert_close(real(batch, once, row), real(batch, whole, row), atol=1e-5, rtol=0)
        torch.testing.assert_close(again[row], once[row], atol=1e-6, rtol=0)


def test_prefix_cache_forgets_the_oldest_over_its_budget(backbone) -> None:
    cache = PrefixCache(backbone, 2, max_bytes=1)
    asked = queries(backbone)
    cache.state(asked)
    assert len(cache) == 1
    batch, again = encode_queries(backbone, asked), backbone.suffix(cache.state(asked))
    whole = backbone(batch).logits
    for row in range(len(asked)):
        torch.testing.assert_close(real(batch, again, row), real(batch, whole, row), atol=1e-5, rtol=0)


def test_generation_is_the_argmax_of_teacher_forcing(backbone) -> None:
    query = queries(backbone)[0]
    batch = backbone.encode([query.image], [query.prompt])
    embed = backbone.decoder.get_input_embeddings()
    hidden, written = batch.inputs_embeds, []
    for _ in range(5):
        mask = torch.ones(hidden.shape[:2], dtype=torch.long)
        step = replace(batch, inputs_embeds=hidden, attention_mask=mask)
        written.append(int(backbone(step).logits[0, -1].argmax()))
        hidden = torch.cat([hidden, embed(torch.tensor([[written[-1]]]))], 1)
    text = backbone.tokenizer.decode(written, skip_special_tokens=True)
    assert backbone.generate([query.image], [query.prompt], max_new_tokens=5) == [backbone.cut(text)]


def test_a_picture_used_twice_is_seen_once(backbone) -> None:
    picture = Image.new("RGB", (90, 70), "teal")
    seen = backbone.cache.computed
    backbone.encode([picture, picture, picture.copy()], ["a", "b", "c"])
    assert backbone.cache.computed == seen + 1
    backbone.encode([Image.new("RGB", (90, 70), "navy")], ["a"])
    assert backbone.cache.computed == seen + 2


def test_images_may_be_paths_pictures_or_tensors(backbone, tmp_path) -> None:
    picture = Image.effect_noise((90, 70), 60).convert("RGB")
    path = tmp_path / "noise.png"
    picture.save(path)
    by_path = backbone.encode([str(path), path], ["what?"] * 2).inputs_embeds
    by_picture = backbone.encode([picture], ["what?"]).inputs_embeds
    torch.testing.assert_close(by_path[0], by_picture[0], atol=1e-6, rtol=0)
    pixels = backbone.vision.read(picture)
    by_tensor = backbone.encode([pixels], ["what?"]).inputs_embeds
    torch.testing.assert_close(by_tensor[0], by_picture[0], atol=1e-6, rtol=0)


def test_bad_images_are_user_errors(backbone, tmp_path) -> None:
    with pytest.raises(UserError, match=r"no such picture"):
        backbone.encode([tmp_path / "absent.png"], ["what?"])
    with pytest.raises(UserError, match=r"\(3, H, W\)"):
        backbone.encode([torch.zeros(2, 4, 4)], ["what?"])
    with pytest.raises(UserError, match=r"prompt: is empty"):
        backbone.encode([None], [""])


class MergingTokenizer:
    """Merges the border between prompt and answer: ``: a`` is one token of its own."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        pieces = text.replace(": a", "\0").split("\0")
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            ids += [999] * (i > 0) + [ord(c) % 90 for c in piece]
        return SimpleNamespace(input_ids=ids)


def test_a_tokeniser_that_merges_across_the_border_keeps_the_prompt_whole(backbone, monkeypatch) -> None:
    monkeypatch.setattr(backbone, "tokenizer", MergingTokenizer())
    monkeypatch.setattr(backbone, "_token_ids", BoundedCache(10))
    prompt, answer = backbone.prompt_and_answer("Short answer:", "apple")
    assert 999 not in prompt + answer
    assert prompt == [ord(c) % 90 for c in "Short answer:"]
    assert answer == [ord(c) % 90 for c in " apple"]


def test_answers_start_with_exactly_one_space(backbone) -> None:
    asked = [backbone.prompt_and_answer("Short answer:", t)[1] for t in ("a fox", " a fox", "  a fox\n")]
    assert asked[0] == asked[1] == asked[2]


def test_answer_loss_is_the_mean_over_each_rows_answer() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.full((2, 5), IGNORED)
    labels[0, 2:4], labels[1, 4] = torch.tensor([3, 5]), 1
    naive = []
    for row in range(2):
        terms = [
            -logits[row, t - 1].log_softmax(-1)[labels[row, t]]
            for t in range(1, 5)
            if labels[row, t] != IGNORED
        ]
        naive.append(torch.stack(terms).mean())
    torch.testing.assert_close(answer_loss(logits, labels), torch.stack(naive))


def test_a_decoder_of_another_family_is_refused(tmp_path) -> None:
    wrong = replace(make_spec("blip2"), name=str(FILES / "llama"))
    with pytest.raises(UserError, match=r"decoder|expected|width"):
        load_backbone(wrong)


def test_the_fingerprint_tells_weights_apart(backbone) -> None:
    before = backbone.fingerprint
    weight = next(backbone.model.parameters())
    with torch.no_grad():
        former = weight.flatten()[0].clone()
        weight.flatten()[0] += 1
    backbone._fingerprint = None
    changed = backbone.fingerprint
    with torch.no_grad():
        weight.flatten()[0] = former
    backbone._fingerprint = None
    assert changed != before == backbone.fingerprint
