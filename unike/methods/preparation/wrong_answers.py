"""``A_neg`` of knowledge triplets: from the annotations, or the backbone's own wrong answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from unike.backbones.base import Backbone
from unike.datasets.answers import normalise_answer
from unike.datasets.triplets import Triplet
from unike.methods.preparation.batches import group_by_length
from unike.system import processes
from unike.system.progress import Tick, ignore_progress

# Where a wrong answer is from: the annotations' ``pred``, or the backbone.
FILE, OWN = "file", "own"


@dataclass(frozen=True)
class WrongAnswer:
    """A wrong answer, and where it is from."""

    text: str
    source: str


def collect_wrong_answers(
    backbone: Backbone,
    triplets: Sequence[Triplet],
    batch: int,
    tick: Tick = ignore_progress,
    a_neg: str = FILE,
) -> list[WrongAnswer | None]:
    """``A_neg`` of each triplet; None where there is none.

    ``file``: the triplet's own; where it names none, the backbone's greedy answer. ``own``: the backbone's
    greedy answer; where that is right or empty, the triplet's own. An answer counts as wrong if its normal
    form is not the right one's. Several processes share the batches; each gets all answers.
    """
    asked = [i for i, t in enumerate(triplets) if a_neg == OWN or t.wrong is None]

    # The answer is what is asked for: it has no part in a question's length.
    queries = [replace(triplets[i].query, target=None) for i in asked]
    batches = group_by_length(backbone, queries, batch)

    def ask(part: list[int]) -> list[str]:
        return backbone.generate([queries[i].image for i in part], [queries[i].prompt for i in part])

    parts = processes.spread(batches, ask, lambda p: tick("asking for wrong answers", len(p)))
    said = {
        asked[i]: text
        for part, texts in zip(batches, parts, strict=True)
        for i, text in zip(part, texts, strict=True)
    }
    return [_choose(triplet, said.get(i)) for i, triplet in enumerate(triplets)]


def _choose(triplet: Triplet, said: str | None) -> WrongAnswer | None:
    """What the backbone ``said``, where it was asked and is wrong, else the triplet's own."""
    known = ((said, OWN), (triplet.wrong, FILE))
    right = normalise_answer(str(triplet.query.target))
    for text, source in known:
        if text is not None and text.strip() and normalise_answer(text) != right:
            return WrongAnswer(text, source)
    return None


def count_sources(found: Sequence[WrongAnswer | None]) -> dict[str, int]:
    """How many wrong answers are from the annotations (``file``) and from the backbone (``own``), and how
    many triplets were ``left_out``."""
    counts = Counter(None if wrong is None else wrong.source for wrong in found)
    return {FILE: counts[FILE], OWN: counts[OWN], "left_out": counts[None]}


def describe_sources(counts: Mapping[str, int] | None, a_neg: str) -> str:
    """One line on what ``count_sources`` counted; None: the knowledge was built before it was counted."""
    if counts is None:
        return f"A_neg: a_neg: {a_neg}; how many are of which source was not counted"
    return (
        f"A_neg: {counts[FILE]} from the annotations, {counts[OWN]} the backbone's own wrong answers; "
        f"{counts['left_out']} triplets without a wrong answer left out"
    )
