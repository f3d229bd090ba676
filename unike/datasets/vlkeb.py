"""VLKEB's questions about an edit's consequences: the field ``port_new`` of its records.

A list of ``{"port_type": "2-hop", "Q&A": {"Question": ..., "Answer": ...}}``. Each is asked on the edit's
image, and should be answered with ``Answer`` after the edit. Of several of one number of hops the first is
asked, as VLKEB does.

Records of VLKEB's edit-one-hop file have ``{"port_edit_q", "port_edit_a", "port_q", "port_a"}`` there: a
second edit of what the language model knows, without an image, and a question on the edit's image that needs
both edits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unike.datasets.declarations import HOPS, PORTABILITY_METRICS
from unike.system.text import describe_value, is_unicode

FIELD = "port_new"
# In a record of the edit-one-hop file.
SECOND_EDIT_FIELDS = ("port_edit_q", "port_edit_a", "port_q", "port_a")
# Whether the second edit itself holds: a metric of these records, as is 1-hop portability.
SECOND_METRIC = "second_reliability"
COMPOSED_METRIC = PORTABILITY_METRICS[0]
_METRICS = {f"{hops}-hop": name for hops, name in zip(HOPS, PORTABILITY_METRICS, strict=True)}


class Consequence(NamedTuple):
    """A question about what follows from an edit, and its answer."""

    question: str
    answer: str


def find_portability_problem(
    record: Mapping[str, object], longest: int, further: Sequence[str] = ()
) -> str | None:
    """What is wrong with a record's ``port_new``; None for a sound one, or none. ``longest``: characters of a
    text; ``further``: types of questions that others ask."""
    if FIELD not in record:
        return None
    items = record[FIELD]
    if not isinstance(items, list):
        return f"field {FIELD!r}: expected a list, got {describe_value(items)}"
    for i, item in enumerate(items):
        at = f"field {FIELD!r}: number {i}"
        if isinstance(item, dict) and all(is_text(item.get(name), longest) for name in SECOND_EDIT_FIELDS):
            continue
        if not isinstance(item, dict) or not isinstance(item.get("Q&A"), dict):
            return f"{at}: expected an object with port_type and Q&A, or with {', '.join(SECOND_EDIT_FIELDS)}"
        kind = item.get("port_type")
        if not isinstance(kind, str) or kind not in (*_METRICS, *further):
            return f"{at}: port_type: expected {', '.join((*_METRICS, *further))}, got {describe_value(kind)}"
        for name in ("Question", "Answer"):
            if not is_text(item["Q&A"].get(name), longest):
                return f"{at}: Q&A: {name}: expected a text of at most {longest} characters"
    return None


def is_text(value: object, longest: int) -> bool:
    """Whether a value of a record is a text that can be asked."""
    return isinstance(value, str) and bool(value.strip()) and len(value) <= longest and is_unicode(value)


def list_consequences(record: Mapping[str, Any]) -> dict[str, Consequence]:
    """A sound record's questions by metric, by the number of hops."""
    found: dict[str, Consequence] = {}
    for item in record.get(FIELD, ()):
        if item.get("port_type") in _METRICS:
            asked = Consequence(item["Q&A"]["Question"], item["Q&A"]["Answer"].strip())
            found.setdefault(_METRICS[item["port_type"]], asked)
    return {name: found[name] for name in PORTABILITY_METRICS if name in found}


class AskedAfter(NamedTuple):
    """A question asked after both edits, of the metric of that name: on the edit's image, or without one."""

    metric: str
    asked: Consequence
    on_image: bool = False


class SecondEdit(NamedTuple):
    """A second edit, without an image, and what is asked after both."""

    edit: Consequence
    probes: tuple[AskedAfter, ...]


def find_second_edit(record: Mapping[str, Any]) -> SecondEdit | None:
    """A sound record's second edit, the first of several; None where it has none."""
    for item in record.get(FIELD, ()):
        if "Q&A" not in item:
            question, answer, asked, expected = (item[name].strip() for name in SECOND_EDIT_FIELDS)
            edit = Consequence(question, answer)
            composed = AskedAfter(COMPOSED_METRIC, Consequence(asked, expected), on_image=True)
            return SecondEdit(edit, (AskedAfter(SECOND_METRIC, edit), composed))
    return None
