"""Runs of sequences: every sequence that is not recorded yet is edited and recorded, then summed up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from unike.backbones.base import Backbone
from unike.hparams import HyperParams
from unike.methods.base import EditMethod
from unike.protocols import DRAWS, sequence_id, sequential
from unike.reading import Reader
from unike.records import RecordWriter, read_records
from unike.tables import RunningMeans, summarise
from unike.types import Case, UserError


def sequences_of(hparams: HyperParams, cases: Sequence[Case]) -> list[list[Case]]:
    """The sequences that the YAML's ``protocol`` draws; UserError where the data do not suffice."""
    try:
        draw = DRAWS[hparams.protocol]
        return draw(cases, hparams.sequence_length, hparams.sequences, hparams.seed)
    except UserError as error:
        raise UserError(*(f"{hparams.source}: {problem}" for problem in error.problems)) from None


def run_sequences(
    hparams: HyperParams,
    backbone: Backbone,
    method: EditMethod,
    cases: Sequence[Case],
    writer: RecordWriter,
    reader: Reader,
    skip_broken: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Edits the sequences drawn from ``cases`` and gives the summary of all records in the folder,
    ``interrupted`` where Ctrl-C ended the run early.

    Finished sequences are not run again. An unfinished one is edited from its start, since edits are
    not kept, and only what is not recorded yet is written.
    """
    drawn = sequences_of(hparams, cases)
    done, interrupted = writer.done_ids(), False
    means = RunningMeans(r for r in (read_records(writer.directory) if done else []) if r["kind"] == "final")
    length = hparams.sequence_length
    left = [i for i in range(len(drawn)) if sequence_id(i, length, "final") not in done]
    already = (len(drawn) - len(left)) * length
    tolerated: tuple[type[Exception], ...] = (UserError,) if skip_broken else ()
    with tqdm(total=len(drawn) * length, initial=already, desc="edits", disable=not progress) as bar:
        try:
            for number in left:
                for record in sequential(
                    backbone, method, drawn[number], reader, number, hparams.curve_cases, hparams.seed,
                    tolerated,
                ):  # fmt: skip
                    final, known = record["kind"] == "final", record["id"] in done
                    if not known:
                        writer.write(record)
                    if final and not known:
                        means.add(record)
                        bar.set_postfix_str(str(means), refresh=False)
                    bar.update(not final)
        except KeyboardInterrupt:
            interrupted = True
    summary = summarise(read_records(writer.directory), hparams.seed, hparams.metric_presets)
    summary |= {"interrupted": interrupted}
    writer.write_summary(summary)
    return summary
