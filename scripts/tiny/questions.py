"""The questions about a scene in their wordings, and plausible wrong answers.

Each kind of question has paraphrases for training, and others that no backbone is trained on: the
benchmark's rephrased prompts. Their wordings are such that both backbones understand them on images of
common objects (``tests/test_tiny.py`` checks this). A wording that a backbone cannot read at all would
measure its language, not an edit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scripts.tiny.scenes import CATEGORIES, CATEGORY, COLOR_NAMES, FREQUENCY, NAMES, OBJECTS, Scene

VQA_TEMPLATE = "Question: {} Short answer:"
PLURAL = {"cherries", "fries", "grapes", "scissors", "glasses", "gloves", "socks", "jeans", "dice"}
MASS = {"bread", "broccoli", "corn", "cheese", "sushi", "garlic", "bowling", "ice cream"}

TRAINED: dict[str, tuple[str, ...]] = {
    "what": (
        "What is this?", "What is shown in the picture?", "What object is in the image?",
        "Which thing can you see here?", "What does the picture show?", "What is depicted?",
        "Which object is this?", "What do you see in the image?",
    ),
    "left": (
        "What is on the left?", "What is on the left side of the image?", "Which object is on the left?",
        "What can be seen at the left of the picture?", "What is the object to the left?",
        "What do you see on the left side?", "Which thing is at the left?",
    ),
    "right": (
        "What is on the right?", "What is on the right side of the image?", "Which object is on the right?",
        "What can be seen at the right of the picture?", "What is the object to the right?",
        "What do you see on the right side?", "Which thing is at the right?",
    ),
    "count": (
        "How many objects are there?", "How many things are in the picture?",
        "What is the number of objects?",
        "How many items can you see?", "Count the objects in the image.",
        "How many objects does the image show?",
    ),
    "color": (
        "What color is the background?", "Which color is behind the objects?",
        "What is the background color?",
        "What color does the background have?", "The background has what color?",
        "Which color is the background?",
    ),
    "category": (
        "What {x} is in the picture?", "Which {x} can be seen?", "What kind of {x} is shown?",
        "What is the {x} in this image?", "Which {x} does the image show?", "What {x} do you see here?",
    ),
    "yesno": (
        "Is there {ax} in the picture?", "Can you see {ax}?", "Does the image show {ax}?",
        "Is {ax} visible here?", "Do you see {ax} in this image?",
    ),
    "caption": ("a photo of", "an image of", "a picture of", "a photograph of", "this is a photo of",
        "here you see"),
}  # fmt: skip
HELD_OUT: dict[str, tuple[str, ...]] = {
    "what": ("What can be seen in this picture?", "Which object does the image show?",
        "What is visible here?"),
    "left": ("Which object can you see at the left?", "What is shown on the left of the image?",
             "What does the left side of the picture show?"),
    "right": ("Which object can you see at the right?", "What is shown on the right of the image?",
              "What does the right side of the picture show?"),
    "count": ("How many things can you see?", "What number of objects does the picture show?",
              "How many items are in the image?"),
    "color": ("Which color does the background have?", "What is the color behind the objects?",
              "In what color is the background?"),
    "category": ("What kind of {x} can you see?", "Which {x} is shown in the image?",
        "What {x} is depicted here?"),
    "yesno": ("Is {ax} shown in the picture?", "Does the picture show {ax}?", "Is there {ax} in this image?"),
    "caption": ("this is a picture of", "this is an image of", "here is a photo of"),
}  # fmt: skip
WEIGHT = {"count": 0.6, "color": 0.7, "caption": 1.6, "what": 1.6, "left": 1.3, "right": 1.3,
          "category": 1.2, "yesno": 0.9}  # fmt: skip


def add_article(noun: str) -> str:
    """The noun with its indefinite article, if it takes one."""
    if noun in PLURAL or noun in MASS:
        return noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


@dataclass(frozen=True)
class SceneFact:
    """A true statement about a scene: the kind of question, its argument, the answer."""

    kind: str
    argument: str | None
    answer: str

    def format_prompt(self, paraphrase: str) -> str:
        """The paraphrase with this fact's argument, inside the benchmark's template."""
        words = self.format_question(paraphrase)
        return words if self.kind == "caption" else VQA_TEMPLATE.format(words)

    def format_question(self, paraphrase: str) -> str:
        noun = self.argument or ""
        return paraphrase.format(x=noun, ax=add_article(noun) if noun else "")

    def ask(self, rng: np.random.Generator, held_out: bool = False) -> str:
        """A prompt for this fact in one of its wordings, drawn at random."""
        return self.format_prompt(str(rng.choice((HELD_OUT if held_out else TRAINED)[self.kind])))


def write_caption(scene: Scene) -> str:
    return " next to ".join(add_article(n) for n in scene.names) + f" on a {scene.color} background"


def list_facts(scene: Scene, rng: np.random.Generator) -> list[SceneFact]:
    """Every fact of a scene; one yes/no question, drawn at random."""
    names = scene.names
    categories = [CATEGORY[n] for n in names]
    facts = [
        SceneFact("count", None, ("one", "two")[len(names) - 1]),
        SceneFact("color", None, scene.color),
        SceneFact("caption", None, write_caption(scene)),
    ]
    if len(names) == 1:
        facts.append(SceneFact("what", None, names[0]))
    else:
        facts += [SceneFact("left", None, names[0]), SceneFact("right", None, names[1])]
    facts += [
        SceneFact("category", c, n)
        for n, c in zip(names, categories, strict=True)
        if categories.count(c) == 1
    ]
    pool = categories if rng.random() < 0.5 else list(CATEGORIES)
    asked = str(rng.choice(pool))
    facts.append(SceneFact("yesno", asked, "yes" if asked in categories else "no"))
    return facts


def sample_facts(scene: Scene, rng: np.random.Generator, count: int) -> list[SceneFact]:
    """Up to ``count`` different facts of a scene, drawn with the weights of ``WEIGHT``."""
    facts = list_facts(scene, rng)
    weight = np.array([WEIGHT[f.kind] for f in facts])
    chosen = rng.choice(len(facts), size=min(count, len(facts)), replace=False, p=weight / weight.sum())
    return [facts[i] for i in chosen]


def draw_counterfactual(fact: SceneFact, scene: Scene, rng: np.random.Generator) -> str:
    """A plausible answer that is not the true one."""
    if fact.kind == "count":
        return "one" if fact.answer == "two" else "two"
    if fact.kind == "yesno":
        return "no" if fact.answer == "yes" else "yes"
    if fact.kind == "color":
        return str(rng.choice([c for c in COLOR_NAMES if c != fact.answer]))
    if fact.kind == "caption":
        other = rng.choice(len(OBJECTS), size=len(scene.objects), replace=False, p=FREQUENCY)
        return write_caption(
            Scene(tuple(int(i) for i in other), scene.background, scene.placements, scene.jitter)
        )
    same = [n for n in NAMES if CATEGORY[n] == CATEGORY[fact.answer] and n != fact.answer]
    return str(rng.choice(same if rng.random() < 0.6 else [n for n in NAMES if n != fact.answer]))
