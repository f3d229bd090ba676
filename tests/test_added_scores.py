"""Scores added to a finished run: they come back as modes, and a file is the old or the new one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from finished_runs import ended, save_run
from hypothesis import given
from hypothesis import strategies as st

from unike.evaluation.modes import list_modes, name_mode
from unike.evaluation.record import Score
from unike.runs.added_scores import get_key, get_scores_file, read_added_scores, write_added_scores
from unike.runs.records import RECORDS, read_records
from unike.types import UserError

RIGHT = {"reliability": Score(0.0, 1.0)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(tmp_path / "run", [ended(0), ended(1)])


def test_added_scores_are_one_more_mode(run: Path) -> None:
    former = (run / RECORDS).read_bytes()
    path = write_added_scores(run, "jury", {"vqa-0": RIGHT}, {"title": "a jury", "model": "m"})
    assert path == run / "scores" / "jury.jsonl"
    first, second = read_records(run)
    assert first.scores["jury"] == RIGHT
    assert "jury" not in second.scores
    assert list_modes([first, second]) == ("teacher_forced", "generated", "jury")
    assert name_mode("jury") == "a jury"
    # The records' own file is another one, and what they had is there still.
    assert (run / RECORDS).read_bytes() == former
    assert first.scores["generated"] == read_records(run)[0].get_scores("generated")
    (added,) = read_added_scores(run).values()
    assert (added.about["model"], added.scores) == ("m", {"vqa-0": RIGHT})


def test_a_second_file_takes_the_place_of_the_first(run: Path) -> None:
    for name, value in (("jury", 0.25), ("jury", 0.75), ("other", 0.5)):
        write_added_scores(run, name, {"vqa-1": {"joint": Score(None, value)}}, {})
    _, record = read_records(run)
    assert (record.scores["jury"]["joint"].after, record.scores["other"]["joint"].after) == (0.75, 0.5)
    assert sorted(path.name for path in (run / "scores").iterdir()) == ["jury.jsonl", "other.jsonl"]


def test_records_of_a_sequence_are_told_apart(tmp_path: Path) -> None:
    place = {"case": "vqa-0", "sequence": 0, "position": 1}
    step = ended(0, id="0/1/step", kind="step", former={}, former_cases=0, **place)
    final = ended(0, id="0/1/final", kind="final", **place)
    again = ended(0, id="1/1/final", kind="final", **{**place, "sequence": 1})
    run = save_run(tmp_path / "run", [step, final, again])
    keys = [get_key(record) for record in read_records(run)]
    assert len(set(keys)) == 3
    write_added_scores(run, "jury", {keys[1]: RIGHT}, {})
    assert [("jury" in record.scores) for record in read_records(run)] == [False, True, False]


def test_a_writer_that_is_killed_leaves_the_former_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_added_scores(run, "jury", {"vqa-0": RIGHT}, {})
    former = path.read_bytes()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            write_added_scores(run, "jury", {"vqa-0": {"reliability": Score(0.0, 0.0)}}, {})
    assert path.read_bytes() == former
    assert read_records(run)[0].scores["jury"] == RIGHT
    # What a kill without any clean-up leaves is not read.
    (path.parent / ".jury.jsonl.1.ab.tmp").write_text('{"about"')
    assert read_records(run)[0].scores["jury"] == RIGHT
    write_added_scores(run, "jury", {"vqa-0": {"reliability": Score(0.0, 0.0)}}, {})
    assert path.read_bytes() != former


@pytest.mark.parametrize("name", ["teacher_forced", "generated", "", "a b", "../up", "x" * 61, "1st"])
def test_a_name_that_is_none_is_refused(run: Path, name: str) -> None:
    with pytest.raises(UserError):
        write_added_scores(run, name, {}, {})
    assert not (run / "scores").exists()


def test_what_is_no_score_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match=r"vqa-0: reliability: expected scores from 0 to 1"):
        write_added_scores(run, "jury", {"vqa-0": {"reliability": Score(0.0, 1.5)}}, {})
    with pytest.raises(UserError, match="title: expected a text"):
        write_added_scores(run, "jury", {}, {"title": 3})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("{", "jury.jsonl:1: is not a line"),
        ("[1]\n", "jury.jsonl:1: is not a line"),
        ('{"about": {}}\n{"id": 3, "scores": {}}\n', "jury.jsonl:2: is not a line"),
        (
            '{"about": {}}\n{"id": "a", "scores": {"x": {"before": 0, "after": 2}}}\n',
            "jury.jsonl:2: is not a line",
        ),
        ('{"about": {}}\n{"id": "a", "scores": [', "jury.jsonl:2: is not a line"),
    ],
)
def test_a_damaged_file_is_named(run: Path, text: str, words: str) -> None:
    path = get_scores_file(run, "jury")
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_records(run)
    assert len(caught.value.problems) == 1


def test_a_link_in_the_place_of_the_file_is_not_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    get_scores_file(run, "jury").parent.mkdir()
    get_scores_file(run, "jury").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="symbolic link"):
        write_added_scores(run, "jury", {}, {})
    assert (tmp_path / "mine").read_text() == "mine"


SHARES = st.floats(0, 1)
BY_PROBE = st.dictionaries(st.text(max_size=8), st.builds(Score, st.none() | SHARES, SHARES), max_size=3)


@given(st.dictionaries(st.text(max_size=8), BY_PROBE, max_size=4))
def test_whatever_is_written_comes_back(tmp_path_factory: pytest.TempPathFactory, scores) -> None:
    folder = tmp_path_factory.mktemp("run")
    path = write_added_scores(folder, "jury", scores, {"note": "é"})
    assert read_added_scores(folder)["jury"].scores == scores
    assert len([json.loads(line) for line in path.read_text("utf-8").splitlines()]) == 1 + len(scores)
