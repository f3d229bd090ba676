"""UniKE's and T-Patcher's edits: patches and knowledge states in the last layers, routed by the prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from unike.backbones.base import Backbone
from unike.edits.activity import Activity, Decisions, LayerRetrieval, RetrievedItem
from unike.edits.base import Edit, EditBatch, Inspection
from unike.edits.content import Content
from unike.edits.decisions import (
    OWN,
    build_item_namer,
    count_firing,
    explain_decisions,
    list_memory_items,
    list_retrieved,
)
from unike.edits.packing import list_needs, pack_records, unpack_records
from unike.edits.prompt import show_in_prompts
from unike.edits.runtime import LayerRuntime, ScopeGate, build_adapter, run_layers
from unike.edits.shares import EditRecord, LayerKnowledge, Routing, Shared, find_classifier
from unike.knowledge.adapter import Shift
from unike.knowledge.batching import OwnedMemory, Owners
from unike.knowledge.memory import GrowingRows, KnowledgeMemory
from unike.knowledge.patch import KeyValuePatch, PatchBatch, PatchStack
from unike.types import Query


class RecordStacks:
    """The frozen records of a routed edit as tensors that grow with it: their own pairs and patches by layer,
    and their keys in the scope classifier's space ``(E, r)``."""

    def __init__(self, records: Sequence[EditRecord]) -> None:
        layers = list(records[0].layers)
        self.keys = {i: GrowingRows(torch.stack([r.layers[i].key for r in records])) for i in layers}
        self.values = {i: GrowingRows(torch.stack([r.layers[i].value for r in records])) for i in layers}
        self.patches = {i: PatchStack(p) for i in layers if (p := _collect_patches(records, i))}
        keys = _stack_scope_keys(records)
        self.scope_keys = None if keys is None else GrowingRows(keys)

    def __len__(self) -> int:
        return len(next(iter(self.keys.values())))

    def grow(self, records: Sequence[EditRecord]) -> RecordStacks:
        """These records and further ones; what is there is shared."""
        out = object.__new__(RecordStacks)
        out.keys = {i: g.grow(torch.stack([r.layers[i].key for r in records])) for i, g in self.keys.items()}
        out.values = {
            i: g.grow(torch.stack([r.layers[i].value for r in records])) for i, g in self.values.items()
        }
        out.patches = {i: p.grow(_collect_patches(records, i)) for i, p in self.patches.items()}
        keys = _stack_scope_keys(records)
        kept = self.scope_keys
        out.scope_keys = None if kept is None or keys is None else kept.grow(keys)
        return out


def _collect_patches(records: Sequence[EditRecord], index: int) -> list[KeyValuePatch]:
    return [p for r in records if (p := r.layers[index].patch) is not None]


def _stack_scope_keys(records: Sequence[EditRecord]) -> torch.Tensor | None:
    keys = [r.scope_key for r in records if r.scope_key is not None]
    return torch.stack(keys) if keys else None


def _is_folded(record: EditRecord) -> bool:
    """Whether zeta's share is part of the patches' values already, as in a loaded edit."""
    return all(s.patch is None or s.patch.zeta is None for s in record.layers.values())


def _is_training(record: EditRecord) -> bool:
    """Whether the record is in training: its patches change at every step."""
    return any(s.patch is not None and s.patch.keys.requires_grad for s in record.layers.values())


@dataclass
class RoutedEdit(Edit):
    """UniKE's edit: patches beside feed-forward networks, shifted attention, and a scope gate.

    ``records`` share the ``knowledge`` (memory and encoders by layer) and the ``routing``. After a forward
    pass ``trace`` holds each layer's decision for the last batch of prompts, and ``scopes`` each prompt's
    similarity with the nearest edit where a gate is on.
    """

    kind = "routed"
    records: tuple[EditRecord, ...]
    routing: Routing
    knowledge: Mapping[int, LayerKnowledge] = field(default_factory=dict)
    info: dict[str, object] = field(default_factory=dict)
    trace: dict[int, Shift] = field(default_factory=dict, repr=False)
    gate: ScopeGate | None = field(default=None, init=False, repr=False)
    # Of the leading records, shared with the edit that this one was composed from.
    _stacks: RecordStacks | None = field(default=None, init=False, repr=False)

    @property
    def layers(self) -> list[int]:
        return sorted(self.records[0].layers)

    @property
    def scopes(self) -> torch.Tensor | None:
        return None if self.gate is None else self.gate.scopes

    @contextmanager
    def applied(self, backbone: Backbone) -> Iterator[None]:
        stacks = self._stack_frozen()
        tail = self.records[0 if stacks is None else len(stacks) :]
        self.gate = _build_gate(self, stacks, tail)
        runtimes = {}
        for index in self.layers:
            own = partial(_join_own_pairs, stacks, tail, index)
            adapter = build_adapter(backbone, index, self.routing, self.knowledge.get(index), own)
            extra = _ExtraPairs(stacks, tail, index, self.gate)
            runtimes[index] = LayerRuntime(
                backbone.prompt,
                index,
                index == self.layers[0],
                self.gate,
                adapter,
                self.routing.memory != "bank",
                extra if extra.patched else None,
                self.trace,
            )
        with self._show_in_prompts(backbone), run_layers(backbone, runtimes):
            yield

    def _show_in_prompts(self, backbone: Backbone) -> AbstractContextManager[None]:
        shown = self._write_before()
        return show_in_prompts(backbone, shown) if shown else nullcontext()

    def _write_before(self) -> str:
        """What stands before each prompt; empty without in-context knowledge as text."""
        shown = [r.demonstration for r in self.records if r.demonstration is not None]
        facts = "\n".join(f"New Fact: {text}" for text in shown)
        return f"{facts}\nPrompt: " if shown else ""

    def _stack_frozen(self) -> RecordStacks | None:
        """The tensors of the leading records that are not in training; they are only ever added to."""
        known = 0 if self._stacks is None else len(self._stacks)
        fresh = list(itertools.takewhile(lambda r: not _is_training(r), self.records[known:]))
        if fresh:
            self._stacks = RecordStacks(fresh) if self._stacks is None else self._stacks.grow(fresh)
        return self._stacks

    def changes_prefix(self, backbone: Backbone, first: int) -> bool:
        return self.layers[0] < first

    def state_dict(self) -> dict[str, torch.Tensor]:
        out = {}
        for record in self.records:
            for index, share in record.layers.items():
                at = f"{record.id}.{index}"
                out[f"{at}.key"], out[f"{at}.value"] = share.key, share.value
                if share.patch is not None:
                    out |= {f"{at}.patch.{k}": v.detach() for k, v in share.patch.state_dict().items()}
                if share.inputs is not None:
                    out[f"{at}.inputs"] = share.inputs
            if record.scope_key is not None:
                out[f"{record.id}.scope_key"] = record.scope_key
        return out

    @property
    def _kind(self) -> tuple[object, ...]:
        """What the records of one edit agree in."""
        patch = self.records[0].layers[self.layers[0]].patch
        return self.layers, self.routing, None if patch is None else (patch.gated, patch.keys.shape)

    def needs(self) -> dict[str, str]:
        return list_needs(self.routing, self.layers, self.knowledge)

    def shares_needs(self, other: Edit) -> bool:
        # The same objects need no checksum, which of a large memory takes seconds.
        same = isinstance(other, RoutedEdit) and all(
            self.knowledge.get(i) is other.knowledge.get(i) for i in self.layers
        )
        return same or super().shares_needs(other)

    def pack(self) -> Content:
        return pack_records(self.records, self.routing)

    @classmethod
    def unpack(cls, content: Content, backbone: Backbone, shared: Shared) -> RoutedEdit:
        routing = Routing.parse(content.take_value("routing", dict))
        out = cls(unpack_records(content, routing, backbone), routing, shared.knowledge)
        # It would retrieve from knowledge that it was made without.
        return out if out.needs() else replace(out, knowledge={})

    @property
    def units(self) -> tuple[EditRecord, ...]:
        return self.records

    @property
    def inspected_layers(self) -> Sequence[int]:
        return self.layers

    @property
    def gates(self) -> Mapping[str, float]:
        return {} if self.gate is None else {self.routing.scope_measure: self.gate.threshold}

    def list_retrieved(self, inspection: Inspection) -> tuple[LayerRetrieval, ...]:
        return list_retrieved(self.trace, inspection, self._describe_item(inspection))

    def _describe_item(self, inspection: Inspection) -> Callable[[int, float, float], RetrievedItem]:
        """From place, similarity and weight to an item: the knowledge memory's by its text, an edit's own by
        its request."""
        texts, bank = list_memory_items(self.routing, self.knowledge.get(self.layers[0]))

        def describe(place: int, similarity: float, weight: float) -> RetrievedItem:
            if place < bank:
                text = texts[place] if texts else None
                about = (None, None) if text is None else (text.prompt, text.target)
                return RetrievedItem(similarity, weight, None, place, *about)
            record = self.records[place - bank]
            origin, name = inspection.find_request(record), inspection.name_unit(record)
            about = (None, None) if origin is None else (origin.prompt, origin.target)
            return RetrievedItem(similarity, weight, name, place - bank, *about)

        return describe

    def describe_prompt(self, inspection: Inspection) -> tuple[Activity, ...]:
        return tuple(self._describe_record(record, inspection) for record in self.records)

    def _describe_record(self, record: EditRecord, inspection: Inspection) -> Activity:
        whole, place = inspection.locate(record)
        assert isinstance(whole, RoutedEdit)
        active, scope = True, None
        if (gate := whole.gate) is not None and gate.similarity is not None:
            active, scope = bool(gate.open[0, place]), gate.similarity[0, place].item()
        patches = {i: p for i, share in sorted(record.layers.items()) if (p := share.patch) is not None}
        neurons = tuple(count_firing(i, patch, inspection.states) for i, patch in patches.items())
        shown = () if record.demonstration is None else (record.demonstration,)
        return Activity(active, scope, neurons, shown=shown)

    def explain(self) -> Decisions:
        own = [OWN] if len(self.records) == 1 else [f"edit {r.id}" for r in self.records]
        names = build_item_namer(self.routing, self.knowledge.get(self.layers[0]), own)
        return explain_decisions(self.trace, self.scopes, names)

    def rewrite(self, query: Query) -> Query:
        shown = self._write_before()
        return replace(query, prompt=shown + query.prompt) if shown else query

    def batch(self, edits: Sequence[Edit]) -> RoutedBatch | None:
        same = [e for e in edits if isinstance(e, RoutedEdit) and len(e.records) == 1]
        if len(same) < len(edits) or any(e._kind != self._kind for e in same):
            return None
        if not all(self.shares_needs(e) for e in same):
            return None
        if len({_is_folded(e.records[0]) for e in same}) > 1:
            return None
        return RoutedBatch([e.records[0] for e in same], self.routing, self.knowledge)

    def keep_units(self, units: Sequence[EditRecord]) -> Edit | None:
        return RoutedEdit(tuple(units), self.routing, self.knowledge, self.info)

    def join(self, other: Edit) -> Edit | None:
        if not isinstance(other, RoutedEdit) or self._kind != other._kind:
            return None
        out = RoutedEdit(self.records + other.records, other.routing, other.knowledge, other.info)
        out._stacks = self._stack_frozen()
        return out


def _build_gate(
    edit: RoutedEdit, stacks: RecordStacks | None, tail: Sequence[EditRecord]
) -> ScopeGate | None:
    routing, first = edit.routing, edit.layers[0]
    if routing.scope_gate == "none":
        return None
    classifier = find_classifier(routing, edit.knowledge, first)
    if classifier is None:
        parts = [] if stacks is None else [stacks.keys[first].tensor]
        parts += [r.layers[first].key[None] for r in tail]
    else:
        parts = [] if stacks is None or stacks.scope_keys is None else [stacks.scope_keys.tensor]
        parts += [r.scope_key[None] for r in tail if r.scope_key is not None]
    keys = torch.cat(parts)
    if len(keys) != len(edit.records):
        raise ValueError("scope_measure: trained needs a scope classifier, and cosine a scope_threshold")
    return ScopeGate(routing, classifier, keys, frozen=0 if stacks is None else len(stacks))


def _join_own_pairs(
    stacks: RecordStacks | None, tail: Sequence[EditRecord], index: int, bank: KnowledgeMemory
) -> KnowledgeMemory:
    """The knowledge memory with the records' own pairs after it, in their order."""
    if stacks is not None:
        bank = bank.join_pairs(stacks.keys[index].tensor, stacks.values[index].tensor)
    for record in tail:
        share = record.layers[index]
        bank = bank.join_pairs(share.key[None], share.value[None])
    return bank


class _ExtraPairs:
    """One layer's extra pairs: those of frozen records, and of records in training."""

    def __init__(
        self, stacks: RecordStacks | None, tail: Sequence[EditRecord], index: int, gate: ScopeGate | None
    ) -> None:
        self.stack = None if stacks is None else stacks.patches.get(index)
        self.gate, frozen = gate, 0 if stacks is None else len(stacks)
        patches = [(frozen + e, r.layers[index].patch) for e, r in enumerate(tail)]
        self.training = [(e, p) for e, p in patches if p is not None]
        self.patched = self.stack is not None or bool(self.training)

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        opened = None if self.gate is None else self.gate.opened
        extra = torch.zeros_like(batch) if self.stack is None else self.stack(batch, opened)
        for e, patch in self.training:
            added = patch(batch)
            extra = extra + (added if self.gate is None else added * self.gate.open[:, e, None, None])
        return extra


class RoutedBatch(EditBatch):
    """Independent routed edits of one record each, batched."""

    def __init__(
        self, records: Sequence[EditRecord], routing: Routing, knowledge: Mapping[int, LayerKnowledge]
    ) -> None:
        self.routing, self.knowledge = routing, knowledge
        self.layers = sorted(records[0].layers)
        self.own = {
            i: tuple(torch.stack([getattr(r.layers[i], part) for r in records]) for part in ("key", "value"))
            for i in self.layers
        }
        self.patches = {i: PatchBatch(p) for i in self.layers if (p := _collect_patches(records, i))}
        self.scope_keys = _stack_scope_keys(records)
        self.trace: dict[int, Shift] = {}
        self.gate: ScopeGate | None = None

    def __len__(self) -> int:
        return len(self.own[self.layers[0]][0])

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all edits but ``rows``; what the others have learned goes back to their patches."""
        self.own = {i: tuple(t[rows] for t in pair) for i, pair in self.own.items()}
        self.scope_keys = None if self.scope_keys is None else self.scope_keys[rows]
        for patch in self.patches.values():
            patch.keep(rows)

    @contextmanager
    def applied(self, backbone: Backbone, owners: torch.Tensor) -> Iterator[None]:
        owned, first = Owners(owners, len(self)), self.layers[0]
        if self.routing.scope_gate != "none":
            classifier = find_classifier(self.routing, self.knowledge, first)
            keys = self.own[first][0] if classifier is None else self.scope_keys
            assert keys is not None
            self.gate = ScopeGate(self.routing, classifier, keys, owned)
        runtimes = {}
        for index in self.layers:
            keys, values = (t[owners] for t in self.own[index])
            own = partial(OwnedMemory, keys=keys, values=values)
            adapter = build_adapter(backbone, index, self.routing, self.knowledge.get(index), own)
            extra = partial(self._add_pairs, index, owned) if index in self.patches else None
            runtimes[index] = LayerRuntime(
                backbone.prompt,
                index,
                index == first,
                self.gate,
                adapter,
                self.routing.memory != "bank",
                extra,
                self.trace,
            )
        with run_layers(backbone, runtimes):
            yield

    def _add_pairs(self, index: int, owned: Owners, batch: torch.Tensor) -> torch.Tensor:
        folded = owned.fold(batch)
        added = self.patches[index](folded.flatten(1, 2)).unflatten(1, folded.shape[1:3])
        added = owned.unfold(added)
        return added if self.gate is None else added * self.gate.open[:, :, None]

    def explain(self) -> Decisions:
        names = build_item_namer(self.routing, self.knowledge.get(self.layers[0]), [OWN])
        return explain_decisions(self.trace, None if self.gate is None else self.gate.scopes, names)
