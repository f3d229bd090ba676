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

import os
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from unike.backbones.base import Backbone
from unike.backbones.images import content_key
from unike.backbones.prefix import AnswerCache
from unike.datasets.answers import normalise_answer
from unike.datasets.changed_images import HALVES, make_thumbnail, replace_half, restyle
from unike.system.progress import Tick, ignore_progress
from unike.system.text import one_line
from unike.types import Case, Expectation, ImageLike, Probe, Query, UserError

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
    """Of each image of the train records those that look most alike, nearest first; none that shows the
    same."""

    images: Sequence[ImageLike]
    views: np.ndarray
    near: Sequence[Sequence[int]]

    @classmethod
    def find(cls, images: Sequence[ImageLike]) -> _Lookalikes:
        views = np.stack([make_thumbnail(image) for image in images])
        near: list[Sequence[int]] = []
        for start in range(0, len(images), 512):
            part = views[start : start + 512]
            likeness = np.where(_are_same(part, views), -np.inf, part @ views.T)
            order = np.argsort(-likeness, 1)[:, :NEIGHBOURS]
            are_other: np.ndarray = np.isfinite(np.take_along_axis(likeness, order, 1))
            near += [order[row][are_other[row]].tolist() for row in range(len(part))]
        return cls(images, views, near)

    def draw(self, place: int, count: int, rng: random.Random) -> list[ImageLike]:
        """``count`` of the images that look most like the one at ``place``, some twice where there are too
        few."""
        found = list(self.near[place])
        while len(found) < count:
            found += found
        return [self.images[i] for i in rng.sample(found, count)]

    def draw_any(self, place: int, rng: random.Random) -> ImageLike:
        """An image that does not show what the one at ``place`` does."""
        while True:
            drawn = rng.randrange(len(self.images))
            if not _are_same(self.views[place : place + 1], self.views[drawn : drawn + 1]).item():
                return self.images[drawn]


def _are_same(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Which of the views ``(n, s)`` and ``(m, s)`` are of the same content, ``(n, m)``. Those of one shade of
    gray are all zeros, and count as one another."""
    blank = np.all(one == 0, axis=1, keepdims=True) & np.all(other == 0, axis=1)
    same: np.ndarray = (one @ other.T > _SAME) | blank
    return same


def _name_image(image: ImageLike) -> str:
    """The same for one image in several records: a file's path, else what identifies its content."""
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else content_key(image)


def harden_cases(
    cases: Sequence[Case],
    backbone: Backbone,
    seed: int,
    tick: Tick = ignore_progress,
    batch: int = 32,
    kept: AnswerCache | None = None,
) -> list[Case]:
    """``make_training_cases``'s records, with harder probes of both kinds; the same number in each.

    ``batch`` prompts share a forward pass; answers that are ``kept`` are not asked for again. UserError for a
    record without an image, for one whose image no other record's differs from, and where an image cannot be
    read.
    """
    names = [_name_image(_require_image(case)) for case in cases]
    known = {name: _require_image(case) for name, case in zip(names, cases, strict=True)}
    places = {name: place for place, name in enumerate(known)}
    alike = _Lookalikes.find(list(known.values()))
    hard = []
    for case, name in zip(cases, names, strict=True):
        if not alike.near[places[name]]:
            at = f"record {one_line(case.request.id, 60)}"
            expected = "expected train records of several images, to draw harder ones from"
            raise UserError(f"{at}: all images look like its own; {expected}")
        rng = random.Random(zlib.crc32(f"{seed} {case.task} {case.request.id}".encode()))
        hard.append(_harden(case, rng, alike, places[name]))
    return _keep_other_answers(hard, backbone, tick, batch, kept)


def _require_image(case: Case) -> ImageLike:
    if case.request.query.image is None:
        at = f"record {one_line(case.request.id, 60)}"
        raise UserError(f"{at}: has no image; harder probes are drawn from each record's")
    return case.request.query.image


def _harden(case: Case, rng: random.Random, alike: _Lookalikes, place: int) -> Case:
    queries = {probe.name: probe.query for probe in case.probes}
    edit, other_image, both = (queries[name] for name in ("edit", "rephrased image", "both rephrased"))
    rephrased = queries["rephrased"]
    styled = [
        replace(q, image=restyle(q.image, rng)) for q in (other_image, rephrased, other_image)[:RESTYLED]
    ]
    near = alike.draw(place, ALIKE + MIXED, rng)
    mixed = [
        replace(query, image=replace_half(query.image, alike.draw_any(place, rng), half))
        for query, half in zip((edit, both), rng.sample(HALVES, MIXED), strict=True)
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


def _keep_other_answers(
    cases: Sequence[Case], backbone: Backbone, tick: Tick, batch: int, kept: AnswerCache | None
) -> list[Case]:
    """The cases with a spare look-alike in place of each mixed image at which the base model says what it
    says about the edit: the half that was asked about may be the one that stayed."""
    mixed = [[p for p in case.probes if p.name.startswith("mixed")] for case in cases]
    asked = [
        q for c, own in zip(cases, mixed, strict=True) for q in (c.request.query, *(p.query for p in own))
    ]
    answers = iter(_answer(backbone, asked, tick, batch, kept))
    out = []
    for case, own in zip(cases, mixed, strict=True):
        said = next(answers)
        same = [probe.name for probe in own if next(answers) == said]
        spares = {f"spare {name.split()[1]}" for name in same}
        left = [p for p in case.probes if p.name not in same and (p.name in spares or "spare" not in p.name)]
        out.append(replace(case, probes=tuple(left)))
    return out


def _answer(
    backbone: Backbone, queries: Sequence[Query], tick: Tick, batch: int, kept: AnswerCache | None
) -> list[str]:
    known = [None] * len(queries) if kept is None else kept.read(queries)
    found: list[str] = []
    for start in range(0, len(queries), batch):
        part = queries[start : start + batch]
        answers = [text for text in known[start : start + batch] if text is not None]
        if len(answers) < len(part):
            answers = backbone.generate([q.image for q in part], [q.prompt for q in part])
            if kept is not None:
                kept.write(part, answers)
        found += answers
        tick(MIXING, len(part))
    return [normalise_answer(answer) for answer in found]
