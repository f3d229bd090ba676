"""What the page does, without a page: examples, asking, editing, undoing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from unike.datasets.images import open_image
from unike.datasets.mmedit import VQA_TEMPLATE
from unike.editor import MultimodalEditor
from unike.edits.explain import Explanation
from unike.system.text import one_line
from unike.types import Case, Expectation, Query, UserError

MOST_CHARACTERS = 500
FOLLOW_UPS = {
    "t_generality": "question rephrased",
    "m_generality": "picture re-drawn",
    "joint": "both",
    "same_question": "same question, another picture",
    "same_image": "same picture, another question",
    "m_locality": "another picture and question",
    "t_locality": "no picture",
}


@dataclass(frozen=True)
class Question:
    """A question that the page offers; ``about`` says which, and ``expect`` what a good edit does to its
    answer: gives ``right``, or leaves it unchanged."""

    about: str
    image: str | None
    text: str
    right: str
    expect: Expectation = "target"


@dataclass(frozen=True)
class Example:
    """A question that the model may get wrong, and what to ask after the edit."""

    question: Question
    follow_ups: tuple[Question, ...]


@dataclass(frozen=True)
class InForce:
    """An edit that is attached."""

    id: str
    question: str
    answer: str


class Desk:
    """One model with its edits, for all who have the page open: they take turns."""

    def __init__(self, editor: MultimodalEditor, cases: Sequence[Case] = ()) -> None:
        self.editor = editor
        self.examples = [_example(case) for case in cases]
        self._turn = Lock()

    @property
    def edits(self) -> list[InForce]:
        """What is in force, in order."""
        origins = [(edit.id, origin) for edit in self.editor.edits for origin in edit.origins]
        return [InForce(name, _bare(origin.prompt), origin.target) for name, origin in origins]

    def ask(self, image: str | None, question: str) -> Explanation:
        """The answers without and with the edits, and what was active; without an image the language model
        alone is asked. UserError for an empty or overlong question and for a file that is no picture."""
        _check(image, question=question)
        with self._turn:
            return self._ask(image, question)

    def edit(self, image: str | None, question: str, answer: str) -> Explanation:
        """Edits on top of what is in force, then asks the same. UserError, with nothing changed, as ``ask``
        does, and where there is no image or the edit fails."""
        if image is None:
            raise UserError("picture: missing; choose one or upload one")
        _check(image, question=question, **{"right answer": answer})
        with self._turn:
            # An edit that fails leaves the former ones attached.
            metrics, _, _ = self.editor.edit(
                question.strip(), answer, image, template=VQA_TEMPLATE, keep_original_weight=False
            )
            if error := metrics[0].get("error"):
                raise UserError(f"the edit failed: {error}")
            return self._ask(image, question)

    def undo(self, id: str | None) -> None:
        """Takes one edit back. UserError where it is not in force, or none is named."""
        if id is None:
            raise UserError("edit: missing; choose the one to undo")
        with self._turn:
            self.editor.detach(id)

    def undo_all(self) -> None:
        """Takes every edit back."""
        with self._turn:
            for edit in reversed(self.editor.edits):
                self.editor.detach(edit.id)

    def _ask(self, image: str | None, question: str) -> Explanation:
        question = question.strip()
        return self.editor.ask(image, question if image is None else VQA_TEMPLATE.replace("{}", question))


def _example(case: Case) -> Example:
    query = case.request.query
    probes = {probe.name: probe for probe in case.probes}
    return Example(
        _question("the edit", query, "target"),
        tuple(
            _question(about, probes[name].query, probes[name].expect)
            for name, about in FOLLOW_UPS.items()
            if name in probes
        ),
    )


def _question(about: str, query: Query, expect: Expectation) -> Question:
    return Question(about, query.image, _bare(query.prompt), query.target or "", expect)


def _bare(prompt: str) -> str:
    """The question inside a prompt, which is the prompt itself where it stands alone."""
    start, end = VQA_TEMPLATE.split("{}")
    inside = prompt.startswith(start) and prompt.endswith(end)
    return prompt[len(start) : len(prompt) - len(end)] if inside else prompt


def _check(image: str | None, **texts: str) -> None:
    problems = []
    for name, text in texts.items():
        if not text.strip():
            problems.append(f"{name}: is empty; expected a text")
        elif len(text) > MOST_CHARACTERS:
            problems.append(f"{name}: {len(text)} characters; expected at most {MOST_CHARACTERS}")
    if image is not None:
        try:
            open_image(image)
        except UserError as error:
            # The folder is the page's own: it tells nobody anything.
            name, path = one_line(Path(image).name), one_line(image)
            problems += [line.replace(path, name) for line in error.problems]
    if problems:
        raise UserError(*problems)
