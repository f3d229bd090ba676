"""The notebooks run from the top, and what they show is kept in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="not installed: nbclient (pip install '.[notebooks]')")

import nbformat
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook, new_output

from scripts.notebooks import NOTEBOOKS, ROOT, execute, main

BYTES = 400_000
# Of any machine: a folder below the root, not the end of a longer or relative path.
ABSOLUTE = re.compile(r"(?<![\w./~-])/[\w.-]+/[\w.-]+")
READABLE = ("text/plain", "text/markdown", "text/html")


def texts(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """All that the cells show as text."""
    for output in (o for cell in notebook.cells for o in cell.get("outputs", [])):
        yield output.get("text", "")
        yield from (output.get("data", {}).get(kind, "") for kind in READABLE)
        yield "\n".join(output.get("traceback", []))


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What a reader of the stored notebook would stumble over."""
    cells = notebook.cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    found = [] if counts == list(range(1, len(code) + 1)) else [f"not run once from the top: {counts}"]
    if not any(cell.outputs for cell in code):
        found.append("shows nothing")
    for before, cell in zip([None, *cells], cells, strict=False):
        if cell.cell_type == "code" and (before is None or before.cell_type != "markdown"):
            found.append(f"no sentence before: {cell.source[:60]}")
    kinds = [(o.output_type, o.get("name")) for cell in code for o in cell.outputs]
    found += [f"an output of {kind}, {name}" for kind, name in kinds if kind == "error" or name == "stderr"]
    return found + [
        f"an absolute path: {path}" for text in texts(notebook) for path in ABSOLUTE.findall(text)
    ]


def test_there_are_notebooks() -> None:
    assert [p.stem for p in NOTEBOOKS] == ["anatomy_of_an_edit", "paper_tables", "quickstart"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_can_be_read_unrun(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert problems(notebook) == []
    assert path.stat().st_size < BYTES


def test_what_spoils_a_notebook_is_seen() -> None:
    shown = [
        new_output("stream", name="stderr", text="50%|##"),
        new_output("error", ename="E", evalue="e", traceback=["in /srv/me/x.py"]),
        new_output("display_data", data={"text/markdown": "see docs/results.md and https://a.org/b/c"}),
    ]
    notebook = new_notebook(cells=[new_code_cell("x", execution_count=1, outputs=shown), new_code_cell("y")])
    assert problems(notebook) == [
        "not run once from the top: [1, None]",
        "no sentence before: x",
        "no sentence before: y",
        "an output of stream, stderr",
        "an output of error, None",
        "an absolute path: /srv/me",
    ]
    assert problems(new_notebook()) == ["shows nothing"]


def test_what_is_no_notebook_is_said_before_any_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"a.ipynb": "{}", "b.ipynb": "[]", "c.ipynb": "no JSON"}
    for name, text in given.items():
        (tmp_path / name).write_text(text)
    wrong = [str(tmp_path / name) for name in (*given, "lost.ipynb")]
    good = tmp_path / "good.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), good)
    assert main([str(good), *wrong]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"error: {path}: cannot be read as a notebook" for path in wrong]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder for notebooks in a project that sees ours, and writes its results beside them."""
    for shared in ("hparams", "hugging_cache", "data"):
        (tmp_path / shared).symlink_to(ROOT / shared)
    folder = tmp_path / "notebooks"
    folder.mkdir()
    return folder


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path: Path, copy: Path) -> None:
    notebook = execute(path, copy)
    assert problems(notebook) == []
    stored = nbformat.read(path, as_version=4)
    kinds = [
        [[o.output_type for o in cell.get("outputs", [])] for cell in n.cells] for n in (notebook, stored)
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.slow
def test_a_cell_that_fails_is_told(copy: Path) -> None:
    path = copy / "broken.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), path)
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(path, copy)
