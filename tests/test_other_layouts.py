"""Benchmarks of other layouts than MMEdit's: what each asks, on which image; what is said of broken ones.

All records here are invented.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers import record, save_pictures

from unike.config.hparams import HyperParams
from unike.config.options import BEFORE_OPTIONS
from unike.datasets.benchmarks import (
    DATASETS,
    ComprehendEditDataset,
    FGVEditDataset,
    MMKEBenchDataset,
    recognise_layout,
)
from unike.datasets.declarations import MetricDeclaration, find_metric
from unike.datasets.doctor import audit, find_leakage
from unike.datasets.doctor import run as run_doctor
from unike.datasets.mmedit import VQADataset
from unike.evaluation.by_name import average_by_name, combine_scores
from unike.evaluation.metrics import Prediction, right_text, score_generated
from unike.evaluation.protocols import _score
from unike.runs.inputs import open_datasets
from unike.types import LAYOUTS, Case, Probe, Query, UserError


def write(folder: Path, rows: object, name: str = "eval.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def port(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"port_type": "1-hop", "Q&A": {"Question": question, "Answer": answer}}]


def entity(i: int = 0, late: bool = False) -> dict[str, Any]:
    """An entity of MMKE-Bench; ``late``: the answers' names have their number in the middle."""
    answers = {}
    for name in ("rel", "m_rel"):
        for n in (1, 2):
            answers[f"{name}_{n}"] = f"what of {name} {n}?"
            answers[f"{name}_{n}_ans" if late else f"{name}_ans_{n}"] = f"{name} answer {n}"
    return (
        record(i)
        | answers
        | {
            "knowledge_type": "entity_level",
            "type_self": "tower",
            "alt": "The tower in the image is Tall Ida. It was built of salt, and leans to the south.",
            "port_new": port("What dissolves it?", "rain"),
        }
    )


def visual() -> dict[str, Any]:
    return record(1) | {
        "knowledge_type": "visual_knowledge",
        "type_self": "gesture",
        "pred": "",
        "rel": "Where is it used?",
        "rel_ans": "on boats",
        "m_rel": "What does it mean?",
        "m_rel_ans": "fog ahead",
        "image_rephrase_question": "What does this sign mean?",
        "one_hop_img": "7.png",
        "port_new": port("What weather is it?", "fog"),
    }


def user() -> dict[str, Any]:
    return entity(2) | {"knowledge_type": "user_specific", "one_hop_img": "8.png"}


def fine(i: int = 0) -> dict[str, Any]:
    """FGVEdit."""
    kept = ("src", "rephrase", "alt", "image", "loc", "loc_ans")
    return {name: record(i)[name] for name in kept} | {
        "fg_gen_q": "what has number 0 on its head?",
        "fg_gen_a": "two ears",
        "fg_loc_q": "what stands beside it?",
        "fg_loc_a": "a tree",
    }


def list_probes(case: Case) -> list[tuple[str, str | None, str, str | None]]:
    """Name, image, prompt and target of each probe."""
    return [(p.name, p.query.image, p.query.prompt, p.query.target) for p in case.probes]


# ---------------------------------------------------------------- MMKE-Bench


@pytest.mark.parametrize("late", [False, True])
def test_an_entity_is_asked_without_image_on_its_own_and_on_the_rephrased_one(
    tmp_path: Path, late: bool
) -> None:
    (case,) = MMKEBenchDataset(write(tmp_path, [entity(late=late)]), image_root="i", rephrase_root="r")
    target = entity()["alt"]
    assert case.request.query == Query("i/0.png", "what is number 0?", target)
    assert case.request.wrong == "nothing"
    assert case.groups == {"knowledge": "entity_level", "type": "tower"}
    assert list_probes(case) == [
        ("reliability", "i/0.png", "what is number 0?", target),
        ("t_generality", "i/0.png", "which thing is number 0?", target),
        ("m_generality", "r/1.png", "what is number 0?", target),
        ("t_locality", None, "who was the king of 0?", "a man"),
        ("m_locality", "i/2.png", "what color is it?", "blue"),
        ("text_reliability", None, "what of rel 1?", "rel answer 1"),
        ("text_reliability", None, "what of rel 2?", "rel answer 2"),
        ("image_reliability", "i/0.png", "what of m_rel 1?", "m_rel answer 1"),
        ("image_generality", "r/1.png", "what of m_rel 1?", "m_rel answer 1"),
        ("image_reliability", "i/0.png", "what of m_rel 2?", "m_rel answer 2"),
        ("image_generality", "r/1.png", "what of m_rel 2?", "m_rel answer 2"),
        ("portability_1_hop", "i/0.png", "What dissolves it?", "rain"),
    ]
    assert {p.name for p in case.probes if p.expect == "unchanged"} == {"t_locality", "m_locality"}


def test_visual_semantics_and_users_have_an_image_for_the_hop(tmp_path: Path) -> None:
    seen, own = MMKEBenchDataset(write(tmp_path, [visual(), user()]))
    assert seen.request.wrong is None
    probes = list_probes(seen)
    assert ("image_reliability", "1.png", "What does it mean?", "fog ahead") in probes
    assert ("image_generality", "2.png", "What does this sign mean?", "fog ahead") in probes
    assert probes[-1] == ("portability_1_hop", "7.png", "What weather is it?", "fog")
    assert list_probes(own)[-1][:2] == ("portability_1_hop", "8.png")
    assert sum(p.name == "text_reliability" for p in own.probes) == 2


def test_a_template_of_ones_own_wraps_questions(tmp_path: Path) -> None:
    (case,) = MMKEBenchDataset(write(tmp_path, [visual()]), template="Q: {} A:")
    prompts = {p.name: p.query.prompt for p in case.probes}
    assert case.request.query.prompt == "Q: what is number 1? A:"
    assert prompts["image_reliability"] == "Q: What does it mean? A:"
    assert prompts["text_reliability"] == "Where is it used?"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            entity() | {"knowledge_type": "entity"},
            "field 'knowledge_type': expected entity_level, visual_knowledge, user_specific, got",
        ),
        (record(0), "field 'knowledge_type': expected entity_level"),
        ({k: v for k, v in entity().items() if k != "rel_ans_2"}, "field 'rel_ans_2' is missing"),
        (
            {k: v for k, v in entity().items() if k != "m_rel_1"} | {"mrel_1": "a?"},
            "field 'm_rel_1' is missing; expected a string; is 'mrel_1' meant to be 'm_rel_1'?",
        ),
        (visual() | {"m_rel_ans": 3}, "field 'm_rel_ans': expected a string"),
        ({k: v for k, v in visual().items() if k != "one_hop_img"}, "field 'one_hop_img' is missing"),
        (entity() | {"port_new": "x"}, "field 'port_new': expected a list"),
        (entity() | {"alt": " "}, "field 'alt' is empty"),
        (entity() | {"pred": 3}, "field 'pred': expected a string or null"),
        (3, "expected an object with the fields of MMKE-Bench, got a number"),
    ],
)
def test_a_broken_record_of_mmke_is_one_line(tmp_path: Path, row: object, said: str) -> None:
    check_broken(MMKEBenchDataset, write(tmp_path, [visual(), row]), said)


def check_broken(kind: type[VQADataset], path: Path, said: str, sound: int = 1) -> None:
    with pytest.raises(UserError) as caught:
        kind(path)
    (line,) = caught.value.problems
    assert line.startswith(f"{path}: record {sound}: {said}")
    left = kind(path, skip_broken=True)
    assert (len(left), left.skipped) == (sound, [line])


def test_images_outside_of_their_folder_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [visual() | {"one_hop_img": "../secret.png"}])
    with pytest.raises(
        UserError, match=r"record 0: probe 'portability_1_hop': \.\./secret\.png lies outside"
    ):
        MMKEBenchDataset(path, image_root=tmp_path)
    assert len(MMKEBenchDataset(path, image_root=tmp_path, allow_outside=True)) == 1


def test_what_the_model_says_already_is_cleaned(tmp_path: Path) -> None:
    path = write(tmp_path, [entity() | {"pred": entity()["alt"].upper()}, entity(1)])
    found = MMKEBenchDataset(path, clean=True)
    assert (len(found), found.cleaned, found[0].request.id) == (1, 1, "mmke_bench-1")


# ---------------------------------------------------------------- FGVEdit


def test_fgvedit_asks_of_two_objects_of_the_same_image(tmp_path: Path) -> None:
    (case,) = FGVEditDataset(write(tmp_path, [fine()]), image_root="i")
    assert list_probes(case) == [
        ("reliability", "i/0.png", "Question: what is number 0? Short answer:", "a red fox"),
        ("t_generality", "i/0.png", "Question: which thing is number 0? Short answer:", "a red fox"),
        ("t_locality", None, "who was the king of 0?", "a man"),
        (
            "fine_generality",
            "i/0.png",
            "Question: what has number 0 on its head? Short answer:",
            "two ears",
        ),
        ("fine_locality", "i/0.png", "Question: what stands beside it? Short answer:", "a tree"),
    ]
    assert {p.name for p in case.probes if p.expect == "unchanged"} == {"t_locality", "fine_locality"}


def test_a_broken_record_of_fgvedit_is_one_line(tmp_path: Path) -> None:
    row = {k: v for k, v in fine().items() if k != "fg_loc_a"}
    check_broken(FGVEditDataset, write(tmp_path, [fine(), row]), "field 'fg_loc_a' is missing")


def test_specificity_is_the_mean_of_its_two_parts(tmp_path: Path) -> None:
    (case,) = FGVEditDataset(write(tmp_path, [fine()]))
    before = [Prediction((1, 2), (1, 3), edited=False)] * 5
    after = [Prediction((1, 2), (1, 2), edited=True)] * 4 + [Prediction((1, 2), (4, 4), edited=True)]
    scores = _score(case, before, after, False)["teacher_forced"]
    parts = scores["fine_generality"], scores["fine_locality"]
    assert [(s.before, s.after) for s in parts] == [(0.5, 1.0), (1.0, 0.0)]
    assert (scores["specificity"].before, scores["specificity"].after) == (0.75, 0.5)
    assert find_metric("specificity").mean_of == ("fine_generality", "fine_locality")
    part = _score(Case(case.request, case.probes[:4]), before[:4], after[:4], False)["teacher_forced"]
    assert "specificity" not in part


# ---------------------------------------------------------------- ComprehendEdit


def comprehend(pid: int, source: str = "GQA", **more: Any) -> dict[str, Any]:
    return {
        "image": f"{pid}.png",
        "question": f"what is {pid}?",
        "rephrase": f"which is {pid}?",
        "answer": f"thing {pid}",
        "source": source,
        "Category": "object recognition",
        "pid": pid,
        "locality_prompt": "who was king?",
        "locality_ground_truth": "a man",
        "multimodal_locality_image": "9.png",
        "multimodal_locality_prompt": "what color?",
        "multimodal_locality_ground_truth": "blue",
    } | more


def write_comprehend(folder: Path, *rows: dict[str, Any]) -> Path:
    """Test records, and eight that the model gets right, of which none has a ``pid``."""
    asked = ("image", "question", "answer", "source")
    right = [{name: comprehend(i)[name] for name in asked} for i in range(8)]
    write(folder, right, "ComprehendEdit_ori_right.json")
    return write(folder, rows)


def test_comprehendedit_asks_of_others_of_its_domain(tmp_path: Path) -> None:
    lists = {"img_topk": [7, 5, 7], "txt_last_topk": [0] * 9 + [7, 7, 5, 5, 5], "ori_rt_img_topk": [2]}
    rows = comprehend(0, "VSR", **lists), comprehend(5, "TallyQA"), comprehend(7)
    first, *_ = ComprehendEditDataset(write_comprehend(tmp_path, *rows), "i")
    stated = "Question: Is this description true or false? Description: {} Short answer:"
    assert first.groups == {"source": "vsr", "category": "object recognition"}
    assert list_probes(first)[:4] == [
        ("reliability", "i/0.png", stated.format("what is 0?"), "thing 0"),
        ("t_generality", "i/0.png", stated.format("which is 0?"), "thing 0"),
        ("t_locality", None, "who was king?", "a man"),
        ("m_locality", "i/9.png", "Question: what color? Short answer:", "blue"),
    ]
    assert Counter(list_probes(first)[4:]) == {
        ("kgi", "i/7.png", "Question: what is 7? Short answer:", "thing 7"): 4,
        ("kgi", "i/5.png", "Question: what is 5? Answer with a number. Short answer:", "thing 5"): 4,
        ("kpi", "i/2.png", "Question: what is 2? Short answer:", "thing 2"): 1,
    }
    assert {p.name: p.expect for p in first.probes[4:]} == {"kgi": "target", "kpi": "unchanged"}


def test_a_template_replaces_those_of_the_sources(tmp_path: Path) -> None:
    path = write_comprehend(tmp_path, comprehend(0, "MathVista"))
    (case,) = ComprehendEditDataset(path)
    assert case.request.query.prompt == "what is 0? Short answer:"
    (case,) = ComprehendEditDataset(path, template="Q: {}")
    assert case.request.query.prompt == "Q: what is 0?"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"source": "COCO"},
            "field 'source': expected one of gqa, tallyqa, vsr, textvqa, mathvista, got",
        ),
        ({"answer": ""}, "field 'answer' is empty"),
        ({"img_topk": [4]}, "field 'img_topk': no record of the file has the pid 4"),
        (
            {"ori_rt_txt_topk": [8]},
            "field 'ori_rt_txt_topk': no record of ComprehendEdit_ori_right.json has the pid 8",
        ),
        ({"txt_topk": "0"}, "field 'txt_topk': expected a list of whole numbers, got str '0'"),
        ({"txt_topk": [2]}, "field 'txt_topk': pid 2: field 'question': expected a string"),
    ],
)
def test_a_broken_record_of_comprehendedit_is_one_line(tmp_path: Path, changes: Any, said: str) -> None:
    rows = comprehend(0), comprehend(1, **changes), comprehend(2) | {"question": 3}
    with pytest.raises(UserError) as caught:
        ComprehendEditDataset(write_comprehend(tmp_path, *rows))
    assert caught.value.problems[0].startswith(f"{tmp_path}/eval.json: record 1: {said}")


def test_records_that_the_model_gets_right_must_be_there(tmp_path: Path) -> None:
    path = write(tmp_path, [comprehend(0, ori_rt_img_topk=[0])])
    with pytest.raises(UserError, match=r"ComprehendEdit_ori_right\.json: file does not exist"):
        ComprehendEditDataset(path)
    assert len(ComprehendEditDataset(write(tmp_path, [comprehend(0)], "train.json"))) == 1


# ---------------------------------------------------------------- several probes of a name; aliases


def test_probes_of_one_name_are_scored_by_their_mean() -> None:
    pairs = [("a", 1.0), ("b", 0.0), ("a", 0.0), ("a", 0.5)]
    assert average_by_name(pairs) == {"a": 0.5, "b": 0.0}
    assert repr(average_by_name([("n", 3)])) == "{'n': 3}"
    combined = combine_scores([("a", 0.0, 1.0), ("a", 1.0, 0.0), ("b", 0.25, 0.75)])
    assert {name: (s.before, s.after) for name, s in combined.items()} == {"a": (0.5, 0.5), "b": (0.25, 0.75)}


@pytest.mark.parametrize(
    ("said", "match", "aliases", "right"),
    [
        ("Bern", "equal", (), 1.0),
        ("the city of Berne", "equal", ("Berne",), 0.0),
        ("Berne.", "equal", ("Berne",), 1.0),
        ("the city of BERNE", "contains", ("Berne",), 1.0),
        ("the city of Rome", "contains", ("Berne", " "), 0.0),
    ],
)
def test_aliases_count_in_generated_answers(said: str, match: Any, aliases: Any, right: float) -> None:
    probe = Probe("consistency", Query(None, "where?", "Bern"), "target", aliases, match)
    before = Prediction((1,), (2,), "Rome", edited=False)
    after = Prediction((1,), (1,), said, edited=True)
    assert right_text(probe, after) == score_generated(probe, before, after) == right
    kept = Probe("m_locality", Query(None, "where?", "Bern"), "unchanged", aliases, match)
    assert score_generated(kept, before, after) == 0.0


def test_broken_aliases_are_one_line() -> None:
    for given, said in (({"aliases": "Bern"}, "aliases"), ({"match": "near"}, "match: expected 'equal'")):
        with pytest.raises(UserError, match=said):
            Probe("a", Query(None, "b"), "target", **given)
    with pytest.raises(UserError, match="mean_of: expected names"):
        MetricDeclaration("a", "a", "a", "target", "locality", mean_of="b")


# ---------------------------------------------------------------- by name: YAML and doctor

FILES: dict[str, list[dict[str, Any]]] = {
    "mmke_bench": [entity(), visual(), user()],
    "comprehend_edit": [comprehend(0, img_topk=[1]), comprehend(1)],
    "fgvedit": [fine()],
}


def make_hparams(folder: Path, path: Path, layout: str) -> HyperParams:
    return HyperParams.from_dict(
        {
            "model_name": "blip2",
            "name": "unused",
            "method": "ft",
            "data": {"vqa": {"eval": str(path)}},
            "image_root": str(folder),
            "layout": layout,
        }
    )


def test_every_layout_has_a_data_set_and_a_file_here() -> None:
    assert set(LAYOUTS) - {"mmedit"} == set(DATASETS) == {*FILES, "mc_mke"}
    assert BEFORE_OPTIONS["layout"] == "mmedit"


@pytest.mark.parametrize("layout", FILES)
def test_a_yaml_names_the_layout(tmp_path: Path, layout: str) -> None:
    save_pictures(tmp_path)
    path = write(tmp_path, FILES[layout])
    cases = open_datasets(make_hparams(tmp_path, path, layout), "vqa")
    assert [case.request.id for case in cases] == [f"{layout}-{i}" for i in range(len(FILES[layout]))]
    assert list(cases) == list(DATASETS[layout](path, tmp_path))
    hparams = make_hparams(tmp_path, path, layout)
    hparams.data["caption"] = hparams.data["vqa"]
    with pytest.raises(UserError, match=f"layout: {layout}: is of the task vqa; expected --task vqa, got"):
        open_datasets(hparams, "caption")
    assert all(find_metric(probe.name) for case in cases for probe in case.probes)


def test_another_layouts_file_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_pictures(tmp_path)
    path = write(tmp_path, [fine()])
    with pytest.raises(UserError, match="has FGVEdit's fields; expected layout: fgvedit, got mmedit"):
        open_datasets(make_hparams(tmp_path, path, "mmedit"), "vqa")
    # MMKE-Bench's records have all fields of MMEdit's.
    path = write(tmp_path, [entity()])
    with caplog.at_level(logging.WARNING, "unike"):
        assert len(open_datasets(make_hparams(tmp_path, path, "mmedit"), "vqa")) == 1
    assert "try layout: mmke_bench" in caplog.text
    with pytest.raises(UserError, match="expected layout: mmke_bench, got fgvedit"):
        open_datasets(make_hparams(tmp_path, path, "fgvedit"), "vqa")
    assert recognise_layout(write(tmp_path, [record(0)])) is None


@pytest.mark.parametrize("layout", FILES)
def test_the_doctor_recognises_a_layout(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pictures(tmp_path)
    rows = [*FILES[layout], FILES[layout][0]]
    report = audit(write(tmp_path, rows), images=tmp_path)
    assert (report.errors, report.records) == (0, len(rows))
    assert report["duplicates"].records == (len(rows) - 1,)
    assert report["unknown_fields"].count == 0
    assert DATASETS[layout].layout.title in report.title
    broken = [row | {"image": "gone.png", "extra": "x"} for row in FILES[layout]]
    broken += [{k: v for k, v in FILES[layout][0].items() if k not in ("src", "question")}]
    path = write(tmp_path, broken, "broken.json")
    report = audit(path, images=tmp_path)
    assert report["fields"].records == (len(broken) - 1,)
    assert report["missing_pictures"].count == len(broken) - 1
    assert report["unknown_fields"].details[0].startswith("field 'extra' is not read")
    assert run_doctor([str(path)]) == 1
    assert "is missing" in capsys.readouterr().out


def test_the_doctor_compares_files_of_a_layout(tmp_path: Path) -> None:
    train, other = write(tmp_path, [entity()], "train.json"), entity(5) | {"image": "0.png"}
    report = find_leakage(train, write(tmp_path, [other, entity(3)]))
    assert report["leaked_image"].records == (0,)
    assert report["leaked_m_loc_pair"].count == 0
    train = write(tmp_path, [fine()], "train.json")
    report = find_leakage(train, write(tmp_path, [fine(2), fine(0)]))
    assert report["leaked_image"].records == (1,)
    assert report["leaked_m_loc"].count == 0


def test_the_doctor_shows_paragraphs(tmp_path: Path) -> None:
    report = audit(write(tmp_path, [entity() | {"alt": "It leans. " * 120}, visual()]))
    assert report["too_long"].records == (0,)
    assert report["too_long"].details[0].startswith("record 0: reliability: 1")
