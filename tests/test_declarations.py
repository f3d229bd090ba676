"""Metrics that a dataset declares: what is checked, and that tables, comparisons and reports show them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import record

from unike.datasets import declarations
from unike.datasets.declarations import (
    MetricDeclaration,
    declare_metric,
    describe_declared,
    find_metric,
    get_expectation,
    list_metrics,
)
from unike.datasets.mmedit import VQADataset
from unike.evaluation.record import Record
from unike.evaluation.summary import TITLES, order_metrics, summarise
from unike.report.measures import MEASURE_TITLES, Row, compare_rows
from unike.report.paper.tables import Block, markdown
from unike.runs.records import read_manifest
from unike.types import FURTHER_METRICS, METRICS, UserError

OWN = MetricDeclaration("alias_recall", "recall of aliases", "alias", "target", "portability", "a test")


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declarations, "_DECLARED", dict(declarations._DECLARED))


def test_every_metric_of_ours_is_declared_in_the_tables_order() -> None:
    names = [metric.name for metric in list_metrics()]
    assert tuple(names[: len(METRICS)]) == METRICS
    assert set(FURTHER_METRICS) < set(names)
    assert len(names) == len(set(names))
    assert all(metric.source for metric in list_metrics())
    for group, name in (
        ("generality", "joint"),
        ("locality", "minimal_pair"),
        ("portability", "portability_2_hop"),
    ):
        assert find_metric(name).group == group
    assert get_expectation("t_locality") == "unchanged"
    assert get_expectation("m_generality_dark") == "target"


def test_a_declared_metric_is_known_from_then_on() -> None:
    assert find_metric(OWN.name) is None
    assert OWN.name not in TITLES
    assert order_metrics(["joint", "zzz", OWN.name]) == ["joint", OWN.name, "zzz"]
    declare_metric(OWN)
    declare_metric(OWN)
    assert TITLES[OWN.name] == "recall of aliases"
    assert MEASURE_TITLES[OWN.name] == "alias"
    assert MEASURE_TITLES["same_question"] == "same Q (far)"
    assert len(TITLES) == len(list(TITLES))
    assert order_metrics(["aaa", OWN.name, "joint"]) == ["joint", OWN.name, "aaa"]
    with pytest.raises(UserError, match=r"'alias_recall': is declared already"):
        declare_metric(replace(OWN, expect="unchanged"))
    with pytest.raises(UserError, match="'joint': is declared already"):
        declare_metric(replace(OWN, name="joint"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "a b"}, "expected a name of letters"),
        ({"name": "x" * 61}, "expected a name of letters"),
        ({"title": " "}, "title: expected a text"),
        ({"short": 3}, "short: expected a text"),
        ({"expect": "kept"}, "expect: expected target or unchanged, got 'kept'"),
        (
            {"group": "other"},
            "group: expected reliability, generality, locality, portability, consistency, got 'other'",
        ),
        ({"source": None}, "source: expected a text"),
    ],
)
def test_a_wrong_declaration_names_its_field(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(OWN, **changed)
    assert any(said in problem for problem in caught.value.problems)


def write_probes(folder: Path, metrics: object, name: str = OWN.name) -> tuple[Path, Path]:
    path, probes = folder / "vqa.json", folder / "vqa.probes.json"
    path.write_text(json.dumps([record(0)]), encoding="utf-8")
    probe = {"text": "what else?", "form": "question", "image": None, "answer": "a thing"}
    whole = {
        "layout": "unike probes 1",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "records": [{"probes": {name: probe}, "groups": {}}],
    }
    probes.write_text(json.dumps(whole | ({} if metrics is None else {"metrics": metrics})), encoding="utf-8")
    return path, probes


def test_a_file_of_probes_declares_metrics(tmp_path: Path) -> None:
    path, probes = write_probes(tmp_path, None)
    with pytest.raises(UserError, match=r"'alias_recall' is unknown; expected same_question.* under metrics"):
        VQADataset(path, probes=probes)
    path, probes = write_probes(tmp_path, [vars(OWN)])
    (case,) = VQADataset(path, probes=probes)
    found = next(probe for probe in case.probes if probe.name == OWN.name)
    assert (found.expect, found.query.target) == ("target", "a thing")
    assert describe_declared() == [vars(OWN)]
    for wrong in ({}, [3], [{"name": "x"}], [vars(OWN) | {"more": 1}], [vars(OWN) | {"group": "x"}]):
        path, probes = write_probes(tmp_path, wrong)
        with pytest.raises(UserError, match=r"vqa\.probes\.json: metric"):
            VQADataset(path, probes=probes)
    path, probes = write_probes(tmp_path, [], "reliability")
    with pytest.raises(UserError, match="'reliability' is unknown"):
        VQADataset(path, probes=probes)


def test_a_runs_manifest_carries_what_its_data_declared(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"metrics": [vars(OWN)]}), encoding="utf-8")
    assert read_manifest(tmp_path)["metrics"]
    assert find_metric(OWN.name) == OWN
    (tmp_path / "manifest.json").write_text(json.dumps({"metrics": 3}), encoding="utf-8")
    with pytest.raises(UserError, match="metrics: expected a list of objects"):
        read_manifest(tmp_path)


def make_row(name: str, value: float, ours: bool = False) -> Row:
    scores = {metric: {"before": 0.0, "after": value} for metric in (*METRICS, OWN.name)}
    found = {"status": "ok", "scores": {"teacher_forced": scores, "generated": scores}}
    records = [Record.from_json({"id": str(i), **found}) for i in range(10)]
    return Row(name, summarise(records, 0), records=records, ours=ours)


def test_tables_and_differences_show_declared_metrics() -> None:
    rows = (make_row("FT", 0.5), make_row("UniKE + scope gate", 1.0, True))
    block = Block("1", "a title", "tiny_blip2", "vqa", 1, rows)
    declare_metric(OWN)
    shown = markdown(block)
    assert "Declared by the data, teacher-forced" in shown
    assert "Declared by the data, generated" in shown
    assert "| method | alias |" in shown
    assert compare_rows(rows[1], rows[0], OWN.name, 0) == pytest.approx((50.0, 50.0, 50.0))
