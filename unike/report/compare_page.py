"""The page of two runs compared: the differences, and the cases that flipped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from unike.evaluation.summary import HARMONIC_TITLES, TITLES, find_passes
from unike.report.compare import Comparison, Difference, describe_flips
from unike.report.images import Album, ProbeImages, find_images
from unike.report.page import AnswerView, CaseView, Cell, HtmlPage, TableView, write_page
from unike.report.run_page import (
    MOST_CASES,
    build_dots,
    build_probe,
    clip,
    list_evaluated,
    list_filters,
    list_sorts,
    list_tags,
    make_album,
    make_title,
    order_probes,
    shorten_probe,
)
from unike.report.verdict import differs, is_certain, judge_comparison
from unike.runs.records import read_manifest
from unike.system.text import one_line

GAINED, LOST = "passes in B alone", "passes in A alone"


def write_comparison(found: Comparison, run_a: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Writes the page to ``path`` and gives it; its images are those that the run ``run_a`` names."""
    return write_page(build_comparison_page(found, *find_images(read_manifest(run_a))), path)


def build_comparison_page(
    found: Comparison, images: ProbeImages, note: str = "", most: int = MOST_CASES
) -> HtmlPage:
    """What the page shows; ``note`` says why there are no images."""
    flipped = list(dict.fromkeys(flip.id for flip in found.flips))
    album = make_album((found.a[name] for name in flipped[:most]), images)
    probes = list_evaluated([*found.a.values(), *found.b.values()], found.mode)
    views = [_build_case(found, name, images, album, i, probes) for i, name in enumerate(flipped[:most])]
    notes = [note] if note else album.list_notes()
    if len(flipped) > most:
        notes.append(f"The first {most} of {len(flipped)} cases that flipped are shown.")
    a, b = found.names
    return HtmlPage(
        title="Two runs compared",
        lead=f"A is {a}, B is {b}. {describe_flips(found)}",
        tables=(_build_table(found),),
        cases=views,
        sorts=list_sorts(views),
        filters={tag: tag for tag in (GAINED, LOST)} | list_filters(views),
        images=album.uris,
        notes=tuple(notes),
        verdict=judge_comparison(found),
        probes=tuple(map(shorten_probe, probes)),
    )


def _build_table(found: Comparison) -> TableView:
    """Differences: certain ones first, then other rows that differ, the largest of each first; those with
    equal means are folded."""
    apart = sorted(
        filter(differs, found.differences), key=lambda d: (not is_certain(found, d), -abs(d.value))
    )
    alike = [d for d in found.differences if not differs(d)]
    return TableView(
        "Metrics after the edit, in percent",
        (Cell("metric"), Cell("A"), Cell("B"), Cell("B - A", ("[95% interval]",))),
        tuple(_build_row(found, d) for d in apart),
        tuple(_build_row(found, d) for d in alike),
        f"{len(alike)} rows with equal means",
        "Better: the 95% interval of the difference excludes 0. Not certain: it includes 0, or there are too "
        "few records.",
        "All means are equal.",
    )


def _build_row(found: Comparison, difference: Difference) -> tuple[Cell, ...]:
    title = TITLES.get(difference.measure) or HARMONIC_TITLES[difference.measure]
    look, words = "", "not certain" if differs(difference) else "equal"
    if is_certain(found, difference):
        look, words = ("b", "B is better") if difference.value > 0 else ("a", "A is better")
    ends = f"[{difference.low:+.1f}, {difference.high:+.1f}]"
    return (
        Cell(title, (f"{difference.mode.replace('_', '-')}, n {difference.n}",)),
        Cell(f"{difference.a:.1f}"),
        Cell(f"{difference.b:.1f}"),
        Cell(f"{difference.value:+.1f}", (ends, words), look=look),
    )


def _build_case(
    found: Comparison, name: str, images: ProbeImages, album: Album, order: int, evaluated: Sequence[str]
) -> CaseView:
    """The probes that flipped, first those that B gained."""
    a, b = found.a[name], found.b[name]
    own = {flip.probe: flip.to_b for flip in found.flips if flip.id == name}
    passes = find_passes(a, found.mode), find_passes(b, found.mode)
    views = []
    for probe in order_probes(own):
        one, other = a.answers[probe], b.answers[probe]
        answers = (
            AnswerView("before", clip(one.before)),
            AnswerView("A", clip(one.after), passes[0][probe]),
            AnswerView("B", clip(other.after), passes[1][probe]),
        )
        views.append(build_probe(a, probe, images, album, answers))
    gains = dict.fromkeys([GAINED if to_b else LOST for to_b in own.values()] + list_tags(a, (), False))
    return CaseView(
        id=one_line(name, 60),
        title=make_title(a.answers),
        outcome=_describe_outcome(own),
        good=None if len(set(own.values())) > 1 else all(own.values()),
        keys={"order": float(order), "changed": float(len(own)), "passes": float(sum(passes[1].values()))},
        tags=tuple(gains),
        probes=tuple(views),
        image=views[0].image,
        label=views[0].title,
        dots=tuple(build_dots(each, evaluated, who) for who, each in zip("AB", passes, strict=True)),
    )


def _describe_outcome(own: dict[str, bool]) -> str:
    def name_probes(to_b: bool) -> Iterable[str]:
        return (TITLES.get(probe, probe) for probe in order_probes(own) if own[probe] is to_b)

    parts = ((GAINED, ", ".join(name_probes(True))), (LOST, ", ".join(name_probes(False))))
    return "; ".join(f"{what}: {names}" for what, names in parts if names)
