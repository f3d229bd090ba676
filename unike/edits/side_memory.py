"""WISE's edits: changes to a copy of one feed-forward matrix, and the routing to it (Wang et al. 2024).

The copy is the frozen matrix plus what the edits change of it; only the change is kept. A prompt whose
activations the change moves far enough is answered with the change, any other one without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
from torch import nn

from unike.backbones.base import Backbone, PromptRows
from unike.backbones.hooks import transform, watch
from unike.edits.activity import UNKNOWN, Activity, Decisions, WeightChange
from unike.edits.base import Edit, Inspection
from unike.edits.content import Content
from unike.edits.shares import Shared


@dataclass(frozen=True)
class SideRecord:
    """One edit's part: ``values (n)`` that are added at ``places (n)`` of the flattened matrix, the ``shard``
    that it belongs to, and the ``activation`` of its own prompt."""

    id: str
    shard: int
    places: torch.Tensor
    values: torch.Tensor
    activation: float


def sum_shards(records: Sequence[SideRecord], shape: tuple[int, int]) -> dict[int, torch.Tensor]:
    """Each shard's change of the matrix, ``(out, in)``: the sum over its edits."""
    shards: dict[int, torch.Tensor] = {}
    for record in records:
        flat = shards.get(record.shard)
        if flat is None:
            flat = shards[record.shard] = record.values.new_zeros(shape[0] * shape[1])
        flat.index_add_(0, record.places.long(), record.values)
    return {shard: flat.reshape(shape) for shard, flat in shards.items()}


def merge_shards(shards: Sequence[torch.Tensor], density: float) -> torch.Tensor:
    """TIES (Yadav et al. 2023): of each change the share ``density`` of the largest entries is kept, the sign
    of the sum is elected for each entry, and those of that sign are averaged. A single one stays whole."""
    if len(shards) == 1:
        return shards[0]
    trimmed = torch.stack([_trim(shard, density) for shard in shards])
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agreeing = trimmed.sign() == elected
    return (trimmed * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def _trim(change: torch.Tensor, density: float) -> torch.Tensor:
    flat = change.flatten()
    largest = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, largest, flat[largest]).reshape(change.shape)


def measure_activations(moved: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """``||A(x) (W' - W)||``, the mean over a prompt's tokens: ``(R, T, d)`` with ``asked (R, T)`` to
    ``(R)``."""
    norms = moved.float().norm(dim=-1)
    return (norms * asked).sum(1) / asked.sum(1)


def mark_prompts(rows: PromptRows, length: int) -> torch.Tensor:
    """The prompts' own tokens, ``(R, T)``: without padding and answers."""
    places = torch.arange(length, device=rows.question_end.device)
    width = rows.attention_mask.shape[1]
    real = torch.zeros(len(rows.question_end), length, dtype=torch.bool, device=places.device)
    real[:, :width] = rows.attention_mask.bool()
    return real & (places <= rows.question_end[:, None])


@dataclass
class SideMemoryEdit(Edit):
    """WISE's edits of one ``layer``, whose matrix has the ``shape (out, in)``. The change applies to a prompt
    whose activation is at least ``ratio`` of the smallest of the edits' own. After a forward pass
    ``activations (R)`` are those of the last prompts."""

    kind = "side_memory"
    records: tuple[SideRecord, ...]
    layer: int
    shape: tuple[int, int]
    ratio: float
    density: float
    info: dict[str, object] = field(default_factory=dict)
    activations: torch.Tensor | None = field(default=None, repr=False)

    @cached_property
    def change(self) -> torch.Tensor:
        """``W' - W``, the shards merged, ``(out, in)``."""
        shards = sum_shards(self.records, self.shape)
        return merge_shards([shards[number] for number in sorted(shards)], self.density)

    @property
    def threshold(self) -> float:
        """The least activation of a prompt that the change applies to."""
        return self.ratio * min(record.activation for record in self.records)

    @contextmanager
    def applied(self, backbone: Backbone) -> Iterator[None]:
        runtime = _Runtime(self, backbone)
        module = backbone.layout.ffn(self.layer).value
        with (
            watch(backbone.layout.layer(self.layer), runtime.see),
            transform([(module, module, runtime.route)]),
        ):
            yield

    def changes_prefix(self, backbone: Backbone, first: int) -> bool:
        return self.layer < first

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {f"{n}.{part}": getattr(r, part) for n, r in enumerate(self.records) for part in _TENSORS}

    def pack(self) -> Content:
        values: dict[str, object] = {
            "records": [record.id for record in self.records],
            "shards": [record.shard for record in self.records],
            "activations": [record.activation for record in self.records],
            "layer": self.layer,
            "ratio": self.ratio,
            "density": self.density,
        }
        return Content(values, self.state_dict())

    @classmethod
    def unpack(cls, content: Content, backbone: Backbone, shared: Shared) -> SideMemoryEdit:
        layer, names = content.take_value("layer", int), content.take_texts("records")
        shards, activations = content.take_value("shards", list), content.take_value("activations", list)
        ratio, density = content.take_value("ratio", float), content.take_value("density", float)
        if not 0 <= layer < len(backbone.layout):
            raise ValueError(f"layer: expected a number below {len(backbone.layout)}")
        if not names or not len(names) == len(shards) == len(activations):
            raise ValueError("records: expected one or more, with as many shards and activations")
        if not all(type(shard) is int and shard >= 0 for shard in shards):
            raise ValueError("shards: expected whole numbers of at least 0")
        if not all(type(a) is float and a >= 0 for a in activations) or not 0 < density <= 1 or ratio < 0:
            raise ValueError("activations, ratio, density: expected numbers of at least 0")
        module = cast(nn.Linear, backbone.layout.ffn(layer).value)
        shape, records = (module.out_features, module.in_features), []
        for n, name in enumerate(names):
            places = content.take_tensor(f"{n}.places", None, dtypes=("torch.int32",))
            if int(places.min()) < 0 or int(places.max()) >= shape[0] * shape[1]:
                raise ValueError(f"tensor {n}.places: expected places in a matrix of {shape}")
            values = content.take_tensor(f"{n}.values", len(places))
            records.append(SideRecord(str(name), shards[n], places, values, activations[n]))
        return cls(tuple(records), layer, shape, ratio, density)

    @property
    def units(self) -> tuple[SideRecord, ...]:
        return self.records

    def keep_units(self, units: Sequence[SideRecord]) -> Edit | None:
        return SideMemoryEdit(tuple(units), self.layer, self.shape, self.ratio, self.density, self.info)

    def describe_prompt(self, inspection: Inspection) -> tuple[Activity, ...]:
        module = inspection.backbone.layout.ffn(self.layer).value
        return tuple(_describe_record(r, inspection.locate(r)[0], module) for r in self.records)

    def explain(self) -> Decisions:
        return {} if self.activations is None else {"activation": self.activations.tolist()}

    def join(self, other: Edit) -> Edit | None:
        if not isinstance(other, SideMemoryEdit) or other._settings != self._settings:
            return None
        records, info = self.records + other.records, self.info | other.info
        return SideMemoryEdit(records, self.layer, self.shape, self.ratio, self.density, info)

    @property
    def _settings(self) -> Mapping[str, object]:
        return {name: getattr(self, name) for name in ("layer", "shape", "ratio", "density")}


_TENSORS = ("places", "values")


def _describe_record(record: SideRecord, whole: Edit, module: nn.Module) -> Activity:
    assert isinstance(whole, SideMemoryEdit)
    if whole.activations is None:
        return UNKNOWN
    found = whole.activations[0].item()
    change = WeightChange.of(f"{whole.layer}.value", record.values.norm(), cast(torch.Tensor, module.weight))
    note = f"the prompt's activation is {found:.3g}, and the change applies from {whole.threshold:.3g} on"
    return Activity(found >= whole.threshold, weights=(change,), notes=(note,))


class _Runtime:
    """A side memory while it is applied: it decides once for each prompt, and keeps that for its answer."""

    def __init__(self, edit: SideMemoryEdit, backbone: Backbone) -> None:
        self.edit, self.prompt = edit, backbone.prompt
        self.shape: list[int] = []
        self.decided = -1
        self.open = torch.zeros(0, dtype=torch.bool)

    def see(self, hidden: torch.Tensor) -> None:
        self.shape[:] = hidden.shape[:2]

    def route(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        rows, length = self.shape
        # OPT hands its feed-forward network all rows' tokens in one dimension.
        moved = (x.float() @ self.edit.change.T).reshape(rows, length, -1)
        if self.decided != self.prompt.number or self.prompt.question_end is None:
            asked = mark_prompts(self.prompt.spread(rows), length)
            self.edit.activations = measure_activations(moved.detach(), asked)
            self.open = self.edit.activations >= self.edit.threshold
            self.decided = self.prompt.number
        whole = output.reshape(moved.shape)
        changed = (whole.float() + moved).to(output.dtype)
        return torch.where(self.open[:, None, None], changed, whole).reshape(output.shape)
