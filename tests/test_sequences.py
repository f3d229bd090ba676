"""Sequences of edits: what accumulates, what is measured against what, and how runs of them resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import as_records
from helpers import Project
from original_files import FAMILIES, make_spec
from PIL import Image
from test_run_edit import errors, start

from unike.backbones import load_backbone
from unike.backbones.base import encode_queries
from unike.backbones.prefix import PrefixCache
from unike.config.hparams import HyperParams
from unike.edits import compose
from unike.evaluation.protocols import run_one_step, run_sequence
from unike.evaluation.reader import Reader
from unike.evaluation.sequences import draw_cross_task, draw_sequences
from unike.evaluation.summary import summarise
from unike.methods import build
from unike.report.terminal import as_text, summary_table
from unike.runs.records import read_lines
from unike.types import METRIC_PRESETS, METRICS, Case, EditRequest, Probe, Query, UserError

COLORS = ("teal", "navy", "olive", "maroon", "gold", "gray")
ANSWERS = ("a fox", "two dogs", "the sea", "green")
UNIKE = {
    "model_name": "blip2", "name": "unused", "layers": 2, "external": "latent", "memory": "edit",
    "alpha": 0.5, "zeta": "none", "lr": 2e-2, "max_steps": 15, "n_keys": 4,
}  # fmt: skip
SCOPED = UNIKE | {"scope_gate": "nearest", "scope_threshold": 0.3}
FT = {"model_name": "blip2", "name": "unused", "method": "ft", "layers": 1, "lr": 5e-3, "max_steps": 10}
COSTS = {"seconds"}


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request: pytest.FixtureRequest):
    loaded = load_backbone(make_spec(request.param))
    loaded.max_new_tokens = 4
    return loaded


def case(i: int, task: str = "vqa") -> Case:
    pictures = [Image.new("RGB", (84, 84), COLORS[(i + j) % len(COLORS)]) for j in range(3)]
    asked = Query(pictures[0], f"Question: what is number {i}? Short answer:", ANSWERS[i % len(ANSWERS)])
    queries = [
        asked,
        Query(pictures[0], f"Question: which is {i}? Short answer:", asked.target),
        Query(pictures[1], asked.prompt, asked.target),
        Query(None, f"where is king {i}?", "in the old town"),
        Query(pictures[2], f"Question: how many of {i}? Short answer:", "more than ten"),
    ]
    named = zip(METRICS, queries, strict=False)
    probes = [Probe(m, q, "unchanged" if m.endswith("locality") else "target") for m, q in named]
    return Case(EditRequest(f"e{i}", asked), tuple(probes), task)


class Keeping:
    """A method that keeps its edits, and fails where it is told to."""

    def __init__(self, values: dict[str, Any], broken: tuple[str, ...] = ()) -> None:
        self.method = build(HyperParams.from_dict(values))
        self.hparams, self.layers, self.broken = self.method.hparams, self.method.layers, broken
        self.edits: list[Any] = []

    def edit(self, backbone, request, prefixes, history=None):
        edit = self.method.edit(backbone, request, prefixes, history)
        if request.id in self.broken:
            raise FloatingPointError("the loss is nan")
        self.edits.append(edit)
        return edit


def reader_of(backbone, method, **changes) -> Reader:
    return Reader(backbone, PrefixCache(backbone, method.layers(backbone)[0]), **changes)


def recorded(*args: Any, **options: Any) -> list[dict[str, Any]]:
    """The records of a sequence, as a run writes them."""
    return [outcome.record.to_json() for outcome in run_sequence(*args, **options)]


def predictions(backbone, one: Case) -> list[list[int]]:
    """The whole model's argmax at each answer position, as it is at the moment."""
    batch = encode_queries(backbone, [p.query for p in one.probes])
    with torch.no_grad():
        best = backbone(batch).logits.argmax(-1)[:, :-1]
    at = batch.labels[:, 1:] != -100
    return [best[i][at[i]].tolist() for i in range(len(batch))]


def share(one: list[int], other: list[int]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def afters(record: dict[str, Any], mode: str = "teacher_forced") -> dict[str, float]:
    return {name: value["after"] for name, value in record["scores"][mode].items()}


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [r for r in records if r["kind"] == kind]


@pytest.mark.parametrize("values", [UNIKE, FT], ids=["unike", "ft"])
def test_a_sequence_of_one_is_one_step(backbone, values) -> None:
    method = build(HyperParams.from_dict(values))
    readers = [reader_of(backbone, method, presets=METRIC_PRESETS) for _ in range(2)]
    alone = run_one_step(backbone, method, case(1), readers[0]).record.to_json()
    step, final = recorded(backbone, method, [case(1)], readers[1])
    place = {"sequence": 0, "position": 1, "kind": "final", "case": "e1", "id": "0/1/final"}
    assert {k: v for k, v in final.items() if k not in COSTS} == {
        k: v for k, v in (alone | place).items() if k not in COSTS
    }
    assert step["scores"]["teacher_forced"] == alone["scores"]["teacher_forced"]
    assert (step["former"], step["former_cases"], step["bytes"]) == ({}, 0, alone["bytes"])


def test_locality_is_against_the_never_edited_base(backbone) -> None:
    """With the baselines that a careless protocol takes, the figures would be others."""
    cases = [case(i) for i in range(3)]
    method = Keeping({**FT, "lr": 1e-3, "max_steps": 4})
    untouched = [predictions(backbone, one) for one in cases]
    records = recorded(backbone, method, cases, reader_of(backbone, method))
    with compose(method.edits).applied(backbone):
        edited = [predictions(backbone, one) for one in cases]
    with compose(method.edits[:-1]).applied(backbone):
        careless = [predictions(backbone, one) for one in cases]
    names = {"t_locality": 3, "m_locality": 4}
    found = [afters(r)[name] for r in of_kind(records, "final") for name in names]
    right, wrong = (
        [share(b[at], a[at]) for b, a in zip(before, edited, strict=True) for at in names.values()]
        for before in (untouched, careless)
    )
    assert found == right
    assert found != wrong
    assert found != [1.0] * len(found)
    assert [predictions(backbone, one) for one in cases] == untouched


def test_the_curve_is_of_every_former_edit(backbone) -> None:
    cases = [case(i) for i in range(3)]
    method = Keeping(FT)
    records = recorded(backbone, method, cases, reader_of(backbone, method))
    assert [r["id"] for r in records] == [
        *(f"0/{i}/step" for i in (1, 2, 3)),
        *(f"0/{i}/final" for i in (1, 2, 3)),
    ]
    targets = [[c.probes[0].query.target] for c in cases]
    assert len({t[0] for t in targets}) == 3
    for n, step in enumerate(of_kind(records, "step"), 1):
        with compose(method.edits[:n]).applied(backbone):
            now = [predictions(backbone, one)[0] for one in cases[:n]]
        goal = [encode_queries(backbone, [one.probes[0].query]).labels for one in cases[:n]]
        right = [share(a, g[g != -100].tolist()) for a, g in zip(now, goal, strict=True)]
        assert afters(step)["reliability"] == right[-1]
        assert step["former_cases"] == n - 1
        if n > 1:
            assert step["former"]["reliability"] == pytest.approx(sum(right[:-1]) / (n - 1))
    last, finals = of_kind(records, "step")[-1], of_kind(records, "final")
    assert afters(last) == afters(finals[-1])
    for metric, mean in last["former"].items():
        assert mean == pytest.approx(sum(afters(f)[metric] for f in finals[:-1]) / 2)


def test_the_curve_may_be_thinned_out(backbone) -> None:
    cases = [case(i) for i in range(4)]
    method = build(HyperParams.from_dict(FT))

    def run(former: int | None, seed: int = 0) -> list[dict[str, Any]]:
        return recorded(backbone, method, cases, reader_of(backbone, method), 0, former, seed)

    whole, thin, none = run(None), run(1), run(0)
    assert [r["former_cases"] for r in of_kind(whole, "step")] == [0, 1, 2, 3]
    assert [r["former_cases"] for r in of_kind(thin, "step")] == [0, 1, 1, 1]
    assert [r["former"] for r in of_kind(none, "step")] == [{}] * 4
    assert [afters(r) for r in of_kind(thin, "final")] == [afters(r) for r in of_kind(whole, "final")]
    assert [r.get("former") for r in thin] == [r.get("former") for r in run(1)]


def test_the_order_matters_for_fine_tuning(backbone) -> None:
    cases = [case(i) for i in range(3)]
    method = build(HyperParams.from_dict(FT))
    there, back = (
        of_kind(recorded(backbone, method, order, reader_of(backbone, method)), "final")
        for order in (cases, cases[::-1])
    )
    assert [r["case"] for r in there] == [r["case"] for r in back][::-1]
    assert [afters(r) for r in there] != [afters(r) for r in back][::-1]


def test_readings_do_not_depend_on_how_many_cases_are_asked_at_once(backbone) -> None:
    cases = [case(i) for i in range(3)]
    method = build(HyperParams.from_dict(SCOPED))
    found = []
    for batch in (1, 10, 100):
        reader = reader_of(backbone, method)
        reader.prefixes.batch = batch
        finals = of_kind(recorded(backbone, method, cases, reader), "final")
        found.append([(r["scores"], r["answers"]) for r in finals])
    assert found[0] == found[1] == found[2]


def test_a_failed_edit_is_rolled_back_and_the_sequence_goes_on(backbone) -> None:
    cases = [case(i) for i in range(3)]
    weights = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    for values in (UNIKE, FT):
        method, without = Keeping(values, broken=("e1",)), Keeping(values)
        records = recorded(backbone, method, cases, reader_of(backbone, method))
        rest = recorded(backbone, without, cases[::2], reader_of(backbone, without))
        assert [r["status"] for r in records] == ["ok", "failed", "ok"] * 2
        assert all("scores" not in r for r in records if r["status"] == "failed")
        assert "nan" in records[1]["error"]
        good = [r for r in records if r["status"] == "ok"]
        assert [afters(r) for r in good] == [afters(r) for r in rest]
        assert [r.get("former") for r in good] == [r.get("former") for r in rest]
    assert all(torch.equal(v, backbone.model.state_dict()[k]) for k, v in weights.items())


def test_an_edit_comes_with_its_step(backbone) -> None:
    method = Keeping(FT, broken=("e1",))
    outcomes = list(run_sequence(backbone, method, [case(i) for i in range(3)], reader_of(backbone, method)))
    assert [o.edit for o in outcomes] == [method.edits[0], None, method.edits[1], None, None, None]


def test_a_sequence_in_which_all_fails(backbone) -> None:
    method = Keeping(FT, broken=("e0", "e1"))
    records = recorded(backbone, method, [case(0), case(1)], reader_of(backbone, method))
    assert [r["status"] for r in records] == ["failed"] * 4
    summary = summarise(as_records(records), 0)
    assert (summary["n"], summary["failed"], summary["metrics"]) == (0, 2, {})
    assert "2 failed" in as_text(summary_table(summary, "x"))


def test_a_picture_that_cannot_be_read(backbone, tmp_path: Path) -> None:
    lost = case(1)
    asked = Query(str(tmp_path / "lost.png"), "what?", "a fox")
    lost = Case(EditRequest("e1", asked), (Probe("reliability", asked, "target"),))
    method = build(HyperParams.from_dict(FT))
    cases = [case(0), lost, case(2)]
    with pytest.raises(UserError, match=r"lost\.png"):
        recorded(backbone, method, cases, reader_of(backbone, method))
    records = recorded(backbone, method, cases, reader_of(backbone, method), tolerated=(UserError,))
    assert [r["status"] for r in records] == ["ok", "failed", "ok"] * 2


def test_nothing_is_drawn_twice_before_all_is_drawn_once() -> None:
    cases = [case(i) for i in range(7)]
    drawn = draw_sequences(cases, 3, 5, seed=1)
    assert [len({c.request.id for c in one}) for one in drawn] == [3] * 5
    flat = [c.request.id for one in drawn for c in one]
    assert len(set(flat[:6])) == 6
    assert len(set(flat[:9])) == 7
    assert max(map(flat.count, flat)) <= 3
    assert draw_sequences(cases, 3, 5, seed=1) == drawn
    assert draw_sequences(cases, 3, 5, seed=2) != drawn
    with pytest.raises(UserError, match="sequence_length: 8; the data hold 7 records"):
        draw_sequences(cases, 8, 1, seed=1)


def test_a_cross_task_sequence_is_half_of_each_task() -> None:
    cases = [case(i, "vqa" if i % 2 else "caption") for i in range(14)]
    drawn = draw_cross_task(cases, 10, 4, seed=1)
    for one in drawn:
        assert sorted(c.task for c in one) == ["caption"] * 5 + ["vqa"] * 5
        assert len({c.request.id for c in one}) == 10
    assert any([c.task for c in one] != sorted(c.task for c in one) for one in drawn)
    assert draw_cross_task(cases, 10, 4, seed=1) == drawn
    with pytest.raises(UserError, match="even number"):
        draw_cross_task(cases, 9, 1, seed=1)
    with pytest.raises(UserError, match="needs 8 vqa records, the data hold 7"):
        draw_cross_task(cases, 16, 1, seed=1)


# ---------------------------------------------------------------- whole runs


SEQUENCE = ("--protocol", "sequential", "--sequence_length", "2", "--sequences", "2", "max_steps=8")


def without_costs(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in COSTS} for record in records]


def test_a_run_of_sequences(copied: Project, capsys: pytest.CaptureFixture[str]) -> None:
    output = copied.root / "run"
    assert start(copied, *SEQUENCE, "--output", str(output), "metric_presets=[paper,easyedit]") == 0
    shown = capsys.readouterr().out
    assert "4 records, 2 sequences of 2 edits" in shown
    assert "M-Locality, easyedit" in shown
    records = read_lines(output)
    assert [r["id"] for r in records] == [
        f"{s}/{i}/{kind}" for s in (0, 1) for kind in ("step", "final") for i in (1, 2)
    ]
    assert len({r["case"] for r in records}) == 4
    summary = json.loads((output / "summary.json").read_text())
    assert summary["sequences"] == {"n": 2, "length": 2}
    assert [point["edits"] for point in summary["curve"]] == [1, 2]
    assert summary["curve"][0]["former"] == {}
    assert set(summary["curve"][1]["former"]) == set(summary["curve"][1]["newest"])
    assert "EasyEdit" in summary["presets"]["easyedit"]["provenance"]
    forced = summary["metrics"]["m_locality"]["teacher_forced"]["after"]
    assert summary["presets"]["paper"]["metrics"]["m_locality"] == forced
    # Two sequences are two draws: an interval cannot leave what they have.
    means = [
        50 * sum(afters(r)["m_locality"] for r in of_kind(records, "final") if r["sequence"] == s)
        for s in (0, 1)
    ]
    assert min(means) - 1e-9 <= forced["low"] <= forced["high"] <= max(means) + 1e-9
    assert set(summary["base_right"]["generated"]) == {"t_locality", "m_locality"}
    assert set(summary["fluency"]) == {"before", "after", "n", "source"}
    assert summary["bytes"] == records[-1]["bytes"] > records[0]["bytes"]


def test_a_run_of_sequences_resumes(copied: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from unike.runs import sequences

    whole, part = copied.root / "whole", copied.root / "part"
    tuned = (*SEQUENCE, "method=ft", "layers=1")
    assert start(copied, *tuned, "--output", str(whole)) == 0
    calls: list[int] = []

    def stopping(*args: Any):
        for outcome in run_sequence(*args):
            calls.append(args[4])
            if len(calls) == 6:
                raise KeyboardInterrupt
            yield outcome

    with monkeypatch.context() as patched:
        patched.setattr(sequences, "run_sequence", stopping)
        assert start(copied, *tuned, "--output", str(part)) == 130
        former = (part / "records.jsonl").read_bytes()
        assert len(read_lines(part)) == 5
        assert json.loads((part / "summary.json").read_text())["interrupted"]
        calls[:] = [0] * 6
        assert start(copied, *tuned, "--output", str(part), "--resume") == 0
        # The finished sequence is not edited again, the broken one is from its start.
        assert calls[6:] == [1] * 4
    assert (part / "records.jsonl").read_bytes().startswith(former)
    assert without_costs(read_lines(part)) == without_costs(read_lines(whole))
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (part, whole))
    for summary in (ours, theirs):
        assert summary["costs"].pop("seconds")["mean"] == summary.pop("seconds")
        assert summary.pop("peak_memory_bytes")["resident"] > 0
    assert ours == theirs


def test_a_cross_task_run(copied: Project) -> None:
    output = copied.root / "run"
    options = ("--protocol", "cross_task", "--sequence_length", "4", "--sequences", "1", "--no_generated")
    assert start(copied, *options, "--output", str(output), "method=ft", "layers=1") == 0
    finals = of_kind(read_lines(output), "final")
    assert sorted(r["task"] for r in finals) == ["caption"] * 2 + ["vqa"] * 2
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["n"], summary["fluency"], summary["sequences"]["n"]) == (4, None, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--protocol", "sequential", "--sequence_length", "9"),
            "sequence_length: 9; the data hold 4 records",
        ),
        (
            ("--protocol", "cross_task", "--sequence_length", "3"),
            "sequence_length: 3; expected an even number",
        ),
        (
            ("--protocol", "cross_task", "--sequence_length", "4", "--task", "vqa"),
            "needs 2 caption records, the data hold 0",
        ),
        (("--protocol", "twice"), "protocol: expected one of one_step, sequential, cross_task"),
        (("--sequence_length", "0"), "sequence_length: expected a whole number at least 1"),
        (("metric_presets=[paper,ours]",), "metric_presets: expected a list of different names out of paper"),
    ],
)
def test_bad_input(
    copied: Project,
    nothing_loads: None,
    capsys: pytest.CaptureFixture[str],
    options,
    message,
) -> None:
    assert start(copied, *options, "--output", str(copied.root / "run")) == 2
    assert message in "\n".join(errors(capsys))


def test_runs_of_protocols_have_their_own_folders(copied: Project) -> None:
    from unike import runs

    hparams = HyperParams.from_hparams(copied.yaml, ["protocol=sequential"])
    assert runs.choose_directory(hparams, "vqa").name == "small-vqa-sequential"
