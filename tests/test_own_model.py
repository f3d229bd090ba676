"""Edits of one's own model with no data: the family from config.json, the command, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Project
from PIL import Image
from todays import TODAY, save_folder

from unike import ask, own
from unike.backbones.families import find_published
from unike.config.untrained import UNTRAINED, make_untrained
from unike.editor import MultimodalEditor
from unike.editor.models import describe_model
from unike.edits.store import EditStore
from unike.methods.registry import resolve_needs
from unike.system.hub import find_model_folder, is_hub_id
from unike.system.launching import run_guarded
from unike.types import UserError

ROOT = Path(__file__).parents[1]
TOYS = {"tiny-blip2-opt": "blip2", "tiny-minigpt4": "minigpt4"}
pytestmark = pytest.mark.usefixtures("one_thread")


def toy(name: str = "tiny-blip2-opt") -> str:
    return str(ROOT / "hugging_cache" / name)


@pytest.fixture
def photo(tmp_path: Path) -> str:
    image = Image.new("RGB", (64, 64), "lightblue")
    image.paste("orange", (16, 16, 48, 48))
    image.save(tmp_path / "x.png")
    return str(tmp_path / "x.png")


def command(*arguments: str) -> int:
    return run_guarded(lambda: own.run(arguments))


def put_into_hub_cache(folder: Path, cache: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's own download leaves a model; the network is off."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / ("a" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download", "transformers.utils.hub"):
        for key, value in (("HF_HUB_CACHE", str(cache)), ("HF_HUB_OFFLINE", True)):
            monkeypatch.setattr(f"{module}.{key}", value, raising=False)


# ---------------------------------------------------------------- which model


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_is_known_by_its_config(name: str) -> None:
    published = find_published(toy(name))
    assert (published.model_name, published.dtype) == (TOYS[name], "float16")


@pytest.mark.parametrize("family", TODAY)
def test_todays_models_are_known_by_their_config(family: str, tmp_path: Path) -> None:
    assert find_published(str(save_folder(tmp_path / "model", family))).model_name == family
    # Qwen2-VL's published files have the decoder's values flat.
    config = {"model_type": "qwen2_vl", "hidden_size": 8, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = find_published(str(tmp_path))
    assert (found.model_name, found.dtype) == ("qwen2_vl", "bfloat16")


def write_config(folder: Path, **values: Any) -> str:
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def test_blip2s_line_break_ends_its_answers(tmp_path: Path) -> None:
    text = {"model_type": "opt", "eos_token_id": 50118, "torch_dtype": "float16"}
    found = find_published(write_config(tmp_path, model_type="blip-2", text_config=text))
    assert (found.model_name, found.dtype, found.answer_end) == ("blip2", "float16", "line_break")
    plain = write_config(tmp_path, model_type="blip-2", text_config=text | {"eos_token_id": 2})
    assert find_published(plain).answer_end == "eos"


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"model_type": "bert"}, "type `bert`; expected blip-2 with opt; blip-2 with llama; llava with"),
        ({"model_type": "blip-2", "text_config": {"model_type": "t5"}}, "`blip-2` with a `t5` decoder"),
        ({"model_type": "instructblip", "text_config": {"model_type": "t5"}}, "with a `t5` decoder"),
        ({"model_type": ["llava"]}, "of type"),
        ([], "holds no object"),
        (None, "holds no config.json"),
    ],
)
def test_what_is_no_model_is_one_line(tmp_path: Path, config: Any, line: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        find_published(str(tmp_path))
    assert len(caught.value.problems) == 1
    assert line in str(caught.value)


def test_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert is_hub_id("Qwen/Qwen2.5-VL-7B-Instruct")
    for path in ("there/model", "./Qwen/model", "/Qwen/model", "model", "hugging_cache/opt", "a/b/c", ""):
        assert not is_hub_id(path), path
    assert find_model_folder("there/model") == Path("there/model")


# ---------------------------------------------------------------- no data


def test_nothing_is_trained_and_nothing_is_read() -> None:
    needs = resolve_needs(make_untrained("x", model_name="blip2", name="y"))
    assert needs == type(needs)(gate=True)
    # Each of these alone would ask for data.
    for change in ({"memory": "both"}, {"alpha": "adaptive"}, {"zeta": "truthfulness"}):
        assert resolve_needs(make_untrained("x", model_name="blip2", name="y", **change)).knowledge
    assert resolve_needs(make_untrained("x", model_name="blip2", name="y", scope_measure="both")).scope
    assert set(UNTRAINED) & {"data", "knowledge_dir", "scope_dir", "editor_dir"} == set()


def test_half_precision_becomes_single_on_a_cpu(tmp_path: Path) -> None:
    assert describe_model(toy(), device="cpu").dtype == "float32"
    assert describe_model(toy(), device="cpu", dtype="float16").dtype == "float16"
    config = json.loads(Path(toy(), "config.json").read_text())
    assert describe_model(write_config(tmp_path, **config | {"dtype": "bfloat16"})).dtype == "bfloat16"


@pytest.mark.parametrize("name", TOYS)
def test_an_edit_without_data_is_made_and_undone(name: str, photo: str) -> None:
    editor = MultimodalEditor.from_model(toy(name), progress=False)
    weights = {k: v.clone() for k, v in editor.backbone.model.state_dict().items()}
    asked, plain = "Question: What is this? Short answer:", Image.new("RGB", (64, 64), "navy")
    before = editor.generate(photo, asked), editor.generate(plain, asked)
    metrics, edited, _ = editor.edit(asked, "kangaroo", photo)
    assert "error" not in metrics[0]
    assert before[0] != edited.generate(photo, asked) == "kangaroo"
    assert edited.generate(plain, asked) == before[1]
    edited.remove()
    assert editor.generate(photo, asked, edited=True) == before[0]
    now = editor.backbone.model.state_dict()
    assert all(torch.equal(now[k], tensor) for k, tensor in weights.items())


def test_lists_are_edited_one_on_top_of_the_other(photo: str) -> None:
    editor = MultimodalEditor.from_model(toy(), progress=False)
    questions = [
        "Question: What is this? Short answer:",
        "Question: What color is the background? Short answer:",
    ]
    _, edited, _ = editor.edit(questions, ["kangaroo", "red"], [photo] * 2, sequential_edit=True)
    assert edited.generate(photo, questions) == ["kangaroo", "red"]
    assert len(edited.edits) == 2
    # Of independent edits the last one is attached alone.
    before = editor.generate(photo, questions[0])
    _, edited, _ = editor.edit(questions, ["kangaroo", "red"], [photo] * 2)
    assert edited.generate(photo, questions) == [before, "red"]


@pytest.mark.parametrize("family", TODAY)
def test_every_family_takes_this_path(family: str, tmp_path: Path, photo: str) -> None:
    folder = save_folder(tmp_path / "model", family)
    editor = MultimodalEditor.from_model(folder, progress=False, max_steps=200, stop_loss=0.01)
    metrics, edited, _ = editor.edit("what is it?", "two dogs", photo)
    assert "error" not in metrics[0]
    assert metrics[0]["post"]["rewrite_acc"] == 1.0
    assert metrics[0]["pre"]["rewrite_acc"] < 1.0
    edited.remove()
    assert editor.edits == ()


@pytest.mark.parametrize("family", ["blip2", "qwen2_5_vl"])
def test_an_id_of_the_hub_is_its_folder(
    family: str, tmp_path: Path, photo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(toy()) if family == "blip2" else save_folder(tmp_path / "model", family)
    put_into_hub_cache(folder, tmp_path / "hub", "some-one/some.model", monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert describe_model("some-one/some.model").model_name == family
    answers, identities = [], []
    for name in ("some-one/some.model", folder):
        editor = MultimodalEditor.from_model(name, progress=False)
        identities.append(editor.backbone.identity)
        answers.append(editor.generate(photo, "Question: What is this? Short answer:"))
    assert answers[0] == answers[1]
    # Weights and all that is read with them, the image processor too.
    assert identities[0] == identities[1]


def test_an_id_that_cannot_be_had_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    put_into_hub_cache(Path(toy()), tmp_path / "hub", "some-one/other", monkeypatch)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    given = ("--image", str(tmp_path / "x.png"), "--question", "What?", "--answer", "this")
    assert command("--model", "some-one/lost", *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model: some-one/lost: no folder of this name")


# ---------------------------------------------------------------- the command


def test_the_command_shows_what_changed_and_what_stayed(photo: str, tmp_path: Path, capsys) -> None:
    store = tmp_path / "edits"
    given = ["--model", toy(), "--image", photo, "--question", "What is this?", "--answer", "kangaroo"]
    more = ["--rephrase", "Which object is this?", "--save", str(store), "--json"]
    assert command(*given, *more) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    rows = {row["about"]: row for row in shown["asked"]}
    assert set(rows) == {"the question", "in other words", "another question", "a plain image", "no image"}
    for about in ("the question", "in other words"):
        assert rows[about]["after"] == "kangaroo" != rows[about]["before"]
    for about in ("another question", "a plain image", "no image"):
        assert rows[about]["after"] == rows[about]["before"]
        assert rows[about]["expect"] == "unchanged"
    assert all(row["is_right"] for row in rows.values())
    # What is saved answers by the other command.
    assert len(EditStore(store)) == 1
    arguments = [
        "--model",
        toy(),
        "--edits",
        str(store),
        "--image",
        photo,
        "--json",
        "Which object is this?",
    ]
    assert run_guarded(lambda: ask.run(arguments)) == 0
    asked = json.loads(capsys.readouterr().out)
    assert (asked["before"], asked["after"]) == (rows["in other words"]["before"], "kangaroo")
    # Saved again it is the same edit.
    assert command(*given, "--save", str(store)) == 0
    assert len(EditStore(store)) == 1
    assert "✓ edited" in capsys.readouterr().out


def test_an_edit_that_does_not_hold_is_said(photo: str, capsys) -> None:
    given = ["--model", toy(), "--image", photo, "--question", "What is this?", "--answer", "kangaroo"]
    assert command(*given, "max_steps=1", "external=none", "alpha_overlap=false") == 0
    shown = capsys.readouterr().out
    assert "✗ not edited" in shown
    assert "✓ stayed" in shown


WRITERS: dict[str, Callable[[list[dict[str, str]]], str]] = {
    "json": json.dumps,
    "jsonl": lambda rows: "\n".join(map(json.dumps, rows)),
    "csv": lambda rows: "\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_three_lines_of_a_file_are_three_edits(suffix: str, photo: str, tmp_path: Path, capsys) -> None:
    rows = [
        {"image": "x.png", "question": "What is this?", "answer": "kangaroo"},
        {"image": "y.png", "question": "What is this?", "answer": "fox"},
        {"image": "x.png", "question": "What color is the background?", "answer": "red"},
    ]
    Image.new("RGB", (64, 64), "green").save(tmp_path / "y.png")
    path = tmp_path / f"edits.{suffix}"
    path.write_text(WRITERS[suffix](rows))
    assert command("--model", toy(), "--edits", str(path), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [edit["image"] for edit in shown] == [str(tmp_path / row["image"]) for row in rows]
    assert [edit["asked"][0]["after"] for edit in shown] == ["kangaroo", "fox", "red"]
    # The second edit of an image is not held against the first.
    assert [[row["about"] for row in edit["asked"]][1] for edit in shown] == [
        "a plain image", "another question", "a plain image",
    ]  # fmt: skip


BAD: list[tuple[list[str], str]] = [
    (["--question", "Q"], "--answer: 0 given; expected as many as --question, 1"),
    (["--question", "Q", "--answer", " "], "--answer: is empty"),
    (["--question", "Q", "--answer", "A", "--image", "lost.png"], "lost.png"),
    (["--question", "Q", "--answer", "A", "--rephrase_image", "lost.png"], "lost.png"),
    (["--question", "Q", "--answer", "A", "--image", "a", "--image", "b"], "--image: 2 given"),
    ([], "--question: is missing; expected --question and --answer, or a file (--edits)"),
    (["--edits", "lost.csv"], "lost.csv"),
    (["--edits", "rows.csv", "--question", "Q"], "are both given; expected one of them"),
    (["--edits", "rows.csv"], "rows.csv: record 0: target is missing"),
    (["--edits", "rows.csv", "--images", "nowhere"], "--images nowhere: no such folder"),
    (["--edits", "near.csv"], "'imag' is unknown; is 'image' meant?"),
    (["--question", "Q", "--answer", "A", "--template", "none"], "expected exactly one {} for the question"),
    (["--question", "Q", "--answer", "A", "--save", "."], "holds no index.jsonl; expected a store of edits"),
    (["--question", "Q", "--answer", "A", "--model_name", "bert"], "model_name: 'bert' is unknown"),
    (["--question", "Q", "--answer", "A", "lr=-1"], "lr"),
    (["--question", "Q", "--answer", "A", "--dtype", "int3"], "dtype"),
]


@pytest.mark.parametrize(("arguments", "line"), BAD, ids=[line for _, line in BAD])
@pytest.mark.usefixtures("nothing_loads")
def test_bad_input_is_one_line_before_a_model_is_loaded(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("image,question\nx.png,What?\n")
    (tmp_path / "near.csv").write_text("imag,question,answer\nx.png,What?,this\n")
    assert command("--model", toy(), *arguments) == 2
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.startswith("error: ")
    assert line in shown


def test_a_store_of_another_model_is_refused_before_the_edit(
    blip2_project: Project, photo: str, tmp_path: Path, capsys
) -> None:
    given = [
        "--image",
        photo,
        "--question",
        "what?",
        "--answer",
        "a man",
        "--save",
        str(tmp_path / "e"),
        "layers=2",
    ]
    assert command("--model", str(blip2_project.root / "model"), *given) == 0
    capsys.readouterr()
    assert command("--model", toy(), *given) == 2
    assert "holds edits of another model" in capsys.readouterr().err
