"""Edits that are texts in the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from unike.backbones.base import Backbone
from unike.backbones.hooks import guard
from unike.edits.activity import Activity
from unike.edits.base import Edit, EditBatch, Inspection
from unike.edits.content import Content
from unike.edits.shares import Shared
from unike.types import Query


class PromptText(NamedTuple):
    """A text in a prompt, with the number of its tokens."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Fact:
    """An edit as text, with its demonstrations, the best one first."""

    id: str
    fact: PromptText
    demonstrations: tuple[PromptText, ...] = ()


@dataclass
class PromptEdit(Edit):
    """Edits that are texts in the prompt: the prompt changes, the model does not.

    A question is preceded by the last edit's demonstrations, the best one last, then by all facts in order.
    Where these have more than ``room`` tokens, the worst demonstrations are left out first, then the oldest
    facts; the last fact stays.
    """

    kind = "prompt"
    facts: tuple[Fact, ...]
    room: int
    info: dict[str, object] = field(default_factory=dict)

    def applied(self, backbone: Backbone) -> AbstractContextManager[None]:
        return show_in_prompts(backbone, self._write_before())

    def rewrite(self, query: Query) -> Query:
        return replace(query, prompt=f"{self._write_before()}{query.prompt}")

    def _write_before(self) -> str:
        """What stands before each prompt."""
        shown = "".join(piece.text for piece in reversed(self.select_texts()))
        return f"{shown}Prompt: "

    def select_texts(self) -> list[PromptText]:
        """The texts that fit before a question, nearest to it first: facts, then demonstrations."""
        if not self.facts:
            return []
        newest = self.facts[-1]
        pieces = [*(f.fact for f in reversed(self.facts)), *newest.demonstrations]
        room, used = self.room - newest.fact.tokens, 1
        for piece in pieces[1:]:
            room -= piece.tokens
            if room < 0:
                break
            used += 1
        return pieces[:used]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def pack(self) -> Content:
        facts = [[f.id, list(f.fact), [list(d) for d in f.demonstrations]] for f in self.facts]
        return Content({"facts": facts, "room": self.room}, {})

    @classmethod
    def unpack(cls, content: Content, backbone: Backbone, shared: Shared) -> PromptEdit:
        facts = [
            Fact(_require_text(name), _parse_text(fact), tuple(_parse_text(d) for d in demonstrations))
            for name, fact, demonstrations in content.take_value("facts", list)
        ]
        if not facts:
            raise ValueError("facts: expected one or more")
        return cls(tuple(facts), content.take_value("room", int))

    @property
    def units(self) -> tuple[Fact, ...]:
        return self.facts

    def describe_prompt(self, inspection: Inspection) -> tuple[Activity, ...]:
        return tuple(_describe_fact(fact, inspection.locate(fact)[0]) for fact in self.facts)

    def batch(self, edits: Sequence[Edit]) -> EditBatch | None:
        return PromptBatch() if all(isinstance(e, PromptEdit) for e in edits) else None

    def keep_units(self, units: Sequence[Fact]) -> Edit | None:
        return PromptEdit(tuple(units), self.room, self.info)

    def join(self, other: Edit) -> Edit | None:
        if not isinstance(other, PromptEdit):
            return None
        return PromptEdit(self.facts + other.facts, other.room, self.info | other.info)


@contextmanager
def show_in_prompts(backbone: Backbone, text: str) -> Iterator[None]:
    """Inside the block the backbone's ``generate`` puts ``text`` before each prompt that lacks it.

    A model that is called by itself, which would answer without the text, raises UserError.
    """

    def rewrite(prompt: str) -> str:
        return prompt if text in prompt else text + prompt

    prompts, last = backbone.prompt, backbone.layout.layer(len(backbone.layout) - 1)
    with guard(last, prompts.require_announced):
        prompts.rewriters.append(rewrite)
        try:
            yield
        finally:
            prompts.rewriters.remove(rewrite)


def _describe_fact(fact: Fact, whole: Edit) -> Activity:
    assert isinstance(whole, PromptEdit)
    own = {id(piece) for piece in (fact.fact, *fact.demonstrations)}
    texts = tuple(piece.text for piece in whole.select_texts() if id(piece) in own)
    return Activity(bool(texts), shown=texts)


def _require_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"facts: expected texts, got {type(value).__name__}")
    return value


def _parse_text(value: object) -> PromptText:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError("facts: expected pairs of a text and its number of tokens")
    text, tokens = value
    if type(tokens) is not int or tokens < 0:
        raise ValueError("facts: expected a number of tokens after each text")
    return PromptText(_require_text(text), tokens)


class PromptBatch(EditBatch):
    """Each row's prompt has its own edit's texts: the model is the same for all."""

    def applied(self, backbone: Backbone, owners: torch.Tensor) -> AbstractContextManager[None]:
        return nullcontext()
