"""LoRA (Hu et al. 2022): low-rank factors beside linear modules, trained for each edit.

A module's output becomes ``W x + (alpha / r) B A x`` with ``A (r, in)`` and ``B (out, r)``. ``A`` starts at
random and ``B`` at zero, so that training starts at the base model.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from unike.backbones.base import Backbone, PrefixState, narrow
from unike.backbones.prefix import PrefixCache
from unike.config.combined import AdapterOptions
from unike.edits import Edit, LowRankDelta
from unike.edits.deltas import FactorBatch, Factors, Site, attention_sites, ffn_sites
from unike.methods.base import EditMethod, unwrap
from unike.methods.training import Limits, Trained, train
from unike.types import EditRequest


class LoRA(EditMethod):
    """Trains an adapter for each edit; those of a sequence add up."""

    def _edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None
    ) -> LowRankDelta:
        """One adapter, trained while ``history`` is applied."""
        return unwrap(self._make_edits(backbone, [request], prefixes, history)[0])

    def _edit_many(
        self, backbone: Backbone, requests: Sequence[EditRequest], prefixes: PrefixCache
    ) -> list[LowRankDelta | FloatingPointError]:
        return self._make_edits(backbone, requests, prefixes, None)

    def _make_edits(
        self,
        backbone: Backbone,
        requests: Sequence[EditRequest],
        prefixes: PrefixCache,
        history: Edit | None,
    ) -> list[LowRankDelta | FloatingPointError]:
        state = prefixes.state([self.write_lesson(r) for r in requests])
        modules = find_modules(backbone, self.layers(backbone), self.hparams.lora_target)
        starts = [draw_factors(modules, request.id, self.hparams) for request in requests]
        learner = _Adapters(backbone, state, starts, self.hparams, history)
        trained = train(learner, state.labels, Limits.of(self.hparams))
        return [
            LowRankDelta(factors, vars(how)) if isinstance(how, Trained) else how
            for how, factors in zip(trained, learner.finished, strict=True)
        ]


def find_modules(backbone: Backbone, layers: Sequence[int], target: str) -> dict[Site, nn.Linear]:
    """The modules that ``lora_target`` names, in the order of the layers."""
    found: dict[Site, nn.Linear] = {}
    for index in layers:
        if target != "ffn":
            found |= attention_sites(backbone, [index])
        if target != "attention":
            found |= ffn_sites(backbone, [index])
    return found


def draw_factors(modules: Mapping[Site, nn.Linear], name: str, hparams: AdapterOptions) -> Factors:
    """An edit's factors ``(r, in)`` and ``(r, out)`` before training, drawn from the run's seed and the
    edit's id: the first within ``1 / sqrt(in)``, the second zero."""
    generator = torch.Generator().manual_seed(hparams.seed + zlib.crc32(name.encode()))
    factors = {}
    for at, module in modules.items():
        bound = module.in_features**-0.5
        left = torch.empty(hparams.lora_rank, module.in_features).uniform_(-bound, bound, generator=generator)
        device = module.weight.device
        factors[at] = left.to(device), torch.zeros(hparams.lora_rank, module.out_features, device=device)
    return factors


class _Adapters:
    """Factors of independent edits in training, one edit per row of ``state``; ``finished`` takes the
    results, with the scale in them."""

    def __init__(
        self,
        backbone: Backbone,
        state: PrefixState,
        starts: Sequence[Factors],
        hparams: AdapterOptions,
        history: Edit | None,
    ) -> None:
        self.backbone, self.state, self.history = backbone, state, history
        self.scale = hparams.lora_alpha / hparams.lora_rank
        self.sites = list(starts[0])
        self.sides = [
            torch.stack([start[at][side] for start in starts]).requires_grad_()
            for at in self.sites
            for side in (0, 1)
        ]
        self.rows = list(range(len(starts)))
        self.finished: list[Factors] = [{} for _ in starts]

    def parameters(self) -> list[torch.Tensor]:
        return self.sides

    def logits(self) -> torch.Tensor:
        owners = torch.arange(len(self.rows), device=self.state.labels.device)
        with ExitStack() as stack:
            if self.history is not None:
                stack.enter_context(self.history.applied(self.backbone))
            stack.enter_context(FactorBatch(self._scale()).applied(self.backbone, owners))
            return self.backbone.answer_logits(self.state)

    def extra_loss(self) -> None:
        return None

    def keep(self, rows: torch.Tensor) -> None:
        staying = rows.tolist()
        for i, (row, factors) in enumerate(zip(self.rows, self._scale(), strict=True)):
            if i not in staying:
                self.finished[row] = {
                    at: (left.detach().clone(), right.detach().clone())
                    for at, (left, right) in factors.items()
                }
        self.rows = [self.rows[i] for i in staying]
        self.sides = [side.detach()[rows].requires_grad_() for side in self.sides]
        if staying:
            self.state = narrow(self.backbone, self.state, rows)

    def _scale(self) -> list[Factors]:
        """Each edit's factors, the second one with the scale in it."""
        return [
            {
                at: (left[i], self.scale * right[i])
                for at, left, right in zip(self.sites, self.sides[::2], self.sides[1::2], strict=True)
            }
            for i in range(len(self.rows))
        ]
