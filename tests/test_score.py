"""``unike score``: finished runs scored again from their answers, without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from finished_runs import as_records, ended, save_run
from worlds import World, case, query

from unike.command.score import run as score
from unike.evaluation.protocols import run_one_step
from unike.evaluation.reader import Reader
from unike.evaluation.record import Record
from unike.evaluation.summary import summarise
from unike.runs.records import RECORDS, read_records
from unike.runs.rescoring import describe_form, score_answers
from unike.scoring import find_scorer
from unike.scoring.aliases import Aliases
from unike.system.launching import run_guarded


def answered(number: int, **answers: dict[str, object]) -> dict[str, object]:
    """A record with these answers, by probe."""
    made = ended(number)
    whole = {"prompt": "what?", "target": None, "before": "", "after": ""}
    return {**made, "answers": {name: {**whole, **answer} for name, answer in answers.items()}}


LONG = {"target": "a red fox", "before": "a dog", "after": "a red fox in the snow"}
KEPT = {"target": "Paris", "before": "Paris", "after": "Paris, France"}


def score_one(name: str, record: dict[str, object], aliases: Aliases | None = None) -> dict[str, tuple]:
    (found,) = score_answers(as_records([record]), find_scorer(name), aliases).values()
    return {probe: (one.before, one.after) for probe, one in found.items()}


def test_within_scope_the_target_counts_and_beyond_it_the_answer_before() -> None:
    record = answered(0, reliability=LONG, t_locality=KEPT)
    assert score_one("exact", record) == {"reliability": (0, 0), "t_locality": (1, 0)}
    assert score_one("contains", record) == {"reliability": (0, 1), "t_locality": (1, 1)}
    f1 = score_one("token_f1", record)
    assert f1["reliability"] == (0, pytest.approx(2 * 2 / (2 + 4)))
    assert f1["t_locality"] == (1, pytest.approx(2 / 3))


def test_aliases_of_the_record_and_of_a_file() -> None:
    own = {"target": "kangaroo", "before": "deer", "after": "roo", "aliases": ["wallaby"]}
    record = answered(0, reliability=own)
    assert score_one("exact", record)["reliability"][1] == 0
    assert score_one("exact", record, Aliases({"Kangaroo": ("roo",)}))["reliability"][1] == 1
    record = answered(0, reliability={**own, "after": "wallaby"})
    assert score_one("exact", record)["reliability"][1] == 1


def test_several_probes_of_a_name_are_averaged_and_say_what_they_expect() -> None:
    other = {**LONG, "prompt": "and?", "after": "a dog", "expect": "unchanged"}
    record = answered(0, reliability={**LONG, "others": [other, {**LONG, "prompt": "so?", "after": "a fox"}]})
    assert score_one("contains", record)["reliability"] == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_what_has_no_decoded_answer_has_no_score() -> None:
    forced = answered(0, reliability=LONG)
    forced["scores"] = {"teacher_forced": forced["scores"]["teacher_forced"]}  # type: ignore[index]
    failed = {"id": "x", "task": "vqa", "status": "failed", "error": "why"}
    records = as_records([forced, failed, answered(1, reliability={"target": "a"}, joint={"before": "b"})])
    found = score_answers(records, find_scorer("exact"))
    assert {key: set(probes) for key, probes in found.items()} == {"vqa-1": {"reliability"}}


def test_the_form_of_answers() -> None:
    loop = {**LONG, "after": "so it is so it is"}
    form = describe_form(as_records([answered(0, reliability=LONG, joint=loop, t_locality=KEPT)]))
    assert form["before"]["words"] == pytest.approx((2 + 2 + 1) / 3)
    after = form["after"]
    assert after["words"] == pytest.approx((6 + 6 + 2) / 3)
    assert (after["empty"], after["repeated"]) == (0, pytest.approx(100 / 3))
    assert (after["run_on"], form["before"]["run_on"]) == (50, 0)
    assert describe_form([]) == {}


def test_the_command_keeps_scores_apart_from_the_records(tmp_path: Path, capsys) -> None:
    run = save_run(tmp_path / "run", [answered(0, reliability=LONG), answered(1, reliability=LONG)])
    former = (run / RECORDS).read_bytes()
    assert score([str(run), "--scorers", "contains", "rouge_l"]) == 0
    shown = capsys.readouterr().out
    assert "contains" in shown
    assert "answers that go on after the target" in shown
    assert (run / RECORDS).read_bytes() == former
    assert sorted(path.name for path in (run / "scores").iterdir()) == ["contains.jsonl", "rouge_l.jsonl"]
    records = read_records(run)
    assert [record.scores["contains"]["reliability"].after for record in records] == [1, 1]
    summary = summarise(records, 0)
    assert summary["metrics"]["reliability"]["contains"]["after"]["mean"] == 100
    # Again, with an alias, takes the place of the first.
    (tmp_path / "more.json").write_text('{"a red fox": ["a dog"]}')
    assert score([str(run), "--scorers", "contains", "--aliases", str(tmp_path / "more.json")]) == 0
    assert [record.scores["contains"]["reliability"].before for record in read_records(run)] == [1, 1]


def test_scores_of_a_run_that_was_made_anew_are_left_out(tmp_path: Path, caplog) -> None:
    run = save_run(tmp_path / "run", [answered(0, reliability=LONG)])
    assert score([str(run), "--scorers", "contains"]) == 0
    assert "contains" in read_records(run)[0].scores
    anew = answered(0, reliability={**LONG, "after": "a dog"})
    (run / RECORDS).write_text(json.dumps(anew) + "\n")
    caplog.clear()
    assert "contains" not in read_records(run)[0].scores
    assert "contains.jsonl: was made of other records" in caplog.text
    assert score([str(run), "--scorers", "contains"]) == 0
    assert read_records(run)[0].scores["contains"]["reliability"].after == 0


def test_a_mean_of_other_metrics_is_scored_too() -> None:
    kept = {"target": "a dog", "before": "a dog", "after": "a dog"}
    found = score_one("contains", answered(0, fine_generality=LONG, fine_locality=kept))
    assert found["specificity"][1] == 1


def test_a_run_keeps_aliases_and_all_probes_of_a_name(world: World) -> None:
    asked = case(0)
    first = asked.probes[0]
    more = (
        replace(first, query=query(1, prompt="who is it?"), expect="unchanged"),
        replace(first, aliases=("reynard",)),
    )
    asked = replace(asked, probes=(*more, *asked.probes[1:]))
    method = world.method("ft", {"max_steps": 2})
    reader = Reader(world.backbone, world.prefixes(method))
    made = run_one_step(world.backbone, method, asked, reader).record
    (kept,) = (Record.from_json(json.loads(json.dumps(made.to_json()))).answers[n] for n in (first.name,))
    assert (kept.expect, kept.aliases, len(kept.others)) == ("unchanged", (), 1)
    assert (kept.others[0].expect, kept.others[0].aliases) == (None, ("reynard",))
    assert (kept.prompt, kept.others[0].prompt) == ("who is it?", first.query.prompt)
    assert kept == made.answers[first.name]


def test_readers_that_share_the_base_may_ask_a_case_different_probes(world: World) -> None:
    method = world.method("ft", {"max_steps": 2})
    one, other = (Reader(world.backbone, world.prefixes(method)) for _ in range(2))
    assert one.share_base(other)
    whole = case(0)
    part = replace(whole, probes=whole.probes[:2])
    assert (len(one.predict_base(part)), len(other.predict_base(whole))) == (2, len(whole.probes))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scorers", "contain"], "scorer contain: is unknown; the nearest one is contains"),
        (["--aliases", "none.json"], "none.json: cannot be read as aliases"),
        (["elsewhere"], "manifest.json: cannot be read as a run's manifest"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    words: list[str], said: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = save_run(tmp_path / "run", [answered(0, reliability=LONG)])
    assert run_guarded(lambda: score([str(run), *words])) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not (run / "scores").exists()


def test_a_run_without_decoded_answers_is_refused(tmp_path: Path, capsys) -> None:
    forced = answered(0, reliability=LONG)
    forced["scores"] = {"teacher_forced": forced["scores"]["teacher_forced"]}  # type: ignore[index]
    run = save_run(tmp_path / "run", [forced])
    assert run_guarded(lambda: score([str(run)])) == 2
    assert "has no decoded answers; expected a run without --no_generated" in capsys.readouterr().err


def test_no_torch_is_imported(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", [answered(0, reliability=LONG)])
    code = (
        "import sys; from unike.command.main import main; code = main(['score', sys.argv[1]]); "
        "print('torch' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert json.loads((run / "scores" / "exact.jsonl").read_text().splitlines()[0])["about"]["title"]
