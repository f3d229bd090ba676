"""Train records made harder: images changed by steps, look-alikes, halves of other images."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from original_files import FAMILIES
from PIL import Image
from worlds import BASE, World, world_of

from unike.backbones.images import FeatureCache, content_key, take_image
from unike.backbones.prefix import AnswerCache
from unike.backbones.store import RowStore
from unike.config.hparams import HyperParams
from unike.datasets import changed_images
from unike.datasets.changed_images import (
    HALVES,
    STRENGTHS,
    ChangedImage,
    Step,
    make_thumbnail,
    replace_half,
    restyle,
)
from unike.datasets.images import open_image
from unike.methods import build
from unike.methods.meta_training import compute_edit_losses, split_by_scope
from unike.methods.preparation.editors import ensure_editor
from unike.methods.preparation.hard_cases import ALIKE, HARDER, MIXED, RESTYLED, harden_cases
from unike.methods.preparation.scope import ensure_scope, make_scope_cases
from unike.methods.preparation.training_cases import INSIDE, OUTSIDE, make_training_cases
from unike.system import processes
from unike.types import FIVE_METRICS, IMAGE_STYLES, Case, EditRequest, Probe, Query, UserError


def draw(seed: int, size: tuple[int, int] = (30, 22)) -> Image.Image:
    """An image of coarse random patches: its thumbnail is like no other seed's."""
    patches = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.NEAREST)


def pixels(image: object) -> np.ndarray:
    return np.asarray(open_image(image))


# ---------------------------------------------------------------- images


@pytest.mark.parametrize(("name", "strength"), [(n, s) for n, all_ in STRENGTHS.items() for s in all_])
@pytest.mark.parametrize("size", [(30, 22), (1, 1), (3, 50)])
def test_a_step_changes_the_image_and_keeps_its_size(name: str, strength: float, size) -> None:
    image = draw(1, size)
    before = pixels(image).copy()
    changed = ChangedImage(image, (Step(name, strength, 7),)).draw_image()
    assert (changed.size, changed.mode) == (image.size, "RGB")
    assert np.array_equal(pixels(image), before), "the image itself stays"
    if size == (30, 22):
        assert not np.array_equal(pixels(changed), before)
        # Still the same content: most places have nearly the colors they had.
        assert make_thumbnail(changed) @ make_thumbnail(image) > 0.7


def test_steps_are_taken_in_order_and_named_apart_from_the_benchmarks_styles() -> None:
    image, (one, other) = draw(1), (Step("posterize", 3), Step("gamma", 1.7))
    both = ChangedImage(image, (one, other)).draw_image()
    first = ChangedImage(image, (one,)).draw_image()
    assert np.array_equal(pixels(both), pixels(ChangedImage(first, (other,))))
    assert not np.array_equal(pixels(both), pixels(ChangedImage(image, (other, one))))
    assert not set(STRENGTHS) & set(IMAGE_STYLES)
    assert set(STRENGTHS) == set(changed_images._CHANGES)


def test_a_seed_draws_the_same_image_and_another_one_others() -> None:
    image = draw(1)
    same = [restyle(image, random.Random(3)) for _ in range(2)]
    assert same[0] == same[1]
    assert np.array_equal(*(pixels(one) for one in same))
    drawn = {content_key(restyle(image, random.Random(seed))) for seed in range(30)}
    assert len(drawn) == 30
    assert len({pixels(restyle(image, random.Random(seed))).tobytes() for seed in range(30)}) > 25
    noise = [pixels(ChangedImage(image, (Step("noise", 22, seed),))) for seed in (1, 1, 2)]
    assert np.array_equal(noise[0], noise[1])
    assert not np.array_equal(noise[0], noise[2])


@pytest.mark.parametrize("size", [(30, 22), (31, 23), (1, 4)])
@pytest.mark.parametrize("half", HALVES)
def test_the_half_is_the_other_images(half: str, size: tuple[int, int]) -> None:
    image, other = draw(1, size), draw(2, (17, 40))
    fitted, own = pixels(other.resize(size)), pixels(image)
    found = pixels(replace_half(image, other, half))
    width, height = size
    for y in range(height):
        for x in range(width):
            taken = {
                "left": x < width // 2,
                "right": x >= width // 2,
                "top": y < height // 2,
                "bottom": y >= height // 2,
            }[half]
            assert np.array_equal(found[y, x], (fitted if taken else own)[y, x])


def test_equal_recipes_have_one_key_and_others_others(tmp_path: Path) -> None:
    path, copied = tmp_path / "a.png", tmp_path / "b.png"
    for file in (path, copied):
        draw(1).save(file)
    step = Step("noise", 22, 1)
    equal = [
        ChangedImage(path, (step,)),
        ChangedImage(str(copied), (step,)),
        ChangedImage(draw(1), (Step("noise", 22, 1),)),
    ]
    assert len({content_key(image) for image in equal}) == 1
    others = [
        ChangedImage(path),
        ChangedImage(path, (replace(step, seed=2),)),
        ChangedImage(path, (replace(step, strength=12),)),
        ChangedImage(path, (replace(step, name="jpeg"),)),
        ChangedImage(path, (step, step)),
        ChangedImage(draw(2), (step,)),
        ChangedImage(path, (step,), draw(2), "left"),
        ChangedImage(path, (step,), draw(2), "right"),
        ChangedImage(path, (step,), draw(3), "left"),
        ChangedImage(draw(2), (step,), path, "left"),
        ChangedImage(ChangedImage(path, (step,)), (step,), draw(2), "left"),
    ]
    keys = {content_key(image) for image in (equal[0], *others)}
    assert len(keys) == 1 + len(others)
    assert content_key(path) not in keys


def test_an_image_drawn_twice_is_encoded_once() -> None:
    seen: list[int] = []

    def compute(parts: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        seen.append(len(parts))
        return list(parts)

    def read(image: object) -> dict[str, torch.Tensor]:
        return {"x": torch.from_numpy(pixels(image).copy())}

    cache = FeatureCache(compute)
    one, other = (ChangedImage(draw(1), (Step("noise", 22, seed),)) for seed in (1, 2))
    first, again, third = cache.get([one, replace(one), other], read)
    cache.get([other, one], read)
    assert cache.computed == 2
    assert torch.equal(first["x"], again["x"])
    assert not torch.equal(first["x"], third["x"])


def test_it_is_taken_where_an_image_is_and_says_what_is_missing(tmp_path: Path) -> None:
    changed = replace_half(draw(1), draw(2), "top")
    assert np.array_equal(pixels(take_image(changed)), pixels(changed))
    gone = tmp_path / "gone.png"
    for broken in (restyle(gone, random.Random(1)), replace_half(draw(1), gone, "left")):
        for read in (open_image, content_key):
            with pytest.raises(UserError, match=r"gone\.png: .*") as caught:
                read(broken)
            assert len(caught.value.problems) == 1


# ---------------------------------------------------------------- records


class Speaker:
    """A backbone that only answers: about a mixed image by the list ``kept``, which of them change nothing;
    about each other image that it is another one."""

    def __init__(self, same: bool = False) -> None:
        self.same, self.asked = same, list[tuple[object, str]]()

    def generate(self, images: Sequence[object], prompts: Sequence[str]) -> list[str]:
        self.asked += zip(images, prompts, strict=True)
        mixed = [isinstance(image, ChangedImage) for image in images]
        return ["An owl." if other and not self.same else "a dog" for other in mixed]


def make_case(i: int, image: object = None, count: int = 6) -> Case:
    asked = Query(draw(i) if image is None else image, f"what is {i}?", f"a {i}")
    other = Query(draw(100 + (i + 1) % count), "what color is it?", "red")
    queries = [
        asked,
        replace(asked, prompt=f"which is {i}?"),
        replace(asked, image=draw(200 + i)),
        Query(None, f"who was {i}?", "a king"),
        other,
    ]
    probes = [
        Probe(name, query, "target" if n < 3 else "unchanged")
        for n, (name, query) in enumerate(zip(FIVE_METRICS, queries, strict=True))
    ]
    return Case(EditRequest(f"e{i}", asked, "a dog"), tuple(probes))


def harden(cases: Sequence[Case], speaker: Speaker | None = None, seed: int = 0) -> list[Case]:
    return harden_cases(make_training_cases(cases), speaker or Speaker(), seed)


def name_content(case: Case) -> list[tuple[str, str | None, str, str]]:
    return [
        (p.name, None if p.query.image is None else content_key(p.query.image), p.query.prompt, p.expect)
        for p in case.probes
    ]


@pytest.mark.parametrize("count", [2, 3, 12])
@pytest.mark.parametrize("same", [False, True])
def test_each_record_gets_as_many_probes_those_in_scope_first(count: int, same: bool) -> None:
    cases = [make_case(i, count=count) for i in range(count)]
    hard = harden(cases, Speaker(same))
    for case, own in zip(hard, cases, strict=True):
        names = [p.name for p in case.probes]
        assert len(names) == len(set(names)) == len(INSIDE) + len(OUTSIDE) + HARDER
        assert HARDER == RESTYLED + ALIKE + MIXED
        inside = len(INSIDE) + RESTYLED
        assert [p.expect for p in case.probes] == ["target"] * inside + ["unchanged"] * (len(names) - inside)
        assert case.probes[0].query == own.request.query
        assert case.request == own.request
        # A mixed image about which the base says the same is replaced by a spare.
        kept = {n.split()[0] for n in names[-MIXED:]}
        assert kept == ({"spare"} if same else {"mixed"})
        mine = content_key(own.request.query.image)
        for probe in case.probes:
            image = probe.query.image
            if probe.name.startswith(("alike", "spare")):
                assert content_key(image) != mine
                assert probe.query.prompt == own.request.query.prompt
            if probe.name.startswith("mixed"):
                assert content_key(image.other) != mine
                assert image.half in HALVES
            if probe.name.startswith("restyled"):
                assert image.steps
                assert content_key(image.image) in {mine, content_key(draw(200 + int(own.request.id[1:])))}
                assert probe.query.target == own.request.query.target


def test_the_base_is_asked_about_each_edit_and_its_mixed_images() -> None:
    speaker, cases = Speaker(), [make_case(i) for i in range(6)]
    harden(cases, speaker)
    assert len(speaker.asked) == 6 * (1 + MIXED)
    for i, case in enumerate(cases):
        own, *mixed = speaker.asked[i * (1 + MIXED) : (i + 1) * (1 + MIXED)]
        assert own == (case.request.query.image, case.request.query.prompt)
        assert all(isinstance(image, ChangedImage) for image, _ in mixed)


def test_answers_that_are_kept_are_not_asked_for_again(tmp_path: Path) -> None:
    cases = [make_case(i) for i in range(6)]
    taught = make_training_cases(cases)
    for expected in (18, 0, 6):
        speaker, kept = Speaker(), AnswerCache(RowStore(tmp_path, "a/answers", 10**9), 16)
        found = harden_cases(taught, speaker, 0, batch=6, kept=kept)
        assert len(speaker.asked) == expected
        if expected == 0:
            # A batch of which answers are lost is asked again.
            next((tmp_path / "a" / "answers").iterdir()).unlink()
    assert [name_content(c) for c in found] == [name_content(c) for c in harden(cases)]
    # Another model, and another length of answers, say something else.
    for name, most in (("b/answers", 16), ("a/answers", 17)):
        speaker, kept = Speaker(same=True), AnswerCache(RowStore(tmp_path, name, 10**9), most)
        found = harden_cases(taught, speaker, 0, batch=6, kept=kept)
        assert len(speaker.asked) == 18
    assert [name_content(c) for c in found] == [name_content(c) for c in harden(cases, Speaker(same=True))]


def test_one_of_two_mixed_images_may_be_replaced() -> None:
    class Half(Speaker):
        def generate(self, images, prompts):
            # Rephrased questions are those of the second mixed image.
            told = super().generate(images, prompts)
            return [
                "a dog" if prompt.startswith("which") else text
                for text, prompt in zip(told, prompts, strict=True)
            ]

    for case in harden([make_case(i) for i in range(4)], Half()):
        names = [p.name for p in case.probes]
        assert names[-2:] == ["mixed 1", "spare 2"]


def test_a_seed_draws_the_same_records_and_another_one_others() -> None:
    cases = [make_case(i) for i in range(6)]
    first, again, other = (harden(cases, seed=seed) for seed in (1, 1, 2))
    assert [name_content(c) for c in first] == [name_content(c) for c in again]
    assert [name_content(c) for c in first] != [name_content(c) for c in other]
    # A record's own draw does not depend on which records are before it.
    turned = harden(cases[::-1], seed=1)[::-1]
    styles = [
        [p.query.image.steps for p in c.probes if p.name.startswith("restyled")] for c in (*first, *turned)
    ]
    assert styles[:6] == styles[6:]


def slowly_find_alike(cases: Sequence[Case], case: Case, most: int) -> set[str]:
    own = make_thumbnail(case.request.query.image)
    likeness = {
        content_key(c.request.query.image): float(make_thumbnail(c.request.query.image) @ own) for c in cases
    }
    other = sorted((k for k, v in likeness.items() if v <= 0.999), key=lambda k: -likeness[k])
    return set(other[:most])


def test_look_alikes_are_of_those_most_alike_and_never_the_same_image() -> None:
    # Many images, some of them twice, in other files' names or a little brighter.
    cases = [make_case(i, count=20) for i in range(20)]
    brighter = [
        Image.fromarray(np.clip(pixels(c.request.query.image).astype(int) + 1, 0, 255).astype(np.uint8))
        for c in cases[:3]
    ]
    cases += [make_case(30 + i, image=image) for i, image in enumerate(brighter)]
    drawn = set()
    for case in harden(cases, Speaker(same=True)):
        expected = slowly_find_alike(cases, case, 8)
        for probe in case.probes:
            if probe.name.startswith(("alike", "spare")):
                assert content_key(probe.query.image) in expected
                drawn.add(content_key(probe.query.image))
    assert len(drawn) > 10


def test_images_in_memory_are_known_by_their_content() -> None:
    # Long tensors are printed alike: the numbers in their middle are left out.
    arrays = [np.tile(pixels(draw(i, (60, 60))), (2, 2, 1)) for i in range(4)]
    for array in arrays:
        array[:3], array[-3:], array[:, :3], array[:, -3:] = 9, 9, 9, 9
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    assert len({str(tensor) for tensor in tensors}) == 1
    for images in (tensors, arrays, [Image.fromarray(array) for array in arrays]):
        hard = harden([make_case(i, image=image) for i, image in enumerate(images)], Speaker(same=True))
        expected = [content_key(image) for image in images]
        for i, case in enumerate(hard):
            found = {content_key(p.query.image) for p in case.probes if p.name.startswith(("alike", "spare"))}
            assert found
            assert found < set(expected) - {expected[i]} or found == set(expected) - {expected[i]}


def test_plain_images_are_not_their_own_look_alikes() -> None:
    """A thumbnail of one shade of gray has no length."""
    colors = ("gray", "teal", "navy", "olive")
    images = [Image.new("RGB", (20, 20), color) for color in colors]
    for i, case in enumerate(harden([make_case(i, image=image) for i, image in enumerate(images)])):
        for probe in case.probes:
            if probe.name.startswith("alike"):
                assert content_key(probe.query.image) != content_key(images[i])


def test_records_that_cannot_be_made_harder_are_refused(tmp_path: Path) -> None:
    same = [make_case(i, image=draw(1)) for i in range(3)]
    with pytest.raises(UserError, match="record e0: all images look like its own; expected train records of"):
        harden(same)
    blind = [make_case(0), make_case(1)]
    asked = replace(blind[1].request.query, image=None)
    blind[1] = replace(blind[1], request=replace(blind[1].request, query=asked))
    with pytest.raises(UserError, match="record e1: has no image"):
        harden(blind)
    lost = [make_case(0), make_case(1, image=tmp_path / "gone.png")]
    with pytest.raises(UserError, match=r"gone\.png: ") as caught:
        harden(lost)
    assert len(caught.value.problems) == 1


# ---------------------------------------------------------------- what is trained on them


@pytest.fixture
def world(worlds: dict[str, World], monkeypatch) -> World:
    return world_of(FAMILIES[0], worlds, monkeypatch)


@pytest.mark.parametrize("name", ["ke", "mend", "serac"])
def test_an_editor_is_trained_on_harder_records(world: World, name: str, monkeypatch, tmp_path: Path) -> None:
    hparams = HyperParams.from_dict(
        {**BASE, "method": name, "editor_dir": str(tmp_path), "editor_probes": "hard", "editor_steps": 1}
    )
    method = build(hparams)
    seen: list[set[str]] = []
    loss = type(method).loss

    def listen(own, backbone, case, *rest):
        seen.append({probe.name for probe in case.probes})
        return loss(own, backbone, case, *rest)

    read: list[int] = []
    state = type(world.prefixes(method)).state
    monkeypatch.setattr(type(method), "loss", listen)
    monkeypatch.setattr(
        type(world.prefixes(method)),
        "state",
        lambda own, queries: read.append(len(queries)) or state(own, queries),
    )
    ensure_editor(method, world.backbone, lambda: [make_case(i, count=10) for i in range(10)])
    assert seen
    assert all({"restyled 1", "alike 1", *INSIDE} <= names for names in seen)
    assert max(read) >= len(INSIDE) + RESTYLED


def test_harder_probes_reach_the_loss(world: World) -> None:
    (case,) = harden([make_case(0), make_case(1)])[:1]
    inside, outside = split_by_scope(case, "hard")
    assert [q.prompt for q in inside] == [p.query.prompt for p in case.probes if p.expect == "target"]
    assert len(outside) == len(OUTSIDE) + ALIKE + MIXED
    edit, prefixes = world.edit(("ft", {"layers": 1})), world.prefixes(world.method("ft", {"layers": 1}))
    base = [t.item() for t in compute_edit_losses(world.backbone, edit, case, prefixes, "hard")]
    for name, moved in (("restyled 1", 0), ("mixed 1", 1), ("alike 2", 1)):
        kept = tuple(p for p in case.probes if p.name != name)
        less = compute_edit_losses(world.backbone, edit, replace(case, probes=kept), prefixes, "hard")
        assert less[moved].item() != base[moved]
        assert less[1 - moved].item() == pytest.approx(base[1 - moved], abs=1e-5)


def test_a_classifier_is_trained_on_harder_records(world: World, monkeypatch, tmp_path: Path) -> None:
    depth: list[int] = []
    once = processes.run_once

    def run_once(work):
        # Inside, other processes wait: they would not answer a second time.
        assert not depth
        depth.append(1)
        try:
            return once(work)
        finally:
            depth.pop()

    monkeypatch.setattr(processes, "run_once", run_once)
    options = {
        **BASE, "scope_gate": "nearest", "scope_measure": "trained", "scope_threshold": None,
        "scope_heads": 2, "scope_hidden": 8, "scope_dim": 6, "scope_steps": 2, "scope_batch": 4,
        "scope_dir": str(tmp_path), "scope_recall": 0.9,
    }  # fmt: skip
    cases = [make_case(i, count=20) for i in range(20)]
    for probes in ("recombined", "hard"):
        hparams = HyperParams.from_dict({**options, "scope_probes": probes})
        taught = make_scope_cases(cases, world.backbone, hparams)
        assert len({len(case.probes) for case in taught}) == 1
        ensure_scope(world.backbone, hparams, 4, lambda: cases)
    assert len(list(tmp_path.glob("*/scope.json"))) == 2, "each has its own folder"
