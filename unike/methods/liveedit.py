"""LiveEdit: an expert of low rank for each edit, routed by image and question (Chen et al. 2025).

Networks that are trained once write the expert from the edit's states at one layer's output, and compare
prompts with it there. ``LiveEdit (n)`` is equation n of arXiv 2411.15432. A train record's loss depends on
the other records of its step: their experts are fused with its own, and their features must differ.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from unike.backbones.base import Backbone, PrefixState, PromptRows
from unike.backbones.hooks import first_tensor, transform
from unike.backbones.prefix import PrefixCache
from unike.edits import Edit
from unike.edits.expert_network import (
    ExpertNetwork,
    ExpertSizes,
    compare_each,
    compare_features,
    compute_nce,
    weigh_kept,
)
from unike.edits.experts import ExpertEdit, ExpertRecord, find_parts
from unike.methods.constants import name_case
from unike.methods.meta_training import TrainableMethod, average_answers, split_by_scope
from unike.types import Case, EditRequest, Query, UserError


class LiveEdit(TrainableMethod):
    """Writes an expert for each edit; the model's weights stay as they are."""

    contrasts = True

    def build(self, backbone: Backbone) -> ExpertNetwork:
        hp = self.hparams
        sizes = ExpertSizes(
            backbone.layout.width,
            hp.editor_rank,
            hp.live_heads,
            hp.live_rank,
            hp.live_queries,
            hp.live_image_tokens,
            hp.live_scale,
        )
        sizes.require_heads(hp.source)
        return ExpertNetwork(sizes)

    def _edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None
    ) -> ExpertEdit:
        """From the base model's states, whatever ``history`` holds: the networks know no others."""
        _require_image(f"edit {request.id}", request.query)
        with torch.no_grad():
            parts = read_parts(backbone, prefixes.state([self.write_lesson(request)]))
            left, right = self._write_experts(parts)
            questions, asked = _pad([p.question for p in parts])
            images, shown = _pad([p.image for p in parts])
            image = self._network.edits.read_image(questions, asked, images, shown)
            question = self._network.edits.read_question(questions, asked)
        record = ExpertRecord(request.id, left[0], right[0], image[0], question[0])
        return ExpertEdit((record,), self._network, prefixes.first, {"steps": 0})

    def loss(self, backbone: Backbone, case: Case, prefixes: PrefixCache) -> torch.Tensor:
        """The loss of a record that is alone in its step."""
        rng = random.Random(f"{self.hparams.seed}/{case.task}:{case.request.id}")
        return next(self.losses(backbone, [case], [0], prefixes, rng))

    def losses(
        self,
        backbone: Backbone,
        cases: Sequence[Case],
        own: Sequence[int],
        prefixes: PrefixCache,
        rng: random.Random,
    ) -> Iterator[torch.Tensor]:
        """LiveEdit (8) and (12) of each of ``own``. Sums over a record's probes, as published, not means."""
        lessons = [self._read_lesson(backbone, case, prefixes) for case in cases]
        draws = [_Draw.of(lesson, place, len(lessons), rng) for place, lesson in enumerate(lessons)]
        experts = self._write_experts([lesson.edit for lesson in lessons])
        asked = self._read_edit_questions([lesson.edit for lesson in lessons])
        routing = self._compute_routing_losses(lessons, draws, own)
        for place, routed in zip(own, routing, strict=True):
            case, lesson = cases[place], lessons[place]
            questions = self._network.prompts.read_question(*_pad([p.question for p in lesson.parts]))
            weights = weigh_kept(compare_features(questions, asked), draws[place].pools.to(asked.device))
            nll, change = self._compute_edit_losses(backbone, case, lesson, prefixes, (*experts, weights))
            hp = self.hparams
            yield hp.c_edit * nll + hp.c_loc * change + hp.live_routing * routed

    @property
    def _network(self) -> ExpertNetwork:
        assert isinstance(self.trained, ExpertNetwork)
        return self.trained

    def _write_experts(self, edits: Sequence[_Parts]) -> tuple[torch.Tensor, torch.Tensor]:
        """LiveEdit (1): both factors ``(B, r, d)``, from the states of image, question and answer."""
        states, mask = _pad([torch.cat([p.image, p.question, p.answer]) for p in edits])
        return self._network.left(states, mask), self._network.right(states, mask)

    def _read_edit_questions(self, parts: Sequence[_Parts]) -> torch.Tensor:
        return self._network.edits.read_question(*_pad([p.question for p in parts]))

    def _read_lesson(self, backbone: Backbone, case: Case, prefixes: PrefixCache) -> _Lesson:
        _require_image(f"record {case.request.id}", case.request.query)
        sides = split_by_scope(case, self.hparams.editor_probes, self.hparams.answer_end)
        # A prompt without an image reaches no expert: there is nothing to learn from it.
        inside, outside = ([q for q in side if q.image is not None] for side in sides)
        queries = [self.write_lesson(case.request), *inside, *outside]
        edit, *parts = self.keep(
            "parts", name_case(case), lambda: read_parts(backbone, prefixes.state(queries))
        )
        return _Lesson(edit, inside, outside, parts)

    def _compute_edit_losses(
        self,
        backbone: Backbone,
        case: Case,
        lesson: _Lesson,
        prefixes: PrefixCache,
        experts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """LiveEdit (9) and (10), and (11), each the sum over the record's queries of their tokens' means."""
        state = prefixes.state([*lesson.inside, *lesson.outside])

        @torch.no_grad()
        def predict() -> torch.Tensor:
            return backbone.answer_logits(prefixes.state(lesson.outside)).float().log_softmax(-1)

        def after(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            return output + self._network.apply_experts(output.float(), *experts).to(output.dtype)

        layer = backbone.layout.layer(prefixes.first)
        with transform([(layer, layer, after)]):
            logits = backbone.answer_logits(state).float()
        at = state.answer_mask
        rows, tokens = at.nonzero()[:, 0], state.labels[:, 1:][at]
        count, inside = int(at[: len(lesson.inside)].sum()), len(lesson.inside)
        nll = change = logits.new_zeros(())
        if inside:
            losses = F.cross_entropy(logits[:count], tokens[:count], reduction="none")
            nll = inside * average_answers(losses, rows[:count])
        if lesson.outside:
            before = self.keep("base", name_case(case), predict)
            moved = (before.exp() * (before - logits[count:].log_softmax(-1))).sum(-1)
            change = len(lesson.outside) * average_answers(moved, rows[count:] - inside)
        return nll, change

    def _compute_routing_losses(
        self, lessons: Sequence[_Lesson], draws: Sequence[_Draw], own: Sequence[int]
    ) -> list[torch.Tensor]:
        """LiveEdit (13), (15) and (16), summed, of each record of ``own``."""
        edits, prompts, count = self._network.edits, self._network.prompts, len(lessons)
        near = [lesson.choose(draw.edit_side) for lesson, draw in zip(lessons, draws, strict=True)]
        far = [
            lesson.parts[draw.outside]
            for lesson, draw in zip(lessons, draws, strict=True)
            if draw.outside is not None
        ]
        images = edits.read_image(*_pad([p.question for p in near]), *_pad([p.image for p in near]))
        questions = self._read_edit_questions([*near, *far])

        def compare_images(parts: _Parts) -> torch.Tensor:
            """With the edits' images, and last with the learnt one."""
            asked, shown = _pad([parts.question]), _pad([parts.image])
            seen = prompts.read_image(*asked, *shown)
            learnt = compare_each(seen, prompts.read_sentinel(*asked))
            return torch.cat([compare_features(seen, images)[0], learnt])

        found = []
        for place in own:
            lesson, draw = lessons[place], draws[place]
            prompt = lesson.choose(draw.prompt_side)
            loss = compute_nce(compare_images(prompt), place)
            if draw.outside is not None:
                loss = loss + compute_nce(compare_images(lesson.parts[draw.outside]), count)
            alike = compare_features(prompts.read_question(*_pad([prompt.question])), questions)[0]
            loss = loss + compute_nce(alike, place) - F.logsigmoid(alike[place])
            if len(alike) > 1:
                # Any but its own, which is left out of the count.
                other = int(draw.negative * (len(alike) - 1))
                loss = loss - F.logsigmoid(-alike[other + (other >= place)])
            found.append(loss)
        return found


@dataclass(frozen=True)
class _Parts:
    """A query's states at the layer's output, ``(t, d)`` each in single precision: of its image, of what
    follows it up to the prompt's last token, and of its answer."""

    image: torch.Tensor
    question: torch.Tensor
    answer: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + self.question.nbytes + self.answer.nbytes


@dataclass(frozen=True)
class _Lesson:
    """A train record: its queries in and out of scope that have an image, with their ``parts``, in that
    order, and those of the edit itself."""

    edit: _Parts
    inside: list[Query]
    outside: list[Query]
    parts: list[_Parts]

    def choose(self, place: int) -> _Parts:
        """The edit, for 0, or one of the queries in its scope."""
        return self.edit if place == 0 else self.parts[place - 1]


@dataclass(frozen=True)
class _Draw:
    """What is drawn for a record in a step: the two queries in scope that must find each other, by place
    (0: the edit itself), the place of a query out of scope among its parts, if it has one, a number in [0, 1)
    for the other question that must be unlike, and each query's ``pools (R, B)``: whose experts reach it."""

    edit_side: int
    prompt_side: int
    outside: int | None
    negative: float
    pools: torch.Tensor

    @classmethod
    def of(cls, lesson: _Lesson, place: int, count: int, rng: random.Random) -> _Draw:
        """For the record at ``place`` of ``count``. As in the release, a pool is any number of the step's
        experts, with the record's own for the queries in its scope."""
        inside, whole = len(lesson.inside), len(lesson.parts)
        pools = torch.zeros(whole, count, dtype=torch.bool)
        for row in range(whole):
            pools[row, rng.sample(range(count), rng.randint(0, count))] = True
        pools[:inside, place] = True
        sides = rng.randint(0, inside), rng.randint(0, inside)
        outside = rng.randrange(inside, whole) if whole > inside else None
        return cls(*sides, outside, rng.random(), pools)


@torch.no_grad()
def read_parts(backbone: Backbone, state: PrefixState) -> list[_Parts]:
    """The parts of each query, at the output of layer ``state.first``."""
    layer = backbone.layout.layer(state.first)
    states = first_tensor(layer(state.hidden, **state.layer_inputs)).float()
    shown = tuple(image is not None for image in state.images)
    rows = PromptRows(state.question_end, state.attention_mask, state.prompts, shown)
    question, image = find_parts(backbone, rows)
    places = torch.arange(states.shape[1], device=states.device)
    answer = state.attention_mask.bool() & (places > state.question_end[:, None])
    return [
        _Parts(*(row[mask] for mask in masks))
        for row, *masks in zip(states, image, question, answer, strict=True)
    ]


def _pad(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``(t, d)`` of any lengths as ``(B, t, d)``, and which tokens are theirs, ``(B, t)``."""
    padded = pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


def _require_image(at: str, query: Query) -> None:
    if query.image is None:
        raise UserError(f"{at}: has no image; expected one, by which method: liveedit finds an edit")
