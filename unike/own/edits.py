"""Edits as their user writes them: an image, a question, an answer, and what else to ask afterwards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unike.datasets.rows import name_fields, read_file, report_unknown_fields
from unike.system.text import one_line
from unike.types import UserError


@dataclass(frozen=True)
class OwnEdit:
    """One edit, without an image one of the language model alone.

    ``rephrase`` and ``rephrase_image`` should be answered as the question is. The answers to
    ``other_question`` about its image, to the question on ``other_image``, and to ``no_image_question``
    should stay.
    """

    image: str | None
    question: str
    answer: str
    rephrase: tuple[str, ...] = ()
    rephrase_image: tuple[str, ...] = ()
    other_question: tuple[str, ...] = ()
    other_image: tuple[str, ...] = ()
    no_image_question: str | None = None


# By what an edit holds, the field of a row; ``unike.datasets.rows.FIELDS`` has all names of each.
_TEXTS = {"rephrase": "rephrase_prompts", "other_question": "same_image_q"}
_IMAGES = {"rephrase_image": "rephrase_image", "other_image": "same_question_image"}


def pair_flags(images: Sequence[str], questions: Sequence[str], answers: Sequence[str]) -> list[OwnEdit]:
    """The edits of ``--image``, ``--question`` and ``--answer``, each given once for each edit; one image
    serves all questions, and none an edit of the language model alone. UserError where they do not fit."""
    problems = [
        f"--{name}: {len(values)} given; expected as many as --question, {len(questions)}"
        for name, values, allowed in (
            ("answer", answers, {len(questions)}),
            ("image", images, {0, 1, len(questions)}),
        )
        if len(values) not in allowed
    ]
    if not questions:
        problems = ["--question: is missing; expected --question and --answer, or a file (--edits)"]
    problems += [
        f"--{name}: is empty; expected a text"
        for name, values in (("question", questions), ("answer", answers))
        if any(not value.strip() for value in values)
    ]
    if problems:
        raise UserError(*problems)
    shown: list[str | None] = [*images]
    if len(images) < len(questions):
        shown = (shown or [None]) * len(questions)
    return [
        OwnEdit(image, question.strip(), answer.strip())
        for image, question, answer in zip(shown, questions, answers, strict=True)
    ]


def read_own_file(path: str, images: str | None = None) -> list[OwnEdit]:
    """The edits of a CSV, JSON or JSONL file. Relative images lie in the folder ``images``, by default the
    file's own.

    UserError with the problems of all rows.
    """
    rows = read_file(path)
    if images is not None and not os.path.isdir(images):
        raise UserError(f"--images {one_line(images)}: no such folder; expected the images")
    if not rows:
        raise UserError(f"{one_line(path)}: holds no record; expected one or more")
    report_unknown_fields(rows)
    root = Path(path).parent if images is None else Path(images)
    edits, problems = list[OwnEdit](), list[str]()
    for i, row in enumerate(rows):
        at = f"{one_line(path)}: record {i}"
        fields, wrong = name_fields(row, at)
        problems += wrong
        if not wrong:
            try:
                edits.append(_read_row(fields, root, at))
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*problems)
    return edits


def _read_row(fields: Mapping[str, object], root: Path, at: str) -> OwnEdit:
    problems: list[str] = []

    def read(name: str) -> tuple[str, ...]:
        """The texts of a field that holds one, or a list of them."""
        value = fields.get(name)
        given = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) and text.strip() for text in given):
            problems.append(f"{at}: {name}: expected a text")
            return ()
        return tuple(str(text).strip() for text in given)

    def locate(name: str) -> tuple[str, ...]:
        return tuple(_locate(image, root) for image in read(name))

    question, answer, image = read("prompt"), read("target"), locate("image")
    problems += (
        f"{at}: {name}: {len(values)} given; expected one"
        for name, values in (("image", image), ("question", question), ("answer", answer))
        if len(values) > 1
    )
    more = {name: read(field) for name, field in _TEXTS.items()}
    more |= {name: locate(field) for name, field in _IMAGES.items()}
    alone = read("text_prompt")
    if problems:
        raise UserError(*problems)
    return OwnEdit(
        image[0] if image else None,
        question[0],
        answer[0],
        **more,
        no_image_question=alone[0] if alone else None,
    )


def _locate(image: str, root: Path) -> str:
    """A relative path in ``root``, or else as it stands."""
    below = root / image
    return str(below) if os.path.isfile(below) else image
