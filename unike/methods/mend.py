"""MEND: editor networks that turn an edit's raw gradients into a better step (Mitchell et al. 2022).

The gradient of a linear module is a sum over tokens of (output gradient) x (input): a network maps
each such pair to another pair, starting from the identity. One network serves all modules of the
same shape, with a scale and a shift of its own for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


class _Block(nn.Module):
    """``x + act(scale * (up down x + bias) + shift)``; the identity before training."""

    def __init__(self, width: int, rank: int, modes: int, last: bool) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width)
        self.scale = nn.Parameter(torch.ones(modes, width))
        self.shift = nn.Parameter(torch.zeros(modes, width))
        self.last = last
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor, mode: int) -> torch.Tensor:
        moved = self.scale[mode] * self.up(self.down(x)) + self.shift[mode]
        # At the identity the argument is exactly 0, where relu has no gradient and clamp has one.
        return x + (moved if self.last else moved.clamp(min=0))


class _ShapeEditor(nn.Module):
    """The network of one weight shape ``(out, in)``: normalised pairs to pairs."""

    def __init__(self, outputs: int, inputs: int, rank: int, modes: int) -> None:
        super().__init__()
        width = inputs + outputs
        self.inputs = inputs
        self.blocks = nn.ModuleList(_Block(width, rank, modes, last) for last in (False, True))
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, pairs: torch.Tensor, mode: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = (pairs - self.mean) / (self.std + 1e-7)
        for block in self.blocks:
            x = block(x, mode)
        return x[:, : self.inputs], x[:, self.inputs :]


class MendNetwork(nn.Module):
    """All shapes' networks, and each edited module's learned step size."""

    def __init__(self, sites: Mapping[Site, nn.Linear], rank: int, scale: float) -> None:
        super().__init__()
        shapes: dict[str, list[Site]] = {}
        for site, module in sites.items():
            shapes.setdefault(_name_shape(module), []).append(site)
        self.place = {site: (name, mode) for name, own in shapes.items() for mode, site in enumerate(own)}
        rows = {_name_shape(m): m.weight.shape for m in sites.values()}
        self.editors = nn.ModuleDict(
            {name: _ShapeEditor(rows[name][0], rows[name][1], rank, len(own)) for name, own in shapes.items()}
        )
        self.log_scale = nn.Parameter(torch.full((len(sites),), scale).log())

    def forward(self, site: Site, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of a module's change, from its ``pairs (T, in + out)``."""
        name, mode = self.place[site]
        left, right = self.editors[name](pairs, mode)
        return left, -self.log_scale[list(self.place).index(site)].exp() * right


def _name_shape(module: nn.Linear) -> str:
    outputs, inputs = module.weight.shape
    return f"{inputs}x{outputs}"


class MEND(TrainableMethod):
    """Edits the feed-forward networks of the YAML's ``layers`` with one transformed gradient."""

    def build(self, backbone: Backbone) -> MendNetwork:
        sites = ffn_sites(backbone, self.layers(backbone))
        return MendNetwork(sites, self.hparams.editor_rank, self.hparams.edit_scale)

    def parameters(self) -> list[ParameterGroup]:
        """The step sizes have the learning rate ``mend_scale_lr``, where the YAML has one.

        Published trainings give them 100 times the networks' rate (1e-4 and 1e-6, by an optimiser of their
        own), and learn the step sizes themselves; here their logarithms are learnt, so that none changes its
        sign.
        """
        if self.hparams.mend_scale_lr is None:
            return super().parameters()
        network = self._network
        rest = [p for p in network.parameters() if p is not network.log_scale]
        return [{"params": rest}, {"params": [network.log_scale], "lr": self.hparams.mend_scale_lr}]

    def calibrate(self, backbone: Backbone, cases: Sequence[Case], prefixes: PrefixCache) -> None:
        """Sets mean and standard deviation of the raw pairs, by shape."""
        network = self._network
        pairs: dict[str, list[torch.Tensor]] = {}
        for case in cases:
            for site, own in self._read_pairs(backbone, case.request, prefixes).items():
                pairs.setdefault(network.place[site][0], []).append(own)
        for name, parts in pairs.items():
            editor, seen = network.editors[name], torch.cat(parts)
            editor.mean.copy_(seen.mean(0))  # type: ignore[union-attr, operator]
            editor.std.copy_(seen.std(0))  # type: ignore[union-attr, operator]

    def _edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None
    ) -> LowRankDelta:
        """From the base model's gradients, whatever ``history`` holds: the editor was trained on no others,
        and turns the larger ones of an edited model into ever larger changes."""
        with torch.no_grad():
            return self._make_delta(backbone, request, prefixes)

    def loss(self, backbone: Backbone, case: Case, prefixes: PrefixCache) -> torch.Tensor:
        hp = self.hparams
        edit = self._make_delta(backbone, case.request, prefixes)
        nll, change = compute_edit_losses(
            backbone, edit, case, prefixes, hp.editor_probes, hp.answer_end, self.constants
        )
        return hp.c_edit * nll + hp.c_loc * change

    @property
    def _network(self) -> MendNetwork:
        assert isinstance(self.trained, MendNetwork)
        return self.trained

    def _make_delta(self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache) -> LowRankDelta:
        pairs = self.keep(
            "pairs", name_request(request), lambda: self._read_pairs(backbone, request, prefixes)
        )
        return LowRankDelta({site: self._network(site, own) for site, own in pairs.items()}, {"steps": 1})

    def _read_pairs(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache
    ) -> dict[Site, torch.Tensor]:
        """Each module's ``(T, in + out)``: input and output gradient of every token that has one."""
        state = prefixes.state([self.write_lesson(request)])
        sites = ffn_sites(backbone, self.layers(backbone))
        gradients = compute_answer_gradients(backbone, state, sites, None)
        return {site: torch.cat([x, d], 1)[(d != 0).any(1)] for site, (x, d) in gradients.items()}
