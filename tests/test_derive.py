"""Probes derived from annotations: each cell against a slow construction, and asked by a run."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import Project
from unike.config.hparams import HyperParams
from unike.datasets import derive
from unike.datasets.answers import normalise_answer
from unike.datasets.derive import DERIVED_CELLS as CELLS
from unike.datasets.derive import MOST_ALIKE, TextIndex, main
from unike.datasets.mmedit import CaptionDataset, VQADataset, load_records
from unike.datasets.probe_files import read_probes
from unike.evaluation.metrics import Prediction, miss_target
from unike.evaluation.record import Answer, Record, Score
from unike.evaluation.summary import CELL_GROUPS, summarise
from unike.report.terminal import build_summary_rows
from unike.runs.inputs import open_datasets
from unike.types import DERIVED_METRICS, Probe, UserError

SHARED = Path(__file__).parents[2] / "shared"
WORDS = (
    "what",
    "which",
    "colour",
    "kind",
    "the",
    "dog",
    "cat",
    "bus",
    "is",
    "are",
    "how",
    "many",
    "on",
    "red",
)


def draw_record(chooser: random.Random, i: int) -> dict[str, str]:
    def ask() -> str:
        return " ".join(chooser.choices(WORDS, k=chooser.randint(2, 5))) + "?"

    return {
        "src": chooser.choice(["what is this?", "how many dogs?", ask()]),
        "rephrase": ask(),
        "alt": chooser.choice(["red", "The red", "two", "2", "no"]),
        "pred": "x",
        "image": f"{chooser.randint(0, 12)}.png",
        "image_rephrase": f"r{i}.png",
        "loc": "who wrote it",
        "loc_ans": "Ann",
        "m_loc": f"m{i}.png",
        "m_loc_q": f"which sport {i}?",
        "m_loc_a": "golf",
    }


def derive_probes(*arguments: Any, **options: Any) -> list[Any]:
    return [record.probes for record in derive.derive_probes(*arguments, **options)]


def read_rows(*arguments: Any) -> list[Any]:
    return [record.probes for record in read_probes(*arguments)]


# ---------------------------------------------------------------- slow constructions


def compare_slowly(texts: list[str], one: str, other: str) -> float:
    """The cosine of two texts' TF-IDF vectors, written out."""
    rows = [normalise_answer(text).split() for text in texts]

    def weigh(text: str) -> dict[str, float]:
        out: dict[str, float] = {}
        for word in normalise_answer(text).split():
            having = sum(1 for row in rows if word in row)
            out[word] = out.get(word, 0.0) + math.log((len(texts) + 1) / (having + 1)) + 1
        return out

    a, b = weigh(one), weigh(other)
    dot = sum(a[word] * b.get(word, 0.0) for word in a)
    norms = math.sqrt(sum(v * v for v in a.values())) * math.sqrt(sum(v * v for v in b.values()))
    return dot / norms if norms else 0.0


def list_confusable_slowly(record: dict[str, str], others: list[dict[str, str]]) -> list[dict[str, str]]:
    """All most similar records with another answer, another image and another question."""
    texts = [other["src"] for other in others]
    found: list[tuple[float, dict[str, str]]] = []
    for other in others:
        if normalise_answer(other["alt"]) == normalise_answer(record["alt"]):
            continue
        if other["image"] in (record["image"], record["image_rephrase"]):
            continue
        if normalise_answer(other["src"]) in map(normalise_answer, (record["src"], record["rephrase"])):
            continue
        alike = compare_slowly(texts, record["src"], other["src"])
        if alike < MOST_ALIKE:
            found.append((alike, other))
    most = max((alike for alike, _ in found), default=0.0)
    return [other for alike, other in found if abs(alike - most) < 1e-9]


def test_similarity_is_the_cosine_of_word_vectors():
    chooser = random.Random(1)
    texts = [draw_record(chooser, i)["src"] for i in range(30)]
    index = TextIndex(texts)
    for text in [*texts[:8], "a word that nobody knows", "the"]:
        expected = [compare_slowly(texts, text, other) for other in texts]
        assert index.measure(text) == pytest.approx(expected, abs=1e-12)
    assert index.measure(texts[0])[0] == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(6))
def test_each_cell_is_its_definition(seed):
    chooser = random.Random(seed)
    records = [draw_record(chooser, i) for i in range(25)]
    others = [draw_record(chooser, 100 + i) for i in range(40)]
    derived = derive_probes(records, others, seed=seed)
    seen = Counter(cell for row in derived for cell in row)
    for record, row in zip(records, derived, strict=True):
        cells = {name: (probe.text, probe.image) for name, probe in row.items() if probe is not None}
        assert all(row[name].answer == record["alt"] for name in cells if name in DERIVED_METRICS)
        assert cells["t1_i3"] == (record["src"], record["m_loc"])
        assert cells["t3_i1"] == (record["m_loc_q"], record["image"])
        assert row["t3_i1"].form == "question"
        assert row["t1_i3"].form == "edit"
        assert cells["t1_i4"] == (record["src"], None)
        allowed = list_confusable_slowly(record, others)
        assert ("t1_i2" in cells) == bool(allowed)
        if allowed:
            pair = cells["t2_i2"]
            assert pair in [(other["src"], other["image"]) for other in allowed]
            assert cells["t2_i1"] == (pair[0], record["image"])
            assert cells["t1_i2"] == (record["src"], pair[1])
            assert cells["t2_i4"] == (pair[0], None)
        same = [
            (record["src"], r["image"], r["alt"])
            for r in records
            if normalise_answer(r["src"]) == normalise_answer(record["src"])
            and normalise_answer(r["alt"]) != normalise_answer(record["alt"])
            and r["image"] not in (record["image"], record["image_rephrase"])
        ]
        assert ("same_question" in cells) == bool(same)
        if same:
            assert (*cells["same_question"], row["same_question"].answer) in same
        texts = [r["src"] for r in records]
        about = [
            (r["src"], r["alt"])
            for r in records
            if r["image"] == record["image"]
            and max(compare_slowly(texts, record[key], r["src"]) for key in ("src", "rephrase")) < MOST_ALIKE
        ]
        assert ("same_image" in cells) == bool(about)
        if about:
            assert (cells["same_image"][0], row["same_image"].answer) in about
            assert cells["same_image"][1] == record["image"]
        assert row["joint"] is None
    # Each branch above was taken.
    assert set(seen) == set(CELLS)
    assert seen["same_question"] < len(records)


def test_the_same_seed_draws_the_same_and_another_one_does_not():
    chooser = random.Random(3)
    records = [draw_record(chooser, i) for i in range(60)]
    assert derive_probes(records, records, seed=1) == derive_probes(records, records, seed=1)
    assert derive_probes(records, records, seed=1) != derive_probes(records, records, seed=2)
    # What is drawn for a record does not depend on how many follow it.
    short = derive_probes(records[:1], records, seed=1)[0]
    long = derive_probes(records, records, seed=1)[0]
    assert {c: short[c] for c in DERIVED_METRICS} == {c: long[c] for c in DERIVED_METRICS}


def test_a_record_keeps_its_own_hard_probes():
    chooser = random.Random(4)
    records: list[dict[str, Any]] = [draw_record(chooser, i) for i in range(60)]
    at = next(i for i, row in enumerate(derive_probes(records, records)) if len(row) == len(CELLS))
    records[at] |= {"same_question_image": "s.png", "same_question_a": "b", "joint": False}
    records[at] |= {"same_image_q": "why?", "same_image_a": "c"}
    assert set(derive_probes(records, records)[at]) == set(DERIVED_METRICS)


def test_captions_get_no_second_prompt_about_the_edited_image():
    chooser = random.Random(5)
    records = [{**draw_record(chooser, i), "src": "a photo of", "alt": f"a {i} on grass"} for i in range(9)]
    for row in derive_probes(records, records, "caption"):
        assert set(row) == {"t1_i3", "t3_i1", "t1_i4", "t1_i2", "joint"}


def test_the_share_that_is_not_the_target():
    after = Prediction([1, 2, 3, 4], [1, 2, 9, 9], edited=True)
    assert miss_target(after) == 0.5
    with pytest.raises(ValueError, match="unedited"):
        miss_target(replace(after, edited=False))


def test_both_scores_are_summed_up_by_cell_and_group():
    cells = ("t1_i3", "t3_i1", "t1_i2")
    records = [
        Record(
            id=str(i),
            status="ok",
            scores={
                mode: {cell: Score(1.0, float(kept)) for cell, kept in zip(cells, values, strict=True)}
                for mode in ("teacher_forced", "generated")
            },
            presets={"de_vqa": {"t1_i3": 0.25, "t3_i1": 0.75, "t1_i2": 0.5}},
            answers={
                cell: Answer("q", "The cat", "dog", text) for cell, text in zip(cells, texts, strict=True)
            },
        )
        for i, (values, texts) in enumerate([((1, 0, 1), ("cat", "dog", "dog")), ((1, 1, 0), ("dog",) * 3)])
    ]
    found = summarise(records, 0)["de_vqa"]
    forced, generated = found["teacher_forced"], found["generated"]
    assert {k: v["mean"] for k, v in forced["unchanged"].items()} == {
        "t1_i3": 100, "t3_i1": 50, "t1_i2": 50, "RI": 75, "CI": 50
    }  # fmt: skip
    assert {k: v["mean"] for k, v in forced["not_target"].items()} == {
        "t1_i3": 25, "t3_i1": 75, "t1_i2": 50, "RI": 50, "CI": 50
    }  # fmt: skip
    assert generated["not_target"]["t1_i3"]["mean"] == 50
    assert generated["not_target"]["RI"]["mean"] == 75
    rows = {name: row for name, *row in build_summary_rows(summarise(records, 0))}
    assert rows["RI, unchanged"][1].startswith("75.0")
    assert rows["RI, not the target"][2].startswith("75.0")
    assert "NI, unchanged" not in rows
    assert "de_vqa" not in summarise([replace(r, scores={}, answers={}, presets={}) for r in records], 0)


# ---------------------------------------------------------------- files, and a run


def write_annotations(folder: Path, count: int = 12) -> Path:
    chooser = random.Random(7)
    path = folder / "eval.json"
    path.write_text(json.dumps([draw_record(chooser, i) for i in range(count)]))
    return path


def test_the_command_writes_what_the_datasets_ask(tmp_path, capsys):
    path = write_annotations(tmp_path)
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "t1_i3              12 of 12 records" in out
    derived = tmp_path / "eval.probes.json"
    rows = read_rows(derived, path)
    assert rows == derive_probes(load_records(path), load_records(path))
    for kind in (VQADataset, CaptionDataset):
        for case, row in zip(kind(path, tmp_path, probes=derived), rows, strict=True):
            probes = {p.name: p for p in case.probes}
            assert set(row) <= set(probes)
            assert len(probes) == len(case.probes)
            unrelated = probes["m_locality"].query
            assert probes["t1_i3"] == Probe(
                "t1_i3", replace(case.request.query, image=unrelated.image), "unchanged"
            )
            assert probes["t3_i1"].query.prompt == unrelated.prompt
            assert probes["t1_i4"].query.image is None
            assert probes["joint"].expect == "target"
        assert {p.name for p in kind(path, tmp_path)[0].probes}.isdisjoint(DERIVED_METRICS)


def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path, capsys):
    path = write_annotations(tmp_path)
    there = tmp_path / "mine.json"
    there.write_text("mine")
    nowhere = str(tmp_path / "nowhere" / "x.json")
    for arguments, words in (
        ([str(path), "--output", str(there)], "is there already"),
        ([str(path), "--output", nowhere], "no such folder"),
        ([str(tmp_path / "absent.json")], "file does not exist"),
        ([str(path), "--most_alike", "2"], "--most_alike: expected"),
        ([str(path), "--train", str(there)], "broken JSON"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert there.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_broken_record_has_no_probes_and_the_others_keep_their_place(tmp_path):
    path = write_annotations(tmp_path)
    records = json.loads(path.read_text())
    del records[3]["src"]
    path.write_text(json.dumps(records))
    assert main([str(path)]) == 0
    rows = read_rows(tmp_path / "eval.probes.json", path)
    assert rows[3] == {}
    assert rows[4]["t1_i4"].text == records[4]["src"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda whole: whole.update(layout="other"), "expected a file that"),
        (lambda whole: whole["records"][0]["probes"].update(t9=None), "record 0: 't9' is unknown"),
        (lambda whole: whole["records"][1]["probes"].update(t1_i3=None), "record 1: t1_i3: expected text"),
        (
            lambda whole: whole["records"][2]["probes"]["t1_i3"].update(form="x"),
            "record 2: t1_i3: form: expected",
        ),
        (
            lambda whole: whole["records"][2]["probes"]["t1_i3"].update(text=" "),
            "record 2: t1_i3: expected texts",
        ),
        (lambda whole: whole.update(records={}), "records: expected a list"),
        (lambda whole: whole["records"][2].update(groups={"kind": "x" * 61}), "record 2: groups: expected"),
        (lambda whole: whole["records"].__setitem__(2, {}), "record 2: expected probes and groups"),
        (lambda whole: whole.update(sha256="0"), "of other annotations"),
    ],
)
def test_a_changed_file_is_refused(tmp_path, change, words):
    path = write_annotations(tmp_path)
    main([str(path)])
    derived = tmp_path / "eval.probes.json"
    whole = json.loads(derived.read_text())
    change(whole)
    derived.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=words) as caught:
        VQADataset(path, tmp_path, probes=derived)
    assert len(caught.value.problems) == 1


def test_a_derived_image_outside_of_the_folder_is_refused(tmp_path):
    path = write_annotations(tmp_path)
    main([str(path)])
    derived = tmp_path / "eval.probes.json"
    whole = json.loads(derived.read_text())
    whole["records"][2]["probes"]["t1_i3"]["image"] = "../secret.png"
    derived.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"record 2: probe 't1_i3'.*lies outside"):
        VQADataset(path, tmp_path, probes=derived)
    assert len(VQADataset(path, tmp_path, probes=derived, allow_outside=True)) == 12


def test_the_yaml_switches_them_on(project: Project):
    path = project.data / "vqa_eval.json"
    derived = path.with_suffix(".probes.json")
    if not derived.exists():
        main([str(path)])
    hparams = HyperParams.from_hparams(project.write_yaml())
    assert {p.name for c in open_datasets(hparams, "vqa") for p in c.probes}.isdisjoint(DERIVED_METRICS)
    data = {"vqa": {**hparams.data["vqa"], "probes": str(derived)}}
    asked = open_datasets(replace(hparams, data=data), "vqa")
    assert all({"t1_i3", "t3_i1", "t1_i4", "joint"} <= {p.name for p in case.probes} for case in asked)
    with pytest.raises(UserError, match=r"data\.vqa\.probes: nowhere: no such file"):
        open_datasets(replace(hparams, data={"vqa": {**data["vqa"], "probes": "nowhere"}}), "vqa")
    derived.unlink()


@pytest.mark.skipif(not (SHARED / "vlkeb").is_dir(), reason="no annotations of the benchmarks here")
@pytest.mark.parametrize(
    ("eval_file", "train_file", "task", "counts"),
    [
        ("mmedit/vqa_eval.json", "mmedit/vqa_train.json", "vqa", (2093, 262, 1148)),
        ("mmedit/caption_eval_edit.json", "mmedit/caption_train_edit.json", "caption", (1000, 0, 0)),
        ("vlkeb/eval.json", "vlkeb/train.json", "vqa", (3174, 1962, 0)),
    ],
)
def test_the_benchmarks_own_files(tmp_path, eval_file, train_file, task, counts):
    output = tmp_path / "derived.json"
    files = [str(SHARED / eval_file), "--train", str(SHARED / train_file)]
    assert main([*files, "--task", task, "--output", str(output)]) == 0
    rows = read_rows(output, files[0])
    found = Counter(cell for row in rows for cell in row)
    total, same_question, same_image = counts
    assert len(rows) == found["joint"] == found["t1_i3"] == found["t1_i2"] == total
    assert found["same_question"] == same_question
    assert (found["t2_i1"] == total) == (task == "vqa")
    assert (found["same_image"] > 0) == (same_image > 0)


def test_groups_are_of_derived_cells():
    assert {cell for cells in CELL_GROUPS.values() for cell in cells} == set(DERIVED_METRICS)
