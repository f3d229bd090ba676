"""The page of two runs compared: the differences, and the cases that flipped."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from unike.evaluation.summary import TITLES, find_passes
from unike.report.compare import HEADER, Comparison, build_rows, describe_flips
from unike.report.images import Album, ProbeImages, find_images
from unike.report.page import AnswerView, CaseView, HtmlPage, TableView, write_page
from unike.report.run_page import (
    MOST_CASES,
    build_probe,
    clip,
    list_filters,
    list_sorts,
    list_tags,
    make_album,
    make_title,
    order_probes,
)
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
    views = [_build_case(found, name, images, album, i) for i, name in enumerate(flipped[:most])]
    notes = [note] if note else album.list_notes()
    if len(flipped) > most:
        notes.append(f"The first {most} of {len(flipped)} cases that flipped are shown.")
    a, b = found.names
    return HtmlPage(
        title="Two runs compared",
        lead=f"A is {a}, B is {b}. {describe_flips(found)}",
        tables=(TableView("Metrics after the edit, in percent", HEADER, tuple(build_rows(found))),),
        cases=views,
        sorts=list_sorts(views),
        filters={tag: tag for tag in (GAINED, LOST)} | list_filters(views),
        images=album.uris,
        notes=tuple(notes),
    )


def _build_case(found: Comparison, name: str, images: ProbeImages, album: Album, order: int) -> CaseView:
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
    )


def _describe_outcome(own: dict[str, bool]) -> str:
    def name_probes(to_b: bool) -> Iterable[str]:
        return (TITLES.get(probe, probe) for probe in order_probes(own) if own[probe] is to_b)

    parts = ((GAINED, ", ".join(name_probes(True))), (LOST, ", ".join(name_probes(False))))
    return "; ".join(f"{what}: {names}" for what, names in parts if names)
