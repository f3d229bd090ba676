"""Derived probes from annotations to a run's scores: stand-in images, every cell asked and counted."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts import derived_probes, stand_in_images
from scripts.derived_probes import CellCount, count_cells
from scripts.stand_in_images import MARKER, draw_all, draw_stand_in, list_image_names
from tests.test_derive import compare_slowly, derive_probes, draw_record, list_confusable_slowly
from unike.datasets.answers import normalise_answer
from unike.datasets.derive import DERIVED_CELLS, MOST_ALIKE
from unike.datasets.mmedit import load_records
from unike.datasets.probe_files import read_probes
from unike.runs.records import read_records
from unike.types import UserError

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
BENCHMARKS = {
    "E-VQA": ("mmedit/vqa_eval.json", "mmedit/vqa_train.json", "vqa"),
    "E-IC": ("mmedit/caption_eval_edit.json", "mmedit/caption_train_edit.json", "caption"),
    "VLKEB": ("vlkeb/eval.json", "vlkeb/train.json", "vqa"),
}
needs_shared = pytest.mark.skipif(
    not all((SHARED / file).is_file() for row in BENCHMARKS.values() for file in row[:2]),
    reason="no annotations of the benchmarks here",
)
QUICK = ["max_steps=2", "max_new_tokens=3"]


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    chooser = random.Random(11)
    records = [{**draw_record(chooser, i), "image": f"sub/{i % 4}.jpg"} for i in range(16)]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(records))
    return path


# ---------------------------------------------------------------- stand-in images


def test_a_stand_in_follows_from_its_name_alone(tmp_path: Path) -> None:
    names = ["val2014/a.jpg", "val2014/b.png", "m.01/google_1.jpg", "no suffix"]
    assert draw_all(names, tmp_path / "one") == draw_all(reversed(names), tmp_path / "two") == 4
    pixels = set()
    for name in names:
        files = [tmp_path / folder / name for folder in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()
        drawn = np.asarray(draw_stand_in(name))
        with Image.open(files[0]) as image:
            assert image.size == drawn.shape[:2]
            found = np.asarray(image.convert("RGB"), dtype=float)
        # JPEG loses some of it.
        assert np.abs(found - drawn).mean() < (20 if name.endswith("jpg") else 1e-9)
        pixels.add(drawn.tobytes())
    assert len(pixels) == 4


def test_no_file_of_somebody_elses_is_touched(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="has files of its own"):
        draw_all(["a.png", "b.png"], mine)
    assert [path.name for path in mine.iterdir()] == ["a.png"]
    with pytest.raises(UserError, match="is a file"):
        draw_all(["a.png"], mine / "a.png")
    drawn = tmp_path / "drawn"
    draw_all(["a.png"], drawn)
    (drawn / "a.png").write_bytes(b"changed")
    assert draw_all(["a.png", "b.png"], drawn) == 1
    assert (drawn / "a.png").read_bytes() == b"changed"
    assert (drawn / MARKER).is_file()
    for name in ("../out.png", str(tmp_path / "out.png")):
        with pytest.raises(UserError, match="lies outside"):
            draw_all(["c.png", name], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "out.png").exists()


def test_every_image_that_can_be_asked_about_is_named(annotations: Path, tmp_path: Path, capsys) -> None:
    records = load_records(annotations)
    expected = {r[field] for r in records for field in ("image", "image_rephrase", "m_loc")}
    assert list_image_names(annotations) == sorted(expected)
    assert stand_in_images.main([str(annotations), "--into", str(tmp_path / "images")]) == 0
    assert f"{len(expected)} of {len(expected)} drawn" in capsys.readouterr().out
    assert all((tmp_path / "images" / name).is_file() for name in expected)
    assert stand_in_images.main([str(tmp_path / "absent.json"), "--into", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- one command


def run_command(file: Path, into: Path, *more: str) -> int:
    return derived_probes.main([str(file), "--into", str(into), *more, *QUICK])


def test_every_cell_is_asked_and_counted(annotations, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    into = tmp_path / "made"
    assert run_command(annotations, into, "--size", "16") == 0
    out = capsys.readouterr().out
    rows = [row.probes for row in read_probes(into / "probes.json", annotations)]
    records = read_records(into / "run")
    assert [record.status for record in records] == ["ok"] * 16
    for cell in DERIVED_CELLS:
        expected = sum(cell in row for row in rows)
        assert expected > 0
        for mode in ("teacher_forced", "generated"):
            assert sum(cell in record.scores[mode] for record in records) == expected
        assert re.search(rf"{cell} +{expected} +{expected} +{expected} +{expected}\n", out)
    # What is asked is what was derived: a cell without an image, and one on another record's image.
    for row, record in zip(rows, records, strict=True):
        assert row["t1_i4"].image is None
        assert record.answers["t1_i4"].prompt == f"Question: {row['t1_i4'].text} Short answer:"
        assert record.answers["t2_i1"].prompt == f"Question: {row['t2_i1'].text} Short answer:"


def test_a_cell_that_was_not_asked_is_reported(annotations, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)

    def read_without(folder: Path):
        records = read_records(folder)
        scores = {mode: {c: s for c, s in v.items() if c != "t1_i2"} for mode, v in records[0].scores.items()}
        return [replace(records[0], scores=scores), *records[1:]]

    monkeypatch.setattr(derived_probes, "read_records", read_without)
    assert run_command(annotations, tmp_path / "made", "--size", "2") == 1
    assert capsys.readouterr().err.endswith("not scored for every record that has them: t1_i2\n")


def test_cells_are_counted_by_the_records_that_were_edited(annotations: Path) -> None:
    rows = [{"t1_i3": None}, {"t1_i3": None, "joint": None}, {"joint": None}]
    assert count_cells(rows, [])["joint"] == CellCount(2, 0, 0, 0)
    assert set(count_cells(rows, [])) == set(DERIVED_CELLS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "0"], "--size: expected at least 1"),
        (["--train", "nowhere.json"], "file does not exist"),
        (["--hparams_dir", "nowhere.yaml"], "nowhere.yaml"),
        (["bogus=1"], "bogus"),
    ],
)
def test_unusable_input_is_one_line_and_nothing_is_made(
    annotations, tmp_path, capsys, monkeypatch, arguments, words
) -> None:
    monkeypatch.chdir(ROOT)
    assert run_command(annotations, tmp_path / "made", *arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "made").exists()


def test_a_folder_that_is_there_is_left_alone(annotations, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "made").mkdir()
    assert run_command(annotations, tmp_path / "made") == 2
    assert "is there already" in capsys.readouterr().err


# ---------------------------------------------------------------- real texts


@pytest.mark.parametrize("folder", ["tiny-blip2-opt", "tiny-minigpt4"])
def test_the_toys_tokenizers_know_every_text(folder: str) -> None:
    """Bytes are their smallest tokens: words that they never saw take more tokens, none is unknown."""
    tokenizer = Tokenizer.from_file(str(ROOT / "hugging_cache" / folder / "tokenizer.json"))
    for text in ("Which Illinois city is Kankakee?", "Benito Juárez", "東京, snow, №9 \U0001f600"):
        found = tokenizer.encode(text, add_special_tokens=False)
        assert "<unk>" not in found.tokens
        assert tokenizer.decode(found.ids) == text


def list_confusable_captions_slowly(record: dict, others: list[dict]) -> list[dict]:
    """All records of the most similar caption, with another answer and another image."""
    texts = [other["alt"] for other in others]
    found = []
    for other in others:
        alike = compare_slowly(texts, record["alt"], other["alt"])
        if normalise_answer(other["alt"]) == normalise_answer(record["alt"]) or alike >= MOST_ALIKE:
            continue
        if other["image"] not in (record["image"], record["image_rephrase"]):
            found.append((alike, other))
    most = max((alike for alike, _ in found), default=0.0)
    return [other for alike, other in found if abs(alike - most) < 1e-9]


def require_slow_construction(records: list[dict], others: list[dict], task: str) -> Counter[str]:
    """Each cell of each record is one that loops over the definition allow; how often each occurs."""
    slowly = list_confusable_slowly if task == "vqa" else list_confusable_captions_slowly
    derived = derive_probes(records, others, task)
    for record, row in zip(records, derived, strict=True):
        asked = {name: (p.text, p.image, p.answer) for name, p in row.items() if p is not None}
        text, target = record["src"].strip(), record["alt"].strip()
        allowed = slowly(record, others)
        assert asked.pop("t1_i3") == (text, record["m_loc"], target)
        assert asked.pop("t3_i1") == (record["m_loc_q"].strip(), record["image"], target)
        assert asked.pop("t1_i4") == (text, None, target)
        assert asked["t1_i2"] in [(text, other["image"], target) for other in allowed]
        if task == "vqa":
            pairs = {(o["src"].strip(), o["image"]) for o in allowed}
            pair = asked["t2_i2"][:2]
            assert pair in pairs
            assert asked["t1_i2"][1] == pair[1]
            assert asked["t2_i1"] == (pair[0], record["image"], target)
            assert asked["t2_i4"] == (pair[0], None, target)
        else:
            assert set(asked) == {"t1_i2"}
        assert row["joint"] is None
    return Counter(name for row in derived for name in row)


def test_captions_are_confusable_by_what_they_say() -> None:
    chooser = random.Random(3)
    nouns = ["dog", "cat", "bus", "boat", "kite", "cake", "horse", "table"]

    def draw(i: int) -> dict:
        words = " and a ".join(chooser.sample(nouns, 3))
        return {**draw_record(chooser, i), "src": "a photo of", "alt": f"a {words}", "image": f"{i}.png"}

    records, others = [draw(i) for i in range(12)], [draw(50 + i) for i in range(30)]
    seen = require_slow_construction(records, others, "caption")
    assert seen == dict.fromkeys(("t1_i3", "t3_i1", "t1_i4", "t1_i2", "joint"), 12)


@needs_shared
@pytest.mark.parametrize("name", BENCHMARKS)
def test_cells_of_real_texts_are_their_definitions(name: str) -> None:
    eval_file, train_file, task = BENCHMARKS[name]
    chooser = random.Random(5)
    records = chooser.sample(load_records(SHARED / eval_file), 12)
    others = chooser.sample(load_records(SHARED / train_file), 60)
    seen = require_slow_construction(records, others, task)
    assert seen["t1_i2"] == 12


def read_documented_counts(name: str) -> dict[str, int]:
    """The column of a benchmark in the page's table of cells."""
    text = (ROOT / "docs" / "derived_probes.md").read_text("utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    at = next(row for row in lines if name in row).index(name)
    cells = {row[0].strip("`"): row[at] for row in lines if row[0].strip("`") in DERIVED_CELLS}
    return {cell: int(count.replace(",", "")) for cell, count in cells.items()}


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_real_files_are_asked_on_stand_ins_and_counted_as_the_page_says(
    name: str, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(ROOT)
    eval_file, train_file, task = BENCHMARKS[name]
    into = tmp_path / "made"
    more = ("--train", str(SHARED / train_file), "--task", task, "--size", "8")
    assert run_command(SHARED / eval_file, into, *more) == 0
    rows = [row.probes for row in read_probes(into / "probes.json", SHARED / eval_file)]
    counts = count_cells(rows, read_records(into / "run"))
    assert {cell: count.derived for cell, count in counts.items()} == read_documented_counts(name)
    assert all(count.wanted == count.forced == count.generated for count in counts.values())
    assert counts["t1_i2"].generated == 8
