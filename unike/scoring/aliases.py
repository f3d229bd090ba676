"""Further right answers, from a file of the user's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from unike.datasets.answers import normalise_answer
from unike.system.text import one_line
from unike.types import UserError


class Aliases(Mapping[str, tuple[str, ...]]):
    """By right answer, other ones that are as right; answers are found after VQA's normalisation."""

    def __init__(self, values: Mapping[str, tuple[str, ...]] | None = None) -> None:
        self._values: dict[str, tuple[str, ...]] = {}
        for answer, others in (values or {}).items():
            key = normalise_answer(answer)
            self._values[key] = (*self._values.get(key, ()), *others)

    def __getitem__(self, answer: str) -> tuple[str, ...]:
        return self._values[normalise_answer(answer)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def read_aliases(path: Path) -> Aliases:
    """The aliases of a JSON file: ``{"kangaroo": ["roo", "wallaby"]}``.

    Raises:
        UserError: in one line, for a file that is missing, no JSON, or of another shape.
    """
    expected = 'expected {"answer": ["alias", ...], ...}'
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise UserError(f"{path}: cannot be read as aliases: {one_line(fault, 120)}; {expected}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: {expected}")
    for answer, others in values.items():
        fine = isinstance(others, list) and all(isinstance(o, str) and o.strip() for o in others)
        if not fine or not answer.strip():
            raise UserError(f"{path}: {one_line(answer, 60)!r}: {expected}")
    return Aliases({answer: tuple(others) for answer, others in values.items()})
