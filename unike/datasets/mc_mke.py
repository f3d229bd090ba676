"""MC-MKE (ACL 2025 Findings): a fact is an image's entity and that entity's object; either can be wrong.

A file of edits is of one kind: ``ie`` (which entity the image shows), ``sro`` (the entity's object, without
an image) or ``iro`` (the object, asked on the image). The files beside it, under their published names, have
by the edit's number what is asked: the edit's own cloze, five paraphrased questions, five further images (not
for ``sro``), five unrelated questions, and the *consistency* question, in which the other component meets the
edited one. Its target can differ from the edit's, and edits listed in ``ie_consistenct_ignore_idx.json`` have
none, as their answer stays. A generated answer is right if it contains the target or one of its aliases.

Read: the release's files and its matcher (reroze/MC-MKE, edit_inputs, test/single_match.py). Its code of
editing is not there. Assumed is that an edit is made at the reliability test's prompt.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from unike.datasets.images import PathLike
from unike.datasets.layout import (
    Asked,
    Described,
    Joined,
    Layout,
    find_list_problem,
    strip_or_none,
)
from unike.datasets.mmedit import TEXT_LENGTH, load_records
from unike.datasets.rows import read_lines
from unike.datasets.vlkeb import is_text
from unike.system.paths import check_path
from unike.system.text import describe_value, one_line
from unike.types import UserError

_IMAGES, _UNRELATED = "generality_images", "locality_test_dict"
_IGNORED = "ie_consistenct_ignore_idx.json"


@dataclass(frozen=True)
class _Kind:
    """The fields and files of a kind of edit. ``consistency``: its image, prompt, answer and aliases."""

    number: str
    old: str
    cloze: str
    target: str
    paraphrases: str
    unrelated: tuple[str, str]
    consistency: tuple[str, str, str, str]
    files: Mapping[str, str]
    further: tuple[str, ...]
    on_image: bool = True

    @property
    def aliases(self) -> str:
        return f"{self.target}_alias"


_KINDS = (
    _Kind(
        number="ie_edit_input_idx",
        old="e_ent",
        cloze="input_cloze",
        target="new_e_ent",
        paraphrases="ie_question_paraphrases",
        unrelated=("ie_question", "orig_loc_ent"),
        consistency=(
            "consistency_iro_image",
            "consistency_iro_input_cloze",
            "consistency_iro_output",
            "consistency_iro_output_alias",
        ),
        files={
            "reliability": "final_ie_edit_reliability_test.jsonl",
            "t_generality": "final_ie_test_text_generality.jsonl",
            "m_generality": "final_ie_test_image_generality.jsonl",
            "locality": "final_ie_locality_test.jsonl",
            "consistency": "final_ie_test_consistency.jsonl",
        },
        further=("relation", "new_e_ent", "ie_question", "ie_cloze", "new_e_ent_alias"),
    ),
    _Kind(
        number="sro_edit_input_idx",
        old="o",
        cloze="sro_cloze",
        target="new_o",
        paraphrases="sro_question_paraphrases",
        unrelated=("sro_question", "orig_loc_output_ent"),
        consistency=(
            "consistency_data_image",
            "consistency_data_irocloze",
            "consistency_new_o",
            "consistency_new_o_alias",
        ),
        files={
            "reliability": "final_sro_reliability_test.jsonl",
            "t_generality": "final_sro_text_generality_test.jsonl",
            "locality": "final_sro_test_locality.jsonl",
            "consistency": "final_sro_consistency.jsonl",
        },
        further=(
            *("cloze", "question", "para_question", "para_cloze", "ie_idxs", "mq_idxs", "old_mq_idxs"),
            "before_edit_sro_mqcf_idxs_list",
        ),
        on_image=False,
    ),
    _Kind(
        number="iro_edit_input_idx",
        old="o",
        cloze="iro_cloze",
        target="new_o",
        paraphrases="iro_question_paraphrases",
        unrelated=("iro_question", "orig_loc_output_ent"),
        consistency=("consistency_image", "consistency_sro_cloze", "new_o", "new_o_alias"),
        files={
            "reliability": "final_iro_test_reliability.jsonl",
            "t_generality": "final_iro_text_generality.jsonl",
            "m_generality": "final_iro_image_generality.jsonl",
            "locality": "final_iro_test_locality.jsonl",
            "consistency": "final_iro_consistency.jsonl",
        },
        further=("iro_question", "iro_cloze", "iro_edit_cloze_with_reason"),
    ),
)
_MARKS = tuple(kind.number for kind in _KINDS)
# What the file of edits repeats of the files beside it, and its numbers of other data, is known, too.
_KNOWN = (
    *_MARKS,
    *dict.fromkeys(name for kind in _KINDS for name in (kind.old, *kind.further)),
    *("s", "r", "new_o", "new_o_alias", "images", "locality_test", "ie_question_paraphrases"),
)


# ---------------------------------------------------------------- the files


def _read(path: PathLike) -> list[Joined]:
    path = check_path(path, "annotations", "MC-MKE's file of edits")
    name = one_line(path)
    rows = read_lines(path, name)
    kind = next((kind for row in rows if (kind := _find_kind(row)) is not None), None)
    if kind is None:
        raise UserError(f"{name}: expected MC-MKE's edits, a line each with {', '.join(_MARKS)}")
    folder = os.path.dirname(path)
    beside = {part: _read_beside(os.path.join(folder, file), kind) for part, file in kind.files.items()}
    left = set(_read_ignored(os.path.join(folder, _IGNORED))) if kind.number == _MARKS[0] else set()
    joined = []
    for row in rows:
        number = row.get(kind.number) if isinstance(row, dict) else None
        found = {part: rows.get(number) for part, rows in beside.items()} if type(number) is int else {}
        joined.append(Joined(row, {"kind": kind, "parts": found, "is_left": number in left}))
    return joined


def _find_kind(row: object) -> _Kind | None:
    return next((kind for kind in _KINDS if isinstance(row, dict) and kind.number in row), None)


def _read_beside(path: str, kind: _Kind) -> dict[int, dict[str, Any]]:
    """The rows of a file by the number of their edit."""
    name = one_line(path)
    found = {}
    for place, row in enumerate(read_lines(path, name), 1):
        number = row.get(kind.number) if isinstance(row, dict) else None
        if type(number) is not int:
            raise UserError(f"{name}: line {place}: expected an object with a whole number {kind.number}")
        found[number] = row
    return found


def _read_ignored(path: str) -> list[int]:
    numbers = load_records(path)
    if not all(type(number) is int for number in numbers):
        raise UserError(f"{one_line(path)}: expected a list of whole numbers")
    return [number for number in numbers if isinstance(number, int)]


# ---------------------------------------------------------------- a record


def _find_problems(joined: Joined) -> list[str | None]:
    record: Any = joined.record
    kind: _Kind = joined.beside["kind"]
    if type(record.get(kind.number)) is not int:
        got = describe_value(record.get(kind.number))
        return [f"field {kind.number!r}: expected a whole number, got {got}"]
    parts: dict[str, Any] = joined.beside["parts"]
    for part, file in kind.files.items():
        if parts[part] is None:
            return [f"{file} has no line with {kind.number} {record[kind.number]}; expected one"]
    return [
        _find_text_problem(record, kind.old),
        *(
            problem and f"{kind.files[part]}: {problem}"
            for part, row in parts.items()
            for problem in _list_part_problems(part, row, kind)
        ),
    ]


def _list_part_problems(part: str, row: Mapping[str, Any], kind: _Kind) -> list[str | None]:
    if part == "locality":
        return _list_unrelated_problems(row.get(_UNRELATED), kind)
    if part == "consistency":
        image, cloze, target, aliases = kind.consistency
        found = [_find_text_problem(row, cloze), _find_text_problem(row, target)]
        # Asked of the other component: on an image where the edit has none.
        needed = not kind.on_image or kind.number == _MARKS[0]
        return [*found, _find_image_problem(row, image, needed), _find_alias_problem(row, aliases)]
    found = [_find_text_problem(row, kind.target), _find_alias_problem(row, kind.aliases)]
    if part == "t_generality":
        found.append(find_list_problem(row, kind.paraphrases))
    elif part == "m_generality":
        cloze = "ie_cloze" if kind.number == _MARKS[0] else kind.cloze
        return [*found, _find_text_problem(row, cloze), find_list_problem(row, _IMAGES)]
    else:
        found.append(_find_text_problem(row, kind.cloze))
    return [*found, _find_image_problem(row, "image", kind.on_image)]


def _list_unrelated_problems(rows: object, kind: _Kind) -> list[str | None]:
    at = f"field {_UNRELATED!r}"
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        return [f"{at}: expected objects by number, got {describe_value(rows)}"]
    return [
        problem and f"{at}: {one_line(number, 20)}: {problem}"
        for number, row in rows.items()
        for problem in (
            *(_find_text_problem(row, name) for name in kind.unrelated),
            _find_image_problem(row, "image", kind.on_image),
        )
    ]


def _find_text_problem(row: Mapping[str, Any], name: str) -> str | None:
    if is_text(row.get(name), TEXT_LENGTH):
        return None
    return f"field {name!r}: expected a text, got {describe_value(row.get(name))}"


def _find_image_problem(row: Mapping[str, Any], name: str, is_needed: bool) -> str | None:
    return _find_text_problem(row, name) if is_needed else None


def _find_alias_problem(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name, [])
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return None
    return f"field {name!r}: expected a list of texts, got {describe_value(value)}"


def _describe(joined: Joined) -> Described:
    record: Any = joined.record
    kind: _Kind = joined.beside["kind"]
    parts: dict[str, Any] = joined.beside["parts"]
    own, texts = parts["reliability"], parts["t_generality"]
    image = _find_image(own["image"]) if kind.on_image else None
    edit = _ask("reliability", own[kind.cloze], own, kind.target, image, kind.aliases)
    probes = [
        edit,
        *(
            _ask("t_generality", text, texts, kind.target, image, kind.aliases, image is not None)
            for text in texts[kind.paraphrases]
        ),
    ]
    if (more := parts.get("m_generality")) is not None:
        cloze = more["ie_cloze" if kind.number == _MARKS[0] else kind.cloze]
        probes += [
            _ask("m_generality", cloze, more, kind.target, _find_image(name), kind.aliases)
            for name in more[_IMAGES]
        ]
    asked, kept = kind.unrelated
    for row in parts["locality"][_UNRELATED].values():
        other = _find_image(row["image"]) if kind.on_image else None
        metric = "t_locality" if other is None else "m_locality"
        probes.append(_ask(metric, row[asked], row, kept, other, f"{kept}_alias", other is not None))
    if not joined.beside["is_left"]:
        name, cloze, target, aliases = kind.consistency
        row = parts["consistency"]
        probes.append(_ask("consistency", row[cloze], row, target, _find_image(row[name]), aliases))
    return Described(edit, strip_or_none(record[kind.old]), tuple(probes))


def _ask(
    metric: str,
    text: str,
    row: Mapping[str, Any],
    target: str,
    image: str | None,
    aliases: str,
    is_question: bool = False,
) -> Asked:
    """A cloze is a prompt as it is, and so is a question without an image."""
    others = row.get(aliases, [])
    known = tuple(alias.strip() for alias in others if alias.strip()) if isinstance(others, list) else ()
    return Asked(metric, text, row[target], image, is_plain=not is_question, aliases=known, match="contains")


def _find_image(name: object) -> str | None:
    """The release has its authors' paths: the file's own name is what lies in the folder of images."""
    given = strip_or_none(name)
    return PurePosixPath(given).name if given is not None and given.startswith("/") else given


MC_MKE = Layout("mc_mke", "MC-MKE", _KNOWN, _MARKS, _read, _find_problems, _describe)
