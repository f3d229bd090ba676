"""UniKE: extra key-value pairs and in-context knowledge states in the same last layers.

The files of the package that one edit visits, in order:

1. ``evaluation/protocols.py`` reads the base model's answers (``evaluation/reader.py``), asks for the edit.
2. ``methods/base.py``: ``EditMethod`` calls the method, here by way of ``methods/patching.py``.
3. ``backbones/prefix.py`` computes what enters the edited layers, or takes it from its cache.
4. ``methods/patching.py`` reads the edit's own states with ``backbones/hooks.py``.
5. ``knowledge/patch.py`` draws the extra key-value pairs of each layer.
6. ``edits/routed.py`` holds the edit: own states, extra pairs, and how both are routed.
7. ``methods/training.py`` trains the pairs, one pass through the edited layers per step.
8. ``edits/runtime.py`` is hooked into each of these passes and, later, into those of the probes:
   ``knowledge/memory.py`` retrieves states, ``knowledge/adapter.py`` attends to them.
9. ``edits/origin.py`` records what the edit was made from, once ``methods/base.py`` has it back.
10. ``evaluation/protocols.py`` reads the answers under the edit; ``runs/records.py`` writes the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from unike.backbones.base import Backbone
from unike.backbones.prefix import PrefixCache
from unike.config.hparams import HyperParams
from unike.edits import Edit, EditRecord, LayerShare, RoutedEdit, Routing
from unike.methods.base import Knowledge
from unike.methods.catalogue import uses_own_gate, uses_scope
from unike.methods.patching import (
    OwnStates,
    PatchMethod,
    PatchOutcome,
    draw_patches,
    read_own_states,
    train_patches,
)
from unike.types import EditRequest


class UniKE(PatchMethod):
    """Both halves and their couplings; every ablation is a switch of the YAML."""

    def __init__(self, hparams: HyperParams, knowledge: Knowledge) -> None:
        super().__init__(hparams, knowledge)
        routing = Routing(**{k: getattr(hparams, k) for k in Routing.__dataclass_fields__})
        if not uses_own_gate(hparams):
            # Where there is one around the edit, the edit itself has none.
            routing = replace(
                routing, **{k: getattr(Routing, k) for k in vars(routing) if k.startswith("scope_")}
            )
        self.routing = routing

    def make_edits(
        self,
        backbone: Backbone,
        requests: Sequence[EditRequest],
        prefixes: PrefixCache,
        history: Edit | None,
    ) -> list[PatchOutcome]:
        layers, queries = self.layers(backbone), [self.write_lesson(r) for r in requests]
        state = prefixes.state(queries)
        own = read_own_states(backbone, state, layers, self.hparams.answer_end != "none")
        edits = [
            self._make_untrained(backbone, request, states)
            for request, states in zip(requests, own, strict=True)
        ]
        if not self.hparams.intrinsic:
            for edit in edits:
                edit.info.update(steps=0)
            return list(edits)
        if self.hparams.external == "prompt":
            state = prefixes.state([e.rewrite(q) for e, q in zip(edits, queries, strict=True)])
        return train_patches(backbone, state, edits, self.hparams, self.knowledge, history)

    def _make_untrained(
        self, backbone: Backbone, request: EditRequest, states: dict[int, OwnStates]
    ) -> RoutedEdit:
        patches = {}
        if self.hparams.intrinsic:
            patches = draw_patches(backbone, request, states, self.hparams, self.knowledge)
        shares = {i: LayerShare(s.sem, s.pos, patches.get(i)) for i, s in states.items()}
        shown = None
        if self.hparams.external == "prompt":
            shown = f"{request.query.prompt} {str(request.query.target).strip()}"
        first = min(states)
        record = EditRecord(request.id, shares, shown, self._read_scope_key(first, states[first].prompt))
        return RoutedEdit((record,), self.routing, self.knowledge)

    def _read_scope_key(self, first: int, prompt: torch.Tensor) -> torch.Tensor | None:
        """Where the edit lies in the scope classifier's space, ``(r)``; None without one."""
        if not uses_scope(self.hparams):
            return None
        scope = self.knowledge[first].scope
        assert scope is not None, "runs.prepare trains it first"
        mask = torch.ones(1, len(prompt), dtype=torch.bool, device=prompt.device)
        return scope.encoder(prompt[None], mask)[0]
