"""UniKE: extra key-value pairs and in-context knowledge states in the same last layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unike.backbones.base import Backbone
from unike.backbones.prefix import PrefixCache
from unike.config.hparams import HyperParams
from unike.edits import Edit, EditRecord, LayerShare, RoutedEdit, Routing
from unike.methods.base import Knowledge, register
from unike.methods.patching import Outcome, OwnStates, PatchMethod, fresh_patches, own_states, train_patches
from unike.types import EditRequest, UserError


def uses_knowledge(hparams: HyperParams) -> bool:
    """Whether the bank or the encoders are read at all."""
    latent = hparams.external == "latent" and (hparams.memory != "edit" or hparams.alpha == "adaptive")
    zeta = hparams.intrinsic and hparams.zeta != "none" and hparams.beta > 0
    return latent or zeta or hparams.memory_loss > 0 or measures_scope(hparams)


def measures_scope(hparams: HyperParams) -> bool:
    """Whether the gate uses the trained measure."""
    return hparams.scope_gate != "none" and hparams.scope_measure == "trained"


def check_scope(hparams: HyperParams) -> None:
    """UserError for a gate without a threshold to open at."""
    gated = hparams.scope_gate != "none" and not measures_scope(hparams)
    if gated and hparams.scope_threshold is None:
        at = f"{hparams.source}: scope_threshold: null"
        raise UserError(f"{at}; expected a number with scope_measure: {hparams.scope_measure}")


@register("unike", uses_knowledge, check=check_scope, needs_scope=measures_scope)
class UniKE(PatchMethod):
    """Both halves and their couplings; every ablation is a switch of the YAML."""

    def __init__(self, hparams: HyperParams, knowledge: Knowledge) -> None:
        self.hparams = hparams
        self.knowledge = knowledge
        self.routing = Routing(**{k: getattr(hparams, k) for k in Routing.__dataclass_fields__})

    def made(
        self,
        backbone: Backbone,
        requests: Sequence[EditRequest],
        prefixes: PrefixCache,
        history: Edit | None,
    ) -> list[Outcome]:
        layers, queries = self.layers(backbone), [r.query for r in requests]
        state = prefixes.state(queries)
        edits = [
            self._untrained(backbone, request, states)
            for request, states in zip(requests, own_states(backbone, state, layers), strict=True)
        ]
        if not self.hparams.intrinsic:
            for edit in edits:
                edit.info.update(steps=0)
            return list(edits)
        if self.hparams.external == "prompt":
            state = prefixes.state([e.rewrite(q) for e, q in zip(edits, queries, strict=True)])
        return train_patches(backbone, state, edits, self.hparams, self.knowledge, history)

    def _untrained(
        self, backbone: Backbone, request: EditRequest, states: dict[int, OwnStates]
    ) -> RoutedEdit:
        patches = {}
        if self.hparams.intrinsic:
            patches = fresh_patches(backbone, request, states, self.hparams, self.knowledge)
        shares = {i: LayerShare(s.sem, s.pos, patches.get(i)) for i, s in states.items()}
        shown = None
        if self.hparams.external == "prompt":
            shown = f"{request.query.prompt} {str(request.query.target).strip()}"
        first = min(states)
        record = EditRecord(request.id, shares, shown, self._scope_key(first, states[first].asked))
        return RoutedEdit((record,), self.routing, self.knowledge)

    def _scope_key(self, first: int, asked: torch.Tensor) -> torch.Tensor | None:
        """Where the edit lies in the trained space of scope, ``(r)``."""
        if not measures_scope(self.hparams):
            return None
        measure = self.knowledge[first].scope
        assert measure is not None, "runs.prepare learns it first"
        return measure.encoder(asked[None], torch.ones(1, len(asked), dtype=torch.bool, device=asked.device))[
            0
        ]
