"""Where a run is recorded, and where its edits are kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from unike.config.combined import RunFolderOptions
from unike.config.hparams import HyperParams
from unike.config.sections import ProtocolOptions
from unike.system.files import to_json_types
from unike.system.places import check_name, require_folder
from unike.system.text import one_line
from unike.types import Case, ImageLike, UserError

if TYPE_CHECKING:
    from unike.edits.store import EditStore


def choose_directory(
    hparams: RunFolderOptions, task: str, output: str | None = None, resume: bool = False
) -> Path:
    """Where a run is recorded: ``output``, or ``<results_dir>/<yaml>-<task>``, with the method before the
    task if it is not ``unike`` and the protocol at the end if it is not one-step. ``-2``, ``-3`` ... follow
    where that is taken; ``resume`` takes the latest.

    UserError where ``output`` holds a run and ``resume`` is off, where ``resume`` is on and it is not
    there, or where the folder can't be written.
    """
    if output is not None:
        if not output.strip():
            raise UserError("output: is empty; expected a folder")
        check_name(output)
        if resume and not os.path.lexists(output):
            raise UserError(f"{output}: no such folder; expected a run to resume, or leave out --resume")
        if _is_taken(output) and not resume:
            raise UserError(f"{output}: is not empty; continue with --resume, or name another --output")
        return _require_writable(Path(output))
    protocol = "" if hparams.protocol == "one_step" else f"-{hparams.protocol}"
    # YAMLs of many methods have one name, that of their backbone.
    method = "" if hparams.method == "unike" else f"-{hparams.method}"
    stem = Path(hparams.results_dir) / f"{Path(hparams.source).stem}{method}-{task}{protocol}"
    former = stem
    for number in count(1):
        directory = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        if not _is_taken(directory):
            if resume and number == 1:
                raise UserError(f"{directory}: no run to resume; name its --output, or leave out --resume")
            return _require_writable(former if resume else directory)
        former = directory
    raise AssertionError("unreachable: there is always a free number")


def _require_writable(directory: Path) -> Path:
    there = next((p for p in (directory, *directory.parents) if os.path.lexists(p)), directory)
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
    """What a run's records depend on, weights and data aside: another run can't be resumed with it."""
    return hparams.decisive() | {"task": task, "generated": generated}


def check_edit_store(
    hparams: HyperParams, folder: str, cases: Sequence[Case] = (), resume: bool = False
) -> None:
    """UserError as ``open_edit_store``, where the store cannot be written, and where it holds edits of these
    cases' ids that another run, or another method, has made: a run replaces only its own."""
    from unike.edits.store import describe_origin

    store = open_edit_store(hparams, folder)
    require_folder(folder)
    if store is None:
        return
    store.check()
    if not len(store):
        return
    kept = set(store.ids())
    options = to_json_types(hparams.decisive())
    foreign: dict[str, str] = {}
    for case in cases:
        if case.request.id in kept:
            origin = store.read(case.request.id).origins[0]
            query = case.request.query
            own = replace(origin, hparams=options, method=hparams.method, prompt=query.prompt)
            own = replace(own, id=case.request.id, target=str(query.target))
            own = replace(own, image_key=_read_image_key(query.image))
            # An edit of a sequence depends on those before it, too.
            other = hparams.protocol != "one_step" and not resume
            if other or describe_origin(own) != describe_origin(origin):
                foreign[case.request.id] = origin.method
    if foreign:
        few = ", ".join(map(one_line, list(foreign)[:3])) + (", ..." if len(foreign) > 3 else "")
        methods = ", ".join(dict.fromkeys(one_line(m, 40) for m in foreign.values()))
        raise UserError(
            f"{one_line(folder)}: holds {few} of another run (method {methods}); name another --save_edits"
        )


def _read_image_key(image: ImageLike | None) -> str | None:
    """The key that an edit's origin has of its image; None where it can't be read."""
    # Imported late, as torch comes with it.
    from unike.backbones.images import content_key

    with suppress(UserError):
        return None if image is None else content_key(image)
    return None


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
