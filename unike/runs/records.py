"""The folder of a run: one JSON line per case, resumable, with what it was made from beside it.

``records.jsonl`` grows by one durable line per case; ``manifest.json`` holds the hyper-parameters,
versions and checksums; ``summary.json`` is written at the end. Where several processes share a run,
each has a ``records.<rank>.jsonl`` of its own, merged into ``records.jsonl`` at the end, or when the run
is resumed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from unike.system.faults import explain_write_errors
from unike.system.files import to_json_types, write_json, write_text
from unike.system.text import one_line
from unike.system.versions import collect_versions
from unike.types import UserError

logger = logging.getLogger("unike")

RECORDS, MANIFEST, SUMMARY = "records.jsonl", "manifest.json", "summary.json"
SHARDS = "records.[0-9]*.jsonl"
# Goes the way of half-written files: what is left of it is removed when the run is resumed.
_STOP = ".stop.tmp"
_ABSENT = "absent"
_ANSWER = {"prompt", "target", "before", "after"}
_NUMBER, _PLAIN = (int, float), (str, int, float)
# Beyond any that is measured, and low enough to be summed up.
_LARGEST = 1e100
# Of what tables and pages read of a record: how many objects deep its values lie, and their kinds.
_SHAPES: dict[str, tuple[int, tuple[type, ...]]] = {
    **dict.fromkeys(("id", "case", "sequence", "position", "kind", "task", "status", "error"), (0, _PLAIN)),
    **dict.fromkeys(("seconds", "steps", "loss", "bytes"), (0, _NUMBER)),
    **dict.fromkeys(("decisions", "presets", "base_right", "retrieved"), (2, _NUMBER)),
    "former": (1, _NUMBER),
    "scores": (3, _NUMBER),
    "answers": (2, (str,)),
}


class RecordWriter:
    """Appends records to a run folder; a context manager.

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
        fingerprint: Mapping[str, Any],
        *,
        seed: int | None = None,
        weights: Mapping[str, str] | None = None,
        data: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
        rank: int | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory, self.rank = Path(directory), rank
        if rank:
            self.manifest = read_manifest(self.directory)
        else:
            made = {"seed": seed, "command": list(sys.argv if command is None else command), **(about or {})}
            with explain_write_errors(self.directory):
                self.manifest = self._start(resume, fingerprint, weights or {}, data or {}, made)
        self._done = {str(record["id"]) for record in read_records(self.directory)}
        name = RECORDS if rank is None else f"records.{rank}.jsonl"
        # Unbuffered, so that what failed to reach the disk is not written again later.
        self._file = open(self.directory / name, "ab", buffering=0)  # noqa: SIM115

    def _start(
        self, resume: bool, fingerprint: Mapping[str, Any], weights: Mapping[str, str],
        data: Mapping[str, str], about: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """Makes or checks the folder, mends its records, and gives its manifest."""
        given = {"hparams": fingerprint, "weights": weights, "data": data}
        inputs = {name: to_json_types(value) for name, value in given.items()}
        _make_folder(self.directory)
        former = _read_former(self.directory, resume)
        if former is None:
            manifest = inputs | to_json_types(about) | {"versions": collect_versions(), "started": _now()}
        else:
            _remove_leftovers(self.directory)
            _check_inputs(self.directory, former, inputs)
            manifest = former | {"resumed": [*former.get("resumed", []), _now()]}
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

    def done_ids(self) -> frozenset[str]:
        """Ids of the cases that are recorded, failed ones included."""
        return frozenset(self._done)

    def write(self, record: Mapping[str, Any]) -> None:
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
        """Lets the run's other processes know that they should end, too."""
        if self.rank is not None:
            (self.directory / _STOP).touch()

    def stopped(self) -> bool:
        """Whether a process of this run has called ``stop``."""
        return self.rank is not None and (self.directory / _STOP).exists()

    def finish(self, order: Sequence[str]) -> None:
        """Closes the file, and brings all records together, in the ``order`` of their ids."""
        self.close()
        if not self.rank:
            with explain_write_errors(self.directory):
                merge(self.directory, order)
                (self.directory / _STOP).unlink(missing_ok=True)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json`` in one step."""
        with explain_write_errors(self.directory):
            write_json(self.directory / SUMMARY, summary)


def read_records(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The complete records of a run, in order; a half-written last line is left out."""
    path = Path(directory) / RECORDS
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the records of a run")
    return _scan(path)[0]


def read_measured(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """As ``read_records``; UserError, too, for a record of another shape than a run writes."""
    records = read_records(directory)
    in_sequences = any("sequence" in record for record in records)
    for record in records:
        wrong = [k for k, shape in _SHAPES.items() if k in record and not _shaped(record[k], *shape)]
        if not wrong:
            wrong = _incomplete(record)
        if not wrong and in_sequences and not _placed(record):
            wrong = ["its place in a sequence"]
        if wrong:
            at = f"{Path(directory) / RECORDS}: record {one_line(record['id'], 60)}"
            raise UserError(f"{at}: {wrong[0]} is not as a run writes it")
    return records


def _incomplete(record: Mapping[str, Any]) -> list[str]:
    """Which of a well-shaped record's parts lack something that a run always writes."""
    scores = [pair for by_probe in record.get("scores", {}).values() for pair in by_probe.values()]
    complete = {
        "scores": all("before" in pair and pair.get("after") is not None for pair in scores),
        "answers": all(answer.keys() >= _ANSWER for answer in record.get("answers", {}).values()),
        "former": None not in record.get("former", {}).values(),
    }
    return [key for key, held in complete.items() if not held]


def _placed(record: Mapping[str, Any]) -> bool:
    """Whether a record says where in a sequence it stands, and a step how the edits do there."""
    known = all(type(record.get(key)) is int for key in ("sequence", "position"))
    if record.get("kind") != "step" or record.get("status") != "ok":
        return known and record.get("kind") in ("step", "final") and "status" in record
    return known and "former" in record and "teacher_forced" in record.get("scores", {})


def _shaped(value: Any, depth: int, kinds: tuple[type, ...]) -> bool:
    """Whether a JSON value is objects within each other, ``depth`` deep, around ``kinds`` or null.

    Infinities and NaN, which Python reads and a browser does not, are no numbers.
    """
    if depth == 0:
        if isinstance(value, (int, float)) and not abs(value) < _LARGEST:
            return False
        return value is None or isinstance(value, kinds)
    return isinstance(value, dict) and all(_shaped(item, depth - 1, kinds) for item in value.values())


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What a run was made from."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise UserError(f"{path}: cannot be read as a run's manifest: {fault}") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{path}: expected a JSON object")
    return manifest


def merge(directory: Path, order: Sequence[str] = ()) -> None:
    """Brings the records of all processes together in ``records.jsonl``, each once, and removes their
    own files; half-written last lines are cut off. A kill at any moment loses nothing.

    Records come in the ``order`` of their ids; those it lacks stay behind, as they were.
    """
    shards = sorted(directory.glob(SHARDS))
    found = {str(record["id"]): record for record in _mend(directory / RECORDS)}
    former = list(found)
    for shard in shards:
        for record in _mend(shard):
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


def check_resumable(directory: Path, resume: bool, fingerprint: Mapping[str, Any]) -> None:
    """UserError where a writer of this ``fingerprint`` would refuse the folder; weights and data are compared
    when it is opened."""
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
    """What a killed process left half written."""
    return [path for path in directory.iterdir() if path.name[0] == "." and path.name.endswith(".tmp")]


def _remove_leftovers(directory: Path) -> None:
    for path in _list_leftovers(directory):
        path.unlink()


def _check_inputs(directory: Path, former: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    problems = []
    for part, now in inputs.items():
        old, new = _flat(former.get(part) or {}), _flat(now)
        for key in sorted(old.keys() | new.keys()):
            was, given = old.get(key, _ABSENT), new.get(key, _ABSENT)
            if was != given or isinstance(was, bool) != isinstance(given, bool):
                name = key if part == "hparams" else f"{part}: {key}"
                problems.append(f"{directory}: {name}: {was!r} in the run to resume, {given!r} now")
    if problems:
        raise UserError(*problems)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) and item else {prefix + key: item}
    return found


def _scan(path: Path) -> tuple[list[dict[str, Any]], int, bool]:
    """The complete records, the number of bytes they take, and whether their last line is ended."""
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        lines.append(rest)
    records, size = [], 0
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None and number < len(lines):
            raise UserError(f"{path}:{number}: is not a record; expected a JSON object with an id")
        if record is not None:
            records.append(record)
            size += len(line) + 1
    unended = bool(rest) and _record(rest) is not None
    return records, size - unended, not unended


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "id" in record else None


def _mend(path: Path) -> list[dict[str, Any]]:
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


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def seed_of(manifest: Mapping[str, Any]) -> int:
    """The seed of a run, 0 where none is known."""
    seed = manifest.get("seed")
    return seed if isinstance(seed, int) and seed >= 0 else 0
