"""The page of two runs side by side: the differences, and the cases that flipped."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from unike.evaluation.summary import TITLES, held
from unike.report.compare import HEADER, Comparison, rows_of, summed_up
from unike.report.page import CaseView, Page, Said, TableView, write_page
from unike.report.pictures import Album, Shown, shown_in
from unike.report.run_page import (
    MOST_CASES,
    album_of,
    clipped,
    filters_of,
    ordered,
    probe_view,
    sorts_of,
    tags_of,
    title_of,
)
from unike.runs.records import read_manifest
from unike.system.text import one_line

GAINED, LOST = "held in B alone", "held in A alone"


def write_comparison(found: Comparison, run_a: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Writes the page to ``path`` and gives it; pictures are those that the run ``run_a`` names."""
    return write_page(compared_page(found, *shown_in(read_manifest(run_a))), path)


def compared_page(found: Comparison, shown: Shown, note: str = "", most: int = MOST_CASES) -> Page:
    """What the page shows; ``note`` says why there are no pictures."""
    flipped = list(dict.fromkeys(flip.id for flip in found.flips))
    album = album_of((found.a[name] for name in flipped[:most]), shown)
    views = [_case(found, name, shown, album, i) for i, name in enumerate(flipped[:most])]
    notes = [note] if note else album.notes()
    if len(flipped) > most:
        notes.append(f"The first {most} of {len(flipped)} cases that flipped are shown.")
    a, b = found.names
    return Page(
        title="Two runs compared",
        lead=f"A is {a}, B is {b}. {summed_up(found)}",
        tables=(TableView("Metrics after the edit, in percent", HEADER, tuple(rows_of(found))),),
        cases=views,
        sorts=sorts_of(views),
        filters={tag: tag for tag in (GAINED, LOST)} | filters_of(views),
        pictures=album.uris,
        notes=tuple(notes),
    )


def _case(found: Comparison, name: str, shown: Shown, album: Album, order: int) -> CaseView:
    """The probes that flipped, first those that B gained."""
    a, b = found.a[name], found.b[name]
    own = {flip.probe: flip.to_b for flip in found.flips if flip.id == name}
    good = held(a, found.mode), held(b, found.mode)
    views = []
    for probe in ordered(own):
        one, other = (record["answers"][probe] for record in (a, b))
        said = (
            Said("before", clipped(one.get("before"))),
            Said("A", clipped(one.get("after")), good[0][probe]),
            Said("B", clipped(other.get("after")), good[1][probe]),
        )
        views.append(probe_view(a, probe, shown, album, said))
    return CaseView(
        id=one_line(name, 60),
        title=title_of(a["answers"]),
        outcome=_outcome(own),
        good=None if len(set(own.values())) > 1 else all(own.values()),
        keys={"order": float(order), "changed": float(len(own)), "held": float(sum(good[1].values()))},
        tags=tuple(
            dict.fromkeys([GAINED if to_b else LOST for to_b in own.values()] + tags_of(a, (), False))
        ),
        probes=tuple(views),
        picture=views[0].picture,
    )


def _outcome(own: dict[str, bool]) -> str:
    def named(to_b: bool) -> Iterable[str]:
        return (TITLES.get(probe, probe) for probe in ordered(own) if own[probe] is to_b)

    parts = ((GAINED, ", ".join(named(True))), (LOST, ", ".join(named(False))))
    return "; ".join(f"{what}: {names}" for what, names in parts if names)
