"""What the language side of the tiny backbones is trained on.

``plain``   a question or caption about a scene, or a fact about the world
``context`` the same behind demonstrations in the prompt, often counterfactual: a demonstration about
            the asked fact decides the answer, any other leaves it true
``latent``  a demonstration whose last-answer state is offered to the last layers instead
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scripts.tiny.facts import TextFact, text_facts
from scripts.tiny.questions import VQA_TEMPLATE, Fact, counterfactual, facts_of, sample_facts
from scripts.tiny.scenes import Scene
from scripts.tiny.tokenizer import DEMONSTRATION


@dataclass(frozen=True)
class Example:
    """A prompt and its answer; ``scene`` indexes the pool, or is None for text alone."""

    scene: int | None
    prompt: str
    answer: str


@dataclass(frozen=True)
class LatentPair:
    """A demonstration, and a question that it answers if it is ``offered``."""

    demonstration: Example
    question: Example
    offered: bool


class Curriculum:
    """Draws training examples over a pool of scenes."""

    def __init__(self, scenes: list[Scene], seed: int) -> None:
        self.scenes = scenes
        self.rng = np.random.default_rng(seed)
        self.facts = text_facts()

    def _scene(self) -> int:
        return int(self.rng.integers(len(self.scenes)))

    def _text_fact(self) -> TextFact:
        return self.facts[int(self.rng.integers(len(self.facts)))]

    def _text_prompt(self, fact: TextFact) -> str:
        bare = fact.ask(self.rng)
        return bare if self.rng.random() < 0.7 else VQA_TEMPLATE.format(bare)

    def _other_text_answer(self, fact: TextFact) -> str:
        return str(self.rng.choice([f.answer for f in self.facts if f.kind == fact.kind]))

    def plain(self, count: int) -> list[Example]:
        out: list[Example] = []
        while len(out) < count:
            i = self._scene()
            facts = sample_facts(self.scenes[i], self.rng, 1)
            out += [Example(i, f.ask(self.rng), f.answer) for f in facts]
        return out

    def plain_text(self, count: int) -> list[Example]:
        facts = [self._text_fact() for _ in range(count)]
        return [Example(None, self._text_prompt(f), f.answer) for f in facts]

    def context(self, count: int) -> list[Example]:
        return [self._context() for _ in range(count)]

    def _context(self) -> Example:
        i = self._scene()
        scene, rng = self.scenes[i], self.rng
        facts = facts_of(scene, rng)
        asked = facts[int(rng.integers(len(facts)))]
        demos: list[tuple[str, str]] = []
        answer = asked.answer
        if rng.random() < 0.65:
            answer = asked.answer if rng.random() < 0.3 else counterfactual(asked, scene, rng)
            demos.append((asked.ask(rng), answer))
        if not demos or rng.random() < 0.3:
            demos += self._unrelated(scene, asked, facts)
        order = rng.permutation(len(demos))
        text = "\n".join(
            DEMONSTRATION.partition("\n")[0].format(fact=demos[k][0], answer=demos[k][1]) for k in order
        )
        prompt = asked.ask(rng)
        return Example(i, f"{text}\nPrompt: {prompt}" if demos else prompt, answer)

    def _unrelated(self, scene: Scene, asked: Fact, facts: list[Fact]) -> list[tuple[str, str]]:
        """A demonstration that must not change the answer, or none."""
        others = [f for f in facts if f.kind not in (asked.kind, "caption") and f.answer != asked.answer]
        if self.rng.random() < 0.5 and others:
            other = others[int(self.rng.integers(len(others)))]
            return [(other.ask(self.rng), counterfactual(other, scene, self.rng))]
        fact = self._text_fact()
        return [(self._text_prompt(fact), self._other_text_answer(fact))]

    def context_text(self, count: int) -> list[Example]:
        out = []
        for _ in range(count):
            fact, shown = self._text_fact(), self._text_fact()
            answer = fact.answer
            if self.rng.random() < 0.6:
                shown = fact
                answer = fact.answer if self.rng.random() < 0.3 else self._other_text_answer(fact)
            said = answer if shown is fact else self._other_text_answer(shown)
            if shown is not fact and (shown.kind, shown.subject) == (fact.kind, fact.subject):
                said = answer
            text = DEMONSTRATION.format(
                fact=self._text_prompt(shown), answer=said, prompt=self._text_prompt(fact)
            )
            out.append(Example(None, text, answer))
        return out

    def latent(self, count: int) -> list[LatentPair]:
        out = []
        for _ in range(count):
            i = self._scene()
            facts = facts_of(self.scenes[i], self.rng)
            asked = facts[int(self.rng.integers(len(facts)))]
            said = (
                asked.answer if self.rng.random() < 0.2 else counterfactual(asked, self.scenes[i], self.rng)
            )
            offered = bool(self.rng.random() < 0.8)
            question = Example(i, asked.ask(self.rng), said if offered else asked.answer)
            out.append(LatentPair(Example(i, asked.ask(self.rng), said), question, offered))
        return out

    def latent_text(self, count: int) -> list[LatentPair]:
        out = []
        for _ in range(count):
            fact, offered = self._text_fact(), bool(self.rng.random() < 0.8)
            said = self._other_text_answer(fact)
            question = Example(None, self._text_prompt(fact), said if offered else fact.answer)
            out.append(LatentPair(Example(None, self._text_prompt(fact), said), question, offered))
        return out
