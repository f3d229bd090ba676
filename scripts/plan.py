"""The runs of a table or a figure, read from a plan (``hparams/tables.yaml``).

    runs = read_plan(Path("hparams/tables.yaml"), ["1"], ["tiny_blip2"], size=20)
    outcome = scripts.workers.ensure(runs)     # runs what is missing
    summaries = {run.row: summarise_run(run) for run in runs if is_complete(run)}

Rows that mean the same run, in whichever table they stand, have the same ``folder``.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from unike.config.hparams import OPTIONS, HyperParams
from unike.config.yaml_reader import read_yaml
from unike.evaluation.record import Record
from unike.evaluation.summary import Summary, summarise
from unike.report.paper import published
from unike.report.paper.tables import EXTRAS
from unike.runs.inputs import TASKS
from unike.runs.records import SUMMARY, read_records
from unike.system.findings import collect_problems
from unike.types import PROTOCOLS, UserError

PLAN = Path("hparams/tables.yaml")
OUTPUT = Path("results/tables")
BACKBONES = ("tiny_blip2", "tiny_minigpt4")
_PARTS = ("tables", "figures")
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
    compared with the best of the others. ``line`` and ``x`` place it in a figure.
    """

    name: str
    yaml: str
    set: Mapping[str, Any] = field(default_factory=dict)
    paper: str | None = None
    ours: bool = False
    line: str | None = None
    x: float | None = None


@dataclass(frozen=True)
class TablePlan:
    """A table: its rows on each of the tasks, at each of the lengths; length 1 is one-step editing.

    ``paper`` names the published figures, ``reference`` the row whose order they state, ``extras`` further
    columns and statements, see ``unike.report.paper.tables.Block``.
    """

    title: str
    protocol: str
    rows: tuple[RowPlan, ...]
    tasks: tuple[str, ...] = ("vqa",)
    lengths: tuple[int, ...] = (1,)
    paper: str | None = None
    reference: str = "UniKE"
    extras: tuple[str, ...] = ()
    set: Mapping[str, Any] = field(default_factory=dict)
    set_by_length: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def list_changes(self, row: RowPlan, length: int) -> dict[str, Any]:
        """The changes of the row's YAML: the row's own come before the length's, those before the table's."""
        own = dict(self.set) | dict(self.set_by_length.get(length, {})) | dict(row.set)
        if length == 1:
            return {k: v for k, v in own.items() if k not in ("sequences", "curve_cases")}
        return own | {"protocol": self.protocol, "sequence_length": length}


@dataclass(frozen=True)
class Run:
    """A row in one block of a table. ``folder`` has its records; equal rows share a folder."""

    table: str
    row: RowPlan
    backbone: str
    task: str
    length: int
    hparams: HyperParams
    size: int | None
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.backbone}, {self.task}, {name_protocol(self.hparams)}, {self.row.name}"


def name_protocol(hparams: HyperParams) -> str:
    """The protocol's name, with the length of its sequences."""
    if hparams.protocol == "one_step":
        return hparams.protocol
    return f"{hparams.protocol}-{hparams.sequence_length}"


def read_tables(path: Path = PLAN) -> dict[str, TablePlan]:
    """All plans of a file by name, figures after tables; one UserError with every problem of the file."""
    values, _, problems = read_yaml(str(path))
    problems += [f"{path}: {key}: unknown; expected tables, figures" for key in values.keys() - _PARTS]
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
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return found


def list_tables(path: Path = PLAN) -> list[str]:
    """The names that ``--table all`` means: the tables, without the figures' sweeps."""
    values, _, _ = read_yaml(str(path))
    return [str(name) for name in values.get("tables") or {}]


def read_plan(
    path: Path = PLAN,
    tables: Sequence[str] = ("all",),
    backbones: Sequence[str] = BACKBONES,
    size: int | None = None,
    output: Path = OUTPUT,
    overrides: Sequence[str] = (),
    sequences: int | None = None,
) -> list[Run]:
    """Every run of the named tables and figures, in the order of the plan.

    ``size`` limits the records and ``sequences`` the sequences of each run; ``overrides`` are ``key=value``
    for all rows. One UserError has every problem: of the plan, unknown tables, missing YAMLs, misspelt keys.
    """
    plans = read_tables(path)
    names = list(dict.fromkeys(n for t in tables for n in (list_tables(path) if t == "all" else [t])))
    known = f"expected {', '.join(plans)} or all"
    problems = [f"--table: {n}: not in {path}; {known}" for n in names if n not in plans]
    if size is not None and size < 1:
        problems.append(f"--size: {size}; expected 1 or more")
    bases: dict[Path, HyperParams | UserError] = {}
    checked = partial(_read_base, bases, overrides)
    wanted = [
        (n, b, t, k, r)
        for n in names
        if n in plans
        for b in backbones
        for t in plans[n].tasks
        for k in plans[n].lengths
        for r in plans[n].rows
    ]
    out: list[Run] = []
    folders: dict[str, Path] = {}
    for name, backbone, task, length, row in wanted:
        file = path.parent / row.yaml.format(backbone=backbone)
        changes = plans[name].list_changes(row, length)
        if sequences is not None and length > 1:
            changes["sequences"] = min(sequences, changes.get("sequences", sequences))
        changed: list[HyperParams] = []
        change = partial(_apply_changes, changes, f"{path}: {row.name}", overrides)
        problems += collect_problems(lambda: changed.append(change(checked(file))))  # noqa: B023
        if changed:
            folder = _locate_folder(output, backbone, task, changed[0], size, row.name, folders)
            out.append(Run(name, row, backbone, task, length, changed[0], size, folder))
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return out


def is_complete(run: Run) -> bool:
    """Whether the run has all its records."""
    return _read_summary(run).get("interrupted") is False


def _read_summary(run: Run) -> Summary:
    try:
        found: Summary = json.loads((run.folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def load_records(run: Run) -> list[Record]:
    """The run's records so far, possibly none."""
    return read_records(run.folder) if run.folder.is_dir() else []


def summarise_run(run: Run) -> Summary:
    """The summary of the run's records, as from ``summarise``; ``interrupted`` if some are missing."""
    stored, hp = _read_summary(run), run.hparams
    # To sum up takes a second; a summary of an earlier version may lack parts.
    if stored.get("interrupted") is False and "means" in stored:
        return stored
    found = summarise(load_records(run), hp.seed, hp.metric_presets)
    found["interrupted"] = not is_complete(run)
    return found


def _read_base(
    known: dict[Path, HyperParams | UserError], overrides: Sequence[str], file: Path
) -> HyperParams:
    """The YAML, read once; its problems and those of the overrides are reported once, under its name."""
    if file not in known:
        try:
            HyperParams.from_hparams(file, overrides)
            known[file] = HyperParams.from_hparams(file)
        except UserError as error:
            known[file] = error
    found = known[file]
    if isinstance(found, UserError):
        raise found
    return found


def _apply_changes(
    changes: Mapping[str, Any], source: str, overrides: Sequence[str], base: HyperParams
) -> HyperParams:
    changed = HyperParams.from_dict({**base.to_dict(), **changes}, source=source, overrides=overrides)
    # Missing files are a problem of the YAML that names them: reported once, not for every row.
    return HyperParams.from_dict(changed.to_dict(), source=base.source)


def _locate_folder(
    output: Path,
    backbone: str,
    task: str,
    hparams: HyperParams,
    size: int | None,
    name: str,
    known: dict[str, Path],
) -> Path:
    """The run's folder, named by a hash of what the run depends on; the row's name is for readers only.

    Options at their defaults are left out, so that a new option does not rename the folders of earlier runs.
    """
    set_by_user = {key: v for key, v in hparams.decisive().items() if v != OPTIONS[key].default}
    what = json.dumps({"hparams": set_by_user, "task": task, "size": size}, sort_keys=True)
    key = hashlib.sha256(what.encode()).hexdigest()[:10]
    if key not in known:
        group = output / f"{backbone}-{task}-{name_protocol(hparams)}"
        slug = re.sub(r"\W+", "-", name).strip("-").lower()
        known[key] = next(iter(sorted(group.glob(f"*-{key}"))), group / f"{slug}-{key}")
    return known[key]


def _parse_table(entry: Any, at: str) -> TablePlan:
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
        **{**values, "rows": tuple(rows)}
        | {key: tuple(values[key]) for key in ("tasks", "lengths", "extras") if key in values}
    )
    wrong = [("protocol", plan.protocol, PROTOCOLS)]
    wrong += [("tasks", task, TASKS) for task in plan.tasks]
    wrong += [("extras", extra, EXTRAS) for extra in plan.extras]
    wrong += [("paper", plan.paper, published.list_tables())] if plan.paper is not None else []
    problems += [f"{at}: {k}: {v}; expected {', '.join(among)}" for k, v, among in wrong if v not in among]
    problems += [
        f"{at}: lengths: {n}; expected whole numbers from 1 on"
        for n in plan.lengths
        if not isinstance(n, int) or n < 1
    ]
    if not rows and not problems:
        problems.append(f"{at}: rows: expected a list of rows with `name` and `yaml`")
    if problems:
        raise UserError(*problems)
    return plan


def _parse_row(entry: Any, at: str) -> RowPlan:
    values = _check_keys(entry, RowPlan, at)
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
    needed = names[: 3 if kind is TablePlan else 2]
    problems += [f"{at}: {key}: missing" for key in needed if not entry.get(key)]
    for key, value in entry.items():
        declared = next((str(f.type) for f in fields(kind) if f.name == key), "")
        wanted = next((w for start, w in _KINDS.items() if declared.startswith(start)), None)
        if wanted and not isinstance(value, wanted[0]) and not (value is None and "None" in declared):
            problems.append(f"{at}: {key}: expected {wanted[1]}, got {value!r}")
    if problems:
        raise UserError(*problems)
    return dict(entry)
