"""SERAC's edits: a memory of them, a scope classifier, and a counterfactual model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from unike.backbones.base import Backbone
from unike.backbones.hooks import transform
from unike.edits.activity import Activity, Decisions
from unike.edits.base import Edit, EditBatch, Inspection, have_same_weights
from unike.edits.content import Content, digest
from unike.edits.shares import Shared

# Questions whose cosine is this near to 1 have the same scope.
SAME_SCOPE = 1e-6


class ScopeClassifier(nn.Module):
    """Maps questions to unit vectors: the more similar two are, the more probably they share a scope."""

    def __init__(self, width: int, rank: int, multimodal: bool) -> None:
        super().__init__()
        self.words = nn.GRU(width, rank, batch_first=True, bidirectional=True)
        self.state = nn.Sequential(nn.Linear(width, rank), nn.ReLU()) if multimodal else None
        self.out = nn.Linear(2 * rank + (rank if multimodal else 0), rank)
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.bias = nn.Parameter(torch.tensor(-5.0))

    def forward(
        self, words: Sequence[torch.Tensor], ends: torch.Tensor, packed: bool = False
    ) -> torch.Tensor:
        """``(b, rank)`` from each question's word embeddings ``(t, d)`` and its last state ``(b, d)``.

        A question's vector must not depend on the lengths of the others: they are read one at a time, unless
        they are ``packed``, which is faster in training and rounds otherwise.
        """
        if packed:
            seen = self._read_packed(words)
        else:
            seen = torch.stack([self.words(w[None])[0].mean(1)[0] for w in words])
        if self.state is not None:
            seen = torch.cat([seen, self.state(F.layer_norm(ends, ends.shape[-1:]))], 1)
        return F.normalize(self.out(seen), dim=1)

    def _read_packed(self, words: Sequence[torch.Tensor]) -> torch.Tensor:
        """``(b, 2 rank)``; what is given several times, as one tensor, is read once."""
        once = {id(w): w for w in words}
        places = {key: place for place, key in enumerate(once)}
        lengths = torch.tensor([len(w) for w in once.values()])
        together = nn.utils.rnn.pack_sequence(list(once.values()), enforce_sorted=False)
        padded, _ = nn.utils.rnn.pad_packed_sequence(self.words(together)[0], batch_first=True)
        means = padded.sum(1) / lengths.to(padded.device)[:, None]
        return means[[places[id(w)] for w in words]]

    def logits(self, questions: torch.Tensor, edits: torch.Tensor) -> torch.Tensor:
        """``(b, e)``: above 0 where the question is probably in the edit's scope."""
        return self.scale * (questions @ edits.T) + self.bias


class Counterfactual(nn.Module):
    """The counterfactual model: attention of every position over an edit's answer positions."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.match = nn.Linear(width, rank, bias=False)
        self.sharpness = nn.Parameter(torch.tensor(2.0))
        self.nothing = nn.Parameter(torch.zeros(()))
        self.gain = nn.Parameter(torch.tensor(1.0))
        last = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(last.weight)
        self.turn = nn.Sequential(nn.Linear(width, rank, bias=False), last)

    def keys(self, states: torch.Tensor) -> torch.Tensor:
        """States ``(..., d)`` as unit vectors ``(..., rank)``."""
        return F.normalize(self.match(F.layer_norm(states, states.shape[-1:])), dim=-1)

    def values(self, states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """``(j, d)``: what moves the head's input towards each word, on the scale of the states."""
        unit = F.normalize(words, dim=-1)
        return states.norm(dim=-1, keepdim=True) * self.gain * (unit + self.turn(unit))

    def forward(self, states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The change at states ``(b, t, d)`` under the edits' ``keys (b, j, r)``, ``values (b, j, d)``.

        Keys of zeros, as they pad short answers, get no attention.
        """
        logits = self.sharpness.exp() * (self.keys(states) @ keys.transpose(1, 2))
        logits = logits.masked_fill((keys == 0).all(-1)[:, None], float("-inf"))
        nothing = self.nothing.expand(*logits.shape[:2], 1)
        return torch.cat([logits, nothing], -1).softmax(-1)[..., :-1] @ values


class SeracNetwork(nn.Module):
    """SERAC's scope classifier and counterfactual model."""

    def __init__(self, width: int, rank: int, multimodal: bool) -> None:
        super().__init__()
        self.scope = ScopeClassifier(width, rank, multimodal)
        self.counterfactual = Counterfactual(width, rank)


@dataclass(frozen=True)
class MemoryRecord:
    """One edit in memory: its question ``(rank)``, and ``keys (j, rank)`` and ``values (j, d)`` of its
    answer's positions; the last one, after the answer, has a value of zeros: the base model ends it."""

    id: str
    question: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


@dataclass
class SeracEdit(Edit):
    """SERAC's edits in memory.

    ``probabilities (B, E)`` say how probably each of the last prompts is in each edit's scope. The most
    probable edit, ``chosen (B)``, answers where its probability, ``scopes (B)``, is above one half; of edits
    with the same scope, the newest.
    """

    kind = "memory"
    records: tuple[MemoryRecord, ...]
    network: SeracNetwork
    first: int
    info: dict[str, object] = field(default_factory=dict)
    scopes: torch.Tensor | None = field(default=None, repr=False)
    chosen: torch.Tensor | None = field(default=None, repr=False)
    probabilities: torch.Tensor | None = field(default=None, repr=False)

    @contextmanager
    def applied(self, backbone: Backbone) -> Iterator[None]:
        with _install(self, backbone, _Runtime(self, backbone)):
            yield

    def changes_prefix(self, backbone: Backbone, first: int) -> bool:
        return self.first < first

    def state_dict(self) -> dict[str, torch.Tensor]:
        parts = ("question", "keys", "values")
        return {f"{r.id}.{part}": getattr(r, part) for r in self.records for part in parts}

    def needs(self) -> dict[str, str]:
        return {"network": digest(self.network.state_dict())}

    def shares_needs(self, other: Edit) -> bool:
        return isinstance(other, SeracEdit) and have_same_weights(self.network, other.network)

    def pack(self) -> Content:
        parts = ("question", "keys", "values")
        tensors = {f"{n}.{part}": getattr(r, part) for n, r in enumerate(self.records) for part in parts}
        return Content({"records": [r.id for r in self.records], "first": self.first}, tensors)

    @classmethod
    def unpack(cls, content: Content, backbone: Backbone, shared: Shared) -> SeracEdit:
        network, first = shared.network, content.take_value("first", int)
        if not isinstance(network, SeracNetwork):
            raise ValueError("needs the trained network; hand it over as network=, or load it by its editor")
        if not 0 <= first < len(backbone.layout):
            raise ValueError(f"first: expected a number below {len(backbone.layout)}")
        rank, width, records = network.scope.out.out_features, backbone.layout.width, []
        for n, name in enumerate(content.take_texts("records")):
            question, keys = (
                content.take_tensor(f"{n}.question", rank),
                content.take_tensor(f"{n}.keys", None, rank),
            )
            values = content.take_tensor(f"{n}.values", len(keys), width)
            records.append(MemoryRecord(str(name), question, keys, values))
        if not records:
            raise ValueError("records: expected one or more")
        return cls(tuple(records), network, first)

    @property
    def units(self) -> tuple[MemoryRecord, ...]:
        return self.records

    def describe_prompt(self, inspection: Inspection) -> tuple[Activity, ...]:
        return tuple(_describe_record(*inspection.locate(record)) for record in self.records)

    def explain(self) -> Decisions:
        return {} if self.scopes is None else {"scope": self.scopes.tolist()}

    def batch(self, edits: Sequence[Edit]) -> EditBatch | None:
        same = [e for e in edits if isinstance(e, SeracEdit) and len(e.records) == 1]
        if len(same) < len(edits) or any(e.network is not self.network for e in same):
            return None
        if any(e.first != self.first for e in same):
            return None
        return _SeracBatch(SeracEdit(tuple(e.records[0] for e in same), self.network, self.first))

    def keep_units(self, units: Sequence[MemoryRecord]) -> Edit | None:
        return SeracEdit(tuple(units), self.network, self.first, self.info)

    def join(self, other: Edit) -> Edit | None:
        if not isinstance(other, SeracEdit) or other.first != self.first:
            return None
        return SeracEdit(self.records + other.records, other.network, other.first, other.info)


def _describe_record(whole: Edit, place: int) -> Activity:
    assert isinstance(whole, SeracEdit)
    assert whole.probabilities is not None
    assert whole.chosen is not None
    scope = whole.probabilities[0, place].item()
    return Activity(int(whole.chosen[0]) == place and scope > 0.5, scope)


class _SeracBatch(EditBatch):
    """Each row is compared with its own edit only."""

    def __init__(self, edit: SeracEdit) -> None:
        self.edit = edit

    @contextmanager
    def applied(self, backbone: Backbone, owners: torch.Tensor) -> Iterator[None]:
        with _install(self.edit, backbone, _Runtime(self.edit, backbone, owners)):
            yield

    def explain(self) -> Decisions:
        return self.edit.explain()


def _install(edit: SeracEdit, backbone: Backbone, runtime: _Runtime) -> AbstractContextManager[None]:
    first, last = backbone.layout.layer(edit.first), backbone.layout.layer(len(backbone.layout) - 1)
    return transform([(first, first, runtime.decide), (last, last, runtime.answer)])


class _Runtime:
    """A memory while it is applied; with ``owners (R)`` each row can only choose the edit of that number."""

    def __init__(self, edit: SeracEdit, backbone: Backbone, owners: torch.Tensor | None = None) -> None:
        self.owners = owners
        self.edit, self.backbone, self.prompt = edit, backbone, backbone.prompt
        pad = nn.utils.rnn.pad_sequence
        self.questions = torch.stack([r.question for r in edit.records])
        self.keys = pad([r.keys for r in edit.records], batch_first=True)
        self.values = pad([r.values for r in edit.records], batch_first=True)
        self.decided = -1
        self.chosen: torch.Tensor | None = None
        self.open: torch.Tensor | None = None

    def decide(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Chooses an edit once per prompt, at its last token, and keeps it while the answer is decoded."""
        if self.decided != self.prompt.number or self.prompt.question_end is None:
            rows, self.decided = self.prompt.spread(len(x)), self.prompt.number
            ends = x[torch.arange(len(x), device=x.device), rows.question_end].float()
            words = [_embed_words(self.backbone, text) for text in rows.texts]
            scope = self.edit.network.scope
            every = scope.logits(scope(words, ends), self.questions)
            if self.owners is None:
                logits, nearest = every.max(1)
                # Of edits with one scope the newest answers: it corrects the others.
                alike = self.questions[nearest] @ self.questions.T >= 1 - SAME_SCOPE
                self.chosen = alike.shape[1] - 1 - alike.int().flip(1).argmax(1)
            else:
                logits, self.chosen = every.gather(1, self.owners[:, None])[:, 0], self.owners
            self.open = logits > 0
            self.edit.scopes, self.edit.chosen = logits.sigmoid().detach(), self.chosen
            self.edit.probabilities = every.sigmoid().detach()
        return output

    def answer(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The last layer's output, moved towards the answer of the chosen edit."""
        assert self.open is not None
        if not bool(self.open.any()):
            return output
        moved = self.edit.network.counterfactual(x.float(), self.keys[self.chosen], self.values[self.chosen])
        return torch.where(self.open[:, None, None], output + moved.to(output.dtype), output)


def _embed_words(backbone: Backbone, text: str) -> torch.Tensor:
    """Embeddings ``(t, d)`` of a text's tokens."""
    ids = torch.tensor(backbone.tokens(text), device=backbone.device)
    words: torch.Tensor = backbone.layout.embeddings(ids)
    return words.float()
