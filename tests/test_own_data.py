"""Own data: rows in every form, a benchmark from a folder of images, and the page that shows it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageDraw
from test_docs import ROOT, blocks, environment

from unike.config.hparams import HyperParams
from unike.datasets.answers import normalise_answer
from unike.datasets.images import open_image
from unike.datasets.mmedit import REQUIRED_FIELDS, VQADataset, list_record_problems
from unike.datasets.rows import FIELDS
from unike.editor.cases import read_cases
from unike.own import benchmark
from unike.own.edits import OwnEdit, read_own_file
from unike.runs.request import RunRequest
from unike.system.launching import run_guarded

PAGE = ROOT / "docs" / "own_data.md"
TOY = str(ROOT / "hugging_cache" / "tiny-blip2-opt")
QUESTIONS = [
    {"image": "a.png", "question": "What animal is this?", "answer": "a fox"},
    {"image": "b.png", "question": "What animal is this?", "answer": "a lynx"},
    {"image": "b.png", "question": "What color is the background?", "answer": "red"},
]


def draw(
    path: Path, color: str, shape: str = "orange", box: tuple[int, int, int, int] = (16, 16, 32, 32)
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (64, 64), color)
    ImageDraw.Draw(image).ellipse(box, fill=shape)
    image.save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, color in (("a", "navy"), ("b", "red")):
        draw(tmp_path / "photos" / f"{name}.png", color)
    return tmp_path / "photos"


def build(photos: Path, rows: Any, *more: str) -> int:
    (photos.parent / "questions.json").write_text(json.dumps(rows))
    given = [
        str(photos),
        "--questions",
        str(photos.parent / "questions.json"),
        "--into",
        str(photos.parent / "out"),
    ]
    return run_guarded(lambda: benchmark.run([*given, *more]))


# ---------------------------------------------------------------- rows


class Rows:
    """As a `datasets.Dataset`: rows are mappings, images are decoded, and there are more methods."""

    column_names = ("image", "question", "answer")

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def to_dict(self) -> dict[str, list[Any]]:
        return {name: [row[name] for row in self.rows] for name in self.column_names}


def test_a_dataset_of_decoded_images_is_read_as_its_rows(photos: Path) -> None:
    hparams = HyperParams(model_name="blip2", name="x", image_root=str(photos))
    named = read_cases(QUESTIONS, hparams, "Question: {} Short answer:")
    decoded = Rows([row | {"image": Image.open(photos / row["image"])} for row in QUESTIONS])
    read = read_cases(decoded, hparams, "Question: {} Short answer:")
    assert len(read) == len(named) == 3
    for one, other in zip(read, named, strict=True):
        assert (one.request.query.prompt, one.request.query.target) == (
            other.request.query.prompt,
            other.request.query.target,
        )
        assert open_image(one.request.query.image) == open_image(other.request.query.image)


def test_a_file_holds_all_that_is_asked_after_an_edit(photos: Path) -> None:
    row = {
        **QUESTIONS[0], "rephrase": ["Which animal?", "An animal?"], "image_rephrase": "b.png",
        "other_question": "Why?", "other_image": "b.png", "loc": "Who?",
    }  # fmt: skip
    (photos / "rows.jsonl").write_text(json.dumps(row))
    a, b = str(photos / "a.png"), str(photos / "b.png")
    expected = OwnEdit(
        a, "What animal is this?", "a fox", ("Which animal?", "An animal?"), (b,), ("Why?",), (b,), "Who?"
    )
    assert read_own_file(str(photos / "rows.jsonl")) == [expected]
    assert read_own_file(str(photos / "rows.jsonl"), str(photos)) == [expected]


# ---------------------------------------------------------------- a benchmark


def test_what_a_record_lacks_is_derived_and_what_it_has_stays(photos: Path, capsys) -> None:
    own = {"rephrase": "Which animal can be seen?", "loc": "Who was king?", "loc_ans": "a man"}
    assert build(photos, [QUESTIONS[0] | own, *QUESTIONS[1:]]) == 0
    out = photos.parent / "out"
    records = json.loads((out / "vqa_eval.json").read_text())
    assert [list_record_problems(record, i) for i, record in enumerate(records)] == [[], [], []]
    assert all(set(REQUIRED_FIELDS) <= set(record) for record in records)
    assert own.items() <= records[0].items()
    for record, row in zip(records, QUESTIONS, strict=True):
        assert (record["src"], record["alt"], record["image"]) == (
            row["question"],
            row["answer"],
            row["image"],
        )
        assert record["m_loc"] != record["image"]
        # An unrelated question with its own right answer.
        known = {(r["image"], r["question"]): r["answer"] for r in QUESTIONS}
        assert known[record["m_loc"], record["m_loc_q"]] == record["m_loc_a"]
        shown = open_image(str(out / "rephrased" / record["image_rephrase"]))
        assert shown.size == (64, 64)
        assert shown != open_image(str(photos / record["image"]))
    # Only where nothing else is there does an unrelated question ask the same.
    assert records[2]["m_loc_q"] == "What animal is this?"
    cases = VQADataset(out / "vqa_eval.json", photos, out / "rephrased", probes=out / "vqa_eval.probes.json")
    assert cases.list_missing_images() == []
    names = [{probe.name for probe in case.probes} for case in cases]
    assert all({"joint", "t1_i3", "m_locality"} <= found for found in names)
    # The same question about another image, where the answers differ; another one about the same image.
    assert ["same_question" in found for found in names] == [True, True, False]
    assert ["same_image" in found for found in names] == [False, True, True]
    assert "vqa_eval.json: 3 records" in capsys.readouterr().out


def test_the_seed_decides_on_what_is_drawn() -> None:
    rows = [
        {"src": row["question"], "alt": row["answer"], "image": f"{i}.png"}
        for i, row in enumerate(QUESTIONS * 3)
    ]
    one, same, other = (benchmark.derive_records(rows, seed) for seed in (0, 0, 1))
    assert one == same != other
    for record in one:
        assert normalise_answer(record["m_loc_q"]) != normalise_answer(record["src"])


def test_subfolders_are_answers(tmp_path: Path) -> None:
    for name, color in (("red_fox/1", "navy"), ("red_fox/2", "white"), ("lynx/1", "red")):
        draw(tmp_path / "photos" / f"{name}.png", color)
    (tmp_path / "photos" / "lynx" / "notes.txt").write_text("no image")
    rows = benchmark.read_questions(tmp_path / "photos", None)
    assert [(row["image"], row["alt"]) for row in rows] == [
        ("lynx/1.png", "lynx"), ("red_fox/1.png", "red fox"), ("red_fox/2.png", "red fox"),
    ]  # fmt: skip


def test_the_yaml_names_the_model_and_the_data(photos: Path, tmp_path: Path, monkeypatch) -> None:
    assert build(photos, QUESTIONS, "--model", TOY) == 0
    monkeypatch.chdir(ROOT)
    hparams = HyperParams.from_hparams(tmp_path / "out" / "own.yaml")
    assert (hparams.model_name, hparams.name, hparams.memory) == ("blip2", TOY, "edit")
    assert len(RunRequest(hparams).cases) == 3
    assert yaml.safe_load((tmp_path / "out" / "own.yaml").read_text())["scope_measure"] == "overlap"


BAD: list[tuple[Any, str]] = [
    ([], "holds no record"),
    ([QUESTIONS[0]], "of one image alone; expected two or more"),
    ([{"question": "What?", "answer": "x"}, QUESTIONS[1]], "record 0: image is missing"),
    ([QUESTIONS[0] | {"image": "lost.png"}, QUESTIONS[1]], "record 0: image: "),
    ([QUESTIONS[0] | {"image": "../x.png"}, QUESTIONS[1]], "record 0: image: ../x.png lies outside of"),
    ([QUESTIONS[0] | {"image": 3}, QUESTIONS[1]], "record 0: image: expected the name of an image, got int"),
    ([QUESTIONS[0] | {"loc": "Who?"}, QUESTIONS[1]], "record 0: loc without loc_ans; expected all of them"),
    ([QUESTIONS[0] | {"rephrase": 3}, QUESTIONS[1]], "record 0: field 'rephrase': expected a string"),
    ([{"image": "a.png", "question": "What?"}], "record 0: target is missing"),
]


@pytest.mark.parametrize(("rows", "line"), BAD, ids=[line for _, line in BAD])
def test_bad_rows_are_one_line_and_nothing_is_written(photos: Path, rows: Any, line: str, capsys) -> None:
    assert build(photos, rows) == 2
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.startswith("error: ")
    assert line in shown
    assert not (photos.parent / "out").exists()


def test_a_folder_that_is_there_is_kept(photos: Path, capsys) -> None:
    (photos.parent / "out").mkdir()
    assert build(photos, QUESTIONS) == 2
    assert "is there already; expected a new folder" in capsys.readouterr().err
    given = [str(photos), "--into", str(photos.parent / "new")]
    assert run_guarded(lambda: benchmark.run(given)) == 2
    assert "no subfolder holds an image" in capsys.readouterr().err


# ---------------------------------------------------------------- the page


def test_the_page_is_short_and_names_the_fields_as_they_are_read() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    (table,) = re.findall(r"## Fields of a record\n\n(.*?)\n\n", text, re.S)
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    named = [set(re.findall(r"`(\w+)`", " ".join(cells))) for cells in rows]
    known = [set(names) for names in FIELDS.values()]
    assert len(named) >= 10
    assert [names for names in named if names not in known] == []


@pytest.mark.slow
@pytest.mark.longest
def test_every_command_and_block_of_the_page_runs(tmp_path: Path) -> None:
    """In the order of the page, in a folder that sees the toy model."""
    (tmp_path / "hugging_cache").symlink_to(ROOT / "hugging_cache")
    draw(tmp_path / "my_image.png", "lightblue", "orange", (16, 16, 48, 48))
    # The model takes them for different things.
    draw(tmp_path / "photos" / "dog.png", "lightblue", "pink", (12, 12, 52, 52))
    draw(tmp_path / "photos" / "cat.png", "white", "brown", (4, 20, 60, 44))
    written = blocks(PAGE, "csv")
    assert [name for name, _ in written] == ["edits.csv", "questions.csv"]
    for name, text in written:
        (tmp_path / name).write_text(text)

    def start(*words: str) -> str:
        line = [sys.executable, *words]
        done = subprocess.run(
            line, cwd=tmp_path, env=environment(COLUMNS="160"), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    shown = []
    for _, text in blocks(PAGE, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            assert words[0] == "python"
            script = [str(ROOT / "run_edit.py")] if words[1] == "run_edit.py" else [words[1]]
            shown.append(start(*script, *words[2:]))
    assert len(shown) == 5
    assert shown[0].count("✓") == 5
    assert "kangaroo" in shown[1]
    assert shown[2].count("✓ edited") == 3
    assert "harmonic mean" in shown[4]
    code = "\n".join(text for _, text in blocks(PAGE, "python"))
    said = start("-c", code).splitlines()
    assert said[:3] == ["bread", "kangaroo", "bread"]
    (example, *_) = (text for _, text in blocks(PAGE, "python"))
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 12
    # The doctor finds no error in what the page's last command wrote.
    start("-m", "unike.datasets.doctor", "my_benchmark/vqa_eval.json")
