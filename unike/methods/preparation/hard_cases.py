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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from unike.backbones.base import Backbone
from unike.datasets.answers import normalise_answer
from unike.datasets.changed_images import HALVES, make_thumbnail, replace_half, restyle
from unike.methods.preparation.training_cases import make_training_cases
from unike.types import Case, ImageLike, Probe, Query

RESTYLED, ALIKE, MIXED = 3, 2, 2
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


def make_hard_cases(
    cases: Sequence[Case],
    backbone: Backbone,
    seed: int,
    batch: int,
    tick: Callable[[int], None] = lambda _: None,
) -> list[Case]:
    """The records with the probes of ``make_training_cases``, and harder ones of both kinds.

    ``batch`` prompts share a forward pass; ``tick`` is called with the number of records done. UserError
    where a record lacks a probe, or an image cannot be read.
    """
    taught = make_training_cases(cases)
    known = list({str(c.request.query.image): c.request.query.image for c in taught}.values())
    places = {str(image): place for place, image in enumerate(known)}
    alike = _Lookalikes.find(known)
    hard = []
    for case in taught:
        rng = random.Random(zlib.crc32(f"{seed} {case.task} {case.request.id}".encode()))
        hard.append(_harden(case, rng, alike, places[str(case.request.query.image)]))
    return _leave_out_same_answers(hard, backbone, batch, tick)


def _harden(case: Case, rng: random.Random, alike: _Lookalikes, place: int) -> Case:
    queries = {probe.name: probe.query for probe in case.probes}
    edit, joint = queries["edit"], queries["rephrased and re-drawn"]
    redrawn = queries["re-drawn"]
    styled = [
        replace(redrawn, image=restyle(redrawn.image, rng)),
        replace(joint, image=restyle(edit.image, rng)),
        replace(redrawn, image=restyle(redrawn.image, rng)),
    ][:RESTYLED]
    near = [alike.images[i] for i in rng.sample(list(alike.near[place]), min(ALIKE, len(alike.near[place])))]
    similar = [replace(edit, image=image) for image in near]
    halves = rng.sample(HALVES, MIXED)
    others = [rng.choice(alike.images) for _ in halves]
    mixed = [
        replace(query, image=replace_half(query.image, other, half))
        for query, other, half in zip((edit, joint), others, halves, strict=True)
    ]
    inside = [p for p in case.probes if p.expect == "target"]
    outside = [p for p in case.probes if p.expect == "unchanged"]
    probes = (
        *inside,
        *_name("restyled", styled, "target"),
        *outside,
        *_name("alike", similar, "unchanged"),
        *_name("mixed", mixed, "unchanged"),
    )
    return replace(case, probes=probes)


def _name(name: str, queries: Sequence[Query], expect: Expectation) -> list[Probe]:
    return [Probe(f"{name} {number}", query, expect) for number, query in enumerate(queries, 1)]


def _leave_out_same_answers(
    cases: Sequence[Case], backbone: Backbone, batch: int, tick: Callable[[int], None]
) -> list[Case]:
    """The cases without those mixed images at which the base model says what it says about the edit: the half
    that was asked about may be the one that stayed."""
    out = []
    for start in range(0, len(cases), batch):
        part = cases[start : start + batch]
        mixed = [[p for p in case.probes if p.name.startswith("mixed")] for case in part]
        queries = [
            q
            for c, probes in zip(part, mixed, strict=True)
            for q in (c.request.query, *(p.query for p in probes))
        ]
        answers = iter(_answer(backbone, queries, batch))
        for case, probes in zip(part, mixed, strict=True):
            own = next(answers)
            same = {probe.name for probe in probes if next(answers) == own}
            out.append(replace(case, probes=tuple(p for p in case.probes if p.name not in same)))
        tick(len(part))
    return out


def _answer(backbone: Backbone, queries: Sequence[Query], batch: int) -> list[str]:
    found: list[str] = []
    for start in range(0, len(queries), batch):
        part = queries[start : start + batch]
        found += backbone.generate([q.image for q in part], [q.prompt for q in part])
    return [normalise_answer(answer) for answer in found]
