"""Kill test: runs ended by SIGKILL at random moments and resumed, compared with an undisturbed run.

    python -m benchmarks.kill --runs 50 --size 20
    python -m benchmarks.kill --runs 3 --size 8 edit_batch_size=2
    python -m benchmarks.kill --runs 10 --protocol sequential sequence_length=5 sequences=4

Each attempt is a process of its own, forked from one that has loaded the backbone and edited nothing, so
every attempt starts with empty caches. Half of the kills come at a moment drawn from the time of the
undisturbed run, half once a drawn number of bytes is recorded. A run is killed up to ``--kills`` times and
then continues to its end. Records, summary and manifest must equal the undisturbed run's byte for byte, apart
from times, memory and the list of starts. Exit code 1 if something differs. Needs ``os.fork``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unike import runs
from unike.backbones import load_backbone
from unike.config.hparams import HyperParams
from unike.runs.records import MANIFEST, RECORDS, SUMMARY
from unike.system import launching
from unike.types import PROTOCOLS, Case

# The fields that differ between runs: durations, memory, when and how they were started.
VARYING = frozenset({"seconds", "peak_memory_bytes", "started", "resumed", "command"})
_PAUSE = 0.0005

Attempt = Callable[[Path], None]


@dataclass
class KillCounts:
    """Counts of runs, kills (``in_between``: after some records) and faults."""

    runs: int = 0
    kills: int = 0
    in_between: int = 0
    records: int = 0
    lost: int = 0
    doubled: int = 0
    differing: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.lost or self.doubled or self.differing)

    def __str__(self) -> str:
        return (
            f"{self.runs} runs, {self.kills} kills ({self.in_between} with a part of the records written), "
            f"{self.records} records: {self.lost} lost, {self.doubled} doubled, "
            f"{len(self.differing)} files differ"
        )


def read_comparable(path: Path) -> bytes:
    """The bytes of a run's file without the fields that vary from run to run."""
    lines = path.read_text("utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
    return "\n".join(json.dumps(_drop_varying(json.loads(line))) for line in lines).encode()


def _drop_varying(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_varying(item) for key, item in value.items() if key not in VARYING}
    return [_drop_varying(item) for item in value] if isinstance(value, list) else value


def make_attempt(parts: runs.Parts, cases: Sequence[Case], task: str, generated: bool = True) -> Attempt:
    """A function that starts a run in a folder, or continues the run that is there."""

    def start(folder: Path) -> None:
        resume = (folder / MANIFEST).exists()
        with runs.open_run(parts, task, folder, resume, generated) as writer:
            runs.run_cases(parts, cases, writer, generated, progress=False)

    return start


def fork_process(work: Callable[[], None]) -> int:
    """Runs ``work`` in a copy of this process; returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # the copy must never go on in the parent's place
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _poll(child: int) -> int | None:
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _kill_when(child: int, due: Callable[[], bool]) -> bool:
    """Kills the process once it is ``due``; False if it had ended by itself before."""
    while (code := _poll(child)) is None:
        if due():
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        time.sleep(_PAUSE)
    if code:
        raise RuntimeError(f"an attempt ended with {code}")
    return False


def _draw_moment(draw: random.Random, seconds: float, size: int, records: Path) -> Callable[[], bool]:
    """When to kill: at a moment of the run's time, or once a number of bytes is recorded."""
    if draw.random() < 0.5:
        until = time.monotonic() + draw.uniform(0, seconds)
        return lambda: time.monotonic() >= until
    wanted = draw.randint(1, size)
    return lambda: records.exists() and records.stat().st_size >= wanted


def _compare(folder: Path, whole: Path, outcome: KillCounts) -> None:
    names = [Counter(json.loads(line)["id"] for line in (f / RECORDS).open()) for f in (whole, folder)]
    outcome.runs += 1
    outcome.records += names[1].total()
    outcome.lost += (names[0] - names[1]).total()
    outcome.doubled += sum(count - 1 for count in names[1].values())
    for name in (RECORDS, SUMMARY, MANIFEST):
        if read_comparable(folder / name) != read_comparable(whole / name):
            outcome.differing.append(f"{folder.name}/{name}")
    if {p.name for p in folder.iterdir()} != {p.name for p in whole.iterdir()}:
        outcome.differing.append(f"{folder.name}: {sorted(p.name for p in folder.iterdir())}")


def run_kill_test(start: Attempt, folder: Path, number: int, kills: int, seed: int) -> KillCounts:
    """``number`` runs below ``folder``, each killed up to ``kills`` times, against an undisturbed one."""
    whole, outcome = folder / "whole", KillCounts()
    began = time.monotonic()
    _kill_when(fork_process(lambda: start(whole)), lambda: False)
    seconds, size = time.monotonic() - began, (whole / RECORDS).stat().st_size
    for i in range(number):
        own, draw = folder / f"run-{i:02}", random.Random(f"{seed}/{i}")
        for _ in range(draw.randint(1, kills)):
            child = fork_process(lambda own=own: start(own))  # type: ignore[misc]
            if not _kill_when(child, _draw_moment(draw, seconds, size, own / RECORDS)):
                break
            outcome.kills += 1
            outcome.in_between += (own / RECORDS).exists() and 0 < (own / RECORDS).stat().st_size < size
        _kill_when(fork_process(lambda own=own: start(own)), lambda: False)  # type: ignore[misc]
        _compare(own, whole, outcome)
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--hparams_dir", default="hparams/tiny_blip2.yaml", metavar="FILE")
    add("--task", choices=("vqa", "caption", "cross"), default="vqa")
    add("--protocol", choices=PROTOCOLS, default="one_step")
    add("--runs", type=int, default=50)
    add("--size", type=int, default=20, help="records of a run")
    add("--kills", type=int, default=3, help="most kills of a run")
    add("--seed", type=int, default=0)
    add("overrides", nargs="*", default=[], metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    torch.set_num_threads(1)  # threads do not survive a fork
    hparams = HyperParams.from_hparams(
        args.hparams_dir, ["edit_batch_size=4", f"protocol={args.protocol}", *args.overrides]
    )
    cases = runs.read_checked_cases(hparams, args.task, args.size)
    parts = runs.assemble(hparams, load_backbone(hparams), progress=False)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_kill_test(
            make_attempt(parts, cases, args.task), Path(folder), args.runs, args.kills, args.seed
        )
    print(outcome, f"({time.monotonic() - began:.0f} s)")
    print(*outcome.differing, sep="\n", end="")
    return 0 if outcome.ok else 1


if __name__ == "__main__":
    sys.exit(launching.run_guarded(main))
