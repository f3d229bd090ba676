"""Train records made harder: what an edit should hold on to, and what it must leave alone, by a hair.

Any data in MMEdit's layout will do: all is made of the records' own images and questions. To the probes of
``training_cases`` each record gets

- in scope, the image or the rephrased image in another style;
- out of scope, the edit's question on the images of other records that look most alike;
- out of scope, the edit's question on its own image with one half of another record's, where the base model
  then says something else than it said about the edit.

These are relatives of the benchmark's minimal pairs and styles, made in another way.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from unike.backbones.base import Backbone
from unike.datasets.answers import normalise_answer
from unike.datasets.changed_images import HALVES, make_thumbnail, replace_half, restyle
from unike.system.progress import Tick, ignore_progress
from unike.types import Case, Expectation, ImageLike, Probe, Query

MIXING = "asking about mixed images"
RESTYLED, ALIKE, MIXED = 3, 2, 2
# Probes that a record gets beyond those of ``training_cases``.
HARDER = RESTYLED + ALIKE + MIXED
# Of so many images that look most alike one is drawn.
NEIGHBOURS = 8
# More alike than this, two files show the same.
_SAME = 0.999


@dataclass(frozen=True)
class _Lookalikes:
    """Of each image of the train records those that look most alike, nearest first."""

    images: Sequence[ImageLike]
    near: np.ndarray

    @classmethod
    def find(cls, images: Sequence[ImageLike]) -> _Lookalikes:
        views = np.stack([make_thumbnail(image) for image in images])
        near = np.empty((len(images), min(NEIGHBOURS, len(images))), dtype=np.int64)
        for start in range(0, len(images), 512):
            likeness = views[start : start + 512] @ views.T
            likeness[likeness > _SAME] = -np.inf
            near[start : start + 512] = np.argsort(-likeness, 1)[:, : near.shape[1]]
        return cls(images, near)

    def draw(self, place: int, count: int, rng: random.Random) -> list[ImageLike]:
        """``count`` of the images that look most like the one at ``place``, some twice where there are too
        few."""
        found = list(self.near[place])
        while len(found) < count:
            found += found
        return [self.images[i] for i in rng.sample(found, count)]


def harden_cases(
    cases: Sequence[Case], backbone: Backbone, seed: int, tick: Tick = ignore_progress, batch: int = 32
) -> list[Case]:
    """``make_training_cases``'s records, with harder probes of both kinds; the same number in each.

    ``batch`` prompts share a forward pass. UserError where an image cannot be read.
    """
    known = list({str(c.request.query.image): c.request.query.image for c in cases}.values())
    places = {str(image): place for place, image in enumerate(known)}
    alike = _Lookalikes.find(known)
    hard = []
    for case in cases:
        rng = random.Random(zlib.crc32(f"{seed} {case.task} {case.request.id}".encode()))
        hard.append(_harden(case, rng, alike, places[str(case.request.query.image)]))
    return _keep_other_answers(hard, backbone, tick, batch)


def _harden(case: Case, rng: random.Random, alike: _Lookalikes, place: int) -> Case:
    queries = {probe.name: probe.query for probe in case.probes}
    edit, redrawn, joint = (queries[name] for name in ("edit", "re-drawn", "rephrased and re-drawn"))
    rephrased = queries["rephrased"]
    styled = [replace(q, image=restyle(q.image, rng)) for q in (redrawn, rephrased, redrawn)[:RESTYLED]]
    near = alike.draw(place, ALIKE + MIXED, rng)
    mixed = [
        replace(query, image=replace_half(query.image, rng.choice(alike.images), half))
        for query, half in zip((edit, joint), rng.sample(HALVES, MIXED), strict=True)
    ]
    inside = [p for p in case.probes if p.expect == "target"]
    outside = [p for p in case.probes if p.expect == "unchanged"]
    probes = (
        *inside,
        *_name("restyled", styled, "target"),
        *outside,
        *_name("alike", [replace(edit, image=image) for image in near[:ALIKE]], "unchanged"),
        *_name("mixed", mixed, "unchanged"),
        *_name("spare", [replace(edit, image=image) for image in near[ALIKE:]], "unchanged"),
    )
    return replace(case, probes=probes)


def _name(name: str, queries: Sequence[Query], expect: Expectation) -> list[Probe]:
    return [Probe(f"{name} {number}", query, expect) for number, query in enumerate(queries, 1)]


def _keep_other_answers(cases: Sequence[Case], backbone: Backbone, tick: Tick, batch: int) -> list[Case]:
    """The cases with a spare look-alike in place of each mixed image at which the base model says what it
    says about the edit: the half that was asked about may be the one that stayed."""
    mixed = [[p for p in case.probes if p.name.startswith("mixed")] for case in cases]
    asked = [
        q for c, own in zip(cases, mixed, strict=True) for q in (c.request.query, *(p.query for p in own))
    ]
    answers = iter(_answer(backbone, asked, tick, batch))
    out = []
    for case, own in zip(cases, mixed, strict=True):
        said = next(answers)
        same = [probe.name for probe in own if next(answers) == said]
        spares = {f"spare {name.split()[1]}" for name in same}
        kept = [p for p in case.probes if p.name not in same and (p.name in spares or "spare" not in p.name)]
        out.append(replace(case, probes=tuple(kept)))
    return out


def _answer(backbone: Backbone, queries: Sequence[Query], tick: Tick, batch: int) -> list[str]:
    found: list[str] = []
    for start in range(0, len(queries), batch):
        part = queries[start : start + batch]
        found += backbone.generate([q.image for q in part], [q.prompt for q in part])
        tick(MIXING, len(part))
    return [normalise_answer(answer) for answer in found]
