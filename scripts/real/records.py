"""Records of a benchmark from labelled photographs: what a backbone gets wrong, and what else to ask.

An edit's photograph, its rephrased photograph (another one of the same name) and all others of a record
belong to one split. A near name is the one whose photographs the backbone's vision side sees most alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scripts.real.facts import Fact, mentions
from scripts.real.photos import Photo
from scripts.real.wordings import ASKED, FREE, fill
from scripts.tiny.questions import add_article
from unike.backbones.vlm import VisionLanguageBackbone
from unike.datasets.answers import normalise_answer
from unike.datasets.mmedit import VQA_TEMPLATE, wrap_prompt
from unike.types import UserError

KINDS = {"vqa": ("what", "choice"), "caption": ("caption",)}
BATCH = 16
YES_NO = "Is there {x} in the picture?"
Record = dict[str, Any]


@dataclass(frozen=True)
class Album:
    """The photographs of one split by name, with each name's ``near`` one."""

    photos: Mapping[str, Sequence[Photo]]
    near: Mapping[str, str]

    def list_editable(self) -> list[Photo]:
        """Photographs of names that have another one."""
        return [photo for group in self.photos.values() if len(group) > 1 for photo in group]

    def draw(self, chooser: random.Random, name: str, other_than: Photo | None = None) -> Photo:
        """A photograph of a name."""
        return chooser.choice([p for p in self.photos[name] if p != other_than])


@dataclass(frozen=True)
class Question:
    """A question about a photograph of ``kind``, between ``first`` and ``second`` where it is a choice, its
    answer, and what the backbone ``said``."""

    photo: Photo
    kind: str
    text: str
    answer: str
    first: str = ""
    second: str = ""
    said: str = ""

    def is_wrong(self, near: str) -> bool:
        """Whether the answer's words are missing in what was said, or a choice's other name is there."""
        if not mentions(self.said, self.photo.name):
            return bool(normalise_answer(self.said))
        return self.kind == "choice" and mentions(self.said, near)


# ---------------------------------------------------------------- the photographs


def make_album(
    backbone: VisionLanguageBackbone, photos: Sequence[Photo], tick: Callable[[int], object]
) -> Album:
    """The photographs by name, and for each name the one whose photographs are most alike. UserError where
    there are fewer than three names."""
    groups: dict[str, list[Photo]] = {}
    for photo in photos:
        groups.setdefault(photo.name, []).append(photo)
    if len(groups) < 3:
        raise UserError(f"--images: a split has {len(groups)} names; expected 3 or more, so more photographs")
    means = []
    for group in groups.values():
        seen = backbone.cache.get([str(p.path) for p in group], backbone.vision.pixels, batch=8)
        means.append(torch.stack([s["features"].float().flatten(0, -2).mean(0) for s in seen]).mean(0))
        tick(len(group))
    return Album(groups, find_nearest(list(groups), torch.stack(means)))


def find_nearest(names: Sequence[str], means: torch.Tensor) -> dict[str, str]:
    """For each name the other one with the largest cosine, after the mean of all is taken off: ``(n, d)``."""
    unit = torch.nn.functional.normalize(means - means.mean(0), dim=-1)
    alike = unit @ unit.T
    alike.fill_diagonal_(-2)
    return {name: names[int(i)] for name, i in zip(names, alike.argmax(-1), strict=True)}


# ---------------------------------------------------------------- questions


def word(photo: Photo, kind: str, near: str, seed: int) -> Question:
    """The question of a kind about a photograph, in one of the wordings that edits have."""
    chooser = random.Random(f"{seed}/{photo.key}/{kind}")
    pair = [add_article(photo.name), add_article(near)]
    chooser.shuffle(pair)
    text = fill(chooser.choice(ASKED[kind]), *pair)
    answer = photo.name if kind == "what" else add_article(photo.name)
    return Question(photo, kind, text, answer, *pair)


def ask(
    backbone: VisionLanguageBackbone, questions: Sequence[Question], tick: Callable[[int], object]
) -> list[Question]:
    """The questions with what the backbone says to them."""
    out = []
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        prompts = [q.text if q.kind == "caption" else wrap_prompt(VQA_TEMPLATE, q.text) for q in part]
        said = backbone.generate([str(q.photo.path) for q in part], prompts)
        out += [replace(q, said=text) for q, text in zip(part, said, strict=True)]
        tick(len(part))
    return out


# ---------------------------------------------------------------- records


def make_record(question: Question, album: Album, facts: Sequence[Fact], root: Path, seed: int) -> Record:
    """One record in MMEdit's layout, with hard probes; images are relative to ``root``."""
    photo, kind = question.photo, question.kind
    near = album.near[photo.name]
    chooser = random.Random(f"{seed}/{photo.key}/{kind}/record")
    fact, known = chooser.choice(facts)
    others = [name for name in album.photos if name not in (photo.name, near)]
    other = album.draw(chooser, chooser.choice(others))
    is_wrong = question.is_wrong(near)

    def place(shown: Photo) -> str:
        return shown.path.relative_to(root).as_posix()

    return {
        "src": question.text,
        "pred": question.said if is_wrong else (near if kind == "what" else add_article(near)),
        "rephrase": fill(chooser.choice(FREE[kind]), question.first, question.second),
        "alt": question.answer,
        "image": place(photo),
        "image_rephrase": place(album.draw(chooser, photo.name, photo)),
        "loc": fact,
        "loc_ans": known,
        "m_loc": place(other),
        "m_loc_q": chooser.choice(ASKED["what"]),
        "m_loc_a": other.name,
        "same_question_image": place(album.draw(chooser, near)),
        "same_question_a": near if kind == "what" else add_article(near),
        "same_image_q": fill(YES_NO, add_article(near)),
        "same_image_a": "no",
        "joint": True,
        "kind": kind,
    }


def collect(
    backbone: VisionLanguageBackbone,
    album: Album,
    task: str,
    count: int,
    keep_right: bool,
    seed: int,
    tick: Callable[[int], object],
) -> list[Question]:
    """Up to ``count`` questions that the backbone gets wrong; with ``keep_right`` also others. Each
    photograph has one of each kind."""
    photos = album.list_editable()
    questions = [word(p, kind, album.near[p.name], seed) for p in photos for kind in KINDS[task]]
    random.Random(f"{seed}/{task}").shuffle(questions)
    kept: list[Question] = []
    for start in range(0, len(questions), BATCH):
        if len(kept) >= count:
            break
        asked = ask(backbone, questions[start : start + BATCH], tick)
        kept += [q for q in asked if keep_right or q.is_wrong(album.near[q.photo.name])]
    return kept[:count]
