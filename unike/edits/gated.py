"""A scope gate around edits of any kind: where it is closed, the base model answers.

The gate decides by the prompt and its image, before anything is edited. Rows of a batch to which the same
edits apply are computed together under these edits alone, the others by the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from weakref import ref

import torch

from unike.backbones.base import Backbone, Sight, StateReader
from unike.backbones.hooks import guard
from unike.backbones.images import content_key
from unike.backbones.routing import RowGroup
from unike.edits.activity import UNKNOWN, Activity, Decisions
from unike.edits.base import Edit, EditBatch, Inspection, Unit, compose, find_kind
from unike.edits.content import Content, merge_contents
from unike.edits.gate import OVERLAP, SIMILARITY, Gate, Measured, make_reader, observe_prompts, read_gate
from unike.edits.shares import Shared, sign_scope
from unike.knowledge.overlap import NextTokens, measure_overlap
from unike.knowledge.scope import TrainedScope
from unike.system.cache import BoundedCache
from unike.types import EditRequest, ImageLike, Query

# Of how many rewritten prompts the decision is kept.
REWRITTEN = 20_000
# A prompt's overlap with itself, or its similarity, may come out a little below 1.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class GatedMember:
    """One edit of the gate, made for the request ``id``, with the base model's next tokens at its own prompt,
    and that prompt's place in the scope classifier's space, ``(r)``, if there is one."""

    id: str
    edit: Edit
    key: NextTokens
    vector: torch.Tensor | None = None


def _key_image(image: ImageLike | None) -> str | None:
    return None if image is None else content_key(image)


class GatedEdit(Edit):
    """Edits of any kind, each of which applies where the gate lets it.

    ``rewrite`` and ``applied`` decide by what the base model computes at a prompt, which the backbone keeps.
    ``scope`` is the gate's classifier, if it has one. ValueError for a gate with a layer and no classifier.
    """

    kind = "gated"

    def __init__(
        self,
        members: Sequence[GatedMember],
        gate: Gate,
        backbone: Backbone,
        scope: TrainedScope | None = None,
    ) -> None:
        if (gate.layer is not None) != (scope is not None):
            raise ValueError("gate: expected a layer together with a scope classifier")
        self.members, self.gate, self.scope = tuple(members), gate, scope
        self.info = {key: value for member in members for key, value in member.edit.info.items()}
        # Of the prompts that were decided on last.
        self.measured: Measured | None = None
        self._backbone = ref(backbone)
        self._wholes: dict[tuple[int, ...], Edit] = {}
        # A rewritten prompt is no longer the one to decide on: by image and text, what it was written from.
        self._rewritten = BoundedCache[tuple[str | None, str], str](REWRITTEN)

    @classmethod
    def wrap(
        cls,
        edit: Edit,
        request: EditRequest,
        gate: Gate,
        backbone: Backbone,
        scope: TrainedScope | None = None,
    ) -> GatedEdit:
        """One edit, made for a ``request`` of the backbone, with a gate around it."""
        query = request.query
        (sight,) = observe_prompts(backbone, [query.image], [query.prompt], gate, make_reader(gate, scope))
        key = NextTokens(sight.ids, sight.probabilities)
        return cls((GatedMember(request.id, edit, key, sight.vector),), gate, backbone, scope)

    # ------------------------------------------------------------ decisions

    def choose(
        self,
        images: Sequence[ImageLike | None],
        prompts: Sequence[str],
        backbone: Backbone | None = None,
    ) -> list[tuple[int, ...]]:
        """The members that apply to each prompt of a backbone, by default the one that the edit was made on;
        keeps what was ``measured``."""
        backbone = backbone or self._get_backbone()
        asked = [self.find_original(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        sights = observe_prompts(backbone, images, asked, self.gate, self.reader)
        measured = self.measured = self.measure(sights)
        return [tuple(row.nonzero()[:, 0].tolist()) for row in measured.open]

    @cached_property
    def reader(self) -> StateReader | None:
        """What reads a prompt's states for the gate."""
        return make_reader(self.gate, self.scope)

    def find_original(self, image: ImageLike | None, prompt: str) -> str:
        """What a prompt was before this edit rewrote it."""
        found = self._rewritten.get((_key_image(image), prompt))
        return prompt if found is None else found

    def measure(self, sights: Sequence[Sight]) -> Measured:
        """What the gate makes of prompts that the unedited model sees so."""
        values, allowed = {}, []
        if self.gate.overlap is not None:
            keys = [member.key for member in self.members]
            found = [measure_overlap(NextTokens(s.ids, s.probabilities), keys) for s in sights]
            values[OVERLAP] = torch.stack(found)
            allowed.append(values[OVERLAP] >= self.gate.overlap - _ROUNDING)
        if self.scope is not None:
            vectors = torch.stack([_require_vector(m.vector) for m in self.members])
            seen = torch.stack([_require_vector(s.vector) for s in sights])
            values[SIMILARITY] = seen @ vectors.T
            allowed.append(values[SIMILARITY] >= self._list_thresholds(values[SIMILARITY]) - _ROUNDING)
        open_ = torch.stack(allowed).all(0)
        if self.gate.nearest:
            near = values[self.gate.measure]
            # Of equal ones the last made: it corrects the others.
            last = near.shape[1] - 1 - near.flip(1).argmax(1)
            open_ &= torch.arange(near.shape[1], device=open_.device) == last[:, None]
        return Measured(open_, values)

    def _list_thresholds(self, like: torch.Tensor) -> torch.Tensor:
        """The least similarity of each member, ``(E)``."""
        return like.new_tensor([self._find_threshold(member.key.are_few) for member in self.members])

    def _find_threshold(self, are_few: bool) -> float:
        assert self.scope is not None
        gate = self.gate
        if gate.similarity is not None:
            return gate.similarity
        share = gate.recall_few if are_few else gate.recall
        if share is None:
            return self.scope.find_threshold(len(self.members))
        return self.scope.find_passed(share, are_few)

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
        return self.rewrite_all([query])[0]

    def rewrite_all(self, queries: Sequence[Query]) -> list[Query]:
        chosen = self.choose([query.image for query in queries], [query.prompt for query in queries])
        return [self._rewrite(query, members) for query, members in zip(queries, chosen, strict=True)]

    def _rewrite(self, query: Query, members: tuple[int, ...]) -> Query:
        whole = self.join_members(members)
        changed = query if whole is None else whole.rewrite(query)
        if changed.prompt != query.prompt:
            original = self.find_original(query.image, query.prompt)
            self._rewritten.put((_key_image(changed.image), changed.prompt), original)
        return changed

    def batch(self, edits: Sequence[Edit]) -> EditBatch | None:
        same = [e for e in edits if isinstance(e, GatedEdit) and len(e.members) == 1 and e.gate == self.gate]
        if len(same) < len(edits) or any(e.scope is not self.scope for e in same):
            return None
        inner = same[0].members[0].edit.batch([e.members[0].edit for e in same])
        return None if inner is None else GatedBatch(same, inner)

    def changes_prefix(self, backbone: Backbone, first: int) -> bool:
        return any(member.edit.changes_prefix(backbone, first) for member in self.members)

    def state_dict(self) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for i, member in enumerate(self.members):
            out |= {f"{i}.{name}": tensor for name, tensor in member.edit.state_dict().items()}
            out[f"{i}.next.probabilities"] = member.key.probabilities
            if member.vector is not None:
                out[f"{i}.scope"] = member.vector
        return out

    def join(self, other: Edit) -> Edit | None:
        if not isinstance(other, GatedEdit) or other.gate != self.gate:
            return None
        return GatedEdit(self.members + other.members, self.gate, self._get_backbone(), self.scope)

    def needs(self) -> dict[str, str]:
        out: dict[str, str] = {}
        for member in self.members:
            out |= member.edit.needs()
        if self.scope is not None:
            out["gate"] = sign_scope(self.scope)
        return out

    def shares_needs(self, other: Edit) -> bool:
        if isinstance(other, GatedEdit):
            # The same object needs no checksum.
            same = self.scope is other.scope or (
                self.scope is not None
                and other.scope is not None
                and sign_scope(self.scope) == sign_scope(other.scope)
            )
            return same and self.members[0].edit.shares_needs(other.members[0].edit)
        return super().shares_needs(other)

    def pack(self) -> Content:
        values, tensors = merge_contents([member.edit.pack() for member in self.members])
        for i, member in enumerate(self.members):
            tensors[f"next.{i}.probabilities"] = member.key.probabilities
            if member.vector is not None:
                tensors[f"next.{i}.scope"] = member.vector
        return Content(
            {
                "gate": asdict(self.gate),
                "ids": [member.id for member in self.members],
                "kinds": [member.edit.kind for member in self.members],
                "next": [member.key.ids.tolist() for member in self.members],
                "parts": values,
            },
            tensors,
        )

    @classmethod
    def unpack(cls, content: Content, backbone: Backbone, shared: Shared) -> GatedEdit:
        gate = read_gate(content)
        scope = None if gate.layer is None else shared.scope
        if gate.layer is not None and scope is None:
            raise ValueError(
                "gate: needs the scope classifier that it was made with; hand it over as scope=, or load the "
                "edit by its editor"
            )
        if gate.layer is not None and gate.layer >= len(backbone.layout):
            raise ValueError(f"gate: layer: {gate.layer}; the decoder has {len(backbone.layout)}")
        kinds, names = content.take_texts("kinds"), content.take_texts("ids")
        ids = content.take_value("next", list)
        members = []
        for i, name in enumerate(kinds):
            chosen = torch.tensor(ids[i], device=backbone.device)
            if chosen.ndim != 2 or not 1 <= len(chosen) <= gate.tokens or chosen.dtype != torch.long:
                raise ValueError("next: expected token ids for each token of the gate")
            probabilities = content.take_tensor(f"next.{i}.probabilities", *chosen.shape)
            vector = None if scope is None else content.take_tensor(f"next.{i}.scope", scope.encoder.width)
            own = content.take_part(i)
            edit = find_kind(name).unpack(own, backbone, shared)
            own.require_empty()
            members.append(GatedMember(str(names[i]), edit, NextTokens(chosen, probabilities), vector))
        if (
            not members
            or len(names) != len(members)
            or len(ids) != len(members)
            or len(content.take_value("parts", list)) != len(members)
        ):
            raise ValueError("parts: expected one or more, as many as kinds")
        return cls(members, gate, backbone, scope)

    @property
    def gates(self) -> Mapping[str, float]:
        found = {}
        if self.gate.overlap is not None:
            found[OVERLAP] = self.gate.overlap
        if self.scope is not None:
            found[SIMILARITY] = self._find_threshold(self.members[-1].key.are_few)
        return found

    @property
    def units(self) -> tuple[Unit, ...]:
        return self.members

    def keep_units(self, units: Sequence[GatedMember]) -> Edit | None:
        return GatedEdit(units, self.gate, self._get_backbone(), self.scope)

    def describe_prompt(self, inspection: Inspection) -> tuple[Activity, ...]:
        return tuple(_describe_member(member, inspection) for member in self.members)

    def explain(self) -> Decisions:
        return _explain(self.measured)


@dataclass(frozen=True)
class _AppliedGate:
    """A gated edit on the backbone that it is applied to, which may be a copy of the one it was made on.

    Equal for equal edits: to observe a prompt, edits are taken off and applied again, in the midst of a batch
    that is grouped already.
    """

    edit: GatedEdit
    backbone: Backbone

    def group(self, images: Sequence[ImageLike | None], prompts: Sequence[str]) -> list[RowGroup]:
        """Rows by the members that apply to them."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, members in enumerate(self.edit.choose(images, prompts, self.backbone)):
            groups.setdefault(members, []).append(row)
        weights = self._weigh_rows()
        return [
            RowGroup(rows, partial(self._apply, members, weights(rows, members)))
            for members, rows in groups.items()
        ]

    def _weigh_rows(self) -> Callable[[list[int], tuple[int, ...]], torch.Tensor | None]:
        """From rows and the members that apply to them to the rows' overlap with the nearest of these; None
        where alpha does not depend on it."""
        measured = self.edit.measured
        if not self.edit.gate.weighs or measured is None:
            return lambda rows, members: None
        overlaps = measured.values[OVERLAP]
        return lambda rows, members: overlaps[rows][:, list(members)].amax(1) if members else None

    @contextmanager
    def _apply(self, members: tuple[int, ...], weights: torch.Tensor | None) -> Iterator[None]:
        whole = self.edit.join_members(members)
        with (
            nullcontext() if whole is None else whole.applied(self.backbone),
            self.backbone.prompt.weigh(weights),
        ):
            yield


class GatedBatch(EditBatch):
    """Independent gated edits of one member each, batched: a row's own edit applies where its gate is open.

    ``inner`` are the same edits without their gates.
    """

    def __init__(self, edits: Sequence[GatedEdit], inner: EditBatch) -> None:
        self.edits, self.inner = edits, inner
        # Of the rows that were decided on last, each with its own edit, (B, 1).
        self.measured: Measured | None = None

    @contextmanager
    def applied(self, backbone: Backbone, owners: torch.Tensor) -> Iterator[None]:
        last = backbone.layout.layer(len(backbone.layout) - 1)
        with (
            backbone.use_router(_BatchGate(self, backbone, tuple(owners.tolist()))),
            guard(last, backbone.prompt.require_announced),
        ):
            yield

    def decide(
        self,
        images: Sequence[ImageLike | None],
        prompts: Sequence[str],
        owners: Sequence[int],
        backbone: Backbone,
    ) -> Measured:
        """What each row's own gate makes of it; keeps what was ``measured``."""
        first, rows = self.edits[0], list(zip(owners, images, prompts, strict=True))
        asked = [self.edits[owner].find_original(image, prompt) for owner, image, prompt in rows]
        sights = observe_prompts(backbone, images, asked, first.gate, first.reader)
        found = [self.edits[owner].measure([sight]) for owner, sight in zip(owners, sights, strict=True)]
        values = {name: torch.cat([one.values[name] for one in found]) for name in found[0].values}
        self.measured = Measured(torch.cat([one.open for one in found]), values)
        return self.measured

    def explain(self) -> Decisions:
        return _explain(self.measured)


@dataclass(frozen=True)
class _BatchGate:
    """A batch's gates, for rows that belong to ``owners``. Equal for equal ones, as ``_AppliedGate``."""

    batch: GatedBatch
    backbone: Backbone
    owners: tuple[int, ...]

    def group(self, images: Sequence[ImageLike | None], prompts: Sequence[str]) -> list[RowGroup]:
        """The rows to which their own edits apply, and the others."""
        measured = self.batch.decide(images, prompts, self.owners, self.backbone)
        is_open = measured.open[:, 0].tolist()
        weighs = self.batch.edits[0].gate.weighs
        weights = measured.values[OVERLAP][:, 0] if weighs else None
        inside, outside = ([i for i, own in enumerate(is_open) if own is side] for side in (True, False))
        groups = [RowGroup(inside, partial(self._apply, inside, weights)), RowGroup(outside, nullcontext)]
        return [group for group in groups if group.rows]

    @contextmanager
    def _apply(self, rows: list[int], weights: torch.Tensor | None) -> Iterator[None]:
        owners = torch.tensor([self.owners[i] for i in rows], device=self.backbone.device)
        with (
            self.batch.inner.applied(self.backbone, owners),
            self.backbone.prompt.weigh(None if weights is None else weights[rows]),
        ):
            yield


def _explain(measured: Measured | None) -> Decisions:
    if measured is None:
        return {}
    return {name: values.amax(1).tolist() for name, values in measured.values.items()}


def _describe_member(member: GatedMember, inspection: Inspection) -> Activity:
    whole, place = inspection.locate(member)
    assert isinstance(whole, GatedEdit)
    if whole.measured is None:
        return UNKNOWN
    value = whole.measured.values[whole.gate.measure][0, place].item()
    return Activity(bool(whole.measured.open[0, place]), value)


def _require_vector(vector: torch.Tensor | None) -> torch.Tensor:
    if vector is None:
        raise ValueError("gate: an edit or a prompt was not read by the scope classifier")
    return vector
