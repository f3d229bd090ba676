"""How an answer is decoded: greedily, by beams, or drawn at random."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch

from unike.config.kinds import Kind, nullable, number, switch, whole
from unike.system.text import describe_value, unwrap_number
from unike.types import UserError

# More beams or answers than that are a mistake: each of them costs a row of the batch.
MOST_ROWS = 100
_KINDS: Mapping[str, Kind[object]] = {
    "max_new_tokens": nullable(whole(low=1)),
    "num_beams": whole(low=1, high=MOST_ROWS),
    "do_sample": switch(),
    # At lower ones the scores divided by it leave the numbers of float32.
    "temperature": number(low=1e-6),
    "top_p": number(low=0, high=1, above=True),
    "num_return_sequences": whole(low=1, high=MOST_ROWS),
    "seed": nullable(whole(low=0, high=2**32 - 1)),
}


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are decoded; greedily by default, whatever a checkpoint's own generation settings are.

    ``max_new_tokens``: most tokens of an answer, None: the backbone's own number. ``num_beams``: beams of a
    beam search. ``do_sample`` draws tokens, at a ``temperature`` of 1e-6 or more, from the most probable ones
    whose probabilities add up to ``top_p`` in (0, 1]; a ``seed`` makes what is drawn repeatable, and leaves
    torch's own random numbers as they are. ``num_return_sequences``: answers to each prompt.

    UserError with a line for each value that does not fit, and where values contradict each other.
    """

    max_new_tokens: int | None = None
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    num_return_sequences: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        problems = []
        for name, kind in _KINDS.items():
            value = unwrap_number(getattr(self, name))
            try:
                object.__setattr__(self, name, kind.read(value))
            except (ValueError, TypeError, OverflowError):
                problems.append(f"{name}: expected {kind.words}, got {describe_value(value)}")
        if problems := problems or list(self._list_contradictions()):
            raise UserError(*problems)

    def _list_contradictions(self) -> Iterator[str]:
        for name in ("temperature", "top_p"):
            if getattr(self, name) != 1 and not self.do_sample:
                yield f"{name}: {getattr(self, name):g} changes what is drawn; expected do_sample=True too"
        answers, beams = self.num_return_sequences, self.num_beams
        if answers > beams and (beams > 1 or not self.do_sample):
            other = "num_beams=1" if self.do_sample else "do_sample=True"
            yield (
                f"num_return_sequences: {answers} answers of {beams} beams; "
                f"expected {other}, or as many num_beams"
            )

    @classmethod
    def of(cls, max_new_tokens: int | None, options: Mapping[str, object]) -> Decoding:
        """From the keyword arguments of a ``generate``; UserError for an unknown name, too."""
        known = [field.name for field in fields(cls)]
        problems = []
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1, cutoff=0)
                problems.append(f"{name}: unknown to generate; the nearest known name is {near[0]}")
        if problems:
            raise UserError(*problems)
        return cls(max_new_tokens=max_new_tokens, **options)  # type: ignore[arg-type]

    def list_arguments(self, limit: int) -> dict[str, object]:
        """Arguments of transformers' ``generate``, for at most ``limit`` new tokens."""
        return {
            "do_sample": self.do_sample,
            "num_beams": self.num_beams,
            "num_return_sequences": self.num_return_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            # What is drawn is cut by top_p alone.
            "top_k": 0 if self.do_sample else 50,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "max_new_tokens": limit,
        }

    @contextmanager
    def draw(self) -> Iterator[None]:
        """Inside the block random numbers come from the ``seed``, where there is one."""
        if self.seed is None:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            yield
