"""Tables beside the paper's figures, and what is claimed of their rows, on hand-made records."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from unike.evaluation.metrics import harmonic_mean, mean_of, paired_difference
from unike.evaluation.record import Place, Record, Score
from unike.evaluation.summary import summarise
from unike.report.measures import Row, compare_rows
from unike.report.paper import published
from unike.report.paper.claims import FAILS, HOLDS, LOST, UNCLEAR, check_best_of_ours, check_order
from unike.report.paper.tables import Block, Cell, csv_rows, latex, mark_best, markdown, rewrite_blocks
from unike.types import FIVE_METRICS, METRICS, UserError


def records(values: dict[str, float] | float, n: int = 20, sequences: int = 0) -> list[Record]:
    """Records whose metrics' means are exactly the given ones, in percent."""
    means = dict.fromkeys(METRICS, values) if isinstance(values, float) else values
    out = []
    for i in range(n):
        scores = {m: {"before": 0.25, "after": float(i < round(mean * n / 100))} for m, mean in means.items()}
        record = {"id": str(i), "status": "ok", "steps": 3, "seconds": 0.5, "bytes": 2048}
        record |= {"scores": {"teacher_forced": scores, "generated": scores}}
        place = {"sequence": i % sequences, "position": 1, "kind": "final"} if sequences else {}
        out.append(Record.from_json(record | place))
    return out


def row(name: str, values: dict[str, float] | float, published: dict | None = None, **more) -> Row:
    made = records(values)
    return Row(name, summarise(made, 0), made, published or {}, **more)


def metrics(default: float, **changed: float) -> dict[str, float]:
    return dict.fromkeys(METRICS, default) | changed


def block(*rows: Row, **more) -> Block:
    return Block("1", "BLIP2-OPT, E-VQA", "tiny_blip2", "vqa", 1, tuple(rows), **more)


# ---------------------------------------------------------------- marks


@pytest.mark.parametrize(
    ("values", "marks"),
    [
        ([90.0, 80.0, 70.0], ["best", "second", ""]),
        ([90.0, 90.0, 70.0, 60.0], ["best", "best", "second", ""]),
        ([90.04, 90.0, 80.0, 80.01], ["best", "best", "second", "second"]),
        ([None, 80.0, 70.0], ["", "best", "second"]),
        ([None, 80.0], ["", ""]),
        ([50.0, 50.0], ["best", "best"]),
    ],
)
def test_the_best_and_the_second_are_marked_as_they_are_shown(values, marks) -> None:
    assert [cell.mark for cell in mark_best([Cell(value) for value in values])] == marks


def test_rows_that_are_not_complete_are_not_compared() -> None:
    text = markdown(block(row("FT", 80.0), row("KE", 100.0, complete=False), row("UniKE", 90.0)))
    assert "| UniKE | **90.0** [75.0, 100.0] |" in text
    assert "| KE (20 records up to now) | 100.0 |" in text
    assert "(not run)" in markdown(block(Row("FT", summarise([], 0), complete=False), row("KE", 80.0)))


# ---------------------------------------------------------------- Markdown, LaTeX, CSV


def test_markdown_has_ours_with_the_papers_figure_beside_it() -> None:
    paper = {m: 80.0 + i for i, m in enumerate(FIVE_METRICS)}
    text = markdown(block(row("FT", 80.0), row("UniKE", 90.0, paper), label="paper"))
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("| method"))
    assert head.startswith("| method | Rel | paper | T-Gen | paper |")
    assert "| FT | <u>80.0</u> [60.0, 95.0] |  | <u>80.0</u>" in text
    assert "| UniKE | **90.0** [75.0, 100.0] | 80.0 | **90.0** [75.0, 100.0] | 81.0 |" in text
    assert "| Base | 25.0 |  |" in text
    assert "2.0 kB" in text
    for title in ("Teacher-forced:", "Beyond the paper:", "Generated:"):
        start = lines.index(title) + 2
        end = [*lines, ""].index("", start)
        assert len({line.count("|") for line in lines[start:end]}) == 1, title


def test_without_published_figures_there_are_no_columns_for_them() -> None:
    assert "paper |" not in markdown(block(row("FT", 80.0), row("UniKE", 90.0)))


def test_latex_marks_and_escapes() -> None:
    text = latex(block(row("FT_50%", 80.0), row("UniKE", 90.0, dict.fromkeys(FIVE_METRICS, 88.0))))
    assert r"FT\_50\% & \underline{80.0} {\scriptsize [60.0, 95.0]} &" in text
    assert r"UniKE & \textbf{90.0} {\scriptsize [75.0, 100.0]} & 88.0" in text
    tabular = text.split(r"\begin{tabular}{")[1]
    columns, rest = tabular.split("}", 1)
    body = rest.split(r"\end{tabular}")[0]
    assert {line.count(" & ") for line in body.splitlines() if line.endswith(r"\\")} == {len(columns) - 1}


def test_csv_holds_plain_numbers() -> None:
    paper = {"reliability": 98.8}
    one = row("UniKE, [scoped]", 90.0, paper)
    lines = list(csv.DictReader(io.StringIO(csv_rows([block(one)]))))
    found = {(line["mode"], line["measure"]): line for line in lines}
    assert {line["row"] for line in lines} == {"UniKE, [scoped]"}
    entry = one.summary["metrics"]["reliability"]["teacher_forced"]["after"]
    line = found["teacher_forced", "reliability"]
    assert [float(line[k]) for k in ("mean", "low", "high")] == [entry[k] for k in ("mean", "low", "high")]
    assert float(line["paper"]) == 98.8
    assert found["generated", "reliability"]["paper"] == ""
    assert float(found["generated", "all"]["mean"]) == pytest.approx(90.0)
    assert float(found["", "bytes"]["mean"]) == 2048.0
    assert float(found["", "steps"]["mean"]) == 3.0


def test_extras_are_shown_where_they_are_asked_for() -> None:
    presets = {"easyedit": {"t_locality": 0.5, "m_locality": 0.25}}
    decisions = {"alpha": dict.fromkeys(METRICS, 0.125)}
    made = [replace(record, presets=presets, decisions=decisions) for record in records(90.0)]
    one = Row("UniKE", summarise(made, 0, ("paper", "easyedit")), made, {"generality": 95.1})
    plain = markdown(block(one))
    assert "easyedit" not in plain
    assert "0.12" not in plain
    text = markdown(block(one, extras=("presets", "means", "alpha"), beside={1000: {"LiveEdit": {}}}))
    assert "| method | T-Loc, paper | T-Loc, easyedit | M-Loc, paper | M-Loc, easyedit |" in text
    assert "| UniKE | 90.0 [75.0, 100.0] | 50.0 | 90.0 [75.0, 100.0] | 25.0 |" in text
    assert "| method | mean generality | paper | mean locality |" in text
    assert "| 95.1 |" in text
    assert "| UniKE | 0.12 |" in text
    assert "Published for 1,000 sequential edits" in text


def test_a_table_takes_the_place_between_its_markers() -> None:
    text = "a\n<!-- table 1 -->\nold\n<!-- end of table 1 -->\nb\n<!-- table 2 -->\n<!-- end of table 2 -->\n"
    new = rewrite_blocks(text, "x.md", {"1": "| new |\n"})
    assert new == text.replace("\nold\n", "\n\n| new |\n\n")
    assert rewrite_blocks(new, "x.md", {"1": "| new |"}) == new
    with pytest.raises(UserError) as caught:
        rewrite_blocks(text, "x.md", {"3": "", "4": ""})
    assert [p.split(":")[0] for p in caught.value.problems] == ["x.md", "x.md"]
    assert "<!-- table 3 -->" in caught.value.problems[0]
    with pytest.raises(UserError, match="table 1"):
        rewrite_blocks(text + text, "x.md", {"1": ""})


# ---------------------------------------------------------------- paired differences


def naive_difference(
    one: Sequence[Sequence[float]],
    other: Sequence[Sequence[float]],
    seed: int,
    of: Callable[[Sequence[float]], float],
    samples: int,
    groups: Sequence[int],
) -> tuple[float, float, float]:
    """Record by record, resample by resample."""
    generator = np.random.default_rng(seed)
    names = sorted(set(groups))
    found = []
    for drawn in generator.integers(0, len(names), (samples, len(names))):
        picked = [i for g in drawn for i, group in enumerate(groups) if group == names[g]]
        a, b = ([sum(c[i] for i in picked) / len(picked) for c in side] for side in (one, other))
        found.append(of(a) - of(b))
    whole = [of([sum(c) / len(c) for c in side]) for side in (one, other)]
    return whole[0] - whole[1], float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))


@pytest.mark.parametrize("of", [mean_of, harmonic_mean])
@pytest.mark.parametrize("groups", [None, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3]])
def test_the_paired_bootstrap_against_a_naive_one(of, groups) -> None:
    values = np.random.default_rng(4).uniform(20.0, 100.0, (2, 3, 12)).tolist()
    wanted = naive_difference(*values, 7, of, 200, groups or list(range(12)))
    assert paired_difference(*values, 7, of, 200, groups) == pytest.approx(wanted)


def test_unpaired_columns_are_refused() -> None:
    for one, other in (([[1.0]], [[1.0, 2.0]]), ([], [[1.0]])):
        with pytest.raises(ValueError, match="same records"):
            paired_difference(one, other, 0, mean_of)


def test_a_difference_is_of_the_records_that_both_hold() -> None:
    one, other = records(50.0), records(50.0)
    part = Row("part", summarise(other[:5], 0), other[:5])
    whole = Row("whole", summarise(one, 0), one)
    assert compare_rows(whole, part, "reliability", 0) == (0.0, 0.0, 0.0)
    assert compare_rows(whole, Row("none", {}, []), "reliability", 0) is None
    moved = [replace(r, id=f"x{r.id}") for r in other]
    assert compare_rows(whole, Row("others", {}, moved), "reliability", 0) is None


def test_sequences_are_drawn_whole() -> None:
    one, other = records(50.0, sequences=2), records(0.0, sequences=2)
    for i, record in enumerate(one):
        forced = {**record.get_scores("teacher_forced"), "reliability": Score(0.25, float(i % 2))}
        one[i] = replace(record, scores={"teacher_forced": forced})
    found = compare_rows(Row("a", {}, one), Row("b", {}, other), "reliability", 0)
    assert found == (50.0, 0.0, 100.0)
    steps = [replace(r, id=f"{r.id}s", place=Place(None, r.sequence or 0, 1, "step")) for r in one]
    assert compare_rows(Row("a", {}, steps), Row("b", {}, steps), "reliability", 0) is None


# ---------------------------------------------------------------- claims


def test_the_order_holds_fails_or_cannot_be_told() -> None:
    paper = metrics(90.0)
    best = row("UniKE", metrics(95.0, m_generality=10.0, t_locality=50.0), metrics(95.0, m_locality=90.0))
    other = row("MEND", metrics(20.0, m_generality=90.0, t_locality=50.0), paper)
    (found,) = check_order([best, other, row("ours", 100.0)], "UniKE", 0)
    assert found.claim == "UniKE against MEND"
    # M-Locality is the same in the paper: it states no order.
    parts = found.verdict.split("; ")
    assert parts[0] == f"{FAILS}: M-Gen (paper 95.0 > 90.0, ours 10.0 < 90.0)"
    assert parts[1] == f"{UNCLEAR}: T-Loc (paper 95.0 > 90.0, ours 50.0 = 50.0)"
    assert parts[2].startswith(f"{HOLDS}: Rel, T-Gen")
    assert "M-Loc" not in found.verdict
    (found,) = check_order([row("UniKE", 95.0, metrics(95.0)), row("MEND", 20.0, paper)], "UniKE", 0)
    assert str(found) == "UniKE against MEND: holds"


def test_no_order_without_the_reference() -> None:
    assert check_order([row("MEND", 20.0, metrics(90.0))], "UniKE", 0) == []
    assert check_order([row("UniKE", 90.0), row("MEND", 20.0, metrics(90.0))], "UniKE", 0) == []


@pytest.mark.parametrize(("ours", "verdict"), [(95.0, HOLDS), (55.0, UNCLEAR), (10.0, LOST)])
def test_whether_ours_is_the_best(ours: float, verdict: str) -> None:
    rows = [row("a", 50.0), row("b", 30.0), row("scoped", ours, ours=True), row("other", 5.0, ours=True)]
    found = check_best_of_ours(rows, 0)
    assert [v.verdict for v in found] == [verdict] * 4
    assert [v.claim.split("best ")[1] for v in found] == [
        f"{measure}, {mode}" for mode in ("teacher-forced", "generated") for measure in ("HM5", "HM8 (far)")
    ]
    assert f"scoped {ours:.1f}, a 50.0" in found[0].figures
    assert check_best_of_ours(rows[:2], 0) == []


# ---------------------------------------------------------------- published figures


def test_published_figures() -> None:
    assert published.read_figures("table1_one_step", "blip2", "vqa")["UniKE"] == dict(
        zip(FIVE_METRICS, (98.8, 98.4, 94.8, 98.3, 96.7), strict=True)
    )
    assert published.read_figures("table2_sequential", "minigpt4", "caption", 20)["FT"]["reliability"] == 64.0
    assert published.read_figures("table3_cross_task_10", "minigpt4", "cross", 10)["KE"]["m_locality"] == 60.2
    assert published.read_figures("table4_ablation", "minigpt4", "vqa")["only Intrin"]["reliability"] == 83.5
    assert published.read_figures(published.ZETA, "minigpt4", "vqa")["random"] == {
        "generality": 86.5, "locality": 86.2,
    }  # fmt: skip
    assert published.read_figures("lifelong", "blip2", "vqa", 1)["FT-L"]["t_generality"] == 48.8
    assert published.read_lifelong("blip2")[1000]["LiveEdit"]["m_locality"] == 97.38


@pytest.mark.parametrize("key", published.list_tables())
def test_what_was_not_published_is_empty(key: str) -> None:
    assert published.read_source(key)
    assert published.read_figures(key, "minigpt4", "nothing", 7) == {}
    if key != "table1_one_step":
        assert published.read_figures(key, "blip2", "caption", 7) == {}
