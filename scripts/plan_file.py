"""A plan's file: tables and figures, the seeds of the benchmark, and tuned options.

whole = read_plan_file(Path("hparams/tables.yaml"))
whole.plans["1"].rows
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from unike.config.hparams import HyperParams
from unike.config.yaml_reader import read_yaml
from unike.report.paper import published
from unike.report.paper.tables import EXTRAS
from unike.runs.inputs import TASKS
from unike.system.findings import collect_problems
from unike.types import PROTOCOLS, UserError

PLAN = Path("hparams/tables.yaml")
_PARTS = ("tables", "figures")
_MORE = ("benchmark", "tuned")
_LISTS = ("tasks", "lengths", "extras", "seeds", "averages")
_KINDS: dict[str, tuple[Any, str]] = {
    "tuple": (list, "a list"),
    "Mapping": (dict, "lines of `key: value`"),
    "str": (str, "text"),
    "bool": (bool, "true or false"),
    "float": ((int, float), "a number"),
}


@dataclass(frozen=True)
class RowPlan:
    """A row of a table: a YAML, ``{backbone}`` in its path filled in, with changes.

    ``paper`` is its name in the paper's figures (None: it has none). ``ours`` marks the rows whose best is
    compared with the best of the others, ``gate_of`` names the row around which this one has our gate.
    ``tuned`` names entries of the plan's tuned options, of which later ones come first. ``line`` and ``x``
    place it in a figure.
    """

    name: str
    yaml: str
    set: Mapping[str, Any] = field(default_factory=dict)
    paper: str | None = None
    ours: bool = False
    gate_of: str | None = None
    tuned: tuple[str, ...] = ()
    line: str | None = None
    x: float | None = None


@dataclass(frozen=True)
class TablePlan:
    """A table: its rows on each of the tasks, at each of the lengths; length 1 is one-step editing.

    ``paper`` names the published figures, ``reference`` the row whose order they state, ``subject`` the row
    of ours that each other row is compared with, ``extras`` further columns and statements, see
    ``unike.report.paper.tables.Block``. ``seeds`` are those of the benchmark's that it is run with, all
    where it names none. ``averages`` names tables whose means it shows, in place of rows of its own.
    """

    title: str
    protocol: str
    rows: tuple[RowPlan, ...]
    tasks: tuple[str, ...] = ("vqa",)
    lengths: tuple[int, ...] = (1,)
    paper: str | None = None
    reference: str = "UniKE"
    subject: str = "UniKE + scope gate"
    extras: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    averages: tuple[str, ...] = ()
    set: Mapping[str, Any] = field(default_factory=dict)
    set_by_length: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def list_changes(
        self,
        row: RowPlan,
        length: int,
        benchmark: Mapping[str, Any] | None = None,
        tuned: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The changes of the row's YAML. The row's own come before those that were tuned, these before the
        length's, the table's, and the benchmark's."""
        own = dict(benchmark or {}) | dict(self.set) | dict(self.set_by_length.get(length, {}))
        own |= dict(tuned or {}) | dict(row.set)
        if length == 1:
            return {k: v for k, v in own.items() if k not in ("sequences", "gap", "curve_cases")}
        return own | {"protocol": self.protocol, "sequence_length": length}


@dataclass(frozen=True)
class BenchmarkPlan:
    """The bundled benchmark that a plan draws, once for each of the ``seeds``.

    ``set`` are changes of every YAML with ``generate_data``; ``{seed}``, ``{backbone}`` and ``{family}``
    (``model_name``) are filled in.
    """

    seeds: tuple[int, ...]
    set: Mapping[str, Any]

    def list_changes(self, seed: int, backbone: str, family: str) -> dict[str, Any]:
        """The changes for one seed and backbone."""
        names = {"seed": seed, "backbone": backbone, "family": family}
        return {key: _fill(value, names) for key, value in self.set.items()}


@dataclass(frozen=True)
class PlanFile:
    """What a plan's file holds: tables and figures by name, the benchmark, and tuned options by name, then by
    backbone."""

    plans: Mapping[str, TablePlan]
    benchmark: BenchmarkPlan | None = None
    tuned: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def list_seeds(self, plan: TablePlan, base: HyperParams) -> tuple[int | None, ...]:
        """The seeds that a table is run with; None where the YAML's own data are read."""
        if self.benchmark is None or not base.generate_data:
            return (None,)
        return plan.seeds or self.benchmark.seeds

    def list_changes(
        self, plan: TablePlan, row: RowPlan, length: int, seed: int | None, backbone: str, family: str
    ) -> dict[str, Any]:
        """All changes of a row's YAML."""
        drawn = {}
        if self.benchmark is not None and seed is not None:
            drawn = self.benchmark.list_changes(seed, backbone, family)
        tuned: dict[str, Any] = {}
        for name in row.tuned:
            tuned |= self.tuned.get(name, {}).get(backbone, {})
        return plan.list_changes(row, length, drawn, tuned)


def _fill(value: Any, names: Mapping[str, Any]) -> Any:
    """The value with ``{name}`` filled in; a text that is one name alone is that name's value."""
    if isinstance(value, Mapping):
        return {key: _fill(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [_fill(part, names) for part in value]
    if not isinstance(value, str):
        return value
    whole = next((found for name, found in names.items() if value == f"{{{name}}}"), None)
    return value.format(**names) if whole is None else whole


def read_tables(path: Path = PLAN) -> dict[str, TablePlan]:
    """All plans of a file by name, figures after tables; one UserError with every problem of the file."""
    return dict(read_plan_file(path).plans)


def read_plan_file(path: Path = PLAN) -> PlanFile:
    """The file's content; one UserError with every problem of it."""
    values, _, problems = read_yaml(str(path))
    known = ", ".join((*_PARTS, *_MORE))
    problems += [f"{path}: {key}: unknown; expected {known}" for key in values.keys() - {*_PARTS, *_MORE}]
    found: dict[str, TablePlan] = {}
    for part in _PARTS:
        entries = values.get(part) or {}
        if not isinstance(entries, dict):
            problems.append(f"{path}: {part}: expected plans by name")
            continue
        for name, entry in entries.items():
            try:
                found[str(name)] = _parse_table(entry, f"{path}: {name}")
            except UserError as error:
                problems += error.problems
    benchmark: list[BenchmarkPlan] = []
    if (drawn := values.get("benchmark")) is not None:
        problems += collect_problems(lambda: benchmark.append(_parse_benchmark(drawn, f"{path}: benchmark")))
    tuned: Any = values.get("tuned") or {}
    problems += _check_tuned(tuned, found, path)
    problems += [
        f"{path}: {name}: seeds: {seed}; the benchmark's are {', '.join(map(str, b.seeds))}"
        for b in benchmark
        for name, plan in found.items()
        for seed in plan.seeds
        if seed not in b.seeds
    ]
    problems += [
        f"{path}: {name}: averages: {other}; expected a table with rows of its own"
        for name, plan in found.items()
        for other in plan.averages
        if other not in found or not found[other].rows
    ]
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return PlanFile(found, benchmark[0] if benchmark else None, tuned)


def list_tables(path: Path = PLAN) -> list[str]:
    """The names that ``--table all`` means: the tables, without the figures' sweeps."""
    values, _, _ = read_yaml(str(path))
    found = values.get("tables")
    return [str(name) for name in found] if isinstance(found, dict) else []


def _parse_table(entry: Any, at: str) -> TablePlan:
    if isinstance(entry, dict) and entry.get("averages"):
        entry = {"protocol": PROTOCOLS[0], **entry}
    values = _check_keys(entry, TablePlan, at)
    problems: list[str] = []
    rows: list[RowPlan] = []
    for number, row in enumerate(values.get("rows") or [], 1):
        try:
            rows.append(_parse_row(row, f"{at}: row {number}"))
        except UserError as error:
            problems += error.problems
    repeated = {r.name for r in rows if [o.name for o in rows].count(r.name) > 1}
    problems += [f"{at}: {name}: two rows of that name" for name in sorted(repeated)]
    plan = TablePlan(
        **{**values, "rows": tuple(rows)} | {key: tuple(values[key]) for key in _LISTS if key in values}
    )
    wrong: list[tuple[str, str, tuple[str, ...]]] = [("protocol", plan.protocol, PROTOCOLS)]
    wrong += [("tasks", task, TASKS) for task in plan.tasks]
    wrong += [("extras", extra, EXTRAS) for extra in plan.extras]
    wrong += [("paper", plan.paper, published.list_tables())] if plan.paper is not None else []
    problems += [f"{at}: {k}: {v}; expected {', '.join(among)}" for k, v, among in wrong if v not in among]
    problems += [
        f"{at}: lengths: {n}; expected whole numbers from 1 on"
        for n in plan.lengths
        if not isinstance(n, int) or n < 1
    ]
    if not rows and not plan.averages and not problems:
        problems.append(f"{at}: rows: expected a list of rows with `name` and `yaml`")
    if problems:
        raise UserError(*problems)
    return plan


def _parse_benchmark(entry: Any, at: str) -> BenchmarkPlan:
    values = _check_keys(entry, BenchmarkPlan, at)
    seeds = tuple(values["seeds"])
    problems = [f"{at}: seeds: {s}; expected whole numbers" for s in seeds if type(s) is not int or s < 0]
    problems += [f"{at}: seeds: {s}: named twice" for s in dict.fromkeys(seeds) if seeds.count(s) > 1]
    plan = BenchmarkPlan(seeds, values["set"])
    try:
        plan.list_changes(0, "backbone", "family")
    except (KeyError, IndexError, ValueError) as error:
        problems.append(f"{at}: set: {error}: unknown; expected {{seed}}, {{backbone}} or {{family}}")
    if problems:
        raise UserError(*problems)
    return plan


def _check_tuned(tuned: Any, plans: Mapping[str, TablePlan], path: Path) -> list[str]:
    """Problems of the tuned options, and rows that name none of them."""
    if not isinstance(tuned, dict) or not all(
        isinstance(by_backbone, dict) and all(isinstance(options, dict) for options in by_backbone.values())
        for by_backbone in tuned.values()
    ):
        return [f"{path}: tuned: expected options by name, then by backbone"]
    known = f"expected {', '.join(map(str, tuned))}" if tuned else "`tuned` of the plan has none"
    return [
        f"{path}: {name}: {row.name}: tuned: {wanted}; {known}"
        for name, plan in plans.items()
        for row in plan.rows
        for wanted in row.tuned
        if wanted not in tuned
    ]


def _parse_row(entry: Any, at: str) -> RowPlan:
    if isinstance(entry, dict) and isinstance(entry.get("tuned"), str):
        entry = {**entry, "tuned": [entry["tuned"]]}
    values = _check_keys(entry, RowPlan, at)
    values["tuned"] = tuple(values.get("tuned") or ())
    values["set"] = dict(values.get("set") or {})
    values.setdefault("paper", values["name"])
    return RowPlan(**values)


def _check_keys(entry: Any, kind: type, at: str) -> dict[str, Any]:
    """The entry's values; UserError for an unknown key and for a missing one."""
    if not isinstance(entry, dict):
        raise UserError(f"{at}: expected lines of `key: value`")
    names = [f.name for f in fields(kind)]
    problems = []
    for key in entry.keys() - set(names):
        nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)[0]
        problems.append(f"{at}: {key}: unknown key; the nearest known key is {nearest}")
    needed = names[: 2 if kind is not TablePlan or entry.get("averages") else 3]
    problems += [f"{at}: {key}: missing" for key in needed if not entry.get(key)]
    for key, value in entry.items():
        declared = next((str(f.type) for f in fields(kind) if f.name == key), "")
        wanted = next((w for start, w in _KINDS.items() if declared.startswith(start)), None)
        if wanted and not isinstance(value, wanted[0]) and not (value is None and "None" in declared):
            problems.append(f"{at}: {key}: expected {wanted[1]}, got {value!r}")
    if problems:
        raise UserError(*problems)
    return dict(entry)
