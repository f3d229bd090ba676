"""Two runs side by side: paired differences, and the probes that one holds and the other fails."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from unike.evaluation.summary import HARMONIC, MODES, TITLES, held, leading_mode
from unike.report.measures import MEASURE_TITLES, MEASURES, Row, difference
from unike.runs.records import read_manifest, read_measured, seed_of
from unike.system.text import one_line
from unike.types import METRICS, UserError

Record = Mapping[str, Any]
HEADER = ("metric", "reading", "n", "A", "B", "B - A\n[95% interval]")


@dataclass(frozen=True)
class Difference:
    """A measure of both runs over the records that they share, and ``b`` less ``a`` with its 95%
    interval, all in percent; ``n`` records."""

    measure: str
    mode: str
    n: int
    a: float
    b: float
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.b - self.a


@dataclass(frozen=True)
class Flip:
    """A probe that held in one of the runs alone: in ``b`` where ``to_b``."""

    id: str
    probe: str
    to_b: bool


@dataclass(frozen=True)
class Comparison:
    """``a`` and ``b`` hold the runs' records by id, both done and of the same cases, in the order of ``a``.

    ``apart`` counts the records that one run lacks or failed at; ``mode`` is the reading of the flips.
    """

    names: tuple[str, str]
    a: Mapping[str, Record]
    b: Mapping[str, Record]
    apart: int
    mode: str
    differences: tuple[Difference, ...]
    flips: tuple[Flip, ...]


def compare(
    run_a: str | os.PathLike[str], run_b: str | os.PathLike[str], seed: int | None = None
) -> Comparison:
    """Compares two runs on the records that both have done. ``seed`` is that of the resampling, by
    default the seed of the first run.

    UserError where the runs share no record, and for records that have one id and other questions.
    """
    if seed is None:
        seed = seed_of(read_manifest(run_a))
    runs = [
        {str(r["id"]): r for r in read_measured(run) if r.get("kind") != "step"} for run in (run_a, run_b)
    ]
    done = [
        {i: r for i, r in run.items() if r.get("status", "ok") == "ok" and r.get("answers")} for run in runs
    ]
    shared = [name for name in done[0] if name in done[1]]
    if not shared:
        raise UserError(
            f"{run_a} and {run_b}: share no record that both have done; expected runs of the same data"
        )
    a, b = ({name: run[name] for name in shared} for run in done)
    if others := [name for name in shared if _asked(a[name]) != _asked(b[name])]:
        raise UserError(
            f"{run_b}: {len(others)} of {len(shared)} records ask other questions than in {run_a}, the first "
            f"is {one_line(others[0], 60)}; expected runs of the same data"
        )
    mode = leading_mode([*a.values(), *b.values()])
    return Comparison(
        _names(run_a, run_b), a, b, len(runs[0].keys() | runs[1].keys()) - len(shared), mode,
        tuple(_differences(a, b, seed)), tuple(_flips(a, b, mode)),
    )  # fmt: skip


def table_of(found: Comparison) -> Table:
    """The differences for a plain terminal."""
    table = Table(box=box.SIMPLE_HEAD, caption=Text(summed_up(found)), caption_justify="left")
    for i, heading in enumerate(HEADER):
        table.add_column(heading, justify="left" if i < 2 else "right", no_wrap=True)
    for row in rows_of(found):
        table.add_row(*map(Text, row))
    return table


def rows_of(found: Comparison) -> list[tuple[str, ...]]:
    """The differences as texts: metric, reading, n, A, B, and B less A with its interval."""
    return [
        (
            TITLES.get(d.measure, MEASURE_TITLES[d.measure]), d.mode.replace("_", "-"), str(d.n),
            f"{d.a:.1f}", f"{d.b:.1f}", f"{d.value:+.1f} [{d.low:+.1f}, {d.high:+.1f}]",
        )
        for d in found.differences
    ]  # fmt: skip


def flip_table(found: Comparison, most: int) -> Table:
    """The first ``most`` flips for a plain terminal."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("record", "probe", "target", "before", "A", "B", "held in"):
        table.add_column(heading, overflow="fold")
    for flip in found.flips[:most]:
        one, other = (run[flip.id]["answers"][flip.probe] for run in (found.a, found.b))
        said = (one.get("target"), one.get("before"), one.get("after"), other.get("after"))
        cells = (flip.id, TITLES.get(flip.probe, flip.probe), *said, "B" if flip.to_b else "A")
        table.add_row(*(Text(one_line("-" if cell is None else cell, 40)) for cell in cells))
    return table


def summed_up(found: Comparison) -> str:
    """How many records are compared, and how many probes flipped, in a line."""
    to_b = sum(flip.to_b for flip in found.flips)
    told = (
        f"{len(found.a)} records in both, {found.apart} left out. "
        if found.apart
        else f"{len(found.a)} records. "
    )
    cases, reading = len({flip.id for flip in found.flips}), found.mode.replace("_", "-")
    return (
        f"{told}{len(found.flips)} probes of {cases} cases flipped ({reading}): {to_b} held in B alone, "
        f"{len(found.flips) - to_b} in A alone."
    )


def _asked(record: Record) -> dict[str, tuple[Any, Any]]:
    """What the probes asked and what for, by name."""
    return {name: (a.get("prompt"), a.get("target")) for name, a in record["answers"].items()}


def _differences(a: Mapping[str, Record], b: Mapping[str, Record], seed: int) -> list[Difference]:
    found = []

    def holds(record: Record, measure: str, mode: str) -> bool:
        return all(metric in record.get("scores", {}).get(mode, {}) for metric in MEASURES[measure][0])

    for measure, mode in product((*METRICS, *HARMONIC), MODES):
        both = [name for name in a if holds(a[name], measure, mode) and holds(b[name], measure, mode)]
        one, other = (Row("", {}, [run[name] for name in both]) for run in (a, b))
        if (more := difference(other, one, measure, seed, mode)) is not None:
            a_mean, b_mean = _mean(one, measure, mode), _mean(other, measure, mode)
            found.append(Difference(measure, mode, len(both), a_mean, b_mean, more[1], more[2]))
    return found


def _mean(row: Row, measure: str, mode: str) -> float:
    metrics, of = MEASURES[measure]
    values = ([100.0 * r["scores"][mode][m]["after"] for r in row.records] for m in metrics)
    return of([sum(column) / len(column) for column in values])


def _flips(a: Mapping[str, Record], b: Mapping[str, Record], mode: str) -> list[Flip]:
    found = []
    for name, record in a.items():
        one, other = held(record, mode), held(b[name], mode)
        both = [p for p in one if p in other and p in record["answers"]]
        found += [Flip(name, p, other[p]) for p in both if one[p] != other[p]]
    return found


def _names(run_a: str | os.PathLike[str], run_b: str | os.PathLike[str]) -> tuple[str, str]:
    """The folders' own names, or their whole paths where these are alike."""
    a, b = Path(run_a).resolve(), Path(run_b).resolve()
    names = (a.name, b.name) if a.name != b.name else (str(run_a), str(run_b))
    return one_line(names[0], 80), one_line(names[1], 80)
