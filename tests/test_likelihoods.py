"""Margins and divergences against a slow reference: whole forward passes, log-softmax in float64."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from worlds import SETTINGS, World, case

from unike.backbones.base import IGNORED, encode_queries
from unike.evaluation.protocols import run_one_step, run_sequence
from unike.evaluation.reader import Reader
from unike.evaluation.record import Change, Record
from unike.evaluation.summary import summarise
from unike.report.terminal import list_number_rows
from unike.types import EditRequest, UserError


@pytest.fixture(scope="module", params=["blip2", "minigpt4"])
def world(request) -> World:
    return World(request.param)


@torch.no_grad()
def slow(world: World, query) -> tuple[list[torch.Tensor], list[int]]:
    """Distributions at an answer's positions, token by token from a batch of its own."""
    batch = encode_queries(world.backbone, [query])
    logits = world.backbone(batch).logits[0].double()
    labels = batch.labels[0].tolist()
    at = [i for i, label in enumerate(labels) if label != IGNORED]
    return [torch.log_softmax(logits[i - 1], 0) for i in at], [labels[i] for i in at]


def reference(world: World, one, edit) -> dict[str, dict[str, tuple[float | None, float]]]:
    def margin(probe) -> float:
        values = []
        for answer in (probe.query.target, one.request.wrong):
            rows, ids = slow(world, edit_or_not(replace(probe.query, target=answer)))
            values.append(sum(float(row[token]) for row, token in zip(rows, ids, strict=True)) / len(ids))
        return values[0] - values[1]

    asked = [p for p in one.probes if p.expect == "target"]
    kept = [p for p in one.probes if p.expect == "unchanged"]
    edit_or_not = lambda query: query  # noqa: E731
    before = {p.name: margin(p) for p in asked}
    base = {p.name: slow(world, p.query)[0] for p in kept}
    edit_or_not = lambda query: edit.rewrite_all([query])[0]  # noqa: E731
    with edit.applied(world.backbone):
        after = {p.name: margin(p) for p in asked}
        edited = {p.name: slow(world, edit_or_not(p.query))[0] for p in kept}
    kl = {
        name: sum(float((p.exp() * (p - q)).sum()) for p, q in zip(base[name], edited[name], strict=True))
        / len(base[name])
        for name in base
    }
    return {
        "margin": {name: (before[name], after[name]) for name in before},
        "kl": {name: (None, value) for name, value in kl.items()},
    }


# All items of the memory: some are equally similar, and which of these are nearest depends on the last bits.
UNIKE = {"k": 7}


@pytest.mark.parametrize("row", [("unike", 0), ("ft", 0), ("ft", 1), ("ike", 0)], ids=str)
def test_numbers_are_those_of_whole_forward_passes(world: World, row) -> None:
    name, which = row
    method = world.method(name, UNIKE if name == "unike" else SETTINGS[name][which])
    one = case(1)
    reader = Reader(world.backbone, world.prefixes(method), generated=False, likelihoods=True)
    outcome = run_one_step(world.backbone, method, one, reader)
    expected = reference(world, one, outcome.edit)
    found = outcome.record.numbers
    assert {k: set(v) for k, v in found.items()} == {k: set(v) for k, v in expected.items()}
    for kind, by_probe in expected.items():
        for probe, (before, after) in by_probe.items():
            change = found[kind][probe]
            assert change.after == pytest.approx(after, abs=2e-4), (kind, probe)
            assert change.before == (None if before is None else pytest.approx(before, abs=2e-4))
    assert found["margin"]["reliability"].after > found["margin"]["reliability"].before
    assert all(change.after >= 0 for change in found["kl"].values())
    most = max(change.after for change in found["kl"].values())
    # The projection of image features has no say in a question without an image.
    assert most < 1e-6 if (name, which) == ("ft", 1) else most > 1e-6


def test_scores_stay_as_they_are_and_off_has_no_numbers(world: World) -> None:
    method = world.method("ft", SETTINGS["ft"][0])
    off = Reader(world.backbone, world.prefixes(method), generated=False)
    on = Reader(world.backbone, world.prefixes(method), generated=False, likelihoods=True)
    records = [run_one_step(world.backbone, method, case(1), r).record for r in (off, on)]
    assert records[0].scores == records[1].scores
    assert "numbers" not in records[0].to_json()
    assert "numbers" in records[1].to_json()


def test_without_an_old_answer_there_is_no_margin(world: World) -> None:
    method = world.method("ft", SETTINGS["ft"][0])
    one = case(1)
    one = replace(one, request=EditRequest("e1", one.request.query))
    reader = Reader(world.backbone, world.prefixes(method), generated=False, likelihoods=True)
    assert list(run_one_step(world.backbone, method, one, reader).record.numbers) == ["kl"]


def test_sequences_have_them_at_the_end(world: World) -> None:
    method = world.method("ft", SETTINGS["ft"][0])
    reader = Reader(world.backbone, world.prefixes(method), generated=False, likelihoods=True)
    outcomes = list(run_sequence(world.backbone, method, [case(1), case(2)], reader))
    assert [bool(o.record.numbers) for o in outcomes] == [o.record.place.kind == "final" for o in outcomes]
    edits = [o.edit for o in outcomes if o.edit is not None]
    expected = reference(world, case(1), edits[0] | edits[1])
    final = next(o.record for o in outcomes if o.record.place.kind == "final")
    assert final.numbers["margin"]["reliability"].after == pytest.approx(
        expected["margin"]["reliability"][1], abs=2e-4
    )


def make_record(name: str, before: float | None, after: float, kind: str = "margin") -> Record:
    return Record(name, "vqa", "ok", numbers={kind: {"reliability": Change(before, after)}})


def test_summaries_have_means_intervals_and_shares() -> None:
    records = [make_record("a", -2.0, 3.0), make_record("b", -4.0, -1.0), make_record("c", 1.0, 4.0)]
    read = [Record.from_json(json.loads(json.dumps(r.to_json()))) for r in records]
    assert read == records
    found = summarise(read, 0)["numbers"]["margin"]["reliability"]
    assert found["n"] == 3
    assert found["before"]["mean"] == pytest.approx(-5 / 3)
    assert found["after"]["mean"] == pytest.approx(2.0)
    assert found["after"]["low"] < 2.0 < found["after"]["high"]
    assert found["positive"] == {"before": pytest.approx(100 / 3), "after": pytest.approx(200 / 3)}
    ((title, *cells),) = list_number_rows(summarise(read, 0))
    assert title == "margin of the target over the old answer, Reliability"
    assert cells[0] == "-1.667"
    assert cells[2] == "33.3 / 66.7"
    kl = summarise([make_record("a", None, 0.5, "kl")], 0)
    assert kl["numbers"]["kl"]["reliability"].keys() == {"n", "after"}
    assert list_number_rows(kl)[0][1::2] == ("-", "-")
    assert "numbers" not in summarise([Record("a", "vqa", "ok")], 0)


@pytest.mark.parametrize("value", [3, {"margin": 3}, {"margin": {"x": {"before": "a", "after": 1}}}])
def test_broken_numbers_are_refused(value: object) -> None:
    with pytest.raises(UserError, match="numbers is not as a run writes it"):
        Record.from_json({"id": "a", "numbers": value})
