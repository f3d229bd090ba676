"""LLaVA, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL and InstructBLIP: held against the models' own way.

The reference is what ``transformers`` does with the processor's own inputs, in one forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from todays import CHATS, OWN, TODAY, save_folder, todays_spec
from torch.testing import assert_close
from transformers import AutoTokenizer, ProcessorMixin

from unike.backbones import load_backbone
from unike.backbones.base import IGNORED, encode_queries, narrow
from unike.backbones.prefix import PrefixCache
from unike.backbones.store import RowStore
from unike.backbones.vlm import VisionLanguageBackbone
from unike.types import Query, UserError

CLOSE = {"atol": 2e-5, "rtol": 0}
SIZES = ((90, 50), (28, 28), (60, 190))
SPLIT = ("llava_onevision", "qwen2_vl", "qwen2_5_vl")
PROCESSORS = {
    "llava": ("LlavaProcessor", {"patch_size": 14, "num_additional_image_tokens": 1}),
    "llava_onevision": ("LlavaOnevisionProcessor", {"num_image_tokens": 4}),
    "qwen2_vl": ("Qwen2VLProcessor", {}),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", {}),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], VisionLanguageBackbone]:
    """A random backbone of each family, made once."""

    @functools.cache
    def make(family: str) -> VisionLanguageBackbone:
        folder = save_folder(tmp_path_factory.mktemp(family), family)
        loaded = load_backbone(todays_spec(family, folder))
        loaded.family = family  # type: ignore[attr-defined]
        return loaded

    return make


@pytest.fixture(scope="module", params=TODAY)
def backbone(request: pytest.FixtureRequest, load) -> VisionLanguageBackbone:
    return load(request.param)


@pytest.fixture(scope="module", params=(*TODAY, *OWN))
def every(request: pytest.FixtureRequest, load) -> VisionLanguageBackbone:
    """Those whose class has a processor of its own, and those without."""
    return load(request.param)


def picture(size: tuple[int, int] = SIZES[0]) -> Image.Image:
    generator = torch.Generator().manual_seed(sum(size))
    noise = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


QUERIES = [
    Query(picture(), "what is it?", "a red fox"),
    Query(None, "where?", "here"),
    Query(picture(SIZES[1]), "Question: what is in the picture? Short answer:", "two dogs"),
    Query(picture(SIZES[2]), "what?", "the sea, over there"),
    Query(None, "Who was the king of the sea?", "a man"),
]


def processor(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The processor of ``transformers``, without the part for videos, which needs torchvision."""
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
    pictures, words, family = backbone.vision.processor, backbone.tokenizer, backbone.family
    if family == "instructblip":
        reader = AutoTokenizer.from_pretrained(backbone.tokenizer.name_or_path, subfolder="qformer_tokenizer")
        return transformers.InstructBlipProcessor(pictures, words, reader, num_query_tokens=4)
    name, more = PROCESSORS[family]
    if family.startswith("llava"):
        for key in ("vision_feature_select_strategy", "vision_aspect_ratio"):
            more = more | {key: getattr(backbone.model.config, key, None)}
    kind = getattr(transformers, name)
    return kind(image_processor=pictures, tokenizer=words, chat_template=CHATS[family], **more)


def inputs(backbone: Any, query: Query, monkeypatch: pytest.MonkeyPatch, answer: bool = True) -> Any:
    """What the model's own processor makes of a query and its answer."""
    own, text = processor(backbone, monkeypatch), query.prompt
    if backbone.family in CHATS:
        parts = [{"type": "text", "text": query.prompt}]
        if query.image is not None:
            parts.insert(0, {"type": "image"})
        turns = [{"role": "user", "content": parts}]
        text = own.apply_chat_template(turns, add_generation_prompt=True)
    said = f"{'' if text.endswith(chr(10)) else ' '}{query.target}" if answer else ""
    if query.image is None:
        return own.tokenizer([text + said], return_tensors="pt")
    made = own(images=[query.image], text=[text + said], return_tensors="pt")
    if "qformer_input_ids" in made:
        # It reads the question alone: an answer there would tell itself.
        asked = own(images=[query.image], text=[text], return_tensors="pt")
        made |= {key: value for key, value in asked.items() if key.startswith("qformer")}
    return made


@torch.no_grad()
def own_logits(backbone: Any, query: Query, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    given = inputs(backbone, query, monkeypatch)
    # InstructBLIP as a whole does not work without a picture.
    model = backbone.model if query.image is not None else backbone.decoder
    return model(**{k: v for k, v in given.items() if k != "token_type_ids"}).logits[0]


def logits(backbone: VisionLanguageBackbone, queries: Sequence[Query]) -> list[torch.Tensor]:
    batch = encode_queries(backbone, queries)
    with torch.no_grad():
        whole = backbone(batch).logits
    return [whole[i][batch.attention_mask[i].bool()] for i in range(len(batch))]


# ---------------------------------------------------------------- encode


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: q.prompt)
def test_logits_are_those_of_the_model_on_its_processors_inputs(backbone, query: Query, monkeypatch) -> None:
    (ours,) = logits(backbone, [query])
    assert_close(ours, own_logits(backbone, query, monkeypatch), **CLOSE)
    (other,) = logits(backbone, [replace(query, prompt=query.prompt.replace("w", "d").replace("W", "D"))])
    assert other.shape != ours.shape or not torch.allclose(other, ours, atol=1e-3)


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: q.prompt)
def test_tokens_are_the_processors_and_the_prompt_is_their_beginning(
    backbone, query: Query, monkeypatch
) -> None:
    asked, whole = (
        inputs(backbone, query, monkeypatch, said).input_ids[0].tolist() for said in (False, True)
    )
    assert whole[: len(asked)] == asked
    batch = encode_queries(backbone, [query])
    labels = batch.labels[0]
    assert labels[labels != IGNORED].tolist() == whole[len(asked) :]
    assert len(labels) == len(whole)
    assert batch.question_end.item() == len(asked) - 1
    embed = backbone.decoder.get_input_embeddings()
    (image,) = backbone.tokens(getattr(backbone.dialogue, "image", "<image>"))
    text = torch.tensor(whole) != image
    assert torch.equal(batch.inputs_embeds[0][text], embed(torch.tensor(whole))[text])
    assert bool(text.all()) == (query.image is None)


def test_a_picture_has_as_many_tokens_as_its_shape_asks_for(every) -> None:
    widths = {encode_queries(every, [Query(picture(s), "what?")]).labels.shape[1] for s in SIZES}
    assert (len(widths) > 1) == (every.family in SPLIT)


def test_a_prompt_must_not_write_a_picture(backbone) -> None:
    if backbone.family in CHATS:
        written = f"what is {backbone.dialogue.image}?"
        for image in (None, picture()):
            with pytest.raises(UserError, match="stands for an image"):
                backbone.encode([image], [written])


def test_pixels_may_be_given_where_pictures_are_not_cut(every) -> None:
    tensor = torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(0))
    if every.family in SPLIT:
        with pytest.raises(UserError, match="cuts images itself"):
            every.encode([tensor], ["what?"])
    else:
        one, other = (every.encode([t], ["what?"]).inputs_embeds for t in (tensor, -tensor))
        assert one.shape == other.shape
        assert not torch.equal(one, other)


def test_a_picture_that_cannot_be_cut_is_an_error_in_one_line(backbone) -> None:
    if backbone.family.startswith("qwen"):
        with pytest.raises(UserError, match="aspect ratio"):
            backbone.encode([Image.new("RGB", (900, 3))], ["what?"])


# ---------------------------------------------------------------- padding, prefix and suffix


@settings(max_examples=8, deadline=None)
@given(
    rows=st.lists(st.integers(0, len(QUERIES) - 1), min_size=2, max_size=4),
    side=st.sampled_from(["left", "right"]),
)
def test_padding_and_batch_size_change_nothing(every, rows: list[int], side: str) -> None:
    asked = [QUERIES[i] for i in rows]
    batch = every.encode([q.image for q in asked], [q.prompt for q in asked], [q.target for q in asked], side)
    with torch.no_grad():
        whole = every(batch).logits
    for i, query in enumerate(asked):
        assert_close(whole[i][batch.attention_mask[i].bool()], logits(every, [query])[0], **CLOSE)


@pytest.mark.parametrize("count", [1, 6])
def test_suffix_of_prefix_is_the_whole_model(every, count: int, tmp_path: Path) -> None:
    first = len(every.layout) - count
    batch = encode_queries(every, QUERIES)
    assert_close(every.suffix(every.prefix(batch, first)), every(batch).logits, atol=1e-6, rtol=0)
    # States that were kept, and come back in another company, or from disk.
    store = RowStore(tmp_path, "x/y", 10**9)
    alone = [logits(every, [q])[0] for q in QUERIES]
    for cache in (
        PrefixCache(every, first, store=store, alone=True),
        PrefixCache(every, first, store=store),
    ):
        for rows in ([3, 1], [0, 1, 2, 3, 4]):
            state = cache.state([QUERIES[i] for i in rows])
            part = narrow(every, state, torch.tensor([1, 0]))
            for held, order in ((state, rows), (part, [rows[1], rows[0]])):
                out = every.suffix(held)
                for i, row in enumerate(order):
                    assert_close(out[i][held.attention_mask[i].bool()], alone[row], **CLOSE)
    assert (cache.computed, cache.loaded) == (0, len(QUERIES))


def test_places_in_a_picture_reach_the_layers(every) -> None:
    """Where a decoder does not count tokens, other places are other logits, in a suffix too."""
    batch = encode_queries(every, [QUERIES[0]])
    assert (batch.positions is not None) == every.family.startswith("qwen")
    if batch.positions is not None:
        state = every.prefix(batch, 3)
        counted = (batch.attention_mask.cumsum(1) - 1)[:, None].expand(-1, 3, -1).contiguous()
        assert not torch.equal(counted, batch.positions)
        moved = replace(state, layer_inputs=every.layer_inputs(state.attention_mask, counted))
        assert not torch.allclose(every.suffix(moved), every.suffix(state), atol=1e-4)


# ---------------------------------------------------------------- pictures are seen once


def test_a_picture_is_seen_once_whatever_is_asked(every) -> None:
    shown, seen = picture((41, 67)), every.cache.computed
    first, second = (every.encode([shown.copy()], [p]) for p in ("what is it?", "where is it?"))
    assert every.cache.computed == seen + 1
    # What the prompts differ in stands behind the picture, unless the Q-Former reads them.
    (image,) = every.cache.get([shown], every.vision.pixels)
    assert every.cache.computed == seen + 1
    one, other = (every.vision.tokens(image, p) for p in ("what is it?", "where is it?"))
    assert torch.equal(one, other) == (every.family != "instructblip")
    assert first.inputs_embeds.shape[1] < second.inputs_embeds.shape[1] + 5


def test_a_gradient_reaches_the_projection(every) -> None:
    weights = list(every.projection.parameters())
    for weight in weights:
        weight.requires_grad_(True)
    try:
        every(encode_queries(every, [QUERIES[0]])).logits.sum().backward()
        assert all(w.grad is not None and bool(w.grad.any()) for w in weights[:1])
        others = [p for p in every.model.parameters() if all(p is not w for w in weights)]
        assert not any(p.grad is not None for p in others)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def test_a_long_prompt_is_read_to_its_end(backbone) -> None:
    """The Q-Former knows few positions: of a longer prompt it reads what comes last."""
    if backbone.family == "instructblip":
        (image,) = backbone.cache.get([picture()], backbone.vision.pixels)
        long = "the sea. " * 20
        asked = [backbone.vision.tokens(image, f"{start} {long}{end}") for start, end in
                 (("what", "fox"), ("where", "fox"), ("what", "king"))]  # fmt: skip
        assert torch.equal(asked[0], asked[1])
        assert not torch.equal(asked[0], asked[2])


# ---------------------------------------------------------------- generate


def test_answers_are_the_models_own(backbone, monkeypatch) -> None:
    """Left-padded in one batch, and with a checkpoint's own settings that are not greedy."""
    asked = [QUERIES[0], QUERIES[3], QUERIES[1]]
    expected = []
    for query in asked:
        given = dict(inputs(backbone, query, monkeypatch, answer=False))
        model = backbone.model if query.image is not None else backbone.decoder
        ids = model.generate(**given, do_sample=False, max_new_tokens=8, eos_token_id=list(backbone.eos_ids))
        text = backbone.tokenizer.decode(ids[0][len(given["input_ids"][0]) :], skip_special_tokens=True)
        expected.append(backbone.cut(text))
    assert len(set(expected)) > 1
    settings = backbone.decoder.generation_config
    for name, value in {"do_sample": True, "repetition_penalty": 5.0, "temperature": 0.1}.items():
        monkeypatch.setattr(settings, name, value)
    written = backbone.generate([q.image for q in asked], [q.prompt for q in asked], max_new_tokens=8)
    assert written == expected
    singly = [backbone.generate([q.image], [q.prompt], max_new_tokens=8)[0] for q in asked]
    assert singly == expected


def test_generation_is_the_argmax_of_teacher_forcing(every) -> None:
    query = QUERIES[0]
    batch = every.encode([query.image], [query.prompt])
    embed, written = every.decoder.get_input_embeddings(), []
    for _ in range(5):
        written.append(int(every(batch).logits[0, -1].argmax()))
        places = batch.positions
        if places is not None:
            places = torch.cat([places, places[..., -1:] + 1], -1)
        embeds = torch.cat([batch.inputs_embeds, embed(torch.tensor([[written[-1]]]))], 1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        batch = replace(batch, positions=places, inputs_embeds=embeds, attention_mask=mask)
    text = every.tokenizer.decode(written, skip_special_tokens=True)
    assert every.generate([query.image], [query.prompt], max_new_tokens=5) == [every.cut(text)]
