"""The table of the README: six rows, each the mean of all settings of a table."""

from __future__ import annotations

from collections.abc import Sequence

from unike.evaluation.metrics import mean_of
from unike.evaluation.summary import MODES, WHEN
from unike.report.measures import MEASURE_TITLES, Row
from unike.report.paper.claims import choose_hm8
from unike.report.paper.grids import Cell, Grid, mark_best, write_markdown
from unike.report.paper.tables import TASK_TITLES, Block

# Shown by name; the strongest of all other rivals is shown besides.
RIVALS = ("FT (last layer)", "MEND")
OURS = ("UniKE, paper preset", "UniKE + scope gate")
MEASURES = ("reliability", "generality", "locality", "minimal_pair", "five")


def write_home(blocks: Sequence[Block], link: str) -> str:
    """Markdown: the unedited model, two rivals, the rival with the highest HM8, and two rows of ours.

    Each number is the plain mean over the blocks, teacher-forced. Empty unless each of the rows is complete
    in all blocks. ``link`` is the page with the whole table.
    """
    if not blocks or any(_find_row(block, name) is None for block in blocks for name in (*RIVALS, *OURS)):
        return ""
    hm8 = choose_hm8([row for block in blocks for row in block.rows])
    measures = (*MEASURES, hm8)
    strongest = _find_strongest(blocks, hm8)
    order = [*RIVALS, *([strongest] if strongest else []), *OURS]
    cells = [_fill([_find_row(block, name) for block in blocks], measures, WHEN[1]) for name in order]
    columns = [mark_best(column) for column in map(list, zip(*cells, strict=True))]
    titles = [f"{name} (best of the other rivals)" if name == strongest else name for name in order]
    base = _fill([block.rows[0] for block in blocks], measures, WHEN[0])
    lines = [("the unedited model", base), *zip(titles, zip(*columns, strict=True), strict=True)]
    header = ("method", *(MEASURE_TITLES[measure] for measure in measures))
    grid = Grid("", header, tuple((title, tuple(row)) for title, row in lines))
    return "\n\n".join([_describe_settings(blocks, link), write_markdown(grid)[1]])


def _describe_settings(blocks: Sequence[Block], link: str) -> str:
    counts = sorted({row.summary["n"] for block in blocks for row in block.rows if row.complete})
    edits = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    seeds = sorted({seed for block in blocks for row in block.rows for seed in row.by_seed})
    drawn = f", seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else ""
    models = " and ".join(dict.fromkeys(block.backbone for block in blocks))
    tasks = " and ".join(TASK_TITLES[task] for task in dict.fromkeys(block.task for block in blocks))
    return (
        f"One edit at a time, in percent: the mean of `{models}` on {tasks}, {edits} edits each{drawn}. "
        f"Intervals, all rows, and what the columns mean: [Table 1]({link})."
    )


def _find_row(block: Block, name: str) -> Row | None:
    return next((row for row in block.rows if row.name == name and row.complete), None)


def _find_strongest(blocks: Sequence[Block], measure: str) -> str | None:
    """The rival with the highest mean that has no row by its name alone."""
    means: dict[str, float] = {}
    for row in blocks[0].rows:
        found = [_find_row(block, row.name) for block in blocks]
        values = [other.find_mean(measure) for other in found if other is not None]
        known = [value for value in values if value is not None]
        if not row.ours and row.gate_of is None and row.name not in RIVALS and len(known) == len(blocks):
            means[row.name] = mean_of(known)
    return max(means, key=lambda name: means[name]) if means else None


def _fill(rows: Sequence[Row | None], measures: Sequence[str], when: str) -> list[Cell]:
    """The mean of the rows' figures for each measure; an empty cell where one has none."""
    cells = []
    for measure in measures:
        found = [row.find_estimate(measure, MODES[0], when) if row else None for row in rows]
        known = [entry["mean"] for entry in found if entry is not None]
        cells.append(Cell(mean_of(known)) if len(known) == len(rows) else Cell())
    return cells
