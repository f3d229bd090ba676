"""MMKE-Bench (Du et al., ICLR 2025): edits of entities, visual semantics and a user's own things.

Records are MMEdit's with ``knowledge_type`` (``entity_level``, ``visual_knowledge``, ``user_specific``),
whose target ``alt`` is free text of a paragraph, and with short questions about what it says: without an
image (``rel...``), on the edit's image and on the rephrased one (``m_rel...``). Records of entities and users
have two of each, with answers named ``rel_ans_1`` or ``rel_1_ans``; those of visual semantics have one, and
``image_rephrase_question`` for the rephrased image. ``port_new`` is as VLKEB's; of visual semantics and users
it is asked on ``one_hop_img``.

Read: the release's loader and trainer (MMKE-Bench-ICLR/MMKE-Bench, easyeditor/dataset/coco_caption.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unike.datasets import vlkeb
from unike.datasets.images import PathLike
from unike.datasets.layout import (
    Asked,
    Described,
    Joined,
    Layout,
    find_choice_problem,
    find_optional_problem,
    find_text_problems,
    strip_or_none,
)
from unike.datasets.mmedit import REQUIRED_FIELDS, TEXT_LENGTH, load_records

KIND = "knowledge_type"
ENTITY, VISUAL, USER = "entity_level", "visual_knowledge", "user_specific"
_KINDS = (ENTITY, VISUAL, USER)
_HOP_IMAGE, _REPHRASED_QUESTION = "one_hop_img", "image_rephrase_question"
# By kind: the fields of each question, and the names that its answer may have.
_PAIRS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "two": tuple(
        (f"{name}_{n}", (f"{name}_ans_{n}", f"{name}_{n}_ans")) for name in ("rel", "m_rel") for n in (1, 2)
    ),
    "one": (("rel", ("rel_ans",)), ("m_rel", ("m_rel_ans",))),
}
_KNOWN = (
    *REQUIRED_FIELDS,
    *("pred", KIND, "type_self", vlkeb.FIELD, _HOP_IMAGE, _REPHRASED_QUESTION),
    *(name for pairs in _PAIRS.values() for asked, answers in pairs for name in (asked, *answers)),
)


def _list_pairs(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The fields of each question and of its answer, which has the first of its names where it is missing."""
    pairs = _PAIRS["one" if record[KIND] == VISUAL else "two"]
    return [(asked, next((name for name in names if name in record), names[0])) for asked, names in pairs]


def _find_problems(joined: Joined) -> list[str | None]:
    record: Any = joined.record
    if (problem := find_choice_problem(record, KIND, _KINDS)) is not None:
        return [problem]
    needed = [*REQUIRED_FIELDS, *(name for pair in _list_pairs(record) for name in pair)]
    if record[KIND] != ENTITY:
        needed.append(_HOP_IMAGE)
    if record[KIND] == VISUAL:
        needed.append(_REPHRASED_QUESTION)
    return [
        *find_text_problems(record, needed, _KNOWN),
        find_optional_problem(record, "pred"),
        find_optional_problem(record, "type_self"),
        vlkeb.find_portability_problem(record, TEXT_LENGTH),
    ]


def _describe(joined: Joined) -> Described:
    record: Any = joined.record
    image, other, target = record["image"], record["image_rephrase"], record["alt"]
    probes = [
        Asked("reliability", record["src"], target, image),
        Asked("t_generality", record["rephrase"], target, image),
        Asked("m_generality", record["src"], target, other, is_rephrased=True),
        Asked("t_locality", record["loc"], record["loc_ans"], is_plain=True),
        Asked("m_locality", record["m_loc_q"], record["m_loc_a"], record["m_loc"]),
    ]
    for name, answer_name in _list_pairs(record):
        asked, answer = record[name], record[answer_name]
        if not name.startswith("m_"):
            probes.append(Asked("text_reliability", asked, answer, is_plain=True))
            continue
        probes.append(Asked("image_reliability", asked, answer, image))
        again = record[_REPHRASED_QUESTION] if record[KIND] == VISUAL else asked
        probes.append(Asked("image_generality", again, answer, other, is_rephrased=True))
    place = image if record[KIND] == ENTITY else record[_HOP_IMAGE]
    probes += [
        Asked(metric, *consequence, place) for metric, consequence in vlkeb.list_consequences(record).items()
    ]
    groups = {"knowledge": record[KIND]}
    if kind := strip_or_none(record.get("type_self")):
        groups["type"] = kind[:60]
    return Described(probes[0], strip_or_none(record.get("pred")), tuple(probes), groups)


def _read(path: PathLike) -> list[Joined]:
    return [Joined(record) for record in load_records(path)]


MMKE_BENCH = Layout(
    "mmke_bench", "MMKE-Bench", _KNOWN, (KIND,), _read, _find_problems, _describe, template="{}"
)
