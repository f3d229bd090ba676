"""What the page does, without its components: examples, asking, editing, undoing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from unike.datasets.images import open_image
from unike.datasets.mmedit import VQA_TEMPLATE, wrap_prompt
from unike.editor import MultimodalEditor
from unike.edits.explain import Explanation
from unike.system.text import one_line
from unike.types import Case, Expectation, Query, UserError

MOST_CHARACTERS = 500
FOLLOW_UPS = {
    "t_generality": "question rephrased",
    "m_generality": "image rephrased",
    "joint": "both",
    "same_question": "same question, another image",
    "same_image": "same image, another question",
    "m_locality": "another image and question",
    "t_locality": "no image",
}


@dataclass(frozen=True)
class Question:
    """A question that the page offers; ``about`` is its label. ``expect`` is what a good edit does to its
    answer: it gives ``right``, or leaves the answer unchanged."""

    about: str
    image: str | None
    text: str
    right: str
    expect: Expectation = "target"


@dataclass(frozen=True)
class EditExample:
    """A question that the model may get wrong, and the questions to ask after the edit."""

    question: Question
    follow_ups: tuple[Question, ...]


@dataclass(frozen=True)
class AttachedEdit:
    """An edit that is attached."""

    id: str
    question: str
    answer: str


class Desk:
    """One model with its edits, shared by everyone who has the page open; one call runs at a time."""

    def __init__(self, editor: MultimodalEditor, cases: Sequence[Case] = ()) -> None:
        self.editor = editor
        self.examples = [_make_example(case) for case in cases]
        self._turn = Lock()

    @property
    def edits(self) -> list[AttachedEdit]:
        """The attached edits, in order."""
        origins = [(edit.id, origin) for edit in self.editor.edits for origin in edit.origins]
        return [AttachedEdit(name, _strip_template(origin.prompt), origin.target) for name, origin in origins]

    def ask(self, image: str | None, question: str) -> Explanation:
        """The answers without and with the edits, and what was active; without an image the language model
        alone answers. UserError for an empty or overlong question and for a file that is no image."""
        _check_inputs(image, question=question)
        with self._turn:
            return self._ask(image, question)

    def edit(self, image: str | None, question: str, answer: str) -> Explanation:
        """Edits on top of the attached edits, then asks the same. UserError, with nothing changed, as in
        ``ask``, and also if there is no image or the edit fails."""
        if image is None:
            raise UserError("image: missing; choose one or upload one")
        _check_inputs(image, question=question, **{"right answer": answer})
        with self._turn:
            # An edit that fails leaves the former ones attached.
            metrics, _, _ = self.editor.edit(
                question.strip(), answer, image, template=VQA_TEMPLATE, sequential_edit=True
            )
            if error := metrics[0].get("error"):
                raise UserError(f"the edit failed: {error}")
            return self._ask(image, question)

    def undo(self, id: str | None) -> None:
        """Detaches one edit. UserError if it is not attached, or if none is named."""
        if id is None:
            raise UserError("edit: missing; choose the one to undo")
        with self._turn:
            self.editor.detach(id)

    def undo_all(self) -> None:
        """Detaches every edit."""
        with self._turn:
            for edit in reversed(self.editor.edits):
                self.editor.detach(edit.id)

    def _ask(self, image: str | None, question: str) -> Explanation:
        question = question.strip()
        return self.editor.ask(image, question if image is None else wrap_prompt(VQA_TEMPLATE, question))


def _make_example(case: Case) -> EditExample:
    query = case.request.query
    probes = {probe.name: probe for probe in case.probes}
    return EditExample(
        _make_question("the edit", query, "target"),
        tuple(
            _make_question(about, probes[name].query, probes[name].expect)
            for name, about in FOLLOW_UPS.items()
            if name in probes
        ),
    )


def _make_question(about: str, query: Query, expect: Expectation) -> Question:
    return Question(about, query.image, _strip_template(query.prompt), query.target or "", expect)


def _strip_template(prompt: str) -> str:
    """The question inside a prompt, or the whole prompt if it has no template."""
    start, end = VQA_TEMPLATE.split("{}")
    inside = prompt.startswith(start) and prompt.endswith(end)
    return prompt[len(start) : len(prompt) - len(end)] if inside else prompt


def _check_inputs(image: str | None, **texts: str) -> None:
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
            # The folder is the page's own: it means nothing to the user.
            name, path = one_line(Path(image).name), one_line(image)
            problems += [line.replace(path, name) for line in error.problems]
    if problems:
        raise UserError(*problems)
