"""Records summed up, and the summaries as tables for a plain terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unike.metrics import bootstrap_interval
from unike.types import FIVE_METRICS, METRICS

MODES = ("teacher_forced", "generated")
TITLES = {
    "reliability": "Reliability",
    "t_generality": "T-Generality",
    "m_generality": "M-Generality",
    "t_locality": "T-Locality",
    "m_locality": "M-Locality",
    "same_question": "same question",
    "same_image": "same image",
    "joint": "joint",
}
SHORT_TITLES = {
    "reliability": "Rel",
    "t_generality": "T-Gen",
    "m_generality": "M-Gen",
    "t_locality": "T-Loc",
    "m_locality": "M-Loc",
    "same_question": "same Q",
    "same_image": "same I",
    "joint": "joint",
}
_NOTHING = "-"


def summarise(records: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Means with 95% bootstrap intervals in percent, as JSON values.

    ``["metrics"][metric][mode]["before" | "after"]`` holds ``mean, low, high, n``. Failed records
    count in ``failed`` alone. ``seconds`` and ``steps`` are means per edit, None where unrecorded, with
    their intervals under ``costs``. ``decisions`` holds what edits decided, as a mean per probe.
    """
    done = [record for record in records if record.get("status", "ok") == "ok"]
    present = {m for record in done for mode in record.get("scores", {}).values() for m in mode}
    known = [metric for metric in METRICS if metric in present]
    metrics = {}
    for metric in [*known, *sorted(present - set(METRICS))]:
        modes = {mode: _before_after(done, mode, metric, seed) for mode in MODES}
        metrics[metric] = {mode: values for mode, values in modes.items() if values}
    return {
        "n": len(done),
        "failed": len(records) - len(done),
        "metrics": metrics,
        "seconds": _mean(done, "seconds"),
        "steps": _mean(done, "steps"),
        "costs": {key: _with_interval(done, key, seed) for key in ("seconds", "steps")},
        "decisions": _decisions(done),
    }


def summary_table(summary: Mapping[str, Any], title: str) -> Table:
    """Rows are metrics; what the model said before and after the edit; costs in the last line."""
    table = Table(title=Text(title), caption=Text(_costs(summary)), box=box.SIMPLE_HEAD)
    table.caption_justify = "left"
    table.add_column("metric", no_wrap=True)
    table.add_column("before\nforced / gen.", justify="right", no_wrap=True)
    table.add_column("after, teacher-forced\n[95% interval]", justify="right", no_wrap=True)
    table.add_column("after, generated\n[95% interval]", justify="right", no_wrap=True)
    for metric, modes in summary["metrics"].items():
        before = " / ".join(_percent(_entry(modes, mode, "before")) for mode in MODES)
        after = (Text(_interval(_entry(modes, mode, "after"))) for mode in MODES)
        table.add_row(Text(TITLES.get(metric, metric)), before, *after)
    return table


def compare_table(
    rows: Sequence[tuple[str, Mapping[str, Any]]], mode: str = "teacher_forced", title: str | None = None
) -> Table:
    """One row per method, the metrics after the edit as columns, read in one ``mode``."""
    heading = title or f"after the edit, {mode.replace('_', '-')}, %"
    table = Table(title=Text(heading), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    present: set[str] = {metric for _, summary in rows for metric in summary["metrics"]}
    columns = [metric for metric in METRICS if metric in present] + sorted(present - set(METRICS))
    table.add_column("method", overflow="fold")
    for metric in columns:
        table.add_column(Text(SHORT_TITLES.get(metric, metric)), justify="right", no_wrap=True)
    for name, summary in rows:
        values = (_entry(summary["metrics"].get(metric, {}), mode, "after") for metric in columns)
        table.add_row(Text(name), *(_percent(value) for value in values))
    return table


class RunningMeans:
    """The five metrics after the edit, teacher-forced, in percent, as a bar shows them."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self.sums: dict[str, tuple[float, int]] = {}
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        for metric, value in record.get("scores", {}).get("teacher_forced", {}).items():
            total, n = self.sums.get(metric, (0.0, 0))
            self.sums[metric] = total + value["after"], n + 1

    def __str__(self) -> str:
        shown = [(m, *self.sums[m]) for m in FIVE_METRICS if m in self.sums]
        return " ".join(f"{SHORT_TITLES[m]} {100 * total / n:.1f}" for m, total, n in shown)


def as_text(table: Table, width: int = 96) -> str:
    """The table as plain text, for files and logs."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines)


def _before_after(
    records: Sequence[Mapping[str, Any]], mode: str, metric: str, seed: int
) -> dict[str, dict[str, float]]:
    scores = [record.get("scores", {}).get(mode, {}).get(metric, {}) for record in records]
    found = {}
    for when in ("before", "after"):
        values = [100.0 * score[when] for score in scores if score.get(when) is not None]
        if values:
            # One seed for all: the same resampling of records behind every metric.
            mean, low, high = bootstrap_interval(values, seed)
            found[when] = {"mean": mean, "low": low, "high": high, "n": len(values)}
    return found


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return float(np.mean(values)) if values else None


def _with_interval(records: Sequence[Mapping[str, Any]], key: str, seed: int) -> dict[str, float] | None:
    values = [float(record[key]) for record in records if record.get(key) is not None]
    return (
        dict(zip(("mean", "low", "high"), bootstrap_interval(values, seed), strict=True)) if values else None
    )


def _decisions(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for what, by_probe in record.get("decisions", {}).items():
            for probe, value in by_probe.items():
                found.setdefault(what, {}).setdefault(probe, []).append(value)
    return {what: {probe: float(np.mean(v)) for probe, v in probes.items()} for what, probes in found.items()}


def _entry(modes: Mapping[str, Any], mode: str, when: str) -> Mapping[str, float] | None:
    return modes.get(mode, {}).get(when)


def _percent(entry: Mapping[str, float] | None) -> str:
    return f"{entry['mean']:.1f}" if entry else _NOTHING


def _interval(entry: Mapping[str, float] | None) -> str:
    return f"{entry['mean']:.1f} [{entry['low']:.1f}, {entry['high']:.1f}]" if entry else _NOTHING


def _costs(summary: Mapping[str, Any]) -> str:
    parts = [f"{summary['n']} records"]
    if summary["failed"]:
        parts.append(f"{summary['failed']} failed")
    if summary["seconds"] is not None:
        parts.append(f"{summary['seconds']:.2f} s per edit")
    if summary["steps"] is not None:
        parts.append(f"{summary['steps']:.1f} steps per edit")
    return ", ".join(parts)
