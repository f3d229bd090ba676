"""What the figures are given: records, held-out questions and first examples, by stated rules; and the
script that draws them all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finished_runs import as_records
from helpers import Project, record

from scripts import figure_data as data
from scripts import figures as script
from scripts.plan import RowPlan, Run, read_plan
from unike.config.hparams import HyperParams
from unike.evaluation.record import Answer, Record, Score
from unike.report.paper import published
from unike.runs import inputs
from unike.runs.records import RecordWriter
from unike.types import UserError

ROOT = Path(__file__).parents[1]
PROBES = ("reliability", "t_generality", "m_generality", "t_locality", "m_locality")


# ---------------------------------------------------------------- from records to data


def scored(name: str, scores: dict[str, float], status: str = "ok") -> dict:
    both = {m: {"before": 0.0, "after": v} for m, v in scores.items()}
    return {"id": name, "status": status, "scores": {"teacher_forced": both, "generated": both}}


def planned(folder: Path, row: RowPlan, means: list[float], task: str = "vqa", **changes) -> Run:
    hparams = HyperParams(model_name="minigpt4", name="somewhere", **changes)
    with RecordWriter(folder, False, {}) as writer:
        for i, mean in enumerate(means):
            writer.write(scored(f"{task}-{i}", dict.fromkeys(PROBES, mean)))
    return Run("1", row, "minigpt4", task, 1, hparams, None, folder)


def test_an_interval_is_of_the_mean_of_the_metrics_over_records_that_did_not_fail() -> None:
    one = {"t_generality": 1.0, "m_generality": 0.5}
    other = {"t_generality": 0.0, "m_generality": 0.5}
    records = as_records([scored("a", one), scored("b", other), scored("c", one, "failed")])
    found = data.compute_interval(records, data.GENERALITY, 0)
    assert found.mean == 50.0
    assert (found.low, found.high) == (25.0, 75.0)
    with pytest.raises(UserError, match="no record"):
        data.compute_interval(records[2:], data.GENERALITY, 0)


def test_a_point_stands_beside_the_papers_own(tmp_path: Path) -> None:
    rows = [RowPlan("UniKE", "x", paper="UniKE"), RowPlan("UniKE, scoped", "x", ours=True)]
    found = data.collect_trade_off([planned(tmp_path / r.name, r, [0.5, 1.0]) for r in rows])
    first, second = found["MiniGPT-4, E-VQA"]
    told = published.read_figures("table1_one_step", "minigpt4", "vqa")["UniKE"]
    assert first.paper == (
        (told["t_locality"] + told["m_locality"]) / 2,
        (told["t_generality"] + told["m_generality"]) / 2,
    )
    assert (first.locality.mean, second.paper) == (75.0, None)


def test_a_sweep_is_in_the_order_of_its_values_with_the_adaptive_one_apart(tmp_path: Path) -> None:
    rows = [
        RowPlan("adaptive", "x"),
        RowPlan("0.3", "x", set={"alpha": 0.3}, x=0.3),
        RowPlan("0.1", "x", set={"alpha": 0.1}, x=0.1),
    ]
    swept = [planned(tmp_path / r.name, r, [m], **r.set) for r, m in zip(rows, (0.9, 0.3, 0.1), strict=True)]
    ((key, sweep),) = data.collect_sweeps(swept).items()
    assert key == ("MiniGPT-4", "E-VQA")
    assert (sweep.settings, sweep.apart, sweep.label) == (["0.1", "0.3", "adaptive"], 1, "alpha")
    assert [v.mean for v in sweep.lines["locality"]] == pytest.approx([10, 30, 90])


def test_zetas_stand_beside_the_papers(tmp_path: Path) -> None:
    row = RowPlan("no zeta", "x", set={"zeta": "none"}, paper="without")
    some = [planned(tmp_path / task, row, [0.5], task, zeta="none") for task in ("vqa", "caption")]
    panels, paper = data.collect_zetas(some)
    assert panels["MiniGPT-4, E-IC"]["locality"]["none"].mean == 50
    told = published.read_figures(published.ZETA, "minigpt4", "vqa")["without"]
    assert paper == {"MiniGPT-4, E-VQA": {group: {"none": told[group]} for group in data.MEANS}}


def test_the_shipped_plan_has_what_every_figure_shows() -> None:
    args = SimpleNamespace(
        figures=["2a", "4a", "4b", "4c", "5b"], plan=ROOT / "hparams/tables.yaml", size=None,
        backbones=["tiny_blip2"], results=Path("results"),
    )  # fmt: skip
    found = script.plan_runs(args)
    lines = {}
    for run in found["4a"]:
        if run.task == "vqa":
            lines.setdefault(run.row.line, []).append(run.row.x)
    assert lines["Latent-IKE"] == [8, 16, 24, 32, 40]
    assert lines["IKE"] == [8, 16, 24, 32, 40]
    latent = [r for r in found["4a"] if r.row.line == "Latent-IKE"]
    assert all(r.hparams.intrinsic and r.hparams.zeta == "none" for r in latent)
    assert all(r.hparams.ike_patches for r in found["4a"] if r not in latent)
    assert {r.hparams.alpha for r in found["4b"]} == {0.0, 0.1, 0.3, 0.5, 0.7, "adaptive"}
    assert {r.row.name for r in found["2a"]} >= {"T-Patcher", "IKE", "TP + IKE", "UniKE"}
    assert {r.hparams.zeta for r in found["4c"]} == {"none", "random", "semantic", "truthfulness"}
    assert {r.row.name for r in found["5b"]} == set(script.VARIANTS)
    both = {r.folder for r in found["4c"]} & {r.folder for r in found["5b"]}
    assert both, "the same run of two figures is run once"


def test_neighbours_are_those_of_a_slow_count() -> None:
    torch.manual_seed(0)
    right, wrong = torch.randn(9, 5), torch.randn(9, 5) + 0.5
    points = torch.nn.functional.normalize(torch.cat([right, wrong]).double(), dim=-1)
    twins, same = [], []
    for i in range(18):
        near = sorted((j for j in range(18) if j != i), key=lambda j: -float(points[i] @ points[j]))
        twins.append(near[0] == (i + 9) % 18)
        others = [j for j in near if j != (i + 9) % 18][: data.NEIGHBOURS]
        same += [(j < 9) == (i < 9) for j in others]
    expected = 100 * np.mean(twins), 100 * np.mean(same)
    assert data.count_neighbours(right, wrong) == pytest.approx(expected)


def test_an_embedding_is_the_same_for_a_seed_and_keeps_clusters_apart() -> None:
    torch.manual_seed(0)
    right, wrong = torch.randn(12, 6) + 9, torch.randn(12, 6) - 9
    first, second = (data.embed(right, wrong, 3) for _ in range(2))
    assert np.array_equal(first.right, second.right)
    gap = np.linalg.norm(first.right.mean(0) - first.wrong.mean(0))
    assert gap > np.linalg.norm(first.right - first.right.mean(0), axis=1).max()


def test_the_spaces_are_of_questions_that_the_encoders_were_not_trained_on(blip2_project: Project) -> None:
    hparams = HyperParams.from_hparams(blip2_project.yaml)
    held = {(t.query.image, t.query.prompt) for t in data.read_held_out_triplets(hparams)}
    trained = {(t.query.image, t.query.prompt) for t in inputs.read_triplets(hparams)}
    assert held
    assert not held & trained


def test_the_embedded_benchmark_has_a_val_split_for_the_spaces(copied: Project) -> None:
    copied.write_records([record(9)], split="val")
    copied.write_records([record(9, caption=True)], "caption", "val")
    drawn = HyperParams.from_dict(copied.options(generate_data=True))
    prompts = [t.query.prompt for t in data.read_held_out_triplets(drawn)]
    assert prompts == ["Question: what is number 9? Short answer:", "a photo of"]
    assert len(data.read_held_out_triplets(drawn, 1)) == 1
    others = [t.query.prompt for t in data.read_held_out_triplets(replace(drawn, generate_data=False))]
    assert prompts[0] not in others


def test_examples_are_the_first_of_the_file_and_told_as_recorded(blip2_project: Project) -> None:
    cases = inputs.open_datasets(HyperParams.from_hparams(blip2_project.yaml), "vqa")
    assert [c.request.id for c in data.choose_cases(cases, 0, 2)] == ["vqa-0", "vqa-1"]
    assert [c.request.id for c in data.choose_cases(cases, 2, 4)] == ["vqa-2", "vqa-3"]
    scores = {p.name: Score(0.0, float(p.name != "m_locality")) for p in cases[0].probes}
    answers = {p.name: Answer("what?", "new", "old", f"new {p.name}") for p in cases[0].probes}
    told = Record("vqa-0", scores={"generated": scores}, answers=answers)
    example = data.make_example(cases[0], {"scoped": told})
    assert [c.heading for c in example.panels] == ["edited", "rephrased", "image rephrased", "unrelated"]
    assert [c.after["scoped"].good for c in example.panels] == [True, True, True, False]
    assert example.panels[1].question == "which thing is number 5?"
    assert example.panels[2].after["scoped"].text == "new m_generality"
    assert example.name == f"E-VQA, vqa-0: old → {cases[0].request.query.target}"
    for broken in (Record("vqa-0", status="failed"), Record("vqa-0", scores={"teacher_forced": {}})):
        with pytest.raises(UserError, match="vqa-0 failed or has no generated"):
            data.make_example(cases[0], {"scoped": broken})


# ---------------------------------------------------------------- the script


def test_a_block_links_its_pictures_from_the_document(tmp_path: Path) -> None:
    document = tmp_path / "docs" / "results.md"
    files = [tmp_path / "docs/figures/figure2a.png", tmp_path / "docs/figures/figure2a.svg"]
    block = script.format_block("2a", script.PaperFigure({}, "n = 3"), files, document)
    assert block == "![Figure 2a](figures/figure2a.png)\n\nFigure 2a: n = 3."


def test_a_block_takes_the_place_between_its_marks_alone(tmp_path: Path) -> None:
    document = tmp_path / "results.md"
    text = "prose\n<!-- figure 2a -->\nold\n<!-- end of figure 2a -->\n<!-- table 2a -->\n"
    document.write_text(text)
    assert script.insert_blocks(document, {"2a": "new"}) == text.replace("\nold\n", "\n\nnew\n\n")
    with pytest.raises(UserError, match="expected <!-- figure 4a -->"):
        script.insert_blocks(document, {"4a": "new"})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--figures", "4c", "--backbones", "tiny_blip"], "tiny_blip.yaml: no such file"),
        (["--figures", "5a", "--backbones", "tiny_blip"], "tiny_blip.yaml: no such file"),
        (["--figures", "4c", "--write", "nowhere.md"], "nowhere.md: cannot be read"),
        (["--figures", "4c", "--plan", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--figures", "4c", "--size", "0"], "--size: 0"),
    ],
)
@pytest.mark.usefixtures("nothing_loads")
def test_bad_input_ends_with_2_before_anything_is_loaded(given, told, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert script.main(given) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert any(told in line for line in lines)


def test_an_unknown_figure_ends_with_2(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        script.main(["--figures", "9z"])
    assert ended.value.code == 2
    assert "9z" in capsys.readouterr().err


PLAN = """
tables:
  collaboration:
    title: Zeta
    protocol: one_step
    tasks: [vqa]
    rows:
      - {name: no zeta, yaml: "{backbone}.yaml", set: {zeta: none}, paper: without}
      - {name: UniKE, yaml: "{backbone}.yaml", paper: truthfulness}
figures:
  figure2a:
    title: One
    protocol: one_step
    tasks: [vqa]
    rows:
      - {name: UniKE, yaml: "{backbone}.yaml"}
      - {name: FT (last layer), yaml: "{backbone}.yaml", set: {method: ft, layers: 1}}
  figure4a:
    title: Items
    protocol: one_step
    tasks: [vqa]
    rows:
      - {name: k 1, yaml: "{backbone}.yaml", set: {k: 1}, line: UniKE, x: 1}
      - {name: k 2, yaml: "{backbone}.yaml", set: {k: 2}, line: UniKE, x: 2}
  figure4b:
    title: Alpha
    protocol: one_step
    tasks: [vqa]
    rows:
      - {name: alpha 0.5, yaml: "{backbone}.yaml", set: {alpha: 0.5}, x: 0.5}
      - {name: UniKE, yaml: "{backbone}.yaml"}
  figure5b:
    title: Examples
    protocol: one_step
    tasks: [vqa]
    rows:
      - {name: UniKE + scope gate, yaml: "{backbone}.yaml", set: {scope_gate: nearest, memory: edit}}
      - {name: UniKE, yaml: "{backbone}.yaml"}
"""


@pytest.mark.slow
def test_all_figures_are_drawn_from_runs_and_written_into_a_document(copied: Project, capsys) -> None:
    plan = copied.root / "plan.yaml"
    plan.write_text(PLAN)
    copied.write_yaml()
    document = copied.root / "results.md"
    document.write_text("".join(f"<!-- figure {n} -->\n<!-- end of figure {n} -->\n" for n in script.NAMES))
    given = ["--plan", str(plan), "--backbones", "small", "--size", "3", "--jobs", "1"]
    given += ["--results", str(copied.root / "runs"), "--output", str(copied.root / "figures")]
    given += ["--write", str(document)]
    assert script.main(given) == 0
    drawn = {p.stem for p in (copied.root / "figures").glob("*.png")}
    names = ("2a", "4a", "4b", "4c", "5a", "5b-small", "7-small")
    assert drawn == {f"figure{name}" for name in names}
    text = document.read_text()
    assert "(figures/figure5b-small.png)" in text
    assert text.count("n = 3 records of each row and task, seed 42") == 4
    assert "n = 3 triplets, layer 2" in text
    assert "not comparable" in text
    tables = ["figure2a", "collaboration", "figure5b"]
    folders = {r.folder for r in read_plan(plan, tables, ["small"], 3, copied.root / "runs")}
    assert len(folders) == 4
    before = {p: p.read_bytes() for p in (copied.root / "figures").iterdir()}
    readme = copied.root / "README.md"
    readme.write_text("<!-- figure hero -->\n<!-- end of figure hero -->\n")
    assert script.main([*given[:-1], str(readme), "--figures", "hero"]) == 0
    assert (
        "answers before and after, and what should not change](figures/figurehero-small.png)\n\nedit 1 of"
        in (readme.read_text())
    )
    for file in (copied.root / "figures").glob("figurehero-*"):
        file.unlink()
    capsys.readouterr()
    assert script.main([*given, "--layer", "0", "--figures", "5a"]) == 2
    assert "--layer: 0" in capsys.readouterr().err
    assert script.main(given) == 0
    assert {p: p.read_bytes() for p in (copied.root / "figures").iterdir()} == before
