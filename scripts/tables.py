"""Makes a table of the paper: runs what is missing, reads the rest, prints our figures and the paper's.

    python -m scripts.tables --table 1 --backbones tiny_blip2 tiny_minigpt4
    python -m scripts.tables --table all --write docs/results
    python -m scripts.tables --plan hparams/tables_v1.yaml --table 1      # version 1 of the benchmark

hparams/tables.yaml lists the runs, with the seeds of the benchmark that each is made with. Records are kept
under ``--output``: an interrupted run continues. Exit code 0, 1 if rows failed, 2 for problems with the input
(one line each), 130 after Ctrl-C; then the table shows the finished records.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.base_styles import measure_styles
from scripts.pages import check_pages, rewrite_pages
from scripts.plan import BACKBONES, OUTPUT, PLAN, Run, TablePlan, pool_runs, read_plan, read_tables
from scripts.trainings import read_trainings
from scripts.workers import WorkOutcome, ensure
from unike.report.measures import Row
from unike.report.paper import published
from unike.report.paper.averages import average_blocks
from unike.report.paper.grids import write_latex, write_markdown
from unike.report.paper.home import write_home
from unike.report.paper.short import write_short
from unike.report.paper.tables import FORMATS, LEGEND, TASK_TITLES, Block, csv_rows, latex, markdown
from unike.system.arguments import ArgumentParser
from unike.system.findings import collect_problems
from unike.system.launching import count_most_processes, run_guarded
from unike.system.paths import check_path
from unike.system.places import require_folder
from unike.system.shipped import find_shipped
from unike.types import UserError

# The table that the README shows some rows of, and the one with rivals inside our gate.
HOME, GATED = "1", "4"


Styles = Mapping[str, Mapping[str, float]]


def make_blocks(
    runs: Sequence[Run], plans: dict[str, TablePlan], styles: Styles | None = None
) -> list[Block]:
    """A block for each table, backbone, task and number of edits, in the order of the runs. ``styles`` has
    the accuracy of each base by image style."""
    groups: dict[tuple[str, str, str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.table, run.backbone, run.task, run.length), []).append(run)
    return [_make_block(group, plans[name], styles or {}) for (name, *_), group in groups.items()]


def _make_block(group: Sequence[Run], plan: TablePlan, styles: Styles) -> Block:
    run, hp = group[0], group[0].hparams
    figures = published.read_figures(plan.paper, hp.model_name, run.task, run.length) if plan.paper else {}
    by_row: dict[str, list[Run]] = {}
    for own in group:
        by_row.setdefault(own.row.name, []).append(own)
    edits = "one edit" if run.length == 1 else f"{run.length} sequential edits"
    seeds = sorted({own.seed for own in group if own.seed is not None})
    drawn = f", seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else ""
    title = (
        f"{published.FAMILY_TITLES[hp.model_name]} ({run.backbone}), {TASK_TITLES[run.task]}, {edits}{drawn}"
    )
    # A backbone's tasks and lengths share what is trained.
    once = run.task == plan.tasks[0] and run.length == min(plan.lengths)
    last = plan.paper == published.LIFELONG and run.task == "vqa" and run.length == max(plan.lengths)
    return Block(
        run.table,
        title,
        run.backbone,
        run.task,
        run.length,
        tuple(_make_row(some, figures, once) for some in by_row.values()),
        label=published.choose_label(plan.paper) if plan.paper else "paper",
        reference=plan.reference,
        extras=plan.extras,
        seed=hp.seed,
        beside=published.read_lifelong(hp.model_name) if last else None,
        subject=plan.subject,
        toy=hp.generate_data,
        base_styles=styles.get(run.backbone, {}),
        not_run=tuple(row.name for row in plan.rows if row.name not in by_row),
    )


def _make_row(planned: Sequence[Run], figures: published.Figures, with_trainings: bool) -> Row:
    run, pool = planned[0], pool_runs(planned)
    return Row(
        run.row.name,
        pool.summary,
        pool.records,
        figures.get(run.row.paper or "", {}),
        run.row.ours,
        pool.complete,
        run.length,
        pool.strata,
        pool.by_seed,
        run.row.gate_of,
        read_trainings(planned) if with_trainings else (),
    )


def render_sections(blocks: Sequence[Block], plans: dict[str, TablePlan]) -> dict[str, str]:
    """The Markdown of each table: how to read it, the source of the published figures, then its blocks."""
    out = {}
    for name in dict.fromkeys(block.table for block in blocks):
        key = plans[name].paper
        whose = f" {published.choose_label(key)}: {published.read_source(key)}." if key else ""
        own = [block for block in blocks if block.table == name]
        if plans[name].averages:
            parts = ["\n\n".join(write_markdown(average_blocks(own, _name_rows(plans, name)))) + "\n"]
        else:
            parts = [*map(markdown, own)]
        out[name] = "\n".join([f"{LEGEND}{whose}\n", *parts])
    return out


def render_shorts(blocks: Sequence[Block], plans: dict[str, TablePlan], plan: Path) -> dict[str, str]:
    """Each table in short, for the first page."""
    given = "" if plan == PLAN else f" --plan {plan.as_posix()}"
    return {
        name: write_short(
            [block for block in blocks if block.table == name],
            f"python -m scripts.tables{given} --table {name}",
        )
        for name in dict.fromkeys(block.table for block in blocks)
        if not plans[name].averages
    }


def _name_rows(plans: dict[str, TablePlan], name: str) -> dict[str, str | None]:
    """By row of the tables that are averaged, its name in the paper, the last one's."""
    return {row.name: row.paper for other in plans[name].averages for row in plans[other].rows}


def render(blocks: Sequence[Block], plans: dict[str, TablePlan], form: str) -> str:
    """All blocks in one of ``FORMATS``."""
    if form == "csv":
        return csv_rows(blocks)
    if form == "latex":
        whole = [name for name in dict.fromkeys(block.table for block in blocks) if plans[name].averages]
        means = [average_blocks([b for b in blocks if b.table == n], _name_rows(plans, n)) for n in whole]
        listed = [latex(block) for block in blocks if not plans[block.table].averages]
        return "\n".join([*listed, *("\n\n".join(write_latex(grid)) + "\n" for grid in means)])
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
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--table", nargs="+", required=True, metavar="NAME", help="1 to 5, collaboration, lifelong, or all")
    add("--backbones", nargs="+", default=list(BACKBONES), metavar="NAME", help="YAMLs, by name")
    add("--size", type=int, metavar="N", help="the first N records of each task")
    add("--sequences", type=int, metavar="N", help="at most N sequences of each run")
    add("--seeds", nargs="+", default=[], metavar="N", help="some of the plan's seeds (default: all)")
    add("--rows", nargs="+", default=[], metavar="NAME", help="some of the tables' rows (default: all)")
    add("--format", choices=FORMATS, default="md")
    add("--jobs", type=int, metavar="N", help="processes; default: one per core, one on a GPU")
    add("--output", default=str(OUTPUT), metavar="DIR", help="where the records are")
    add(
        "--write",
        type=Path,
        metavar="FILE",
        help="put the tables between their markers in this file, or in a folder's pages",
    )
    add("--plan", type=Path, default=PLAN, metavar="FILE", help="the runs")
    add("overrides", nargs="*", metavar="key=value", help="changes to every row")
    args = parser.parse_intermixed_args(argv)
    args.plan = Path(find_shipped(str(args.plan)))
    # Lists of names take what follows them, overrides too.
    for names in (args.table, args.backbones, args.seeds, args.rows):
        args.overrides += [name for name in names if "=" in name]
        names[:] = [name for name in names if "=" not in name]
    return args


def pick_rows(planned: Sequence[Run], names: Sequence[str]) -> list[Run]:
    """The runs of these rows, or all where none is named. UserError for a name that no row has."""
    known = list(dict.fromkeys(run.row.name for run in planned))
    wrong = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.0)
            wrong.append(f"--rows: {name}: no such row; the nearest is {near[0]!r}")
    if wrong:
        raise UserError(*wrong)
    return [run for run in planned if not names or run.row.name in names]


def run(args: argparse.Namespace) -> int:
    counts = (("--jobs", args.jobs), ("--sequences", args.sequences))
    wrong = [f"{name}: {n}; expected 1 or more" for name, n in counts if n is not None and n < 1]
    most = count_most_processes()
    if args.jobs is not None and args.jobs > most:
        wrong.append(f"--jobs: {args.jobs}; expected at most {most} on this machine")
    wrong += [f"--seeds: {n}; expected whole numbers" for n in args.seeds if not n.isdigit()]
    wrong += collect_problems(
        lambda: require_folder(check_path(args.output, "--output", "a folder"), "--output: ")
    )
    if wrong:
        raise UserError(*wrong)
    planned = read_plan(
        args.plan,
        args.table,
        args.backbones,
        args.size,
        Path(args.output),
        args.overrides,
        args.sequences,
        [int(seed) for seed in args.seeds],
    )
    planned = pick_rows(planned, args.rows)
    if args.write is not None:
        check_pages(args.write, list(dict.fromkeys(run.table for run in planned)))
    outcome = ensure(planned, args.jobs)
    plans = read_tables(args.plan)
    styles = {} if outcome.interrupted else measure_styles(planned, Path(args.output))
    blocks = make_blocks(planned, plans, styles)
    print(render(blocks, plans, args.format), end="")
    code = report_outcome(outcome)
    if args.write is not None and code == 0:
        sections, shorts = render_sections(blocks, plans), render_shorts(blocks, plans, args.plan)
        own, gated = ([b for b in blocks if b.table == name] for name in (HOME, GATED))
        homes = {HOME: write_home(own, "docs/results/table1.md", gated)}
        for page, text in rewrite_pages(args.write, sections, shorts, homes).items():
            page.write_text(text, encoding="utf-8")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    return run_guarded(lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
