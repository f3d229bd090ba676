"""What lies under a row's means: image styles, kinds of question, seeds, and differences from one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from unike.evaluation.metrics import mean_of
from unike.evaluation.record import Record
from unike.evaluation.summary import MODES, Summary
from unike.report.measures import ALL_MINIMAL, MEASURE_TITLES, Row, Training, average, compare_rows
from unike.report.paper.claims import DISTANCE, YES_NO, choose_hm8, is_no_yes_no, judge, judge_distance
from unike.report.paper.grids import DASH, Cell, Grid, build_grid, make_cell, mark_best, name_row
from unike.types import FIVE_METRICS, IMAGE_STYLES, STYLE_METRICS

# A style on which the base answers fewer of random scenes right says nothing of edits.
READ = 0.6
BASE = "Base"


class Part(NamedTuple):
    """Some of the records, by the groups that they name."""

    title: str
    keep: Callable[[Record], bool]


def has_group(name: str, value: str, record: Record) -> bool:
    """Whether a record is of a group."""
    return record.groups.get(name) == value


def list_parts(rows: Sequence[Row]) -> list[Part]:
    """All records, those of each kind of question, all but yes/no, counterfactual edits, unseen objects and
    unseen wordings, as the records' groups have them. None where these name no kind."""
    known = {pair for row in rows for record in row.records for pair in record.groups.items()}
    kinds = sorted(value for name, value in known if name == "kind")
    if not kinds:
        return []
    found = [Part("all", lambda _: True)]
    if len(kinds) > 1 and YES_NO in kinds:
        found.append(Part("without yes/no", is_no_yes_no))
    titles = {YES_NO: "yes/no"}
    ordered = sorted(kinds, key=lambda kind: (kind != YES_NO, kind))
    found += [Part(titles.get(kind, kind), partial(has_group, "kind", kind)) for kind in ordered]
    further = (("edit", "counterfactual"), ("objects", "unseen"), ("wording", "unseen"))
    for name, value in further:
        if (name, value) in known:
            title = value if name == "edit" else f"{value} {name}"
            found.append(Part(title, partial(has_group, name, value)))
    return found


def list_kinds(rows: Sequence[Row]) -> Grid:
    """HM8, the minimal pair and reliability by kind of question."""
    hm8, parts = choose_hm8(rows), list_parts(rows)
    counts = [max((_count(row, part.keep) for row in rows), default=0) for part in parts]
    header = [f"{part.title} (n = {n})" for part, n in zip(parts, counts, strict=True)]
    measures = [hm8, *(["minimal_pair"] if hm8 == ALL_MINIMAL else []), "reliability"]
    columns = [[_make_parts(row, measures, part.keep) for row in rows] for part in parts]
    shown = " / ".join(MEASURE_TITLES[measure] for measure in measures)
    return build_grid(f"by kind of question: {shown}, teacher-forced", rows, header, columns)


def list_styles(rows: Sequence[Row], base: Mapping[str, float]) -> Grid:
    """M-Generality by image style; ``base`` has the base's accuracy by style, on random scenes."""
    titles = {"m_generality": "as drawn"} | {
        metric: style.replace("_", " ") for metric, style in zip(STYLE_METRICS, IMAGE_STYLES, strict=True)
    }
    if not any(row.find_estimate(metric) for row in rows for metric in STYLE_METRICS):
        return Grid("", (), ())
    columns = [mark_best([make_cell(row.find_estimate(m)) for row in rows]) for m in titles]
    read = [m for m, style in zip(STYLE_METRICS, IMAGE_STYLES, strict=True) if base.get(style, 1.0) >= READ]
    means = [[row.find_mean(metric) for metric in read] for row in rows]
    known = [[value for value in some if value is not None] for some in means]
    columns.append(mark_best([Cell(mean_of(some) if some else None) for some in known]))
    title = "M-Generality by style of the rephrased image, teacher-forced"
    note = f"mean: of the styles on which the base is right on {100 * READ:.0f}% of random scenes or more"
    grid = build_grid(title, rows, [*titles.values(), "mean"], columns, note if base else "")
    if not base:
        return grid
    shares = [base.get("plain"), *(base.get(style) for style in IMAGE_STYLES)]
    accuracy = tuple(Cell(None if share is None else 100 * share) for share in shares)
    return Grid(grid.title, grid.header, ((f"{BASE}, accuracy", (*accuracy, Cell())), *grid.rows), grid.note)


def list_seeds(rows: Sequence[Row]) -> Grid:
    """Means by seed of the whole pipeline, with their standard deviation."""
    seeds = sorted({seed for row in rows for seed in row.by_seed})
    if len(seeds) < 2:
        return Grid("", (), ())
    columns, header = [], []
    for measure in ("five", choose_hm8(rows), "minimal_pair", "m_generality"):
        texts = [_describe_spread(row, measure, seeds) for row in rows]
        if any(texts):
            header.append(MEASURE_TITLES[measure])
            columns.append([Cell(text=text) for text in texts])
    title = f"by seed ({', '.join(map(str, seeds))}), teacher-forced, with the standard deviation"
    return build_grid(title, rows, header, columns)


def list_differences(rows: Sequence[Row], subject: str, seed: int) -> Grid:
    """The subject minus each row that is not ours: HM5 and HM8 in both evaluation modes, with verdicts."""
    ours = next((row for row in rows if row.name == subject and row.complete), None)
    others = [row for row in rows if not row.ours and row.complete]
    if ours is None or not others:
        return Grid("", (), ())
    header: list[str] = []
    columns: list[list[Cell]] = []
    for mode in MODES:
        for measure in ("five", choose_hm8(rows)):
            found = [compare_rows(ours, other, measure, seed, mode) for other in others]
            if any(found):
                header.append(f"{MEASURE_TITLES[measure]}, {mode.replace('_', '-')}")
                columns.append([Cell(text=describe_difference(difference)) for difference in found])
    named = tuple((name_row(row), tuple(c[i] for c in columns)) for i, row in enumerate(others))
    return Grid(f"{subject} minus each other row", ("minus", *header), named if columns else ())


def list_trainings(rows: Sequence[Row]) -> Grid:
    """What was trained for how long, and what ended it; a training that rows share stands once."""
    users: dict[tuple[Training, ...], list[str]] = {}
    for row in rows:
        for part in dict.fromkeys(training.part for training in row.trainings):
            own = tuple(training for training in row.trainings if training.part == part)
            users.setdefault(own, []).append(row.name)
    titles = ("part", "train records visited", "steps", "best step", "seconds", "stopped by")
    lines = []
    for own, names in users.items():
        others = len(names) - 1
        shared = f" (and {others} other row{'s' * (others > 1)})" if others else ""
        columns = [
            [f"{training.visits:,}" for training in own],
            [f"{training.steps:,}" for training in own],
            [f"{training.best_step:,}" for training in own],
            [f"{training.seconds:,.0f}" for training in own],
            list(dict.fromkeys(training.stopped for training in own)),
        ]
        cells = [Cell(text=own[0].part), *(Cell(text=" / ".join(column)) for column in columns)]
        lines.append((f"{names[0]}{shared}", tuple(cells)))
    title = (
        "what was trained, the step with the least validation loss, and what ended it: patience, or the cap"
    )
    return Grid(title, ("method", *titles), tuple(lines)) if lines else Grid("", (), ())


def list_distances(rows: Sequence[Row]) -> Grid:
    """Whether each row behaves as published: within ``DISTANCE`` of its published figures, or not."""
    known = [row for row in rows if row.published and row.complete]
    columns = [[_describe_distance(row, metric) for row in known] for metric in FIVE_METRICS]
    title = f"does each row behave as published, within {DISTANCE:g} percentage points? Ours minus published"
    return build_grid(title, known, [MEASURE_TITLES[m] for m in FIVE_METRICS], columns if known else [])


def _describe_distance(row: Row, metric: str) -> Cell:
    ours, published = row.find_mean(metric), row.published.get(metric)
    return Cell(text="" if ours is None or published is None else judge_distance(ours, published))


def describe_difference(found: tuple[float, float, float] | None) -> str:
    """A difference with its interval and what it says."""
    if found is None:
        return ""
    cell = Cell(found[0], found[1], found[2])
    return " ".join(filter(None, (f"{found[0]:+.1f}", cell.interval, judge(found))))


def _make_parts(row: Row, measures: Sequence[str], keep: Callable[[Record], bool]) -> Cell:
    values = [average(row, measure, MODES[0], keep) for measure in measures]
    shown = [DASH if value is None else f"{value:.1f}" for value in values]
    return Cell(text=" / ".join(shown) if any(value is not None for value in values) else "")


def _count(row: Row, keep: Callable[[Record], bool]) -> int:
    return sum(r.ok and not r.is_step and keep(r) for r in row.records)


def _find(summary: Summary, measure: str) -> float | None:
    return Row("", summary).find_mean(measure)


def _describe_spread(row: Row, measure: str, seeds: Sequence[int]) -> str:
    found = [_find(row.by_seed[seed], measure) if seed in row.by_seed else None for seed in seeds]
    values = [value for value in found if value is not None]
    if not values:
        return ""
    shown = " / ".join(DASH if value is None else f"{value:.1f}" for value in found)
    return f"{shown}, SD {np.std(values, ddof=1):.1f}" if len(values) > 1 else shown
