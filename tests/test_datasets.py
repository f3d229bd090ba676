"""MMEdit's records become cases exactly as written down, and a bad record is named in one line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unike.datasets.answers import normalise_answer
from unike.datasets.mmedit import (
    REQUIRED_FIELDS,
    CaptionDataset,
    CapVQADataset,
    VQADataset,
    has_nothing_to_edit,
    list_record_problems,
    load_records,
)
from unike.system.text import one_line
from unike.types import FIVE_METRICS, METRICS, Case, Query, UserError

quick = settings(max_examples=60, deadline=None)


def record(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "src": "How many cats? ",
        "pred": " two",
        "rephrase": " What is the number of cats?",
        "alt": "3\n",
        "image": "val/a.jpg",
        "image_rephrase": "re/a.png",
        "loc": "nq question: who wrote it ",
        "loc_ans": " Ann",
        "m_loc": "val/b.jpg",
        "m_loc_q": " What sport? ",
        "m_loc_a": "golf ",
    }
    base.update(changes)
    return {key: value for key, value in base.items() if value is not ...}


def hard_record(**changes: Any) -> dict[str, Any]:
    extra = {
        "same_question_image": "val/c.jpg",
        "same_question_a": "5 ",
        "same_image_q": " What colour?",
        "same_image_a": "red",
        "joint": True,
    }
    return record(**{**extra, **changes})


@pytest.fixture
def write(tmp_path):
    def write_records(content: Any, name: str = "data.json") -> Path:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write_records


def problem(call, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_vqa_case_word_for_word(write):
    (case,) = VQADataset(write([record()]), image_root="/data", rephrase_root="/other")
    prompt = "Question: How many cats? Short answer:"
    rephrased = "Question: What is the number of cats? Short answer:"
    assert case.task == "vqa"
    assert case.request.id == "vqa-0"
    assert case.request.wrong == "two"
    assert case.request.query == Query("/data/val/a.jpg", prompt, "3")
    assert [(p.name, p.query, p.expect) for p in case.probes] == [
        ("reliability", Query("/data/val/a.jpg", prompt, "3"), "target"),
        ("t_generality", Query("/data/val/a.jpg", rephrased, "3"), "target"),
        ("m_generality", Query("/other/re/a.png", prompt, "3"), "target"),
        ("t_locality", Query(None, "nq question: who wrote it", "Ann"), "unchanged"),
        ("m_locality", Query("/data/val/b.jpg", "Question: What sport? Short answer:", "golf"), "unchanged"),
    ]


def test_a_caption_case_word_for_word(write):
    caption = record(src=" a photo of ", rephrase="describe it, ", alt=" A cat. ")
    (case,) = CaptionDataset(write([caption]))
    assert case.task == "caption"
    assert case.request.id == "caption-0"
    probes = {probe.name: probe.query for probe in case.probes}
    assert tuple(probes) == FIVE_METRICS
    assert probes["reliability"] == case.request.query == Query("val/a.jpg", "a photo of", "A cat.")
    assert probes["t_generality"] == Query("val/a.jpg", "describe it,", "A cat.")
    assert probes["m_generality"] == Query("re/a.png", "a photo of", "A cat.")
    assert probes["m_locality"] == Query("val/b.jpg", "Question: What sport? Short answer:", "golf")


@pytest.mark.parametrize("kind", [VQADataset, CaptionDataset])
def test_the_hard_probes(write, kind):
    (case,) = kind(write([hard_record()]), image_root="/data")
    assert tuple(probe.name for probe in case.probes) == METRICS
    probes = {probe.name: probe for probe in case.probes}
    request = case.request.query
    assert probes["same_question"].query == Query("/data/val/c.jpg", request.prompt, "5")
    assert probes["same_image"].query == Query(request.image, "Question: What colour? Short answer:", "red")
    rephrased = probes["t_generality"].query.prompt
    assert probes["joint"].query == Query("/data/re/a.png", rephrased, request.target)
    assert [probes[name].expect for name in METRICS[5:]] == ["unchanged", "unchanged", "target"]


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"joint": False}, METRICS[:7]),
        ({"joint": ...}, METRICS[:7]),
        ({"same_image_q": ..., "same_image_a": ...}, (*METRICS[:6], "joint")),
        ({"same_question_image": ..., "same_question_a": ..., "joint": False}, (*FIVE_METRICS, "same_image")),
    ],
)
def test_each_hard_probe_comes_with_its_own_fields(write, changes, left):
    (case,) = VQADataset(write([hard_record(**changes)]))
    assert tuple(probe.name for probe in case.probes) == left


@pytest.mark.parametrize("pred", [..., None, "", "  "])
def test_pred_is_optional(write, pred):
    (case,) = VQADataset(write([record(pred=pred)]))
    assert case.request.wrong is None


def test_the_template_is_the_callers(write):
    path = write([hard_record(src="{} or {x}?")])
    (case,) = VQADataset(path, template="Q {a} {} A")
    assert case.request.query.prompt == "Q {a} {} or {x}? A"
    (case,) = CaptionDataset(path, template="Q {}")
    assert case.request.query.prompt == "{} or {x}?"
    assert [p.query.prompt for p in case.probes if p.name in ("m_locality", "same_image")] == [
        "Q What sport?",
        "Q What colour?",
    ]
    for template in ("no place", "{} two {}"):
        assert "template" in problem(VQADataset, path, template=template)


def test_a_dataset_is_a_sequence(write):
    data = VQADataset(write([record(alt=str(number)) for number in range(5)]))
    assert len(data) == 5
    assert all(isinstance(case, Case) for case in data)
    assert [case.request.id for case in data] == [f"vqa-{index}" for index in range(5)]
    assert data[-1] == data[4]
    assert data[1:3] == [data[1], data[2]]
    assert data[0] == data[0]
    with pytest.raises(IndexError):
        data[5]


def test_size_counts_usable_cases(write):
    path = write([record(alt=""), record(), record(pred="the 3"), record(alt="4"), record(alt=None)])
    data = VQADataset(path, size=2, clean=True, skip_broken=True)
    assert [case.request.id for case in data] == ["vqa-1", "vqa-3"]
    assert (len(data.skipped), data.cleaned) == (1, 1)
    assert len(VQADataset(write([record()]), size=9)) == 1
    assert list(VQADataset(write([]), size=9)) == []
    for size in (0, -1, True, 1.5, "3"):
        assert "size" in problem(VQADataset, path, size=size)


def test_clean_leaves_out_what_needs_no_edit(write):
    pairs = [("A Cat!", "cat"), ("three", "3"), ("cat", "dog"), (None, "cat"), ("in the field", "in field")]
    path = write([record(pred=pred, alt=alt) for pred, alt in pairs])
    assert len(VQADataset(path)) == 5
    data = VQADataset(path, clean=True)
    assert [case.request.id for case in data] == ["vqa-2", "vqa-3"]
    assert data.cleaned == 3


@pytest.mark.parametrize("field", REQUIRED_FIELDS)
def test_each_required_field_is_required(write, field):
    for value, word in ((..., "missing"), ("", "empty"), (" \n", "empty"), (3, "a number"), (None, "null")):
        path = write([record(), record(**{field: value})])
        message = problem(VQADataset, path)
        assert message.startswith(f"{path}: record 1: field '{field}'")
        assert word in message
        data = VQADataset(path, skip_broken=True)
        assert len(data) == 1
        assert data.skipped == [message]


@pytest.mark.parametrize(
    ("changes", "field", "word"),
    [
        ({"pred": ["two"]}, "pred", "a list"),
        ({"joint": "yes"}, "joint", "a string"),
        ({"same_question_a": ...}, "same_question_a", "missing"),
        ({"same_image_q": ...}, "same_image_q", "missing"),
        ({"same_question_image": {}}, "same_question_image", "an object"),
        ({"same_image_a": True}, "same_image_a", "a boolean"),
    ],
)
def test_optional_fields_are_checked_too(write, changes, field, word):
    message = problem(VQADataset, write([hard_record(**changes)]))
    assert f"record 0: field '{field}'" in message
    assert word in message


def test_a_misspelt_field_is_pointed_out(write):
    bad = record(rephrase=...)
    bad["rephase"] = "What?"
    assert "is 'rephase' meant to be 'rephrase'?" in problem(VQADataset, write([bad]))
    assert "meant to be" not in problem(VQADataset, write([record(alt=...)]))
    assert "meant to be" not in problem(VQADataset, write([record(image_rephrase=...)]))


@pytest.mark.parametrize("item", [None, 3, "text", [], True])
def test_records_that_are_no_objects(write, item):
    path = write([item])
    assert "record 0: expected an object" in problem(VQADataset, path)
    assert len(VQADataset(path, skip_broken=True)) == 0


def test_unusable_files(write, tmp_path):
    broken = write('[\n  {"src": "a",}\n]')
    assert f"{broken}: broken JSON at line 2, column" in problem(load_records, broken)
    assert "an object" in problem(load_records, write("{}"))
    assert "a string" in problem(load_records, write('"text"'))
    assert "line 1, column 1" in problem(load_records, write(""))
    assert "UTF-8" in problem(load_records, write(b'["\xff\xfe"]'))
    assert "cannot be read" in problem(load_records, write("[" * 100_000))
    assert f"{tmp_path}: is a directory" in problem(load_records, tmp_path)
    assert "does not exist" in problem(load_records, tmp_path / "gone.json")
    assert "does not exist" in problem(load_records, "nul\0byte")
    for kind in (VQADataset, CaptionDataset):
        assert "directory" in problem(kind, tmp_path, skip_broken=True)


def test_a_byte_order_mark_is_no_matter(write):
    path = write(b"\xef\xbb\xbf" + json.dumps([record(alt="Juárez")], ensure_ascii=False).encode())
    assert VQADataset(path)[0].request.query.target == "Juárez"


def test_missing_images(write, tmp_path):
    (tmp_path / "val").mkdir()
    Image.new("RGB", (1, 1)).save(tmp_path / "val" / "a.jpg")
    data = VQADataset(write([hard_record(), record()]), image_root=tmp_path)
    names = ("re/a.png", "val/b.jpg", "val/c.jpg")
    assert data.list_missing_images() == [str(tmp_path / name) for name in names]


def mixed(write, vqa: int, caption: int, **kwargs: Any) -> CapVQADataset:
    vqa_path = write([hard_record(alt=str(number)) for number in range(vqa)], "vqa.json")
    caption_path = write([record(alt=f"caption {number}") for number in range(caption)], "caption.json")
    return CapVQADataset(vqa_path, caption_path, **kwargs)


def test_the_mixed_set_alternates(write):
    data = mixed(write, 3, 3)
    ids = [case.request.id for case in data]
    assert ids == ["vqa-0", "caption-0", "vqa-1", "caption-1", "vqa-2", "caption-2"]
    assert [case.task for case in data[:2]] == ["vqa", "caption"]
    assert ids == [case.request.id for case in mixed(write, 3, 3)]
    assert data.alternating == 6


def test_the_rest_of_the_longer_set_follows(write):
    data = mixed(write, 1, 3)
    assert [case.request.id for case in data] == ["vqa-0", "caption-0", "caption-1", "caption-2"]
    assert data.alternating == 2
    assert [case.request.id for case in mixed(write, 3, 0)] == ["vqa-0", "vqa-1", "vqa-2"]


def test_the_mixed_sets_size_is_that_of_the_mixture(write):
    data = mixed(write, 4, 4, size=3)
    assert [case.request.id for case in data] == ["vqa-0", "caption-0", "vqa-1"]
    assert data.alternating == 3
    assert "size" in problem(mixed, write, 1, 1, size=0)


def test_the_mixed_set_adds_up_what_was_left_out(write, tmp_path):
    vqa = write([record(alt=""), record(pred="3"), record()], "vqa.json")
    caption = write([record(alt=...), record(pred="three")], "caption.json")
    data = CapVQADataset(vqa, caption, clean=True, skip_broken=True, image_root=tmp_path)
    assert [case.request.id for case in data] == ["vqa-2"]
    assert data.cleaned == 2
    assert [message.split(":")[0] for message in data.skipped] == [str(vqa), str(caption)]
    assert len(data.list_missing_images()) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat.", "cat"),
        ("  a\tblack\n cat ", "black cat"),
        ("in the field", "in field"),
        ("Three", "3"),
        ("none", "0"),
        ("twenty", "20"),
        ("t-shirt", "t shirt"),
        ("don't", "dont"),
        ("man\u2019s hat", "mans hat"),
        ("\u201cStop\u201d", "stop"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("12:30", "12:30"),
        ("1,000", "1000"),
        ("1, 2", "1 2"),
        ("A", "a"),
        ("the", "the"),
        ("?", "?"),
        ("", ""),
        ("Caf\u00e9", "cafe\u0301"),
    ],
)
def test_normalised_answers(text, expected):
    assert normalise_answer(text) == normalise_answer(expected)
    if expected.isascii():
        assert normalise_answer(text) == expected


@quick
@given(st.text(max_size=30))
def test_normalising_is_idempotent_and_deaf_to_case_and_edges(text):
    once = normalise_answer(text)
    assert normalise_answer(once) == once
    assert once == once.strip()
    assert normalise_answer(f" \n{text}\t") == once
    if text.isascii():
        assert normalise_answer(text.upper()) == once


@quick
@given(st.text(st.sampled_from("aA the.,:'1 \t0o-n"), max_size=12))
def test_normalising_its_own_special_characters_is_idempotent(text):
    once = normalise_answer(text)
    assert normalise_answer(once) == once


@quick
@given(st.text(max_size=400) | st.sampled_from(["\ud800", "a\u2028b", "\x1b[31m"]))
def test_one_line_is_one_short_printable_line(text):
    line = one_line(text)
    assert line.isprintable()
    assert len(line) <= 300
    line.encode()


texts = st.text(max_size=20) | st.sampled_from([" \u00a0x\u2003", "{}", "\u202eabc", "\x00"])
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)  # JSON has no others
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from([*record(), "joint", "same_image_q", "same_question_a", "rephase"])
sound_records = st.fixed_dictionaries(dict.fromkeys(record(), texts.filter(str.strip)))


@quick
@given(st.lists(st.dictionaries(keys, json_values, max_size=13) | json_values, max_size=4))
def test_any_json_gives_cases_or_one_line(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.json"
        path.write_text(json.dumps(content))
        data = VQADataset(path, skip_broken=True, clean=True)
        assert len(data) + len(data.skipped) + data.cleaned == len(content)
        assert len(list(data)) == len(data)
        assert all(message.isprintable() for message in data.skipped)
        if data.skipped:
            assert problem(CaptionDataset, path) == data.skipped[0]


@quick
@given(sound_records, sound_records)
def test_every_sound_record_is_a_case_with_stripped_texts(first, second):
    assert list_record_problems(first, 0) == []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound.json"
        path.write_text(json.dumps([first, second]))
        vqa, caption = VQADataset(path), CaptionDataset(path)
        mixture = CapVQADataset(path, path)
        assert len(vqa) == len(caption) == 2
        assert list(mixture) == [vqa[0], caption[0], vqa[1], caption[1]]
        assert VQADataset(path, clean=True).cleaned == has_nothing_to_edit(first) + has_nothing_to_edit(
            second
        )
    for case, source in ((vqa[0], first), (caption[1], second)):
        assert case.request.query.target == source["alt"].strip()
        assert source["src"].strip() in case.request.query.prompt
        for probe in case.probes:
            assert probe.query.target == probe.query.target.strip() != ""
            assert probe.query.prompt == probe.query.prompt.strip() != ""
