"""Records in other shapes than MMEdit's file: lists of mappings, tables, JSON, JSONL and CSV files.

A row is a mapping of fields. Its fields may be named as MMEdit names them, as ``MultimodalEditor.edit`` does,
or as EasyEdit's data sets do.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from unike.datasets.mmedit import FILE_BYTES, PAIRED_FIELDS, load_records
from unike.system.text import one_line
from unike.types import UserError

logger = logging.getLogger("unike")

# By what a field holds: the names under which it is known, ours first.
FIELDS = {
    "prompt": ("prompt", "prompts", "src", "question"),
    "target": ("target", "targets", "alt", "answer"),
    "image": ("image", "images"),
    "rephrase_prompts": ("rephrase_prompts", "rephrase_prompt", "rephrase"),
    "rephrase_image": ("rephrase_image", "image_rephrase"),
    "locality_inputs": ("locality_inputs",),
    "text_prompt": ("locality_prompt", "loc", "no_image_question"),
    "text_answer": ("locality_ground_truth", "loc_ans"),
    "vision_image": ("multimodal_locality_image", "m_loc"),
    "vision_prompt": ("multimodal_locality_prompt", "m_loc_q"),
    "vision_answer": ("multimodal_locality_ground_truth", "m_loc_a"),
    **{name: (name,) for name in (*chain.from_iterable(PAIRED_FIELDS), "joint")},
    "same_question_image": ("same_question_image", "other_image"),
    "same_image_q": ("same_image_q", "other_question"),
    "wrong": ("wrong", "pred"),
    "id": ("id", "case_id"),
    "task": ("task",),
    "file_type": ("file_type", "image_type"),
}
_HOMES = {name: field for field, names in FIELDS.items() for name in names}
SUFFIXES = {".json": "JSON", ".jsonl": "JSON lines", ".ndjson": "JSON lines", ".csv": "CSV"}
# Far above any list of edits that somebody writes by hand or keeps in a table.
MOST_ROWS = 10_000_000
_KINDS = "a data set, cases, rows of fields, a table, or the path of a JSON, JSONL or CSV file"


def read_rows(source: object, name: str = "ds") -> list[Any]:
    """The rows or cases of a list, a generator, a table or a file.

    Tables are known by their methods: of pandas (``to_dict``), of `datasets` (iteration gives mappings).

    Raises:
        UserError: one line, for what is none of these, and for a file that cannot be read.
    """
    if isinstance(source, (str, os.PathLike)):
        return read_file(source)
    if isinstance(source, Mapping):
        return _split_mapping(source, name)
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        return list(source.to_dict("records"))
    # Data sets of PyTorch have rows by number, and no more.
    numbered = hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, type)
    unordered = isinstance(source, (bytes, bytearray, memoryview, set, frozenset))
    if unordered or not (numbered or isinstance(source, Iterable)):
        raise UserError(f"{name}: expected {_KINDS}, got {type(source).__name__}")
    try:
        if not isinstance(source, Iterable):
            return [source[i] for i in range(len(source))]  # type: ignore[index, arg-type]
        return list(islice(source, MOST_ROWS))
    except Exception as error:
        # A class of the user's raises anything; some have __iter__ and refuse it: a tensor of no dimensions.
        raise UserError(
            f"{name}: expected {_KINDS}, got {type(source).__name__}: {one_line(error)}"
        ) from error


def _split_mapping(source: Mapping[Any, Any], at: str) -> list[Any]:
    """One row, or the splits of a `datasets` dictionary, of which one must be chosen."""
    if set(source) & set(_HOMES):
        return [source]
    names = ", ".join(one_line(key, 20) for key in islice(source, 6)) or "nothing"
    raise UserError(
        f"{at}: expected {_KINDS}, got a mapping of {names}; choose one of its splits, if it has some"
    )


def read_file(path: str | os.PathLike[str]) -> list[Any]:
    """The rows of a JSON list, of JSON lines, or of a CSV file with a header; UserError naming the place."""
    name, kind = one_line(os.fspath(path)), SUFFIXES.get(Path(os.fsdecode(path)).suffix.lower())
    if os.path.exists(path) and kind is None:
        raise UserError(f"ds: {name}: expected a file that ends in {', '.join(SUFFIXES)}")
    if kind in ("JSON", None):
        return load_records(os.fsdecode(path))
    name = f"ds: {name}"
    return read_lines(path, name) if kind == "JSON lines" else _read_csv(_read_text(path, name), name)


def _read_text(path: str | os.PathLike[str], name: str) -> str:
    if not os.path.isfile(path):
        raise UserError(f"{name}: no such file; expected rows of fields")
    try:
        if os.path.getsize(path) > FILE_BYTES:
            raise UserError(f"{name}: more than {FILE_BYTES} bytes; expected a list of records")
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start})") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be read: {one_line(error)}") from error


def read_lines(path: str | os.PathLike[str], name: str) -> list[Any]:
    """The values of a file of JSON lines; UserError beginning with ``name``, with the line."""
    rows = []
    for number, line in enumerate(_read_text(path, name).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{name}: line {number}: broken JSON: {one_line(error, 80)}") from error
    return rows


def _read_csv(text: str, name: str) -> list[Any]:
    rows = []
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if row.get(None) or None in row.values():  # type: ignore[call-overload]
                raise UserError(f"{name}: line {reader.line_num}: expected as many cells as the header has")
            # An empty cell is a field that is not given.
            rows.append({key: value for key, value in row.items() if value.strip()})
    except csv.Error as error:
        raise UserError(f"{name}: line {reader.line_num}: {one_line(error, 80)}") from error
    return rows


# ---------------------------------------------------------------- fields


def name_fields(row: object, at: str) -> tuple[dict[str, Any], list[str]]:
    """A row's fields by what they hold, those that are None left out, and the problems with their names."""
    if not isinstance(row, Mapping):
        return {}, [f"{at}: expected a mapping of fields, got {type(row).__name__}"]
    found: dict[str, Any] = {}
    given: dict[str, str] = {}
    problems = []
    for key, value in row.items():
        field = _HOMES.get(key) if isinstance(key, str) else None
        # A table has NaN where a cell is empty.
        if field is None or value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        if field in found:
            problems.append(f"{at}: {key} and {given[field]} hold the same; expected one of them")
        found[field], given[field] = value, key
    for field in ("prompt", "target"):
        if field not in found:
            problems.append(
                f"{at}: {field} is missing; expected it as {_list_names(field)}{_suggest(row, field)}"
            )
    return found, problems


def _list_names(field: str) -> str:
    *names, last = FIELDS[field]
    return f"{', '.join(names)} or {last}" if names else last


def _suggest(row: Mapping[Any, Any], field: str) -> str:
    others = [key for key in row if isinstance(key, str) and key not in _HOMES]
    near = [n for name in FIELDS[field] for n in difflib.get_close_matches(name, others, 1, 0.7)]
    return f"; is {one_line(repr(near[0]), 60)} meant?" if near else ""


def report_unknown_fields(rows: Iterable[object]) -> None:
    """UserError for a field that is spelt like a known one, and a line in the log for others."""
    names = {key for row in rows if isinstance(row, Mapping) for key in row if isinstance(key, str)}
    unknown = sorted(names - set(_HOMES))
    for name in unknown:
        known = [n for n in _HOMES if n not in names]
        near = difflib.get_close_matches(name, known, 1, 0.85)
        if near:
            raise UserError(f"ds: field {one_line(repr(name), 60)} is unknown; is {near[0]!r} meant?")
    if unknown:
        logger.warning("ds: fields that are not read: %s", one_line(", ".join(unknown), 200))
