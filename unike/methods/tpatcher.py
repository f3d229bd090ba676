"""T-Patcher (Huang et al. 2023): UniKE's intrinsic half alone, with its own keys and losses.

Each new key starts at one of the edit's own queries. The activation loss keeps it active there, the
memory loss keeps it inactive on stored queries of the training split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from unike.backbones.base import Backbone
from unike.backbones.prefix import PrefixCache
from unike.config.hparams import HyperParams
from unike.edits import Edit, EditRecord, LayerShare, RoutedEdit, Routing
from unike.methods.base import Knowledge
from unike.methods.patching import PatchMethod, PatchOutcome, draw_patches, read_own_states, train_patches
from unike.types import EditRequest


class TPatcher(PatchMethod):
    """Patches without zeta, gate and in-context knowledge, whatever the YAML's options for these."""

    def __init__(self, hparams: HyperParams, knowledge: Knowledge) -> None:
        super().__init__(hparams, knowledge)
        self.settings = replace(hparams, key_init="query", beta=0.0)
        self.routing = Routing(external="none")

    def make_edits(
        self,
        backbone: Backbone,
        requests: Sequence[EditRequest],
        prefixes: PrefixCache,
        history: Edit | None,
    ) -> list[PatchOutcome]:
        state = prefixes.state([self.write_lesson(r) for r in requests])
        edits = []
        ended = self.settings.answer_end != "none"
        for request, states in zip(
            requests, read_own_states(backbone, state, self.layers(backbone), ended), strict=True
        ):
            patches = draw_patches(backbone, request, states, self.settings, self.knowledge)
            shares = {i: LayerShare(s.sem, s.pos, patches[i]) for i, s in states.items()}
            edits.append(RoutedEdit((EditRecord(request.id, shares),), self.routing))
        return train_patches(backbone, state, edits, self.settings, self.knowledge, history)
