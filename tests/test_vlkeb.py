"""VLKEB's portability: what is asked, of which records, and what a broken field is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import record

from unike.datasets.declarations import HOPS, PORTABILITY_METRICS, find_metric
from unike.datasets.mmedit import CaptionDataset, VLKEBDataset, VQADataset
from unike.types import UserError

SHARED = Path(__file__).parents[2] / "shared" / "vlkeb"


def ask(hops: int, question: str, answer: str) -> dict[str, Any]:
    return {"port_type": f"{hops}-hop", "Q&A": {"Question": question, "Answer": answer}}


def write(folder: Path, *portability: object) -> Path:
    """Annotations of a record each, with what is given as its ``port_new``; None for a record without."""
    rows = [record(i) | ({} if port is None else {"port_new": port}) for i, port in enumerate(portability)]
    path = folder / "eval_multihop.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", [VQADataset, VLKEBDataset, CaptionDataset])
def test_a_records_questions_are_asked_on_its_own_image(tmp_path: Path, kind: type[VQADataset]) -> None:
    items = [
        ask(2, "Where does its maker live?", "Bern "),
        ask(1, "Who made it?", "Ida"),
        ask(1, "Who?", "Max"),
    ]
    (case,) = kind(write(tmp_path, items))
    asked = {probe.name: probe for probe in case.probes if probe.name in PORTABILITY_METRICS}
    assert list(asked) == ["portability_1_hop", "portability_2_hop"]
    first = asked["portability_1_hop"]
    assert (first.query.prompt, first.query.target) == ("Question: Who made it? Short answer:", "Ida")
    assert asked["portability_2_hop"].query.target == "Bern"
    assert {probe.query.image for probe in asked.values()} == {case.request.query.image}
    assert {probe.expect for probe in asked.values()} == {"target"}


def test_without_the_field_nothing_more_is_asked(tmp_path: Path) -> None:
    (case,) = VLKEBDataset(write(tmp_path, None))
    assert not {probe.name for probe in case.probes} & set(PORTABILITY_METRICS)


def test_hops_keep_the_records_that_have_them(tmp_path: Path) -> None:
    one, two = ask(1, "a?", "b"), ask(2, "c?", "d")
    path = write(tmp_path, [one], [two], None, [one, two])

    def list_asked(hops: list[int] | None) -> dict[str, list[str]]:
        return {
            case.request.id: [p.name for p in case.probes if p.name in PORTABILITY_METRICS]
            for case in VLKEBDataset(path, hops=hops)
        }

    first, second = PORTABILITY_METRICS[:2]
    assert list_asked(None) == {"vqa-0": [first], "vqa-1": [second], "vqa-2": [], "vqa-3": [first, second]}
    assert list_asked([2]) == {"vqa-1": [second], "vqa-3": [second]}
    assert list_asked([3]) == {}
    for wrong in ([], [5], [1, 9]):
        with pytest.raises(UserError, match="hops: expected some of 1, 2, 3, 4"):
            VLKEBDataset(path, hops=wrong)


@pytest.mark.parametrize(
    ("port", "said"),
    [
        ("1-hop", "field 'port_new': expected a list, got str '1-hop'"),
        ([3], "number 0: expected an object with port_type and Q&A"),
        ([{"port_type": "1-hop"}], "number 0: expected an object with port_type and Q&A"),
        ([ask(1, "a?", "b"), ask(5, "a?", "b")], "number 1: port_type: expected 1-hop, 2-hop, 3-hop, 4-hop"),
        ([{"port_type": [], "Q&A": {}}], "port_type: expected 1-hop"),
        ([ask(1, " ", "b")], "Q&A: Question: expected a text"),
        ([{"port_type": "1-hop", "Q&A": {"Question": "a?"}}], "Q&A: Answer: expected a text"),
        ([ask(1, "a?", "\ud800")], "Q&A: Answer: expected a text"),
        ([{"port_edit_q": "a?", "port_edit_a": "b", "port_q": "c?"}], "number 0: expected an object"),
    ],
)  # fmt: skip
def test_a_broken_field_is_one_line(tmp_path: Path, port: object, said: str) -> None:
    path = write(tmp_path, port)
    with pytest.raises(UserError) as caught:
        VQADataset(path)
    (line,) = caught.value.problems
    assert line.startswith(f"{path}: record 0: field 'port_new'")
    assert said in line
    assert len(VQADataset(path, skip_broken=True)) == 0


def test_a_second_edit_is_no_question(tmp_path: Path) -> None:
    """The edit-one-hop file's records load; what they ask after a second edit is not asked after one."""
    item = dict(zip(("port_edit_q", "port_edit_a", "port_q", "port_a"), "abcd", strict=True))
    (case,) = VLKEBDataset(write(tmp_path, [item]))
    assert not {probe.name for probe in case.probes} & set(PORTABILITY_METRICS)


def test_each_number_of_hops_is_a_declared_metric() -> None:
    declared = [find_metric(name) for name in PORTABILITY_METRICS]
    assert [metric and metric.group for metric in declared] == ["portability"] * len(HOPS)
    assert len({metric.title for metric in declared if metric}) == len(HOPS)


@pytest.mark.skipif(not SHARED.is_dir(), reason="VLKEB's annotations are not there")
@pytest.mark.parametrize(
    ("name", "count"), [("train.json", 5000), ("eval.json", 3174), ("eval_edit_onehop.json", 1278)]
)
def test_vlkebs_own_files_load(name: str, count: int) -> None:
    assert len(VLKEBDataset(SHARED / name)) == count
