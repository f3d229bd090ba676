"""Decoding by beams and at random under every method's edit, and what is said of a model called by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from original_files import FAMILIES
from PIL import Image
from test_methods import IDS, ROWS
from untouched import assert_untouched
from worlds import World, query, snapshot, world_of

from unike import MultimodalEditor, load_backbone
from unike.backbones.base import CALLED_BARE, encode_queries
from unike.backbones.decoding import Decoding
from unike.config.hparams import HyperParams
from unike.edits import Edit
from unike.edits.attached import EditedModel, Slot
from unike.types import Query, UserError

# Every method, and UniKE with each kind of scope gate and with knowledge as text.
SCOPED = {
    "cosine": {"scope_gate": "threshold", "scope_threshold": 0.5, "scope_halves": "both"},
    "nearest": {"scope_gate": "nearest", "scope_threshold": -1.0},
    "as text": {"external": "prompt"},
    "pairs alone": {"external": "none"},
}
CASES = [*zip(IDS, ROWS, strict=True), *((f"unike-{n}", ("unike", row)) for n, row in SCOPED.items())]
each = pytest.mark.parametrize("row", [row for _, row in CASES], ids=[name for name, _ in CASES])
# Edits that work in whatever way the model is called: nothing in them depends on where a prompt ends.
BARE = {
    *("ft-1", "ft-projection", "lora-4-8", "lora-2-4-both", "tpatcher-0.1-0.1", "tpatcher_published"),
    *("ke", "mend", "unike-pairs alone"),
}
WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "three beams": {"num_beams": 3, "num_return_sequences": 3},
    "drawn": {"do_sample": True, "seed": 3, "temperature": 1.5, "num_return_sequences": 4},
    "nucleus": {"do_sample": True, "seed": 3, "top_p": 0.9},
    "drawn beams": {"do_sample": True, "seed": 5, "num_beams": 2, "num_return_sequences": 2},
}


@pytest.fixture(params=FAMILIES)
def world(request: pytest.FixtureRequest, worlds: dict[str, World], monkeypatch) -> World:
    return world_of(request.param, worlds, monkeypatch)


def search(world: World, edit: Edit, one: Query, beams: int, length: int) -> str:
    """A beam search without a cache, a beam at a time: each step runs the whole model over one row."""
    backbone = world.backbone
    embed = backbone.decoder.get_input_embeddings()
    with edit.applied(backbone):
        batch = backbone.encode([one.image], [one.prompt])
    (start,) = batch.inputs_embeds
    found: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []

    def score(ids: list[int]) -> torch.Tensor:
        row = torch.cat([start, embed(torch.tensor(ids, dtype=torch.long))])[None]
        with edit.applied(backbone), torch.no_grad(), backbone.prompt.announce(batch):
            mask = torch.ones(row.shape[:2], dtype=torch.long)
            logits = backbone.decoder(inputs_embeds=row, attention_mask=mask, use_cache=False).logits
        return logits[0, -1].float().log_softmax(-1)

    for _ in range(length):
        further = [(p + q.item(), [*ids, n]) for p, ids in found for n, q in enumerate(score(ids))]
        further.sort(key=lambda pair: -pair[0])
        ended = [pair for pair in further[: 2 * beams] if pair[1][-1] in backbone.eos_ids]
        done += [(p / len(ids), ids) for p, ids in ended]
        found = [pair for pair in further[: 2 * beams] if pair[1][-1] not in backbone.eos_ids][:beams]
    done += [(p / len(ids), ids) for p, ids in found]
    return backbone.decode(max(done)[1])


@each
def test_beams_answer_as_a_search_of_one_row_at_a_time(world: World, row: tuple[str, dict]) -> None:
    edit, one = world.edit(row), query(0)
    slot = Slot.of(world.backbone)
    found = EditedModel(slot, (edit,)).generate(one.image, one.prompt, 3, num_beams=3)
    assert found == search(world, edit, edit.rewrite(one), 3, 3)


@each
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_decoding_works_under_every_edit(world: World, row: tuple[str, dict], way: str) -> None:
    backbone, options, edit = world.backbone, WAYS[way], world.edit(row)
    before, state = snapshot(backbone), torch.random.get_rng_state()
    slot, asked = Slot.of(backbone), [query(0), query(1), Query(None, "where is it?")]
    count = options.get("num_return_sequences", 1)
    edited = EditedModel(slot, (edit,))
    singly = []
    for one in asked:
        answers = edited.generate(one.image, one.prompt, 4, **options)
        assert isinstance(answers, list) == (count > 1)
        singly.append(answers if count > 1 else [answers])
        assert edited.generate(one.image, one.prompt, 4, **options) == answers, "seeded, or not drawn"
    assert all(len(answers) == count and all(isinstance(a, str) for a in answers) for answers in singly)
    if not options.get("do_sample"):
        with edit.applied(backbone):
            # The backbone itself, where the prompts are not yet rewritten, and where they are.
            for prompts in ([q.prompt for q in asked], [edit.rewrite(q).prompt for q in asked]):
                found = backbone.generate([q.image for q in asked], prompts, 4, **options)
                assert found == [answer for answers in singly for answer in answers]
    assert torch.equal(torch.random.get_rng_state(), state), "a seed leaves torch's own numbers"
    assert slot.edits == ()
    assert_untouched(backbone, *before)


def test_what_is_drawn_depends_on_the_seed_and_temperature(world: World) -> None:
    one, ask = query(0), world.backbone.generate
    drawn = {
        (seed, heat): tuple(ask([one.image], [one.prompt], 6, do_sample=True, seed=seed, temperature=heat))
        for seed in (1, 2)
        for heat in (0.01, 50.0)
    }
    assert len(set(drawn.values())) >= 3
    greedy = tuple(ask([one.image], [one.prompt], 6))
    assert drawn[1, 0.01] == drawn[2, 0.01] == greedy
    narrow = tuple(ask([one.image], [one.prompt], 6, do_sample=True, seed=1, temperature=50.0, top_p=1e-6))
    assert narrow == greedy


# ---------------------------------------------------------------- the model called by itself

ASKS: dict[str, Callable[[Any, Any], Any]] = {
    "forward": lambda decoder, given: decoder(**given).logits,
    "generate": lambda decoder, given: (
        decoder.generate(
            **given, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        ).sequences
    ),
}


@each
@pytest.mark.parametrize("how", ASKS)
def test_a_model_called_by_itself_answers_edited_or_refuses(
    world: World, request: pytest.FixtureRequest, row: tuple[str, dict], how: str
) -> None:
    backbone, edit, ask = world.backbone, world.edit(row), ASKS[how]
    batch = encode_queries(backbone, [query(0, None)])
    given = {"inputs_embeds": batch.inputs_embeds, "attention_mask": batch.attention_mask}
    before, hooks = snapshot(backbone)
    if ft_projection := row[1].get("ft_target") == "projection":
        with edit.applied(backbone):
            given["inputs_embeds"] = encode_queries(backbone, [query(0, None)]).inputs_embeds
    with torch.no_grad():
        base = ask(backbone.decoder, given | {"inputs_embeds": batch.inputs_embeds})
        slot = Slot.of(backbone)
        slot.attach(edit)
        try:
            # The second call must not go on with what a former prompt decided.
            for _ in range(2):
                backbone.generate([query(1).image], [query(1).prompt], 2)
                if {_name(row), row[0]} & BARE:
                    found = ask(backbone.decoder, given)
                    if how == "forward":
                        end = int(batch.question_end[0])
                        own = backbone(encode_queries(backbone, [query(0, None)])).logits
                        torch.testing.assert_close(found[0, : end + 1], own[0, : end + 1], atol=2e-5, rtol=0)
                        assert not torch.equal(found, base)
                    else:
                        text = backbone.cut(backbone.tokenizer.decode(found[0], skip_special_tokens=True))
                        assert text == backbone.generate([query(0).image], [query(0).prompt], 3)[0]
                else:
                    with pytest.raises(UserError) as raised:
                        ask(backbone.decoder, given)
                    assert raised.value.problems == (CALLED_BARE,)
        finally:
            slot.detach(edit.id)
        again = ask(backbone.decoder, given | {"inputs_embeds": batch.inputs_embeds})
    assert torch.equal(again, base), f"nothing is left of the edit ({ft_projection=})"
    assert_untouched(backbone, before, hooks)


def _name(row: tuple[str, dict]) -> str:
    return next(name for name, other in CASES if other == row)


# ---------------------------------------------------------------- values that do not fit

WRONG = {
    "max_new_tokens": [0, 1.5, -1, True, "4", 2.0],
    "num_beams": [0, -3, 2.5, True, "3", 10**9, None],
    "do_sample": [1, "yes", None],
    "temperature": [0, 1e-40, -1.0, float("nan"), float("inf"), "hot", None],
    "top_p": [0, 1.5, -0.1, True, None],
    "num_return_sequences": [0, 1.5, True, 10**6, None],
    "seed": [-1, 1.5, True, 2**40],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_a_value_that_does_not_fit_is_one_line(world: World, name: str, value: object) -> None:
    edit, one = world.edit(ROWS[0]), query(0)
    slot = Slot.of(world.backbone)
    more = {} if name == "do_sample" else {"do_sample": True}
    for ask in (
        lambda **options: EditedModel(slot, (edit,)).generate(one.image, one.prompt, **options),
        lambda **options: world.backbone.generate([one.image], [one.prompt], **options),
    ):
        with pytest.raises(UserError) as raised:
            ask(**more, **{name: value})
        (line,) = raised.value.problems
        assert line.startswith(f"{name}: expected ")
        assert line.isprintable()


CONTRADICTIONS = [
    ({"temperature": 0.5}, "temperature: 0.5 changes what is drawn; expected do_sample=True"),
    ({"top_p": 0.5, "num_beams": 2}, "top_p: 0.5 changes what is drawn"),
    ({"num_return_sequences": 2}, "num_return_sequences: 2 answers of 1 beams"),
    ({"num_return_sequences": 4, "num_beams": 3}, "num_return_sequences: 4 answers of 3 beams"),
    (
        {"num_return_sequences": 5, "num_beams": 3, "do_sample": True},
        "num_return_sequences: 5 answers of 3 beams; expected num_beams=1",
    ),
    ({"num_beam": 3}, "num_beam: unknown to generate; the nearest known name is num_beams"),
    ({"max_length": 3}, "max_length: unknown to generate; the nearest known name is "),
]


@pytest.mark.parametrize(("options", "line"), CONTRADICTIONS)
def test_what_contradicts_itself_is_one_line(world: World, options: dict, line: str) -> None:
    with pytest.raises(UserError) as raised:
        world.backbone.generate([query(0).image], [query(0).prompt], 3, **options)
    (said,) = raised.value.problems
    assert said.startswith(line)


def test_no_number_of_new_tokens_is_the_backbones_own() -> None:
    assert Decoding(max_new_tokens=None) == Decoding()


def test_numbers_of_arrays_are_numbers() -> None:
    given = Decoding(max_new_tokens=np.int64(4), do_sample=np.True_, temperature=torch.tensor(0.5))
    assert given == Decoding(max_new_tokens=4, do_sample=True, temperature=0.5)


# ---------------------------------------------------------------- the bundled models, as users edit them


@pytest.mark.parametrize("name", ["tiny_blip2", "tiny_minigpt4"])
@pytest.mark.parametrize("yaml", ["", "scoped/", "serac_multimodal/", "ike/", "mend/"])
def test_the_editor_decodes_in_every_way(monkeypatch: pytest.MonkeyPatch, name: str, yaml: str) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    hparams = HyperParams.from_hparams(f"hparams/{yaml}{name}.yaml")
    editor = MultimodalEditor(hparams, load_backbone(hparams), progress=False)
    image, prompt = Image.new("RGB", (64, 64), "red"), "Question: What is this? Short answer:"
    base = editor.generate(image, prompt)
    (metric,), edited, _ = editor.edit(prompt, "kangaroo", image)
    assert metric["post"] == {"rewrite_acc": 1.0}
    cold = {"do_sample": True, "temperature": 0.01, "num_return_sequences": 3, "seed": 1}
    for ask in (edited.generate, partial(editor.generate, edited=True)):
        assert ask(image, prompt) == "kangaroo"
        assert ask(image, prompt, num_beams=3) == "kangaroo"
        assert ask(image, prompt, **cold) == ["kangaroo"] * 3
        assert len({*ask(image, prompt, num_beams=3, num_return_sequences=3)}) > 1
        assert ask(image, prompt, max_new_tokens=1) == "kangaroo"[: len(ask(image, prompt, max_new_tokens=1))]
    assert editor.generate(image, prompt, num_beams=1) == editor.generate(image, prompt) == base != "kangaroo"
    with pytest.raises(UserError, match="num_beams: expected a whole number between 1 and 100, got int 0"):
        editor.generate(image, prompt, num_beams=0)
