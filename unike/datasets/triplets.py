"""Knowledge triplets: a question about an image, its right answer, and a wrong one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from unike.types import Case, Query


@dataclass(frozen=True)
class Triplet:
    """``(image, question, A_pos, A_neg)``; ``wrong`` is None where the model's own answer is wanted."""

    query: Query
    wrong: str | None

    @property
    def positive(self) -> Query:
        return self.query

    def negative(self, answer: str) -> Query:
        """The same question with a wrong answer."""
        return Query(self.query.image, self.query.prompt, answer)


def make_triplets(cases: Iterable[Case], limit: int | None = None) -> list[Triplet]:
    """One triplet per case, in order: the question, its ``alt``, and ``pred`` where it is known.

    Questions met before are left out, so that no state stands twice in the memory.
    """
    out: list[Triplet] = []
    seen: set[tuple[str, str, str | None]] = set()
    for case in cases:
        if limit is not None and len(out) >= limit:
            break
        query = case.request.query
        key = (str(query.image), query.prompt, query.target)
        if key in seen:
            continue
        seen.add(key)
        out.append(Triplet(query, case.request.wrong))
    return out
