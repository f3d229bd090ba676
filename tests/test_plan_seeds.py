"""Seeds of the whole pipeline and tuned options: properties of a plan, and what is pooled of their runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import Project

from scripts import plan, tables, workers
from scripts.plan import read_plan
from scripts.plan_file import read_plan_file
from unike.evaluation.summary import summarise
from unike.types import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
FT = {"name": "FT", "yaml": "{backbone}.yaml", "set": {"method": "ft", "layers": 1}}
INTRIN = {"name": "only Intrin", "yaml": "{backbone}.yaml", "set": {"external": "none", "zeta": "none"}}
TABLE = {"title": "One-step", "protocol": "one_step", "rows": [FT, INTRIN]}


def write_plan(project: Project, table: dict[str, Any] | None = None, **parts: Any) -> Path:
    """A plan with seeds, whose data are the project's own for each of them."""
    data = {
        "vqa": {"train": str(project.data / "vqa_train.json"), "eval": str(project.data / "vqa_eval.json")}
    }
    drawn = {"seed": "{seed}", "data": data, "results_dir": "runs/{family}-{backbone}-{seed}"}
    path = project.root / "plan.yaml"
    content = {"benchmark": {"seeds": [43, 44], "set": drawn}, "tables": {"1": TABLE | (table or {})}} | parts
    path.write_text(yaml.safe_dump(content))
    project.write_yaml(generate_data=True)
    return path


def read(project: Project, path: Path, **more: Any) -> list[plan.Run]:
    return read_plan(path, backbones=["small"], output=project.root / "out", **more)


def refuse(project: Project, path: Path, **more: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(project, path, **more)
    return list(caught.value.problems)


def test_a_row_is_a_run_for_each_seed_and_the_seed_is_filled_in(copied: Project) -> None:
    runs = read(copied, write_plan(copied))
    assert [(r.row.name, r.seed, r.hparams.seed) for r in runs] == [
        (name, seed, seed) for name in ("FT", "only Intrin") for seed in (43, 44)
    ]
    assert runs[0].hparams.results_dir == "runs/blip2-small-43"
    assert len({r.folder for r in runs}) == 4
    assert runs[1].name.endswith("FT, seed 44")
    assert {r.seed for r in read(copied, write_plan(copied), seeds=[44])} == {44}
    assert {r.seed for r in read(copied, write_plan(copied, {"seeds": [43]}))} == {43}


def test_a_model_with_data_of_its_own_is_run_once(copied: Project) -> None:
    path = write_plan(copied)
    copied.write_yaml()
    runs = read(copied, path)
    assert [(r.row.name, r.seed) for r in runs] == [("FT", None), ("only Intrin", None)]
    assert {r.hparams.seed for r in runs} == {42}


@pytest.mark.parametrize(
    ("parts", "needle"),
    [
        ({"benchmark": {"seeds": [1, 1], "set": {"seed": 1}}}, "benchmark: seeds: 1: named twice"),
        ({"benchmark": {"seeds": ["x"], "set": {"seed": 1}}}, "seeds: x; expected whole numbers"),
        ({"benchmark": {"seeds": [1]}}, "benchmark: set: missing"),
        ({"benchmark": {"seeds": [1], "set": {"name": "{sed}"}}}, "'sed': unknown; expected {seed}"),
        ({"tuned": [1]}, "tuned: expected options by name, then by backbone"),
        ({"benchmarks": {}}, "benchmarks: unknown; expected tables, figures, benchmark, tuned"),
    ],
)
def test_a_bad_part_is_one_line(copied: Project, parts: dict[str, Any], needle: str) -> None:
    (line,) = refuse(copied, write_plan(copied, **parts))
    assert needle in line


def test_unknown_seeds_tuned_options_and_averages_are_named(copied: Project) -> None:
    path = write_plan(copied)
    assert refuse(copied, path, seeds=[45]) == [f"--seeds: 45: not in {path}; expected of 43, 44"]
    assert "seeds: 7; the benchmark's are 43, 44" in refuse(copied, write_plan(copied, {"seeds": [7]}))[0]
    row = FT | {"tuned": "fft"}
    (line,) = refuse(copied, write_plan(copied, {"rows": [row]}, tuned={"ft": {}}))
    assert line.endswith("1: FT: tuned: fft; expected ft")
    more = {"tables": {"1": TABLE, "5": {"title": "Means", "averages": ["2"]}}}
    (line,) = refuse(copied, write_plan(copied, **more))
    assert "5: averages: 2; expected a table with rows of its own" in line


def test_tuned_options_come_after_the_tables_and_before_the_rows_own(copied: Project) -> None:
    rows = [FT | {"tuned": "ft"}, FT | {"name": "own", "tuned": "ft", "set": FT["set"] | {"lr": 0.5}}]
    tuned = {"ft": {"small": {"lr": 0.25}, "other": {"lr": 0.125}}}
    path = write_plan(copied, {"rows": rows, "set": {"lr": 0.0625}}, tuned=tuned)
    assert {r.row.name: r.hparams.lr for r in read(copied, path)} == {"FT": 0.25, "own": 0.5}
    tuned = {"ft": {"other": {"lr": 0.125}}}
    path = write_plan(copied, {"rows": rows, "set": {"lr": 0.0625}}, tuned=tuned)
    assert {r.row.name: r.hparams.lr for r in read(copied, path)} == {"FT": 0.0625, "own": 0.5}
    tuned = {"ft": {"small": {"lr": 0.25, "max_steps": 3}}, "gate": {"small": {"lr": 0.75}}}
    path = write_plan(copied, {"rows": [FT | {"tuned": ["ft", "gate"]}]}, tuned=tuned)
    assert {(r.hparams.lr, r.hparams.max_steps) for r in read(copied, path)} == {(0.75, 3)}
    (line,) = refuse(copied, write_plan(copied, {"rows": [FT | {"tuned": ["ft", "gaet"]}]}, tuned=tuned))
    assert line.endswith("tuned: gaet; expected ft, gate")


def test_what_the_plan_draws_is_where_the_benchmark_puts_it(copied: Project) -> None:
    path = write_plan(copied)
    content = yaml.safe_load(path.read_text())
    root = "drawn/{family}-{seed}"
    names = {"train": "vqa_train.json", "eval": "vqa_eval.json", "probes": "vqa_eval.probes.json"}
    content["benchmark"]["set"] |= {
        "image_root": root,
        "data": {"vqa": {key: f"./{root}/{name}" for key, name in names.items()}},
    }
    path.write_text(yaml.safe_dump(content))
    run = read(copied, path)[0]
    assert run.is_drawn
    assert run.hparams.data["vqa"]["probes"] == "./drawn/blip2-43/vqa_eval.probes.json"
    for file in ("eval", "probes"):
        assert not read(copied, path, overrides=[f"data.vqa.{file}=elsewhere.json"])[0].is_drawn


def test_the_plan_draws_what_is_missing(copied: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_plan(copied)
    content = yaml.safe_load(path.read_text())
    root = str(copied.root / "drawn-{seed}")
    content["benchmark"]["set"] |= {"image_root": root, "data": {"vqa": {"eval": f"{root}/vqa_eval.json"}}}
    path.write_text(yaml.safe_dump(content))
    asked: list[str | None] = []

    def draw(run: plan.Run) -> None:
        asked.append(run.hparams.image_root)

    monkeypatch.setattr(workers, "_draw", draw)
    with pytest.raises(UserError, match="no such file"):
        workers.check_inputs(read(copied, path))
    assert set(asked) == {str(copied.root / f"drawn-{seed}") for seed in (43, 44)}


def test_runs_of_several_seeds_are_pooled_and_shown(copied: Project, capsys) -> None:
    path = write_plan(copied, tables={"1": TABLE, "5": {"title": "Means", "averages": ["1"]}})
    more = ["--backbones", "small", "--plan", str(path), "--output", str(copied.root / "out")]
    assert tables.main(["--table", "1", "5", "--size", "2", "--jobs", "1", *more]) == 0
    shown = capsys.readouterr().out
    assert "one edit, seeds 43, 44" in shown
    assert "By seed (43, 44), teacher-forced" in shown
    assert "## Table 5: Means" in shown
    runs = [r for r in read(copied, path, size=2, tables=["1"]) if r.row.name == "FT"]
    pool = plan.pool_runs(runs)
    assert pool.complete
    assert pool.strata == [43, 43, 44, 44]
    assert sorted(pool.by_seed) == [43, 44]
    means = [s["metrics"]["m_locality"]["teacher_forced"]["after"]["mean"] for s in pool.by_seed.values()]
    pooled = pool.summary["metrics"]["m_locality"]["teacher_forced"]["after"]
    assert pooled["n"] == 4
    assert pooled["mean"] == pytest.approx(sum(means) / 2)
    own = summarise(pool.records[:2], 43, runs[0].hparams.metric_presets)
    assert own["metrics"] == pool.by_seed[43]["metrics"]
    assert plan.pool_runs(runs[:1]).strata is None
    assert tables.main(["--table", "1", "--size", "2", "--jobs", "1", *more, "--seeds", "43"]) == 0
    assert "one edit, seed 43\n" in capsys.readouterr().out
    assert tables.main(["--table", "1", *more, "--seeds", "x"]) == 2
    assert "--seeds: x; expected whole numbers" in capsys.readouterr().err


def test_version_1_stays_a_plan_without_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    whole = read_plan_file(Path("hparams/tables_v1.yaml"))
    assert whole.benchmark is None
    runs = read_plan(Path("hparams/tables_v1.yaml"), ["all"])
    assert {r.table for r in runs} == {"1", "2", "3", "4", "5", "lifelong"}
    assert {(r.seed, r.hparams.seed, r.hparams.benchmark_version) for r in runs} == {(None, 42, 1)}
