"""Cells below titles, and how they are marked: what a table is made of before it is written out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from unike.evaluation.summary import Estimate, Spread
from unike.report.measures import Row

DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """A number with its interval, marked ``best`` or ``second`` of its column; ``text`` stands alone.

    Ends that are NaN stand for an interval that too few sequences leave unknown: a dash.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    digits: int = 1
    text: str = ""
    mark: str = ""

    @property
    def shown(self) -> str:
        return self.text if self.value is None else f"{self.value:.{self.digits}f}"

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return ""
        if math.isnan(self.low) or math.isnan(self.high):
            return f"[{DASH}]"
        low, high = f"{self.low:.{self.digits}f}", f"{self.high:.{self.digits}f}"
        return "" if low == high == self.shown else f"[{low}, {high}]"


@dataclass(frozen=True)
class Grid:
    """Cells below titles; the first column names the rows. ``note`` is a sentence below the title."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    note: str = ""


def mark_best(cells: Sequence[Cell], counted: Sequence[bool] | None = None) -> list[Cell]:
    """The cells with the highest number marked ``best`` and the next one ``second``, as shown: cells that
    look the same are marked alike. Fewer than two numbers are not compared."""
    taken = [c.value is not None and (counted is None or counted[i]) for i, c in enumerate(cells)]
    shown = [float(cell.shown) for cell, take in zip(cells, taken, strict=True) if take]
    if len(shown) < 2:
        return list(cells)
    marks = dict(zip(sorted(set(shown), reverse=True), ("best", "second"), strict=False))
    return [
        replace(cell, mark=marks.get(float(cell.shown), "")) if take else cell
        for cell, take in zip(cells, taken, strict=True)
    ]


def make_cell(entry: Estimate | Spread | None, digits: int = 1) -> Cell:
    """A mean with its interval; empty without one."""
    return Cell(entry["mean"], entry["low"], entry["high"], digits) if entry else Cell()


def name_row(row: Row) -> str:
    """The row's name, with what is missing of it."""
    if row.complete:
        return row.name
    n = row.summary.get("n", 0)
    return f"{row.name} ({n} records up to now)" if n else f"{row.name} (not run)"


def build_grid(
    title: str, rows: Sequence[Row], header: Sequence[str], columns: Sequence[Sequence[Cell]], note: str = ""
) -> Grid:
    """A grid with a row for each of the table's, and none without columns."""
    named = tuple((name_row(row), tuple(c[i] for c in columns)) for i, row in enumerate(rows))
    return Grid(title, ("method", *header), named if columns else (), note)


# ---------------------------------------------------------------- Markdown and LaTeX


def write_markdown(grid: Grid) -> list[str]:
    """The grid's paragraphs: its title, its note, its table."""
    rule = "|" + " --- |" + " ---: |" * (len(grid.header) - 1)
    lines = [" | ".join((name, *map(_format_markdown_cell, cells))) for name, cells in grid.rows]
    head = " | ".join(grid.header)
    table = "\n".join([f"| {head} |", rule, *(f"| {x} |" for x in lines)])
    title = f"{capitalise(grid.title)}{f' ({grid.note})' if grid.note else ''}:"
    return [title, table]


def write_latex(grid: Grid) -> list[str]:
    """The grid as a ``tabular`` environment, which wants the package booktabs."""
    lines = [" & ".join((escape(n), *map(_format_latex_cell, cells))) + r" \\" for n, cells in grid.rows]
    head = " & ".join(map(escape, grid.header)) + r" \\"
    columns = "l" + "r" * (len(grid.header) - 1)
    note = f" {escape(capitalise(grid.note))}." if grid.note else ""
    rules = [r"\toprule", head, r"\midrule", *lines, r"\bottomrule"]
    return [
        f"\\paragraph{{{escape(capitalise(grid.title))}.}}{note}",
        "\n".join([f"\\begin{{tabular}}{{{columns}}}", *rules, r"\end{tabular}"]),
    ]


def _format_markdown_cell(cell: Cell) -> str:
    marks = {"best": "**{}**", "second": "<u>{}</u>", "": "{}"}
    return " ".join(filter(None, (marks[cell.mark].format(cell.shown) if cell.shown else "", cell.interval)))


def _format_latex_cell(cell: Cell) -> str:
    marks = {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}", "": "{}"}
    shown = marks[cell.mark].format(escape(cell.shown)) if cell.shown else ""
    interval = cell.interval.replace(DASH, "--")
    return f"{shown} {{\\scriptsize {interval}}}" if interval else shown


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"$<$",
        ">": r"$>$",
        DASH: "--",
    }
)


def escape(text: str) -> str:
    """The text for LaTeX."""
    return text.translate(_LATEX)


def capitalise(text: str) -> str:
    """With a capital letter first, all else as it is."""
    return text[:1].upper() + text[1:]
