"""What the demo page does, without the page: asking, editing, undoing; and its command's bad input."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers import Project
from hypothesis import given
from hypothesis import strategies as st

from unike.demo import __main__ as command
from unike.demo.active import render_active
from unike.demo.desk import FOLLOW_UPS, MOST_CHARACTERS, Desk
from unike.editor import MultimodalEditor
from unike.edits.activity import LayerRetrieval, RetrievedItem
from unike.edits.explain import EditReport, Explanation
from unike.runs.inputs import open_datasets
from unike.types import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
QUESTION, TARGET = "what is it?", "a red fox"


@pytest.fixture(scope="module")
def opened(blip2_project: Project) -> Desk:
    editor = MultimodalEditor.from_hparams(blip2_project.yaml, progress=False)
    return Desk(editor, open_datasets(editor.hparams, "vqa", 2))


@pytest.fixture
def desk(opened: Desk) -> Iterator[Desk]:
    yield opened
    opened.undo_all()


@pytest.fixture
def picture(blip2_project: Project) -> str:
    return str(blip2_project.data / "0.png")


def test_examples_are_the_records_with_what_to_ask_next(desk: Desk, blip2_project: Project) -> None:
    first, second = desk.examples
    assert (first.question.image, first.question.text) == (
        str(blip2_project.data / "5.png"),
        "what is number 5?",
    )
    assert first.question.right == "two dogs"
    assert second.question.text == "what is number 6?"
    asked = {q.about: q for q in first.follow_ups}
    assert list(asked) == [
        FOLLOW_UPS[n] for n in ("t_generality", "m_generality", "m_locality", "t_locality")
    ]
    rephrased, text_only = asked["question rephrased"], asked["no image"]
    assert (rephrased.text, rephrased.right, rephrased.expect) == (
        "which thing is number 5?",
        "two dogs",
        "target",
    )
    assert (text_only.image, text_only.text) == (None, "who was the king of 5?")
    assert text_only.expect == "unchanged"


def test_an_edit_changes_the_answer_and_undone_it_is_the_former(desk: Desk, picture: str) -> None:
    former = desk.ask(picture, QUESTION)
    assert former.before == former.after != "a red"
    assert desk.edits == []
    edited = desk.edit(picture, f" {QUESTION} ", TARGET)
    # As far as four new tokens take it.
    assert (edited.before, edited.after) == (former.before, "a red")
    (one,) = desk.edits
    assert (one.question, one.answer) == (QUESTION, TARGET)
    assert [active.id for active in edited.edits] == [one.id]
    desk.undo(one.id)
    assert desk.edits == []
    assert desk.ask(picture, QUESTION) == former


def test_edits_add_up_and_are_undone_one_by_one(desk: Desk, blip2_project: Project, picture: str) -> None:
    first = desk.edit(picture, QUESTION, TARGET)
    other = str(blip2_project.data / "1.png")
    desk.edit(other, "which animals?", "two dogs")
    assert [edit.answer for edit in desk.edits] == [TARGET, "two dogs"]
    assert len(desk.ask(picture, QUESTION).edits) == 2
    desk.undo(desk.edits[1].id)
    assert desk.ask(picture, QUESTION) == first
    desk.edit(other, "which animals?", "two dogs")
    desk.undo(desk.edits[0].id)
    assert [edit.answer for edit in desk.edits] == ["two dogs"]
    desk.undo_all()
    asked = desk.ask(picture, QUESTION)
    assert asked.before == asked.after == first.before


def test_without_a_picture_the_language_model_is_asked(desk: Desk) -> None:
    asked = desk.ask(None, " who? ")
    assert (asked.image, asked.prompt) == (None, "who?")


@pytest.mark.parametrize(
    ("image", "question", "answer", "lines"),
    [
        (None, QUESTION, TARGET, ["image: missing; choose one or upload one"]),
        ("0.png", "", " ", ["question: is empty", "right answer: is empty"]),
        ("0.png", "x" * (MOST_CHARACTERS + 1), TARGET, ["question: 501 characters; expected at most 500"]),
        ("bad.png", QUESTION, TARGET, ["bad.png: not an image"]),
        ("lost.png", QUESTION, TARGET, ["lost.png: image does not exist"]),
    ],
)
def test_bad_input_is_told_and_changes_nothing(
    desk: Desk, blip2_project: Project, tmp_path: Path, image: str | None, question: str, answer: str,
    lines: list[str],
) -> None:  # fmt: skip
    (tmp_path / "bad.png").write_bytes(b"no picture")
    folder = blip2_project.data if image == "0.png" else tmp_path
    desk.edit(str(blip2_project.data / "0.png"), QUESTION, TARGET)
    held = desk.edits
    with pytest.raises(UserError) as caught:
        desk.edit(None if image is None else str(folder / image), question, answer)
    assert len(caught.value.problems) == len(lines)
    assert all(p.startswith(line) for p, line in zip(caught.value.problems, lines, strict=True))
    assert desk.edits == held


def test_an_edit_that_fails_leaves_the_former_in_force(
    desk: Desk, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.edit(picture, QUESTION, TARGET)
    held = desk.edits

    def fail(*_: Any, **__: Any) -> None:
        raise FloatingPointError("loss is nan")

    monkeypatch.setattr(desk.editor.prepare().method, "_edit", fail)
    with pytest.raises(UserError, match="the edit failed: loss is nan"):
        desk.edit(picture, "which animals?", "two dogs")
    assert desk.edits == held
    for name, line in ((None, "choose the one to undo"), ("fox", "fox: is not attached")):
        with pytest.raises(UserError, match=line):
            desk.undo(name)
    assert desk.edits == held


# ---------------------------------------------------------------- what was active


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, Any]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def asked(text: str) -> Explanation:
    item = RetrievedItem(0.5, 0.25, None, 7, text, text)
    edits = (
        EditReport("fox", "unike", text, text, True, 0.75, shown=(text,)),
        EditReport("off", None, None, None, False),
    )
    return Explanation(
        None, text, text, text, text, edits, (LayerRetrieval(3, 0.125, 1, (item,)),), {"scope": 0.5}
    )


def test_what_was_active_is_shown() -> None:
    text = Tags(render_active(asked("what is it?"))).text
    for part in (
        "1 of 2 edits apply",
        "threshold of the scope gate: 0.500",
        "what is it?",
        "0.750",
        "0.125",
        "item 7 of the knowledge memory",
    ):
        assert part in text
    assert "No edit is attached" in render_active(replace(asked("x"), edits=(), layers=()))


@given(st.text() | st.sampled_from(["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;"]))
def test_no_text_becomes_a_tag(text: str) -> None:
    assert Tags(render_active(asked(text))).tags == Tags(render_active(asked("plain"))).tags


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--port", "0"], "port: 0; expected 1 to 65535"),
        (["--hparams_dir", "lost.yaml"], "lost.yaml"),
        (["lr=-1"], "lr"),
    ],
)
def test_bad_input_of_the_command_is_one_line(
    blip2_project: Project, arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def load(*_: Any) -> None:
        raise AssertionError("a backbone is loaded")

    monkeypatch.setattr("unike.editor.load_backbone", load)
    monkeypatch.setattr(command, "find_spec", lambda _: True)
    assert command.main(["--hparams_dir", str(blip2_project.yaml), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert line in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind((command.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        assert command.main(["--port", str(port)]) == 2
    assert capsys.readouterr().err.startswith(f"error: port: {port}: cannot be used: ")


def test_a_missing_gradio_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda _: None)
    assert command.main([]) == 2
    assert capsys.readouterr().err == "error: gradio: not installed; the page needs it: make demo-page\n"


def test_the_command_runs_as_a_program() -> None:
    line = [sys.executable, "-m", "unike.demo", "--port", "70000"]
    done = subprocess.run(line, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: port: 70000; expected 1 to 65535\n"
