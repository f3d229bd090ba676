"""The bundled benchmark's version 2: what its probes change, and what training never shows."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts.tiny import make_data
from scripts.tiny.make_data import Candidate
from scripts.tiny.questions import HELD_OUT, SceneFact, list_facts
from scripts.tiny.scenes import CATEGORY, OBJECTS, Painter, sample_scene
from scripts.tiny.second_version import ALTERED, COUNTS, STYLES, UNSEEN, SecondArtist
from unike.backbones import load_backbone
from unike.config.sections import DataOptions
from unike.datasets.mmedit import CaptionDataset, VQADataset
from unike.datasets.probe_files import read_probes
from unike.runs.drawing import check_target, check_version, get_size
from unike.types import IMAGE_STYLES, STYLE_METRICS, UserError

ROOT = Path(__file__).parents[1]
RECORDS = 20


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, monkeypatch_module) -> Path:
    out = tmp_path_factory.mktemp("second")
    backbone = load_backbone("hparams/tiny_blip2.yaml")
    textures = out / "openmoji.safetensors"
    for split in ("train", "eval"):
        make_data.make(backbone, out / "data", split, RECORDS, seed=7, textures=textures, version=2)
    return out / "data"


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield patch


@pytest.fixture
def artist() -> SecondArtist:
    return SecondArtist(None, None, 3, "eval")


def draw(artist: SecondArtist, kind: str) -> Candidate:
    while True:
        scene = sample_scene(artist.rng)
        facts = [f for f in list_facts(scene, artist.rng) if f.kind == kind]
        if facts:
            return Candidate(scene, facts[0], "", "")


@pytest.mark.parametrize("kind", [kind for kind in HELD_OUT if kind != "count"])
def test_a_minimal_pair_differs_in_what_is_asked_about_alone(artist, kind):
    for _ in range(30):
        c = draw(artist, kind)
        new, answer = artist.draw_minimal_pair(c)
        same = (c.scene.placements, c.scene.jitter, c.scene.disturbance)
        assert (new.placements, new.jitter, new.disturbance) == same
        changed = [i for i, (a, b) in enumerate(zip(c.scene.objects, new.objects, strict=True)) if a != b]
        assert answer != c.fact.answer
        if kind == "color":
            assert not changed
            assert new.color == answer
            continue
        assert new.background == c.scene.background
        # Of a category that both objects have, "is there one?" needs both changed.
        assert len(changed) == 1 or (kind == "yesno" and c.fact.answer == "yes")
        if kind == "yesno":
            found = c.fact.argument in [CATEGORY[name] for name in new.names]
            assert answer == ("yes" if found else "no")
        else:
            facts = list_facts(new, np.random.default_rng(0))
            assert SceneFact(kind, c.fact.argument, answer) in facts


def test_a_pair_of_counts_has_another_number_of_objects(artist):
    for _ in range(20):
        c = draw(artist, "count")
        new, answer = artist.draw_minimal_pair(c)
        assert (len(new.objects), answer) == ((1, "one") if len(c.scene.objects) == 2 else (2, "two"))
        assert set(new.objects) & set(c.scene.objects)
        assert new.background == c.scene.background


def test_a_fifth_of_the_objects_is_unseen():
    assert 0.12 < len(UNSEEN) / len(OBJECTS) < 0.28


def test_styles_change_the_image_and_keep_its_size():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    changed = {name: np.asarray(style(image)) for name, style in STYLES.items()}
    assert all(array.shape == (64, 64, 3) and array.dtype == np.uint8 for array in changed.values())
    assert len({array.tobytes() for array in (np.asarray(image), *changed.values())}) == 1 + len(STYLES)
    assert tuple(STYLES) == IMAGE_STYLES


def read(drawn: Path, task: str, split: str) -> list[dict[str, Any]]:
    return json.loads((drawn / f"{task}_{split}.json").read_text())


def test_training_shows_no_unseen_wording(drawn):
    last = [re.sub(r"\\{a?x\\}", ".+", re.escape(words[-1])) for words in HELD_OUT.values()]

    def uses_last(split: str) -> list[bool]:
        records = [r for task in ("vqa", "caption") for r in read(drawn, task, split)]
        return [any(re.fullmatch(words, r["rephrase"]) for words in last) for r in records]

    assert not any(uses_last("train"))
    assert any(uses_last("eval"))


def test_training_shows_no_unseen_object():
    artist = SecondArtist(None, None, 3, "train")
    assert not any(UNSEEN & set(artist._sample_scene().objects) for _ in range(300))
    artist.split = "eval"
    assert any(UNSEEN & set(artist._sample_scene().objects) for _ in range(300))


@pytest.mark.parametrize(("task", "kind"), [("vqa", VQADataset), ("caption", CaptionDataset)])
def test_every_record_has_its_probes_and_groups(drawn, task, kind):
    path = drawn / f"{task}_eval.json"
    cases = kind(path, drawn, probes=path.with_suffix(".probes.json"))
    assert len(cases) == RECORDS
    assert not cases.list_missing_images()
    for case in cases:
        names = [probe.name for probe in case.probes]
        assert {"minimal_pair", "same_object", *STYLE_METRICS} <= set(names)
        assert len(names) == len(set(names)) == 15
        assert set(case.groups) == {"kind", "edit", "objects", "wording"}
        styled = [p for p in case.probes if p.name in STYLE_METRICS]
        assert all(p.expect == "target" and p.query.target == case.request.query.target for p in styled)


def test_counts_and_colors_are_counterfactual_edits(drawn):
    path = drawn / "vqa_eval.json"
    groups = [probes.groups for probes in read_probes(path.with_suffix(".probes.json"), path)]
    kinds = Counter(group["kind"] for group in groups)
    share = RECORDS // 10
    assert (kinds["count"], kinds["color"]) >= (share, share)
    records = read(drawn, "vqa", "eval")
    for record, group in zip(records, groups, strict=True):
        if group["kind"] == "count" and group["edit"] == "counterfactual":
            assert record["alt"] in COUNTS
    counterfactual = [g["kind"] for g in groups if g["edit"] == "counterfactual"]
    assert sorted(counterfactual) == ["color"] * share + ["count"] * share


class Scripted(SecondArtist):
    """An artist whose base names a wrong answer for every question, without a model."""

    def draw_candidates(self, task: str, count: int) -> list[Candidate]:
        kinds = ("caption",) if task == "caption" else ("color", "count", "left")
        return [replace(draw(self, kinds[i % len(kinds)]), answer="nothing") for i in range(count)]


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_the_other_records_of_val_are_as_if_no_counterfactual_edit_were_before_them(task, monkeypatch):
    def draw_all() -> list[tuple[dict[str, Any], dict[str, Any]]]:
        artist = Scripted(None, None, 3, "val")
        kept = {
            t: [artist.make_record(t, i, c) for i, c in enumerate(artist.collect(t, RECORDS))]
            for t in ("vqa", "caption")
        }[task]
        shown = [{k: artist.images[v][0] if v in artist.images else v for k, v in r.items()} for r in kept]
        return [(r, p.groups) for r, p in zip(shown, artist.further[task], strict=True)]

    found = draw_all()
    before = [group["kind"] for _, group in found if group["edit"] == "counterfactual"]
    assert before == ([*ALTERED] * (RECORDS // 20) if task == "vqa" else [])
    monkeypatch.setattr("scripts.tiny.second_version.COUNTERFACTUAL_SHARE", 0.0)
    without = draw_all()
    assert len(without) == RECORDS
    assert found[len(before) :] == without


def test_the_first_version_is_drawn_by_its_own_artist():
    assert make_data._find_artist(1) is make_data.Artist
    assert make_data._find_artist(2) is SecondArtist
    assert make_data.Artist(None, Painter.__new__(Painter), 1, "eval").version == 1


def test_probes_of_somebody_elses_are_not_drawn_over(tmp_path):
    mine = tmp_path / "vqa_eval.probes.json"
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"vqa_eval\.probes\.json"):
        check_target(tmp_path, "eval")
    assert mine.read_text() == "mine"
    mine.unlink()
    check_target(tmp_path, "eval")


def test_changed_probes_are_not_drawn_over(drawn, tmp_path):
    shutil.copytree(drawn, tmp_path / "data")
    check_target(tmp_path / "data", "eval")
    with open(tmp_path / "data/vqa_eval.probes.json", "a") as file:
        file.write(" ")
    with pytest.raises(UserError, match=r"vqa_eval\.probes\.json"):
        check_target(tmp_path / "data", "eval")


def test_another_version_in_the_folder_is_named(drawn):
    options = DataOptions(image_root=str(drawn), benchmark_version=2)
    check_version(options, drawn)
    with pytest.raises(
        UserError, match=r"benchmark_version: 1; .*eval\.about\.json is of version 2"
    ) as caught:
        check_version(replace(options, benchmark_version=1), drawn)
    assert len(caught.value.problems) == 2


def test_only_the_train_split_of_version_2_is_larger() -> None:
    sizes = {
        (split, version): get_size(split, version) for split in ("train", "val", "eval") for version in (1, 2)
    }
    assert sizes[("train", 2)] > sizes[("train", 1)] == 600
    assert all(sizes[(split, 1)] == sizes[(split, 2)] for split in ("val", "eval"))
