"""Summaries and tables of hand-made records."""

import json

import pytest
from finished_runs import as_records

from unike.evaluation.metrics import bootstrap_interval, ngram_entropy
from unike.evaluation.record import Record, Score
from unike.evaluation.summary import summarise
from unike.report.terminal import as_text, summary_table
from unike.types import FIVE_METRICS, METRICS


def record(number, value, metrics=METRICS, **more):
    forced = {metric: {"before": 0.0, "after": value} for metric in metrics}
    generated = {metric: {"before": 0.0, "after": float(value == 1)} for metric in metrics}
    scores = {"teacher_forced": forced, "generated": generated}
    return {"id": str(number), "status": "ok", "scores": scores, "steps": 10, "seconds": 0.25} | more


RECORDS = [record(0, 1.0), record(1, 0.5, steps=20), {"id": "2", "status": "failed"}]


def test_summary_values():
    summary = summarise(as_records(RECORDS), seed=1)
    assert (summary["n"], summary["failed"], summary["steps"], summary["seconds"]) == (2, 1, 15.0, 0.25)
    assert tuple(summary["metrics"]) == METRICS
    mean, low, high = bootstrap_interval([100.0, 50.0], 1)
    after = {"mean": mean, "low": low, "high": high, "n": 2}
    assert summary["metrics"]["joint"]["teacher_forced"]["after"] == after
    assert summary["metrics"]["reliability"]["generated"]["after"]["mean"] == 50.0
    assert summary["metrics"]["reliability"]["generated"]["before"]["mean"] == 0.0
    mean, low, high = bootstrap_interval([10.0, 20.0], 1)
    assert summary["costs"]["steps"] == {"mean": mean, "low": low, "high": high}
    assert summary["costs"]["seconds"] == {"mean": 0.25, "low": 0.25, "high": 0.25}
    assert json.loads(json.dumps(summary)) == summary
    assert summarise(as_records(RECORDS), seed=1) == summary


def test_what_stands_beside_the_metrics():
    more = {
        "bytes": 8,
        "presets": {"easyedit": {"m_locality": 0.5}},
        "base_right": {"teacher_forced": {"m_locality": 1.0}},
        "answers": {
            "joint": {"prompt": None, "target": None, "before": "a dog", "after": "a red dog and a red cat"}
        },
    }
    records = [record(0, 1.0, **more), record(1, 0.5, bytes=16), {"id": "2", "status": "failed"}]
    summary = summarise(as_records(records), 1, ("paper", "easyedit"))
    means = summary["harmonic_mean"]["teacher_forced"]
    assert set(means) == {"five", "all"}
    assert means["five"]["before"]["mean"] == 0.0
    assert means["five"]["after"]["mean"] == pytest.approx(75.0)
    assert means["five"]["after"]["low"] == pytest.approx(50.0)
    assert means["five"]["after"]["high"] == pytest.approx(100.0)
    assert summary["bytes"] == 12.0
    assert summary["base_right"]["teacher_forced"]["m_locality"]["mean"] == 100.0
    assert summary["presets"]["easyedit"]["metrics"] == {
        "m_locality": {"mean": 50.0, "low": 50.0, "high": 50.0, "n": 1}
    }
    assert summary["presets"]["paper"]["metrics"]["joint"]["mean"] == 75.0
    assert summary["fluency"]["before"] == 0.0
    assert summary["fluency"]["after"] == pytest.approx(ngram_entropy("a red dog and a red cat"))
    assert "ROME" in summary["fluency"]["source"]
    assert json.loads(json.dumps(summary)) == summary
    text = as_text(summary_table(summary, "x"))
    assert "M-Locality, easyedit" in text
    titles = ("harmonic mean of 5", "harmonic mean of all 8")
    rows = {t: row.split(t)[1].split()[:3] for t in titles for row in text.splitlines() if t in row}
    assert rows == {title: ["0.0", "/", "0.0"] for title in titles}


def test_sequences_are_resampled_whole():
    """Two sequences, one all right and one all wrong: the interval knows of two draws, not of ten."""
    place = {"kind": "final", "position": 1}
    records = [record(i, float(i < 5), sequence=int(i < 5), **place) for i in range(10)]
    records += [record(10, 1.0, sequence=0, position=1, kind="step", former={})]
    after = summarise(as_records(records), seed=1)["metrics"]["joint"]["teacher_forced"]["after"]
    assert (after["mean"], after["low"], after["high"], after["n"]) == (50.0, 0.0, 100.0, 10)
    steps = summarise(as_records([{**r, "steps": 20 * r["sequence"]} for r in records]), 1)["costs"]["steps"]
    assert (steps["mean"], steps["low"], steps["high"]) == (10.0, 0.0, 20.0)
    alone = summarise(as_records([{**r, "sequence": 0} for r in records]), seed=1)
    after = alone["metrics"]["joint"]["teacher_forced"]["after"]
    assert 0.0 < after["low"] < 50.0 < after["high"] < 100.0


def test_what_is_missing_is_not_counted():
    sparse = as_records([record(0, 1.0)])
    sparse.append(Record("1", scores={"teacher_forced": {"reliability": Score(None, 0.0)}}))
    sparse.append(Record("3", scores={"teacher_forced": {"own": Score(None, 1.0)}}))
    summary = summarise(sparse, seed=0)
    assert summary["metrics"]["reliability"]["teacher_forced"]["after"]["n"] == 2
    assert summary["metrics"]["reliability"]["teacher_forced"]["before"]["n"] == 1
    assert list(summary["metrics"]["own"]) == ["teacher_forced"]
    assert list(summary["metrics"]["own"]["teacher_forced"]) == ["after"]
    assert "own" in as_text(summary_table(summary, "x"))


def test_no_records():
    summary = summarise([], seed=0)
    assert (summary["n"], summary["metrics"], summary["seconds"]) == (0, {}, None)
    assert "0 records" in as_text(summary_table(summary, "empty"))


@pytest.mark.parametrize("width", [80, 100])
def test_summary_table_is_plain(width):
    text = as_text(
        summary_table(summarise(as_records(RECORDS), seed=1), "UniKE [bold]on[/bold] [tiny]"), width
    )
    rows = text.splitlines()
    assert max(map(len, rows)) <= width
    assert "\x1b" not in text
    assert "…" not in text
    assert "UniKE [bold]on[/bold] [tiny]" in text
    reliability = next(row for row in rows if "Reliability" in row)
    assert reliability.split("  ")[1] == "Reliability"
    assert "0.0 / 0.0" in reliability
    assert "75.0 [50.0, 100.0]" in reliability
    assert "50.0 [0.0, 100.0]" in reliability
    assert rows[-1].strip() == "2 records, 1 failed, 0.25 s per edit, 15.0 steps per edit"
    peak = {"peak_memory_bytes": {"resident": 3 << 29, "device": None}}
    whole = summarise(as_records(RECORDS), seed=1) | peak
    with_peak = as_text(summary_table(whole, "peak"), width).splitlines()
    assert with_peak[-1].strip() == f"{rows[-1].strip()}, 1.50 GiB at most"
    order = [
        next(i for i, row in enumerate(rows) if title in row) for title in ("M-Locality", "same question")
    ]
    assert order == sorted(order)


def test_hard_probes_only_if_present():
    summary = summarise(as_records([record(0, 1.0, FIVE_METRICS)]), seed=1)
    text = as_text(summary_table(summary, "five"))
    assert "M-Locality" in text
    assert "joint" not in text
