"""Kill test: runs ended by SIGKILL at random moments and resumed, held against one that nobody disturbed.

    python -m benchmarks.kill --runs 50 --size 20
    python -m benchmarks.kill --runs 3 --size 8 edit_batch_size=2
    python -m benchmarks.kill --runs 10 --protocol sequential sequence_length=5 sequences=4

Each attempt is a process of its own, forked from one that has loaded the backbone and edited nothing, so
that every attempt starts with empty caches. Half of the kills come at a moment drawn from the time of the
undisturbed run, half as soon as a drawn number of bytes is recorded. A run is killed up to ``--kills`` times
and then goes on to its end. Records, summary and manifest must be the undisturbed run's, byte for byte, once
times, memory and the list of starts are left out. Ends with 1 where something differs. Needs ``os.fork``.
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

# What no two runs share: how long they took, what they held, when and how they were started.
VARYING = frozenset({"seconds", "peak_memory_bytes", "started", "resumed", "command"})
_PAUSE = 0.0005

Attempt = Callable[[Path], None]


@dataclass
class Outcome:
    """What the runs came to: attempts killed, attempts killed after some records, faults found."""

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


def comparable(path: Path) -> bytes:
    """A run's file without what varies from run to run."""
    lines = path.read_text("utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
    return "\n".join(json.dumps(_without(json.loads(line))) for line in lines).encode()


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items() if key not in VARYING}
    return [_without(item) for item in value] if isinstance(value, list) else value


def attempt(parts: runs.Parts, cases: Sequence[Case], task: str, generated: bool = True) -> Attempt:
    """Starts a run in a folder, or goes on with the one that is there."""

    def start(folder: Path) -> None:
        resume = (folder / MANIFEST).exists()
        with runs.open_run(parts, task, folder, resume, generated) as writer:
            runs.run_cases(parts, cases, writer, generated, progress=False)

    return start


def forked(work: Callable[[], None]) -> int:
    """Runs ``work`` in a copy of this process and gives its id."""
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


def _ended(child: int) -> int | None:
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _killed(child: int, due: Callable[[], bool]) -> bool:
    """Whether the process was killed as soon as ``due``, or had ended by itself before."""
    while (code := _ended(child)) is None:
        if due():
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        time.sleep(_PAUSE)
    if code:
        raise RuntimeError(f"an attempt ended with {code}")
    return False


def _moment(draw: random.Random, seconds: float, size: int, records: Path) -> Callable[[], bool]:
    """When to kill: at a moment of the run's time, or once so many bytes are recorded."""
    if draw.random() < 0.5:
        until = time.monotonic() + draw.uniform(0, seconds)
        return lambda: time.monotonic() >= until
    wanted = draw.randint(1, size)
    return lambda: records.exists() and records.stat().st_size >= wanted


def _compare(folder: Path, whole: Path, outcome: Outcome) -> None:
    names = [Counter(json.loads(line)["id"] for line in (f / RECORDS).open()) for f in (whole, folder)]
    outcome.runs += 1
    outcome.records += names[1].total()
    outcome.lost += (names[0] - names[1]).total()
    outcome.doubled += sum(count - 1 for count in names[1].values())
    for name in (RECORDS, SUMMARY, MANIFEST):
        if comparable(folder / name) != comparable(whole / name):
            outcome.differing.append(f"{folder.name}/{name}")
    if {p.name for p in folder.iterdir()} != {p.name for p in whole.iterdir()}:
        outcome.differing.append(f"{folder.name}: {sorted(p.name for p in folder.iterdir())}")


def kill_test(start: Attempt, folder: Path, number: int, kills: int, seed: int) -> Outcome:
    """``number`` runs below ``folder``, each killed up to ``kills`` times, against an undisturbed one."""
    whole, outcome = folder / "whole", Outcome()
    began = time.monotonic()
    _killed(forked(lambda: start(whole)), lambda: False)
    seconds, size = time.monotonic() - began, (whole / RECORDS).stat().st_size
    for i in range(number):
        own, draw = folder / f"run-{i:02}", random.Random(f"{seed}/{i}")
        for _ in range(draw.randint(1, kills)):
            child = forked(lambda own=own: start(own))  # type: ignore[misc]
            if not _killed(child, _moment(draw, seconds, size, own / RECORDS)):
                break
            outcome.kills += 1
            outcome.in_between += (own / RECORDS).exists() and 0 < (own / RECORDS).stat().st_size < size
        _killed(forked(lambda own=own: start(own)), lambda: False)  # type: ignore[misc]
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
        outcome = kill_test(attempt(parts, cases, args.task), Path(folder), args.runs, args.kills, args.seed)
    print(outcome, f"({time.monotonic() - began:.0f} s)")
    print(*outcome.differing, sep="\n", end="")
    return 0 if outcome.ok else 1


if __name__ == "__main__":
    sys.exit(launching.run_guarded(main))
