"""Training examples for the language side of the toy models.

``plain``   a question or caption about a scene, or a fact about the world
``context`` the same after demonstrations in the prompt, often counterfactual: a demonstration of the
            question's own fact decides the answer, any other leaves it true
``latent``  a demonstration whose state at the last answer token is offered to the last layers instead
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scripts.tiny.facts import TextFact, list_text_facts
from scripts.tiny.questions import VQA_TEMPLATE, SceneFact, draw_counterfactual, list_facts, sample_facts
from scripts.tiny.scenes import Scene
from scripts.tiny.tokenizer import DEMONSTRATION


@dataclass(frozen=True)
class TrainingExample:
    """A prompt and its answer; ``scene`` indexes the pool, or is None for text alone."""

    scene: int | None
    prompt: str
    answer: str


@dataclass(frozen=True)
class LatentPair:
    """A demonstration, and a question that it answers if it is ``offered``."""

    demonstration: TrainingExample
    question: TrainingExample
    offered: bool


class Curriculum:
    """Draws training examples over a pool of scenes."""

    def __init__(self, scenes: list[Scene], seed: int) -> None:
        self.scenes = scenes
        self.rng = np.random.default_rng(seed)
        self.facts = list_text_facts()

    def _draw_scene(self) -> int:
        return int(self.rng.integers(len(self.scenes)))

    def _draw_text_fact(self) -> TextFact:
        return self.facts[int(self.rng.integers(len(self.facts)))]

    def _make_text_prompt(self, fact: TextFact) -> str:
        question = fact.ask(self.rng)
        return question if self.rng.random() < 0.7 else VQA_TEMPLATE.format(question)

    def _draw_other_answer(self, fact: TextFact) -> str:
        return str(self.rng.choice([f.answer for f in self.facts if f.kind == fact.kind]))

    def draw_plain(self, count: int) -> list[TrainingExample]:
        out: list[TrainingExample] = []
        while len(out) < count:
            i = self._draw_scene()
            facts = sample_facts(self.scenes[i], self.rng, 1)
            out += [TrainingExample(i, f.ask(self.rng), f.answer) for f in facts]
        return out

    def draw_plain_text(self, count: int) -> list[TrainingExample]:
        facts = [self._draw_text_fact() for _ in range(count)]
        return [TrainingExample(None, self._make_text_prompt(f), f.answer) for f in facts]

    def draw_context(self, count: int) -> list[TrainingExample]:
        return [self._draw_demonstrated() for _ in range(count)]

    def _draw_demonstrated(self) -> TrainingExample:
        i = self._draw_scene()
        scene, rng = self.scenes[i], self.rng
        facts = list_facts(scene, rng)
        asked = facts[int(rng.integers(len(facts)))]
        demos: list[tuple[str, str]] = []
        answer = asked.answer
        if rng.random() < 0.65:
            answer = asked.answer if rng.random() < 0.3 else draw_counterfactual(asked, scene, rng)
            demos.append((asked.ask(rng), answer))
        if not demos or rng.random() < 0.3:
            demos += self._draw_unrelated(scene, asked, facts)
        order = rng.permutation(len(demos))
        text = "\n".join(
            DEMONSTRATION.partition("\n")[0].format(fact=demos[k][0], answer=demos[k][1]) for k in order
        )
        prompt = asked.ask(rng)
        return TrainingExample(i, f"{text}\nPrompt: {prompt}" if demos else prompt, answer)

    def _draw_unrelated(
        self, scene: Scene, asked: SceneFact, facts: list[SceneFact]
    ) -> list[tuple[str, str]]:
        """A demonstration that must not change the answer, or none."""
        others = [f for f in facts if f.kind not in (asked.kind, "caption") and f.answer != asked.answer]
        if self.rng.random() < 0.5 and others:
            other = others[int(self.rng.integers(len(others)))]
            return [(other.ask(self.rng), draw_counterfactual(other, scene, self.rng))]
        fact = self._draw_text_fact()
        return [(self._make_text_prompt(fact), self._draw_other_answer(fact))]

    def draw_context_text(self, count: int) -> list[TrainingExample]:
        out = []
        for _ in range(count):
            fact, shown = self._draw_text_fact(), self._draw_text_fact()
            answer = fact.answer
            if self.rng.random() < 0.6:
                shown = fact
                answer = fact.answer if self.rng.random() < 0.3 else self._draw_other_answer(fact)
            said = answer if shown is fact else self._draw_other_answer(shown)
            if shown is not fact and (shown.kind, shown.subject) == (fact.kind, fact.subject):
                said = answer
            text = DEMONSTRATION.format(
                fact=self._make_text_prompt(shown), answer=said, prompt=self._make_text_prompt(fact)
            )
            out.append(TrainingExample(None, text, answer))
        return out

    def draw_latent(self, count: int) -> list[LatentPair]:
        out = []
        for _ in range(count):
            i = self._draw_scene()
            facts = list_facts(self.scenes[i], self.rng)
            asked = facts[int(self.rng.integers(len(facts)))]
            said = (
                asked.answer
                if self.rng.random() < 0.2
                else draw_counterfactual(asked, self.scenes[i], self.rng)
            )
            offered = bool(self.rng.random() < 0.8)
            question = TrainingExample(i, asked.ask(self.rng), said if offered else asked.answer)
            out.append(LatentPair(TrainingExample(i, asked.ask(self.rng), said), question, offered))
        return out

    def draw_latent_text(self, count: int) -> list[LatentPair]:
        out = []
        for _ in range(count):
            fact, offered = self._draw_text_fact(), bool(self.rng.random() < 0.8)
            said = self._draw_other_answer(fact)
            question = TrainingExample(None, self._make_text_prompt(fact), said if offered else fact.answer)
            out.append(
                LatentPair(TrainingExample(None, self._make_text_prompt(fact), said), question, offered)
            )
        return out
