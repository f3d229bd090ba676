"""Drawn scenes as a second source for the projector: as many as wanted, with places and colours.

Scenes, questions and wordings are the toys' (``scripts.tiny``); the drawings are OpenMoji's, CC BY-SA 4.0.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from scripts.real.views import Shown
from scripts.tiny.make_data import TEXTURES
from scripts.tiny.questions import HELD_OUT, TRAINED, SceneFact, list_facts
from scripts.tiny.scenes import Painter, Scene, sample_scene

# What the projector is asked about a scene; there are photographs for captions.
KINDS = ("what", "left", "right", "category", "color", "count")
_DRAWN = 64


@dataclass(frozen=True)
class DrawnScene:
    """A scene with its facts, and the image as ``Shown``."""

    scene: Scene
    facts: tuple[SceneFact, ...]
    shown: Shown


def group_facts(scenes: Sequence[DrawnScene]) -> dict[tuple[str, str | None], list[tuple[int, str]]]:
    """By question, its kind and argument: the numbers of the scenes that have it, with the answers."""
    groups: dict[tuple[str, str | None], list[tuple[int, str]]] = {}
    for row, scene in enumerate(scenes):
        for fact in scene.facts:
            groups.setdefault((fact.kind, fact.argument), []).append((row, fact.answer))
    return groups


def word_question(key: tuple[str, str | None], chooser: random.Random, held_out: bool = False) -> str:
    """The question in one of its wordings; with ``held_out`` in one that nothing is trained on."""
    wordings = (HELD_OUT if held_out else TRAINED)[key[0]]
    return SceneFact(key[0], key[1], "").format_prompt(chooser.choice(wordings))


def draw_scenes(count: int, seed: int, common: bool = False) -> list[DrawnScene]:
    """``count`` scenes, the same for the same seed; with ``common`` none of rare objects."""
    rng, scenes = np.random.default_rng([seed, 7]), list[Scene]()
    while len(scenes) < count:
        scene = sample_scene(rng)
        if not (common and scene.rare):
            scenes.append(scene)
    images = _Images(scenes)
    out = []
    for i, scene in enumerate(scenes):
        facts = tuple(f for f in list_facts(scene, rng) if f.kind in KINDS)
        out.append(DrawnScene(scene, facts, Shown(f"scene {scene}", lambda i=i: images.get(i))))
    return out


class _Images:
    """Drawn when they are asked for, ``_DRAWN`` at a time: features that are on disk need no drawing."""

    def __init__(self, scenes: list[Scene]) -> None:
        self.scenes, self._start = scenes, -1
        self._painter: Painter | None = None
        self._images: list[Image.Image] = []

    def get(self, number: int) -> Image.Image:
        start = number - number % _DRAWN
        if start != self._start:
            self._painter = self._painter or Painter(TEXTURES)
            self._images = self._painter.draw_images(self.scenes[start : start + _DRAWN])
            self._start = start
        return self._images[number - start]
