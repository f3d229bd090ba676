"""An annotation file of any layout as the data doctor sees it: in MMEdit's terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from unike.datasets.benchmarks import list_asked, recognise_layout, view_as_annotation
from unike.datasets.images import PathLike
from unike.datasets.layout import Asked, Layout
from unike.datasets.lengths import LONG_TEXT, TextLimit, find_long_fields
from unike.datasets.mmedit import (
    IMAGE_FIELDS,
    KNOWN_FIELDS,
    Annotation,
    list_record_problems,
    list_unknown_fields,
    load_records,
)
from unike.types import Query


@dataclass(frozen=True)
class AuditedFile:
    """The ``records`` of a file as they are, and by their place in it, counted from 0, what is wrong with
    each (``problems``, empty for a sound one) and the ``sound`` ones in MMEdit's fields. ``images`` and
    ``find_long`` give a sound record's image names, and a line for each text that is too long."""

    title: str
    records: Sequence[object]
    problems: dict[int, list[str]]
    sound: dict[int, Annotation]
    known: Sequence[str]
    images: Callable[[int], list[str]]
    find_long: Callable[[int, TextLimit | None], list[str]]

    def list_unknown(self, index: int) -> list[str]:
        """A record's fields that are not read."""
        record = self.records[index]
        return list_unknown_fields(record, self.known) if isinstance(record, dict) else []


def open_audited(path: PathLike) -> AuditedFile:
    """The file, in the layout that its fields are of. UserError as its reader."""
    layout = recognise_layout(path)
    return _open_mmedit(path) if layout is None else _open(layout, path)


def _open_mmedit(path: PathLike) -> AuditedFile:
    records = load_records(path)
    problems = {index: list_record_problems(record, index) for index, record in enumerate(records)}
    sound = {i: cast(Annotation, record) for i, record in enumerate(records) if not problems[i]}
    return AuditedFile(
        "MMEdit",
        records,
        problems,
        sound,
        KNOWN_FIELDS,
        lambda i: [sound[i][key] for key in IMAGE_FIELDS if key in sound[i]],
        lambda i, limit: find_long_fields(cast(Any, sound[i]), limit),
    )


def _open(layout: Layout, path: PathLike) -> AuditedFile:
    joined = layout.read(path)
    problems = {index: layout.list_problems(one, index) for index, one in enumerate(joined)}
    found = {i: layout.describe(one) for i, one in enumerate(joined) if not problems[i]}
    return AuditedFile(
        layout.title,
        [one.record for one in joined],
        problems,
        {i: view_as_annotation(described) for i, described in found.items()},
        layout.known,
        lambda i: list(dict.fromkeys(a.image for a in list_asked(found[i]) if a.image is not None)),
        lambda i, limit: _find_long(list_asked(found[i]), limit),
    )


def _find_long(asked: Sequence[Asked], limit: TextLimit | None) -> list[str]:
    """As ``find_long_fields``, by the names of the metrics."""
    found: dict[str, str] = {}
    for one in asked:
        if limit is None:
            longest = max(one.text, one.answer, key=len)
            if len(longest) > LONG_TEXT:
                found.setdefault(longest, f"{one.metric}: {len(longest)} characters")
        elif (count := limit.measure(Query(one.image, one.text, one.answer))) is not None:
            line = f"{one.metric}: {count} tokens with its question; the model takes {limit.context}"
            found.setdefault(f"{one.text} {one.answer}", line)
    return list(found.values())
