"""Tunes methods on the validation split: the same number of trials for each, all of them in a log.

    python -m scripts.tune --method mend --backbones tiny_blip2
    python -m scripts.tune --method all --backbones tiny_blip2 tiny_minigpt4 --jobs 2

hparams/tuning.yaml has the grids. A trial is one setting: what learns is trained on the train split, and the
first records of the validation split are edited and evaluated. It is a line of the log
(``docs/tuning/<backbone>-<method>.jsonl``): what has a line is not run again, and what was interrupted
continues. The eval split is opened only to check that validation shares no record with it. Exit code 0, 1 if
trials could not be run, 2 for problems with the input (one line each), 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import tuning
from scripts.plan import BACKBONES
from scripts.tables import report_outcome
from scripts.tuning import Entry, Trial, TuningPlan
from scripts.workers import WorkOutcome, count_jobs, ensure
from unike.config.hparams import HyperParams
from unike.methods.registry import resolve_needs
from unike.runs.drawing import check_drawing, get_drawing_folder, list_missing_splits, wants_drawing
from unike.system.findings import collect_problems
from unike.system.launching import count_most_processes, run_guarded
from unike.system.paths import check_path
from unike.system.places import require_folder
from unike.types import UserError

# A trial that ends so counts as one: its setting is what failed.
_DIVERGED = ("FloatingPointError", "no record succeeded")


@dataclass(frozen=True)
class Work:
    """A method's trials on a backbone, and their log."""

    method: str
    backbone: str
    base: HyperParams
    trials: tuple[Trial, ...]
    log: Path


def plan_work(args: argparse.Namespace, plan: TuningPlan) -> list[Work]:
    """Every method's trials on every backbone. One UserError with every problem of plan and data."""
    names = list(plan.methods) if "all" in args.method else list(dict.fromkeys(args.method))
    known = f"expected {', '.join(plan.methods)} or all"
    problems = [f"--method: {n}: not in {plan.source}; {known}" for n in names if n not in plan.methods]
    found: list[Work] = []
    for backbone in dict.fromkeys(args.backbones):
        for name in names:
            if name in plan.methods:
                problems += collect_problems(lambda n=name, b=backbone: found.append(_plan(args, plan, n, b)))
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return found


def _plan(args: argparse.Namespace, plan: TuningPlan, method: str, backbone: str) -> Work:
    base = tuning.read_base(plan, method, backbone, args.overrides, args.plan.parent)
    if wants_drawing(base) and not args.val:
        _draw(base)
    val = tuning.find_validation(base, args.val)
    trials = tuning.make_trials(plan, method, base, backbone, val, args.output)
    return Work(method, backbone, base, tuple(trials), tuning.get_log(args.log, backbone, method))


def _draw(hparams: HyperParams) -> None:
    """Draws train and validation split of the bundled benchmark, where they are missing."""
    wanted = ("train", "val")
    check_drawing(hparams, list_missing_splits(get_drawing_folder(hparams), wanted))
    from scripts.tiny import make_data

    make_data.ensure(hparams, wanted)


def run_trials(work: Work, plan: TuningPlan, jobs: int | None, locks: Path) -> WorkOutcome:
    """Runs the trials that the log lacks, and writes a line for each as soon as it is finished."""

    def write(_: str = "") -> None:
        tuning.log_finished(work.trials, plan, work.log, locks)

    write()
    known = {entry["key"] for entry in tuning.read_log(work.log)}
    todo = [trial for trial in work.trials if trial.key not in known]
    outcome = WorkOutcome()
    # What trials share is prepared with the first of them.
    parts = [todo[:1], todo[1:]] if resolve_needs(work.base).knowledge else [todo]
    for part in parts:
        if not part or outcome.interrupted:
            continue
        count = min(jobs or count_jobs(), len(part))
        places = {trial.run.folder: str(n % count) for n, trial in enumerate(part)}
        found = ensure(
            [trial.run for trial in part], jobs, apart=lambda run, p=places: p[run.folder], done=write
        )
        outcome.interrupted |= found.interrupted
        outcome.failures += found.failures
    write()
    return _log_diverged(work, plan, outcome, locks)


def _log_diverged(work: Work, plan: TuningPlan, outcome: WorkOutcome, locks: Path) -> WorkOutcome:
    """Writes down the trials whose loss stopped being a number; the failures that are left."""
    left: list[str] = []
    for failure in outcome.failures:
        reason = failure.splitlines()[0]
        trial = next((t for t in work.trials if failure.startswith(f"{t.run.name}: ")), None)
        if trial is not None and any(word in reason for word in _DIVERGED):
            entry = tuning.describe_trial(trial, plan, reason.removeprefix(f"{trial.run.name}: "))
            tuning.add_to_log(work.log, [entry], locks)
        else:
            left.append(failure)
    return WorkOutcome(outcome.interrupted, left)


# ---------------------------------------------------------------- what is printed


def render(work: Work, plan: TuningPlan) -> str:
    """The trials as a Markdown table, with the winner and what should be known of it."""
    by_key = {entry["key"]: entry for entry in tuning.read_log(work.log)}
    found = [(trial, by_key.get(trial.key)) for trial in work.trials]
    names = list(plan.methods[work.method].options)
    head = ["trial", *names, "HM5", "HM8", "HM8 min.", "train s", "steps", "stopped"]
    lines = [
        f"## {work.method}, {work.backbone}: {plan.trials} trials on {plan.records} validation records, "
        f"{plan.mode.replace('_', '-')}",
        "",
        f"| {' | '.join(head)} |",
        f"| {' | '.join('--:' for _ in head)} |",
        *(_render_row(trial, entry, names, plan.mode) for trial, entry in found),
        "",
    ]
    from unike.methods.meta_training import CAP

    winner = choose_winner([entry for _, entry in found if entry is not None])
    if winner is None:
        lines.append("no winner: no trial is finished")
    else:
        options = " ".join(f"{name}={_write_value(value)}" for name, value in winner["options"].items())
        lines.append(
            f"winner: trial {winner['trial']}: {options} ({winner['score_of']}: {winner['score']:.1f})"
        )
    if capped := [e["trial"] for _, e in found if e is not None and e.get("stopped") == CAP]:
        lines.append(
            f"stopped by editor_steps, not by editor_patience: trial {', '.join(map(str, capped))}; a higher "
            "cap may change the winner"
        )
    return "\n".join(lines) + "\n"


def choose_winner(entries: Sequence[Entry]) -> Entry | None:
    """The entry of the highest score; of equal ones that of the higher harmonic mean of the five, then the
    earlier."""
    scored = [entry for entry in entries if entry["score"] is not None]
    if not scored:
        return None
    return max(scored, key=lambda e: (e["score"], sum(e["hm5"].values()), -e["trial"]))


def _render_row(trial: Trial, entry: Entry | None, names: Sequence[str], mode: str) -> str:
    cells = [str(trial.number), *(_write_value(trial.options[name]) for name in names)]
    if entry is None:
        return f"| {' | '.join([*cells, 'not run', '', '', '', '', ''])} |"
    if entry["score"] is None:
        return f"| {' | '.join([*cells, 'failed', '', '', '', '', ''])} |"
    means = [_write_number(entry[name].get(mode), 1) for name in ("hm5", "hm8", "hm8_minimal")]
    cost = [_write_number(entry["train_seconds"], 0), _write_number(entry["steps"], 0)]
    return f"| {' | '.join([*cells, *means, *cost, entry['stopped'] or ''])} |"


def _write_number(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}"


def _write_value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------- the command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--method", nargs="+", required=True, metavar="NAME", help="grids of the plan, or all")
    add("--backbones", nargs="+", default=list(BACKBONES), metavar="NAME", help="YAMLs, by name")
    add("--val", action="append", default=[], metavar="TASK=FILE", help="validation annotations")
    add("--jobs", type=int, metavar="N", help="processes; default: one per core, one on a GPU")
    add("--output", type=Path, default=tuning.OUTPUT, metavar="DIR", help="where records and editors are")
    add("--log", type=Path, default=tuning.LOGS, metavar="DIR", help="where the logs are")
    add("--plan", type=Path, default=tuning.GRID, metavar="FILE", help="the grids")
    add("overrides", nargs="*", metavar="key=value", help="changes to every trial")
    args = parser.parse_intermixed_args(argv)
    # Lists of names take what follows them, overrides too.
    for names in (args.method, args.backbones):
        args.overrides += [name for name in names if "=" in name]
        names[:] = [name for name in names if "=" not in name]
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """UserError, a line for each, for mistaken options; ``val`` becomes files by task."""
    most, wrong = count_most_processes(), []
    if args.jobs is not None and not 1 <= args.jobs <= most:
        wrong.append(f"--jobs: {args.jobs}; expected 1 to {most} on this machine")
    files: dict[str, str] = {}
    for text in args.val:
        task, sign, path = text.partition("=")
        if not sign or not Path(path).is_file():
            wrong.append(f"--val: {text}: expected TASK=FILE, with annotations in MMEdit's layout")
        files[task] = path
    for key in (text.partition("=")[0] for text in args.overrides):
        if key.startswith("data.") and key.endswith(".eval"):
            wrong.append(f"{key}: tuning evaluates the validation split alone; give --val TASK=FILE")
    for name in ("output", "log"):
        place = f"--{name}"
        wrong += collect_problems(
            lambda n=name, p=place: require_folder(check_path(getattr(args, n), p, "a folder"), f"{p}: ")
        )
    if wrong:
        raise UserError(*wrong)
    args.val = files


def run(args: argparse.Namespace) -> int:
    check_arguments(args)
    plan = tuning.read_tuning(args.plan)
    code = 0
    for work in plan_work(args, plan):
        outcome = run_trials(work, plan, args.jobs, args.output)
        print(render(work, plan), flush=True)
        code = max(code, report_outcome(outcome))
        if outcome.interrupted:
            break
    return code


def main(argv: Sequence[str] | None = None) -> int:
    return run_guarded(lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
