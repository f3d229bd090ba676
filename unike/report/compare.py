"""Two runs compared: paired differences, and the probes that pass in one of them alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from unike.evaluation.record import Record
from unike.evaluation.summary import (
    HARMONIC,
    HARMONIC_TITLES,
    MODES,
    TITLES,
    choose_mode,
    find_passes,
    order_metrics,
)
from unike.report.measures import Row, compare_rows, get_parts
from unike.runs.records import read_manifest, read_records, read_seed
from unike.system.text import one_line
from unike.types import METRICS, UserError

HEADER = ("metric", "evaluation mode", "n", "A", "B", "B - A\n[95% interval]")


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
    """A probe that passes in one of the runs alone: in ``b`` where ``to_b``."""

    id: str
    probe: str
    to_b: bool


@dataclass(frozen=True)
class Comparison:
    """``a`` and ``b`` are the runs' records by id, both done and of the same cases, in the order of ``a``.

    ``apart`` counts the records that one run lacks or failed at; ``mode`` is the flips' evaluation mode.
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
        seed = read_seed(read_manifest(run_a))
    runs = [{r.id: r for r in read_records(run) if not r.is_step} for run in (run_a, run_b)]
    done = [{name: r for name, r in run.items() if r.ok and r.answers} for run in runs]
    shared = [name for name in done[0] if name in done[1]]
    if not shared:
        raise UserError(
            f"{run_a} and {run_b}: share no record that both have done; expected runs of the same data"
        )
    a, b = ({name: run[name] for name in shared} for run in done)
    if others := [name for name in shared if _list_questions(a[name]) != _list_questions(b[name])]:
        raise UserError(
            f"{run_b}: {len(others)} of {len(shared)} records ask other questions than in {run_a}, the first "
            f"is {one_line(others[0], 60)}; expected runs of the same data"
        )
    mode = choose_mode([*a.values(), *b.values()])
    return Comparison(
        names=_name_runs(run_a, run_b),
        a=a,
        b=b,
        apart=len(runs[0].keys() | runs[1].keys()) - len(shared),
        mode=mode,
        differences=tuple(_find_differences(a, b, seed)),
        flips=tuple(_find_flips(a, b, mode)),
    )


def build_table(found: Comparison) -> Table:
    """The differences for a plain terminal."""
    table = Table(box=box.SIMPLE_HEAD, caption=Text(describe_flips(found)), caption_justify="left")
    for i, heading in enumerate(HEADER):
        table.add_column(heading, justify="left" if i < 2 else "right", no_wrap=True)
    for row in build_rows(found):
        table.add_row(*map(Text, row))
    return table


def build_rows(found: Comparison) -> list[tuple[str, ...]]:
    """The differences as texts below ``HEADER``."""
    return [
        (
            TITLES.get(d.measure) or HARMONIC_TITLES[d.measure],
            d.mode.replace("_", "-"),
            str(d.n),
            f"{d.a:.1f}",
            f"{d.b:.1f}",
            f"{d.value:+.1f} [{d.low:+.1f}, {d.high:+.1f}]",
        )
        for d in found.differences
    ]


def build_flip_table(found: Comparison, most: int) -> Table:
    """The first ``most`` flips for a plain terminal."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("record", "probe", "target", "before", "A", "B", "passes in"):
        table.add_column(heading, overflow="fold")
    for flip in found.flips[:most]:
        one, other = (run[flip.id].answers[flip.probe] for run in (found.a, found.b))
        answers = (one.target, one.before, one.after, other.after)
        cells = (flip.id, TITLES.get(flip.probe, flip.probe), *answers, "B" if flip.to_b else "A")
        table.add_row(*(Text(one_line("-" if cell is None else cell, 40)) for cell in cells))
    return table


def describe_flips(found: Comparison) -> str:
    """How many records are compared, and how many probes flipped, in a line."""
    left_out = f" in both, {found.apart} left out" if found.apart else ""
    to_b = sum(flip.to_b for flip in found.flips)
    cases, mode = len({flip.id for flip in found.flips}), found.mode.replace("_", "-")
    return (
        f"{len(found.a)} records{left_out}. {len(found.flips)} probes of {cases} cases flipped ({mode}): "
        f"{to_b} pass in B alone, {len(found.flips) - to_b} in A alone."
    )


def _list_questions(record: Record) -> dict[str, tuple[str | None, str | None]]:
    """By probe, its prompt and target."""
    return {name: (answer.prompt, answer.target) for name, answer in record.answers.items()}


def _find_differences(a: Mapping[str, Record], b: Mapping[str, Record], seed: int) -> list[Difference]:
    found = []

    def has(record: Record, measure: str, mode: str) -> bool:
        return all(metric in record.get_scores(mode) for metric in get_parts(measure)[0])

    asked = {
        name
        for run in (a, b)
        for record in run.values()
        for mode in MODES
        for name in record.get_scores(mode)
    }
    further = [name for name in order_metrics(asked) if name not in METRICS]
    for measure, mode in product((*METRICS, *HARMONIC, *further), MODES):
        both = [name for name in a if has(a[name], measure, mode) and has(b[name], measure, mode)]
        one, other = (Row("", {}, [run[name] for name in both]) for run in (a, b))
        if (more := compare_rows(other, one, measure, seed, mode)) is not None:
            means = _average(one, measure, mode), _average(other, measure, mode)
            found.append(Difference(measure, mode, len(both), *means, more[1], more[2]))
    return found


def _average(row: Row, measure: str, mode: str) -> float:
    metrics, of = get_parts(measure)
    values = ([100.0 * r.get_scores(mode)[m].after for r in row.records] for m in metrics)
    return of([sum(column) / len(column) for column in values])


def _find_flips(a: Mapping[str, Record], b: Mapping[str, Record], mode: str) -> list[Flip]:
    found = []
    for name, record in a.items():
        one, other = find_passes(record, mode), find_passes(b[name], mode)
        both = [p for p in one if p in other and p in record.answers]
        found += [Flip(name, p, other[p]) for p in both if one[p] != other[p]]
    return found


def _name_runs(run_a: str | os.PathLike[str], run_b: str | os.PathLike[str]) -> tuple[str, str]:
    """The folders' own names, or their whole paths where these are alike; with the methods where they
    differ."""
    a, b = Path(run_a).resolve(), Path(run_b).resolve()
    names = (a.name, b.name) if a.name != b.name else (str(run_a), str(run_b))
    methods = [_name_method(folder) for folder in (a, b)]
    if methods[0] != methods[1]:
        names = (f"{names[0]} ({methods[0]})", f"{names[1]} ({methods[1]})")
    return one_line(names[0], 120), one_line(names[1], 120)


def _name_method(folder: Path) -> str:
    """The method of a run, with its gate."""
    hparams = read_manifest(folder).get("hparams")
    if not isinstance(hparams, dict):
        return "unknown method"
    gate = hparams.get("scope_gate", "none")
    return str(hparams.get("method", "unike")) + ("" if gate == "none" else f", scope_gate: {gate}")
