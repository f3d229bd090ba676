"""Scores that are added to a finished run: ``scores/<name>.jsonl`` in its folder.

The first line of a file says what made it, every other one holds a record's scores under its id::

    {"about": {"title": "contains", "source": "...", "made": "2026-12-01T07:00:00+00:00"}}
    {"id": "vqa-0", "scores": {"reliability": {"before": 0.0, "after": 1.0}}}

``read_records`` lays them over the records' own: a file's name is one more evaluation mode. A file is
replaced as a whole, so that a reader sees the former one or the new one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from unike.evaluation.modes import declare_mode
from unike.evaluation.record import Record, Score, read_scores, write_scores
from unike.scoring.scorers import check_mode
from unike.system.faults import explain_write_errors
from unike.system.files import compute_sha256, to_json_types, write_text
from unike.system.places import refuse_link
from unike.system.text import one_line
from unike.types import UserError

logger = logging.getLogger("unike")
FOLDER, SUFFIX = "scores", ".jsonl"
# A record's id. Within a run no two records have one: of a sequence's records it names the sequence, the
# position and whether it is a step ("0/3/step").
RecordKey = str


@dataclass(frozen=True)
class AddedScores:
    """Scores by record and probe, and what is said ``about`` them: their ``title``, and what made them."""

    name: str
    about: Mapping[str, object]
    scores: Mapping[RecordKey, Mapping[str, Score]]


def get_key(record: Record) -> RecordKey:
    """What a record's added scores are found by."""
    return record.id


def get_scores_file(folder: Path, name: str) -> Path:
    """Where a run's added scores of that name are kept."""
    return folder / FOLDER / f"{name}{SUFFIX}"


def write_added_scores(
    folder: Path,
    name: str,
    scores: Mapping[RecordKey, Mapping[str, Score]],
    about: Mapping[str, object],
) -> Path:
    """Writes a run's scores of one name, and gives the file; a former file of that name is replaced.

    ``name`` becomes an evaluation mode of the run's records. ``scores`` are by ``get_key`` of a record, then
    by probe; records that are left out have none. ``about`` is what made them, in JSON's types: its ``title``
    is what tables call the mode, by default the name. The date is added.

    Raises:
        UserError: for a name or title that is none, and where the folder or the disk does not take the file.
        ValueError: for a score outside of 0 to 1.
    """
    title = about.get("title", name)
    if wrong := check_mode(name, title):
        raise UserError(*wrong)
    path = get_scores_file(folder, name)
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    lines: list[dict[str, object]] = [{"about": {**about, "title": title, "made": made}}]
    for key, by_probe in scores.items():
        _require_shares(key, by_probe)
        lines.append({"id": key, "scores": write_scores(by_probe)})
    if path.parent.is_symlink():
        raise UserError(f"{path.parent}: is a symbolic link; expected a folder of the run")
    refuse_link(path)
    with explain_write_errors(path, resumable=False):
        path.parent.mkdir(exist_ok=True)
        write_text(path, "".join(json.dumps(to_json_types(line)) + "\n" for line in lines))
    return path


def read_added_scores(folder: Path, records: Path | None = None) -> dict[str, AddedScores]:
    """The scores that were added to a run, by name; empty where there are none. Their titles are known to
    tables from then on.

    With the file of ``records``, scores that were made of another one (``about["records"]``, its SHA-256) are
    left out with a warning: a run that was made anew has records of the same ids.

    Raises:
        UserError: in one line, for a file that is not as ``write_added_scores`` writes it.
    """
    found = {}
    for path in sorted((folder / FOLDER).glob(f"*{SUFFIX}")):
        name = path.name.removesuffix(SUFFIX)
        one = _read_file(path, name)
        made_of = one.about.get("records")
        if records is not None and made_of is not None and made_of != compute_sha256(records):
            logger.warning("%s: was made of other records than %s, and is left out", path, records)
            continue
        found[name] = one
        declare_mode(name, str(one.about["title"]))
    return found


def overlay(records: Sequence[Record], added: Mapping[str, AddedScores]) -> list[Record]:
    """The records with the added scores as further evaluation modes; an added mode takes the place of one of
    the same name that a record had."""
    out = []
    for record in records:
        key = get_key(record)
        own = {name: one.scores[key] for name, one in added.items() if key in one.scores}
        out.append(replace(record, scores={**record.scores, **own}) if own else record)
    return out


def _require_shares(key: RecordKey, by_probe: Mapping[str, Score]) -> None:
    for probe, score in by_probe.items():
        if not all(value is None or 0 <= value <= 1 for value in (score.before, score.after)):
            raise ValueError(f"record {key}: {probe}: expected scores from 0 to 1, got {score}")


def _read_file(path: Path, name: str) -> AddedScores:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as fault:
        raise UserError(f"{path}: cannot be read as added scores: {fault}") from None
    about: Mapping[str, object] | None = None
    scores: dict[RecordKey, Mapping[str, Score]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            if number == 1:
                about = _read_about(value, name)
            else:
                scores[_read_key(value)] = read_scores(value["scores"])
        except (ValueError, TypeError, KeyError, RecursionError):
            what = "an object with about" if number == 1 else "an object with id and scores from 0 to 1"
            raise UserError(f"{path}:{number}: is not a line of added scores; expected {what}") from None
    if about is None:
        raise UserError(f"{path}: is empty; expected added scores")
    return AddedScores(name, about, scores)


def _read_about(value: object, name: str) -> Mapping[str, object]:
    about = value["about"] if isinstance(value, dict) else None
    if not isinstance(about, dict):
        raise TypeError("expected an object")
    title = about.get("title", name)
    if wrong := check_mode(name, title):
        raise ValueError(one_line(wrong[0]))
    return {**about, "title": title}


def _read_key(value: object) -> RecordKey:
    if not isinstance(value, dict) or not isinstance(value["id"], str):
        raise TypeError("expected an object with an id")
    return value["id"]
