"""Faults of the machine, as a user at a shell meets them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from helpers import Project, record
from test_faults import lines, same_end, summary_of
from test_run_edit import ROOT

from unike.runs.records import RECORDS, read_lines

pytestmark = pytest.mark.slow

SHELL = ("--task", "vqa", "edit_batch_size=1", "max_steps=3")


def shell(project: Project, *arguments: str, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "run_edit.py"), "--hparams_dir", str(project.yaml), *SHELL]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, *arguments], cwd=project.root, env=environment, stdout=pipe, stderr=pipe, text=True, **more
    )


def said(process: subprocess.Popen[str], code: int) -> list[str]:
    """The lines of error of a process that ends with this code."""
    _, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]


def test_a_limit_of_the_system_on_files(copied: Project) -> None:
    resource = pytest.importorskip("resource")
    assert said(shell(copied, "--output", "whole"), 0) == []
    size = (copied.root / "whole" / RECORDS).stat().st_size

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 5 // 8, resource.RLIM_INFINITY))

    (line,) = said(shell(copied, "--output", "run", preexec_fn=limit), 2)
    assert "run: cannot be written: File too large; what is recorded is kept, continue with --resume" in line
    assert lines(copied.root / "run") == lines(copied.root / "whole")[:2]
    assert said(shell(copied, "--output", "run", "--resume"), 0) == []
    assert same_end(copied.root / "run", copied.root / "whole")


def test_ctrl_c_and_other_hparams_than_before(copied: Project) -> None:
    copied.write_records([record(5 + i % 4) for i in range(40)])
    assert said(shell(copied, "--output", "whole"), 0) == []
    process, path = shell(copied, "--output", "run"), copied.root / "run" / RECORDS
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert said(process, 130) == []
    summary = summary_of(copied.root / "run")
    assert summary["interrupted"]
    # What is not yet on the disk when Ctrl-C comes is cut off again.
    assert 1 <= summary["n"] == len(read_lines(copied.root / "run")) < 40
    before = {p: p.read_bytes() for p in (copied.root / "run").iterdir()}
    (line,) = said(shell(copied, "--output", "run", "--resume", "k=2"), 2)
    assert line == "error: run: k: 3 in the run to resume, 2 now"
    assert {p: p.read_bytes() for p in (copied.root / "run").iterdir()} == before
    assert said(shell(copied, "--output", "run", "--resume", "prefix_memory_gb=1"), 0) == []
    assert same_end(copied.root / "run", copied.root / "whole")
