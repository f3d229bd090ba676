"""Scorers: by name, how right a free answer is, given the answers that are right.

A scorer compares an answer with one reference and gives a number from 0 to 1. Of several references, a
target and its aliases, the best counts. Where an edit must leave an answer unchanged, the reference is the
answer before it.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from unike.datasets.answers import normalise_answer
from unike.system.text import one_line
from unike.types import UserError

Compare = Callable[[str, str], float]
NAME_LENGTH, TITLE_LENGTH = 60, 60
# The evaluation modes that every run may have.
RESERVED = ("teacher_forced", "generated")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Scorer:
    """How right an answer is: ``compare(answer, reference)`` gives a number from 0 to 1.

    ``name`` is the evaluation mode that its scores are kept under, ``title`` what tables call it, ``source``
    who defined it.

    Raises:
        UserError: with a line for each field that is not as said.
    """

    name: str
    title: str
    compare: Compare
    source: str = ""

    def __post_init__(self) -> None:
        wrong = [*check_mode(self.name, self.title)]
        if not callable(self.compare):
            wrong.append(f"scorer {self.name!r}: compare: expected a function of an answer and a reference")
        if not isinstance(self.source, str):
            wrong.append(f"scorer {self.name!r}: source: expected a text")
        if wrong:
            raise UserError(*wrong)

    def score(self, answer: str, references: Iterable[str]) -> float:
        """The best of the answer's scores over the ``references``.

        Raises:
            ValueError: without a reference, and where ``compare`` gives no number from 0 to 1.
        """
        values = [float(self.compare(answer, reference)) for reference in references]
        if not values:
            raise ValueError("an answer is scored against one reference or more")
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f"scorer {self.name}: gave {max(values)}; expected a number from 0 to 1")
        return max(values)


def check_mode(name: object, title: object) -> list[str]:
    """What is wrong with the name and the title of an evaluation mode, a line each."""
    at, wrong = f"scorer {name!r}", []
    if not isinstance(name, str) or not name.isidentifier() or len(name) > NAME_LENGTH:
        wrong.append(f"{at}: expected a name of letters, digits and _, of at most {NAME_LENGTH}")
    elif name in RESERVED:
        wrong.append(f"{at}: is an evaluation mode that runs have; expected another name")
    if not isinstance(title, str) or not title.strip() or len(title) > TITLE_LENGTH:
        wrong.append(f"{at}: title: expected a text of at most {TITLE_LENGTH} characters")
    return wrong


# ---------------------------------------------------------------- definitions


def compare_exactly(answer: str, reference: str) -> float:
    """1 where both are equal after ``normalise_answer``, else 0."""
    return float(normalise_answer(answer) == normalise_answer(reference))


def find_whole_words(answer: str, reference: str) -> float:
    """1 where the reference stands in the answer as adjacent whole words, after ``normalise_answer``.

    "two" is in "there are two dogs", "cat" is not in "category". An empty reference is in an empty answer
    alone.
    """
    words, wanted = (normalise_answer(text).split() for text in (answer, reference))
    if not wanted:
        return float(not words)
    starts = range(len(words) - len(wanted) + 1)
    return float(any(words[i : i + len(wanted)] == wanted for i in starts))


def normalise_squad(text: str) -> list[str]:
    """The words of a text as SQuAD compares them: lower case, without ASCII punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def compute_token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words that both share, as often as both have them.

    Where one of the two has no words, 1 if neither has, else 0, as in SQuAD 2.0.
    """
    words, wanted = normalise_squad(answer), normalise_squad(reference)
    if not words or not wanted:
        return float(words == wanted)
    shared = (Counter(words) & Counter(wanted)).total()
    return 2 * shared / (len(words) + len(wanted))


def split_words(text: str) -> list[str]:
    """The runs of letters and digits of a text, in lower case."""
    return _WORD.findall(text.lower())


def compute_rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words: ROUGE-L with equal weights, beta 1.

    With ``m`` words in the reference and ``n`` in the answer, recall is LCS / m and precision LCS / n. Where
    one of the two has no words, 1 if neither has, else 0.
    """
    words, wanted = split_words(answer), split_words(reference)
    if not words or not wanted:
        return float(words == wanted)
    return 2 * measure_common_subsequence(words, wanted) / (len(words) + len(wanted))


def measure_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest sequence of items that both have in this order, with others between."""
    # Row by row of the table of prefixes; only the row before is needed.
    row = [0] * (len(other) + 1)
    for item in one:
        former, row = row, [0]
        for i, candidate in enumerate(other):
            row.append(former[i] + 1 if item == candidate else max(former[i + 1], row[i]))
    return row[-1]


# ---------------------------------------------------------------- by name

_BUILT_IN = (
    Scorer(
        "exact",
        "exact match",
        compare_exactly,
        "equal after VQA's normalisation (Antol et al., ICCV 2015, and its evaluation code), as the "
        "evaluation mode `generated`",
    ),
    Scorer(
        "contains",
        "contains",
        find_whole_words,
        "the target or an alias as whole words, after VQA's normalisation; containment as Mallen et al. "
        "(ACL 2023) use it for open questions",
    ),
    Scorer(
        "token_f1",
        "token F1",
        compute_token_f1,
        "SQuAD (Rajpurkar et al., EMNLP 2016; no-answer rule of SQuAD 2.0, ACL 2018)",
    ),
    Scorer("rouge_l", "ROUGE-L", compute_rouge_l, "ROUGE-L (Lin, 2004), F-measure with beta 1"),
)
# The names of the scorers that this package has.
SCORERS: tuple[str, ...] = tuple(scorer.name for scorer in _BUILT_IN)
_KNOWN: dict[str, Scorer] = {scorer.name: scorer for scorer in _BUILT_IN}


def register_scorer(scorer: Scorer) -> Scorer:
    """Makes a scorer known by its name in this process, and gives it.

    Raises:
        UserError: if another one of that name is known. To register the same again does nothing.
    """
    known = _KNOWN.setdefault(scorer.name, scorer)
    if known != scorer:
        raise UserError(f"scorer {scorer.name!r}: is registered already; expected a name of its own")
    return scorer


def list_scorers() -> list[Scorer]:
    """All known scorers, those of this package first."""
    return list(_KNOWN.values())


def find_scorer(name: str) -> Scorer:
    """The scorer of that name.

    Raises:
        UserError: naming the nearest known one where there is none.
    """
    if name not in _KNOWN:
        near = difflib.get_close_matches(name, _KNOWN, 1, cutoff=0.0)[0]
        known = ", ".join(_KNOWN)
        raise UserError(
            f"scorer {one_line(name, 60)}: is unknown; the nearest one is {near}; expected one of {known}"
        )
    return _KNOWN[name]
