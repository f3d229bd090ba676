"""The table of the README: few rows, each the mean of all settings of a table."""

from __future__ import annotations

from collections.abc import Sequence

from unike.evaluation.metrics import mean_of
from unike.evaluation.summary import MODES, WHEN
from unike.report.measures import MEASURE_TITLES, Row
from unike.report.paper.claims import choose_hm8
from unike.report.paper.grids import Cell, Grid, write_markdown
from unike.report.paper.tables import TASK_TITLES, Block

# Shown by name; the best of all other rivals, and of those inside our gate, are shown besides.
RIVALS = ("FT (last layer)", "MEND")
OURS = ("UniKE, paper preset", "UniKE + scope gate")
MEASURES = ("reliability", "generality", "locality", "minimal_pair", "five")


def write_home(blocks: Sequence[Block], link: str, gated: Sequence[Block] = ()) -> str:
    """Markdown: the unedited model, two rivals, the best of the others, the best rival inside our gate, and
    two rows of ours.

    Each number is the plain mean over the blocks, teacher-forced, and for HM8 also generated. The best has
    the highest HM8 of the former kind. ``gated`` are blocks of the same settings that have rivals inside our
    gate. Empty unless each of the rows is complete in all blocks. ``link`` is the page with the whole table.
    """
    if not blocks or any(_find_row(block, name) is None for block in blocks for name in (*RIVALS, *OURS)):
        return ""
    hm8 = choose_hm8([row for block in blocks for row in block.rows])
    columns = [*((measure, MODES[0]) for measure in (*MEASURES, hm8)), (hm8, MODES[1])]
    shown = [("the unedited model", _fill([block.rows[0] for block in blocks], columns, WHEN[0]))]

    def show(found: Sequence[Block], name: str, title: str) -> None:
        shown.append((title, _fill([_find_row(block, name) for block in found], columns, WHEN[1])))

    for name in RIVALS:
        show(blocks, name, name)
    if best := _find_best(blocks, hm8, gated=False):
        show(blocks, best, f"{best}: best HM8 of the other rivals")
    if best := _find_best(gated, hm8, gated=True):
        show(gated, best, f"{best}: best HM8 of the rivals inside our gate")
    for name in OURS:
        show(blocks, name, name)
    titles = [MEASURE_TITLES[measure] for measure, _ in columns]
    header = ("method", *titles[:-1], f"{titles[-1]}, {MODES[1]}")
    grid = Grid("", header, tuple((title, tuple(cells)) for title, cells in shown))
    return "\n\n".join([_describe_settings(blocks, link), write_markdown(grid)[1]])


def _describe_settings(blocks: Sequence[Block], link: str) -> str:
    counts = sorted({row.summary["n"] for block in blocks for row in block.rows if row.complete})
    edits = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    seeds = sorted({seed for block in blocks for row in block.rows for seed in row.by_seed})
    drawn = f", seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else ""
    models = " and ".join(dict.fromkeys(f"`{block.backbone}`" for block in blocks))
    tasks = " and ".join(TASK_TITLES[task] for task in dict.fromkeys(block.task for block in blocks))
    return (
        f"One edit at a time, in percent, teacher-forced: the mean of {models} on {tasks}, {edits} edits "
        f"each{drawn}. Intervals, all rows, and what the columns mean: [Table 1]({link})."
    )


def _find_row(block: Block, name: str) -> Row | None:
    return next((row for row in block.rows if row.name == name and row.complete), None)


def _find_best(blocks: Sequence[Block], measure: str, gated: bool) -> str | None:
    """The rival with the highest mean that has no row by its name alone; or inside our gate."""
    means: dict[str, float] = {}
    for row in blocks[0].rows if blocks else ():
        found = [_find_row(block, row.name) for block in blocks]
        values = [other.find_mean(measure) for other in found if other is not None]
        known = [value for value in values if value is not None]
        is_wanted = not row.ours and row.name not in RIVALS and (row.gate_of is not None) == gated
        if is_wanted and len(known) == len(blocks):
            means[row.name] = mean_of(known)
    return max(means, key=lambda name: means[name]) if means else None


def _fill(rows: Sequence[Row | None], columns: Sequence[tuple[str, str]], when: str) -> list[Cell]:
    """The mean of the rows' figures for each measure and mode; an empty cell where one has none."""
    cells = []
    for measure, mode in columns:
        found = [row.find_estimate(measure, mode, when) if row else None for row in rows]
        known = [entry["mean"] for entry in found if entry is not None]
        cells.append(Cell(mean_of(known)) if len(known) == len(rows) else Cell())
    return cells
