"""Edits that stand in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from unike.backbones.base import Backbone
from unike.edits.activity import Activity
from unike.edits.base import Edit, Inspection, Together
from unike.edits.content import Content, Shared
from unike.types import Query


class Shown(NamedTuple):
    """A text in a prompt, with the number of its tokens."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Fact:
    """An edit as text, and its demonstrations, the best first."""

    id: str
    fact: Shown
    demonstrations: tuple[Shown, ...] = ()


@dataclass
class PromptEdit(Edit):
    """Edits that stand in the prompt: what the model is asked changes, the model doesn't.

    Before a question come the last edit's demonstrations, the best last, then all facts in order. If
    they have more than ``room`` tokens, the worst demonstrations go first, then the oldest facts; the
    last fact stays.
    """

    kind = "prompt"
    facts: tuple[Fact, ...]
    room: int
    info: dict[str, Any] = field(default_factory=dict)

    def applied(self, backbone: Backbone) -> AbstractContextManager[None]:
        return nullcontext()

    def rewrite(self, query: Query) -> Query:
        shown = "".join(piece.text for piece in reversed(self.shown()))
        return replace(query, prompt=f"{shown}Prompt: {query.prompt}")

    def shown(self) -> list[Shown]:
        """What has room before a question, nearest to it first: facts, then demonstrations."""
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

    def packed(self) -> Content:
        facts = [[f.id, list(f.fact), [list(d) for d in f.demonstrations]] for f in self.facts]
        return Content({"facts": facts, "room": self.room}, {})

    @classmethod
    def unpacked(cls, content: Content, backbone: Backbone, shared: Shared) -> PromptEdit:
        facts = [
            Fact(_text(name), _shown(fact), tuple(_shown(d) for d in demonstrations))
            for name, fact, demonstrations in content.value("facts", list)
        ]
        if not facts:
            raise ValueError("facts: expected one or more")
        return cls(tuple(facts), content.value("room", int))

    @property
    def units(self) -> tuple[Fact, ...]:
        return self.facts

    def describe_prompt(self, inspection: Inspection) -> tuple[Activity, ...]:
        return tuple(_describe_fact(fact, inspection.locate(fact)[0]) for fact in self.facts)

    def together(self, edits: Sequence[Edit]) -> Together | None:
        return PromptsTogether() if all(isinstance(e, PromptEdit) for e in edits) else None

    def joined(self, other: Edit) -> Edit | None:
        if not isinstance(other, PromptEdit):
            return None
        return PromptEdit(self.facts + other.facts, other.room, self.info | other.info)


def _describe_fact(fact: Fact, whole: Edit) -> Activity:
    assert isinstance(whole, PromptEdit)
    own = {id(piece) for piece in (fact.fact, *fact.demonstrations)}
    texts = tuple(piece.text for piece in whole.shown() if id(piece) in own)
    return Activity(bool(texts), shown=texts)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"facts: expected texts, got {type(value).__name__}")
    return value


def _shown(value: Any) -> Shown:
    text, tokens = value
    if type(tokens) is not int or tokens < 0:
        raise ValueError("facts: expected a number of tokens behind each text")
    return Shown(_text(text), tokens)


class PromptsTogether(Together):
    """Prompts that say what each row is asked under: the model is the same for all."""

    def applied(self, backbone: Backbone, owners: torch.Tensor) -> AbstractContextManager[None]:
        return nullcontext()
