"""Summaries as tables for a plain terminal."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unike.evaluation.summary import (
    HARMONIC,
    LOCALITY,
    MODES,
    SHORT_TITLES,
    TITLES,
    _entry,
    _ordered,
    harmonic_of,
)

_NOTHING = "-"


SUMMARY_HEADER = (
    "metric",
    "before\nforced / gen.",
    "after, teacher-forced\n[95% interval]",
    "after, generated\n[95% interval]",
)


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The texts of a summary's table below ``SUMMARY_HEADER``: a row per metric, preset and mean."""
    rows = []
    for metric, modes in summary["metrics"].items():
        rows.append((TITLES.get(metric, metric), *_before_and_after(modes)))
    for name, preset in summary.get("presets", {}).items():
        for metric in LOCALITY if name != "paper" else ():
            if entry := preset["metrics"].get(metric):
                rows.append((f"{TITLES[metric]}, {name}", _NOTHING, _interval(entry), _NOTHING))
    if any(HARMONIC[0] in values for values in summary.get("harmonic_mean", {}).values()):
        means = {mode: values.get(HARMONIC[0], {}) for mode, values in summary["harmonic_mean"].items()}
        rows.append(("harmonic mean", *_before_and_after(means)))
    return rows


def _before_and_after(modes: Mapping[str, Any]) -> tuple[str, ...]:
    before = " / ".join(_percent(_entry(modes, mode, "before")) for mode in MODES)
    return (before, *(_interval(_entry(modes, mode, "after")) for mode in MODES))


def summary_table(summary: Mapping[str, Any], title: str) -> Table:
    """Rows are metrics; what the model said before and after the edit; costs in the last line."""
    table = Table(title=Text(title), caption=Text(costs(summary)), box=box.SIMPLE_HEAD)
    table.caption_justify = "left"
    for i, heading in enumerate(SUMMARY_HEADER):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for name, *cells in summary_rows(summary):
        table.add_row(*map(Text, (name, *cells)))
    return table


def compare_table(
    rows: Sequence[tuple[str, Mapping[str, Any]]], mode: str = "teacher_forced", title: str | None = None
) -> Table:
    """One row per method, the metrics after the edit and the harmonic mean of the five as columns, read
    in one ``mode``."""
    heading = title or f"after the edit, {mode.replace('_', '-')}, %"
    table = Table(title=Text(heading), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    columns = _ordered({metric for _, summary in rows for metric in summary["metrics"]})
    table.add_column("method", overflow="fold")
    for metric in columns:
        table.add_column(Text(SHORT_TITLES.get(metric, metric)), justify="right", no_wrap=True)
    if columns:
        table.add_column("HM5", justify="right", no_wrap=True)
    for name, summary in rows:
        values = [_entry(summary["metrics"].get(metric, {}), mode, "after") for metric in columns]
        if columns:
            values.append(harmonic_of(summary, mode, HARMONIC[0]))
        table.add_row(Text(name), *(_percent(value) for value in values))
    return table


def as_text(table: Table, width: int = 96) -> str:
    """The table as plain text, for files and logs."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines)


def _percent(entry: Mapping[str, float] | None) -> str:
    return f"{entry['mean']:.1f}" if entry else _NOTHING


def _interval(entry: Mapping[str, float] | None) -> str:
    return f"{entry['mean']:.1f} [{entry['low']:.1f}, {entry['high']:.1f}]" if entry else _NOTHING


def costs(summary: Mapping[str, Any]) -> str:
    """How many records, and what an edit cost, in a line."""
    parts = [f"{summary['n']} records"]
    if found := summary.get("sequences"):
        parts.append(f"{found['n']} sequence{'s' * (found['n'] != 1)} of {found['length']} edits")
    if summary["failed"]:
        parts.append(f"{summary['failed']} failed")
    if summary["seconds"] is not None:
        parts.append(f"{summary['seconds']:.2f} s per edit")
    if summary["steps"] is not None:
        parts.append(f"{summary['steps']:.1f} steps per edit")
    if most := max(filter(None, summary.get("peak_memory_bytes", {}).values()), default=0):
        parts.append(f"{most / 2**30:.2f} GiB at most")
    return ", ".join(parts)
