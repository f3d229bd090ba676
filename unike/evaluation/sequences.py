"""Sequences of edits, drawn from the data."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from unike.config.sections import ProtocolOptions
from unike.types import Case, UserError


def draw_run_sequences(hparams: ProtocolOptions, cases: Sequence[Case]) -> list[list[Case]]:
    """The sequences that the YAML's ``protocol`` draws; UserError where the data do not suffice."""
    _check_gap(hparams)
    try:
        draw = DRAWS[hparams.protocol]
        return draw(cases, hparams.sequence_length, hparams.sequences, hparams.seed)
    except UserError as error:
        raise UserError(*(f"{hparams.source}: {problem}" for problem in error.problems)) from None


def check_sequence_length(hparams: ProtocolOptions, count: int | None = None) -> None:
    """UserError for sequences that no data can have, or none of at most ``count`` records."""
    length = hparams.sequence_length
    if hparams.protocol == "cross_task" and length % 2:
        raise UserError(f"{hparams.source}: {_describe_odd(length)}")
    _check_gap(hparams)
    if count is not None and length > count:
        raise UserError(f"{hparams.source}: sequence_length: {length}; the data hold at most {count} records")


def _check_gap(hparams: ProtocolOptions) -> None:
    gap, length = hparams.gap, hparams.sequence_length
    if gap is not None and gap >= length:
        raise UserError(
            f"{hparams.source}: gap: {gap}; expected less than sequence_length, which is {length}"
        )


def _describe_odd(length: int) -> str:
    return f"sequence_length: {length}; expected an even number, half of it from each task"


def draw_sequences(cases: Sequence[Case], length: int, count: int, seed: int) -> list[list[Case]]:
    """``count`` sequences of ``length`` different cases. No case comes twice before all have come once.

    Raises UserError where there are too few cases for one sequence.
    """
    if len(cases) < length:
        raise UserError(f"sequence_length: {length}; the data hold {len(cases)} records")
    generator = random.Random(seed)
    return [[cases[i] for i in drawn] for drawn in _draw(range(len(cases)), length, count, generator)]


def draw_cross_task(cases: Sequence[Case], length: int, count: int, seed: int) -> list[list[Case]]:
    """``count`` sequences, each half E-VQA and half E-IC, in an order drawn by ``seed``.

    Raises UserError for an odd ``length``, and where a task has too few cases.
    """
    if length % 2:
        raise UserError(_describe_odd(length))
    tasks = [case.task for case in cases]
    generator = random.Random(seed)
    halves = []
    for task in ("vqa", "caption"):
        own = [i for i, name in enumerate(tasks) if name == task]
        if len(own) < length // 2:
            raise UserError(
                f"sequence_length: {length}; needs {length // 2} {task} records, the data hold {len(own)}"
            )
        halves.append(_draw(own, length // 2, count, generator))
    out = []
    for one, other in zip(*halves, strict=True):
        drawn = one + other
        generator.shuffle(drawn)
        out.append([cases[i] for i in drawn])
    return out


DRAWS: dict[str, Callable[[Sequence[Case], int, int, int], list[list[Case]]]] = {
    "sequential": draw_sequences,
    "cross_task": draw_cross_task,
}


def _draw(numbers: Sequence[int], length: int, count: int, generator: random.Random) -> list[list[int]]:
    out: list[list[int]] = []
    pool: list[int] = []
    for _ in range(count):
        drawn = pool[:length]
        pool = pool[length:]
        if len(drawn) < length:
            fresh = generator.sample(numbers, len(numbers))
            more = [i for i in fresh if i not in drawn][: length - len(drawn)]
            drawn += more
            pool = [i for i in fresh if i not in more]
        out.append(drawn)
    return out
