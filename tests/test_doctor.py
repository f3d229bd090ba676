"""The doctor counts exactly the dirt that is there, in small made-up files and in MMEdit's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unike.datasets import doctor
from unike.datasets.doctor import DIRT, audit, find_leakage, main
from unike.datasets.mmedit import CaptionDataset, CapVQADataset, VQADataset
from unike.types import FIVE_METRICS, UserError

MMEDIT = Path(__file__).parents[2] / "shared" / "mmedit"
needs_mmedit = pytest.mark.skipif(not MMEDIT.is_dir(), reason="MMEdit's annotations are not here")


def record(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "src": "How many cats?",
        "pred": "2",
        "rephrase": "What is the number of cats?",
        "alt": "3",
        "image": "a.png",
        "image_rephrase": "b.png",
        "loc": "who wrote it",
        "loc_ans": "Ann",
        "m_loc": "c.png",
        "m_loc_q": "What sport?",
        "m_loc_a": "golf",
    }
    base.update(changes)
    return {key: value for key, value in base.items() if value is not ...}


@pytest.fixture
def write(tmp_path):
    def write_records(content: Any, name: str = "data.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write_records


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "abc":
        Image.new("RGB", (40, 40), "red").save(folder / f"{name}.png")
    return folder


def counts(report: doctor.AuditReport) -> dict[str, int]:
    return {finding.name: finding.count for finding in report.findings if finding.count}


def test_clean_records_have_no_findings(write):
    report = audit(write([record(), record(alt="4")]))
    assert counts(report) == {}
    assert (report.records, report.errors) == (2, 0)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"rephrase": '"How many?"'}, {"stray_quote"}),
        ({"rephrase": " \u201cHow many?"}, {"stray_quote"}),
        ({"rephrase": 'How many "cats"?'}, set()),
        ({"rephrase": "How many cats? "}, {"rephrase_equals_src"}),
        ({"alt": "yes"}, {"yes_no_wh"}),
        ({"alt": "No.", "rephrase": '"Where is it?"'}, {"yes_no_wh", "stray_quote"}),
        ({"alt": "yes", "rephrase": "What's it?"}, {"yes_no_wh"}),
        ({"alt": "yes", "rephrase": "Is it whatever?"}, set()),
        ({"alt": "yes", "rephrase": "Whatever?"}, set()),
        ({"alt": "yes", "rephrase": "???"}, set()),
        ({"pred": "the Cat", "alt": "cat"}, {"pred_equals_alt", "nothing_to_edit"}),
        ({"pred": "three"}, {"pred_equals_alt", "nothing_to_edit"}),
        ({"pred": "in a car", "alt": "in car"}, {"nothing_to_edit"}),
        ({"pred": "three cats", "alt": "3 cats"}, {"nothing_to_edit"}),
        ({"pred": "3!"}, {"nothing_to_edit"}),
        ({"pred": "theatre", "alt": "atre"}, set()),
        ({"pred": None}, set()),
        ({"pred": ...}, set()),
        ({"alt": " 3"}, {"alt_whitespace"}),
        ({"alt": "3\n"}, {"alt_whitespace"}),
        ({"alt": "3\n4"}, {"alt_whitespace", "never_generated"}),
        ({"alt": "red</s>"}, {"never_generated"}),
        ({"alt": "a <|im_end|>"}, {"never_generated"}),
        ({"alt": "a < b > c | <3"}, set()),
        ({"rephrase": "How\nmany?"}, {"rephrase_newline"}),
        ({"notes": 1}, {"unknown_fields"}),
        ({"alt": ""}, {"fields"}),
        ({"alt": ..., "rephrase": '"x\n'}, {"fields"}),
    ],
)
def test_each_kind_of_dirt(write, changes, kinds):
    report = audit(write([record(loc="other"), record(**changes)]))
    assert set(counts(report)) == kinds
    assert all(report[kind].records == (1,) for kind in kinds)
    assert report.errors == bool(kinds & {"fields", "never_generated"})


def test_every_problem_of_a_broken_record_is_listed(write):
    report = audit(write([record(alt=..., src=3), "text"]))
    assert report["fields"].records == (0, 1)
    assert len(report["fields"].details) == 3
    assert report["fields"].details[0].startswith("record 0: field 'src'")


def test_duplicates_ignore_the_order_of_fields(write):
    same = dict(reversed(record().items()))
    report = audit(write([record(), record(alt="4"), same, record()]))
    assert report["duplicates"].records == (2, 3)
    assert report["duplicates"].details[0] == "record 2: same as record 0"
    with pytest.raises(KeyError):
        report["no such finding"]


def test_pictures(write, pictures):
    path = write([record(), record(image="gone.png"), record(m_loc="cut.png", image="gone.png")])
    cut = pictures / "cut.png"
    cut.write_bytes((pictures / "a.png").read_bytes()[:60])
    report = audit(path, pictures)
    assert report["missing_pictures"].records == (1, 2)
    assert report["missing_pictures"].details == (f"{pictures / 'gone.png'}: image does not exist",)
    assert report["unreadable_pictures"].records == (2,)
    assert str(cut) in report["unreadable_pictures"].details[0]
    assert report.errors == 3
    assert audit(write([record()]), pictures).errors == 0
    with pytest.raises(UserError, match="not a directory"):
        audit(path, pictures / "gone")


def test_a_same_question_picture_is_looked_for_too(write, pictures):
    path = write([record(same_question_image="d.png", same_question_a="4")])
    assert audit(path, pictures)["missing_pictures"].records == (0,)


def test_leakage(write):
    train = write([record(), record(image="x.png", m_loc_q="Who?"), record(alt="")], "train.json")
    other = {"image": "y.png", "m_loc": "z.png"}
    evaluation = write(
        [
            record(**other),
            record(m_loc="z.png"),
            record(image="y.png"),
            record(image="y.png", m_loc_a="chess"),
            record(alt=...),
        ]
    )
    report = find_leakage(train, evaluation)
    assert report.records == 5
    assert report["leaked_image"].records == (1,)
    assert report["leaked_m_loc"].records == (2,)
    assert report["leaked_m_loc_pair"].records == (2, 3)
    assert report.errors == 0


def test_exit_codes(write, pictures, capsys):
    clean, dirty, broken = (
        write([record()], "clean.json"),
        write([record(rephrase='"'), record(rephrase='"')], "dirty.json"),
        write([record(alt=...)], "broken.json"),
    )
    assert main([str(clean)]) == main([str(dirty)]) == 0
    assert main([str(broken)]) == main([str(clean), str(broken)]) == 1
    assert main([str(clean), "--images", str(pictures)]) == 0
    (pictures / "b.png").unlink()
    assert main([str(clean), "--images", str(pictures)]) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", ["[1,", "{}", None])
def test_unusable_input_is_one_line(write, tmp_path, capsys, content):
    path = tmp_path if content is None else write(content)
    assert main([str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert str(path) in captured.err


def test_the_table_shows_names_literally(write, capsys):
    path = write([record(**{"[red]odd[/]": 1, "\ud800": 2, "rephase": 3}), *["x"] * 9], "[bold]d.json")
    assert main([str(path)]) == 1
    shown = capsys.readouterr().out
    assert "[bold]d.json: 10 records" in shown
    assert "field '[red]odd[/]' is not read\n" in shown
    assert "field 'rephase' is not read; is it meant to be 'rephrase'?\n" in shown
    assert "... and 4 more like these" in shown


def test_json(write, capsys):
    train, evaluation = write([record()], "train.json"), write([record(), record(alt="4 ")], "eval.json")
    assert main([str(train), str(evaluation), "--json"]) == 0
    first, second, leaks = json.loads(capsys.readouterr().out)
    assert first["title"] == str(train)
    assert first["records"] == 1
    found = {finding["name"]: finding for finding in second["findings"]}
    assert set(DIRT) < set(found)
    assert found["alt_whitespace"]["records"] == [1]
    assert found["alt_whitespace"]["severity"] == "warning"
    assert [finding["count"] for finding in leaks["findings"]] == [2, 2, 2]


def test_it_runs_as_a_module(write):
    command = [sys.executable, "-m", "unike.datasets.doctor", str(write("[")), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert "line 1, column 2" in done.stderr
    assert done.stderr.count("\n") == 1


texts = st.text(max_size=12) | st.sampled_from(["\ud800", '"', "\n", "yes", "the 3", "[/red]"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from([*record(), "joint", "odd"]), texts | st.none()) | texts))
def test_any_records_can_be_audited(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content))
    report = audit(path)
    assert report.records == len(content)
    assert all(0 <= index < len(content) for finding in report.findings for index in finding.records)
    assert main([str(path)]) == (1 if report.errors else 0)
    json.dumps(report.as_dict())


@needs_mmedit
def test_mmedits_own_counts_vqa():
    expected = {
        "stray_quote": (1686, 562),
        "rephrase_equals_src": (117, 45),
        "yes_no_wh": (478, 163),
        "pred_equals_alt": (149, 56),
        "nothing_to_edit": (219, 82),
        "rephrase_newline": (15, 13),
        # A whole paragraph in place of an answer.
        "too_long": (1, 0),
    }
    train, evaluation = MMEDIT / "vqa_train.json", MMEDIT / "vqa_eval.json"
    for position, path in enumerate((train, evaluation)):
        own = {name: pair[position] for name, pair in expected.items() if pair[position]}
        assert counts(audit(path)) == own
    assert counts(find_leakage(train, evaluation)) == {
        "leaked_image": 1380,
        "leaked_m_loc_pair": 2093,
        "leaked_m_loc": 2093,
    }


@needs_mmedit
def test_mmedits_own_counts_captions():
    train, evaluation = MMEDIT / "caption_train_edit.json", MMEDIT / "caption_eval_edit.json"
    assert counts(audit(train)) == {"alt_whitespace": 413}
    assert counts(audit(evaluation)) == {"alt_whitespace": 144}
    assert counts(find_leakage(train, evaluation)) == {"leaked_m_loc_pair": 1000, "leaked_m_loc": 745}


@needs_mmedit
@pytest.mark.parametrize(
    ("kind", "name", "size"),
    [
        (VQADataset, "vqa_train", 6345),
        (VQADataset, "vqa_eval", 2093),
        (CaptionDataset, "caption_train_edit", 2849),
        (CaptionDataset, "caption_eval_edit", 1000),
    ],
)
def test_mmedits_own_files_are_datasets(kind, name, size):
    path = MMEDIT / f"{name}.json"
    data = kind(path)
    assert len(data) == size
    assert all(tuple(probe.name for probe in case.probes) == FIVE_METRICS for case in data[:50])
    cleaned = kind(path, clean=True)
    assert len(cleaned) + cleaned.cleaned == size
    assert cleaned.cleaned == audit(path)["nothing_to_edit"].count


@needs_mmedit
def test_mmedits_mixture():
    data = CapVQADataset(MMEDIT / "vqa_eval.json", MMEDIT / "caption_eval_edit.json")
    assert len(data) == 3093
    assert data.alternating == 2000
    for start in (0, 1000, 1990):
        assert sum(case.task == "vqa" for case in data[start : start + 10]) == 5
