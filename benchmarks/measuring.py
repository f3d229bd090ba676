"""Shared by the benchmarks: timings, rows for the report, the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from unike.system.places import require_own

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """One measured figure: the ``median`` of ``runs``, and its ``target`` (``">= 4"``) if it has one."""

    benchmark: str
    case: str
    metric: str
    median: float
    runs: int
    unit: str
    target: str | None
    command: str

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        sign, value = self.target.split()
        return self.median >= float(value) if sign == ">=" else self.median <= float(value)

    def __str__(self) -> str:
        verdict = "" if self.is_met is None else f"  ({self.target}: {'met' if self.is_met else 'NOT met'})"
        return f"{self.case:34} {self.metric:42} {self.median:10.4g} {self.unit}{verdict}"


class Measurements:
    """The rows of one run of one benchmark."""

    def __init__(self, benchmark: str) -> None:
        self.benchmark, self.command, self.rows = benchmark, format_command(), list[Measurement]()

    def add(
        self, case: str, metric: str, values: Sequence[float], unit: str, target: str | None = None
    ) -> None:
        print(self.keep(case, metric, values, unit, target), flush=True)

    def keep(
        self, case: str, metric: str, values: Sequence[float], unit: str, target: str | None = None
    ) -> Measurement:
        """Like ``add``, without printing it."""
        median = statistics.median(values)
        row = Measurement(self.benchmark, case, metric, median, len(values), unit, target, self.command)
        self.rows.append(row)
        return row

    def write(self, path: Path | None) -> None:
        """Writes JSON with the machine; nothing if ``path`` is None."""
        if path is not None:
            require_own(path, _is_measurements)
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {"machine": describe_machine(), "rows": [asdict(row) for row in self.rows]}
            path.write_text(json.dumps(content, indent=1) + "\n")


def _is_measurements(path: Path) -> bool:
    content = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(content, dict) and content.keys() >= {"machine", "rows"}


def time_call(run: Callable[[], T]) -> tuple[T, float]:
    """The value of ``run()``, and its seconds."""
    started = time.perf_counter()
    value = run()
    return value, time.perf_counter() - started


def read_resident(field: str) -> int:
    """Bytes of a field of ``/proc/self/status``: ``VmHWM``, the peak of resident pages, those of mapped
    files among them; ``RssAnon``, ``RssFile``: what is resident now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def format_command() -> str:
    """The command of this run as a user types it, without the path of its output."""
    main: Any = sys.modules["__main__"]
    module = getattr(getattr(main, "__spec__", None), "name", None)
    words = list(sys.argv[1:])
    for option in ("--json", "--weights"):
        if option in words:
            words[words.index(option) + 1] = "FILE" if option == "--json" else "DIR"
    return " ".join(["python", "-m", str(module), *words])


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory and versions."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _read_cpu_name(), "cores": usable, "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip


def _read_cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
