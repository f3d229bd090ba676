"""CCKEB's second edits: the field ``textual_edit``, and the composed question in ``port_new``.

A record is MMEdit's with ``textual_edit``: ``{"src", "rephrase", "pred", "alt", "loc", "loc_ans"}``, a fact
that the language model should know, without an image; ``alt`` may be a list, whose first text counts. Its
``port_new`` has one item of the type ``comp``, whose question on the edit's image needs both edits: its
target is the textual edit's ``alt``, as MemEIC (NeurIPS 2025) defines compositional reliability.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unike.datasets.vlkeb import FIELD as PORTABILITY_FIELD
from unike.datasets.vlkeb import AskedAfter, Consequence, SecondEdit, is_text
from unike.system.text import describe_value

FIELD = "textual_edit"
COMPOSED = "comp"
_TEXTS = ("src", "rephrase", "alt", "loc", "loc_ans")


def find_textual_edit_problem(record: Mapping[str, object], longest: int) -> str | None:
    """What is wrong with a record's ``textual_edit``; None for a sound one, or none. ``longest``: characters
    of a text."""
    if FIELD not in record:
        return None
    edit = record[FIELD]
    if not isinstance(edit, dict):
        return f"field {FIELD!r}: expected an object with {', '.join(_TEXTS)}, got {describe_value(edit)}"
    for name in _TEXTS:
        if not is_text(_get_first(edit.get(name)), longest):
            return f"field {FIELD!r}: {name}: expected a text of at most {longest} characters"
    if _find_composed(record) is None:
        return f"field {FIELD!r}: needs an item of the port_type {COMPOSED!r} in {PORTABILITY_FIELD!r}"
    return None


def _get_first(value: object) -> object:
    return value[0] if isinstance(value, list) and value else value


def _find_composed(record: Mapping[str, Any]) -> str | None:
    items = record.get(PORTABILITY_FIELD)
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and item.get("port_type") == COMPOSED and isinstance(item.get("Q&A"), dict):
            question = item["Q&A"].get("Question")
            return question if isinstance(question, str) else None
    return None


def find_second_edit(record: Mapping[str, Any]) -> SecondEdit | None:
    """A sound record's textual edit, with what is asked after it."""
    edit = record.get(FIELD)
    composed = _find_composed(record)
    if edit is None or composed is None:
        return None
    texts = {name: str(_get_first(edit[name])).strip() for name in _TEXTS}
    answer = texts["alt"]
    return SecondEdit(
        Consequence(texts["src"], answer),
        (
            AskedAfter("second_reliability", Consequence(texts["src"], answer)),
            AskedAfter("second_generality", Consequence(texts["rephrase"], answer)),
            AskedAfter("second_locality", Consequence(texts["loc"], texts["loc_ans"])),
            AskedAfter("compositional_reliability", Consequence(composed, answer), on_image=True),
        ),
    )
