"""Our tables with the paper's figures: blocks of rows as grids, and grids as Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from unike.evaluation.summary import LOCALITY, MEANS_OF, MODES, WHEN, Estimate, Spread, order_metrics
from unike.report.measures import MEASURE_TITLES, Row, average, count_least_sequences
from unike.report.paper.bounds import list_bounds
from unike.report.paper.breakdowns import (
    list_differences,
    list_distances,
    list_kinds,
    list_parts,
    list_seeds,
    list_styles,
    list_trainings,
)
from unike.report.paper.claims import Verdict, check_best_of_ours, check_gate, check_order, choose_hm8
from unike.report.paper.grids import (
    DASH,
    Cell,
    Grid,
    escape,
    make_cell,
    mark_best,
    name_row,
    write_latex,
    write_markdown,
)
from unike.report.paper.published import Figures
from unike.types import FIVE_METRICS, FURTHER_METRICS, METRICS, UserError

__all__ = [
    "BASE",
    "CSV_COLUMNS",
    "EXTRAS",
    "FORMATS",
    "LEGEND",
    "NOT_COMPARABLE",
    "TASK_TITLES",
    "Block",
    "Cell",
    "Grid",
    "csv_rows",
    "latex",
    "mark_best",
    "markdown",
    "rewrite_blocks",
]

BASE = "Base"
TASK_TITLES = {"vqa": "E-VQA", "caption": "E-IC", "cross": "E-VQA and E-IC interleaved"}
FORMATS = ("md", "latex", "csv")
EXTRAS = ("presets", "means", "alpha", "best", "bounds", "baselines", "trainings")
LEGEND = (
    "In percent, with the 95% bootstrap interval in brackets where it is not a single point; with several "
    "seeds of the whole pipeline, seeds are resampled first, then the records of each. "
    f"[{DASH}]: too few sequences for an interval. The best of a column is bold, the second underlined. Loc, "
    "same Q, same I and same O: the share that an edit leaves as it was; the others: the share that gives "
    "the new answer. HM5 is the harmonic mean of the five metrics, HM8 that of these, same I, joint, and "
    "same Q: on a minimal pair, or on a far image, as it says. Steps and seconds are per edit, the size is "
    "that of all that is applied at the end."
)
NOT_COMPARABLE = "published: full-size models; ours: a toy model; not comparable"
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
    "group",
    "seeds",
    "note",
)
HARD = ("same_question", "minimal_pair", "same_image", "same_object", "joint")


@dataclass(frozen=True)
class Block:
    """One backbone, task and number of edits of a table.

    ``label`` is whose figures are shown with ours, ``beside`` lists more of them by number of edits.
    ``reference`` is the row whose order the paper states, ``subject`` that of ours which the others are
    compared with. ``extras`` adds grids (``presets``, ``means``, ``alpha``, ``bounds``, ``trainings``) and
    verdicts (``best``, ``baselines``). ``toy``: the model is too small to compare with published figures,
    which is said with each. ``base_styles`` has the base's accuracy by image style. ``not_run`` are rows of
    the table that were left out.
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
    subject: str = "UniKE + scope gate"
    toy: bool = False
    base_styles: Mapping[str, float] = field(default_factory=dict)
    not_run: tuple[str, ...] = ()

    def build_grids(self) -> list[Grid]:
        """The paper's five metrics, those beyond them, all in generated mode, results by image style, kind of
        question and seed, then the extras."""
        has_pairs = any(row.find_estimate("minimal_pair") for row in self.rows)
        hard = [m for m in HARD if has_pairs or m in METRICS]
        combined = ("five", choose_hm8(self.rows))
        after = [self._compare("teacher-forced", FIVE_METRICS)]
        after.append(self._list("beyond the paper", (*hard, *combined), MODES[0], costs=True))
        after.append(self._list("generated", (*FIVE_METRICS, *hard, *combined), MODES[1]))
        after += self._list_declared()
        after += [list_styles(self.rows, self.base_styles), list_kinds(self.rows), list_seeds(self.rows)]
        extra = {
            "presets": self._list_presets,
            "means": self._compare_means,
            "alpha": self._list_alpha,
            "best": lambda: list_differences(self.rows, self.subject, self.seed),
            "bounds": lambda: list_bounds(self.rows, self.subject),
            "baselines": self._list_distances,
            "trainings": lambda: list_trainings(self.rows),
        }
        after += [make() for name, make in extra.items() if name in self.extras]
        return [grid for grid in after if grid.rows] + [
            _list_published(f"published for {length:,} sequential edits ({self.label})", figures, self._note)
            for length, figures in (self.beside or {}).items()
        ]

    def check_claims(self) -> list[tuple[str, list[Verdict]]]:
        """What is claimed of the block's rows, by heading."""
        note = f" ({self._note})" if self._note else ""
        groups = [(f"Does the paper's order hold?{note}", check_order(self.rows, self.reference, self.seed))]
        if "best" in self.extras:
            groups.append(("Is a row of ours the best?", check_best_of_ours(self.rows, self.seed)))
            whose = check_gate(self.rows, self.subject, self.seed)
            groups.append(("Whose is the win, the method's or the gate's?", whose))
        return [(heading, found) for heading, found in groups if found]

    @property
    def remark(self) -> str:
        """Which rows were left out, and why intervals are missing; empty where neither is so."""
        return " ".join(filter(None, (list_not_run([self]), self._explain_dashes())))

    def _explain_dashes(self) -> str:
        lacking = [row for row in self.rows if row.complete and not row.has_intervals]
        if not lacking:
            return ""
        least, most = count_least_sequences(self.edits), max(row.count_sequences() for row in lacking)
        return (
            f"[{DASH}]: no interval, and nothing can be told from a difference: {most} sequences; of "
            f"{self.edits} edits each, at least {least} are needed."
        )

    @property
    def _note(self) -> str:
        return NOT_COMPARABLE if self.toy else ""

    def _compare_means(self) -> Grid:
        return self._compare("means of the two generalities and of the two localities", tuple(MEANS_OF))

    def _compare(self, title: str, measures: Sequence[str]) -> Grid:
        """Ours, each column followed by the published one where there is one."""
        columns: list[list[Cell]] = []
        header: list[str] = []
        note = ""
        for measure in measures:
            header.append(MEASURE_TITLES[measure])
            columns.append(self._fill_column(measure, MODES[0]))
            if any(measure in row.published for row in self.rows):
                header.append(self.label)
                columns.append(mark_best([Cell(row.published.get(measure)) for row in self.rows]))
                note = self._note
        return self._build_grid(
            title, header, columns, base=measures if measures == FIVE_METRICS else (), note=note
        )

    def _list(self, title: str, measures: Sequence[str], mode: str, costs: bool = False) -> Grid:
        columns = [self._fill_column(measure, mode) for measure in measures]
        header = [MEASURE_TITLES[measure] for measure in measures]
        if not any(cell.value is not None for column in columns for cell in column):
            return Grid(title, (), ())
        if costs:
            header += ["steps", "s/edit", "size"]
            columns += [
                [make_cell(row.find_cost("steps"), 1) for row in self.rows],
                [make_cell(row.find_cost("seconds"), 3) for row in self.rows],
            ]
            columns.append([Cell(text=_format_size(row.summary.get("bytes"))) for row in self.rows])
        return self._build_grid(title, header, columns, base=measures if not costs else (), mode=mode)

    def _list_declared(self) -> list[Grid]:
        """What the data declare beyond the eight and the probes of ours, with portability among them."""
        found = {name for row in self.rows for name in row.summary.get("metrics", {})}
        own = [name for name in order_metrics(found) if name not in (*METRICS, *FURTHER_METRICS)]
        title = "declared by the data, {}"
        return [self._list(title.format(mode.replace("_", "-")), own, mode) for mode in MODES if own]

    def _fill_column(self, measure: str, mode: str) -> list[Cell]:
        cells = [make_cell(row.find_estimate(measure, mode)) for row in self.rows]
        return mark_best(cells, [row.complete for row in self.rows])

    def _build_grid(
        self,
        title: str,
        header: Sequence[str],
        columns: Sequence[Sequence[Cell]],
        base: Sequence[str] = (),
        mode: str = MODES[0],
        note: str = "",
    ) -> Grid:
        """With a first row for the base model, whose numbers any of the others has."""
        rows = [(name_row(row), tuple(c[i] for c in columns)) for i, row in enumerate(self.rows)]
        first = next((row for row in self.rows if row.find_estimate(FIVE_METRICS[0], mode, WHEN[0])), None)
        if base and first is not None:
            titles = {MEASURE_TITLES[m]: m for m in base}
            cells = (
                make_cell(first.find_estimate(titles[h], mode, WHEN[0])) if h in titles else Cell()
                for h in header
            )
            rows.insert(0, (BASE, tuple(cells)))
        return Grid(title, ("method", *header), tuple(rows), note)

    def _list_presets(self) -> Grid:
        names = list(dict.fromkeys(name for row in self.rows for name in row.summary.get("presets", {})))
        header, columns = [], []
        for metric in LOCALITY:
            for name in names:
                header.append(f"{MEASURE_TITLES[metric]}, {name}")
                presets = [row.summary.get("presets", {}).get(name) for row in self.rows]
                cells = [make_cell(found["metrics"].get(metric) if found else None) for found in presets]
                columns.append(mark_best(cells))
        return self._build_grid("locality as others compute it", header, columns)

    def _list_distances(self) -> Grid:
        found = list_distances(self.rows)
        return Grid(found.title, found.header, found.rows, self._note)

    def _list_alpha(self) -> Grid:
        rows = []
        for row in self.rows:
            alpha = row.summary.get("decisions", {}).get("alpha")
            if alpha:
                rows.append((name_row(row), tuple(Cell(alpha.get(metric), digits=2) for metric in METRICS)))
        title = "what alpha was, mean over layers and records"
        return Grid(title, ("method", *(MEASURE_TITLES[metric] for metric in METRICS)), tuple(rows))


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


def list_not_run(blocks: Sequence[Block]) -> str:
    """A sentence with the rows that were left out of all of these blocks; empty where there are none."""
    names = dict.fromkeys(name for block in blocks for name in block.not_run)
    return f"Not run: {'; '.join(names)}." if names else ""


def markdown(block: Block) -> str:
    """A block with its heading, grids and verdicts."""
    parts = [f"#### {block.title}", *([block.remark] if block.remark else [])]
    for grid in block.build_grids():
        parts += write_markdown(grid)
    for heading, found in block.check_claims():
        parts += [f"{heading}", "\n".join(f"- {verdict}" for verdict in found)]
    return "\n\n".join(parts) + "\n"


def latex(block: Block) -> str:
    """A block as ``tabular`` environments, which want the package booktabs."""
    parts = [f"\\subsection*{{{escape(block.title)}}}", *([escape(block.remark)] if block.remark else [])]
    for grid in block.build_grids():
        parts += write_latex(grid)
    for heading, found in block.check_claims():
        items = [f"\\item {escape(str(verdict))}" for verdict in found]
        parts += [f"\\paragraph{{{escape(heading)}}}"]
        parts += ["\n".join([r"\begin{itemize}", *items, r"\end{itemize}"])]
    return "\n\n".join(parts) + "\n"


def csv_rows(blocks: Sequence[Block]) -> str:
    """One line per row, evaluation mode, measure and group of records (empty: all), with a header; numbers
    are in percent, except ``steps`` and ``seconds`` per edit and ``bytes``. ``note`` says of a published
    figure that it is not comparable with a toy model's."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for block in blocks:
        for line in list_lines(block):
            writer.writerow((*line, *[""] * (len(CSV_COLUMNS) - len(line))))
    return out.getvalue()


def list_lines(block: Block) -> list[tuple[object, ...]]:
    """A block's lines, in the order of ``CSV_COLUMNS``."""
    lines: list[tuple[object, ...]] = []
    for row in block.rows:
        at = (block.table, block.backbone, block.task, block.edits, row.name)
        seeds = " ".join(map(str, sorted(row.by_seed)))
        for mode, measure in ((mode, measure) for mode in MODES for measure in MEASURE_TITLES):
            entry = row.find_estimate(measure, mode)
            paper = row.published.get(measure) if mode == MODES[0] else None
            if entry or paper is not None:
                note = NOT_COMPARABLE if block.toy and paper is not None else ""
                shown = "" if paper is None else paper
                lines.append((*at, mode, measure, *_list_numbers(entry), shown, "", seeds, note))
        for part in list_parts(block.rows)[1:]:
            for measure in dict.fromkeys(("five", choose_hm8(block.rows), "minimal_pair")):
                value = average(row, measure, MODES[0], part.keep)
                if value is not None:
                    lines.append((*at, MODES[0], measure, value, "", "", "", part.title, seeds))
        for name in ("steps", "seconds"):
            if cost := row.find_cost(name):
                lines.append((*at, "", name, *_list_numbers(cost), "", "", seeds))
        if row.summary.get("bytes") is not None:
            lines.append((*at, "", "bytes", row.summary["bytes"], "", "", "", "", seeds))
    return lines


def _list_numbers(entry: Estimate | Spread | None) -> tuple[float | str, ...]:
    if entry is None:
        return ("", "", "")
    return tuple("" if math.isnan(entry[key]) else entry[key] for key in ("mean", "low", "high"))


def _list_published(title: str, figures: Figures, note: str) -> Grid:
    columns = [mark_best([Cell(row.get(metric)) for row in figures.values()]) for metric in FIVE_METRICS]
    rows = tuple((name, tuple(column[i] for column in columns)) for i, name in enumerate(figures))
    return Grid(title, ("method", *(MEASURE_TITLES[metric] for metric in FIVE_METRICS)), rows, note)


def _format_size(count: float | None) -> str:
    if count is None:
        return ""
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
