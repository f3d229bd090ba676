"""Torch takes seconds to import: whoever only says what is missing does without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_edit_store import made

from unike.edits import EditStore

ROOT = Path(__file__).parents[1]


def in_shell(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command's output, with ``torch`` as the last line of stdout where it was imported."""
    code = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n"
        "    if sys.argv[0].endswith('.py'): runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "    else: runpy.run_module(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        "    print('torch' if 'torch' in sys.modules else 'no torch')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


MISSING = ("--hparams_dir", "hparams/minigpt4.yaml")


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (("run_edit.py", *MISSING, "--check"), 2, "7 problems to fix before this run"),
        (("run_edit.py", *MISSING), 2, "pretrained_minigpt4_7b.pth: does not exist"),
        (("run_edit.py", *MISSING, "method=mend", "editor_dir=nowhere"), 2, "data.vqa.train"),
        (("run_edit.py", *MISSING, "method=unik"), 2, "did you mean 'unike'?"),
        (("run_edit.py", "--hparams_dir", "hparams/nothing.yaml"), 2, "no such file"),
        (("run_edit.py", "--hparams_dir", "hparams/tiny_blip2.yaml", "--check"), 0, "ready to run"),
        (("run_edit.py", "--help"), 0, "--sequence_length"),
        (("run_edit.py", "ask", *MISSING, "--edits", "nowhere", "what is it?"), 2, "nowhere: no such folder"),
        (("unike.edits", "list", "nowhere"), 2, "nowhere: no such folder"),
        (("unike.edits", "show", "nowhere", "vqa-0"), 2, "nowhere: no such folder"),
        (("unike.tables", "compare", "nowhere", "elsewhere"), 2, "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_torch_is_not_imported_to_say_what_is_missing(
    arguments: tuple[str, ...], code: int, shown: str
) -> None:
    done = in_shell(*arguments)
    assert done.returncode == code, done.stderr
    assert shown in done.stdout + done.stderr
    # The minutes that a check announces are measured with torch, after all else.
    assert done.stdout.splitlines()[-1] == ("torch" if "--check" in arguments else "no torch")


def test_edits_are_listed_without_torch(tmp_path: Path) -> None:
    EditStore(tmp_path / "edits").add(made("a"))
    for command in (("list",), ("show", "a")):
        done = in_shell("unike.edits", command[0], str(tmp_path / "edits"), *command[1:])
        assert done.returncode == 0, done.stderr
        assert "a fox" in done.stdout
        assert done.stdout.splitlines()[-1] == "no torch"


def test_every_kind_of_edit_is_known_where_nothing_else_is_imported() -> None:
    code = (
        "from unike.edits.base import find_kind\n"
        "try: find_kind('none')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    kinds = "codebook, experts, factors, gated, memory, mixed, prompt, routed, side_memory, weights"
    assert f"expected one of {kinds}" in done.stdout
