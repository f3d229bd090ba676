"""The folder of a run: one JSON line per record, resumable, together with what it was made from.

``records.jsonl`` grows by one durable line per record; ``manifest.json`` holds the hyper-parameters,
versions and checksums; ``summary.json`` is written at the end. Where several processes share a run,
each has a ``records.<rank>.jsonl`` of its own, merged into ``records.jsonl`` at the end, or when the run
is resumed. Here a record is any JSON object with an id; its shape is that of ``unike.evaluation.record``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from unike.config.options import BEFORE_OPTIONS
from unike.datasets.declarations import declare_metrics
from unike.evaluation.record import Record, require_place
from unike.runs.added_scores import overlay, read_added_scores
from unike.system.faults import explain_write_errors
from unike.system.files import to_json_types, write_json, write_text
from unike.system.places import refuse_link
from unike.system.versions import collect_versions
from unike.types import UserError

logger = logging.getLogger("unike")

RECORDS, MANIFEST, SUMMARY = "records.jsonl", "manifest.json", "summary.json"
SHARDS = "records.[0-9]*.jsonl"
# Goes the way of half-written files: what is left of it is removed when the run is resumed.
_STOP = ".stop.tmp"
_LEFTOVER = re.compile(
    r"\.(stop|(records(\.\d+)?\.jsonl|manifest\.json|summary\.json|report\.html)\.\d+(\.[0-9a-f]+)?)\.tmp"
)
_ABSENT = "absent"
Values = Mapping[str, object]


class RecordWriter:
    """Appends records, as JSON objects, to a run folder; a context manager.

    A folder with content is refused unless ``resume``; then the ``fingerprint`` (the
    hyper-parameters) and the checksums of ``weights`` and ``data`` must be the run's own, a line that
    a killed run left half written is cut off, and what its processes wrote is merged.

    ``rank`` is the process's number where several write; the first must be open before the others.
    ``about`` goes into the manifest without being compared.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        resume: bool,
        fingerprint: Values,
        *,
        seed: int | None = None,
        weights: Mapping[str, str] | None = None,
        data: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
        rank: int | None = None,
        about: Values | None = None,
    ) -> None:
        self.directory, self.rank = Path(directory), rank
        if rank:
            self.manifest = read_manifest(self.directory)
        else:
            command = list(sys.argv if command is None else command)
            inputs = {"hparams": fingerprint, "weights": weights or {}, "data": data or {}}
            with explain_write_errors(self.directory):
                self.manifest = self._start(
                    resume, inputs, {"seed": seed, "command": command, **(about or {})}
                )
        self._done = {str(values["id"]) for values in read_lines(self.directory)}
        name = RECORDS if rank is None else f"records.{rank}.jsonl"
        # Unbuffered, so that what failed to reach the disk is not written again later.
        self._file = open(self.directory / name, "ab", buffering=0)  # noqa: SIM115

    def _start(self, resume: bool, inputs: Mapping[str, Values], about: Values) -> dict[str, Any]:
        """Makes or checks the folder, repairs its records, and gives its manifest."""
        inputs = {name: to_json_types(value) for name, value in inputs.items()}
        _make_folder(self.directory)
        _refuse_links(self.directory)
        former = _read_former(self.directory, resume)
        if former is None:
            made = {"versions": collect_versions(), "started": _format_now()}
            manifest = {**inputs, **to_json_types(about), **made}
        else:
            _remove_leftovers(self.directory)
            _check_inputs(self.directory, former, inputs)
            manifest = former | {"resumed": [*former.get("resumed", []), _format_now()]}
        merge(self.directory)
        write_json(self.directory / MANIFEST, manifest)
        return manifest

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; writing afterwards fails."""
        self._file.close()

    def list_done(self) -> frozenset[str]:
        """Ids of the cases that are recorded, failed ones included."""
        return frozenset(self._done)

    def write(self, record: Values) -> None:
        """Append a record with an ``id`` of its own; it is on the disk on return.

        Numbers that JSON lacks (NaN, infinity) become null. UserError where the disk takes no more: then
        the file ends with the record before.
        """
        name = str(record["id"])
        if name in self._done:
            raise ValueError(f"record {name} is already written")
        line = json.dumps(to_json_types(record)).encode() + b"\n"
        with explain_write_errors(self.directory):
            start = os.fstat(self._file.fileno()).st_size
            try:
                written = 0
                while written < len(line):
                    written += self._file.write(line[written:]) or 0
                os.fsync(self._file.fileno())
            except BaseException:
                # A disk that refuses this too leaves half a line, which the next start cuts off.
                with suppress(OSError):
                    self._file.truncate(start)
                raise
        self._done.add(name)

    def stop(self) -> None:
        """Tells the run's other processes to end, too."""
        if self.rank is not None:
            (self.directory / _STOP).touch()

    def is_stopped(self) -> bool:
        """Whether a process of this run has called ``stop``."""
        return self.rank is not None and (self.directory / _STOP).exists()

    def finish(self, order: Sequence[str]) -> None:
        """Closes the file, and brings all records together, in the ``order`` of their ids."""
        self.close()
        if not self.rank:
            with explain_write_errors(self.directory):
                merge(self.directory, order)
                (self.directory / _STOP).unlink(missing_ok=True)

    def write_summary(self, summary: Values) -> None:
        """Write ``summary.json`` in one step."""
        with explain_write_errors(self.directory):
            write_json(self.directory / SUMMARY, summary)


def read_lines(directory: str | os.PathLike[str]) -> list[dict[str, object]]:
    """The complete records of a run as JSON objects, in order; a half-written last line is left out."""
    path = Path(directory) / RECORDS
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the records of a run")
    return _scan(path)[0]


def read_records(directory: str | os.PathLike[str]) -> list[Record]:
    """The complete records of a run, in order, with the scores that were added to it (``added_scores``) as
    further evaluation modes. UserError, in one line, for a record of another shape than a run writes it, and
    for a folder without records."""
    lines, at = read_lines(directory), Path(directory) / RECORDS
    try:
        records = [Record.from_json(values) for values in lines]
        if any(record.place for record in records):
            for record in records:
                require_place(record)
    except UserError as error:
        raise UserError(f"{at}: {error}") from None
    return overlay(records, read_added_scores(Path(directory), at))


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What a run was made from. The metrics that its data declared are known from then on."""
    path = Path(directory) / MANIFEST
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: cannot be read as a run's manifest: is not a regular file")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise UserError(f"{path}: cannot be read as a run's manifest: {fault}") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{path}: expected a JSON object")
    declare_metrics(manifest.get("metrics", []), str(path))
    return manifest


def merge(directory: Path, order: Sequence[str] = ()) -> None:
    """Brings the records of all processes together in ``records.jsonl``, each once, and removes their
    own files; half-written last lines are cut off. A kill at any moment loses nothing.

    Records come in the ``order`` of their ids; those it lacks come last, as they were.
    """
    shards = sorted(directory.glob(SHARDS))
    found = {str(record["id"]): record for record in _repair(directory / RECORDS)}
    former = list(found)
    for shard in shards:
        for record in _repair(shard):
            found.setdefault(str(record["id"]), record)
    places = {name: place for place, name in enumerate(order)}
    wanted = sorted(found, key=lambda name: places.get(name, len(places)))
    if wanted != former or not (directory / RECORDS).exists():
        write_text(directory / RECORDS, "".join(json.dumps(found[name]) + "\n" for name in wanted))
    for shard in shards:
        shard.unlink()


def _make_folder(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UserError(f"{directory}: cannot be made a run folder: {fault.strerror}") from None


def _refuse_links(directory: Path) -> None:
    """UserError where a link is in the place of a file that the run writes: its target may be anything."""
    own = (directory / name for name in (RECORDS, MANIFEST, SUMMARY, _STOP))
    for path in (*own, *directory.glob(SHARDS)):
        refuse_link(path)


def check_resumable(directory: Path, resume: bool, fingerprint: Values) -> None:
    """UserError where a writer of this ``fingerprint`` would refuse the folder; weights and data are compared
    when it is opened."""
    if directory.is_dir():
        _refuse_links(directory)
    if directory.is_dir() and (former := _read_former(directory, resume)) is not None:
        _check_inputs(directory, former, {"hparams": to_json_types(fingerprint)})


def _read_former(directory: Path, resume: bool) -> dict[str, Any] | None:
    """The manifest of the run to resume; None where the folder is fresh."""
    if len(_list_leftovers(directory)) == len(list(directory.iterdir())):
        return None
    if not resume:
        raise UserError(f"{directory}: holds a run already; resume it, or name another folder")
    if not (directory / MANIFEST).exists():
        raise UserError(f"{directory}: holds files but no {MANIFEST}; expected a run to resume")
    return read_manifest(directory)


def _list_leftovers(directory: Path) -> list[Path]:
    """What a killed process left half written of the run's own files."""
    return [path for path in directory.iterdir() if _LEFTOVER.fullmatch(path.name)]


def _remove_leftovers(directory: Path) -> None:
    for path in _list_leftovers(directory):
        path.unlink()


def _check_inputs(directory: Path, former: Mapping[str, Any], inputs: Mapping[str, Values]) -> None:
    problems = []
    for part, now in inputs.items():
        old, new = _flatten(former.get(part) or {}), _flatten(now)
        if part == "hparams":
            old = {key: value for key, value in BEFORE_OPTIONS.items() if key in new} | old
        for key in sorted(old.keys() | new.keys()):
            was, given = old.get(key, _ABSENT), new.get(key, _ABSENT)
            if was != given or isinstance(was, bool) != isinstance(given, bool):
                name = key if part == "hparams" else f"{part}: {key}"
                problems.append(f"{directory}: {name}: {was!r} in the run to resume, {given!r} now")
    if problems:
        raise UserError(*problems)


def _flatten(value: Values, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, item in value.items():
        found |= (
            _flatten(item, f"{prefix}{key}.") if isinstance(item, dict) and item else {prefix + key: item}
        )
    return found


def _scan(path: Path) -> tuple[list[dict[str, object]], int, bool]:
    """The complete records, the number of bytes they take, and whether their last line is ended."""
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        lines.append(rest)
    records, size = [], 0
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None and number < len(lines):
            raise UserError(f"{path}:{number}: is not a record; expected a JSON object with an id")
        if record is not None:
            records.append(record)
            size += len(line) + 1
    unended = bool(rest) and _parse(rest) is not None
    return records, size - unended, not unended


def _parse(line: bytes) -> dict[str, object] | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "id" in record else None


def _repair(path: Path) -> list[dict[str, object]]:
    """Cut off a half-written last line, end an unended one, and give the records."""
    if not path.exists():
        return []
    records, size, ended = _scan(path)
    if path.stat().st_size > size:
        logger.warning("%s: the last line is half written and is left out", path)
    with open(path, "r+b") as file:
        file.truncate(size)
        if not ended:
            file.seek(size)
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())
    return records


def _format_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_seed(manifest: Values) -> int:
    """The seed of a run, 0 where none is known."""
    seed = manifest.get("seed")
    return seed if isinstance(seed, int) and seed >= 0 else 0
