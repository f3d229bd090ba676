"""A scope gate around edits of any kind: where it is closed, the base model answers.

The gate decides by the prompt and its image, before anything is edited. Rows of a batch to which the same
edits apply are computed together under these edits alone, the others by the base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from weakref import ref

import torch

from unike.backbones.base import Backbone
from unike.backbones.hooks import guard
from unike.backbones.images import content_key
from unike.backbones.routing import RowGroup
from unike.edits.activity import UNKNOWN, Activity, Decisions
from unike.edits.base import Edit, Inspection, Unit, compose, find_kind
from unike.edits.content import Content, merge_contents
from unike.edits.shares import Shared
from unike.knowledge.overlap import NextTokens, measure_overlap
from unike.system.cache import BoundedCache
from unike.types import EditRequest, ImageLike, Query

# The name of what the gate measures.
MEASURE = "overlap"
# How many of the most probable next tokens are compared.
TOP = 64
# Of how many rewritten prompts the decision is kept.
REWRITTEN = 20_000
# A prompt's overlap with itself may come out a little below 1.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class OverlapGate:
    """When an edit applies: the overlap of the base model's next tokens at the edit's prompt and at another
    one is ``threshold`` or more, along ``tokens`` tokens; with ``nearest`` only the edit of the highest."""

    threshold: float
    tokens: int = 1
    nearest: bool = False


@dataclass(frozen=True)
class GatedMember:
    """One edit of the gate, made for the request ``id``, with the base model's next tokens at its own
    prompt."""

    id: str
    edit: Edit
    key: NextTokens


def _key_image(image: ImageLike | None) -> str | None:
    return None if image is None else content_key(image)


class GatedEdit(Edit):
    """Edits of any kind, each of which applies where the gate lets it.

    ``rewrite`` and ``applied`` decide by what the base model says at a prompt, which the backbone keeps.
    """

    kind = "gated"

    def __init__(self, members: Sequence[GatedMember], gate: OverlapGate, backbone: Backbone) -> None:
        self.members, self.gate = tuple(members), gate
        self.info = {key: value for member in members for key, value in member.edit.info.items()}
        self.overlaps: torch.Tensor | None = None
        self._backbone = ref(backbone)
        self._wholes: dict[tuple[int, ...], Edit] = {}
        # A rewritten prompt is no longer the one that was decided on.
        self._rewritten = BoundedCache[tuple[str | None, str], tuple[int, ...]](REWRITTEN)

    @classmethod
    def wrap(cls, edit: Edit, request: EditRequest, gate: OverlapGate, backbone: Backbone) -> GatedEdit:
        """One edit, made for a ``request`` of the backbone, with a gate around it."""
        query = request.query
        (found,) = backbone.predict_next([query.image], [query.prompt], gate.tokens, TOP)
        return cls((GatedMember(request.id, edit, NextTokens(*found)),), gate, backbone)

    # ------------------------------------------------------------ decisions

    def choose(
        self,
        images: Sequence[ImageLike | None],
        prompts: Sequence[str],
        backbone: Backbone | None = None,
    ) -> list[tuple[int, ...]]:
        """The members that apply to each prompt of a backbone, by default the one that the edit was made on;
        keeps ``overlaps (B, E)``."""
        backbone = backbone or self._get_backbone()
        said = [NextTokens(*found) for found in backbone.predict_next(images, prompts, self.gate.tokens, TOP)]
        keys = [member.key for member in self.members]
        overlaps = torch.stack([measure_overlap(tokens, keys) for tokens in said])
        self.overlaps = overlaps
        open_ = overlaps >= self.gate.threshold - _ROUNDING
        if self.gate.nearest:
            # Of equal ones the last made: it corrects the others.
            last = overlaps.shape[1] - 1 - overlaps.flip(1).argmax(1)
            open_ &= torch.arange(overlaps.shape[1], device=open_.device) == last[:, None]
        out = []
        for image, prompt, row in zip(images, prompts, open_, strict=True):
            known = self._rewritten.get((_key_image(image), prompt))
            out.append(tuple(row.nonzero()[:, 0].tolist()) if known is None else known)
        return out

    def join_members(self, members: tuple[int, ...]) -> Edit | None:
        """Those members as one edit; None for none of them."""
        if members and members not in self._wholes:
            whole = compose([self.members[i].edit for i in members])
            assert whole is not None
            self._wholes[members] = whole
        return self._wholes.get(members)

    def _get_backbone(self) -> Backbone:
        backbone = self._backbone()
        if backbone is None:
            raise ValueError("the gated edit's backbone is gone")
        return backbone

    # ------------------------------------------------------------ an edit

    @contextmanager
    def applied(self, backbone: Backbone) -> Iterator[None]:
        last = backbone.layout.layer(len(backbone.layout) - 1)
        with (
            backbone.use_router(_AppliedGate(self, backbone)),
            guard(last, backbone.prompt.require_announced),
        ):
            yield

    def rewrite(self, query: Query) -> Query:
        (members,) = self.choose([query.image], [query.prompt])
        whole = self.join_members(members)
        changed = query if whole is None else whole.rewrite(query)
        if changed.prompt != query.prompt:
            self._rewritten.put((_key_image(changed.image), changed.prompt), members)
        return changed

    def changes_prefix(self, backbone: Backbone, first: int) -> bool:
        return any(member.edit.changes_prefix(backbone, first) for member in self.members)

    def state_dict(self) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for i, member in enumerate(self.members):
            out |= {f"{i}.{name}": tensor for name, tensor in member.edit.state_dict().items()}
            out[f"{i}.next.probabilities"] = member.key.probabilities
        return out

    def join(self, other: Edit) -> Edit | None:
        if not isinstance(other, GatedEdit) or other.gate != self.gate:
            return None
        return GatedEdit(self.members + other.members, self.gate, self._get_backbone())

    def needs(self) -> dict[str, str]:
        out: dict[str, str] = {}
        for member in self.members:
            out |= member.edit.needs()
        return out

    def shares_needs(self, other: Edit) -> bool:
        if isinstance(other, GatedEdit):
            return self.members[0].edit.shares_needs(other.members[0].edit)
        return super().shares_needs(other)

    def pack(self) -> Content:
        values, tensors = merge_contents([member.edit.pack() for member in self.members])
        for i, member in enumerate(self.members):
            tensors[f"next.{i}.probabilities"] = member.key.probabilities
        gate = [self.gate.threshold, self.gate.tokens, self.gate.nearest]
        return Content(
            {
                "gate": gate,
                "ids": [member.id for member in self.members],
                "kinds": [member.edit.kind for member in self.members],
                "next": [member.key.ids.tolist() for member in self.members],
                "parts": values,
            },
            tensors,
        )

    @classmethod
    def unpack(cls, content: Content, backbone: Backbone, shared: Shared) -> GatedEdit:
        gate = _read_gate(content.take_value("gate", list))
        kinds, names = content.take_texts("kinds"), content.take_texts("ids")
        ids = content.take_value("next", list)
        members = []
        for i, name in enumerate(kinds):
            chosen = torch.tensor(ids[i], device=backbone.device)
            if chosen.ndim != 2 or len(chosen) != gate.tokens or chosen.dtype != torch.long:
                raise ValueError("next: expected token ids for each token of the gate")
            probabilities = content.take_tensor(f"next.{i}.probabilities", *chosen.shape)
            own = content.take_part(i)
            edit = find_kind(name).unpack(own, backbone, shared)
            own.require_empty()
            members.append(GatedMember(str(names[i]), edit, NextTokens(chosen, probabilities)))
        if (
            not members
            or len(names) != len(members)
            or len(ids) != len(members)
            or len(content.take_value("parts", list)) != len(members)
        ):
            raise ValueError("parts: expected one or more, as many as kinds")
        return cls(members, gate, backbone)

    @property
    def gates(self) -> Mapping[str, float]:
        return {MEASURE: self.gate.threshold}

    @property
    def units(self) -> tuple[Unit, ...]:
        return self.members

    def keep_units(self, units: Sequence[GatedMember]) -> Edit | None:
        return GatedEdit(units, self.gate, self._get_backbone())

    def describe_prompt(self, inspection: Inspection) -> tuple[Activity, ...]:
        return tuple(_describe_member(member, inspection) for member in self.members)

    def explain(self) -> Decisions:
        return {} if self.overlaps is None else {MEASURE: self.overlaps.amax(1).tolist()}


@dataclass(frozen=True, eq=False)
class _AppliedGate:
    """A gated edit on the backbone that it is applied to, which may be a copy of the one it was made on."""

    edit: GatedEdit
    backbone: Backbone

    def group(self, images: Sequence[ImageLike | None], prompts: Sequence[str]) -> list[RowGroup]:
        """Rows by the members that apply to them."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, members in enumerate(self.edit.choose(images, prompts, self.backbone)):
            groups.setdefault(members, []).append(row)
        return [RowGroup(rows, partial(self._apply, members)) for members, rows in groups.items()]

    def _apply(self, members: tuple[int, ...]) -> AbstractContextManager[None]:
        whole = self.edit.join_members(members)
        return nullcontext() if whole is None else whole.applied(self.backbone)


def _describe_member(member: GatedMember, inspection: Inspection) -> Activity:
    whole, place = inspection.locate(member)
    assert isinstance(whole, GatedEdit)
    if whole.overlaps is None:
        return UNKNOWN
    overlap = whole.overlaps[0, place].item()
    return Activity(overlap >= whole.gate.threshold - _ROUNDING, overlap)


def _read_gate(values: list[object]) -> OverlapGate:
    if len(values) != 3:
        raise ValueError("gate: expected threshold, tokens and nearest")
    threshold, tokens, nearest = values
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise ValueError("gate: expected a threshold in [0, 1]")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1 or not isinstance(nearest, bool):
        raise ValueError("gate: expected a number of tokens, and whether the nearest edit alone applies")
    return OverlapGate(float(threshold), tokens, nearest)
