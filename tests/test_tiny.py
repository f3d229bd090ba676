"""The embedded backbones and the benchmark drawn for them."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.tiny import make_data, scenes
from scripts.tiny.questions import HELD_OUT, TRAINED, list_facts
from scripts.tiny.scenes import Painter, disturb, redraw, sample_scene
from unike import runs
from unike.backbones import load_backbone
from unike.config.hparams import HyperParams
from unike.datasets.answers import normalise_answer
from unike.evaluation.protocols import run_one_step
from unike.evaluation.record import Score
from unike.methods import resolve_needs
from unike.runs import inputs

ROOT = Path(__file__).parents[1]
TINY = ("tiny_blip2", "tiny_minigpt4")
RECORDS = 8


@pytest.fixture(scope="module")
def textures(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("textures") / "openmoji.safetensors"


class World:
    """A backbone and a small benchmark of its own, drawn into a temporary folder."""

    def __init__(self, name: str, out: Path, textures: Path) -> None:
        self.out = out
        plain = HyperParams.from_hparams(ROOT / "hparams" / f"{name}.yaml")
        files = {t: {k: str(out / f"{t}_{k}.json") for k in ("train", "eval")} for t in make_data.TASKS}
        changes = {
            "name": str(ROOT / plain.name),
            "knowledge_dir": str(ROOT / str(plain.knowledge_dir)),
            "image_root": str(out),
            "data": files,
        }
        self.hparams = HyperParams.from_dict({**plain.to_dict(), **changes})
        self.backbone = load_backbone(self.hparams)
        make_data.make(self.backbone, out, "eval", RECORDS, seed=7, textures=textures)
        self.cases = {t: inputs.open_datasets(self.hparams, t) for t in make_data.TASKS}


@pytest.fixture(scope="module", params=TINY)
def world(request: pytest.FixtureRequest, tmp_path_factory, textures: Path) -> World:
    return World(request.param, tmp_path_factory.mktemp(request.param), textures)


def exact(answers: list[str], targets: list[str]) -> float:
    pairs = zip(answers, targets, strict=True)
    return float(np.mean([normalise_answer(a) == normalise_answer(t) for a, t in pairs]))


@pytest.mark.parametrize("wording", ["trained", "held out"])
def test_a_tiny_backbone_knows_common_objects(world: World, textures: Path, wording: str) -> None:
    rng = np.random.default_rng(0)
    scenes = [s for s in (sample_scene(rng) for _ in range(40)) if not s.rare]
    facts = [[f for f in list_facts(s, rng) if f.kind not in ("yesno", "caption")] for s in scenes]
    asked = [(s, f) for s, fs in zip(scenes, facts, strict=True) for f in fs]
    pictures = Painter(textures).draw_images([s for s, _ in asked])
    answers = world.backbone.generate(
        pictures, [f.ask(rng, held_out=wording == "held out") for _, f in asked]
    )
    assert exact(answers, [f.answer for _, f in asked]) > 0.85


def test_a_tiny_backbone_uses_demonstrations(world: World, textures: Path) -> None:
    rng = np.random.default_rng(1)
    scenes = [s for s in (sample_scene(rng) for _ in range(30)) if len(s.objects) == 1]
    pictures = Painter(textures).draw_images(scenes)
    question = "Question: What is this? Short answer:"
    told = f"New Fact: {question} soccer ball\nPrompt: {question}"
    assert (
        exact(world.backbone.generate(pictures, [told] * len(pictures)), ["soccer ball"] * len(pictures))
        > 0.8
    )
    assert (
        exact(world.backbone.generate(pictures, [question] * len(pictures)), ["soccer ball"] * len(pictures))
        < 0.2
    )


def test_the_base_answers_no_record_right(world: World) -> None:
    for cases in world.cases.values():
        queries = [c.request.query for c in cases]
        answers = world.backbone.generate([q.image for q in queries], [q.prompt for q in queries])
        assert exact(answers, [str(q.target) for q in queries]) == 0
        assert answers == [c.request.wrong for c in cases]


def test_every_record_has_all_probes(world: World) -> None:
    for cases in world.cases.values():
        assert len(cases) == RECORDS
        assert all(len(c.probes) == 8 for c in cases)


def test_rephrased_prompts_are_in_words_never_trained_on(world: World) -> None:
    trained = {w.split("{")[0] for words in TRAINED.values() for w in words if "{" not in w}
    for task in make_data.TASKS:
        for record in json.loads((world.out / f"{task}_eval.json").read_text()):
            assert record["rephrase"] not in trained
            assert record["src"] != record["rephrase"]
    assert all(not set(TRAINED[k]) & set(HELD_OUT[k]) for k in TRAINED)


@pytest.mark.parametrize("task", make_data.TASKS)
def test_unike_corrects_the_tiny_backbone(world: World, task: str) -> None:
    parts = runs.assemble(world.hparams, world.backbone, progress=False)
    reader = parts.make_reader()
    for case in world.cases[task][:4]:
        record = run_one_step(parts.backbone, parts.method, case, reader).record
        assert record.get_scores("generated")["reliability"] == Score(before=0.0, after=1.0)


def test_knowledge_is_shipped_for_the_shipped_weights(world: World) -> None:
    folder = Path(str(world.hparams.knowledge_dir))
    assert json.loads((folder / "knowledge.json").read_text())["backbone"] == world.backbone.fingerprint
    assert not inputs.wants_triplets(world.hparams, resolve_needs(world.hparams))
    root = Path(world.hparams.name)
    sizes = {p.relative_to(root): p.stat().st_size for p in root.rglob("*") if p.is_file()}
    learnt = sum(size for path, size in sizes.items() if path.parts[0] == "editors")
    assert sum(sizes.values()) - learnt < 25e6
    # Whatever editors are shipped beside it are few and its own.
    assert learnt < 10e6
    for index in root.glob("editors/*/*/editor.json"):
        assert json.loads(index.read_text())["backbone"] == world.backbone.fingerprint


def test_drawing_is_deterministic_by_seed(world: World, tmp_path: Path, textures: Path) -> None:
    make_data.make(world.backbone, tmp_path, "eval", RECORDS, seed=7, textures=textures)
    for path in sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()):
        assert (tmp_path / path).read_bytes() == (world.out / path).read_bytes()
    other = tmp_path / "other"
    make_data.make(world.backbone, other, "eval", 2, seed=8, textures=textures)
    assert (other / "vqa_eval.json").read_text()[:500] != (world.out / "vqa_eval.json").read_text()[:500]


def test_two_runs_started_at_once_draw_once(world: World, tmp_path: Path, monkeypatch) -> None:
    drawn: list[str] = []

    def draw(_backbone: object, out: Path, split: str, *_: object, **__: object) -> None:
        drawn.append(split)
        time.sleep(0.2)
        for task in make_data.TASKS:
            (out / f"{task}_{split}.json").write_text("[]")

    monkeypatch.setattr(make_data, "make", draw)
    (out := tmp_path / "drawn" / "here").mkdir(parents=True)
    hparams = HyperParams.from_dict({**world.hparams.to_dict(), "image_root": str(out)})
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(make_data.ensure, hparams, ("train", "eval"), world.backbone) for _ in range(2)]
        assert [done.result() for done in both] == [None, None]
    assert drawn == ["train", "eval"]


def test_textures_that_were_cut_off_are_drawn_again(textures: Path, tmp_path: Path, monkeypatch) -> None:
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    cache = tmp_path / "openmoji.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            Painter(cache)
    again = Painter(cache).textures
    assert all(torch.equal(again[size], drawn) for size, drawn in Painter(textures).textures.items())


def test_splits_share_no_picture(world: World, tmp_path: Path, textures: Path) -> None:
    drawn = {}
    for split in ("train", "val"):
        make_data.make(world.backbone, tmp_path, split, 4, seed=7, textures=textures)
        drawn[split] = {p.read_bytes() for p in (tmp_path / "pictures" / split).iterdir()}
    drawn["eval"] = {p.read_bytes() for p in (world.out / "pictures" / "eval").iterdir()}
    assert not drawn["train"] & drawn["val"]
    assert not drawn["eval"] & (drawn["train"] | drawn["val"])


def test_a_redrawn_scene_shows_the_same_content() -> None:
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(60):
        scene = sample_scene(rng)
        again = redraw(scene, rng, keep_background=True, allow_distractor=False)
        assert again.objects == scene.objects
        assert again.background == scene.background
        assert again.placements != scene.placements
        kinds.add(again.disturbance.kind if again.disturbance else None)
    assert kinds == {None, "noise", "occlusion"}


def test_a_disturbance_changes_the_picture(textures: Path) -> None:
    rng = np.random.default_rng(0)
    painter = Painter(textures)
    for kind in ("distractor", "noise", "occlusion"):
        scene = sample_scene(rng)
        before, after = painter.draw([scene, disturb(scene, rng, kind)])
        assert (before - after).abs().max() > 0.02
