"""A record: what a run writes comes back, key by key, and what it does not write is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from finished_runs import ended
from hypothesis import given
from hypothesis import strategies as st

from unike.evaluation.record import OWN, Record
from unike.runs.records import RECORDS, RecordWriter, read_records
from unike.types import FIVE_METRICS, UserError

MADE = '"seconds": 0.1571, "steps": 6, "loss": 0.0104, "reached": true, "bytes": 660640'
PLACED = '"case": "vqa-0", "sequence": 0, "position": 1'
SCORES = '"scores": {"teacher_forced": {"reliability": {"before": 0.6666666666666666, "after": 1.0}}}'
MEASURED = (
    f'{SCORES}, "presets": {{}}, "base_right": {{"teacher_forced": {{"t_locality": 0.0}}}}, "decisions": '
    '{"alpha": {"reliability": 0.25}}, "retrieved": {"reliability": {"what? a fox": 0.9}}, "answers": '
    '{"reliability": {"prompt": "what?", "target": "a fox", "before": "a dog", "after": "a fox"}}'
)
# As runs of version 0.1.0 write them, without most of their probes.
LINES = {
    "one step": f'{{"id": "vqa-0", "task": "vqa", "status": "ok", {MADE}, {MEASURED}}}',
    "step": f'{{"id": "0/1/step", "task": "vqa", "status": "ok", {MADE}, {PLACED}, "kind": "step", {SCORES}, '
    '"former": {}, "former_cases": 0}',
    "final": f'{{"id": "0/1/final", "task": "vqa", "status": "ok", {MADE}, {PLACED}, "kind": "final", '
    f"{MEASURED}}}",
    "failed": '{"id": "vqa-0", "task": "vqa", "status": "failed", "seconds": 0.2, "error": "nan"}',
    "out of memory": '{"id": "vqa-0", "task": "vqa", "status": "failed", "error": "out of memory"}',
    "failed in a sequence": '{"id": "0/1/step", "task": "vqa", "status": "failed", "seconds": 0.2, '
    f'"error": "nan", {PLACED}, "kind": "step"}}',
    "not evaluated": f'{{"id": "0/1/final", "task": "vqa", "status": "failed", {MADE}, {PLACED}, '
    '"kind": "final", "error": "1.png: no such image"}',
    "newest not evaluated": f'{{"id": "0/1/step", "task": "vqa", "status": "failed", {MADE}, {PLACED}, '
    '"kind": "step", "error": "1.png: no such image", "former": {"reliability": 1.0}, "former_cases": 1}',
    "of a method of one's own": '{"id": "vqa-0", "task": "vqa", "status": "ok", "seconds": 0.1, "kind": '
    f'"lora", "loss": [1.0, null], "rank": {{"a": 8}}, "steps": null, "bytes": 4, {SCORES}}}',
    "with little in it": '{"id": "a"}',
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_comes_back_to_the_byte(line: str) -> None:
    assert json.dumps(Record.from_json(json.loads(line)).to_json()) == line


def test_a_record_says_what_it_is() -> None:
    record = Record.from_json(json.loads(LINES["final"]))
    assert (record.ok, record.is_step, record.case, record.sequence) == (True, False, "vqa-0", 0)
    assert (record.steps, record.loss, record.info["reached"]) == (6, 0.0104, True)
    assert record.get_scores("teacher_forced")["reliability"].after == 1.0
    assert record.get_scores("generated") == {}
    own = Record.from_json(json.loads(LINES["of a method of one's own"]))
    assert (own.is_step, own.loss, own.steps, own.case) == (False, None, None, "vqa-0")
    assert not Record.from_json(json.loads(LINES["failed"])).ok


def test_what_a_method_reports_takes_no_place_of_the_records_own() -> None:
    info = {"kind": "lora", **dict.fromkeys(OWN, "mine"), "rank": 8}
    record = Record("vqa-0", "vqa", "ok", 0.1, info, bytes=4)
    assert record.to_json() == {
        "id": "vqa-0", "task": "vqa", "status": "ok", "seconds": 0.1, "kind": "lora", "rank": 8, "bytes": 4,
    }  # fmt: skip
    assert Record.from_json(record.to_json()).info == {"kind": "lora", "rank": 8}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"scores": None}, "scores"),
    ({"scores": {"generated": {"joint": {"after": 1.0}}}}, "scores"),
    ({"scores": {"generated": {"joint": {"before": 1.0, "after": None}}}}, "scores"),
    ({"answers": {"joint": {"prompt": "what?", "target": "a", "before": "b"}}}, "answers"),
    ({"answers": {"joint": {"prompt": "what?", "target": "a", "before": "b", "after": 3}}}, "answers"),
    ({"decisions": {"alpha": {"joint": "much"}}}, "decisions"),
    ({"former": {"joint": None}}, "former"),
    ({"seconds": float("inf")}, "seconds"),
    ({"seconds": True}, "seconds"),
    ({"steps": "many"}, "steps"),
    ({"status": "skipped"}, "status"),
    ({"task": []}, "task"),
    ({"sequence": 0}, "its place in a sequence"),
    ({"sequence": 0, "position": True, "kind": "final"}, "its place in a sequence"),
    ({"sequence": 0, "position": 1, "kind": "last"}, "its place in a sequence"),
    ({"sequence": 0, "position": 1, "kind": "step"}, "its place in a sequence"),
    ({"sequence": 0, "position": 1, "kind": "final", "case": {}}, "case"),
]


@pytest.mark.parametrize(("part", "name"), WRONG, ids=[str(part) for part, _ in WRONG])
def test_another_shape_is_one_line(part: dict[str, Any], name: str, tmp_path) -> None:
    with RecordWriter(tmp_path / "run", False, {}) as writer:
        writer.write(ended(0))
    with open(tmp_path / "run" / RECORDS, "a") as file:
        file.write(json.dumps(ended(1) | part) + "\n")
    with pytest.raises(UserError) as caught:
        read_records(tmp_path / "run")
    at = tmp_path / "run" / RECORDS
    assert caught.value.problems == (f"{at}: record vqa-1: {name} is not as a run writes it",)


def test_a_run_of_sequences_has_no_record_without_a_place(tmp_path) -> None:
    with RecordWriter(tmp_path / "run", False, {}) as writer:
        writer.write(ended(0))
        writer.write(ended(1, case="vqa-1", sequence=0, position=1, kind="final"))
    with pytest.raises(UserError, match="record vqa-0: its place in a sequence is not as a run writes it"):
        read_records(tmp_path / "run")


numbers = st.floats(0, 1) | st.integers(-3, 3)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(
    info=st.dictionaries(st.text(max_size=4).filter(lambda key: key not in OWN), json_values, max_size=4),
    passing=st.sets(st.sampled_from(FIVE_METRICS)),
    seconds=numbers,
)
def test_further_keys_survive(info: dict[str, Any], passing: set[str], seconds: float) -> None:
    values = ended(1, list(passing), seconds=seconds) | info
    again = Record.from_json(values).to_json()
    assert {key: again[key] for key in values} == values
    assert Record.from_json(again) == Record.from_json(values)
