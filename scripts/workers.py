"""Runs the missing rows of a plan: groups of rows on one backbone and one set of cases, in processes.

    outcome = ensure(read_plan(...), jobs=2)

Every record is written to its run's folder at once: after Ctrl-C, a failure or a kill, the same call
continues.
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
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from scripts.plan import Run, is_complete, name_protocol
from unike import runs
from unike.config.hparams import OPTIONS
from unike.runs import checks, inputs
from unike.runs.drawing import wants_drawing
from unike.runs.records import read_manifest
from unike.system import findings
from unike.system.launching import count_cores, die_with_parent, ignore_interrupts, share_cores
from unike.types import UserError

if TYPE_CHECKING:
    from unike.backbones.prefix import PrefixCache
    from unike.evaluation.reader import Reader
    from unike.runs.parts import Parts

PATIENCE = 60.0
# Groups of options whose numbers decide how an edit is made, not which inputs it needs.
_NUMBERS = ("method", "intrinsic")
Report = Callable[[str, Any], None]


@dataclass
class WorkOutcome:
    """How the work ended: by Ctrl-C, or with failures, one text per row that could not be run."""

    interrupted: bool = False
    failures: list[str] = field(default_factory=list)


def ensure(
    planned: Sequence[Run],
    jobs: int | None = None,
    apart: Callable[[Run], str] | None = None,
    done: Callable[[str], None] | None = None,
) -> WorkOutcome:
    """Runs the incomplete runs and returns how they ended; complete runs are not loaded.

    ``jobs`` processes share the cores; None: one per core, or one if there is a GPU. Runs of which ``apart``
    gives the same name are one group; groups prepare at the same time, so that none may need what another
    one prepares. Without it ``group_runs`` makes the groups, and those of a backbone prepare one after the
    other. ``done`` is called with the name of each run that has all its records. All inputs are checked
    first: UserError with every problem, also if a complete run was made from other data.
    """
    by_folder: dict[Path, Run] = {}
    for run in planned:
        by_folder.setdefault(run.folder, run)
    todo = [run for run in by_folder.values() if not is_complete(run)]
    findings.require(*(partial(_check_unchanged, run) for run in by_folder.values() if is_complete(run)))
    if not todo:
        return WorkOutcome()
    check_inputs(todo)
    jobs = jobs or count_jobs()
    groups = group_runs(todo, jobs) if apart is None else _group_by(todo, apart)
    jobs = min(jobs, len(groups))
    with tqdm(total=len(todo), desc="rows", unit="row", dynamic_ncols=True) as bar:
        watch = _Watcher(bar, done)
        try:
            if jobs == 1:
                for group in groups:
                    run_group(group, nullcontext(), watch, lambda: False)
            else:
                _ProcessPool(groups, jobs, watch, apart).run()
        except KeyboardInterrupt:
            watch.outcome.interrupted = True
    return watch.outcome


def count_jobs() -> int:
    """One process per core that this one may use; a GPU is not shared."""
    import torch

    return 1 if torch.cuda.is_available() else count_cores()


def check_inputs(todo: Sequence[Run]) -> None:
    """Checks all inputs of the runs before a model is loaded; UserError with every problem. The benchmark of
    the bundled toy models is drawn if it is missing."""
    findings.require(
        *(partial(checks.require_backbone, run.hparams) for run in _pick_distinct(todo, by_yaml=True))
    )
    drawn = [run for run in _pick_distinct(todo) if run.is_drawn or wants_drawing(run.hparams)]
    findings.require(*(partial(_draw, run) for run in drawn))
    findings.require(
        *(partial(runs.read_checked_cases, r.hparams, r.task, r.size) for r in _pick_distinct(todo))
    )


def _draw(run: Run) -> None:
    from scripts.tiny import make_data

    make_data.ensure(run.hparams)


def _pick_distinct(todo: Sequence[Run], by_yaml: bool = False) -> list[Run]:
    """One run for each YAML, block and combination of options, or with ``by_yaml`` for each YAML and method:
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


def _check_unchanged(run: Run) -> None:
    """UserError if the data have changed since the run; without the data there is nothing to compare."""
    try:
        now = runs.compute_checksums(run.hparams, run.task)
    except UserError:
        return
    then = read_manifest(run.folder).get("data", {})
    changed = [key for key in now.keys() | then.keys() if now.get(key) != then.get(key)]
    if changed:
        what = ", ".join(sorted(changed))
        raise UserError(f"{run.folder}: {what}: changed since; delete the folder or name another --output")


def group_runs(todo: Sequence[Run], jobs: int = 1) -> list[list[Run]]:
    """Runs that share a backbone and its answers, the most work first: all on the same cases, or by
    protocol and length as well if there would be fewer groups than ``jobs``."""
    whole, parts = (
        _group_by(todo, _identify_cases),
        _group_by(todo, lambda run: (_identify_cases(run), name_protocol(run.hparams))),
    )
    return sorted(whole if len(whole) >= jobs else parts, key=lambda group: -sum(map(_estimate_work, group)))


def _group_by(todo: Sequence[Run], what: Callable[[Run], Any]) -> list[list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in todo:
        found.setdefault(repr(what(run)), []).append(run)
    return list(found.values())


def _identify_cases(run: Run) -> tuple[Any, ...]:
    hp = run.hparams
    data = (hp.data, hp.image_root, hp.rephrase_root, hp.clean, run.size)
    return run.backbone, replace(hp.backbone, source=""), hp.max_new_tokens, data, run.task


def _estimate_work(run: Run) -> float:
    """Roughly the number of edits; an edit of a sequence counts three times, a caption 1.5 times."""
    hp = run.hparams
    edits = (run.size or 200) if hp.protocol == "one_step" else 3 * hp.sequences * hp.sequence_length
    return edits * (1.5 if run.task == "caption" else 1.0)


class _Readers:
    """The readers of a process: lower-layer activations are cached by layer, answers of the base model for
    all rows."""

    def __init__(self) -> None:
        self._prefixes: dict[Any, PrefixCache] = {}
        self._readers: list[Reader] = []

    def get(self, parts: Parts) -> Reader:
        """A row's reader, with the other readers' answers of the base model."""
        own = parts.prefixes
        parts.prefixes = self._prefixes.setdefault((own.first, own.batch, own.alone), own)
        reader = parts.make_reader()
        for other in self._readers:
            if reader.share_base(other):
                break
        else:
            self._readers.append(reader)
        return reader


def run_group(group: Sequence[Run], lock: Any, report: Report, stopped: Callable[[], bool]) -> None:
    """Runs a group's rows one by one; a row that fails is reported, and the next one follows."""
    # On first use, as torch above: bad input is said before the seconds that they take.
    from unike.backbones import load_backbone

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
            # Editors and knowledge are prepared on first use: by one process, not by all.
            with lock:
                parts = runs.assemble(run.hparams, backbone, progress=False)
            reader = readers.get(parts)
            with runs.open_run(parts, run.task, run.folder, resume=run.folder.exists()) as writer:
                found = runs.run_cases(parts, cases, writer, progress=False, reader=reader)
        except UserError as error:
            report("failed", (run.name, "; ".join(error.problems), 1))
        except Exception as error:
            report("failed", (run.name, f"{error!r}\n{traceback.format_exc()}", 1))
        else:
            if found["interrupted"]:
                raise KeyboardInterrupt
            if not found["n"]:
                reasons = [failure["reason"] for failure in found["failures"]]
                report("failed", (run.name, f"no record succeeded: {'; '.join(reasons[:3])}", 1))
                continue
            report("done", (run.name, found["n"], found["failed"], time.perf_counter() - started))


class _Watcher:
    """Turns reports into progress lines and the outcome."""

    def __init__(self, bar: Any, done: Callable[[str], None] | None = None) -> None:
        self.bar, self.outcome, self.done = bar, WorkOutcome(), done

    def __call__(self, kind: str, what: Any) -> None:
        if kind == "done":
            name, n, failed, seconds = what
            broken = f", {failed} failed" if failed else ""
            self._print(f"{name}: {n} records{broken}, {seconds:.0f} s")
            self.bar.update()
            if self.done is not None:
                self.done(name)
        elif kind == "failed":
            name, why, rows = what
            self.outcome.failures.append(f"{name}: {why}")
            self._print(f"{name}: failed: {why}")
            self.bar.update(rows)

    def _print(self, line: str) -> None:
        # Standard output is for the table only.
        self.bar.write(line, file=sys.stderr)


class _ProcessPool:
    """Processes, at most ``jobs`` at a time, each with a group of runs."""

    def __init__(
        self,
        groups: Sequence[list[Run]],
        jobs: int,
        watch: _Watcher,
        apart: Callable[[Run], str] | None = None,
    ) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.name_lock = apart or (lambda run: run.backbone)
        self.waiting, self.jobs, self.watch = list(groups), jobs, watch
        self.reports = self.context.Queue()
        self.stop = self.context.Event()
        self.locks = {self.name_lock(group[0]): self.context.Lock() for group in groups}
        self.running: list[Any] = []

    def run(self) -> None:
        try:
            with share_cores(self.jobs):
                while (self.waiting or self.running) and not self.stop.is_set():
                    while self.waiting and len(self.running) < self.jobs:
                        self._start(self.waiting.pop(0))
                    self._listen(0.2)
                    self._check_processes()
        except KeyboardInterrupt:
            self.watch.outcome.interrupted = True
        finally:
            self._end()

    def _start(self, group: list[Run]) -> None:
        target = (group, self.locks[self.name_lock(group[0])], self.reports, self.stop)
        process = self.context.Process(target=_run_child, args=target, name=group[0].name)
        # A child ignores Ctrl-C while it starts: it would print tracebacks of its imports.
        with ignore_interrupts():
            process.start()
        self.running.append(process)

    def _listen(self, seconds: float) -> None:
        try:
            while True:
                self.watch(*self.reports.get(timeout=seconds))
                seconds = 0.0
        except queue.Empty:
            return

    def _check_processes(self) -> None:
        for process in [p for p in self.running if not p.is_alive()]:
            self.running.remove(process)
            if process.exitcode:
                # It may have died while it held a lock: the others would wait forever.
                why = f"its process ended with code {process.exitcode}"
                self.watch("failed", (process.name, why, 0))
                self.stop.set()

    def _end(self) -> None:
        """Sends SIGINT so that the children write what they have, then ends them."""
        self.stop.set()
        for process in self.running:
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)
        until = time.monotonic() + PATIENCE
        while any(p.is_alive() for p in self.running) and time.monotonic() < until:
            self._listen(0.2)
        for process in self.running:
            process.terminate()
            process.join()
        self._listen(0.2)


def _run_child(group: Sequence[Run], lock: Any, reports: Any, stop: Any) -> None:
    def interrupt_once(*_: Any) -> None:
        # Ctrl-C reaches a process twice, from the terminal and from the parent.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    die_with_parent()
    try:
        signal.signal(signal.SIGINT, interrupt_once)
        run_group(group, lock, lambda kind, what: reports.put((kind, what)), stop.is_set)
    except KeyboardInterrupt:
        return
