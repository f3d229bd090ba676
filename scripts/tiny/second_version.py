"""The bundled benchmark's version 2: probes that no training imitates, and records by group.

To version 1's fields it adds a file of further probes next to the annotations (``vqa_eval.probes.json``):

- ``minimal_pair``: the edit's question on an image with the same background, places and other object, where
  only the object asked about (for ``color`` the background, for ``count`` the number) is another one;
- ``same_object``: another question about the edited object, on the edited image;
- ``m_generality_STYLE``: the rephrased image, made warm, blurred, low in contrast, half gray or dark.

The toy models count objects and name backgrounds right nearly always. So a tenth of the eval records each are
``count`` and ``color`` edits towards an answer that is not true; their group is ``counterfactual``. Val has
half as many, before its other records: they are a fifth of the first records, which tuning edits.

Train and val show none of the ``UNSEEN`` objects, a fifth of all, and never use the last rephrased wording of
a question; each eval record says in its groups whether it has one of them, and its kind of question.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from scripts.tiny.make_data import CANDIDATES, Artist, Candidate, Style
from scripts.tiny.questions import HELD_OUT, TRAINED, SceneFact, list_facts
from scripts.tiny.scenes import (
    CATEGORY,
    COLOR_NAMES,
    FREQUENCY,
    NAMES,
    OBJECTS,
    Scene,
    sample_scene,
)
from unike.datasets.probe_files import FurtherProbe, RecordProbes, describe_probes
from unike.types import IMAGE_STYLES

COUNTERFACTUAL_SHARE = 0.1
# The kinds of question whose edits are counterfactual.
ALTERED = ("count", "color")
# Other numbers than scenes have.
COUNTS = ("three", "four", "five")
# Chosen by name, so that the split does not change with the order of the drawings.
UNSEEN = frozenset(i for i, name in enumerate(NAMES) if zlib.crc32(name.encode()) % 5 == 0)


def _tint(image: Image.Image, gains: tuple[float, float, float]) -> Image.Image:
    array = np.asarray(image, dtype=np.float32) * np.array(gains, dtype=np.float32)
    return Image.fromarray(np.clip(np.rint(array), 0, 255).astype(np.uint8))


STYLES: dict[str, Style] = {
    "warm": lambda image: _tint(image, (1.15, 1.0, 0.75)),
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(1.0)),
    "low_contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.5),
    "half_gray": lambda image: ImageEnhance.Color(image).enhance(0.5),
    "dark": lambda image: ImageEnhance.Brightness(image).enhance(0.5),
}
assert tuple(STYLES) == IMAGE_STYLES


class SecondArtist(Artist):
    """Draws a split of version 2."""

    version = 2

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.altered = self.rng.spawn(1)[0]
        self.further: dict[str, list[RecordProbes]] = {}

    def _sample_scene(self, objects: tuple[int, ...] | None = None) -> Scene:
        while True:
            scene = sample_scene(self.rng, objects)
            if self.split == "eval" or not UNSEEN & set(scene.objects):
                return scene
            # The objects that were asked for are what cannot be shown.
            objects = None

    def _draw_wording(self, kind: str) -> str:
        known = HELD_OUT[kind] if self.split == "eval" else HELD_OUT[kind][:-1]
        return str(self.rng.choice(known))

    def _draw_object(self, without: Scene, category: str | None = None, other_than: str | None = None) -> int:
        """An object that a scene does not have, of a ``category``, or of another one than ``other_than``."""
        allowed = [
            i
            for i, o in enumerate(OBJECTS)
            if i not in without.objects
            and (self.split == "eval" or i not in UNSEEN)
            and (category is None or o.category == category)
            and (other_than is None or o.category != other_than)
        ]
        weight = FREQUENCY[allowed]
        return int(self.rng.choice(allowed, p=weight / weight.sum()))

    # ------------------------------------------------------------ minimal pairs

    def draw_minimal_pair(self, c: Candidate) -> tuple[Scene, str]:
        """The scene in which only what the question asks about is another one, and its right answer."""
        scene, fact = c.scene, c.fact
        if fact.kind == "color":
            taken = {scene.color, fact.answer}
            choices = [i for i, name in enumerate(COLOR_NAMES) if name not in taken]
            background = int(self.rng.choice(choices))
            return replace(scene, background=background), COLOR_NAMES[background]
        if fact.kind == "count":
            return self._change_count(scene)
        if fact.kind == "yesno":
            return self._change_presence(scene, str(fact.argument), fact.answer)
        place = self._find_place(scene, fact)
        category = fact.argument if fact.kind == "category" else None
        new = _replace_object(scene, place, self._draw_object(scene, category))
        found = next(
            f for f in list_facts(new, self.rng) if (f.kind, f.argument) == (fact.kind, fact.argument)
        )
        return new, found.answer

    def _find_place(self, scene: Scene, fact: SceneFact) -> int:
        if fact.kind in ("left", "what"):
            return 0
        if fact.kind == "right":
            return 1
        if fact.kind == "category":
            return scene.names.index(fact.answer)
        return int(self.rng.integers(len(scene.objects)))

    def _change_count(self, scene: Scene) -> tuple[Scene, str]:
        """One object less, or one more, which needs places for two."""
        if len(scene.objects) == 2:
            kept = int(self.rng.integers(2))
            return replace(scene, objects=(scene.objects[kept],), placements=(scene.placements[kept],)), "one"
        objects = (scene.objects[0], self._draw_object(scene))
        drawn = sample_scene(self.rng, objects, scene.background)
        return replace(drawn, jitter=scene.jitter, disturbance=scene.disturbance), "two"

    def _change_presence(self, scene: Scene, category: str, answer: str) -> tuple[Scene, str]:
        """The object of the category is one of another, or one object is of the category."""
        if answer == "no":
            place = int(self.rng.integers(len(scene.objects)))
            return _replace_object(scene, place, self._draw_object(scene, category)), "yes"
        for place, name in enumerate(scene.names):
            if CATEGORY[name] == category:
                scene = _replace_object(scene, place, self._draw_object(scene, other_than=category))
        return scene, "no"

    # ------------------------------------------------------------ records

    def collect(self, task: str, count: int) -> list[Candidate]:
        """As version 1, with a share of counterfactual edits in eval, in val half of it before the others."""
        if self.split == "train" or task != "vqa":
            return super().collect(task, count)
        share = int(count * COUNTERFACTUAL_SHARE)
        if self.split == "eval":
            kept = super().collect(task, count - 2 * share)
            return kept + [c for kind in ALTERED for c in self._draw_counterfactuals(task, kind, share)]
        # By a generator of their own: the other records of val are drawn as if these were not there.
        with self._use_rng(self.altered):
            drawn = [self._draw_counterfactuals(task, kind, share // 2) for kind in ALTERED]
        return [c for pair in zip(*drawn, strict=True) for c in pair] + super().collect(task, count)

    def _draw_counterfactuals(self, task: str, kind: str, count: int) -> list[Candidate]:
        drawn: list[Candidate] = []
        while len(drawn) < count:
            drawn += [c for c in self.draw_candidates(task, CANDIDATES) if c.fact.kind == kind]
        return [replace(c, fact=self._change_target(c)) for c in drawn[:count]]

    @contextmanager
    def _use_rng(self, rng: np.random.Generator) -> Iterator[None]:
        own, self.rng = self.rng, rng
        try:
            yield
        finally:
            self.rng = own

    def _change_target(self, c: Candidate) -> SceneFact:
        """The fact with an answer that neither holds of the scene nor is what the base model says."""
        choices = COUNTS if c.fact.kind == "count" else COLOR_NAMES
        target = self.rng.choice([a for a in choices if a not in (c.fact.answer, c.answer)])
        return replace(c.fact, answer=str(target))

    def make_record(self, task: str, number: int, c: Candidate) -> dict[str, Any]:
        if self.split == "val" and self._is_counterfactual(c):
            with self._use_rng(self.altered):
                return self._make_record(task, number, c)
        return self._make_record(task, number, c)

    def _make_record(self, task: str, number: int, c: Candidate) -> dict[str, Any]:
        record = super().make_record(task, number, c)
        name = f"{task}-{number:04d}"
        twin, twin_answer = self.draw_minimal_pair(c)
        probes: dict[str, FurtherProbe | None] = {
            "minimal_pair": FurtherProbe(
                record["src"], "edit", self._add_image(f"{name}-pair", twin), twin_answer
            )
        }
        if (about := self._draw_same_object(c)) is not None:
            words = about.format_question(str(self.rng.choice(TRAINED[about.kind])))
            probes["same_object"] = FurtherProbe(words, "question", record["image"], about.answer)
        again, _ = self.images[record["image_rephrase"]]
        for style, apply in STYLES.items():
            image = self._add_image(f"{name}-again-{style}", again, apply)
            probes[f"m_generality_{style}"] = FurtherProbe(record["src"], "edit", image, record["alt"])
        self.further.setdefault(task, []).append(RecordProbes(probes, self._group(c, record)))
        return record

    def _draw_same_object(self, c: Candidate) -> SceneFact | None:
        """A question about the edited object whose answer the edit does not imply; None where the edit is of
        no object."""
        if c.fact.kind in ("count", "color", "yesno", "caption"):
            facts = [f for f in list_facts(c.scene, self.rng) if f.kind in ("what", "left", "right")]
            return facts[int(self.rng.integers(len(facts)))]
        category = CATEGORY[c.fact.answer]
        others = sorted({o.category for o in OBJECTS} - {CATEGORY[n] for n in c.scene.names})
        is_own = bool(self.rng.random() < 0.5)
        asked = category if is_own else str(self.rng.choice(others))
        return SceneFact("yesno", asked, "yes" if is_own else "no")

    def _is_counterfactual(self, c: Candidate) -> bool:
        """Whether the target is not true of the scene; asked of counts and colors, which have one answer."""
        if c.fact.kind == "color":
            return c.fact.answer != c.scene.color
        return c.fact.kind == "count" and c.fact.answer in COUNTS

    def _group(self, c: Candidate, record: dict[str, Any]) -> dict[str, str]:
        shown = UNSEEN & set(c.scene.objects)
        last = c.fact.format_question(HELD_OUT[c.fact.kind][-1])
        return {
            "kind": c.fact.kind,
            "edit": "counterfactual" if self._is_counterfactual(c) else "correction",
            "objects": "unseen" if shown else "seen",
            "wording": "unseen" if record["rephrase"] == last else "seen",
        }

    def describe_probes(self, task: str, sha256: str) -> str | None:
        return describe_probes(sha256, self.further[task], version=self.version)


def _replace_object(scene: Scene, place: int, new: int) -> Scene:
    objects = tuple(new if i == place else old for i, old in enumerate(scene.objects))
    return replace(scene, objects=objects)


def measure_base(artist: Artist, count: int = 500, seed: int = 0) -> dict[str, float]:
    """The base model's accuracy on facts of random scenes by style, ``plain`` among them: which styles it
    reads at all."""
    from unike.datasets.answers import normalise_answer

    rng = np.random.default_rng(seed)
    asked: list[tuple[Scene, SceneFact, str]] = []
    while len(asked) < count:
        scene = sample_scene(rng)
        if scene.rare:
            continue
        facts = [f for f in list_facts(scene, rng) if f.kind != "caption"]
        fact = facts[int(rng.integers(len(facts)))]
        asked.append((scene, fact, fact.ask(rng)))
    images = artist.painter.draw_images([scene for scene, _, _ in asked])
    out = {}
    for style, apply in {"plain": None, **STYLES}.items():
        shown = images if apply is None else [apply(image) for image in images]
        answers = artist.backbone.generate(shown, [prompt for _, _, prompt in asked])
        pairs = zip(answers, asked, strict=True)
        right = [normalise_answer(a) == normalise_answer(f.answer) for a, (_, f, _) in pairs]
        out[style] = float(np.mean(right))
    return out
