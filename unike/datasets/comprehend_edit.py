"""ComprehendEdit (AAAI 2025): edits of questions of eight kinds, and what they do to others.

A test record lists the ``pid`` of others, the nearest and the farthest by image and by question: four lists
of the same file, which the base models get wrong (*knowledge generalization index*: they should be answered
right after the edit), and four of ``ComprehendEdit_ori_right.json`` beside it, which they get right
(*knowledge preservation index*: what the unedited model says should stay). Of each list the nearest, or
farthest, ``NEIGHBORS`` are asked, as many as the release reads. Each source has its own prompt. There is no
rephrased image.

Read: the release's README, loader and trainer (yaohui120/ComprehendEdit,
easyeditor/dataset/ComprehendEdit.py, easyeditor/trainer/MultimodalTrainer.py), not the data. The loader takes
the text-only question for its own answer; here ``locality_ground_truth`` is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from unike.datasets.images import PathLike
from unike.datasets.layout import (
    Asked,
    Described,
    Joined,
    Layout,
    find_optional_problem,
    find_text_problems,
    strip_or_none,
)
from unike.datasets.mmedit import VQA_TEMPLATE, find_shape_problem, load_records
from unike.system.paths import check_path
from unike.system.text import describe_value, one_line

RIGHT_FILE = "ComprehendEdit_ori_right.json"
NEIGHBORS = 5
_NEAR, _FAR = ("img_topk", "txt_topk"), ("img_last_topk", "txt_last_topk")
# By metric, the fields that list its records.
_LISTS = {"kgi": (*_NEAR, *_FAR), "kpi": tuple(f"ori_rt_{name}" for name in (*_NEAR, *_FAR))}
# By source, in small letters.
TEMPLATES = {
    "gqa": VQA_TEMPLATE,
    "tallyqa": "Question: {} Answer with a number. Short answer:",
    "vsr": "Question: Is this description true or false? Description: {} Short answer:",
    "textvqa": VQA_TEMPLATE,
    "mathvista": "{} Short answer:",
}
_ASKED = ("image", "question", "answer", "source")
_NEEDED = (
    *("image", "question", "rephrase", "answer", "source", "locality_prompt", "locality_ground_truth"),
    *(f"multimodal_locality_{part}" for part in ("image", "prompt", "ground_truth")),
)
_KNOWN = (
    *_NEEDED,
    *("Category", "pid", "ori_pred_blip2", "ori_pred_minigpt4"),
    *(name for names in _LISTS.values() for name in names),
)


def _read(path: PathLike) -> list[Joined]:
    path = check_path(path, "annotations", "a JSON file with a list of records")
    records = load_records(path)
    right: Sequence[object] = ()
    if any(isinstance(r, dict) and any(name in r for name in _LISTS["kpi"]) for r in records):
        right = load_records(os.path.join(os.path.dirname(path), RIGHT_FILE))
    beside = {"kgi": _number(records), "kpi": _number(right)}
    return [Joined(record, beside) for record in records]


def _number(records: Sequence[object]) -> dict[object, object]:
    """Records by ``pid``; by their place, where they have none, which is what the release goes by."""
    numbered: dict[object, object] = {}
    for place, record in enumerate(records):
        pid = record.get("pid", place) if isinstance(record, dict) else place
        if type(pid) is int:
            numbered.setdefault(pid, record)
    return numbered


def _find_problems(joined: Joined) -> list[str | None]:
    record: Any = joined.record
    return [
        *find_text_problems(record, _NEEDED, _KNOWN),
        _find_source_problem(record),
        find_optional_problem(record, "Category"),
        *(
            _find_list_problem(record, name, joined.beside[metric])
            for metric, names in _LISTS.items()
            for name in names
        ),
    ]


def _find_source_problem(record: Mapping[str, Any]) -> str | None:
    source = record.get("source")
    if not isinstance(source, str) or not source.strip() or source.lower() in TEMPLATES:
        # What is no text, the check of texts says.
        return None
    return f"field 'source': expected one of {', '.join(TEMPLATES)}, got {one_line(source, 40)}"


def _find_list_problem(record: Mapping[str, Any], name: str, numbered: Mapping[object, object]) -> str | None:
    pids = record.get(name, [])
    if not isinstance(pids, list) or not all(type(pid) is int for pid in pids):
        return f"field {name!r}: expected a list of whole numbers, got {describe_value(pids)}"
    for pid in _choose(name, pids):
        other: Any = numbered.get(pid)
        if other is None:
            place = RIGHT_FILE if name in _LISTS["kpi"] else "the file"
            return f"field {name!r}: no record of {place} has the pid {pid}"
        problems = [find_shape_problem(other, "ComprehendEdit")]
        if problems == [None]:
            problems = [*find_text_problems(other, _ASKED, _KNOWN), _find_source_problem(other)]
        for problem in filter(None, problems):
            return f"field {name!r}: pid {pid}: {problem}"
    return None


def _choose(name: str, pids: Sequence[int]) -> Sequence[int]:
    """The nearest, or farthest: these are at the end of their list."""
    return pids[-NEIGHBORS:] if name.endswith("last_topk") else pids[:NEIGHBORS]


def _describe(joined: Joined) -> Described:
    record: Any = joined.record
    edit = _ask("reliability", record, record["question"])
    probes = [
        edit,
        _ask("t_generality", record, record["rephrase"]),
        Asked("t_locality", record["locality_prompt"], record["locality_ground_truth"], is_plain=True),
        Asked(
            "m_locality",
            record["multimodal_locality_prompt"],
            record["multimodal_locality_ground_truth"],
            record["multimodal_locality_image"],
        ),
    ]
    for metric, names in _LISTS.items():
        for name in names:
            others = (joined.beside[metric][pid] for pid in _choose(name, record.get(name, [])))
            probes += [_ask(metric, other, other["question"]) for other in others]
    groups = {"source": record["source"].lower()}
    if category := strip_or_none(record.get("Category")):
        groups["category"] = category[:60]
    return Described(edit, None, tuple(probes), groups)


def _ask(metric: str, record: Mapping[str, Any], text: str) -> Asked:
    """A question about a record's image, in the prompt of its source."""
    template = TEMPLATES[record["source"].lower()]
    return Asked(metric, text, record["answer"], record["image"], template=template)


COMPREHEND_EDIT = Layout(
    "comprehend_edit",
    "ComprehendEdit",
    _KNOWN,
    ("Category", *_LISTS["kgi"], *_LISTS["kpi"]),
    _read,
    _find_problems,
    _describe,
)
