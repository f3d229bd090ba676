"""Finished runs scored again from the answers that they kept: no model, and no torch.

scores = score_answers(read_records(folder), find_scorer("contains"))
write_added_scores(folder, "contains", scores, {...})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from unike.datasets.declarations import get_expectation
from unike.evaluation.by_name import combine_scores
from unike.evaluation.record import Answer, Record, Score
from unike.runs.added_scores import RecordKey, get_key
from unike.scoring.aliases import Aliases
from unike.scoring.scorers import Scorer


def score_answers(
    records: Sequence[Record], scorer: Scorer, aliases: Aliases | None = None
) -> dict[RecordKey, dict[str, Score]]:
    """By record and probe, its answers before and after the edit, scored.

    Where an edit must give the target, both are scored against it and its aliases: those of the record, and
    those of ``aliases``. Where it must change nothing, the answer after it is scored against the one before,
    which has 1. Several probes of one name are averaged, as in all modes. Left out are failed records, those
    that no decoded answer is known of, and probes without an answer or a target.
    """
    out = {}
    for record in records:
        if record.ok and "generated" in record.scores:
            pairs = [
                (name, *one)
                for name, first in record.answers.items()
                for answer in (first, *first.others)
                if (one := _score(name, answer, scorer, aliases or Aliases())) is not None
            ]
            if pairs:
                out[get_key(record)] = combine_scores(pairs)
    return out


def _score(name: str, answer: Answer, scorer: Scorer, aliases: Aliases) -> tuple[float, float] | None:
    """Before and after the edit."""
    before, after = answer.before, answer.after
    if before is None or after is None:
        return None
    if (answer.expect or get_expectation(name)) == "unchanged":
        return 1.0, scorer.score(after, [before])
    if answer.target is None:
        return None
    right = (answer.target, *answer.aliases, *aliases.get(answer.target, ()))
    return scorer.score(before, right), scorer.score(after, right)


def describe_form(records: Sequence[Record]) -> Mapping[str, Mapping[str, float]]:
    """The form of all decoded answers, ``before`` and ``after``: ``words``, their mean number, and in
    percent ``empty`` ones, those with a ``repeated`` word pair, and those that have the target in them and
    ``run_on`` after it. Empty where no answer was decoded."""
    texts: dict[str, list[tuple[str, str | None]]] = {"before": [], "after": []}
    for record in records:
        if not record.ok or "generated" not in record.scores:
            continue
        for name, first in record.answers.items():
            for answer in (first, *first.others):
                target = answer.target if (answer.expect or get_expectation(name)) == "target" else None
                for when, text in (("before", answer.before), ("after", answer.after)):
                    if text is not None:
                        texts[when].append((text, target))
    return {when: _describe(found) for when, found in texts.items() if found}


def _describe(texts: Sequence[tuple[str, str | None]]) -> dict[str, float]:
    words = [text.split() for text, _ in texts]
    asked = [(text, target) for text, target in texts if target is not None]
    run_on = [_runs_on(text, target) for text, target in asked]
    return {
        "words": sum(map(len, words)) / len(words),
        "empty": 100 * sum(not own for own in words) / len(words),
        "repeated": 100 * sum(map(repeats_pair, words)) / len(words),
        **({"run_on": 100 * sum(run_on) / len(run_on)} if run_on else {}),
    }


def repeats_pair(words: Sequence[str]) -> bool:
    """Whether a pair of words that follow each other occurs twice."""
    pairs = list(pairwise(words))
    return len(set(pairs)) < len(pairs)


def _runs_on(text: str, target: str) -> bool:
    own, wanted = text.split(), target.split()
    return own[: len(wanted)] == wanted and len(own) > len(wanted)
