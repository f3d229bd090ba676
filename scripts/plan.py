"""The runs of a table or a figure, read from a plan (``hparams/tables.yaml``).

    runs = read_plan(Path("hparams/tables.yaml"), ["1"], ["tiny_blip2"], size=20)
    outcome = scripts.workers.ensure(runs)     # runs what is missing
    summaries = {run.row: summarise_run(run) for run in runs if is_complete(run)}

Rows that mean the same run, in whichever table they stand, have the same ``folder``. Where the plan names
seeds of its benchmark, a row is a run for each of them: ``pool_runs`` sums them up.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scripts.plan_file import PLAN as PLAN
from scripts.plan_file import PlanFile, RowPlan, list_tables, read_plan_file
from scripts.plan_file import TablePlan as TablePlan
from scripts.plan_file import read_tables as read_tables
from unike.config.hparams import OPTIONS, HyperParams
from unike.evaluation.record import Record
from unike.evaluation.summary import Summary, summarise
from unike.runs.drawing import get_drawn_file, get_probe_file
from unike.runs.records import SUMMARY, read_records
from unike.system.findings import collect_problems
from unike.types import UserError

OUTPUT = Path("results/tables")
BACKBONES = ("tiny_blip2", "tiny_minigpt4")


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
    seed: int | None = None

    @property
    def name(self) -> str:
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.backbone}, {self.task}, {name_protocol(self.hparams)}, {self.row.name}{seed}"

    @property
    def is_drawn(self) -> bool:
        """Whether the plan draws the run's data: all of its files are where the benchmark puts them."""
        hp = self.hparams
        if self.seed is None or not hp.generate_data or hp.image_root is None:
            return False
        root = hp.image_root
        return all(
            file is not None and Path(file) == _get_own_place(root, task, split)
            for task, files in hp.data.items()
            for split, file in files.items()
        )


def _get_own_place(root: str, task: str, key: str) -> Path:
    """Where the benchmark puts what a YAML names under ``data.<task>.<key>``."""
    return get_probe_file(root, task, "eval") if key == "probes" else get_drawn_file(root, task, key)


def name_protocol(hparams: HyperParams) -> str:
    """The protocol's name, with the length of its sequences."""
    if hparams.protocol == "one_step":
        return hparams.protocol
    return f"{hparams.protocol}-{hparams.sequence_length}"


def read_plan(
    path: Path = PLAN,
    tables: Sequence[str] = ("all",),
    backbones: Sequence[str] = BACKBONES,
    size: int | None = None,
    output: Path = OUTPUT,
    overrides: Sequence[str] = (),
    sequences: int | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Run]:
    """Every run of the named tables and figures, in the order of the plan.

    ``size`` limits the records and ``sequences`` the sequences of each run, ``seeds`` the benchmark's
    seeds; ``overrides`` are ``key=value`` for all rows. One UserError has every problem: of the plan, unknown
    tables, missing YAMLs, misspelt keys.
    """
    whole = read_plan_file(path)
    plans = whole.plans
    names = list(dict.fromkeys(n for t in tables for n in (list_tables(path) if t == "all" else [t])))
    known = f"expected {', '.join(plans)} or all"
    problems = [f"--table: {n}: not in {path}; {known}" for n in names if n not in plans]
    if size is not None and size < 1:
        problems.append(f"--size: {size}; expected 1 or more")
    problems += _check_seeds(seeds, whole, path)
    bases: dict[Path, HyperParams | UserError] = {}
    checked = partial(_read_base, bases, overrides)
    wanted = [
        (n, plan, b, t, k, r)
        for n in names
        if n in plans
        for plan in ([plans[other] for other in plans[n].averages] or [plans[n]])
        for b in backbones
        for t in plan.tasks
        for k in plan.lengths
        for r in plan.rows
    ]
    out: list[Run] = []
    folders: dict[str, Path] = {}
    for name, plan, backbone, task, length, row in wanted:
        read: list[HyperParams] = []
        file = path.parent / row.yaml.format(backbone=backbone)
        problems += collect_problems(lambda: read.append(checked(file)))  # noqa: B023
        drawn = [seed for base in read for seed in whole.list_seeds(plan, base)]
        for seed in [seed for seed in drawn if seed is None or not seeds or seed in seeds]:
            changes = whole.list_changes(plan, row, length, seed, backbone, read[0].model_name)
            if sequences is not None and length > 1:
                changes["sequences"] = min(sequences, changes.get("sequences", sequences))
            changed: list[HyperParams] = []
            change = partial(_apply_changes, changes, f"{path}: {row.name}", overrides)
            problems += collect_problems(lambda: changed.append(change(read[0])))  # noqa: B023
            if changed:
                folder = _locate_folder(output, backbone, task, changed[0], size, row.name, folders)
                out.append(Run(name, row, backbone, task, length, changed[0], size, folder, seed))
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return out


def _check_seeds(seeds: Sequence[int] | None, whole: PlanFile, path: Path) -> list[str]:
    known = whole.benchmark.seeds if whole.benchmark else ()
    expected = f"expected of {', '.join(map(str, known))}" if known else "it has none"
    return [f"--seeds: {seed}: not in {path}; {expected}" for seed in seeds or () if seed not in known]


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


@dataclass(frozen=True)
class PooledRuns:
    """The runs of a row, one a seed: their records, of which seed each is, and the summary of all."""

    records: Sequence[Record]
    strata: Sequence[int] | None
    summary: Summary
    by_seed: Mapping[int, Summary]
    complete: bool


def pool_runs(planned: Sequence[Run]) -> PooledRuns:
    """The runs of one row, summed up together. Of several seeds, the seeds are resampled first."""
    first, complete = planned[0], all(map(is_complete, planned))
    if len(planned) == 1:
        summary = summarise_run(first)
        by_seed = {} if first.seed is None else {first.seed: summary}
        return PooledRuns(load_records(first), None, summary, by_seed, complete)
    pairs = [(record, run.seed or 0) for run in planned for record in load_records(run)]
    records, strata = [record for record, _ in pairs], [seed for _, seed in pairs]
    summary = summarise(records, first.hparams.seed, first.hparams.metric_presets, strata)
    summary["interrupted"] = not complete
    by_seed = {run.seed or 0: summarise_run(run) for run in planned}
    return PooledRuns(records, strata, summary, by_seed, complete)


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
