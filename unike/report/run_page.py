"""The page of one run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from unike.datasets.declarations import get_expectation
from unike.evaluation.record import Answer, Record
from unike.evaluation.summary import (
    MODES,
    SHORT_TITLES,
    TITLES,
    Estimate,
    Summary,
    choose_mode,
    find_passes,
    summarise,
)
from unike.report.charts import Chart, describe_constant, draw_curve, draw_histogram, draw_shares
from unike.report.images import Album, ProbeImages, find_images
from unike.report.page import (
    AnswerView,
    CaseView,
    Cell,
    DotsView,
    HtmlPage,
    ProbeView,
    TableView,
    write_page,
)
from unike.report.terminal import (
    NUMBERS_HEADER,
    as_text,
    describe_costs,
    format_before,
    list_failures,
    list_number_rows,
    list_summary_rows,
    numbers_table,
    summary_table,
)
from unike.report.verdict import judge_run
from unike.runs.records import read_manifest, read_records, read_seed
from unike.system.text import one_line
from unike.types import FIVE_METRICS, METRIC_PRESETS, METRICS

REPORT = "report.html"
# What a phone shows of in a moment; tables and charts are of all cases.
MOST_CASES, MOST_LETTERS = 1000, 600
# What a probe changes about the edited question.
PROBE_INPUTS = {
    "reliability": "the edited image and question",
    "t_generality": "rephrased question",
    "m_generality": "rephrased image",
    "t_locality": "a question without an image",
    "m_locality": "another image and question",
    "same_question": "the question on another image",
    "same_image": "another question on the image",
    "joint": "rephrased question and rephrased image",
}
TARGET, UNCHANGED = "should give the target", "should give the base answer"
FAILED, PROBE_FAILED, TASK, UNREACHED = "failed", "fails", "task", "ended at max_steps"
# A probe passes if ...
_PASSES = {
    MODES[
        0
    ]: "every token of its answer is predicted, teacher-forced: the target's tokens; for locality, the "
    "base model's prediction",
    MODES[1]: "the generated answer equals the target; for locality, the base answer",
}
_PARTS = ("none", "up to half", "over half", "all")
_DECISIONS = {
    "alpha": "alpha, the weight of retrieved knowledge",
    "similarity": "similarity of the best retrieved item",
    "scope": "similarity that the scope gate compares with its threshold",
}
# The least percentage of a look of the table's cells.
_LOOKS = {"good": 90.0, "fair": 50.0, "bad": 0.0}
_TABLE_KEY = (
    "Bars: the share after the edit; green from 90%, brown from 50%, red below. "
    "In brackets: the 95% interval."
)


def write_report(
    directory: str | os.PathLike[str], path: str | os.PathLike[str] | None = None, most: int = MOST_CASES
) -> Path:
    """Writes the page of a run's folder, by default ``report.html`` in it, and gives its path; at most
    ``most`` cases are shown one by one. UserError where the folder holds no run."""
    folder = Path(directory)
    return write_page(build_run_page(folder, most), folder / REPORT if path is None else path)


def show(summary: Summary, directory: Path, page: bool) -> None:
    """Prints a run's table and where its records are and, with ``page``, the page that is written of them."""
    print(as_text(summary_table(summary, directory.name)))
    if (numbers := numbers_table(summary)) is not None:
        print(as_text(numbers))
    print("".join(f"{line}\n" for line in list_failures(summary)), end="")
    print(f"records: {directory}" + (f"\nreport: {write_report(directory)}" if page else ""))


def build_run_page(folder: Path, most: int = MOST_CASES) -> HtmlPage:
    """What the page of a run shows."""
    manifest, records = read_manifest(folder), read_records(folder)
    hparams = manifest["hparams"] if isinstance(manifest.get("hparams"), dict) else {}
    ends = [record for record in records if not record.is_step]
    presets = hparams.get("metric_presets")
    known = [name for name in METRIC_PRESETS if isinstance(presets, list) and name in presets]
    summary = summarise(records, read_seed(manifest), known)
    mode, cases = choose_mode(ends), ends[:most]
    images, note = find_images(manifest)
    album = make_album(cases, images)
    probes = list_evaluated(ends, mode)
    views = [build_case(record, mode, images, album, i, probes) for i, record in enumerate(cases)]
    charts, constants = _draw_charts(ends, summary)
    notes = [note] if note else album.list_notes()
    notes += list_failures(summary)
    if len(ends) > most:
        notes.append(f"The first {most} of {len(ends)} cases are shown; tables and charts are of all.")
    return HtmlPage(
        title=one_line(folder.resolve().name, 80),
        lead=_write_lead(summary, hparams, mode),
        tables=(_build_table(summary), *_build_numbers(summary)),
        charts=tuple(charts),
        cases=views,
        sorts=list_sorts(views),
        filters=list_filters(views),
        images=album.uris,
        notes=tuple(notes),
        about=tuple(_list_origins(manifest, hparams)),
        verdict=judge_run(ends, mode),
        constants=tuple(constants),
        probes=tuple(map(shorten_probe, probes)),
    )


# ---------------------------------------------------------------- cases, also of compared runs


def make_album(records: Iterable[Record], images: ProbeImages) -> Album:
    """An empty album, fit for all images of the records."""
    return Album(len({path for record in records for path in images.get(record.case, {}).values()}))


def list_evaluated(records: Iterable[Record], mode: str) -> list[str]:
    """The probes that some of the records have scores of."""
    return order_probes(name for record in records if record.ok for name in find_passes(record, mode))


def name_probe(name: str) -> str:
    """A probe's title, also of one that we do not know."""
    return TITLES.get(name, clip(name))


def shorten_probe(name: str) -> str:
    """A probe's title in the head of a column."""
    return SHORT_TITLES.get(name, clip(name))


def build_dots(passes: Mapping[str, bool], probes: Sequence[str], who: str = "") -> DotsView:
    """A dot for each of the run's ``probes``, those of the eight metrics first."""
    fails = [name_probe(name) for name in probes if passes.get(name) is False]
    words = f"{len(passes) - len(fails)} of {len(passes)} probes pass"
    words += f"; {', '.join(fails)} {'fails' if len(fails) == 1 else 'fail'}" if fails else ""
    return DotsView(
        dots=tuple((name_probe(name), passes.get(name)) for name in probes),
        description=f"{who}: {words}" if who else words,
        who=who,
        standard=sum(name in METRICS for name in probes),
    )


def build_case(
    record: Record, mode: str, images: ProbeImages, album: Album, order: int, evaluated: Sequence[str]
) -> CaseView:
    """A case with its answers before and after the edit, and a dot for each probe that the run
    ``evaluated``."""
    passes, probes = find_passes(record, mode), []
    for name in order_probes(record.answers):
        answer = record.answers[name]
        views = (
            AnswerView("before", clip(answer.before)),
            AnswerView("after", clip(answer.after), passes.get(name), _describe_accuracy(record, name)),
        )
        figures = tuple(_list_figures(record, name))
        probes.append(build_probe(record, name, images, album, views, figures))
    fails = [name for name in passes if not passes[name]]
    passed = len(passes) - len(fails)
    keys = {
        "order": order,
        "passes": passed,
        "steps": record.steps,
        "loss": record.loss,
        "seconds": record.seconds,
        "alpha": record.decisions.get("alpha", {}).get("reliability"),
    }
    return CaseView(
        id=one_line(record.id, 60),
        title=make_title(record.answers),
        outcome=f"{passed} of {len(passes)} probes pass" if record.ok else "failed",
        good=record.ok and not fails,
        keys={key: float(value) for key, value in keys.items() if value is not None},
        tags=tuple(list_tags(record, fails, not record.ok)),
        probes=tuple(probes),
        facts=tuple(_list_facts(record)),
        image=probes[0].image if probes else None,
        error="" if record.ok else clip(record.error),
        label=probes[0].title if probes else "",
        fails=tuple(name_probe(name) for name in order_probes(fails)),
        dots=(build_dots(passes, evaluated),) if record.ok and passes else (),
    )


def build_probe(
    record: Record,
    name: str,
    images: ProbeImages,
    album: Album,
    answers: tuple[AnswerView, ...],
    figures: tuple[tuple[str, str], ...] = (),
) -> ProbeView:
    """A probe with its image."""
    answer, path = record.answers[name], images.get(record.case, {}).get(name)
    expected = UNCHANGED if get_expectation(name) == "unchanged" else TARGET
    return ProbeView(
        title=TITLES.get(name, clip(name)),
        expected=": ".join(filter(None, (PROBE_INPUTS.get(name), expected))),
        prompt=clip(answer.prompt),
        target=clip(answer.target),
        answers=answers,
        image=None if path is None else album.place(path),
        name="" if path is None else one_line(Path(path).name, 60),
        figures=figures,
    )


def make_title(answers: Mapping[str, Answer]) -> str:
    """What an edit was to change: the answer before it, and the target."""
    edit = answers.get(FIVE_METRICS[0])
    if edit is None:
        return ""
    before, target = (one_line(text or "…", 80) for text in (edit.before, edit.target))
    return f"{before} → {target}"


def list_tags(record: Record, fails: Sequence[str], broken: bool) -> list[str]:
    """What a case is filtered by: its task, the probes that it ``fails``, and whether anything failed."""
    tags = [f"{TASK} {record.task or ''}", *(f"{PROBE_FAILED} {name}" for name in fails)]
    unreached = [UNREACHED] if record.reached is False else []
    return [*tags, *([FAILED] if broken or fails else []), *unreached]


def list_filters(views: Sequence[CaseView]) -> dict[str, str]:
    """The filters that select some of the cases, not all, with their titles."""
    found = dict.fromkeys(tag for view in views for tag in view.tags)
    titles = {FAILED: "something failed", UNREACHED: UNREACHED}
    fails = [tag.removeprefix(f"{PROBE_FAILED} ") for tag in found if tag.startswith(f"{PROBE_FAILED} ")]
    titles |= {
        f"{PROBE_FAILED} {name}": f"{TITLES.get(name, clip(name))} fails" for name in order_probes(fails)
    }
    titles |= {tag: one_line(tag, 60) for tag in found if tag.startswith(f"{TASK} ")}
    everywhere = {tag for tag in found if all(tag in view.tags for view in views)}
    return {tag: title for tag, title in titles.items() if tag in found and tag not in everywhere}


def list_sorts(views: Sequence[CaseView]) -> dict[str, str]:
    """What the cases can be sorted by, with titles."""
    titles = {
        "order": "order of the run",
        "passes": "probes that pass",
        "changed": "probes that changed",
        "alpha": "alpha at the edit",
        "loss": "final loss",
        "steps": "steps",
        "seconds": "seconds",
    }
    found = {key for view in views for key in view.keys}
    return {key: title for key, title in titles.items() if key in found}


def order_probes(names: Iterable[str]) -> list[str]:
    """Probes in the order of the tables, others after them as they come."""
    known = list(dict.fromkeys(names))
    return [m for m in METRICS if m in known] + [name for name in known if name not in METRICS]


def clip(value: object) -> str:
    """A text of a record, on one line, short enough for a page."""
    return "-" if value in (None, "") else one_line(value, MOST_LETTERS)


def _list_figures(record: Record, probe: str) -> Iterable[tuple[str, str]]:
    """What the edit decided for a probe, and what it retrieved."""
    for what, by_probe in record.decisions.items():
        if (value := by_probe.get(probe)) is not None:
            yield what, f"{value:.2f}"
    for item, similarity in record.retrieved.get(probe, {}).items():
        yield "retrieved", clip(item) + ("" if similarity is None else f" ({similarity:.2f})")


def _describe_accuracy(record: Record, probe: str) -> str:
    scores = record.get_scores(MODES[0])
    return f"{100 * scores[probe].after:.0f}% of tokens, teacher-forced" if probe in scores else ""


def _list_facts(record: Record) -> Iterable[tuple[str, str]]:
    if record.steps is not None:
        yield "steps", f"{record.steps}"
    if record.loss is not None:
        yield "final loss", f"{record.loss:.4f}"
    if record.reached is not None:
        yield "training", "reached the target" if record.reached else "ended at max_steps"
    if record.seconds is not None:
        yield "seconds", f"{record.seconds:.2f}"
    if record.bytes is not None:
        yield "size", f"{record.bytes / 1e3:,.0f} kB"
    if record.place is not None:
        yield "place", f"edit {record.place.position} of sequence {record.place.sequence}"


# ---------------------------------------------------------------- the run


def _write_lead(summary: Summary, hparams: Mapping[str, object], mode: str) -> str:
    model, method = hparams.get("model_name", "Model"), hparams.get("method", "unknown")
    return f"{model}, method {method}: {describe_costs(summary)}. A probe passes if {_PASSES[mode]}."


def _list_origins(manifest: Mapping[str, object], hparams: Mapping[str, object]) -> Iterable[tuple[str, str]]:
    parts = {key: manifest.get(key) for key in ("started", "seed", "command", "machine", "versions")}
    for key, value in {**parts, **hparams}.items():
        if value is not None:
            yield key, clip(" ".join(map(str, value)) if isinstance(value, list) else value)


def _build_table(summary: Summary) -> TableView:
    """The summary's table; evaluation modes that the run lacks have no column."""
    found = list_summary_rows(summary)
    titles = ("after, teacher-forced", "after, generated")
    kept = [i for i in range(len(MODES)) if any(row.after[i] for row in found)] or list(range(len(MODES)))
    header = (
        Cell("metric"),
        Cell("before", ("forced / gen.",)),
        *(Cell(titles[i], ("[95% interval]",)) for i in kept),
    )
    rows: dict[bool, list[tuple[Cell, ...]]] = {False: [], True: []}
    for row in found:
        cells = (Cell(row.title), Cell(format_before(row)), *(_build_cell(row.after[i]) for i in kept))
        rows[row.further].append(cells)
    return TableView(
        "Metrics, in percent",
        header,
        tuple(rows[False]),
        tuple(rows[True]),
        f"{len(rows[True])} further rows: other probes, other definitions of locality, means of these",
        _TABLE_KEY,
        "No record has scores.",
    )


def _build_numbers(summary: Summary) -> list[TableView]:
    """The table of likelihoods, where the run has some."""
    rows = tuple(tuple(map(Cell, row)) for row in list_number_rows(summary))
    header = tuple(Cell(title, tuple(more)) for title, *more in (h.split("\n") for h in NUMBERS_HEADER))
    return [TableView("Likelihoods, in nats", header, rows)] if rows else []


def _build_cell(found: Estimate | None) -> Cell:
    if found is None:
        return Cell("-")
    look = next((name for name, least in _LOOKS.items() if found["mean"] >= least), "bad")
    ends = f"[{found['low']:.1f}, {found['high']:.1f}]"
    return Cell(f"{found['mean']:.1f}", (ends,), min(100.0, max(0.0, found["mean"])), look)


def _draw_charts(records: Sequence[Record], summary: Summary) -> tuple[list[Chart], list[str]]:
    """The charts, and sentences in place of those that would have one bar."""
    done = [record for record in records if record.ok]
    scores = [record.get_scores(MODES[0]) for record in done]
    rows = {
        SHORT_TITLES.get(m, m): _count_parts(by_metric[m].after for by_metric in scores if m in by_metric)
        for m in summary["metrics"]
    }
    title = "Token accuracy per probe, teacher-forced: cases by share of tokens"
    charts, constants = [draw_shares(title, rows, _PARTS), _draw_curve(summary)], []
    seconds = [float(r.seconds) for r in done if r.seconds is not None]
    steps = [float(r.steps) for r in done if r.steps is not None]
    histograms = [
        *((title, _group_decisions(done, what), what, "probes") for what, title in _DECISIONS.items()),
        ("seconds per edit", {"edits": seconds}, "seconds", "edits"),
        ("steps per edit", {"edits": steps}, "steps", "edits"),
    ]
    for title, groups, across, up in histograms:
        whole = title[:1].upper() + title[1:]
        charts.append(draw_histogram(whole, groups, across, up))
        constants.append(describe_constant(whole, groups))
    return [chart for chart in charts if chart], [line for line in constants if line]


def _draw_curve(summary: Summary) -> Chart | None:
    former = [point["former"] for point in summary.get("curve", []) if point["former"]]
    lines = {TITLES[m]: [point[m] for point in former] for m in FIVE_METRICS if all(m in p for p in former)}
    if not former or not lines:
        return None
    title = "Edits before the newest, as edits accumulate, %"
    return draw_curve(title, lines, len(summary["curve"]), "edits so far", "%")


def _group_decisions(done: Sequence[Record], what: str) -> dict[str, list[float]]:
    """What edits decided for the probes, by what these should give."""
    groups: dict[str, list[float]] = {TARGET: [], UNCHANGED: []}
    for record in done:
        for name, value in record.decisions.get(what, {}).items():
            if value is not None:
                groups[UNCHANGED if get_expectation(name) == "unchanged" else TARGET].append(value)
    return groups


def _count_parts(values: Iterable[float]) -> list[int]:
    """How many values lie in each of ``_PARTS``."""
    counts = [0, 0, 0, 0]
    for value in values:
        counts[0 if value == 0 else 3 if value == 1 else 1 if value <= 0.5 else 2] += 1
    return counts
