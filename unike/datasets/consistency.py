"""Probes that need no data: made of a record's own question, target and old answer.

Whether the target is right, whether the old answer is, both negated, and which of the two is right, in both
orders. ``WORDINGS`` has every sentence. *Is Model Editing Built on Sand?* (arXiv 2510.00625) asks negated
questions of language models, SA-MCQ (arXiv 2604.05995) offers the new and the old answer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from unike.datasets.answers import normalise_answer
from unike.datasets.comprehend_edit import TEMPLATES
from unike.datasets.declarations import list_group
from unike.datasets.mmedit import VQA_TEMPLATE, CaseSequence, wrap_prompt
from unike.types import Case, Probe, Query

logger = logging.getLogger("unike")

QuestionKind = Literal["object", "question", "caption", "yes_no"]
Answer = Literal["new", "old"]
YES, NO = "yes", "no"
# The longest first: one may have another's ends.
_TEMPLATES = sorted({VQA_TEMPLATE, *TEMPLATES.values()}, key=len, reverse=True)
# "What is this?", "Which animal is this in the picture?": of other questions an answer need not name a thing.
_OBJECT = re.compile(
    r"(what|which|who)\b[\w\s'-]*\bis (this|that|it)( in (the|this) (image|picture|photo))?\s*\?*", re.I
)
_PARTS = re.compile(r"\{(new|old|question)\}")
_AUXILIARY = "is|are|was|were|do|does|did|has|have|had|can|could|will|would|should"
# A determiner after "this" makes it a pronoun: of "Is this man old?" the subject is longer.
_POLAR = re.compile(
    rf"((?:{_AUXILIARY}) (?:there|it|he|she|they|(?:this|that|these|those)(?= (?:an?|the)\b)))\b "
    r"(?!not\b)(\S.*)",
    re.I | re.S,
)


@dataclass(frozen=True)
class Wording:
    """A question of a metric, for questions of some ``kinds``.

    ``text`` has ``{new}``, ``{old}`` and ``{question}`` in it. A good edit ``gives`` yes, no, or the new
    answer; a model that holds the old answer gives the ``implied`` one.
    """

    metric: str
    kinds: tuple[QuestionKind, ...]
    text: str
    gives: Literal["yes", "no", "new"]
    implied: Literal["yes", "no", "old"]

    @property
    def needs_old(self) -> bool:
        """Whether it has the old answer in it."""
        return "{old}" in self.text


def _make_yes_no(kind: QuestionKind, affirmed: str, negated: str) -> tuple[Wording, ...]:
    """The four questions of a kind, of texts with ``{}`` for the answer."""
    return (
        Wording("affirmed_new", (kind,), affirmed.replace("{}", "{new}"), "yes", "no"),
        Wording("affirmed_old", (kind,), affirmed.replace("{}", "{old}"), "no", "yes"),
        Wording("negated_new", (kind,), negated.replace("{}", "{new}"), "no", "yes"),
        Wording("negated_old", (kind,), negated.replace("{}", "{old}"), "yes", "no"),
    )


_ASKED: tuple[QuestionKind, ...] = ("object", "question", "yes_no")
WORDINGS: tuple[Wording, ...] = (
    *_make_yes_no("object", "Is this {}?", "Is this not {}?"),
    *_make_yes_no(
        "question",
        'Is "{}" the right answer to "{question}"?',
        'Is "{}" not the right answer to "{question}"?',
    ),
    *_make_yes_no("caption", "Does this caption fit: {}?", "Does this caption not fit: {}?"),
    Wording("choice", _ASKED, "{question} Choose one: {new} or {old}?", "new", "old"),
    Wording("choice", _ASKED, "{question} Choose one: {old} or {new}?", "new", "old"),
    Wording("choice_neither", _ASKED, "{question} Choose one: {new}, {old} or neither?", "new", "old"),
    Wording("choice_neither", _ASKED, "{question} Choose one: {old}, {new} or neither?", "new", "old"),
    Wording("choice", ("caption",), "Which caption fits: {new} or {old}?", "new", "old"),
    Wording("choice", ("caption",), "Which caption fits: {old} or {new}?", "new", "old"),
    Wording("choice_neither", ("caption",), "Which caption fits: {new}, {old} or neither?", "new", "old"),
    Wording("choice_neither", ("caption",), "Which caption fits: {old}, {new} or neither?", "new", "old"),
)


def choose_kind(case: Case, question: str) -> QuestionKind:
    """Which wordings a record's question takes."""
    if case.task == "caption":
        return "caption"
    if normalise_answer(str(case.request.query.target)) in (YES, NO):
        return "yes_no"
    shown = case.request.query.image is not None
    return "object" if shown and _OBJECT.fullmatch(question) else "question"


def negate_question(question: str) -> str | None:
    """A yes/no question with "not" after its subject; None where the subject's end is not known."""
    found = _POLAR.fullmatch(question.strip())
    return None if found is None else f"{found[1]} not {found[2]}"


def make_consistency_probes(case: Case) -> list[Probe]:
    """The probes of a case, on its edit's image; several of a name are averaged by whoever scores them.

    Left out is what cannot be asked: the old answer where it is not known or equals the target, the negated
    question where ``negate_question`` finds none.
    """
    query, old = case.request.query, case.request.wrong
    new = str(query.target)
    template, question = _split_prompt(query.prompt)
    kind = choose_kind(case, question)
    if case.task == "caption":
        template = VQA_TEMPLATE
    if old is not None and (not old.strip() or normalise_answer(old) == normalise_answer(new)):
        old = None

    def make(metric: str, text: str, gives: str, implied: str | None) -> Probe:
        asked = Query(query.image, wrap_prompt(template, text), gives)
        return Probe(metric, asked, "target", implied=implied)

    probes = []
    for wording in WORDINGS:
        if kind not in wording.kinds or (wording.needs_old and old is None):
            continue
        parts = {"new": new, "old": str(old).strip(), "question": question}
        text = "".join(parts.get(part, part) for part in _PARTS.split(wording.text))
        answers = {"yes": YES, "no": NO, "new": new, "old": old}
        probes.append(make(wording.metric, text, str(answers[wording.gives]), answers[wording.implied]))
    if kind == "yes_no" and (negated := negate_question(question)) is not None:
        right = normalise_answer(new)
        probes.append(make("negated_question", negated, NO if right == YES else YES, right))
    return probes


def _split_prompt(prompt: str) -> tuple[str, str]:
    """The template of a prompt's further questions, and the question in it. What a template says of its own
    questions beyond that they are short does not hold for others."""
    for template in _TEMPLATES:
        start, end = (part.strip() for part in template.split("{}"))
        inner = prompt.strip().removeprefix(start).removesuffix(end).strip()
        is_whole = prompt.strip().startswith(start) and prompt.strip().endswith(end)
        if (start or end) and is_whole and inner:
            return VQA_TEMPLATE, inner
    return "{}", prompt.strip()


def add_consistency_probes(case: Case) -> Case:
    """The case with its probes of consistency after its own; as it is where it has some."""
    known = set(list_group("consistency"))
    if any(probe.name in known for probe in case.probes):
        return case
    return replace(case, probes=(*case.probes, *make_consistency_probes(case)))


class ConsistencyCases(CaseSequence):
    """Cases with their probes of consistency."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases = cases

    def __len__(self) -> int:
        return len(self._cases)

    def _make_case(self, position: int) -> Case:
        return add_consistency_probes(self._cases[position])

    def count_skipped(self) -> dict[str, int]:
        """How many cases lack each metric of consistency, since it cannot be asked of them."""
        made = [{probe.name for probe in case.probes} for case in self]
        missing = {name: sum(name not in own for own in made) for name in list_group("consistency")}
        return {name: n for name, n in missing.items() if n}


def ask_consistency(cases: Sequence[Case], where: str) -> Sequence[Case]:
    """The cases with their probes of consistency; what cannot be asked is counted in the log."""
    asked = ConsistencyCases(cases)
    if skipped := asked.count_skipped():
        listed = ", ".join(f"{name} {n}" for name, n in skipped.items())
        logger.warning(
            "%s: consistency_probes: of %d records, cannot be asked of: %s", where, len(asked), listed
        )
    return asked
