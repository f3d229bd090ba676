"""The paper's Table 5: means over tasks, backbones and numbers of edits, of one edit and of sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unike.evaluation.metrics import mean_of
from unike.report.measures import MEASURE_TITLES
from unike.report.paper import published
from unike.report.paper.grids import Cell, Grid, mark_best
from unike.report.paper.tables import NOT_COMPARABLE, Block

MEASURES = ("reliability", "generality", "locality")


def average_blocks(blocks: Sequence[Block], names: Mapping[str, str | None]) -> Grid:
    """Reliability, generality and locality of each row, teacher-forced: the mean over its blocks, of one edit
    and of sequences, each beside the published mean. ``names`` are those of the rows in the paper. A row that
    is not complete in each of its blocks has no mean."""
    known = published.read_averages()
    rows = list(dict.fromkeys(row.name for block in blocks for row in block.rows))
    header: list[str] = []
    columns: list[list[Cell]] = []
    for protocol, is_wanted in (("one_step", True), ("sequential", False)):
        own = [block for block in blocks if (block.edits == 1) == is_wanted]
        label = "one edit" if is_wanted else "sequences"
        for measure in MEASURES:
            header += [f"{MEASURE_TITLES[measure]}, {label} ({len(own)} blocks)", "paper"]
            columns.append(mark_best([Cell(_average(own, name, measure)) for name in rows]))
            told = [known[protocol].get(names.get(name) or "", {}).get(measure) for name in rows]
            columns.append(mark_best([Cell(value) for value in told]))
    named = tuple((name, tuple(column[i] for column in columns)) for i, name in enumerate(rows))
    note = NOT_COMPARABLE if any(block.toy for block in blocks) else ""
    return Grid("means over tasks, backbones and numbers of edits", ("method", *header), named, note)


def _average(blocks: Sequence[Block], name: str, measure: str) -> float | None:
    own = [row for block in blocks for row in block.rows if row.name == name]
    found = [row.find_mean(measure) if row.complete else None for row in own]
    values = [value for value in found if value is not None]
    return mean_of(values) if values and len(values) == len(found) else None
