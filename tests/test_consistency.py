"""Probes of consistency: their wording, what is skipped, and runs with and without them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Project, record, save_model, save_pictures
from hypothesis import given, settings
from hypothesis import strategies as st

from unike.backbones import load_backbone
from unike.config.hparams import HyperParams
from unike.config.options import BEFORE_OPTIONS
from unike.datasets.answers import normalise_answer
from unike.datasets.consistency import (
    WORDINGS,
    ConsistencyCases,
    add_consistency_probes,
    make_consistency_probes,
    negate_question,
)
from unike.datasets.declarations import find_metric, list_group
from unike.datasets.mmedit import VQADataset
from unike.editor import MultimodalEditor
from unike.evaluation.summary import HARMONIC_OF, summarise
from unike.report.compare import compare
from unike.report.run_page import build_run_page, show
from unike.report.terminal import build_summary_rows
from unike.runs import RunRequest, open_run, run_cases
from unike.runs.parts import assemble
from unike.runs.records import read_records
from unike.types import Case, EditRequest, Probe, Query

TEMPLATE = "Question: {} Short answer:"


def make_case(
    question: str, new: str, old: str | None, task: str = "vqa", image: str | None = "a.png"
) -> Case:
    prompt = question if task == "caption" else TEMPLATE.format(question)
    query = Query(image, prompt, new)
    return Case(EditRequest("e", query, old), (Probe("reliability", query, "target"),), task)


def ask(*args, **kwargs) -> list[tuple[str, str, str, str]]:
    return [
        (
            p.name,
            p.query.prompt.removeprefix("Question: ").removesuffix(" Short answer:"),
            p.query.target,
            p.implied,
        )
        for p in make_consistency_probes(make_case(*args, **kwargs))
    ]


def test_a_thing_is_asked_for_by_name() -> None:
    assert ask("What is this?", "fox", "dog") == [
        ("affirmed_new", "Is this fox?", "yes", "no"),
        ("affirmed_old", "Is this dog?", "no", "yes"),
        ("negated_new", "Is this not fox?", "no", "yes"),
        ("negated_old", "Is this not dog?", "yes", "no"),
        ("choice", "What is this? Choose one: fox or dog?", "fox", "dog"),
        ("choice", "What is this? Choose one: dog or fox?", "fox", "dog"),
        ("choice_neither", "What is this? Choose one: fox, dog or neither?", "fox", "dog"),
        ("choice_neither", "What is this? Choose one: dog, fox or neither?", "fox", "dog"),
    ]


@pytest.mark.parametrize(
    ("question", "new", "task", "first"),
    [
        ("How many dogs are there?", "3", "vqa", 'Is "3" the right answer to "How many dogs are there?"?'),
        (
            "What is this man doing?",
            "running",
            "vqa",
            'Is "running" the right answer to "What is this man doing?"?',
        ),
        ("a photo of", "a red fox", "caption", "Does this caption fit: a red fox?"),
        ("Which animal is that in the picture?", "fox", "vqa", "Is this fox?"),
    ],
)
def test_the_wording_depends_on_the_question(question: str, new: str, task: str, first: str) -> None:
    asked = ask(question, new, "other", task)
    assert asked[0] == ("affirmed_new", first, "yes", "no")
    assert [name for name, *_ in asked[:4]] == ["affirmed_new", "affirmed_old", "negated_new", "negated_old"]
    assert " not " in asked[2][1]


def test_without_an_image_nothing_is_this() -> None:
    assert (
        ask("What is this?", "fox", "dog", image=None)[0][1]
        == 'Is "fox" the right answer to "What is this?"?'
    )


@pytest.mark.parametrize(
    ("question", "negated"),
    [
        ("Is there a dog?", "Is there not a dog?"),
        ("Does it rain?", "Does it not rain?"),
        ("Is this a dog?", "Is this not a dog?"),
        ("Is this man old?", None),
        ("Is the dog brown?", None),
        ("Is there not a dog?", None),
        ("What is it?", None),
    ],
)
def test_yes_no_questions_are_negated_where_their_subject_is_known(
    question: str, negated: str | None
) -> None:
    assert negate_question(question) == negated
    asked = ask(question, "yes", "no")
    assert [name for name, *_ in asked if name.startswith(("affirmed", "negated"))] == (
        [] if negated is None else ["negated_question"]
    )
    assert [entry[1:] for entry in asked if entry[0] == "negated_question"] == (
        [] if negated is None else [(negated, "no", "yes")]
    )


@pytest.mark.parametrize("old", [None, "Fox.", " "])
def test_what_has_no_other_old_answer_has_no_question_about_it(old: str | None) -> None:
    assert [name for name, *_ in ask("What is this?", "fox", old)] == ["affirmed_new", "negated_new"]


def test_skipped_ones_are_counted_and_nothing_is_asked_twice() -> None:
    cases = ConsistencyCases(
        [make_case("Is the dog brown?", "yes", "no"), make_case("What is it?", "fox", None)]
    )
    assert cases.count_skipped() == {
        **dict.fromkeys(("affirmed_new", "negated_new", "choice", "choice_neither"), 1),
        **dict.fromkeys(("affirmed_old", "negated_old", "negated_question"), 2),
    }
    once = cases[0]
    assert add_consistency_probes(once) == once
    assert cases[-2:] == [cases[0], cases[1]]


WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20
).filter(lambda text: normalise_answer(text).strip() not in ("", "yes", "no"))


@settings(max_examples=40, deadline=None)
@given(WORDS, WORDS, WORDS, st.sampled_from(["vqa", "caption"]))
def test_wordings_of_any_texts_are_balanced(question: str, new: str, old: str, task: str) -> None:
    if not question.strip() or normalise_answer(new) == normalise_answer(old):
        return
    case = make_case(question, new, old, task)
    probes = make_consistency_probes(case)
    known = set(list_group("consistency"))
    assert {p.name for p in probes} == known - {"negated_question"}
    assert all(p.expect == "target" and p.query.image == "a.png" for p in probes)
    by_name: dict[str, list[Probe]] = {}
    for probe in probes:
        by_name.setdefault(probe.name, []).append(probe)
    for name, opposite in (("affirmed_new", "affirmed_old"), ("negated_new", "negated_old")):
        ((one,), (other,)) = by_name[name], by_name[opposite]
        assert {one.query.target, other.query.target} == {"yes", "no"}
        assert (one.implied, other.implied) == (other.query.target, one.query.target)
    for name in ("choice", "choice_neither"):
        assert len(by_name[name]) == 2
        assert all(p.query.target == new.strip() and p.implied == old for p in by_name[name])
        lengths = {len(p.query.prompt) for p in by_name[name]}
        assert len(lengths) == 1, "the orders have the same words"


def test_the_table_of_wordings_is_whole() -> None:
    assert {w.metric for w in WORDINGS} | {"negated_question"} == set(list_group("consistency"))
    assert all(find_metric(w.metric).expect == "target" for w in WORDINGS)
    assert not set(list_group("consistency")) & set().union(*map(set, HARMONIC_OF.values()))
    assert BEFORE_OPTIONS["consistency_probes"] is False


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module", params=["blip2", "minigpt4"])
def project(request, tmp_path_factory) -> Project:
    root = tmp_path_factory.mktemp(f"consistency-{request.param}")
    made = Project(root, request.param)
    save_model(root / "model", request.param)
    save_pictures(made.data)
    (made.data / "vqa_eval.json").write_text(json.dumps([record(i) for i in range(3)]))
    return made


def make_hparams(project: Project, **changes) -> HyperParams:
    values = project.options(method="ft", layers=1, max_steps=5, **changes)
    values["data"] = {"vqa": {"eval": str(project.data / "vqa_eval.json")}}
    return HyperParams.from_dict(values)


@pytest.fixture(scope="module")
def runs(project: Project) -> dict[str, Path]:
    """Without the options, with them, and with them in two parts."""
    off = make_hparams(project)
    on = off.replace(consistency_probes=True, likelihoods=True)
    backbone = load_backbone(off)
    folders = {}
    cases = RunRequest(off).cases
    for name, hparams in (("off", off), ("on", on)):
        folders[name] = project.root / name
        parts = assemble(hparams, backbone, progress=False)
        with open_run(parts, "vqa", folders[name], resume=False) as writer:
            run_cases(parts, cases, writer, progress=False)
    folders["resumed"] = Path(shutil.copytree(folders["on"], project.root / "resumed"))
    lines = (folders["on"] / "records.jsonl").read_text().splitlines(keepends=True)
    # The second one is half written.
    (folders["resumed"] / "records.jsonl").write_text(lines[0] + lines[1][:50])
    with open_run(parts, "vqa", folders["resumed"], resume=True) as writer:
        run_cases(parts, cases, writer, progress=False)
    return folders


def test_off_changes_nothing_and_on_does(runs: dict[str, Path]) -> None:
    off, on = read_records(runs["off"]), read_records(runs["on"])
    names = set(list_group("consistency"))
    for one, other in zip(off, on, strict=True):
        assert not names & one.scores["generated"].keys()
        assert other.scores["generated"].keys() - one.scores["generated"].keys() == names - {
            "negated_question"
        }
        for mode in ("teacher_forced", "generated"):
            assert {n: s for n, s in other.scores[mode].items() if n not in names} == one.scores[mode]
    texts = [json.dumps(json.loads(line).get("scores")) for line in (runs["off"] / "records.jsonl").open()]
    assert not any(name in text for name in names for text in texts)


def test_a_run_goes_on_with_the_same_numbers(runs: dict[str, Path]) -> None:
    whole, parts = read_records(runs["on"]), read_records(runs["resumed"])
    assert [replace(r, seconds=None) for r in whole] == [replace(r, seconds=None) for r in parts]


def test_tables_have_the_group_and_what_the_base_holds(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    done = read_records(runs["on"])
    summary = summarise(done, 0)
    for mode in ("teacher_forced", "generated"):
        rows = [
            [r.scores[mode][n].after for n in list_group("consistency") if n in r.scores[mode]] for r in done
        ]
        found = summary["metric_groups"]["consistency"][mode]
        assert found["mean"]["after"]["mean"] == pytest.approx(100 * sum(sum(r) / len(r) for r in rows) / 3)
        assert found["all"]["after"]["mean"] == pytest.approx(100 * sum(min(r) == 1 for r in rows) / 3)
    assert summary["skipped_probes"] == {"negated_question": 3}
    held = [float(normalise_answer(r.answers["affirmed_new"].before) == "no") for r in done]
    assert [r.base_right["generated"]["affirmed_new"] for r in done] == held
    titles = [row[0] for row in build_summary_rows(summary)]
    assert {"consistency, mean of its metrics", "consistency, all of its metrics right"} <= set(titles)
    assert "target affirmed: base as before" in titles
    assert "skipped_probes" not in summarise(read_records(runs["off"]), 0)
    found = compare(runs["on"], runs["resumed"])
    assert {"choice", "negated_new"} <= {d.measure for d in found.differences}
    page = build_run_page(runs["on"])
    assert [table.caption for table in page.tables] == ["Metrics, in percent", "Likelihoods, in nats"]
    assert [table.caption for table in build_run_page(runs["off"]).tables] == ["Metrics, in percent"]
    show(summary, runs["on"], page=False)
    assert "KL divergence from the base, T-Locality" in capsys.readouterr().out


def test_the_editor_asks_them_too(project: Project) -> None:
    hparams = make_hparams(project, consistency_probes=True, likelihoods=True)
    editor = MultimodalEditor(hparams, load_backbone(hparams))
    dataset = VQADataset(project.data / "vqa_eval.json", project.data, size=1)
    _, _, summary = editor.edit_dataset(dataset, generated=False, verbose=False)
    assert set(list_group("consistency")) - {"negated_question"} <= summary["metrics"].keys()
    assert summary["numbers"]["margin"].keys() == {"reliability", "t_generality", "m_generality"}
