"""``run_edit.py ask``: it says what the editor says, and bad input is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import Project

from unike.editor import MultimodalEditor
from unike.edits.explain import Explanation
from unike.edits.store import EditStore

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import run_edit  # noqa: E402

# As in the command that is started.
pytestmark = pytest.mark.usefixtures("one_thread")


def command(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "run_edit.py"), "ask", "--hparams_dir", str(project.yaml), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "COLUMNS": "160"}
    return subprocess.run(line, cwd=project.root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def kept(blip2_project: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Explanation]:
    """A store with two edits, and what the editor that made them says."""
    editor = MultimodalEditor.from_hparams(blip2_project.yaml, progress=False)
    folder = tmp_path_factory.mktemp("kept") / "edits"
    store = EditStore(folder)
    prompt = "Question: what is it? Short answer:"
    for i, target in enumerate(("a red fox", "two dogs")):
        _, edited, _ = editor.edit(prompt, target, str(blip2_project.data / f"{i}.png"))
        store.add(edited.edits[0])
        edited.remove()
    for name in store.ids():
        editor.attach(editor.load(store.read(name).folder))
    return folder, editor.ask(str(blip2_project.data / "0.png"), prompt)


def test_the_command_says_what_the_editor_says(
    blip2_project: Project, kept: tuple[Path, Explanation]
) -> None:
    folder, asked = kept
    picture = str(blip2_project.data / "0.png")
    done = command(blip2_project, "--edits", str(folder), "--image", picture, "--json", "what is it?")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(asked.to_dict()))
    shown = command(blip2_project, "--edits", str(folder), "--image", picture, "what is it?")
    assert shown.returncode == 0, shown.stderr
    for text in (f"before   {asked.before}", f"after    {asked.after}", "2 of 2 edits", asked.edits[0].id):
        assert text in shown.stdout


BAD: list[tuple[list[str], str]] = [
    (["--edits", "nowhere"], "nowhere: no such folder; expected a store of edits"),
    (["--edits", "n" * 300], "no such folder; expected a store of edits"),
    (["--edits", "{edits}", "--image", "lost.png"], "lost.png"),
    (["--edits", "{edits}", "--only", "fox"], "no edit fox; there are"),
    (["--edits", "{edits}", "--template", "none"], "expected exactly one {} for the question"),
    (["--edits", "{edits}", "--top", "0"], "top: 0; expected 1 or more"),
    (["--edits", "{edits}", "lr=-1"], "lr"),
]


@pytest.mark.parametrize(("arguments", "line"), BAD, ids=[line for _, line in BAD])
def test_bad_input_is_one_line_before_anything_is_loaded(
    blip2_project: Project, kept: tuple[Path, Explanation], arguments: list[str], line: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def load(*_: Any) -> None:
        raise AssertionError("a backbone is loaded")

    monkeypatch.setattr("unike.editor.load_backbone", load)
    given = [a.replace("{edits}", str(kept[0])) for a in arguments]
    # The question comes before what changes the YAML.
    given.insert(len(given) - ("=" in given[-1]), "what?")
    assert run_edit.main(["ask", "--hparams_dir", str(blip2_project.yaml), *given]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("error: ")
    assert line in told


def test_an_edit_of_another_backbone_is_refused(
    minigpt4_project: Project, kept: tuple[Path, Explanation]
) -> None:
    done = command(minigpt4_project, "--edits", str(kept[0]), "what is it?")
    assert done.returncode == 2
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert "another model" in line
