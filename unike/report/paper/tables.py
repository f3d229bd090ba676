"""Our tables with the paper's figures: blocks of rows as grids, and grids as Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from unike.evaluation.summary import HARMONIC, LOCALITY, MEANS_OF, MODES, WHEN, Estimate, Spread
from unike.report.measures import MEASURE_TITLES, Row
from unike.report.paper.claims import Verdict, check_baselines, check_best_of_ours, check_order
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
    "mode",
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

    ``label`` is whose figures are shown with ours, ``beside`` lists more of them by number of edits.
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

    def build_grids(self) -> list[Grid]:
        """The paper's five metrics, those beyond them, all in generated mode, then the extras."""
        after = [self._compare("teacher-forced", FIVE_METRICS)]
        after.append(self._list("beyond the paper", (*HARD_METRICS, *HARMONIC), MODES[0], costs=True))
        after.append(self._list("generated", (*METRICS, *HARMONIC), MODES[1]))
        extra = {
            "presets": self._list_presets,
            "means": self._compare_means,
            "alpha": self._list_alpha,
        }
        after += [make() for name, make in extra.items() if name in self.extras]
        return [grid for grid in after if grid.rows] + [
            _list_published(f"published for {length:,} sequential edits ({self.label})", figures)
            for length, figures in (self.beside or {}).items()
        ]

    def check_claims(self) -> list[tuple[str, list[Verdict]]]:
        """What is claimed of the block's rows, by heading."""
        groups = [("Does the paper's order hold?", check_order(self.rows, self.reference, self.seed))]
        if "best" in self.extras:
            groups.append(("Is a row of ours the best?", check_best_of_ours(self.rows, self.seed)))
        if "baselines" in self.extras:
            groups.append(("Does each baseline behave as published?", check_baselines(self.rows)))
        return [(heading, found) for heading, found in groups if found]

    def _compare_means(self) -> Grid:
        return self._compare("means of the two generalities and of the two localities", tuple(MEANS_OF))

    def _compare(self, title: str, measures: Sequence[str]) -> Grid:
        """Ours, each column followed by the published one where there is one."""
        columns: list[list[Cell]] = []
        header: list[str] = []
        for measure in measures:
            header.append(MEASURE_TITLES[measure])
            columns.append(self._fill_column(measure, MODES[0]))
            if any(measure in row.published for row in self.rows):
                header.append(self.label)
                columns.append(mark_best([Cell(row.published.get(measure)) for row in self.rows]))
        return self._build_grid(title, header, columns, base=measures if measures == FIVE_METRICS else ())

    def _list(self, title: str, measures: Sequence[str], mode: str, costs: bool = False) -> Grid:
        columns = [self._fill_column(measure, mode) for measure in measures]
        header = [MEASURE_TITLES[measure] for measure in measures]
        if not any(cell.value is not None for column in columns for cell in column):
            return Grid(title, (), ())
        if costs:
            header += ["steps", "s/edit", "size"]
            columns += [
                [_make_cost_cell(row, "steps", 1) for row in self.rows],
                [_make_cost_cell(row, "seconds", 3) for row in self.rows],
            ]
            columns.append([Cell(text=_format_size(row.summary.get("bytes"))) for row in self.rows])
        return self._build_grid(title, header, columns, base=measures if not costs else (), mode=mode)

    def _fill_column(self, measure: str, mode: str) -> list[Cell]:
        cells = [_make_cell(row.find_estimate(measure, mode)) for row in self.rows]
        return mark_best(cells, [row.complete for row in self.rows])

    def _build_grid(
        self,
        title: str,
        header: Sequence[str],
        columns: Sequence[Sequence[Cell]],
        base: Sequence[str] = (),
        mode: str = MODES[0],
    ) -> Grid:
        """With a first row for the base model, whose numbers any of the others has."""
        rows = [(_name_row(row), tuple(c[i] for c in columns)) for i, row in enumerate(self.rows)]
        first = next((row for row in self.rows if row.find_estimate(FIVE_METRICS[0], mode, WHEN[0])), None)
        if base and first is not None:
            titles = {MEASURE_TITLES[m]: m for m in base}
            cells = (
                _make_cell(first.find_estimate(titles[h], mode, WHEN[0])) if h in titles else Cell()
                for h in header
            )
            rows.insert(0, (BASE, tuple(cells)))
        return Grid(title, ("method", *header), tuple(rows))

    def _list_presets(self) -> Grid:
        names = list(dict.fromkeys(name for row in self.rows for name in row.summary.get("presets", {})))
        header, columns = [], []
        for metric in LOCALITY:
            for name in names:
                header.append(f"{MEASURE_TITLES[metric]}, {name}")
                presets = [row.summary.get("presets", {}).get(name) for row in self.rows]
                cells = [_make_cell(found["metrics"].get(metric) if found else None) for found in presets]
                columns.append(mark_best(cells))
        return self._build_grid("locality as others compute it", header, columns)

    def _list_alpha(self) -> Grid:
        rows = []
        for row in self.rows:
            alpha = row.summary.get("decisions", {}).get("alpha")
            if alpha:
                rows.append((_name_row(row), tuple(Cell(alpha.get(metric), digits=2) for metric in METRICS)))
        title = "what alpha was, mean over layers and records"
        return Grid(title, ("method", *(MEASURE_TITLES[metric] for metric in METRICS)), tuple(rows))


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


# ---------------------------------------------------------------- Markdown, LaTeX, CSV


def rewrite_blocks(text: str, name: str, blocks: Mapping[str, str], kind: str = "table") -> str:
    """The text of a file, ``name``, with each table (or other ``kind`` of block) between its two markers
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
    for grid in block.build_grids():
        rule = "|" + " --- |" + " ---: |" * (len(grid.header) - 1)
        lines = [" | ".join((name, *map(_format_markdown_cell, cells))) for name, cells in grid.rows]
        head = " | ".join(grid.header)
        parts += [
            f"{_capitalise(grid.title)}:",
            "\n".join([f"| {head} |", rule, *(f"| {x} |" for x in lines)]),
        ]
    for heading, found in block.check_claims():
        parts += [f"{heading}", "\n".join(f"- {verdict}" for verdict in found)]
    return "\n\n".join(parts) + "\n"


def latex(block: Block) -> str:
    """A block as ``tabular`` environments, which want the package booktabs."""
    parts = [f"\\subsection*{{{_escape(block.title)}}}"]
    for grid in block.build_grids():
        lines = [" & ".join((_escape(n), *map(_format_latex_cell, cells))) + r" \\" for n, cells in grid.rows]
        head = " & ".join(map(_escape, grid.header)) + r" \\"
        columns = "l" + "r" * (len(grid.header) - 1)
        parts.append(f"\\paragraph{{{_escape(_capitalise(grid.title))}.}}")
        parts.append(
            "\n".join(
                [
                    f"\\begin{{tabular}}{{{columns}}}",
                    r"\toprule",
                    head,
                    r"\midrule",
                    *lines,
                    r"\bottomrule",
                    r"\end{tabular}",
                ]
            )
        )
    for heading, found in block.check_claims():
        items = [f"\\item {_escape(str(verdict))}" for verdict in found]
        parts += [f"\\paragraph{{{_escape(heading)}}}"]
        parts += ["\n".join([r"\begin{itemize}", *items, r"\end{itemize}"])]
    return "\n\n".join(parts) + "\n"


def csv_rows(blocks: Sequence[Block]) -> str:
    """One line per row, evaluation mode and measure, with a header; numbers are in percent, except ``steps``
    and ``seconds`` per edit and ``bytes``."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for block in blocks:
        for row in block.rows:
            at = (block.table, block.backbone, block.task, block.edits, row.name)
            for mode, measure in ((mode, measure) for mode in MODES for measure in MEASURE_TITLES):
                entry = row.find_estimate(measure, mode)
                paper = row.published.get(measure) if mode == MODES[0] else None
                if entry or paper is not None:
                    writer.writerow(
                        (*at, mode, measure, *_list_numbers(entry), "" if paper is None else paper)
                    )
            costs = row.summary.get("costs", {})
            for name, cost in ((name, costs.get(name)) for name in ("steps", "seconds")):
                if cost:
                    writer.writerow((*at, "", name, *_list_numbers(cost), ""))
            if row.summary.get("bytes") is not None:
                writer.writerow((*at, "", "bytes", row.summary["bytes"], "", "", ""))
    return out.getvalue()


def _list_numbers(entry: Estimate | Spread | None) -> tuple[float | str, ...]:
    return (entry["mean"], entry["low"], entry["high"]) if entry else ("", "", "")


def _list_published(title: str, figures: Figures) -> Grid:
    columns = [mark_best([Cell(row.get(metric)) for row in figures.values()]) for metric in FIVE_METRICS]
    rows = tuple((name, tuple(column[i] for column in columns)) for i, name in enumerate(figures))
    return Grid(title, ("method", *(MEASURE_TITLES[metric] for metric in FIVE_METRICS)), rows)


def _name_row(row: Row) -> str:
    if row.complete:
        return row.name
    n = row.summary.get("n", 0)
    return f"{row.name} ({n} records up to now)" if n else f"{row.name} (not run)"


def _make_cell(entry: Estimate | Spread | None, digits: int = 1) -> Cell:
    return Cell(entry["mean"], entry["low"], entry["high"], digits) if entry else Cell()


def _make_cost_cell(row: Row, key: str, digits: int) -> Cell:
    return _make_cell(row.summary.get("costs", {}).get(key), digits)


def _format_size(count: float | None) -> str:
    if count is None:
        return ""
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def _format_markdown_cell(cell: Cell) -> str:
    marks = {"best": "**{}**", "second": "<u>{}</u>", "": "{}"}
    return " ".join(filter(None, (marks[cell.mark].format(cell.shown) if cell.shown else "", cell.interval)))


def _format_latex_cell(cell: Cell) -> str:
    marks = {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}", "": "{}"}
    shown = marks[cell.mark].format(_escape(cell.shown)) if cell.shown else ""
    return f"{shown} {{\\scriptsize {cell.interval}}}" if cell.interval else shown


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"$<$",
        ">": r"$>$",
    }
)


def _escape(text: str) -> str:
    return text.translate(_LATEX)


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]
