"""Runs of sequences: every sequence that is not recorded yet is edited and recorded, then summed up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from unike.backbones.base import Backbone
from unike.config.hparams import HyperParams
from unike.edits import Edit, EditStore
from unike.evaluation.protocols import sequence_id, sequential
from unike.evaluation.reader import Reader
from unike.evaluation.sequences import sequences_of
from unike.evaluation.summary import RunningMeans
from unike.methods.base import EditMethod
from unike.runs.records import RecordWriter, read_records
from unike.runs.sharing import SharedRun
from unike.runs.tracking import track
from unike.system import processes
from unike.types import Case, UserError


def run_sequences(
    hparams: HyperParams,
    backbone: Backbone,
    method: EditMethod,
    cases: Sequence[Case],
    writer: RecordWriter,
    reader: Reader,
    skip_broken: bool = False,
    progress: bool = True,
    store: EditStore | None = None,
) -> dict[str, Any]:
    """Edits the sequences drawn from ``cases`` and gives the summary of all records in the folder,
    ``interrupted`` where Ctrl-C ended the run early.

    Finished sequences are not run again. An unfinished one is edited from its start, since edits are
    not kept, and only what is not recorded yet is written. With a ``store`` every edit is in it before its
    step is recorded. Several processes share whole sequences.
    """
    drawn = sequences_of(hparams, cases)
    done, shared = writer.done_ids(), SharedRun(writer)
    means = RunningMeans(r for r in (read_records(writer.directory) if done else []) if r["kind"] == "final")
    length = hparams.sequence_length
    whole = [i for i in range(len(drawn)) if sequence_id(i, length, "final") in done]
    left = processes.share([i for i in range(len(drawn)) if i not in whole])
    already = len(whole) * length
    tolerated: tuple[type[Exception], ...] = (UserError,) if skip_broken else ()
    total, hidden = already + len(left) * length, not (progress and processes.is_main())
    with (
        track(hparams, writer) as tracker,
        tqdm(total=total, initial=already, desc="edits", disable=hidden) as bar,
        shared.kept(),
    ):
        for number in left:
            made: list[Edit] = []
            for record in shared.until_stopped(
                sequential(
                    backbone, method, drawn[number], reader, number, hparams.curve_cases, hparams.seed,
                    tolerated, made.append,
                )
            ):  # fmt: skip
                final, known = record["kind"] == "final", record["id"] in done
                if store is not None and not known:
                    for edit in made:
                        store.add(edit, replace=True)
                made.clear()
                if not known:
                    writer.write(record)
                if final and not known:
                    means.add(record)
                    tracker.add(record, means)
                    bar.set_postfix_str(str(means), refresh=False)
                bar.update(not final)
    order = [
        sequence_id(number, position, kind)
        for number in range(len(drawn))
        for kind in ("step", "final")
        for position in range(1, length + 1)
    ]
    return shared.sum_up(hparams.seed, hparams.metric_presets, order)
