"""SERAC: a memory of edits, a scope classifier, and a counterfactual model (Mitchell et al. 2022b).

Within the scope of an edit the counterfactual model answers, elsewhere the base model. The published
pair of separate transformers is replaced by two small networks on the frozen backbone's own states.
The classifier reads the prompt's words, and with ``serac_scope: multimodal`` the question's hidden state
given its image; it never sees an answer. The counterfactual model is one attention step before the
head: each position attends to the edit's answer positions, and copies the token of the one that matches.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from unike.backbones.base import Backbone, PrefixState, answer_loss
from unike.backbones.hooks import capture, transform
from unike.backbones.prefix import PrefixCache
from unike.edits import Edit
from unike.edits.counterfactual import (
    MemoryRecord,
    SeracEdit,
    SeracNetwork,
    _embed_words,
)
from unike.methods.meta_training import TrainableMethod, split_by_scope
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
        record = self._remember(backbone, case.request, prefixes)
        inside, outside = split_by_scope(case, self.hparams.editor_probes, self.hparams.answer_end)
        scope = self._network.scope
        questions = self._embed_questions(backbone, prefixes.state([*inside, *outside]))
        logits = scope.logits(questions, record.question[None])[:, 0]
        wanted = (torch.arange(len(logits), device=logits.device) < len(inside)).to(logits.dtype)
        counted = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        classified = sum(counted[wanted == side].mean() for side in (0, 1) if bool((wanted == side).any()))
        state = prefixes.state(inside)
        nll = answer_loss(self._compute_counterfactual(backbone, state, record), state.labels).mean()
        return self.hparams.c_edit * nll + self.hparams.c_loc * classified

    @property
    def _network(self) -> SeracNetwork:
        assert isinstance(self.trained, SeracNetwork)
        return self.trained

    def _embed_questions(self, backbone: Backbone, state: PrefixState) -> torch.Tensor:
        ends = state.hidden[torch.arange(len(state), device=state.hidden.device), state.question_end]
        return self._network.scope([_embed_words(backbone, text) for text in state.prompts], ends.float())

    def _compute_counterfactual(
        self, backbone: Backbone, state: PrefixState, record: MemoryRecord
    ) -> torch.Tensor:
        """Logits with every query treated as in scope."""
        keys, values = (t.expand(len(state), *t.shape) for t in (record.keys, record.values))

        def answer(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            return output + self._network.counterfactual(x.float(), keys, values).to(output.dtype)

        last = backbone.layout.layer(len(backbone.layout) - 1)
        with transform([(last, last, answer)]):
            return backbone.suffix(state)

    def _remember(self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache) -> MemoryRecord:
        state = prefixes.state([self.write_lesson(request)])
        with torch.no_grad(), capture(_find_last(backbone)) as seen:
            backbone.suffix(state)
        end, stop = int(state.question_end[0]), int(state.attention_mask[0].sum())
        states = seen["last"][0, end:stop].float()
        words = backbone.layout.unembeddings.weight[state.labels[0, end + 1 : stop]].float()
        network = self._network.counterfactual
        values = F.pad(network.values(states[:-1], words), (0, 0, 0, 1))
        return MemoryRecord(
            request.id, self._embed_questions(backbone, state)[0], network.keys(states), values
        )


def _find_last(backbone: Backbone) -> Mapping[str, nn.Module]:
    return {"last": backbone.layout.layer(len(backbone.layout) - 1)}
