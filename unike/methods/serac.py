"""SERAC: a memory of edits, a scope classifier, and a counterfactual model (Mitchell et al. 2022b).

Within the scope of an edit the counterfactual model answers, elsewhere the base model. The published
pair of separate transformers is replaced by two small networks on the frozen backbone's own states.
The classifier reads the prompt's words, and with ``serac_scope: multimodal`` the question's hidden state
given its image; it never sees an answer. The counterfactual model is one attention step before the
head: each position attends to the edit's answer positions, and copies the token of the one that matches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unike.backbones.base import Backbone, PrefixState
from unike.backbones.hooks import capture
from unike.backbones.prefix import PrefixCache
from unike.edits import Edit
from unike.edits.counterfactual import (
    MemoryRecord,
    SeracEdit,
    SeracNetwork,
    _embed_words,
)
from unike.methods.constants import name_case, name_request
from unike.methods.meta_training import TrainableMethod, average_answers, split_by_scope
from unike.types import Case, EditRequest


class SERAC(TrainableMethod):
    """Keeps edits in a memory of their own; the model's weights stay as they are."""

    def build(self, backbone: Backbone) -> SeracNetwork:
        multimodal = self.hparams.serac_scope == "multimodal"
        return SeracNetwork(backbone.layout.width, self.hparams.editor_rank, multimodal)

    def _edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None
    ) -> SeracEdit:
        """Stores the request; no training step is taken, whatever ``history`` holds."""
        with torch.no_grad():
            record = self._remember(backbone, request, prefixes)
        return SeracEdit((record,), self._network, prefixes.first, {"steps": 0})

    def loss(self, backbone: Backbone, case: Case, prefixes: PrefixCache) -> torch.Tensor:
        """The counterfactual answers' loss within the scope, and the classifier's on both sides of it."""
        lesson = self._read_lesson(backbone, case.request, prefixes)
        inside, outside = split_by_scope(case, self.hparams.editor_probes, self.hparams.answer_end)
        scope = self._network.scope
        *questions, own = self._embed_questions(
            backbone, prefixes.state([*inside, *outside, self.write_lesson(case.request)]), packed=True
        )
        logits = scope.logits(torch.stack(questions), own[None])[:, 0]
        wanted = (torch.arange(len(logits), device=logits.device) < len(inside)).to(logits.dtype)
        counted = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        classified = sum(counted[wanted == side].mean() for side in (0, 1) if bool((wanted == side).any()))
        answers = self.keep(
            "answers", name_case(case), lambda: _read_answers(backbone, prefixes.state(inside))
        )
        nll = self._compute_answer_loss(backbone, answers, *self._encode_lesson(lesson))
        return self.hparams.c_edit * nll + self.hparams.c_loc * classified

    @property
    def _network(self) -> SeracNetwork:
        assert isinstance(self.trained, SeracNetwork)
        return self.trained

    def _embed_questions(self, backbone: Backbone, state: PrefixState, packed: bool = False) -> torch.Tensor:
        ends = state.hidden[torch.arange(len(state), device=state.hidden.device), state.question_end]
        # One tensor for each text, however often it is asked.
        words = {text: _embed_words(backbone, text) for text in state.prompts}
        return self._network.scope([words[text] for text in state.prompts], ends.float(), packed)

    def _compute_answer_loss(
        self, backbone: Backbone, answers: _Answers, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """The mean over queries of their answer tokens' mean loss, every query treated as in scope."""
        moved = self._network.counterfactual(answers.states[None].float(), keys[None], values[None])[0]
        logits = backbone.layout.head(answers.outputs + moved.to(answers.outputs.dtype))
        return average_answers(
            F.cross_entropy(logits.float(), answers.tokens, reduction="none"), answers.rows
        )

    def _remember(self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache) -> MemoryRecord:
        state = prefixes.state([self.write_lesson(request)])
        lesson = self._read_lesson(backbone, request, prefixes)
        return MemoryRecord(
            request.id, self._embed_questions(backbone, state)[0], *self._encode_lesson(lesson)
        )

    def _encode_lesson(self, lesson: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``(j, rank)`` and values ``(j, d)`` of an edit's answer positions; that after the answer has
        a value of zeros."""
        states, words = lesson
        network = self._network.counterfactual
        return network.keys(states), F.pad(network.values(states[:-1], words), (0, 0, 0, 1))

    def _read_lesson(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters the last layer at the edit's answer positions ``(j, d)``, and the output embeddings of
        its tokens ``(j - 1, d)``."""

        def read() -> tuple[torch.Tensor, torch.Tensor]:
            state = prefixes.state([self.write_lesson(request)])
            with torch.no_grad(), capture(_find_last(backbone)) as seen:
                backbone.suffix(state)
            end, stop = int(state.question_end[0]), int(state.attention_mask[0].sum())
            tokens = state.labels[0, end + 1 : stop]
            return seen["last"][0, end:stop].float(), backbone.layout.unembeddings.weight[tokens].float()

        return self.keep("lesson", name_request(request), read)


@dataclass(frozen=True)
class _Answers:
    """Answer tokens of several queries: what enters the last layer where each is predicted, ``states (n,
    d)``, and what leaves it, ``outputs (n, d)``; ``tokens (n)`` themselves, and ``rows (n)``, their
    queries."""

    states: torch.Tensor
    outputs: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.states, self.outputs, self.tokens, self.rows))


@torch.no_grad()
def _read_answers(backbone: Backbone, state: PrefixState) -> _Answers:
    at = state.answer_mask
    with capture(_find_last(backbone)) as seen:
        hidden = backbone.suffix_hidden(state)
    return _Answers(seen["last"][:, :-1][at], hidden[:, :-1][at], state.labels[:, 1:][at], at.nonzero()[:, 0])


def _find_last(backbone: Backbone) -> Mapping[str, nn.Module]:
    return {"last": backbone.layout.layer(len(backbone.layout) - 1)}
