"""The kill test and the fuzzer in small, and that both of them see what they are there to see."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Project

from benchmarks import fuzz, kill, mutants
from unike.runs.records import MANIFEST, RECORDS, SUMMARY
from unike.types import UserError

ROOT = Path(__file__).parents[1]


def started(*arguments: str) -> str:
    """What the module says that is run with these arguments, and ends well."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---------------------------------------------------------------- killed runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "records"),
    [(["--protocol", "one_step"], 4), (["--protocol", "sequential", "sequence_length=2", "sequences=2"], 8)],
    ids=["one_step", "sequential"],
)
def test_killed_runs_end_as_undisturbed_ones(copied: Project, protocol: list[str], records: int) -> None:
    options = ["--runs", "2", "--size", "4", "--hparams_dir", str(copied.yaml)]
    said = started("benchmarks.kill", *options, *protocol, "max_steps=20", "stop_loss=0")
    assert said.startswith("2 runs, ")
    assert not said.startswith("2 runs, 0 kills")
    assert f"{2 * records} records: 0 lost, 0 doubled, 0 files differ" in said


def run_folder(folder: Path, ids: str, seed: int = 1) -> Path:
    folder.mkdir()
    lines = (json.dumps({"id": name, "seconds": random.random()}) + "\n" for name in ids)
    (folder / RECORDS).write_text("".join(lines))
    (folder / SUMMARY).write_text(json.dumps({"n": len(ids), "peak_memory_bytes": random.random()}))
    (folder / MANIFEST).write_text(json.dumps({"seed": seed, "started": random.random()}))
    return folder


@pytest.mark.parametrize(
    ("ids", "seed", "lost", "doubled", "differing"),
    [
        ("abc", 1, 0, 0, []),
        ("ab", 1, 1, 0, [RECORDS, SUMMARY]),
        ("abcc", 1, 0, 1, [RECORDS, SUMMARY]),
        ("acb", 1, 0, 0, [RECORDS]),
        ("abc", 2, 0, 0, [MANIFEST]),
    ],
)
def test_the_kill_test_sees(tmp_path: Path, ids, seed, lost, doubled, differing) -> None:
    whole, outcome = run_folder(tmp_path / "whole", "abc"), kill.KillCounts()
    kill._compare(run_folder(tmp_path / "run", ids, seed), whole, outcome)
    assert (outcome.lost, outcome.doubled) == (lost, doubled)
    assert outcome.differing == [f"run/{name}" for name in differing]
    assert outcome.ok == (not differing)


def test_the_kill_test_sees_what_a_killed_run_left(tmp_path: Path) -> None:
    whole, outcome = run_folder(tmp_path / "whole", "abc"), kill.KillCounts()
    (run_folder(tmp_path / "run", "abc") / ".summary.json.1.tmp").touch()
    kill._compare(tmp_path / "run", whole, outcome)
    assert not outcome.ok


# ---------------------------------------------------------------- damaged inputs


@pytest.mark.slow
def test_damaged_inputs_are_loaded_or_refused() -> None:
    said = started("benchmarks.fuzz", "--mutants", "600", "--shell", "1", "--seed", "7")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.strip().splitlines()[2:]]
    assert [row[0] for row in rows] == [*fuzz.TARGETS, "shell"]
    for _, count, loaded, refused, failed, _ in rows:
        assert int(loaded) + int(refused) == int(count) > 0
        assert failed == "0"
    assert sum(int(row[2]) for row in rows) > 0
    assert sum(int(row[3]) for row in rows) > 0


@pytest.fixture(scope="module")
def audited() -> None:
    """Python takes no such hook back: outside of ``watch_effects`` it looks at nothing."""
    sys.addaudithook(fuzz._audit)


def plain() -> bool:
    return True


def refuses(*lines: str) -> Callable[[], bool]:
    def take() -> bool:
        raise UserError(*lines)

    return take


def forever() -> bool:
    while True:
        pass


def writes(path: Path) -> Callable[[], bool]:
    return lambda: path.write_text("x") > 0


def deletes(path: Path) -> Callable[[], bool]:
    path.touch()
    return lambda: path.unlink() is None


@pytest.mark.usefixtures("audited")
def test_the_fuzzer_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    former = signal.signal(signal.SIGPROF, fuzz._raise_hang)
    takes: dict[str, tuple[Any, str, str]] = {
        "sound": (plain, "loaded", ""),
        "refused": (refuses("a.yaml: k: expected a number"), "refused", ""),
        "a bug": (lambda: {}["x"], "failed", "KeyError"),
        "another meaning": (
            lambda: mutants.require(False, "k is another"),
            "failed",
            "k is another",
        ),
        "no line": (refuses(), "failed", "0 bad lines"),
        "an empty line": (refuses(" "), "failed", "1 bad lines"),
        "two lines in one": (refuses("a\nb"), "failed", "1 bad lines"),
        "a long line": (refuses("a" * 3000), "failed", "1 bad lines"),
        "no text": (refuses("\ud800"), "failed", "no UTF-8"),
        "writes": (writes(tmp_path / "x"), "failed", "touched"),
        "deletes": (deletes(tmp_path / "y"), "failed", "touched"),
        "starts": (lambda: os.system("true") == 0, "failed", "touched"),
        "hangs": (forever, "failed", "more than 0.3 s"),
    }
    try:
        for name, (take, verdict, reason) in takes.items():
            found = fuzz.judge(take)
            assert found[0] == verdict, name
            assert reason in found[1] if reason else not found[1], name
    finally:
        signal.signal(signal.SIGPROF, former)


def test_a_mutant_is_made_again_from_its_number(tmp_path: Path) -> None:
    for name, make in fuzz.TARGETS.items():
        made = []
        for again in ("one", "two"):
            folder = tmp_path / name / again
            folder.mkdir(parents=True)
            make(folder, random.Random(f"3/{name}/5"))
            made.append(
                {p.relative_to(folder): p.read_bytes() for p in folder.glob("*") if p.is_file()}
                | {p.relative_to(folder): p.read_bytes() for p in folder.glob("knowledge/*")}
                | {p.relative_to(folder): p.read_bytes() for p in folder.glob("edit/*")}
            )
        assert made[0] == made[1] != {}
