"""A run: its folder, and the one loop that edits, keeps, records and follows all of its cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from unike.config.hparams import HyperParams
from unike.datasets.consistency import ask_consistency
from unike.datasets.declarations import describe_declared
from unike.edits import EditStore
from unike.evaluation.protocols import Outcome
from unike.evaluation.reader import Reader
from unike.evaluation.summary import RunningMeans, Summary
from unike.methods import resolve_needs
from unike.methods.base import require_reachable
from unike.methods.preparation.folders import find_editor, find_scope_classifier, wants_cases
from unike.runs.batches import Batches, count_edits_at_once
from unike.runs.folders import describe_run
from unike.runs.inputs import find_annotations, find_train_annotations, list_parts, wants_triplets
from unike.runs.parts import Parts
from unike.runs.records import RecordWriter, read_records
from unike.runs.sequences import Sequences
from unike.runs.sharing import SharedRun
from unike.runs.tracking import track
from unike.system import processes
from unike.system.files import compute_sha256
from unike.system.progress import BatchBar
from unike.types import Case, UserError

# ---------------------------------------------------------------- the run and its folder


def compute_checksums(hparams: HyperParams, task: str) -> dict[str, str]:
    """SHA-256 of every data file that a run reads, by YAML key."""
    files = {f"data.{n}.eval": find_annotations(hparams, n, "eval") for n in list_parts(task)}
    needs = resolve_needs(hparams)
    if wants_triplets(hparams, needs) or needs.cases or wants_cases(hparams, needs):
        files |= {f"data.{n}.train": path for n, path in find_train_annotations(hparams).items()}
    elif needs.knowledge:
        files["knowledge_dir"] = str(Path(str(hparams.knowledge_dir)) / "knowledge.safetensors")
    elif needs.training:
        files["editor_dir"] = str(Path(str(find_editor(hparams))) / "editor.safetensors")
    if needs.scope and (kept := find_scope_classifier(hparams)) is not None:
        files["scope_dir"] = str(kept / "scope.safetensors")
    return {key: compute_sha256(path) for key, path in files.items()}


def open_run(parts: Parts, task: str, directory: Path, resume: bool, generated: bool = True) -> RecordWriter:
    """The run's folder with its manifest; UserError where the run to resume was made differently."""
    return processes.run_in_turn(
        lambda: RecordWriter(
            directory,
            resume,
            describe_run(parts.hparams, task, generated),
            seed=parts.hparams.seed,
            weights={"backbone": parts.backbone.fingerprint},
            data=compute_checksums(parts.hparams, task),
            rank=processes.get_rank() if processes.has_joined() else None,
            about={"machine": describe_machine(parts)},
        )
    )


def describe_machine(parts: Parts) -> dict[str, object]:
    """What a run is made on, for its manifest: types of numbers, device, number of processes."""
    hp = parts.hparams
    return {
        "weights": hp.dtype if hp.quantization == "none" else f"{hp.quantization}, else {hp.dtype}",
        # Patches and their optimiser's state, whatever the weights' type.
        "patches": "float32",
        "device": parts.backbone.device.type,
        "processes": processes.count(),
        "edits_at_once": count_edits_at_once(hp, parts.backbone),
        # For whoever reads the run: its data may have declared metrics.
        "metrics": describe_declared(),
    }


class _Work(Protocol):
    """This process's share of a run, by protocol: see ``Batches`` and ``Sequences``."""

    order: list[str]
    total: int
    already: int
    pending: int
    sizes: list[int]

    def run(self, shared: SharedRun) -> Iterator[Outcome]: ...


def run_cases(
    parts: Parts,
    cases: Sequence[Case],
    writer: RecordWriter,
    generated: bool = True,
    skip_broken: bool = False,
    progress: bool = True,
    reader: Reader | None = None,
    store: EditStore | None = None,
) -> Summary:
    """Edits each case that is not recorded yet, from the base model or in sequences, as the YAML's
    ``protocol`` says, and gives the summary of all records in the folder, ``interrupted`` where Ctrl-C ended
    it early. Where several processes run, each edits its share and all get the summary.

    With a ``store`` every edit is in it before its record is written. A ``reader`` of the same cases and
    first layer may be handed on from run to run: it keeps the base model's predictions.

    An image that cannot be read ends the run after the summary of what there is, or counts as a failed case
    under ``skip_broken``. So does, always, an edit whose loss stops being a number, or for which memory does
    not suffice even alone. UserError, before any edit, for targets that could never be generated, unless
    ``skip_broken`` counts these as failed.
    """
    reader, hp = reader or parts.make_reader(generated), parts.hparams
    if hp.consistency_probes:
        cases = ask_consistency(cases, hp.source)
    if store is not None and store.backbone not in (None, parts.backbone.fingerprint):
        raise UserError(f"{store.folder}: holds edits of another model; name another --save_edits")
    done, shared = writer.list_done(), SharedRun(writer)
    if not skip_broken:
        require_reachable(parts.backbone, (case.request for case in cases if case.request.id not in done))
    kind = Batches if hp.protocol == "one_step" else Sequences
    work: _Work = kind(parts, cases, reader, done, skip_broken)
    recorded = read_records(writer.directory) if done else []
    means = RunningMeans(record for record in recorded if not record.is_step)
    hidden = not (progress and processes.is_main())
    with (
        track(hp, writer) as tracker,
        BatchBar(work.sizes, total=work.total, initial=work.already, desc="edits", disable=hidden) as bar,
        shared.catch_end(),
    ):
        moved = 0
        for outcome in work.run(shared):
            record, edit = outcome.record, outcome.edit
            if record.id not in done:
                if store is not None and edit is not None:
                    store.add(edit, replace=store.holds_same(edit))
                writer.write(record.to_json())
                if not record.is_step:
                    means.add(record)
                    tracker.add(record, means)
                    bar.set_postfix_str(str(means), refresh=False)
            moved += record.place is None or record.is_step
            if moved and not work.pending:
                bar.advance(moved)
                moved = 0
    return shared.sum_up(hp.seed, hp.metric_presets, work.order)
