"""Extra key-value pairs as UniKE and T-Patcher draw and train them, and an edit's own states."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from unike.backbones.base import Backbone, PrefixState, narrow
from unike.backbones.hooks import capture
from unike.backbones.prefix import PrefixCache
from unike.config.combined import FreshPatchOptions, PatchTrainingOptions
from unike.config.sections import PatchLossOptions
from unike.edits import Edit, RoutedBatch, RoutedEdit
from unike.knowledge.patch import KeyValuePatch, activation_loss, memory_loss
from unike.methods.base import EditMethod, Knowledge, unwrap
from unike.methods.training import Limits, Trained, train
from unike.types import EditRequest


@dataclass(frozen=True)
class OwnStates:
    """An edit's own states in one layer, from the base model: ``prompt (p + 1, d)`` of its prompt,
    ``sem (d)`` at its end, ``pos (d)`` at the end of prompt + target, ``ffn (T, d)``, the
    feed-forward network's inputs that predict the answer."""

    prompt: torch.Tensor
    sem: torch.Tensor
    pos: torch.Tensor
    ffn: torch.Tensor


@torch.no_grad()
def read_own_states(
    backbone: Backbone, state: PrefixState, layers: list[int], ended: bool = False
) -> list[dict[int, OwnStates]]:
    """Knowledge states of each row, a query with its target, by layer. ``ended``: after the target comes the
    token that ends the answer, of which there is no knowledge."""
    attention = {i: backbone.layout.attention(i).module for i in layers}
    readers = {i: backbone.layout.ffn(i).keys[0] for i in layers}
    with capture(attention) as x, capture(readers) as y:
        backbone.answer_logits(state)
    ends, lasts = state.question_end.tolist(), (state.attention_mask.sum(1) - 1).tolist()
    out = []
    for row, (end, last) in enumerate(zip(ends, lasts, strict=True)):
        found = {}
        for i in layers:
            ffn = y[i].reshape(*state.labels.shape, -1)[row, end:last]
            prompt = x[i][row, : end + 1].clone()
            # A view of the last state would keep those of the whole prompt for as long as the edit lives.
            found[i] = OwnStates(prompt, prompt[-1].clone(), x[i][row, last - ended].clone(), ffn.clone())
        out.append(found)
    return out


def draw_patches(
    backbone: Backbone,
    request: EditRequest,
    states: dict[int, OwnStates],
    hparams: FreshPatchOptions,
    knowledge: Knowledge,
) -> dict[int, KeyValuePatch]:
    """A patch per layer, drawn from the run's seed and the edit's id."""
    generator = torch.Generator().manual_seed(hparams.seed + zlib.crc32(request.id.encode()))
    patches = {}
    for index, own in states.items():
        site = backbone.layout.ffn(index)
        zeta = knowledge[index].zeta if hparams.beta and index in knowledge else None
        patch = KeyValuePatch(
            backbone.layout.width, hparams.n_keys, site.activation, site.gated, zeta, hparams.beta, generator
        ).to(backbone.device)
        if hparams.key_init == "query":
            patch.start_at_queries(own.ffn, generator=generator)
        patches[index] = patch
    return patches


PatchOutcome = RoutedEdit | FloatingPointError


class PatchMethod(EditMethod):
    """A method whose edits are trained patches: alone, on top of others, or batched."""

    def _edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None
    ) -> RoutedEdit:
        """One edit, trained while ``history`` is applied."""
        return unwrap(self.make_edits(backbone, [request], prefixes, history)[0])

    def _edit_many(
        self, backbone: Backbone, requests: Sequence[EditRequest], prefixes: PrefixCache
    ) -> list[PatchOutcome]:
        """Independent edits, trained in one batch; each as ``_edit`` makes it alone."""
        return self.make_edits(backbone, requests, prefixes, None)

    @abstractmethod
    def make_edits(
        self,
        backbone: Backbone,
        requests: Sequence[EditRequest],
        prefixes: PrefixCache,
        history: Edit | None,
    ) -> list[PatchOutcome]:
        """An edit for each request; with ``history`` there is one request."""


def train_patches(
    backbone: Backbone,
    state: PrefixState,
    edits: Sequence[RoutedEdit],
    hparams: PatchTrainingOptions,
    knowledge: Knowledge,
    history: Edit | None = None,
) -> list[PatchOutcome]:
    """Trains each edit's patches on its row of ``state`` and freezes them; batched, or one on top of
    ``history``. An edit whose loss stops being a number has the error in its place."""
    with ExitStack() as stack:
        learner = _BatchedPatches(backbone, state, edits, hparams, knowledge)
        if history is not None:
            (edit,) = edits
            stack.enter_context((history | edit).applied(backbone))
            learner = _StackedPatch(backbone, state, edits, hparams, knowledge)
        learner.watch(stack)
        trained = train(learner, state.labels, Limits.of(hparams))
    out: list[PatchOutcome] = []
    for edit, how in zip(edits, trained, strict=True):
        for parameter in _list_parameters(edit):
            parameter.requires_grad_(False)
            parameter.grad = None
        if isinstance(how, Trained):
            edit.info.update(steps=how.steps, loss=how.loss, reached=how.reached)
        out.append(edit if isinstance(how, Trained) else how)
    return out


def _list_parameters(edit: RoutedEdit) -> list[torch.nn.Parameter]:
    patches = [s.patch for s in edit.records[0].layers.values() if s.patch is not None]
    return [p for patch in patches for p in patch.parameters()]


class _BatchedPatches:
    """Independent edits of one record each, trained in one batch."""

    def __init__(
        self,
        backbone: Backbone,
        state: PrefixState,
        edits: Sequence[RoutedEdit],
        hparams: PatchLossOptions,
        knowledge: Knowledge,
    ) -> None:
        self.backbone, self.state, self.hparams, self.knowledge = backbone, state, hparams, knowledge
        self.edits = edits
        self.seen: dict[int, torch.Tensor] = {}
        self.together = self._gather(edits)

    def _gather(self, edits: Sequence[RoutedEdit]) -> RoutedBatch | None:
        together = edits[0].batch(edits)
        assert together is not None, "edits of one method agree in what they are"
        return together

    def watch(self, stack: ExitStack) -> None:
        """Captures the feed-forward networks' inputs, where a loss needs them."""
        if self.hparams.activation_loss or self.hparams.memory_loss:
            readers = {i: self.backbone.layout.ffn(i).keys[0] for i in self.edits[0].layers}
            self.seen = stack.enter_context(capture(readers))

    def parameters(self) -> list[torch.Tensor]:
        assert self.together is not None
        return [p for patch in self.together.patches.values() for p in patch.parameters()]

    def logits(self) -> torch.Tensor:
        assert self.together is not None
        owners = torch.arange(len(self.state), device=self.state.labels.device)
        with self.together.applied(self.backbone, owners):
            return self.backbone.answer_logits(self.state)

    def compute_scores(self, index: int, queries: torch.Tensor) -> torch.Tensor:
        """``(b, T, d)`` or ``(T, d)`` to ``(b, T, n)``."""
        assert self.together is not None
        return self.together.patches[index].pairs.scores(queries)

    def extra_loss(self) -> torch.Tensor | None:
        """T-Patcher's activation and memory losses, weighted as in the YAML."""
        if not self.seen:
            return None
        total = self.state.hidden.new_zeros(len(self.state), dtype=torch.float32)
        for index, inputs in self.seen.items():
            queries = inputs.reshape(len(self.state), -1, inputs.shape[-1])[:, :-1]
            if self.hparams.activation_loss:
                fired = self.compute_scores(index, queries.float())
                total = total + self.hparams.activation_loss * activation_loss(fired, self.state.answer_mask)
            if self.hparams.memory_loss:
                silent = self.compute_scores(index, self.knowledge[index].ffn_queries.float())
                total = total + self.hparams.memory_loss * memory_loss(silent)
        return total

    def keep(self, rows: torch.Tensor) -> None:
        assert self.together is not None
        self.together.keep(rows)
        if len(rows):
            self.state = narrow(self.backbone, self.state, rows)


class _StackedPatch(_BatchedPatches):
    """One edit, trained while it and those before it are applied."""

    def _gather(self, edits: Sequence[RoutedEdit]) -> RoutedBatch | None:
        return None

    def parameters(self) -> list[torch.Tensor]:
        return list(_list_parameters(self.edits[0]))

    def logits(self) -> torch.Tensor:
        return self.backbone.answer_logits(self.state)

    def compute_scores(self, index: int, queries: torch.Tensor) -> torch.Tensor:
        patch = self.edits[0].records[0].layers[index].patch
        assert patch is not None
        found = patch.pairs.scores(queries)
        return found if found.ndim == 3 else found[None]

    def keep(self, rows: torch.Tensor) -> None:
        return
