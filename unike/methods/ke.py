"""KE: a hypernetwork that gates an edit's gradient (De Cao et al. 2021, KnowledgeEditor).

A bidirectional LSTM encodes the edit. From its final states, every edited weight gets a rank-1 gate on
its gradient, a rank-1 offset, and a step size. Training is constrained: answers elsewhere may change by
no more than a margin, which a Lagrange multiplier enforces.

Every edit of a sequence is made from the base model's gradients, as MEND's are: the hypernetwork was
trained on no others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from unike.backbones.base import Backbone
from unike.backbones.prefix import PrefixCache
from unike.edits import Edit
from unike.edits.deltas import LowRankDelta, Site, ffn_sites
from unike.methods.constants import name_request
from unike.methods.meta_training import ParameterGroup, TrainableMethod, compute_edit_losses
from unike.methods.training import compute_answer_gradients
from unike.types import Case, EditRequest

# The multiplier learns faster than the network: it has to follow it.
MULTIPLIER_LR = 0.1


class _Conditioner(nn.Module):
    """Gate, offset and step size of one weight ``(out, in)``, from the condition."""

    def __init__(self, outputs: int, inputs: int, condition: int, hidden: int) -> None:
        super().__init__()
        self.sizes = [outputs, inputs, outputs, inputs, 1]
        self.net = nn.Sequential(nn.Linear(condition, hidden), nn.Tanh(), nn.Linear(hidden, sum(self.sizes)))

    def forward(
        self, condition: torch.Tensor, inputs: torch.Tensor, gradients: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of ``scale * size * (gate * gradient + offset)``; both products keep the rank low."""
        rows, columns, more_rows, more_columns, size = self.net(condition).split(self.sizes)
        count = len(rows)
        # Published gates are softmax outputs, whose mean is one over the width: times the width, the
        # gate of an untrained network neither shrinks nor grows the gradient.
        left = torch.cat([inputs * (1 + columns), more_columns[None]])
        right = torch.cat([gradients * rows.softmax(0) * count, more_rows.softmax(0)[None]])
        return left, -scale * size.sigmoid() * right


class KENetwork(nn.Module):
    """The LSTM, a conditioner for each edited module, and the multiplier of the constraint."""

    def __init__(self, sites: Mapping[Site, nn.Linear], width: int, rank: int) -> None:
        super().__init__()
        self.names = {site: f"{site[0]}_{site[1]}" for site in sites}
        self.reader = nn.LSTM(width, rank, batch_first=True, bidirectional=True)
        self.conditioners = nn.ModuleDict(
            {
                self.names[s]: _Conditioner(m.weight.shape[0], m.weight.shape[1], 2 * rank, rank // 2 + 1)
                for s, m in sites.items()
            }
        )
        self.multiplier = nn.Parameter(torch.ones(()))

    def read_condition(self, states: torch.Tensor) -> torch.Tensor:
        """``(2 rank)`` from the edit's states ``(t, d)``: the final state of each direction."""
        _, (last, _) = self.reader(nn.functional.layer_norm(states, states.shape[-1:])[None])
        return last.flatten()


class KE(TrainableMethod):
    """Edits the feed-forward networks of the YAML's ``layers`` with one gated gradient."""

    def build(self, backbone: Backbone) -> KENetwork:
        sites = ffn_sites(backbone, self.layers(backbone))
        return KENetwork(sites, backbone.layout.width, self.hparams.editor_rank)

    def parameters(self) -> list[ParameterGroup]:
        network = self._network
        rest = [p for p in network.parameters() if p is not network.multiplier]
        return [{"params": rest}, {"params": [network.multiplier], "lr": MULTIPLIER_LR}]

    def settle(self) -> None:
        self._network.multiplier.data.clamp_(min=0)

    def _edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None
    ) -> LowRankDelta:
        """From the base model's gradients, whatever ``history`` holds."""
        with torch.no_grad():
            return self._make_delta(backbone, request, prefixes)

    def loss(self, backbone: Backbone, case: Case, prefixes: PrefixCache) -> torch.Tensor:
        """The Lagrangian, with its sign reversed for the multiplier, which maximises it."""
        nll, change = self._compute_losses(backbone, case, prefixes)
        excess, multiplier = change - self.hparams.ke_margin, self._network.multiplier
        return nll + multiplier.detach() * excess - multiplier * excess.detach()

    def validation(self, backbone: Backbone, case: Case, prefixes: PrefixCache) -> torch.Tensor:
        """Weighted as MEND's loss: the Lagrangian moves with the multiplier."""
        nll, change = self._compute_losses(backbone, case, prefixes)
        return self.hparams.c_edit * nll + self.hparams.c_loc * change

    @property
    def _network(self) -> KENetwork:
        assert isinstance(self.trained, KENetwork)
        return self.trained

    def _compute_losses(
        self, backbone: Backbone, case: Case, prefixes: PrefixCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        edit = self._make_delta(backbone, case.request, prefixes)
        hp = self.hparams
        return compute_edit_losses(
            backbone, edit, case, prefixes, hp.editor_probes, hp.answer_end, self.constants
        )

    def _make_delta(self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache) -> LowRankDelta:
        network, state = self._network, prefixes.state([self.write_lesson(request)])
        sites = ffn_sites(backbone, self.layers(backbone))
        gradients = self.keep(
            "gradients", name_request(request), lambda: compute_answer_gradients(backbone, state, sites)
        )
        condition = network.read_condition(state.hidden[0].float())
        factors = {}
        for site, (inputs, outputs) in gradients.items():
            conditioner = network.conditioners[network.names[site]]
            factors[site] = conditioner(condition, inputs, outputs, self.hparams.edit_scale)
        return LowRankDelta(factors, {"steps": 1})
