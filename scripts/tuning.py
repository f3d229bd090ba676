"""The trials of a method's tuning: drawn from a grid (``hparams/tuning.yaml``), run on the validation split,
kept in a log.

    plan = read_tuning(Path("hparams/tuning.yaml"))
    trials = make_trials(plan, "mend", "tiny_blip2", {}, Path("results/tuning"))
    outcome = scripts.workers.ensure([trial.run for trial in trials])
    entry = describe_trial(trials[0], plan)
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from scripts.plan import RowPlan, Run, is_complete, summarise_run
from unike.config.hparams import OPTIONS, HyperParams
from unike.config.yaml_reader import read_yaml
from unike.datasets.mmedit import load_records
from unike.evaluation.summary import HARMONIC_OF, MODES, Summary
from unike.methods.preparation.folders import find_editor
from unike.methods.registry import resolve_needs
from unike.runs.drawing import get_drawn_file
from unike.system.files import compute_sha256, write_text
from unike.system.findings import collect_problems
from unike.system.paths import check_path
from unike.system.places import lock
from unike.types import UserError

GRID = Path("hparams/tuning.yaml")
LOGS = Path("docs/tuning")
OUTPUT = Path("results/tuning")
TASKS = ("vqa", "caption")
# The harmonic means that a winner is chosen by: the first that its records have.
_SCORES = ("all_minimal", "all", "five")
# Options that say where things are, and what is set for every trial: no part of a trial's name.
_PLACES = (
    *("name", "data", "image_root", "rephrase_root", "generate_data", "allow_outside", "metric_presets"),
    *("knowledge_dir", "scope_dir", "editor_dir", "device", "ike_model"),
)
Entry = dict[str, Any]


@dataclass(frozen=True)
class MethodGrid:
    """A method: its YAML, ``{backbone}`` in its path filled in, with changes, and values of its options."""

    yaml: str
    options: Mapping[str, Sequence[Any]]
    set: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TuningPlan:
    """How every method is tuned: ``trials`` settings of each, drawn by ``seed`` without repetition, scored on
    the first ``records`` of the validation split by a harmonic mean in the evaluation ``mode``."""

    source: str
    trials: int
    seed: int
    records: int
    mode: str
    set: Mapping[str, Any]
    methods: Mapping[str, MethodGrid]

    def draw(self, method: str) -> list[dict[str, Any]]:
        """The method's settings. UserError where its grid has fewer than ``trials``."""
        options = self.methods[method].options
        count = math.prod(len(values) for values in options.values())
        if count < self.trials:
            at = f"{self.source}: {method}: options"
            raise UserError(f"{at}: {count} settings; expected {self.trials} or more, as many as trials")
        numbers = random.Random(f"{self.seed}-{method}").sample(range(count), self.trials)
        return [_pick_setting(options, number) for number in numbers]


def _pick_setting(options: Mapping[str, Sequence[Any]], number: int) -> dict[str, Any]:
    setting = {}
    for name, values in options.items():
        number, place = divmod(number, len(values))
        setting[name] = values[place]
    return setting


@dataclass(frozen=True)
class Trial:
    """One setting of a method on a backbone; ``data`` are the checksums of what it reads."""

    method: str
    backbone: str
    number: int
    options: Mapping[str, Any]
    run: Run
    data: Mapping[str, str]

    @cached_property
    def key(self) -> str:
        """What the trial's result depends on, as 16 hexadecimal digits."""
        return _name_trial(self.run.hparams, self.run.size, self.backbone, self.data)


def _name_trial(hparams: HyperParams, size: int | None, backbone: str, data: Mapping[str, str]) -> str:
    # Options at their defaults are left out, so that a new one does not run everything again.
    own = {
        name: value
        for name, value in hparams.decisive().items()
        if name not in _PLACES and value != OPTIONS[name].default
    }
    what = json.dumps({"hparams": own, "records": size, "backbone": backbone, "data": data}, sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- the grid


def read_tuning(path: Path = GRID) -> TuningPlan:
    """The plan in a file; one UserError with every problem of it."""
    values, _, problems = read_yaml(str(path))
    known = [f.name for f in fields(TuningPlan) if f.name != "source"]
    problems += _list_unknown(values, known, f"{path}")
    for name in ("trials", "seed", "records"):
        least, value = (0 if name == "seed" else 1), values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            problems.append(f"{path}: {name}: expected a whole number from {least} on, got {value!r}")
    if values.get("mode") not in MODES:
        problems.append(f"{path}: mode: expected {' or '.join(MODES)}, got {values.get('mode')!r}")
    grids = values.get("methods")
    if not isinstance(grids, dict) or not grids:
        problems.append(f"{path}: methods: expected grids by name")
        grids = {}
    methods: dict[str, MethodGrid] = {}
    for name, entry in grids.items():
        try:
            methods[str(name)] = _read_grid(entry, f"{path}: {name}")
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    rest: dict[str, Any] = {name: values[name] for name in ("trials", "seed", "records", "mode")}
    return TuningPlan(str(path), set=_read_set(values.get("set"), f"{path}"), methods=methods, **rest)


def _read_grid(entry: Any, at: str) -> MethodGrid:
    if not isinstance(entry, dict):
        raise UserError(f"{at}: expected lines of `key: value`")
    problems = _list_unknown(entry, [f.name for f in fields(MethodGrid)], at)
    if not isinstance(entry.get("yaml"), str):
        problems.append(f"{at}: yaml: missing; expected a file, such as mend/{{backbone}}.yaml")
    options = entry.get("options")
    if not isinstance(options, dict) or not options:
        problems.append(f"{at}: options: missing; expected lists of values by option")
        options = {}
    problems += _list_unknown(options, list(OPTIONS), at)
    for name, values in options.items():
        if not isinstance(values, list) or not values:
            problems.append(f"{at}: {name}: expected a list of values, got {values!r}")
        elif len({json.dumps(value) for value in values}) < len(values):
            problems.append(f"{at}: {name}: has a value twice: {values!r}")
    problems += collect_problems(lambda: _read_set(entry.get("set"), at))
    if problems:
        raise UserError(*problems)
    return MethodGrid(entry["yaml"], options, _read_set(entry.get("set"), at))


def _read_set(value: Any, at: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{at}: set: expected lines of `key: value`, got {value!r}")
    return dict(value or {})


def _list_unknown(values: Mapping[Any, Any], known: Sequence[str], at: str) -> list[str]:
    return [
        f"{at}: {key}: unknown; the nearest known name is "
        f"{difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]}"
        for key in values
        if key not in known
    ]


# ---------------------------------------------------------------- the validation split


def find_validation(hparams: HyperParams, given: Mapping[str, str]) -> dict[str, str]:
    """The validation annotations by task: the ``given`` ones, else the bundled benchmark's, which is drawn
    into ``image_root``. UserError, a line for each, where there is none, or where it is the eval or train
    split or shares records with it: these must not choose a setting."""
    root = hparams.image_root
    found = dict(given)
    if not found and root is not None:
        files = {task: get_drawn_file(root, task, "val") for task in TASKS if task in hparams.data}
        found = {task: str(path) for task, path in files.items() if path.is_file()}
    if not found:
        raise UserError(
            f"{hparams.source}: no validation split: expected --val TASK=FILE, or TASK_val.json in image_root"
        )
    problems = [
        f"--val: {task}: unknown task; expected {' or '.join(TASKS)}" for task in found if task not in TASKS
    ]
    for task, path in found.items():
        problems += collect_problems(lambda t=task, p=path: _require_apart(hparams, t, p))
    if problems:
        raise UserError(*problems)
    return {task: found[task] for task in TASKS if task in found}


def _require_apart(hparams: HyperParams, task: str, path: str) -> None:
    own = _identify_records(path)
    for split in ("eval", "train"):
        other = (hparams.data.get(task) or {}).get(split)
        if other is None or not Path(other).is_file():
            continue
        at = f"--val: {task}: {path}"
        if Path(other).resolve() == Path(path).resolve() or compute_sha256(other) == compute_sha256(path):
            raise UserError(f"{at}: is the {split} split, data.{task}.{split}; expected records of its own")
        if shared := len(own & _identify_records(other)):
            expected = "expected records of its own"
            raise UserError(
                f"{at}: {shared} of its {len(own)} records are in data.{task}.{split}; {expected}"
            )


def _identify_records(path: str) -> set[tuple[str, ...]]:
    names = ("src", "alt", "image", "rephrase", "m_loc")
    return {
        tuple(str(record.get(name)) for name in names)
        for record in load_records(path)
        if isinstance(record, dict)
    }


# ---------------------------------------------------------------- trials


def read_base(
    plan: TuningPlan, method: str, backbone: str, overrides: Sequence[str], folder: Path
) -> HyperParams:
    """The method's YAML on a backbone, with what the plan sets for every trial."""
    grid = plan.methods[method]
    base = HyperParams.from_hparams(folder / grid.yaml.format(backbone=backbone), overrides)
    changes = {**plan.set, **grid.set}
    changed = HyperParams.from_dict(
        {**base.to_dict(), **changes}, source=f"{plan.source}: {method}", overrides=overrides
    )
    return HyperParams.from_dict(changed.to_dict(), source=base.source)


def make_trials(
    plan: TuningPlan, method: str, base: HyperParams, backbone: str, val: Mapping[str, str], output: Path
) -> list[Trial]:
    """The method's trials on a backbone: trained on the train split, evaluated on ``val`` in the place of
    the eval split, which no trial names. What they learn is kept under ``output``, by the data's checksums.
    """
    files: dict[str, dict[str, str | None]] = {}
    for task, path in val.items():
        files[task] = {"train": (base.data.get(task) or {}).get("train"), "eval": path}
        if (probes := Path(path).with_suffix(".probes.json")).is_file():
            files[task]["probes"] = str(probes)
    data = {
        f"{task}.{'val' if split == 'eval' else split}": compute_sha256(name)
        for task, own in files.items()
        for split, name in own.items()
        if name is not None and Path(name).is_file()
    }
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:10]
    trained = output / backbone / f"trained-{digest}"
    needs, task = resolve_needs(base), "cross" if len(files) == len(TASKS) else next(iter(files))
    places: dict[str, object] = {"data": files, "generate_data": False, "protocol": "one_step"}
    if base.prefix_dir is None:
        # Every trial reads the same lower-layer activations.
        places["prefix_dir"] = str(output / backbone / "prefixes")
    if needs.training:
        places["editor_dir"] = str(trained / "editors")
    if needs.knowledge:
        places["knowledge_dir"] = str(trained / "knowledge")
    if needs.scope:
        places["scope_dir"] = str(trained / "scope")
    out = []
    for number, options in enumerate(plan.draw(method), 1):
        changed = HyperParams.from_dict(
            {**base.to_dict(), **options}, source=f"{plan.source}: {method}: trial {number}"
        )
        hparams = HyperParams.from_dict({**changed.to_dict(), **places}, source=base.source)
        key = _name_trial(hparams, plan.records, backbone, data)
        row = RowPlan(f"{method}, trial {number}", plan.methods[method].yaml)
        folder = output / backbone / method / key
        run = Run("tuning", row, backbone, task, 1, hparams, plan.records, folder)
        out.append(Trial(method, backbone, number, options, run, data))
    return out


def describe_trial(trial: Trial, plan: TuningPlan, failure: str | None = None) -> Entry:
    """The trial's line of the log: its setting, what its training took, and all that validation found."""
    hparams = trial.run.hparams
    entry: Entry = {
        "key": trial.key,
        "backbone": trial.backbone,
        "method": trial.method,
        "trial": trial.number,
        "options": dict(trial.options),
        "seed": hparams.seed,
        "plan_seed": plan.seed,
        "records": plan.records,
        "data": dict(trial.data),
        "train_seconds": None,
        "steps": None,
        "visits": None,
        "best_step": None,
        "stopped": None,
    }
    if (training := _read_training(hparams)) is not None:
        entry |= {"train_seconds": round(training["seconds"], 1)}
        entry |= {name: training[name] for name in ("steps", "visits", "best_step", "stopped")}
    if failure is not None:
        entry |= {"failure": failure, "score": None}
    else:
        entry |= _describe_validation(summarise_run(trial.run), plan.mode)
    return entry | {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def _read_training(hparams: HyperParams) -> Entry | None:
    if not resolve_needs(hparams).training or (folder := find_editor(hparams)) is None:
        return None
    report: Entry = json.loads((folder / "editor.json").read_text(encoding="utf-8"))["training"]
    return report | {"steps": report["step"]}


def _describe_validation(summary: Summary, mode: str) -> Entry:
    means = {
        name: {
            m: found[name]["after"]["mean"] for m, found in summary["harmonic_mean"].items() if name in found
        }
        for name in HARMONIC_OF
    }
    chosen = next((name for name in _SCORES if mode in means[name]), None)
    after = {
        m: {metric: found[m]["after"]["mean"] for metric, found in summary["metrics"].items() if m in found}
        for m in MODES
    }
    rounded: Entry = json.loads(json.dumps({"validation": after, "hm": means}), parse_float=_round)
    return {
        "n": summary["n"],
        "failed": summary["failed"],
        "edit_seconds": summary["seconds"],
        "edit_steps": summary["steps"],
        **rounded,
        "hm5": rounded["hm"]["five"],
        "hm8": rounded["hm"]["all"],
        "hm8_minimal": rounded["hm"]["all_minimal"],
        "score_of": chosen,
        "score": None if chosen is None else rounded["hm"][chosen][mode],
    }


def _round(text: str) -> float:
    return round(float(text), 3)


# ---------------------------------------------------------------- the log


def get_log(folder: Path, backbone: str, method: str) -> Path:
    """Where a method's trials on a backbone are kept, one JSON object a line."""
    return folder / f"{backbone}-{method}.jsonl"


def read_log(path: Path) -> list[Entry]:
    """The log's trials, none where there is no log. UserError for a line that is none."""
    if not path.exists():
        return []
    check_path(path, "--log", "a log of trials")
    entries: list[Entry] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError as fault:
            raise UserError(f"{path}: line {number}: is no JSON: {fault}") from None
        if not isinstance(entry, dict) or not {"key", "options", "score"} <= entry.keys():
            expected = "expected a trial as scripts.tune writes it, with key, options and score"
            raise UserError(f"{path}: line {number}: {expected}")
        entries.append(entry)
    return entries


def add_to_log(path: Path, entries: Sequence[Entry], locks: Path) -> None:
    """Adds the trials that the log has not. Its file is replaced in one go: a kill leaves it whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    locks.mkdir(parents=True, exist_ok=True)
    with lock(locks / f".{path.name}.lock"):
        former = read_log(path)
        known = {entry["key"] for entry in former}
        new = [entry for entry in entries if entry["key"] not in known]
        if new:
            write_text(path, "".join(json.dumps(entry) + "\n" for entry in [*former, *new]))


def log_finished(trials: Sequence[Trial], plan: TuningPlan, path: Path, locks: Path) -> None:
    """Adds those of the trials that have all their records and stand not yet in the log."""
    known = {entry["key"] for entry in read_log(path)}
    done = [t for t in trials if t.key not in known and is_complete(t.run)]
    add_to_log(path, [describe_trial(trial, plan) for trial in done], locks)
