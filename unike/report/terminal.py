"""Summaries as tables for a plain terminal."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unike.datasets.declarations import find_metric
from unike.evaluation.numbers import NUMBER_TITLES
from unike.evaluation.summary import (
    CELL_GROUPS,
    HARMONIC,
    HARMONIC_TITLES,
    LOCALITY,
    MODES,
    TITLES,
    WHEN,
    BeforeAfter,
    Estimate,
    Summary,
    get_estimate,
)
from unike.types import METRICS

_NOTHING = "-"
MOST_REASONS = 5
# What helps, by reason.
REMEDIES = {
    "out of memory": ": one edit alone takes more than there is; expected a smaller n_keys or model, fewer "
    "layers, or dtype: bfloat16",
}

SUMMARY_HEADER = (
    "metric",
    "before\nforced / gen.",
    "after, teacher-forced\n[95% interval]",
    "after, generated\n[95% interval]",
)


@dataclass(frozen=True)
class SummaryRow:
    """A row of a summary's table: estimates ``before`` and ``after`` the edit by ``MODES``, None where there
    is none. ``further`` rows are of other probes than the eight, or scored in another way."""

    title: str
    before: tuple[Estimate | None, ...] | None
    after: tuple[Estimate | None, ...]
    further: bool = False


def build_summary_rows(summary: Summary) -> list[tuple[str, ...]]:
    """The texts of a summary's table below ``SUMMARY_HEADER``: a row per metric, preset and mean."""
    return [
        (row.title, format_before(row), *map(_format_interval, row.after))
        for row in list_summary_rows(summary)
    ]


def list_summary_rows(summary: Summary) -> list[SummaryRow]:
    """A row per metric, preset and mean, in the order of the table."""
    rows = []
    for metric, modes in summary["metrics"].items():
        title = TITLES.get(metric, metric)
        rows.append(_build_row(title, modes, metric not in METRICS))
    for name, preset in summary.get("presets", {}).items():
        for metric in LOCALITY if name != "paper" else ():
            if entry := preset["metrics"].get(metric):
                rows.append(SummaryRow(f"{TITLES[metric]}, {name}", None, (entry, None), further=True))
    rows += _build_cell_rows(summary)
    rows += _build_group_rows(summary)
    for name, title in HARMONIC_TITLES.items():
        means = {mode: v[name] for mode, v in summary.get("harmonic_mean", {}).items() if name in v}
        if means:
            rows.append(_build_row(title, means, name not in HARMONIC))
    return rows


def _build_row(title: str, modes: Mapping[str, BeforeAfter], further: bool) -> SummaryRow:
    before, after = ([get_estimate(modes, mode, when) for mode in MODES] for when in WHEN)
    return SummaryRow(title, tuple(before), tuple(after), further)


def _build_cell_rows(summary: Summary) -> list[SummaryRow]:
    """Published means of derived cells: agreement with the base, and the share that is not the target."""
    found = summary.get("de_vqa", {})
    rows = []
    for group, way in product(CELL_GROUPS, ("unchanged", "not_target")):
        values = tuple(found.get(mode, {}).get(way, {}).get(group) for mode in MODES)
        if any(values):
            words = "unchanged" if way == "unchanged" else "not the target"
            rows.append(SummaryRow(f"{group}, {words}", None, values, further=True))
    return rows


def _build_group_rows(summary: Summary) -> list[SummaryRow]:
    """Metric groups that are summed up, and how often the base itself answers as its old answer implies."""
    rows = []
    for group, modes in summary.get("metric_groups", {}).items():
        for name, words in (("mean", "mean of its metrics"), ("all", "all of its metrics right")):
            found = {mode: values[name] for mode, values in modes.items() if name in values}
            rows.append(_build_row(f"{group}, {words}", found, further=True))
        base = summary.get("base_right", {}).get(MODES[1], {})
        for metric in (name for name in base if (known := find_metric(name)) and known.group == group):
            before = (None, base[metric])
            rows.append(SummaryRow(f"{TITLES[metric]}: base as before", before, (None, None), further=True))
    return rows


def format_before(row: SummaryRow) -> str:
    """The means before the edit, by evaluation mode."""
    return _NOTHING if row.before is None else " / ".join(map(_format_percent, row.before))


def summary_table(summary: Summary, title: str) -> Table:
    """Rows are metrics, before and after the edit; costs in the last line."""
    table = Table(title=Text(title), caption=Text(describe_costs(summary)), box=box.SIMPLE_HEAD)
    table.caption_justify = "left"
    for i, heading in enumerate(SUMMARY_HEADER):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i > 0)
    for name, *cells in build_summary_rows(summary):
        table.add_row(*map(Text, (name, *cells)))
    return table


NUMBERS_HEADER = ("number", "before", "after\n[95% interval]", "above 0, %\nbefore / after")


def list_number_rows(summary: Summary) -> list[tuple[str, ...]]:
    """The texts of the table of likelihoods below ``NUMBERS_HEADER``: a row per number and probe, in nats."""
    rows: list[tuple[str, ...]] = []
    for name, probes in summary.get("numbers", {}).items():
        for probe, found in probes.items():
            title = f"{NUMBER_TITLES.get(name, name)}, {TITLES.get(probe, probe)}"
            before, after, share = found.get("before"), found.get("after"), found.get("positive")
            rows.append(
                (
                    title,
                    f"{before['mean']:.3f}" if before else _NOTHING,
                    f"{after['mean']:.3f} [{after['low']:.3f}, {after['high']:.3f}]" if after else _NOTHING,
                    f"{share['before']:.1f} / {share['after']:.1f}" if share else _NOTHING,
                )
            )
    return rows


def numbers_table(summary: Summary) -> Table | None:
    """Likelihoods before and after the edit, in nats; None where the run has none."""
    rows = list_number_rows(summary)
    if not rows:
        return None
    table = Table(title=Text("Likelihoods, in nats"), box=box.SIMPLE_HEAD)
    for i, heading in enumerate(NUMBERS_HEADER):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i > 0)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def as_text(table: Table, width: int = 96) -> str:
    """The table as plain text, for files and logs."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines)


def _format_percent(entry: Estimate | None) -> str:
    return f"{entry['mean']:.1f}" if entry else _NOTHING


def _format_interval(entry: Estimate | None) -> str:
    return f"{entry['mean']:.1f} [{entry['low']:.1f}, {entry['high']:.1f}]" if entry else _NOTHING


def describe_costs(summary: Summary) -> str:
    """How many records, and what an edit cost, in a line."""
    parts = [f"{summary['n']} records"]
    if found := summary.get("sequences"):
        parts.append(f"{found['n']} sequence{'s' * (found['n'] != 1)} of {found['length']} edits")
    if summary["failed"]:
        parts.append(f"{summary['failed']} failed")
    if (unreached := summary.get("unreached")) is not None:
        parts.append(f"{unreached['n']} of {unreached['of']} edits ended at max_steps")
    if summary["seconds"] is not None:
        parts.append(f"{summary['seconds']:.2f} s per edit")
    if summary["steps"] is not None:
        parts.append(f"{summary['steps']:.1f} steps per edit")
    if most := max(filter(None, summary.get("peak_memory_bytes", {}).values()), default=0):
        parts.append(f"{most / 2**30:.2f} GiB at most")
    return ", ".join(parts)


def list_failures(summary: Summary) -> list[str]:
    """Why records failed, a line for each of the most frequent reasons."""
    total, failures = summary.get("n", 0) + summary.get("failed", 0), summary.get("failures", [])
    lines = [
        f"{f['n']} of {total} records failed: {f['reason']}{REMEDIES.get(f['reason'], '')}"
        for f in failures[:MOST_REASONS]
    ]
    if left := failures[MOST_REASONS:]:
        lines.append(f"{sum(f['n'] for f in left)} of {total} records failed for {len(left)} other reasons")
    return lines
