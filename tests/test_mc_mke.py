"""MC-MKE: what each kind of edit asks, and what is said of broken files. All of it is invented here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import save_pictures
from test_other_layouts import list_probes, make_hparams, write

from unike.datasets.benchmarks import MCMKEDataset, recognise_layout
from unike.datasets.doctor import audit
from unike.runs.inputs import open_datasets
from unike.types import Query, UserError

PLACE = "/elsewhere/images/"


def write_mc_mke(folder: Path, kind: str = "ie", **changes: Any) -> Path:
    """Two edits of a kind with the files beside them; ``changes`` of what is in these, by the file's name
    up to its first dot, with None for no file."""
    folder.mkdir(parents=True, exist_ok=True)
    old, new, others = {"ie": ("e_ent", "new_e_ent", "orig_loc_ent")}.get(
        kind, ("o", "new_o", "orig_loc_output_ent")
    )
    question, on_image = f"{kind}_question", kind != "sro"
    cloze = "input_cloze" if kind == "ie" else f"{kind}_cloze"
    files: dict[str, list[dict[str, Any]]] = {"edits": []}
    names = {
        "ie": ("edit_reliability_test", "test_text_generality", "locality_test", "test_consistency"),
        "sro": ("reliability_test", "text_generality_test", "test_locality", "consistency"),
        "iro": ("test_reliability", "text_generality", "test_locality", "consistency"),
    }[kind]
    for i in (4, 9):
        number, image = {f"{kind}_edit_input_idx": i}, f"{PLACE}{i - 4}.png" if on_image else ""
        target = {new: f"Bern {i}", f"{new}_alias": ["Berne\n", " "]}
        files["edits"].append({**number, old: "Rome"})
        rows = (
            {cloze: f"the {kind} is", "image": image, **target},
            {f"{kind}_question_paraphrases": ["which?", "what?"], "image": image, **target},
            {"locality_test_dict": {"3": {question: "who?", others: "Ida", "image": image}}},
            {
                "ie": {
                    "consistency_iro_image": image,
                    "consistency_iro_input_cloze": "its river is",
                    "consistency_iro_output": "Aare",
                    "consistency_iro_output_alias": ["Ar"],
                },
                "sro": {
                    "consistency_data_image": f"{PLACE}7.png",
                    "consistency_data_irocloze": "the one shown is",
                    "consistency_new_o": "Bern",
                    "consistency_new_o_alias": [],
                },
                "iro": {"consistency_image": "", "consistency_sro_cloze": "Ida is", **target},
            }[kind],
        )
        for name, row in zip(names, rows, strict=True):
            files.setdefault(f"final_{kind}_{name}", []).append({**number, **row})
        if on_image:
            name = "final_ie_test_image_generality" if kind == "ie" else "final_iro_image_generality"
            more = {f"{kind}_cloze": f"the {kind} is", "generality_images": [f"{PLACE}8.png", "sub/9.png"]}
            files.setdefault(name, []).append({**number, **target, **more})
    if kind == "ie":
        write(folder, [9], "ie_consistenct_ignore_idx.json")
    for name, rows in (files | changes).items():
        if rows is not None:
            text = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder / "edits.jsonl"


def test_an_images_entity_is_edited_and_its_object_is_consistent(tmp_path: Path) -> None:
    case, other = MCMKEDataset(write_mc_mke(tmp_path), image_root="i")
    assert case.request.query == Query("i/0.png", "the ie is", "Bern 4")
    assert (case.request.wrong, case.request.id) == ("Rome", "mc_mke-0")
    assert list_probes(case) == [
        ("reliability", "i/0.png", "the ie is", "Bern 4"),
        ("t_generality", "i/0.png", "Question: which? Short answer:", "Bern 4"),
        ("t_generality", "i/0.png", "Question: what? Short answer:", "Bern 4"),
        ("m_generality", "i/8.png", "the ie is", "Bern 4"),
        ("m_generality", "i/sub/9.png", "the ie is", "Bern 4"),
        ("m_locality", "i/0.png", "Question: who? Short answer:", "Ida"),
        ("consistency", "i/0.png", "its river is", "Aare"),
    ]
    assert {p.name: p.aliases for p in case.probes} == {
        **dict.fromkeys(("reliability", "t_generality", "m_generality"), ("Berne",)),
        "m_locality": (),
        "consistency": ("Ar",),
    }
    assert {p.match for p in case.probes} == {"contains"}
    assert "consistency" not in {p.name for p in other.probes}, "its number is in the list of those left out"


def test_an_object_is_edited_without_an_image_and_asked_on_one(tmp_path: Path) -> None:
    case, _ = MCMKEDataset(write_mc_mke(tmp_path, "sro"), image_root="i")
    assert case.request.query == Query(None, "the sro is", "Bern 4")
    assert list_probes(case) == [
        ("reliability", None, "the sro is", "Bern 4"),
        ("t_generality", None, "which?", "Bern 4"),
        ("t_generality", None, "what?", "Bern 4"),
        ("t_locality", None, "who?", "Ida"),
        ("consistency", "i/7.png", "the one shown is", "Bern"),
    ]


def test_an_object_is_edited_on_an_image_and_asked_without(tmp_path: Path) -> None:
    case, _ = MCMKEDataset(write_mc_mke(tmp_path, "iro"), image_root="i")
    assert case.request.query == Query("i/0.png", "the iro is", "Bern 4")
    assert [name for name, *_ in list_probes(case)].count("m_generality") == 2
    assert list_probes(case)[-1] == ("consistency", None, "Ida is", "Bern 4")


NUMBER = {"ie_edit_input_idx": 4}
LOCALITY, RELIABILITY = "final_ie_locality_test", "final_ie_edit_reliability_test"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {LOCALITY: [{"ie_edit_input_idx": 9, "locality_test_dict": {}}]},
            f"{LOCALITY}.jsonl has no line with ie_edit_input_idx 4; expected one",
        ),
        (
            {LOCALITY: [NUMBER | {"locality_test_dict": {"3": {"ie_question": 1}}}]},
            f"{LOCALITY}.jsonl: field 'locality_test_dict': 3: field 'ie_question': expected a text",
        ),
        (
            {RELIABILITY: [NUMBER | {"input_cloze": "a", "image": "", "new_e_ent": "b"}]},
            f"{RELIABILITY}.jsonl: field 'image': expected a text, got str ''",
        ),
        ({"edits": [NUMBER]}, "field 'e_ent': expected a text"),
        ({"edits": [3, NUMBER | {"e_ent": "a"}]}, "expected an object with the fields of MC-MKE"),
        (
            {"edits": [{"ie_edit_input_idx": "4", "e_ent": "a"}]},
            "field 'ie_edit_input_idx': expected",
        ),
    ],
)
def test_a_broken_record_of_mc_mke_is_one_line(tmp_path: Path, changes: Any, said: str) -> None:
    path = write_mc_mke(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        MCMKEDataset(path)
    assert caught.value.problems[0].startswith(f"{path}: record 0: {said}")
    assert len(MCMKEDataset(path, skip_broken=True).skipped) >= 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({LOCALITY: None}, f"{LOCALITY}.jsonl: no such file"),
        ({LOCALITY: "{"}, f"{LOCALITY}.jsonl: line 1: broken JSON"),
        (
            {LOCALITY: "{}"},
            f"{LOCALITY}.jsonl: line 1: expected an object with a whole number",
        ),
        ({"edits": "[1]"}, "edits.jsonl: expected MC-MKE's edits, a line each with ie_edit_input_idx"),
    ],
)
def test_a_broken_file_of_mc_mke_is_one_line(tmp_path: Path, changes: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        MCMKEDataset(write_mc_mke(tmp_path, **changes))
    (line,) = caught.value.problems
    assert line.startswith(f"{tmp_path}/{said}")


@pytest.mark.parametrize("kind", ["ie", "sro", "iro"])
def test_the_doctor_reads_mc_mke_with_its_files(tmp_path: Path, kind: str) -> None:
    save_pictures(tmp_path)
    save_pictures(tmp_path / "sub")
    path = write_mc_mke(tmp_path, kind)
    assert recognise_layout(path) is MCMKEDataset.layout
    report = audit(path, images=tmp_path)
    assert (report.errors, report.records, report["unknown_fields"].count) == (0, 2, 0)
    assert len(open_datasets(make_hparams(tmp_path, path, "mc_mke"), "vqa")) == 2
    (tmp_path / "7.png").unlink()
    (tmp_path / "8.png").unlink()
    assert audit(path, images=tmp_path)["missing_pictures"].count == 2
