"""The page of one run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unike.evaluation.summary import KEPT, MODES, SHORT_TITLES, TITLES, held, leading_mode, summarise
from unike.report.charts import Chart, curve, histogram, shares
from unike.report.page import CaseView, Page, ProbeView, Said, TableView, write_page
from unike.report.pictures import Album, Shown, shown_in
from unike.report.terminal import SUMMARY_HEADER, as_text, costs, summary_rows, summary_table
from unike.runs.records import read_manifest, read_measured, seed_of
from unike.system.text import one_line
from unike.types import FIVE_METRICS, METRIC_PRESETS, METRICS

REPORT = "report.html"
# What a phone shows of in a moment; tables and charts are of all cases.
MOST_CASES, MOST_LETTERS = 1000, 600
# What a probe changes about the edited question.
ASKED = {
    "reliability": "the edited picture and question",
    "t_generality": "the question rephrased",
    "m_generality": "the picture re-drawn",
    "t_locality": "a question without a picture",
    "m_locality": "another picture and question",
    "same_question": "the question on another picture",
    "same_image": "another question on the picture",
    "joint": "question rephrased, picture re-drawn",
}
TARGET, UNCHANGED = "should give the target", "should stay as it was"
FAILED, PROBE_FAILED, TASK = "failed", "lost", "task"
_PARTS = ("none", "up to half", "over half", "all")
_DECISIONS = {
    "alpha": "alpha, the weight of retrieved knowledge",
    "similarity": "similarity of the best retrieved item",
    "scope": "similarity that opens the gate",
}


def write_report(
    directory: str | os.PathLike[str], path: str | os.PathLike[str] | None = None, most: int = MOST_CASES
) -> Path:
    """Writes the page of a run's folder, by default ``report.html`` in it, and gives its path; at most
    ``most`` cases are shown one by one. UserError where the folder holds no run."""
    folder = Path(directory)
    return write_page(run_page(folder, most), folder / REPORT if path is None else path)


def show(summary: Mapping[str, Any], directory: Path, page: bool) -> None:
    """Prints a run's table and where its records are and, with ``page``, the page that is written of them."""
    print(as_text(summary_table(summary, directory.name)))
    print(f"records: {directory}" + (f"\nreport: {write_report(directory)}" if page else ""))


def run_page(folder: Path, most: int = MOST_CASES) -> Page:
    """What the page of a run shows."""
    manifest, records = read_manifest(folder), read_measured(folder)
    hparams = manifest["hparams"] if isinstance(manifest.get("hparams"), dict) else {}
    ends = [record for record in records if record.get("kind") != "step"]
    presets = hparams.get("metric_presets")
    known = [name for name in METRIC_PRESETS if isinstance(presets, list) and name in presets]
    summary = summarise(records, seed_of(manifest), known)
    mode, cases = leading_mode(ends), ends[:most]
    shown, note = shown_in(manifest)
    album = album_of(cases, shown)
    views = [case_view(record, mode, shown, album, i) for i, record in enumerate(cases)]
    notes = [note] if note else album.notes()
    if len(ends) > most:
        notes.append(f"The first {most} of {len(ends)} cases are shown; tables and charts are of all.")
    return Page(
        title=one_line(folder.resolve().name, 80),
        lead=_lead(summary, hparams, mode),
        tables=(TableView("Metrics, in percent", SUMMARY_HEADER, tuple(summary_rows(summary))),),
        charts=tuple(_charts(ends, summary)),
        cases=views,
        sorts=sorts_of(views),
        filters=filters_of(views),
        pictures=album.uris,
        notes=tuple(notes),
        about=tuple(_about(manifest, hparams)),
    )


# ---------------------------------------------------------------- cases, also of compared runs


def album_of(records: Iterable[Mapping[str, Any]], shown: Shown) -> Album:
    """An empty album, fit for all pictures of the records."""
    return Album(len({p for r in records for p in shown.get(case_id(r), {}).values()}))


def case_id(record: Mapping[str, Any]) -> str:
    """The id of the data's record; in a sequence it may come again under other ids."""
    return str(record.get("case", record["id"]))


def case_view(record: Mapping[str, Any], mode: str, shown: Shown, album: Album, order: int) -> CaseView:
    """A case with what was said before and after the edit."""
    good, answers = held(record, mode), record.get("answers", {})
    probes = []
    for name in ordered(answers):
        said = (
            Said("before", clipped(answers[name].get("before"))),
            Said("after", clipped(answers[name].get("after")), good.get(name), _share(record, name)),
        )
        decided = ((what, v.get(name)) for what, v in record.get("decisions", {}).items())
        figures = [(what, f"{value:.2f}") for what, value in decided if _number(value)]
        near = record.get("retrieved", {}).get(name, {})
        figures += [("retrieved", f"{clipped(text)} ({value:.2f})") for text, value in near.items()]
        probes.append(probe_view(record, name, shown, album, said, tuple(figures)))
    broken, lost = record.get("status", "ok") != "ok", [name for name in good if not good[name]]
    outcome = "failed" if broken else f"{len(good) - len(lost)} of {len(good)} probes held"
    keys = {"order": float(order), "held": float(len(good) - len(lost))}
    keys |= {k: float(record[k]) for k in ("steps", "loss", "seconds") if _number(record.get(k))}
    if _number(alpha := record.get("decisions", {}).get("alpha", {}).get("reliability")):
        keys["alpha"] = float(alpha)
    return CaseView(
        id=one_line(record["id"], 60),
        title=title_of(answers),
        outcome=outcome,
        good=not broken and not lost,
        keys=keys,
        tags=tuple(tags_of(record, lost, broken)),
        probes=tuple(probes),
        facts=tuple(_facts(record)),
        picture=probes[0].picture if probes else None,
        error=clipped(record.get("error")) if broken else "",
    )


def probe_view(
    record: Mapping[str, Any],
    name: str,
    shown: Shown,
    album: Album,
    said: tuple[Said, ...],
    figures: tuple[tuple[str, str], ...] = (),
) -> ProbeView:
    """A probe with its picture."""
    answer, path = record["answers"][name], shown.get(case_id(record), {}).get(name)
    return ProbeView(
        title=TITLES.get(name, clipped(name)),
        expected=": ".join(filter(None, (ASKED.get(name), UNCHANGED if name in KEPT else TARGET))),
        prompt=clipped(answer.get("prompt")),
        target=clipped(answer.get("target")),
        said=said,
        picture=None if path is None else album.place(path),
        name="" if path is None else one_line(Path(path).name, 60),
        figures=figures,
    )


def title_of(answers: Mapping[str, Mapping[str, Any]]) -> str:
    """What an edit was to change: the answer before it, and the target."""
    edit = answers.get(FIVE_METRICS[0], {})
    before, target = (one_line(edit.get(key) or "…", 80) for key in ("before", "target"))
    return f"{before} → {target}" if edit else ""


def tags_of(record: Mapping[str, Any], lost: Sequence[str], broken: bool) -> list[str]:
    """What a case is filtered by."""
    tags = [f"{TASK} {record.get('task', '')}", *(f"{PROBE_FAILED} {name}" for name in lost)]
    return [*tags, *([FAILED] if broken or lost else [])]


def filters_of(views: Sequence[CaseView]) -> dict[str, str]:
    """The filters that tell some cases from others, with their titles."""
    found = dict.fromkeys(tag for view in views for tag in view.tags)
    titles = {FAILED: "something failed"}
    lost = (tag.removeprefix(f"{PROBE_FAILED} ") for tag in found if tag.startswith(f"{PROBE_FAILED} "))
    titles |= {
        f"{PROBE_FAILED} {name}": f"{TITLES.get(name, clipped(name))} failed" for name in ordered(lost)
    }
    titles |= {tag: one_line(tag, 60) for tag in found if tag.startswith(f"{TASK} ")}
    everywhere = {tag for tag in found if all(tag in view.tags for view in views)}
    return {tag: title for tag, title in titles.items() if tag in found and tag not in everywhere}


def sorts_of(views: Sequence[CaseView]) -> dict[str, str]:
    """What the cases can be sorted by, with titles."""
    titles = {
        "order": "order of the run", "held": "probes that held", "changed": "probes that changed",
        "alpha": "alpha at the edit", "loss": "loss at the end", "steps": "steps", "seconds": "seconds",
    }  # fmt: skip
    found = {key for view in views for key in view.keys}
    return {key: title for key, title in titles.items() if key in found}


def ordered(names: Iterable[str]) -> list[str]:
    """Probes in the order of the tables, others behind them."""
    known = list(dict.fromkeys(names))
    return [m for m in METRICS if m in known] + [name for name in known if name not in METRICS]


def clipped(value: Any) -> str:
    """A text of a record, on one line, short enough for a page."""
    return "-" if value in (None, "") else one_line(value, MOST_LETTERS)


def _share(record: Mapping[str, Any], name: str) -> str:
    value = record.get("scores", {}).get(MODES[0], {}).get(name, {}).get("after")
    return f"{100 * value:.0f}% of tokens, teacher-forced" if _number(value) else ""


def _facts(record: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if _number(record.get("steps")):
        yield "steps", f"{record['steps']}"
    if _number(record.get("loss")):
        yield "loss at the end", f"{record['loss']:.4f}"
    if _number(record.get("seconds")):
        yield "seconds", f"{record['seconds']:.2f}"
    if _number(record.get("bytes")):
        yield "size", f"{record['bytes'] / 1e3:,.0f} kB"
    if "sequence" in record:
        yield "place", f"edit {record.get('position')} of sequence {record['sequence']}"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---------------------------------------------------------------- the run


def _lead(summary: Mapping[str, Any], hparams: Mapping[str, Any], mode: str) -> str:
    reading = "the generated answer" if mode == MODES[1] else "each token of the answer, teacher-forced,"
    told = (
        f"{hparams.get('model_name', 'Model')}, method {hparams.get('method', 'unknown')}: {costs(summary)}."
    )
    return f"{told} A probe holds if {reading} is what a good edit gives."


def _about(manifest: Mapping[str, Any], hparams: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    parts = {key: manifest.get(key) for key in ("started", "seed", "command", "machine", "versions")}
    for key, value in {**parts, **hparams}.items():
        if value is not None:
            yield key, clipped(" ".join(map(str, value)) if isinstance(value, list) else value)


def _charts(records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> Iterable[Chart]:
    done = [record for record in records if record.get("status", "ok") == "ok"]
    rows = {
        SHORT_TITLES.get(m, m): _counted([r["scores"][MODES[0]][m]["after"] for r in _having(done, m)])
        for m in summary["metrics"]
    }
    if rows:
        yield shares("Cases by how many tokens are as they should be, teacher-forced", rows, _PARTS)
    if summary.get("curve"):
        former = [step["former"] for step in summary["curve"] if step["former"]]
        lines = {TITLES[m]: [step[m] for step in former] for m in FIVE_METRICS if all(m in s for s in former)}
        if former and lines:
            yield curve("Edits before the newest, as edits accumulate, %", lines, len(summary["curve"]))
    for what, title in _DECISIONS.items():
        groups: dict[str, list[float]] = {TARGET: [], UNCHANGED: []}
        for record in done:
            for name, value in record.get("decisions", {}).get(what, {}).items():
                if _number(value):
                    groups[UNCHANGED if name in KEPT else TARGET].append(value)
        yield from filter(None, [histogram(title[:1].upper() + title[1:], groups)])
    for key, title in (("seconds", "Seconds per edit"), ("steps", "Steps per edit")):
        values = [float(record[key]) for record in done if _number(record.get(key))]
        yield from filter(None, [histogram(title, {"edits": values}) if values else None])


def _having(records: Iterable[Mapping[str, Any]], metric: str) -> Iterable[Mapping[str, Any]]:
    return (r for r in records if metric in r.get("scores", {}).get(MODES[0], {}))


def _counted(values: Iterable[float]) -> list[int]:
    """How many values lie in each of ``_PARTS``."""
    counts = [0, 0, 0, 0]
    for value in values:
        counts[0 if value == 0 else 3 if value == 1 else 1 if value <= 0.5 else 2] += 1
    return counts
