"""Runs what a plan lacks: groups of rows on one backbone and one set of cases, worked off by processes.

    outcome = ensure(read_plan(...), jobs=2)

Everything lies in the runs' folders as it is made: after Ctrl-C, a failure or a kill, the same call
goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from scripts.plan import Run, is_complete, placed
from unike import runs
from unike.backbones import load_backbone
from unike.backbones.prefix import PrefixCache
from unike.config.hparams import OPTIONS
from unike.evaluation.reader import Reader
from unike.runs import checks, inputs
from unike.runs.parts import Parts
from unike.runs.records import read_manifest
from unike.system import findings
from unike.system.launching import count_cores, die_with_parent, ignore_interrupts, share_cores
from unike.types import UserError

PATIENCE = 60.0
# Groups of options whose numbers say how an edit is made, not what it needs.
_NUMBERS = ("method", "intrinsic")
Report = Callable[[str, Any], None]


@dataclass
class Outcome:
    """How the work ended: by Ctrl-C, or with failures, one text per row that could not be run."""

    interrupted: bool = False
    failures: list[str] = field(default_factory=list)


def ensure(planned: Sequence[Run], jobs: int | None = None) -> Outcome:
    """Runs what is not complete and gives back how that went; what is complete is not loaded.

    ``jobs`` processes share the cores; None: one per core, or one where there is a GPU. All inputs are
    checked first: UserError with every problem, also where a kept run was made from other data.
    """
    by_folder: dict[Path, Run] = {}
    for run in planned:
        by_folder.setdefault(run.folder, run)
    todo = [run for run in by_folder.values() if not is_complete(run)]
    findings.require(*(partial(_unchanged, run) for run in by_folder.values() if is_complete(run)))
    if not todo:
        return Outcome()
    check(todo)
    jobs = jobs or default_jobs()
    groups = grouped(todo, jobs)
    jobs = min(jobs, len(groups))
    with tqdm(total=len(todo), desc="rows", unit="row", dynamic_ncols=True) as bar:
        watch = _Watch(bar)
        try:
            if jobs == 1:
                for group in groups:
                    work(group, nullcontext(), watch, lambda: False)
            else:
                _Crew(groups, jobs, watch).run()
        except KeyboardInterrupt:
            watch.outcome.interrupted = True
    return watch.outcome


def default_jobs() -> int:
    """One process per core that this one may use; a GPU is not shared."""
    return 1 if torch.cuda.is_available() else count_cores()


def check(todo: Sequence[Run]) -> None:
    """Everything that the runs read, before a model is loaded; UserError with every problem. The
    embedded backbones' benchmark is drawn where it is missing."""
    findings.require(
        *(partial(checks.require_backbone, run.hparams) for run in _distinct(todo, by_yaml=True))
    )
    findings.require(*(partial(_draw, run) for run in _distinct(todo) if run.hparams.generate_data))
    findings.require(*(partial(runs.read_checked_cases, r.hparams, r.task, r.size) for r in _distinct(todo)))


def _draw(run: Run) -> None:
    from scripts.tiny import make_data

    make_data.ensure(run.hparams)


def _distinct(todo: Sequence[Run], by_yaml: bool = False) -> list[Run]:
    """One run for each YAML, block and way of working, or for each YAML and method alone ``by_yaml``:
    numbers that decide how an edit is made need no check of their own."""
    seen: dict[Any, Run] = {}
    for run in todo:
        hp = run.hparams
        ways = {
            name: value
            for name, value in hp.to_dict().items()
            if name != "k" and not (isinstance(value, float) and OPTIONS[name].group in _NUMBERS)
        }
        what = (hp.source, hp.method, hp.backbone) if by_yaml else (hp.source, run.task, run.size, ways)
        seen.setdefault(repr(what), run)
    return list(seen.values())


def _unchanged(run: Run) -> None:
    """UserError where the data have changed since the run; without the data there is nothing to compare."""
    try:
        now = runs.compute_checksums(run.hparams, run.task)
    except UserError:
        return
    kept = read_manifest(run.folder).get("data", {})
    changed = [key for key in now.keys() | kept.keys() if now.get(key) != kept.get(key)]
    if changed:
        what = ", ".join(sorted(changed))
        raise UserError(f"{run.folder}: {what}: changed since; delete the folder or name another --output")


def grouped(todo: Sequence[Run], jobs: int = 1) -> list[list[Run]]:
    """Runs that share a backbone and its answers, the most work first: all on the same cases, or by
    protocol and length as well where there would be fewer groups than ``jobs``."""
    whole, parts = _groups(todo, _cases), _groups(todo, lambda run: (_cases(run), placed(run.hparams)))
    return sorted(whole if len(whole) >= jobs else parts, key=lambda group: -sum(map(_work, group)))


def _groups(todo: Sequence[Run], what: Callable[[Run], Any]) -> list[list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in todo:
        found.setdefault(repr(what(run)), []).append(run)
    return list(found.values())


def _cases(run: Run) -> tuple[Any, ...]:
    hp = run.hparams
    data = (hp.data, hp.image_root, hp.rephrase_root, hp.clean, run.size)
    return run.backbone, replace(hp.backbone, source=""), data, run.task


def _work(run: Run) -> float:
    """Roughly: edits, three times as dear in a sequence; a caption has more tokens than an answer."""
    hp = run.hparams
    edits = (run.size or 200) if hp.protocol == "one_step" else 3 * hp.sequences * hp.sequence_length
    return edits * (1.5 if run.task == "caption" else 1.0)


class _Readers:
    """The readers of a process: states of the prompts are kept by layer, answers of the base model for
    all rows."""

    def __init__(self) -> None:
        self._prefixes: dict[Any, PrefixCache] = {}
        self._readers: list[Reader] = []

    def of(self, parts: Parts) -> Reader:
        """A row's reader, with what the others know."""
        own = parts.prefixes
        parts.prefixes = self._prefixes.setdefault((own.first, own.batch, own.alone), own)
        reader = parts.make_reader()
        for other in self._readers:
            if reader.share_base(other):
                break
        else:
            self._readers.append(reader)
        return reader


def work(group: Sequence[Run], lock: Any, report: Report, stopped: Callable[[], bool]) -> None:
    """Runs a group's rows one after the other; a row that fails is reported and the next one follows."""
    first = group[0]
    try:
        backbone = load_backbone(first.hparams)
        cases = inputs.open_datasets(first.hparams, first.task, first.size)
    except UserError as error:
        report("failed", (first.name, "; ".join(error.problems), len(group)))
        return
    readers = _Readers()
    for run in group:
        if stopped():
            return
        started = time.perf_counter()
        try:
            # Editors and knowledge are made on first use: by one process, not by all.
            with lock:
                parts = runs.assemble(run.hparams, backbone, progress=False)
            reader = readers.of(parts)
            with runs.open_run(parts, run.task, run.folder, resume=run.folder.exists()) as writer:
                found = runs.run_cases(parts, cases, writer, progress=False, reader=reader)
        except UserError as error:
            report("failed", (run.name, "; ".join(error.problems), 1))
        except Exception as error:
            report("failed", (run.name, f"{error!r}\n{traceback.format_exc()}", 1))
        else:
            if found["interrupted"]:
                raise KeyboardInterrupt
            report("done", (run.name, found["n"], found["failed"], time.perf_counter() - started))


class _Watch:
    """Turns reports into progress lines and the outcome."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.outcome = bar, Outcome()

    def __call__(self, kind: str, what: Any) -> None:
        if kind == "done":
            name, n, failed, seconds = what
            broken = f", {failed} failed" if failed else ""
            self._say(f"{name}: {n} records{broken}, {seconds:.0f} s")
            self.bar.update()
        elif kind == "failed":
            name, why, rows = what
            self.outcome.failures.append(f"{name}: {why}")
            self._say(f"{name}: failed: {why}")
            self.bar.update(rows)

    def _say(self, line: str) -> None:
        # Standard output is for the table alone.
        self.bar.write(line, file=sys.stderr)


class _Crew:
    """Processes, at most ``jobs`` at a time, each with a group of runs."""

    def __init__(self, groups: Sequence[list[Run]], jobs: int, watch: _Watch) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.left, self.jobs, self.watch = list(groups), jobs, watch
        self.reports = self.context.Queue()
        self.stop = self.context.Event()
        self.locks = {group[0].backbone: self.context.Lock() for group in groups}
        self.at_work: list[Any] = []

    def run(self) -> None:
        try:
            with share_cores(self.jobs):
                while (self.left or self.at_work) and not self.stop.is_set():
                    while self.left and len(self.at_work) < self.jobs:
                        self._start(self.left.pop(0))
                    self._listen(0.2)
                    self._look()
        except KeyboardInterrupt:
            self.watch.outcome.interrupted = True
        finally:
            self._end()

    def _start(self, group: list[Run]) -> None:
        target = (group, self.locks[group[0].backbone], self.reports, self.stop)
        process = self.context.Process(target=_child, args=target, name=group[0].name)
        # A child is deaf to Ctrl-C until it can end well: it would print tracebacks while it imports.
        with ignore_interrupts():
            process.start()
        self.at_work.append(process)

    def _listen(self, seconds: float) -> None:
        try:
            while True:
                self.watch(*self.reports.get(timeout=seconds))
                seconds = 0.0
        except queue.Empty:
            return

    def _look(self) -> None:
        for process in [p for p in self.at_work if not p.is_alive()]:
            self.at_work.remove(process)
            if process.exitcode:
                # It may have died with a lock in hand: the others would wait for it forever.
                why = f"its process ended with code {process.exitcode}"
                self.watch("failed", (process.name, why, 0))
                self.stop.set()

    def _end(self) -> None:
        """Lets the children write what they have, then ends them."""
        self.stop.set()
        for process in self.at_work:
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)
        until = time.monotonic() + PATIENCE
        while any(p.is_alive() for p in self.at_work) and time.monotonic() < until:
            self._listen(0.2)
        for process in self.at_work:
            process.terminate()
            process.join()
        self._listen(0.2)


def _child(group: Sequence[Run], lock: Any, reports: Any, stop: Any) -> None:
    def once(*_: Any) -> None:
        # Ctrl-C reaches a process twice, from the terminal and from the parent.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    die_with_parent()
    try:
        signal.signal(signal.SIGINT, once)
        work(group, lock, lambda kind, what: reports.put((kind, what)), stop.is_set)
    except KeyboardInterrupt:
        return
