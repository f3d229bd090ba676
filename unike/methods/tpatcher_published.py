"""T-Patcher as published (Huang et al. 2023): one neuron for each wrong token of the target.

``tpatcher`` is our form of it. Here the neurons' number and start, losses, optimiser, end of training and
growing memory are those of the paper and of its release. The differences that are left are in
docs/decisions_rivals.md.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from unike.backbones.base import Backbone, PrefixState
from unike.backbones.hooks import capture
from unike.backbones.prefix import PrefixCache
from unike.config.combined import NeuronTrainingOptions
from unike.edits import Edit, EditRecord, LayerShare, RoutedEdit, Routing
from unike.edits.gated import GatedMember
from unike.knowledge.patcher import NeuronPatch, activation_loss, has_stalled, memory_loss, smoothed_loss
from unike.methods.base import EditMethod
from unike.methods.patching import read_own_states
from unike.types import EditRequest

# Every so many-th remembered query is for validation, and no loss is trained on it.
VALIDATION_EVERY = 5


class PublishedTPatcher(EditMethod):
    """One edit is the neurons of one layer; a request whose target is predicted already gets none."""

    def _edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None
    ) -> RoutedEdit:
        (index,) = self.layers(backbone)
        state = prefixes.state([self.write_lesson(request)])
        (own,) = read_own_states(backbone, state, [index], self.hparams.answer_end != "none")
        lesson = _read_lesson(backbone, state, index, history)
        places = lesson.wrong.nonzero()[:, 0][: self.hparams.patcher_neurons]
        share = LayerShare(own[index].sem, own[index].pos)
        if not len(places):
            return _wrap(request, index, share, {"steps": 0, "reached": True, "neurons": 0})
        site = backbone.layout.ffn(index)
        generator = torch.Generator().manual_seed(self.hparams.seed + zlib.crc32(request.id.encode()))
        patch = NeuronPatch(
            lesson.inputs[places], site.activation, site.gated, self.hparams.patcher_amplify, generator
        ).to(backbone.device)
        edit = _wrap(request, index, LayerShare(share.key, share.value, patch), {})
        memory = self._remember(index, lesson.inputs, history)
        training = _Training(backbone, state, patch, lesson.inputs[places], memory, self.hparams)
        with (edit if history is None else history | edit).applied(backbone):
            info = training.run()
        share = LayerShare(share.key, share.value, patch.freeze(), lesson.inputs)
        return _wrap(request, index, share, info)

    def _remember(self, index: int, inputs: torch.Tensor, history: Edit | None) -> Memory:
        """The remembered queries of the training split, and those of the edits in ``history``."""
        known = self.knowledge[index].ffn_queries.float() if index in self.knowledge else inputs[:0]
        mine = [] if history is None else list(iterate_inputs(history, index))
        return Memory.split(known, torch.cat([inputs[:0], *mine]))


def _wrap(request: EditRequest, index: int, share: LayerShare, info: dict[str, object]) -> RoutedEdit:
    return RoutedEdit((EditRecord(request.id, {index: share}),), Routing(external="none"), info=info)


def iterate_inputs(history: Edit, index: int) -> Iterable[torch.Tensor]:
    """The feed-forward inputs ``(T, d)`` that the edits in ``history`` kept of one layer, in order."""
    for part in history.parts:
        for unit in part.units:
            if isinstance(unit, GatedMember):
                yield from iterate_inputs(unit.edit, index)
            elif isinstance(unit, EditRecord) and index in unit.layers:
                kept = unit.layers[index].inputs
                if kept is not None:
                    yield kept.float()


@dataclass(frozen=True)
class Memory:
    """Feed-forward inputs on which new neurons must be silent, ``(M, d)``: those of ``training``, and those
    of ``validation``, which say when to stop."""

    training: torch.Tensor
    validation: torch.Tensor

    @classmethod
    def split(cls, known: torch.Tensor, own: torch.Tensor) -> Memory:
        """From the train split's ``known``, of which each is in one of both, and the edits' ``own``, which
        are in both, as in the release."""
        held = torch.arange(len(known), device=known.device) % VALIDATION_EVERY == 0
        return cls(torch.cat([known[~held], own]), torch.cat([known[held], own]))


@dataclass(frozen=True)
class _Lesson:
    """What the model, as edited so far, makes of the target's ``T`` tokens: the feed-forward
    ``inputs (T, d)`` that predict them, and which of them are ``wrong (T)``."""

    inputs: torch.Tensor
    wrong: torch.Tensor


@torch.no_grad()
def _read_lesson(backbone: Backbone, state: PrefixState, index: int, history: Edit | None) -> _Lesson:
    keys = {index: backbone.layout.ffn(index).keys[0]}
    # An edit without neurons applies nothing.
    with history.applied(backbone) if history is not None else torch.no_grad(), capture(keys) as seen:
        logits = backbone.answer_logits(state)
    at = state.answer_mask[0]
    inputs = seen[index].reshape(*state.labels.shape, -1)[0, :-1][at].float().clone()
    return _Lesson(inputs, logits.argmax(-1) != state.labels[0, 1:][at])


class _Training:
    """The training of one edit's neurons, with the edit applied."""

    def __init__(
        self,
        backbone: Backbone,
        state: PrefixState,
        patch: NeuronPatch,
        queries: torch.Tensor,
        memory: Memory,
        hparams: NeuronTrainingOptions,
    ) -> None:
        self.backbone, self.state, self.patch, self.hparams = backbone, state, patch, hparams
        self.queries, self.memory = queries, memory
        self.wanted = state.labels[:, 1:][state.answer_mask]

    def run(self) -> dict[str, object]:
        """Trains until the target is predicted and the validation memory's loss no longer falls, or for
        ``max_steps``; what is reported of it. FloatingPointError where the loss is no longer a number."""
        hparams, parameters = self.hparams, list(self.patch.parameters())
        optimiser = torch.optim.Adam(parameters, lr=hparams.lr, weight_decay=hparams.patcher_weight_decay)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimiser, factor=0.5, patience=1, threshold=0.05
        )
        validations: list[float] = []
        steps = 0
        while steps < hparams.max_steps and not has_stalled(validations, hparams.patcher_patience):
            loss = self._compute_loss()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()} after {steps} steps")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, hparams.clip_norm)
            optimiser.step()
            steps += 1
            if steps % hparams.patcher_check_every == 0:
                answer, right = self._check()
                schedule.step(answer)
                if right and steps > hparams.patcher_min_steps:
                    validations.append(self._validate())
        answer, right = self._check()
        return {
            "steps": steps,
            "loss": answer,
            "reached": right,
            "neurons": len(self.queries),
            "memory_loss": self._validate(),
            "stopped": "validation" if has_stalled(validations, hparams.patcher_patience) else "max_steps",
        }

    def _compute_loss(self) -> torch.Tensor:
        logits = self.backbone.answer_logits(self.state)
        loss = smoothed_loss(logits, self.wanted, self.hparams.patcher_smoothing)
        active = self._score_own()
        if self.hparams.activation_loss:
            loss = loss + self.hparams.activation_loss * activation_loss(active)
        if self.hparams.memory_loss:
            loss = loss + self.hparams.memory_loss * self._compute_memory_loss(self.memory.training, active)
        return loss

    def _score_own(self) -> torch.Tensor:
        """Each neuron's score at its own token, ``(n)``."""
        return self.patch.pairs.scores(self.queries).diagonal()

    def _compute_memory_loss(self, memory: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        scores = self.patch.pairs.scores(memory)
        return memory_loss(scores, active, self.hparams.patcher_margin, self.hparams.patcher_top)

    @torch.no_grad()
    def _check(self) -> tuple[float, bool]:
        """The answer's loss, and whether all of its tokens are predicted."""
        logits = self.backbone.answer_logits(self.state)
        right = bool((logits.argmax(-1) == self.wanted).all())
        return smoothed_loss(logits, self.wanted, self.hparams.patcher_smoothing).item(), right

    @torch.no_grad()
    def _validate(self) -> float:
        """The memory loss on the queries that are held out."""
        return self._compute_memory_loss(self.memory.validation, self._score_own()).item()
