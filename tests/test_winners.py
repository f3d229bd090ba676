"""What was tuned is what the tables run, and the page of tuning says what the logs hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from scripts import winners
from scripts.plan import BACKBONES, read_plan
from scripts.tuning import read_tuning
from unike.config.hparams import HyperParams
from unike.types import UserError

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "docs" / "tuning"


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


def read_scores(method: str, backbone: str) -> list[dict]:
    path = LOGS / f"{backbone}-{method}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_tables_run_the_best_of_each_methods_trials() -> None:
    tuned = yaml.safe_load((ROOT / "hparams/tables.yaml").read_text("utf-8"))["tuned"]
    plan = read_tuning(Path("hparams/tuning.yaml"))
    for method in plan.methods:
        for backbone in BACKBONES:
            entries = read_scores(method, backbone)
            assert len({json.dumps(e["options"], sort_keys=True) for e in entries}) == plan.trials
            best = sorted(entries, key=lambda e: -(e["score"] or 0))[0]
            assert tuned[method][backbone] == best["options"], (method, backbone)
    for backbone in BACKBONES:
        own = {k: v for k, v in tuned["scoped"][backbone].items() if k.startswith("scope_")}
        assert tuned["gate"][backbone] == own


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_shipped_gate_is_the_row_of_the_tables(backbone: str) -> None:
    """Who runs ``scoped/`` gets what the first page calls UniKE + scope gate. Zeta with a beta of 0 is none;
    the classifier reads the first edited layer, which the tables name."""
    named = [r for r in read_plan(tables=["1"], backbones=[backbone]) if r.row.name == "UniKE + scope gate"]
    shipped = HyperParams.from_hparams(f"hparams/scoped/{backbone}.yaml")
    of_tables = {"answer_end", "eval_batch", "batch_invariant", "benchmark_version", "metric_presets"}
    places = {"image_root", "data", "knowledge_dir", "scope_dir", "editor_dir", "seed"}
    row, own = named[0].hparams.to_dict(), shipped.to_dict()
    differing = {k for k in row if row[k] != own[k]} - of_tables - places
    assert differing == {"zeta", "beta", "scope_layer"}
    assert (row["zeta"], row["beta"], own["zeta"]) == ("truthfulness", 0.0, "none")
    assert row["scope_layer"] == 4


def test_zeta_can_show_where_it_is_compared() -> None:
    """The tuned beta of the gate, and of UniKE on one model, is 0, with which rows of any zeta are one row:
    where zeta is what a table compares, they have the preset's."""
    tuned = yaml.safe_load((ROOT / "hparams/tables.yaml").read_text("utf-8"))["tuned"]
    assert {tuned["scoped"][backbone]["beta"] for backbone in BACKBONES} == {0.0}
    assert 0.0 in {tuned["unike"][backbone]["beta"] for backbone in BACKBONES}
    compared = {"collaboration": 8, "4": 5, "figure4b": 6}
    for table, count in compared.items():
        runs = [r for r in read_plan(tables=[table]) if r.hparams.method == "unike"]
        rows = {r.row.name for r in runs if not r.row.yaml.startswith("scoped/")}
        assert len(rows) >= count
        assert all(r.hparams.beta > 0 for r in runs if r.row.name in rows), table


def test_the_page_says_what_the_logs_hold(tmp_path: Path) -> None:
    page = ROOT / "docs/results/tuning.md"
    copy = tmp_path / "tuning.md"
    copy.write_text(page.read_text("utf-8").replace("| ke |", "| k |"), encoding="utf-8")
    assert winners.main(["--write", str(copy)]) == 0
    assert copy.read_text("utf-8") == page.read_text("utf-8")
    best = max(read_scores("ke", "tiny_blip2"), key=lambda e: e["score"])
    shown = f"| ke | tiny_blip2 | {best['records']} | {best['hm5']['teacher_forced']:.1f}, "
    assert shown in copy.read_text("utf-8")


def test_the_first_of_equal_trials_wins_and_a_failed_one_never() -> None:
    trials = [
        {"score": None},
        {"score": 1.0, "trial": 2},
        {"score": 3.0, "trial": 3},
        {"score": 3.0, "trial": 4},
    ]
    assert winners.find_winner(trials) == {"score": 3.0, "trial": 3}
    assert winners.find_winner(trials[:1]) is None
    assert winners.find_winner([]) is None


def test_a_method_that_was_tuned_less_is_refused(tmp_path: Path) -> None:
    for path in LOGS.glob("*.jsonl"):
        lines = path.read_text("utf-8").splitlines(keepends=True)
        cut = -1 if path.name == "tiny_blip2-ft.jsonl" else None
        (tmp_path / path.name).write_text("".join(lines[:cut]), encoding="utf-8")
    with pytest.raises(UserError, match=r"tiny_blip2-ft\.jsonl: 4 trials; expected 5$"):
        winners.find_winners(tmp_path)
    (tmp_path / "tiny_blip2-ft.jsonl").unlink()
    found = winners.find_winners(tmp_path)
    assert ("ft", "tiny_blip2") not in found
    assert ("ft", "tiny_minigpt4") in found


def test_a_page_without_the_table_s_place_is_refused(tmp_path: Path, capsys) -> None:
    assert winners.main(["--write", str(tmp_path / "none.md")]) == 2
    assert capsys.readouterr().err.strip().endswith("none.md: no such file")
    (tmp_path / "page.md").write_text("# A page\n")
    assert winners.main(["--write", str(tmp_path / "page.md")]) == 2
    assert "expected <!-- table winners -->" in capsys.readouterr().err
