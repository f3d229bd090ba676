"""Makes a table of the paper: runs what is missing, reads the rest, prints our figures and the paper's.

    python -m scripts.tables --table 1 --backbones tiny_blip2 tiny_minigpt4
    python -m scripts.tables --table all --write docs/results.md

hparams/tables.yaml lists the runs. Records are kept under ``--output``: an interrupted run continues. Exit
code 0, 1 if rows failed, 2 for problems with the input (one line each), 130 after Ctrl-C; then the table
shows the finished records.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.plan import BACKBONES, OUTPUT, PLAN, Run, TablePlan, is_complete, read_plan, read_tables
from scripts.plan import load_records as records_of
from scripts.plan import summarise_run as summary_of
from scripts.workers import WorkOutcome, ensure
from unike.report.measures import Row
from unike.report.paper import published
from unike.report.paper.tables import FORMATS, LEGEND, Block, csv_rows, latex, markdown, rewrite_blocks
from unike.system.findings import collect_problems
from unike.system.launching import count_most_processes, run_guarded
from unike.system.paths import check_path
from unike.system.places import require_folder
from unike.types import UserError

TASK_TITLES = {"vqa": "E-VQA", "caption": "E-IC", "cross": "E-VQA and E-IC interleaved"}


def make_blocks(runs: Sequence[Run], plans: dict[str, TablePlan]) -> list[Block]:
    """A block for each table, backbone, task and number of edits, in the order of the runs."""
    groups: dict[tuple[str, str, str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.table, run.backbone, run.task, run.length), []).append(run)
    return [_make_block(group, plans[name]) for (name, *_), group in groups.items()]


def _make_block(group: Sequence[Run], plan: TablePlan) -> Block:
    run, hp = group[0], group[0].hparams
    figures = published.read_figures(plan.paper, hp.model_name, run.task, run.length) if plan.paper else {}
    rows = tuple(
        Row(
            r.row.name,
            summary_of(r),
            records_of(r),
            figures.get(r.row.paper or "", {}),
            r.row.ours,
            is_complete(r),
        )
        for r in group
    )
    edits = "one edit" if run.length == 1 else f"{run.length} sequential edits"
    title = f"{published.FAMILY_TITLES[hp.model_name]} ({run.backbone}), {TASK_TITLES[run.task]}, {edits}"
    last = plan.paper == published.LIFELONG and run.task == "vqa" and run.length == max(plan.lengths)
    return Block(
        run.table,
        title,
        run.backbone,
        run.task,
        run.length,
        rows,
        label=published.choose_label(plan.paper) if plan.paper else "paper",
        reference=plan.reference,
        extras=plan.extras,
        seed=hp.seed,
        beside=published.read_lifelong(hp.model_name) if last else None,
    )


def render_sections(blocks: Sequence[Block], plans: dict[str, TablePlan]) -> dict[str, str]:
    """The Markdown of each table: how to read it, the source of the published figures, then its blocks."""
    out = {}
    for name in dict.fromkeys(block.table for block in blocks):
        key = plans[name].paper
        whose = f" {published.choose_label(key)}: {published.read_source(key)}." if key else ""
        own = [markdown(block) for block in blocks if block.table == name]
        out[name] = "\n".join([f"{LEGEND}{whose}\n", *own])
    return out


def render(blocks: Sequence[Block], plans: dict[str, TablePlan], form: str) -> str:
    """All blocks in one of ``FORMATS``."""
    if form == "csv":
        return csv_rows(blocks)
    if form == "latex":
        return "\n".join(map(latex, blocks))
    found = render_sections(blocks, plans)
    titles = {
        name: f"Table {name}: {plans[name].title}" if name.isdigit() else plans[name].title for name in found
    }
    return "\n".join(f"## {titles[name]}\n\n{text}" for name, text in found.items())


def report_outcome(outcome: WorkOutcome) -> int:
    """Prints failures and interruption; the exit code."""
    for failure in outcome.failures:
        print(f"error: {failure}", file=sys.stderr)
    if outcome.interrupted:
        print("interrupted; the same command continues", file=sys.stderr)
    return 130 if outcome.interrupted else 1 if outcome.failures else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--table", nargs="+", required=True, metavar="NAME", help="1, 2, 3, 4, 5, lifelong, or all")
    add("--backbones", nargs="+", default=list(BACKBONES), metavar="NAME", help="YAMLs, by name")
    add("--size", type=int, metavar="N", help="the first N records of each task")
    add("--sequences", type=int, metavar="N", help="at most N sequences of each run")
    add("--format", choices=FORMATS, default="md")
    add("--jobs", type=int, metavar="N", help="processes; default: one per core, one on a GPU")
    add("--output", default=str(OUTPUT), metavar="DIR", help="where the records are")
    add("--write", type=Path, metavar="FILE", help="put the tables between their markers in this file")
    add("--plan", type=Path, default=PLAN, metavar="FILE", help="the runs")
    add("overrides", nargs="*", metavar="key=value", help="changes to every row")
    args = parser.parse_intermixed_args(argv)
    # Lists of names take what follows them, overrides too.
    for names in (args.table, args.backbones):
        args.overrides += [name for name in names if "=" in name]
        names[:] = [name for name in names if "=" not in name]
    return args


def run(args: argparse.Namespace) -> int:
    counts = (("--jobs", args.jobs), ("--sequences", args.sequences))
    wrong = [f"{name}: {n}; expected 1 or more" for name, n in counts if n is not None and n < 1]
    most = count_most_processes()
    if args.jobs is not None and args.jobs > most:
        wrong.append(f"--jobs: {args.jobs}; expected at most {most} on this machine")
    wrong += collect_problems(
        lambda: require_folder(check_path(args.output, "--output", "a folder"), "--output: ")
    )
    if wrong:
        raise UserError(*wrong)
    planned = read_plan(
        args.plan, args.table, args.backbones, args.size, Path(args.output), args.overrides, args.sequences
    )
    if args.write is not None:
        _check_markers(args.write, planned)
    outcome = ensure(planned, args.jobs)
    plans = read_tables(args.plan)
    blocks = make_blocks(planned, plans)
    print(render(blocks, plans, args.format), end="")
    code = report_outcome(outcome)
    if args.write is not None and code == 0:
        text = args.write.read_text(encoding="utf-8")
        text = rewrite_blocks(text, str(args.write), render_sections(blocks, plans))
        args.write.write_text(text, encoding="utf-8")
    return code


def _check_markers(path: Path, planned: Sequence[Run]) -> None:
    """UserError if the tables could not be written, before hours of work."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--write: {path}: cannot be read: {error}") from None
    rewrite_blocks(text, str(path), {run.table: "" for run in planned})


def main(argv: Sequence[str] | None = None) -> int:
    return run_guarded(lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
