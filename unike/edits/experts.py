"""LiveEdit's edits: experts of low rank at one layer's output, found by image and weighed by question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch

from unike.backbones.base import Backbone, PromptRows
from unike.backbones.hooks import transform
from unike.edits.activity import Activity, Decisions
from unike.edits.base import Edit, EditBatch, Inspection, have_same_weights
from unike.edits.content import Content, digest
from unike.edits.expert_network import (
    ExpertNetwork,
    compare_each,
    compare_features,
    keep_near,
    weigh_kept,
)
from unike.edits.shares import Shared
from unike.knowledge.memory import GrowingRows

_PARTS = ("left", "right", "image", "question")


@dataclass(frozen=True)
class ExpertRecord:
    """One edit: its expert's factors ``left`` and ``right (r, d)``, and the features by which prompts find
    it, of its ``image`` and of its ``question (k, m)``."""

    id: str
    left: torch.Tensor
    right: torch.Tensor
    image: torch.Tensor
    question: torch.Tensor


class _Experts:
    """The records' tensors, stacked: ``(E, ...)`` each; they grow with a sequence of edits."""

    def __init__(self, records: Sequence[ExpertRecord]) -> None:
        self.rows = {part: GrowingRows(_stack(records, part)) for part in _PARTS}

    def __len__(self) -> int:
        return len(self.rows["left"])

    def __getitem__(self, part: str) -> torch.Tensor:
        return self.rows[part].tensor

    def grow(self, records: Sequence[ExpertRecord]) -> _Experts:
        """These and further ones; what is there is shared."""
        out = object.__new__(_Experts)
        out.rows = {part: rows.grow(_stack(records, part)) for part, rows in self.rows.items()}
        return out


def _stack(records: Sequence[ExpertRecord], part: str) -> torch.Tensor:
    return torch.stack([getattr(record, part) for record in records])


@dataclass
class ExpertEdit(Edit):
    """Experts at the output of decoder layer ``layer``.

    A prompt's experts are chosen once, at its first pass, by what leaves that layer. Of the last prompts,
    ``kept (B, E)`` are those whose image is nearer than the network's learnt one, and ``strengths (B, E)``
    their weights by the question. A prompt without an image keeps none.
    """

    kind = "experts"
    records: tuple[ExpertRecord, ...]
    network: ExpertNetwork
    layer: int
    info: dict[str, object] = field(default_factory=dict)
    kept: torch.Tensor | None = field(default=None, repr=False)
    strengths: torch.Tensor | None = field(default=None, repr=False)
    # Of the leading records, shared with the edit that this one was joined from.
    _experts: _Experts | None = field(default=None, init=False, repr=False)

    @contextmanager
    def applied(self, backbone: Backbone) -> Iterator[None]:
        with _install(self, backbone, None):
            yield

    def stack_experts(self) -> _Experts:
        """The tensors of all records."""
        known = 0 if self._experts is None else len(self._experts)
        if self._experts is None:
            self._experts = _Experts(self.records)
        elif known < len(self.records):
            self._experts = self._experts.grow(self.records[known:])
        return self._experts

    def changes_prefix(self, backbone: Backbone, first: int) -> bool:
        return self.layer < first

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {f"{r.id}.{part}": getattr(r, part) for r in self.records for part in _PARTS}

    def needs(self) -> dict[str, str]:
        return {"network": digest(self.network.state_dict())}

    def shares_needs(self, other: Edit) -> bool:
        return isinstance(other, ExpertEdit) and have_same_weights(self.network, other.network)

    def pack(self) -> Content:
        tensors = {f"{n}.{part}": getattr(r, part) for n, r in enumerate(self.records) for part in _PARTS}
        return Content({"records": [r.id for r in self.records], "layer": self.layer}, tensors)

    @classmethod
    def unpack(cls, content: Content, backbone: Backbone, shared: Shared) -> ExpertEdit:
        network, layer = shared.network, content.take_value("layer", int)
        if not isinstance(network, ExpertNetwork):
            raise ValueError("needs the trained network; hand it over as network=, or load it by its editor")
        if not 0 <= layer < len(backbone.layout):
            raise ValueError(f"layer: expected a number below {len(backbone.layout)}")
        sizes = network.sizes
        factor, feature = (sizes.rank, sizes.width), (sizes.vectors, sizes.inner)
        shapes = dict(zip(_PARTS, (factor, factor, feature, feature), strict=True))
        records = []
        for n, name in enumerate(content.take_texts("records")):
            own = {part: content.take_tensor(f"{n}.{part}", *shape) for part, shape in shapes.items()}
            records.append(ExpertRecord(str(name), **own))
        if not records:
            raise ValueError("records: expected one or more")
        return cls(tuple(records), network, layer)

    @property
    def units(self) -> tuple[ExpertRecord, ...]:
        return self.records

    def describe_prompt(self, inspection: Inspection) -> tuple[Activity, ...]:
        return tuple(_describe_record(*inspection.locate(record)) for record in self.records)

    def explain(self) -> Decisions:
        """How many ``experts`` each prompt kept, and the ``weight`` of all of them together."""
        if self.kept is None or self.strengths is None:
            return {}
        return {
            "experts": self.kept.sum(1).float().tolist(),
            "weight": self.strengths.sum(1).tolist(),
        }

    def batch(self, edits: Sequence[Edit]) -> EditBatch | None:
        same = [e for e in edits if isinstance(e, ExpertEdit) and len(e.records) == 1]
        if len(same) < len(edits) or any(e.network is not self.network for e in same):
            return None
        if any(e.layer != self.layer for e in same):
            return None
        return _ExpertBatch(ExpertEdit(tuple(e.records[0] for e in same), self.network, self.layer))

    def keep_units(self, units: Sequence[ExpertRecord]) -> Edit | None:
        return ExpertEdit(tuple(units), self.network, self.layer, self.info)

    def join(self, other: Edit) -> Edit | None:
        if not isinstance(other, ExpertEdit) or other.layer != self.layer:
            return None
        out = ExpertEdit(self.records + other.records, other.network, other.layer, other.info)
        out._experts = self.stack_experts()
        return out


def _describe_record(whole: Edit, place: int) -> Activity:
    assert isinstance(whole, ExpertEdit)
    assert whole.kept is not None
    assert whole.strengths is not None
    return Activity(bool(whole.kept[0, place]), whole.strengths[0, place].item())


class _ExpertBatch(EditBatch):
    """Each row can only keep its own edit's expert."""

    def __init__(self, edit: ExpertEdit) -> None:
        self.edit = edit

    @contextmanager
    def applied(self, backbone: Backbone, owners: torch.Tensor) -> Iterator[None]:
        with _install(self.edit, backbone, owners):
            yield

    def explain(self) -> Decisions:
        return self.edit.explain()


def _install(
    edit: ExpertEdit, backbone: Backbone, owners: torch.Tensor | None
) -> AbstractContextManager[None]:
    module = backbone.layout.layer(edit.layer)
    return transform([(module, module, _Runtime(edit, backbone, owners).after_layer)])


class _Runtime:
    """Experts while they are applied; with ``owners (R)`` each row can only keep its owner's."""

    def __init__(self, edit: ExpertEdit, backbone: Backbone, owners: torch.Tensor | None) -> None:
        self.edit, self.backbone, self.owners = edit, backbone, owners
        self.prompt, self.experts = backbone.prompt, edit.stack_experts()
        self.decided = -1
        # Of the experts that any row keeps, and their weights (B, E').
        self.left = self.right = self.weights = torch.zeros(0)

    def after_layer(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The layer's output, with what its experts add; chosen once per prompt, and kept while the answer is
        decoded."""
        if self.decided != self.prompt.number or self.prompt.question_end is None:
            rows, self.decided = self.prompt.spread(len(output)), self.prompt.number
            self._decide(output.detach(), rows)
        if not len(self.left):
            return output
        added = self.edit.network.apply_experts(output.float(), self.left, self.right, self.weights)
        return output + added.to(output.dtype)

    @torch.no_grad()
    def _decide(self, states: torch.Tensor, rows: PromptRows) -> None:
        kept, weights = self._route(states.float(), rows)
        self.edit.kept, self.edit.strengths = kept, weights
        if self.owners is not None:
            # As under the own edit alone.
            self.edit.kept, self.edit.strengths = (t.gather(1, self.owners[:, None]) for t in (kept, weights))
        some = kept.any(0)
        self.left, self.right = self.experts["left"][some], self.experts["right"][some]
        self.weights = weights[:, some]

    def _route(self, states: torch.Tensor, rows: PromptRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Which experts each row keeps, and their weights, ``(B, E)`` each."""
        network, count = self.edit.network, len(self.experts)
        kept = torch.zeros(len(states), count, dtype=torch.bool, device=states.device)
        weights = states.new_zeros(len(states), count)
        asked, shown = find_parts(self.backbone, rows)
        able = shown.any(1).nonzero()[:, 0]
        if not len(able):
            return kept, weights
        # A whole pass without a cache may have answer tokens after the prompt's.
        states = states[able, : asked.shape[1]]
        asked, shown = asked[able], shown[able]
        seen = network.prompts.read_image(states, asked, states, shown)
        near = compare_each(seen, network.prompts.read_sentinel(states, asked))
        found = keep_near(compare_features(seen, self.experts["image"]), near)
        if self.owners is not None:
            found &= torch.arange(count, device=found.device) == self.owners[able, None]
        question = network.prompts.read_question(states, asked)
        kept[able] = found
        weights[able] = weigh_kept(compare_features(question, self.experts["question"]), found)
        return kept, weights


def find_parts(backbone: Backbone, rows: PromptRows) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of each row's question, all that follows its image up to the prompt's last, and those of the
    image itself, as masks ``(R, s)``; nothing of a row without an image."""
    mask = rows.attention_mask
    places = torch.arange(mask.shape[1], device=mask.device)
    shown = rows.with_image or (False,) * len(mask)
    counts = [
        backbone.count_around_image(text) if has else (0, 0)
        for text, has in zip(rows.texts, shown, strict=True)
    ]
    before, after = torch.tensor(counts, device=mask.device).view(-1, 2).T
    ends = rows.question_end + 1
    image_end = (ends - after)[:, None]
    start = (mask.argmax(1) + before)[:, None]
    has = torch.tensor(shown, device=mask.device)[:, None]
    question = (places >= image_end) & (places < ends[:, None]) & has
    return question, (places >= start) & (places < image_end) & has
