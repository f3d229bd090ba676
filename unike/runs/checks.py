"""What must hold before a run: one list of checks. A run requires them, ``--check`` prints them.

No check loads a model, and torch is imported by those alone that need it: a missing file is reported at once.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unike.backbones.answer_texts import explain_unreachable, find_stops, read_special_texts
from unike.backbones.checking import check_spec, estimate_memory
from unike.backbones.placement import check_device, check_placement
from unike.config.hparams import HyperParams
from unike.config.sections import PrefixOptions
from unike.datasets.triplets import Triplet
from unike.evaluation.sequences import check_sequence_length, draw_run_sequences
from unike.methods.preparation.folders import (
    find_editor,
    find_scope_classifier,
    find_shipped_knowledge,
    list_changed_options,
)
from unike.methods.registry import check_method
from unike.runs.costs import describe_costs, describe_run_costs
from unike.runs.drawing import DRAWING_SCRIPT, SIZES, check_drawing
from unike.runs.folders import check_edit_store, describe_run
from unike.runs.inputs import (
    find_annotations,
    list_parts,
    read_method_cases,
    read_train_cases,
    read_triplets,
    wants_triplets,
)
from unike.runs.inspecting import (
    check_effects,
    check_folders,
    check_recorded,
    check_shapes,
    describe_broken_images,
    find_broken_images,
    list_images,
    list_long_cases,
)
from unike.runs.memory import describe_edit_memory
from unike.runs.packages import check_packages
from unike.runs.records import check_resumable
from unike.runs.request import RunRequest
from unike.runs.tracking import check_trackers
from unike.system import launching, processes
from unike.system.findings import Finding, collect_problems, find_problems
from unike.system.places import check_name, require_folder
from unike.types import Case, UserError

# How many targets that can't be generated are named one by one.
MOST_TARGETS = 10


@dataclass(frozen=True)
class Check:
    """One question about a request. ``run`` gives what was found, where the check ``applies``.

    ``only_notes`` marks a check that finds no problems: a run leaves it out.
    """

    name: str
    applies: Callable[[RunRequest], bool]
    run: Callable[[RunRequest], list[Finding]]
    only_notes: bool = False


def _apply_always(request: RunRequest) -> bool:
    return True


# ---------------------------------------------------------------- method, device, weights


def _inspect_method(request: RunRequest) -> list[Finding]:
    return find_problems(lambda: check_method(request.hparams), f"method: {request.hparams.method}")


def _inspect_device(request: RunRequest) -> list[Finding]:
    return find_problems(lambda: check_device(request.hparams.device), f"device: {request.hparams.device}")


def _inspect_placement(request: RunRequest) -> list[Finding]:
    what = ", ".join(f"{key}: {value}" for key, value in _list_placement(request).items())
    return find_problems(lambda: check_placement(request.hparams.backbone, request.process_count), what)


def _list_placement(request: RunRequest) -> dict[str, str]:
    """``device_map`` and ``quantization``, where the YAML sets them."""
    named = {"device_map": request.hparams.device_map, "quantization": request.hparams.quantization}
    return {key: value for key, value in named.items() if value is not None and value != "none"}


def _inspect_weights(request: RunRequest) -> list[Finding]:
    spec = request.hparams.backbone
    return [f if f.ok else replace(f, what=f"{spec.source}: {f.what}") for f in check_spec(spec)]


def _inspect_shapes(request: RunRequest) -> list[Finding]:
    problems = collect_problems(lambda: check_shapes(request.hparams))
    return [Finding(False, problem) for problem in problems]


def _inspect_memory(request: RunRequest) -> list[Finding]:
    # A note, since it is an estimate: quantized weights, or weights on accelerators, may fit all the same.
    weights = replace(estimate_memory(request.hparams.backbone), ok=True)
    return [weights, *describe_edit_memory(request.hparams)]


def _inspect_options(request: RunRequest) -> list[Finding]:
    problems = collect_problems(lambda: check_effects(request.hparams, request.given))
    return [Finding(False, problem) for problem in problems]


def _inspect_folders(request: RunRequest) -> list[Finding]:
    problems = collect_problems(lambda: check_folders(request.hparams, request.needs))
    return [Finding(False, problem) for problem in problems]


def _inspect_prefix_dir(request: RunRequest) -> list[Finding]:
    what = f"prefix_dir: {request.hparams.prefix_dir}"
    return find_problems(lambda: check_prefix_dir(request.hparams), what)


def check_prefix_dir(hparams: PrefixOptions) -> None:
    """UserError where ``prefix_dir`` cannot be a folder."""
    if hparams.prefix_dir is None:
        return
    check_name(hparams.prefix_dir)
    path = Path(hparams.prefix_dir)
    there = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not there.is_dir():
        raise UserError(f"{hparams.source}: prefix_dir: {there} is a file; expected a folder")
    require_folder(path, f"{hparams.source}: prefix_dir: ")


def _inspect_faiss(request: RunRequest) -> list[Finding]:
    # Imported late, as torch comes with it.
    from unike.knowledge.index import check_faiss

    return find_problems(
        lambda: check_faiss("faiss", request.hparams.source), "retrieval: faiss is installed"
    )


def _inspect_trackers(request: RunRequest) -> list[Finding]:
    what = f"log_to: {', '.join(request.hparams.log_to)}"
    return find_problems(lambda: check_trackers(request.hparams), what)


# ---------------------------------------------------------------- arguments


def _inspect_processes(request: RunRequest) -> list[Finding]:
    def check() -> None:
        launching.check_number(request.num_processes)
        if request.process_count > 1:
            processes.check_devices(request.hparams.device, request.process_count)

    return find_problems(check, f"num_processes: {request.process_count}")


def _inspect_output(request: RunRequest) -> list[Finding]:
    """The run's folder, and where it is resumed, whether it was made in the same way."""
    try:
        directory = request.choose_directory()
        made = describe_run(request.hparams, request.task, request.generated)
        check_resumable(directory, request.resume, made)
        if request.resume and request.are_cases_there:
            check_recorded(directory, request.hparams, request.cases)
    except UserError as error:
        return [Finding(False, problem) for problem in error.problems]
    return [Finding(True, f"output: {directory}")]


def _inspect_edit_store(request: RunRequest) -> list[Finding]:
    store = str(request.save_edits)

    def check() -> None:
        # Without them, the check of the eval data says what is wrong.
        if os.path.realpath(store) == os.path.realpath(request.choose_directory()):
            raise UserError(f"save_edits: {store}: is the run's own folder; name another one")
        cases = request.cases if request.are_cases_there else ()
        check_edit_store(request.hparams, store, cases, request.resume)

    return find_problems(check, f"save_edits: {store}")


# ---------------------------------------------------------------- data


def _inspect_drawing(request: RunRequest) -> list[Finding]:
    problems = collect_problems(lambda: check_drawing(request.hparams, request.undrawn_splits))
    return [Finding(False, problem) for problem in problems]


def _inspect_eval_data(request: RunRequest) -> list[Finding]:
    parts = list_parts(request.task)
    if request.is_eval_undrawn:
        return [finding for part in parts for finding in _inspect_undrawn(request, part)]
    if problems := collect_problems(lambda: request.cases):
        return [Finding(False, problem) for problem in problems]
    counts = Counter(case.task for case in request.cases)
    paths = {part: find_annotations(request.hparams, part, "eval") for part in parts}
    return [
        Finding(True, f"data.{part}.eval: {path}: {counts[part]} records, all their images are there")
        for part, path in paths.items()
    ]


def _inspect_images(request: RunRequest) -> list[Finding]:
    """Whether the images can be decoded: one that can't ends the run, after hours."""
    broken = find_broken_images(list_images(request.cases)) if request.are_cases_there else []
    lines = describe_broken_images(broken)
    if request.skip_broken:
        return [Finding(True, line, "its record fails") for line in lines]
    return [Finding(False, line, "--skip_broken counts such records as failed") for line in lines]


def _is_first() -> bool:
    """Whether this process is the first of a run to look at its data; the others need not decode it again."""
    return processes.is_main() and not launching.is_launched()


def _inspect_texts(request: RunRequest) -> list[Finding]:
    """A note for each text that the model does not take: its record fails, the others are edited."""
    lines = list_long_cases(request.hparams, request.cases) if request.are_cases_there else []
    return [Finding(True, line, "this record will fail", True) for line in lines]


def _inspect_targets(request: RunRequest) -> list[Finding]:
    """Targets that could never be generated, as far as the model's files show; the loaded model shows all."""
    if request.is_eval_undrawn or collect_problems(lambda: request.cases):
        # The check of the eval data has them.
        return []
    hparams = request.hparams
    stops, specials = find_stops(hparams.model_name), read_special_texts(hparams.name)
    found = [
        f"{hparams.source}: data: record {case.request.id}: {problem}"
        for case in request.cases
        if (problem := explain_unreachable(str(case.request.query.target), stops, specials))
    ]
    if request.skip_broken:
        return [Finding(True, line, "recorded as failed") for line in found]
    shown = [Finding(False, f"{line}; --skip_broken records it as failed") for line in found[:MOST_TARGETS]]
    left = len(found) - len(shown)
    more = f"{hparams.source}: data: {left} more records have targets that can't be generated"
    return [*shown, *([Finding(False, more)] if left else [])]


def _inspect_undrawn(request: RunRequest, part: str) -> list[Finding]:
    path = (request.hparams.data.get(part) or {}).get("eval")
    what = f"data.{part}.eval: {path}"
    if request.is_undrawn(part, "eval"):
        return [Finding(True, f"{what}: not there yet", "drawn on first use")]
    return find_problems(lambda: find_annotations(request.hparams, part, "eval"), what)


def _inspect_sequences(request: RunRequest) -> list[Finding]:
    hparams = request.hparams
    what = f"protocol: {hparams.protocol}: {hparams.sequences} sequences of {hparams.sequence_length} edits"
    if request.is_eval_undrawn:
        parts = list_parts(request.task)
        count = min(request.size or sys.maxsize, SIZES["eval"] * len(parts))

        def check() -> None:
            check_sequence_length(hparams, count)
            if hparams.protocol == "cross_task" and len(parts) == 1:
                raise UserError(
                    f"{hparams.source}: task: {request.task}; protocol cross_task needs both, expected cross"
                )

        return find_problems(check, what)
    if collect_problems(lambda: request.cases):
        # The check of the eval data has them.
        return []
    return find_problems(lambda: draw_run_sequences(hparams, request.cases), what)


# ---------------------------------------------------------------- what is prepared


def _inspect_knowledge(request: RunRequest) -> list[Finding]:
    """Memory and encoders: shipped, saved by a former run, or to be built from the train data."""
    hparams = request.hparams
    if problems := collect_problems(lambda: wants_triplets(hparams, request.needs)):
        return [Finding(False, problem) for problem in problems]
    if (shipped := find_shipped_knowledge(hparams)) is not None:
        return _inspect_shipped(request, shipped)
    folder = Path(str(hparams.knowledge_dir))
    if request.is_train_undrawn:
        return [Finding(True, f"knowledge_dir: {folder}: nothing there yet", "built from drawn data")]
    kept = len(list(folder.glob("*/knowledge.json")))
    what = f"knowledge_dir: {folder}: {kept} saved; the one of these weights and options is used"
    remedy = f"else it is built first, from up to {hparams.triplets} triplets (scripts/prepare.py)"
    return _require_triplets(request) or [Finding(True, what, remedy)]


def _inspect_shipped(request: RunRequest, folder: Path) -> list[Finding]:
    """Whether knowledge was made with the YAML's options; whether with its weights, only loading shows."""
    try:
        changed = list_changed_options(folder, request.hparams)
    except UserError as error:
        return [Finding(False, f"{request.hparams.source}: knowledge_dir: {line}") for line in error.problems]
    if not changed:
        return [Finding(True, f"knowledge_dir: {folder}: memory and encoders are there")]
    what = f"knowledge_dir: {folder}: made with other values of {', '.join(changed)}"
    problems = [] if request.is_train_undrawn else _require_triplets(request)
    return problems or [Finding(True, what, "built anew from the train data", True)]


def _require_triplets(request: RunRequest) -> list[Finding]:
    triplets: list[Triplet] = []
    problems = collect_problems(lambda: triplets.extend(read_triplets(request.hparams, request.skip_broken)))
    return [Finding(False, problem) for problem in problems] or _inspect_train_images(
        {os.fspath(t.query.image): "" for t in triplets if isinstance(t.query.image, (str, os.PathLike))}
    )


def _inspect_train_images(images: Mapping[str, str]) -> list[Finding]:
    """Whether the images of what is trained first can be decoded: one that can't ends the training."""
    if not _is_first():
        return []
    lines = describe_broken_images(find_broken_images(images))
    return [Finding(False, line, "repair it, or take its train record out") for line in lines]


def _inspect_scope(request: RunRequest) -> list[Finding]:
    return _inspect_trained(request, "scope_dir", "scope classifier", find_scope_classifier)


def _inspect_editor(request: RunRequest) -> list[Finding]:
    return _inspect_trained(request, "editor_dir", "editor", find_editor)


def _inspect_trained(
    request: RunRequest, key: str, what: str, find: Callable[[HyperParams], Path | None]
) -> list[Finding]:
    """What is trained on the train records: saved, or to be trained first; whether it fits the weights, only
    loading shows."""
    try:
        kept = find(request.hparams)
    except UserError as error:
        return [Finding(False, problem) for problem in error.problems]
    if kept is not None:
        return [Finding(True, f"{key}: {kept}: the {what} is there")]
    folder = getattr(request.hparams, key)
    lost, remedy = f"{key}: {folder}: no {what} of these options", _describe_training(request, key)
    note = Finding(True, lost, remedy, is_announced=True)
    if request.is_train_undrawn:
        return [note]
    cases: list[Case] = []
    problems = collect_problems(lambda: cases.extend(read_train_cases(request.hparams, request.skip_broken)))
    found = [Finding(False, problem) for problem in problems]
    return found or _inspect_train_images(list_images(cases)) or [note]


def _describe_training(request: RunRequest, key: str) -> str:
    hparams = request.hparams
    steps = hparams.editor_steps if key == "editor_dir" else hparams.scope_steps
    return f"trained first, up to {steps} steps, and kept (scripts/prepare.py)"


def _inspect_train_cases(request: RunRequest) -> list[Finding]:
    """Train records that the method reads while it edits."""
    if request.is_train_undrawn:
        return [Finding(True, "data: train records: not there yet", "drawn on first use")]
    what = "data: the train records that the method reads are there"
    return find_problems(lambda: read_method_cases(request.hparams, request.skip_broken), what)


def _inspect_run(request: RunRequest) -> list[Finding]:
    """How long the run will take, or an edit of it where the number of records is not known yet."""
    count = len(request.cases) if request.are_cases_there else request.size
    return describe_run_costs(request.hparams, count)


# ---------------------------------------------------------------- the list


MODEL_CHECKS = (
    Check("method", _apply_always, _inspect_method),
    Check("device", _apply_always, _inspect_device),
    Check("placement", lambda r: bool(_list_placement(r)), _inspect_placement),
    Check("weights", _apply_always, _inspect_weights),
    Check("shapes", _apply_always, _inspect_shapes),
    Check("memory", _apply_always, _inspect_memory, only_notes=True),
    Check("prefix_dir", lambda r: r.hparams.prefix_dir is not None, _inspect_prefix_dir),
    Check("folders", _apply_always, _inspect_folders),
    Check("faiss", lambda r: r.hparams.retrieval == "faiss", _inspect_faiss),
    Check("trackers", lambda r: bool(r.hparams.log_to), _inspect_trackers),
)
DATA_CHECKS = (
    Check("drawing", lambda r: r.is_drawn, _inspect_drawing),
    Check("eval data", _apply_always, _inspect_eval_data),
    # Of several processes the first looks: it alone has this to say.
    Check("images", lambda r: _is_first(), _inspect_images),
    Check("texts", lambda r: processes.is_main(), _inspect_texts),
    Check("targets", _apply_always, _inspect_targets),
    Check("sequences", lambda r: r.hparams.protocol != "one_step", _inspect_sequences),
    Check("knowledge", lambda r: r.needs.knowledge, _inspect_knowledge),
    Check("scope", lambda r: r.needs.scope, _inspect_scope),
    Check("costs", _apply_always, lambda r: describe_costs(r.hparams, r.needs), only_notes=True),
    Check("run", _apply_always, _inspect_run, only_notes=True),
    Check("editor", lambda r: r.needs.training, _inspect_editor),
    Check("train cases", lambda r: r.needs.cases, _inspect_train_cases),
)
CHECKS = (
    *MODEL_CHECKS,
    Check("options", lambda r: bool(r.given), _inspect_options),
    Check("processes", lambda r: r.num_processes is not None or r.process_count > 1, _inspect_processes),
    Check("output", _apply_always, _inspect_output),
    Check("edit store", lambda r: r.save_edits is not None, _inspect_edit_store),
    *DATA_CHECKS,
    Check("packages", _apply_always, lambda r: check_packages(r.hparams.backend)),
)


def find_all(request: RunRequest, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """What the checks find, in their order, each line once: two data sets may lack the same folder."""
    found = [finding for check in checks if check.applies(request) for finding in check.run(request)]
    return list(dict.fromkeys(found))


def require(request: RunRequest, checks: Sequence[Check] = CHECKS) -> list[str]:
    """UserError with every problem that the checks find; else the lines that are said before a run."""
    wanted = [check for check in checks if not check.only_notes]
    found = find_all(request, wanted)
    if problems := [finding.line for finding in found if not finding.ok]:
        raise UserError(*problems)
    return [finding.line for finding in found if finding.is_announced]


def require_aloud(request: RunRequest) -> None:
    """Requires all checks in every process of a run; one of them says what is announced."""
    notes = processes.run_in_turn(lambda: require(request))
    if processes.is_main() and not launching.is_launched():
        print(*(f"note: {note}" for note in notes), sep="\n", end="\n" * bool(notes), file=sys.stderr)


def require_backbone(hparams: HyperParams) -> None:
    """UserError with all that is wrong with method, device and weight files."""
    require(RunRequest(hparams), MODEL_CHECKS)


def read_checked_cases(
    hparams: HyperParams, task: str, size: int | None = None, skip_broken: bool = False
) -> Sequence[Case]:
    """The eval cases of a run whose inputs are all there; one UserError with every problem otherwise."""
    request = RunRequest(hparams, task, size, skip_broken)
    require(request, (*MODEL_CHECKS, *DATA_CHECKS))
    return request.cases


def draw_data(request: RunRequest) -> None:
    """Draws what is missing of the bundled benchmark, where the YAML generates it, and requires the data
    then. The YAML's backbone answers its questions: ``require`` the model first."""
    if request.is_drawn:
        draw = launching.import_from_checkout(DRAWING_SCRIPT).ensure
        processes.run_once(lambda: draw(request.hparams))
        processes.run_in_turn(lambda: require(request, DATA_CHECKS))
