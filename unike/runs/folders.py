"""Where a run is recorded, and where its edits are kept."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from unike.config.combined import RunFolderOptions
from unike.config.hparams import HyperParams
from unike.config.sections import ProtocolOptions
from unike.types import UserError

if TYPE_CHECKING:
    from unike.edits.store import EditStore


def choose_directory(
    hparams: RunFolderOptions, task: str, output: str | None = None, resume: bool = False
) -> Path:
    """Where a run is recorded: ``output``, or ``<results_dir>/<yaml>-<task>``, followed by the protocol
    if it is not one-step, with ``-2``, ``-3`` ... where that is taken; ``resume`` takes the latest.

    UserError where ``output`` holds a run and ``resume`` is off, or where the folder can't be written.
    """
    if output is not None:
        if _is_taken(output) and not resume:
            raise UserError(f"{output}: is not empty; continue with --resume, or name another --output")
        return _require_writable(Path(output))
    protocol = "" if hparams.protocol == "one_step" else f"-{hparams.protocol}"
    stem = Path(hparams.results_dir) / f"{Path(hparams.source).stem}-{task}{protocol}"
    former = stem
    for number in count(1):
        directory = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        if not _is_taken(directory):
            return _require_writable(former if resume else directory)
        former = directory
    raise AssertionError("unreachable: there is always a free number")


def _require_writable(directory: Path) -> Path:
    there = next((p for p in (directory, *directory.parents) if os.path.exists(p)), directory)
    if not (os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)):
        raise UserError(f"{directory}: cannot be made a run folder: {there} cannot be written")
    return directory


def _is_taken(directory: str | os.PathLike[str]) -> bool:
    # ``os.path`` answers for names, too, that no file system accepts.
    if not os.path.isdir(directory):
        return os.path.isfile(directory)
    try:
        return any(os.scandir(directory))
    except OSError as error:
        raise UserError(f"{directory}: cannot be read: {error.strerror}") from error


def describe_run(hparams: HyperParams, task: str, generated: bool) -> dict[str, object]:
    """What a run's records depend on beside weights and data: another run can't be resumed with it."""
    return hparams.decisive() | {"task": task, "generated": generated}


def open_edit_store(hparams: ProtocolOptions, folder: str | None) -> EditStore | None:
    """Where ``--save_edits`` keeps a run's edits, if anywhere; UserError for a folder of something else,
    and for several sequences, which may edit a record anew."""
    if folder is None:
        return None
    if hparams.protocol != "one_step" and hparams.sequences > 1:
        at = f"{hparams.source}: sequences: {hparams.sequences}"
        raise UserError(f"{at}; --save_edits keeps one sequence, expected sequences: 1")
    from unike.edits.store import EditStore

    return EditStore(folder)
