"""VLKEB's portability: what is asked, of which records, and what a broken field is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import record, save_pictures
from test_sequences import FT, UNIKE, Keeping, afters, predictions, reader_of, share
from test_sequences import backbone as backbone  # the fixture
from test_sequences import case as make_case

from unike.backbones.base import encode_queries
from unike.config.hparams import HyperParams
from unike.datasets.declarations import HOPS, PORTABILITY_METRICS, find_metric
from unike.datasets.mmedit import CaptionDataset, VQADataset
from unike.datasets.vlkeb_dataset import VLKEBDataset
from unike.edits import compose
from unike.evaluation.protocols import run_one_step, run_one_step_batch, run_sequence
from unike.runs.inputs import open_datasets
from unike.types import Case, EditRequest, Probe, Query, UserError

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
        ([ask(1, "a?", "b"), ask(5, "a?", "b")], "number 1: port_type: expected 1-hop, 2-hop, 3-hop"),
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


SECOND = {
    "port_edit_q": "Where is it made?",
    "port_edit_a": "in Bern ",
    "port_q": "Made where?",
    "port_a": "Bern",
}


def test_a_second_edit_is_made_where_it_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, [SECOND], None)
    case, other = VLKEBDataset(path)
    assert case.second is None
    assert not {probe.name for probe in case.probes} & {*PORTABILITY_METRICS, "second_reliability"}
    case, other = VLKEBDataset(path, second_edit=True)
    assert other.second is None
    assert case.second is not None
    asked = case.second.query
    assert (asked.image, asked.prompt, asked.target) == (None, "Where is it made?", "in Bern")
    assert case.second.id != case.request.id
    probes = {probe.name: probe.query for probe in case.probes}
    assert probes["second_reliability"] == asked
    composed = probes["portability_1_hop"]
    assert (composed.image, composed.target) == (case.request.query.image, "Bern")
    assert composed.prompt == "Question: Made where? Short answer:"


class Counting(Keeping):
    """Keeps what each edit was made on top of."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.histories: list[Any] = []

    def edit(self, backbone, request, prefixes, history=None):
        self.histories.append((request.id, None if history is None else len(history.origins)))
        return super().edit(backbone, request, prefixes, history)

    def edit_many(self, backbone, requests, prefixes):
        return [self.edit(backbone, request, prefixes) for request in requests]


def with_second(i: int) -> Case:
    first = make_case(i)
    text = Query(None, f"where is town {i}?", "in the north")
    probes = (*first.probes, Probe("second_reliability", text, "target"))
    return replace(first, probes=probes, second=EditRequest(f"e{i}-second", text))


@pytest.mark.parametrize("values", [UNIKE, FT], ids=["unike", "ft"])
@pytest.mark.parametrize("how", ["alone", "in a batch", "in a sequence"])
def test_all_probes_are_asked_under_both_edits(backbone, values, how: str) -> None:
    cases = [with_second(1), make_case(2)]
    method = Counting(values)
    reader = reader_of(backbone, method)
    if how == "alone":
        outcomes = [run_one_step(backbone, method, one, reader) for one in cases]
    elif how == "in a batch":
        outcomes = run_one_step_batch(backbone, method, cases, reader)
    else:
        outcomes = [
            o for o in run_sequence(backbone, method, cases, reader, gap=0) if o.record.place.kind == "final"
        ]
    record = outcomes[0].record.to_json()
    made = {request: edit for (request, _), edit in zip(method.histories, method.edits, strict=True)}
    assert dict(method.histories)["e1-second"] == 1, "made on top of the first"
    assert dict(method.histories)["e2"] == (2 if how == "in a sequence" else None)

    def ask(*names: str) -> list[list[int]]:
        with compose([made[name] for name in names]).applied(backbone):
            return predictions(backbone, cases[0])

    base, alone, both = predictions(backbone, cases[0]), ask("e1"), ask("e1", "e1-second")
    at = [probe.name for probe in cases[0].probes].index("t_locality")
    assert afters(record)["t_locality"] == share(both[at], base[at])
    goal = encode_queries(backbone, [cases[0].probes[-1].query]).labels
    wanted = goal[goal != -100].tolist()
    assert afters(record)["second_reliability"] == share(both[-1], wanted)
    assert share(both[-1], wanted) > share(alone[-1], wanted), "the second edit does something"
    assert record["steps"] == made["e1"].info["steps"]


TEXTUAL = {
    "src": "Where is it made?",
    "rephrase": "It is made where?",
    "pred": ["Rome", "Roma"],
    "alt": ["Bern ", "Berne"],
    "loc": "who is king?",
    "loc_ans": "nobody",
}
COMPOSED = {"port_type": "comp", "Q&A": {"Question": "Made where?", "Answer": "ignored", "Query": "x"}}


def write_textual(folder: Path, textual: object, port: object) -> Path:
    row = record(0) | {"textual_edit": textual} | ({} if port is None else {"port_new": port})
    path = folder / "cckeb.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    return path


def test_cckebs_textual_edit_is_the_second(tmp_path: Path) -> None:
    path = write_textual(tmp_path, TEXTUAL, [COMPOSED, ask(1, "Who?", "Ida")])
    assert VQADataset(path)[0].second is None
    (case,) = VQADataset(path, second_edit=True)
    assert case.second is not None
    assert case.second.query == Query(None, "Where is it made?", "Bern")
    found = {probe.name: probe for probe in case.probes}
    assert found["portability_1_hop"].query.target == "Ida"
    assert found["second_reliability"].query == case.second.query
    assert found["second_generality"].query == Query(None, "It is made where?", "Bern")
    assert found["second_locality"].query == Query(None, "who is king?", "nobody")
    composed = found["compositional_reliability"]
    assert composed.query == Query(case.request.query.image, "Question: Made where? Short answer:", "Bern")
    kept = {name: probe.expect for name, probe in found.items() if "second" in name or "comp" in name}
    assert kept.pop("second_locality") == "unchanged"
    assert set(kept.values()) == {"target"}


@pytest.mark.parametrize(
    ("textual", "port", "said"),
    [
        (
            "Bern",
            [COMPOSED],
            "field 'textual_edit': expected an object with src, rephrase",
        ),
        (TEXTUAL | {"alt": []}, [COMPOSED], "field 'textual_edit': alt: expected a text"),
        (TEXTUAL | {"loc": 3}, [COMPOSED], "field 'textual_edit': loc: expected a text"),
        (TEXTUAL, None, "needs an item of the port_type 'comp' in 'port_new'"),
        (TEXTUAL, [ask(1, "Who?", "Ida")], "needs an item of the port_type 'comp' in 'port_new'"),
    ],
)
def test_a_broken_textual_edit_is_one_line(tmp_path: Path, textual: object, port: object, said: str) -> None:
    with pytest.raises(UserError) as caught:
        VQADataset(write_textual(tmp_path, textual, port))
    (line,) = caught.value.problems
    assert said in line


def test_without_a_second_edit_the_switch_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, None)
    save_pictures(tmp_path)
    options = {"model_name": "blip2", "name": "unused", "method": "ft", "data": {"vqa": {"eval": str(path)}}}
    hparams = HyperParams.from_dict(options | {"image_root": str(tmp_path), "second_edit": True})
    with pytest.raises(UserError, match="second_edit: true; no record has one"):
        open_datasets(hparams, "vqa")


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
