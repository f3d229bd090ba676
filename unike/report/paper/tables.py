"""Tables beside the paper's: blocks of rows as grids, and grids as Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unike.evaluation.summary import HARMONIC, LOCALITY, MEANS_OF, MODES, WHEN
from unike.report.measures import MEASURE_TITLES, Row
from unike.report.paper.claims import Verdict, baselines, best_of_ours, order
from unike.report.paper.published import Figures
from unike.types import FIVE_METRICS, HARD_METRICS, METRICS, UserError

BASE = "Base"
FORMATS = ("md", "latex", "csv")
EXTRAS = ("presets", "means", "alpha", "best", "baselines")
LEGEND = (
    "In percent, with the 95% bootstrap interval in brackets where it is not a single point. "
    "The best of a column is bold, the second underlined. Loc, same Q and same I: the share that an edit "
    "leaves as it was; the others: the share that gives the new answer. HM5 and HM8 are harmonic means of "
    "the five metrics and of all eight. Steps and seconds are per edit, the size is that of all that is "
    "applied at the end."
)
CSV_COLUMNS = (
    "table",
    "backbone",
    "task",
    "edits",
    "row",
    "reading",
    "measure",
    "mean",
    "low",
    "high",
    "paper",
)


@dataclass(frozen=True)
class Cell:
    """A number with its interval, marked ``best`` or ``second`` of its column; ``text`` stands alone."""

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
        low, high = f"{self.low:.{self.digits}f}", f"{self.high:.{self.digits}f}"
        return "" if low == high == self.shown else f"[{low}, {high}]"


@dataclass(frozen=True)
class Grid:
    """Cells below titles; the first column names the rows."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class Block:
    """One backbone, task and number of edits of a table.

    ``label`` is whose figures stand beside ours, ``beside`` lists more of them by number of edits.
    ``reference`` is the row whose order the paper states. ``extras`` adds grids (``presets``, ``means``,
    ``alpha``) and verdicts (``best``, ``baselines``).
    """

    table: str
    title: str
    backbone: str
    task: str
    edits: int
    rows: tuple[Row, ...]
    label: str = "paper"
    reference: str = "UniKE"
    extras: tuple[str, ...] = ()
    seed: int = 0
    beside: Mapping[int, Figures] | None = None

    def grids(self) -> list[Grid]:
        """The paper's five metrics, what lies beyond them, the generated reading, then the extras."""
        after = [self._five()]
        after.append(self._measured("beyond the paper", (*HARD_METRICS, *HARMONIC), MODES[0], costs=True))
        after.append(self._measured("generated", (*METRICS, *HARMONIC), MODES[1]))
        extra = {"presets": self._presets, "means": self._means, "alpha": self._alpha}
        after += [make() for name, make in extra.items() if name in self.extras]
        return [grid for grid in after if grid.rows] + [
            _listed(f"published for {length:,} edits in a row ({self.label})", figures)
            for length, figures in (self.beside or {}).items()
        ]

    def verdicts(self) -> list[tuple[str, list[Verdict]]]:
        """What is claimed of the block's rows, by heading."""
        groups = [("Does the paper's order hold?", order(self.rows, self.reference, self.seed))]
        if "best" in self.extras:
            groups.append(("Is a row of ours the best?", best_of_ours(self.rows, self.seed)))
        if "baselines" in self.extras:
            groups.append(("Does each baseline behave as published?", baselines(self.rows)))
        return [(heading, found) for heading, found in groups if found]

    def _five(self) -> Grid:
        return self._compared("teacher-forced", FIVE_METRICS)

    def _means(self) -> Grid:
        return self._compared("means of the two generalities and of the two localities", tuple(MEANS_OF))

    def _compared(self, title: str, measures: Sequence[str]) -> Grid:
        """Ours, each column with the published one beside it where there is one."""
        columns: list[list[Cell]] = []
        header: list[str] = []
        for measure in measures:
            header.append(MEASURE_TITLES[measure])
            columns.append(self._column(measure, MODES[0]))
            if any(measure in row.published for row in self.rows):
                header.append(self.label)
                columns.append(marked([Cell(row.published.get(measure)) for row in self.rows]))
        return self._grid(title, header, columns, base=measures if measures == FIVE_METRICS else ())

    def _measured(self, title: str, measures: Sequence[str], mode: str, costs: bool = False) -> Grid:
        columns = [self._column(measure, mode) for measure in measures]
        header = [MEASURE_TITLES[measure] for measure in measures]
        if not any(cell.value is not None for column in columns for cell in column):
            return Grid(title, (), ())
        if costs:
            header += ["steps", "s/edit", "size"]
            columns += [
                [_cost(row, "steps", 1) for row in self.rows],
                [_cost(row, "seconds", 3) for row in self.rows],
            ]
            columns.append([Cell(text=_size(row.summary.get("bytes"))) for row in self.rows])
        return self._grid(title, header, columns, base=measures if not costs else (), mode=mode)

    def _column(self, measure: str, mode: str) -> list[Cell]:
        cells = [_cell(row.entry(measure, mode)) for row in self.rows]
        return marked(cells, [row.complete for row in self.rows])

    def _grid(
        self,
        title: str,
        header: Sequence[str],
        columns: Sequence[Sequence[Cell]],
        base: Sequence[str] = (),
        mode: str = MODES[0],
    ) -> Grid:
        """With what the base model gives in a row of its own, taken from any of the others."""
        rows = [(_named(row), tuple(c[i] for c in columns)) for i, row in enumerate(self.rows)]
        first = next((row for row in self.rows if row.entry(FIVE_METRICS[0], mode, WHEN[0])), None)
        if base and first is not None:
            titles = {MEASURE_TITLES[m]: m for m in base}
            cells = (_cell(first.entry(titles[h], mode, WHEN[0])) if h in titles else Cell() for h in header)
            rows.insert(0, (BASE, tuple(cells)))
        return Grid(title, ("method", *header), tuple(rows))

    def _presets(self) -> Grid:
        names = list(dict.fromkeys(name for row in self.rows for name in row.summary.get("presets", {})))
        header, columns = [], []
        for metric in LOCALITY:
            for name in names:
                header.append(f"{MEASURE_TITLES[metric]}, {name}")
                held = [row.summary.get("presets", {}).get(name, {}) for row in self.rows]
                columns.append(marked([_cell(preset.get("metrics", {}).get(metric)) for preset in held]))
        return self._grid("locality as others compute it", header, columns)

    def _alpha(self) -> Grid:
        rows = []
        for row in self.rows:
            alpha = row.summary.get("decisions", {}).get("alpha")
            if alpha:
                rows.append((_named(row), tuple(Cell(alpha.get(metric), digits=2) for metric in METRICS)))
        title = "what alpha was, mean over layers and records"
        return Grid(title, ("method", *(MEASURE_TITLES[metric] for metric in METRICS)), tuple(rows))


def marked(cells: Sequence[Cell], counted: Sequence[bool] | None = None) -> list[Cell]:
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


# ---------------------------------------------------------------- Markdown, LaTeX, CSV


def rewritten(text: str, name: str, blocks: Mapping[str, str], kind: str = "table") -> str:
    """The text of a file, ``name``, with each table (or what ``kind`` says) between its two markers
    replaced.

    Raises UserError for each whose markers are not there once each, in order.
    """
    problems = []
    for key, block in blocks.items():
        start, end = f"<!-- {kind} {key} -->", f"<!-- end of {kind} {key} -->"
        if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
            problems.append(f"{name}: expected {start} and, below it, {end}, once each")
            continue
        before, rest = text.split(start)
        text = f"{before}{start}\n\n{block.strip()}\n\n{end}{rest.split(end)[1]}"
    if problems:
        raise UserError(*problems)
    return text


def markdown(block: Block) -> str:
    """A block with its heading, grids and verdicts."""
    parts = [f"#### {block.title}"]
    for grid in block.grids():
        rule = "|" + " --- |" + " ---: |" * (len(grid.header) - 1)
        lines = [" | ".join((name, *map(_markdown_cell, cells))) for name, cells in grid.rows]
        head = " | ".join(grid.header)
        parts += [f"{_sentence(grid.title)}:", "\n".join([f"| {head} |", rule, *(f"| {x} |" for x in lines)])]
    for heading, found in block.verdicts():
        parts += [f"{heading}", "\n".join(f"- {verdict}" for verdict in found)]
    return "\n\n".join(parts) + "\n"


def latex(block: Block) -> str:
    """A block as ``tabular`` environments, which want the package booktabs."""
    parts = [f"\\subsection*{{{_escaped(block.title)}}}"]
    for grid in block.grids():
        lines = [" & ".join((_escaped(n), *map(_latex_cell, cells))) + r" \\" for n, cells in grid.rows]
        head = " & ".join(map(_escaped, grid.header)) + r" \\"
        columns = "l" + "r" * (len(grid.header) - 1)
        parts.append(f"\\paragraph{{{_escaped(_sentence(grid.title))}.}}")
        parts.append("\n".join([
            f"\\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *lines, r"\bottomrule",
            r"\end{tabular}",
        ]))  # fmt: skip
    for heading, found in block.verdicts():
        items = [f"\\item {_escaped(str(verdict))}" for verdict in found]
        parts += [f"\\paragraph{{{_escaped(heading)}}}"]
        parts += ["\n".join([r"\begin{itemize}", *items, r"\end{itemize}"])]
    return "\n\n".join(parts) + "\n"


def csv_rows(blocks: Sequence[Block]) -> str:
    """One line per row, reading and measure, with a header; numbers as they are, in percent, except
    ``steps`` and ``seconds`` per edit and ``bytes``."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for block in blocks:
        for row in block.rows:
            at = (block.table, block.backbone, block.task, block.edits, row.name)
            for mode, measure in ((mode, measure) for mode in MODES for measure in MEASURE_TITLES):
                entry = row.entry(measure, mode)
                paper = row.published.get(measure) if mode == MODES[0] else None
                if entry or paper is not None:
                    writer.writerow((*at, mode, measure, *_numbers(entry), "" if paper is None else paper))
            costs = row.summary.get("costs", {})
            for name, entry in ((name, costs.get(name)) for name in ("steps", "seconds")):
                if entry:
                    writer.writerow((*at, "", name, *_numbers(entry), ""))
            if row.summary.get("bytes") is not None:
                writer.writerow((*at, "", "bytes", row.summary["bytes"], "", "", ""))
    return out.getvalue()


def _numbers(entry: Mapping[str, float] | None) -> tuple[Any, ...]:
    return tuple(entry[key] for key in ("mean", "low", "high")) if entry else ("", "", "")


def _listed(title: str, figures: Figures) -> Grid:
    columns = [marked([Cell(row.get(metric)) for row in figures.values()]) for metric in FIVE_METRICS]
    rows = tuple((name, tuple(column[i] for column in columns)) for i, name in enumerate(figures))
    return Grid(title, ("method", *(MEASURE_TITLES[metric] for metric in FIVE_METRICS)), rows)


def _named(row: Row) -> str:
    if row.complete:
        return row.name
    n = row.summary.get("n", 0)
    return f"{row.name} ({n} records up to now)" if n else f"{row.name} (not run)"


def _cell(entry: Mapping[str, float] | None, digits: int = 1) -> Cell:
    return Cell(entry["mean"], entry["low"], entry["high"], digits) if entry else Cell()


def _cost(row: Row, key: str, digits: int) -> Cell:
    return _cell(row.summary.get("costs", {}).get(key), digits)


def _size(count: float | None) -> str:
    if count is None:
        return ""
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def _markdown_cell(cell: Cell) -> str:
    marks = {"best": "**{}**", "second": "<u>{}</u>", "": "{}"}
    return " ".join(filter(None, (marks[cell.mark].format(cell.shown) if cell.shown else "", cell.interval)))


def _latex_cell(cell: Cell) -> str:
    marks = {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}", "": "{}"}
    shown = marks[cell.mark].format(_escaped(cell.shown)) if cell.shown else ""
    return f"{shown} {{\\scriptsize {cell.interval}}}" if cell.interval else shown


_LATEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"$<$", ">": r"$>$",
})  # fmt: skip


def _escaped(text: str) -> str:
    return text.translate(_LATEX)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
