"""What an edit is: a change to a model's answers that is applied for the length of a ``with`` block.

No edit changes, copies or concatenates a base weight.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import count
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from unike.backbones.base import Backbone
from unike.backbones.guard import guard_applied
from unike.edits.activity import UNKNOWN, Activity, Decisions, LayerRetrieval, PromptStates
from unike.edits.conflicts import (
    drop_from_parts,
    drop_units,
    find_contradicted,
    leave_out_contradicted,
    require_yielding,
    share_origins,
)
from unike.edits.content import Content, merge_contents
from unike.edits.files import PLACES, SavedEdit, UnsavedEdit, read_edit, render_files, save
from unike.edits.origin import Origin
from unike.edits.shares import LayerKnowledge, Shared
from unike.knowledge.scope import TrainedScope
from unike.system.text import one_line
from unike.types import Query, UserError

# They import this module, and are imported when an edit is loaded; a kind of one's own is known already.
_KINDS = ("codebook", "counterfactual", "deltas", "experts", "gated", "prompt", "routed", "side_memory")


class Edit(ABC):
    """A change to what a backbone answers.

    ``info`` holds what the method reports of making it: steps, final loss, seconds. ``origins`` say what it
    was made from, one for each request in it; registered methods fill them in. ``weights`` holds new values
    for parameters of the model, by name, where the edit has any.
    """

    kind: ClassVar[str]
    info: dict[str, object]
    origins: tuple[Origin, ...] = ()
    weights: Mapping[str, torch.Tensor] = MappingProxyType({})
    _id: str | None = None

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        guard_applied(cls)
        # A dataclass would write out all tensors.
        if "__repr__" not in vars(cls):
            cls.__repr__ = Edit.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """One line: kind, id, and what was asked and answered."""
        asked = [f"{one_line(o.prompt, 40)!r} -> {one_line(o.target, 30)!r}" for o in self.origins[:2]]
        more = [f"{len(self.origins) - 2} more"] if len(self.origins) > 2 else []
        return f"<{type(self).__name__} {one_line(self.id, 40) or 'without id'}: {', '.join(asked + more)}>"

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled as it is saved, without what it shares with others. UserError for an edit that no
        registered method has made."""
        pickled = import_module(f"{__package__}.pickled").PickledEdit
        return pickled, (render_files(self.as_unsaved())[0],)

    def __copy__(self) -> Edit:
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        return new

    def __deepcopy__(self, memo: dict[int, object]) -> Edit:
        # Its tensors do not change once it is made.
        return self.__copy__()

    @abstractmethod
    def applied(self, backbone: Backbone) -> AbstractContextManager[None]:
        """Inside the block the backbone answers edited; after it, it is as it was.

        The block holds the backbone: other threads wait until it ends. An editor's answers do not depend on
        it: what a block has applied is taken off for an editor's calls, and for base states.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, torch.Tensor]:
        """All tensors of the edit."""

    @abstractmethod
    def join(self, other: Edit) -> Edit | None:
        """Both as one edit of this kind, this one first; None where they can't be one. Edits that need
        different things stay apart, whatever this gives: see ``shares_needs``."""

    @abstractmethod
    def pack(self) -> Content:
        """All that the edit is made of, without what it shares with others, as ``unpack`` takes it."""

    @classmethod
    @abstractmethod
    def unpack(cls, content: Content, backbone: Backbone, shared: Shared) -> Edit:
        """The edit that ``pack`` gave; its logits are the same, bit for bit.

        ValueError, TypeError or LookupError where the content can't be such an edit of the backbone.
        """

    def needs(self) -> dict[str, str]:
        """Checksums of what the edit needs and shares with others, by name: ``knowledge``, ``scope`` or
        ``network``."""
        return {}

    def shares_needs(self, other: Edit) -> bool:
        """Whether ``other`` needs the same. Asked at every join: a checksum that takes long must be kept."""
        return self.needs() == other.needs()

    @property
    def id(self) -> str:
        """The id of the request, or those of several joined by ``+``; it may be set."""
        return self._id or "+".join(origin.id for origin in self.origins)

    @id.setter
    def id(self, value: str) -> None:
        self._id = value

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the edit as a folder with ``edit.safetensors``, ``edit.json`` and a card, which appears
        whole or not at all. UserError where something is there already, and where it can't be written."""
        save(self.as_unsaved(), folder)

    def as_unsaved(self) -> UnsavedEdit:
        """The content of the edit's folder, as plain values."""
        return UnsavedEdit(self.id, self.kind, self.pack(), self.origins, self.needs(), self.info)

    @staticmethod
    def load(
        folder: str | os.PathLike[str],
        backbone: Backbone,
        knowledge: Mapping[int, LayerKnowledge] | None = None,
        network: nn.Module | None = None,
        scope: TrainedScope | None = None,
    ) -> Edit:
        """The edit of a folder; its logits are those it gave when it was saved, bit for bit.

        What edits share is not kept in each folder and must be passed: ``knowledge`` (memory and encoders by
        layer, ``method.knowledge``) for UniKE, the trained ``network`` for SERAC, the ``scope`` classifier of
        edits behind one; ``MultimodalEditor.load`` finds them. UserError, in one line and with nothing
        changed, for an edit of another backbone, for other knowledge than it had, and for a damaged folder.
        """
        return load_edit(read_edit(folder), backbone, make_shared(knowledge, network, scope))

    @property
    def parts(self) -> tuple[Edit, ...]:
        """The edits that it consists of, one for each kind: itself, unless it is ``Mixed``."""
        return (self,)

    def __or__(self, other: Edit) -> Edit:
        """Both edits, this one first: one edit where they are of a kind and need the same, else ``Mixed``.

        What ``other`` contradicts is left out: of two edits of one question and image the later one answers.
        UserError where that cannot be taken out of this edit.
        """
        if not isinstance(other, Edit):
            return NotImplemented
        if places := find_contradicted(self.origins, other.origins):
            left = self.drop(places)
            if left is not self:
                return other if left is None else left | other
            require_yielding(self, other, places)
        parts = list(self.parts)
        for new in other.parts:
            both = ((i, _join(part, new)) for i, part in enumerate(parts))
            place, whole = next(((i, edit) for i, edit in both if edit is not None), (len(parts), new))
            parts[place : place + 1] = [whole]
        out = parts[0] if len(parts) == 1 else Mixed(parts)
        out.origins = self.origins + other.origins
        return out

    def drop(self, places: Sequence[int]) -> Edit | None:
        """The edit without the requests at these places of ``origins``: None where none is left, itself
        where they can't be taken out of it."""
        left: Edit | None = drop_units(self, places)
        return left

    def keep_units(self, units: Sequence[Any]) -> Edit | None:
        """The edit with these of its ``units`` only, one or more; None where it keeps none apart."""
        return None

    def yields_to(self, other: Edit) -> bool:
        """Whether nothing of this edit is left where ``other`` is applied on top of it."""
        return False

    def rewrite(self, query: Query) -> Query:
        """The query as the edited model gets it: the same, unless the edit is part of the prompt."""
        return query

    def rewrite_all(self, queries: Sequence[Query]) -> list[Query]:
        """As ``rewrite`` for each query."""
        return [self.rewrite(query) for query in queries]

    def changes_prefix(self, backbone: Backbone, first: int) -> bool:
        """Whether the edit changes what enters decoder layer ``first``: no cached state is then its."""
        return False

    @property
    def units(self) -> tuple[Unit, ...]:
        """What it is made of, one for each request that it keeps apart; itself where it keeps none apart."""
        return (self,)

    @property
    def inspected_layers(self) -> Sequence[int]:
        """The layers whose states ``describe_prompt`` and ``list_retrieved`` look at."""
        return ()

    @property
    def gates(self) -> Mapping[str, float]:
        """The similarity from which on the edit applies to a prompt, by what measures it; empty: always."""
        return {}

    def list_retrieved(self, inspection: Inspection) -> tuple[LayerRetrieval, ...]:
        """What each layer's attention got from memory for the prompt of ``inspection``, by its ``whole``;
        asked while that is applied."""
        return ()

    def describe_prompt(self, inspection: Inspection) -> tuple[Activity, ...]:
        """What each of ``units`` did for the prompt of ``inspection``; asked while nothing is applied.

        The edit may have answered as a part of ``inspection.whole``: its decisions are found there.
        """
        return (UNKNOWN,) * len(self.units)

    def explain(self) -> Decisions:
        """What the edit decided for each prompt of the last forward pass, by name; empty where it decides
        nothing. ``alpha`` and the best ``similarity`` in memory are means over its layers; ``retrieved`` are
        the nearest items of its first layer, ``{name: similarity}``, best first."""
        return {}

    def batch(self, edits: Sequence[Edit]) -> EditBatch | None:
        """``edits``, of which this one is the first, as a batch; None where they can't be batched."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of the edit's own tensors."""
        return sum(t.nbytes for t in self.state_dict().values())


class Unit(Protocol):
    """A part of an edit that belongs to one request, by whose id it goes."""

    @property
    def id(self) -> str: ...


@dataclass(frozen=True)
class Inspection:
    """One prompt that was read under ``edits``, in order, applied together as ``whole``; the prompt's
    ``states``, and how many items of each layer to list: the ``top`` most attended ones."""

    backbone: Backbone
    edits: tuple[Edit, ...]
    whole: Edit
    states: PromptStates
    top: int

    def locate(self, unit: Unit) -> tuple[Edit, int]:
        """The part of ``whole`` that has a unit, and its place among that part's units. LookupError where
        it was merged with others, so that none has it."""
        return self._places[id(unit)]

    def name_unit(self, unit: Unit) -> str:
        """The id of the edit that a unit is of; its own where the edit has several."""
        edit = self._owners[id(unit)]
        return edit.id if len(edit.units) == 1 else unit.id or edit.id

    def find_request(self, unit: Unit) -> Origin | None:
        """The request that a unit was made from, where that is known."""
        edit = self._owners[id(unit)]
        alone = len(edit.origins) == 1
        return next((origin for origin in edit.origins if alone or origin.id == unit.id), None)

    @cached_property
    def _places(self) -> dict[int, tuple[Edit, int]]:
        return {id(unit): (part, i) for part in self.whole.parts for i, unit in enumerate(part.units)}

    @cached_property
    def _owners(self) -> dict[int, Edit]:
        return {id(unit): edit for edit in self.edits for unit in edit.units}


class Mixed(Edit):
    """Edits of different kinds, all applied.

    Edits of one kind are one part, wherever they stand in the order: their items are retrieved together, and
    later weights replace former ones. The parts are in the order in which their kinds first appear.
    """

    kind = "mixed"

    def __init__(self, parts: Sequence[Edit]) -> None:
        self._parts = tuple(parts)
        self.info = {key: value for part in parts for key, value in part.info.items()}

    @property
    def parts(self) -> tuple[Edit, ...]:
        return self._parts

    def join(self, other: Edit) -> Edit | None:
        return self | other

    def drop(self, places: Sequence[int]) -> Edit | None:
        parts = drop_from_parts(self, places)
        if parts is None:
            return self
        return compose(parts)

    @contextmanager
    def applied(self, backbone: Backbone) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.applied(backbone))
            yield

    def rewrite(self, query: Query) -> Query:
        for part in self._parts:
            query = part.rewrite(query)
        return query

    def changes_prefix(self, backbone: Backbone, first: int) -> bool:
        return any(part.changes_prefix(backbone, first) for part in self._parts)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {f"{i}.{k}": t for i, part in enumerate(self._parts) for k, t in part.state_dict().items()}

    def pack(self) -> Content:
        values, tensors = merge_contents([part.pack() for part in self._parts])
        kinds = [part.kind for part in self._parts]
        return Content({"kinds": kinds, "parts": values}, tensors)

    @classmethod
    def unpack(cls, content: Content, backbone: Backbone, shared: Shared) -> Mixed:
        names = content.take_texts("kinds")
        parts = []
        for i, name in enumerate(names):
            own = content.take_part(i)
            parts.append(find_kind(name).unpack(own, backbone, shared))
            own.require_empty()
        if len(parts) < 2 or any(isinstance(part, Mixed) for part in parts):
            raise ValueError("kinds: expected two or more plain ones")
        if len(content.take_value("parts", list)) != len(parts):
            raise ValueError("parts: expected as many as kinds")
        return cls(parts)

    def needs(self) -> dict[str, str]:
        """UserError where two parts need different ones: one folder can't name both."""
        out: dict[str, str] = {}
        for name, checksum in (need for part in self._parts for need in part.needs().items()):
            if out.setdefault(name, checksum) != checksum:
                raise UserError(
                    f"edit {self.id}: parts of it were made with different {name}; save them apart"
                )
        return out

    @property
    def units(self) -> tuple[Unit, ...]:
        return tuple(unit for part in self._parts for unit in part.units)

    @property
    def inspected_layers(self) -> Sequence[int]:
        return sorted({i for part in self._parts for i in part.inspected_layers})

    @property
    def gates(self) -> Mapping[str, float]:
        """Of two with one name, the second has a number added."""
        out: dict[str, float] = {}
        for name, threshold in (gate for part in self._parts for gate in part.gates.items()):
            free = (n for i in count(2) if (n := f"{name} {i}") not in out)
            out[name if name not in out else next(free)] = threshold
        return out

    def list_retrieved(self, inspection: Inspection) -> tuple[LayerRetrieval, ...]:
        return tuple(layer for part in self._parts for layer in part.list_retrieved(inspection))

    def describe_prompt(self, inspection: Inspection) -> tuple[Activity, ...]:
        return tuple(found for part in self._parts for found in part.describe_prompt(inspection))

    def explain(self) -> Decisions:
        """Where several parts decide on the same, the last one's decision."""
        return {key: value for part in self._parts for key, value in part.explain().items()}


class EditBatch(ABC):
    """Independent edits, batched: each row of a batch is evaluated under one of them."""

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        guard_applied(cls)

    @abstractmethod
    def applied(self, backbone: Backbone, owners: torch.Tensor) -> AbstractContextManager[None]:
        """Inside the block every batch has as many rows as ``owners (R)``: the number of each row's edit."""

    def explain(self) -> Decisions:
        """As ``Edit.explain``, by row."""
        return {}


def _join(one: Edit, other: Edit) -> Edit | None:
    """Both as one; None for unlike ones, and for those made with other knowledge, another scope classifier
    or network: as one edit, both would answer by those of the last."""
    both = one.join(other)
    if both is None or not one.shares_needs(other):
        return None
    both.origins = one.origins + other.origins
    return both


def compose(edits: Sequence[Edit]) -> Edit | None:
    """All edits in order, without what a later one contradicts; None without any. UserError for what is no
    edit."""
    if not isinstance(edits, (list, tuple)):
        raise UserError(f"edits: expected a list of edits, got {type(edits).__name__}")
    for edit in edits:
        if not isinstance(edit, Edit):
            raise UserError(f"edits: expected edits, got {type(edit).__name__}")
    whole: Edit | None = None
    for left in leave_out_contradicted(edits):
        if left is not None:
            whole = left if whole is None else whole | left
    return whole


def find_kind(name: str | None) -> type[Edit]:
    """The class of a kind of edit; ValueError for an unknown one."""
    for module in _KINDS:
        import_module(f"{__package__}.{module}")
    known = {kind.kind: kind for kind in Edit.__subclasses__() if kind.kind}
    if name not in known:
        raise ValueError(f"kind: {name!r} is unknown; expected one of {', '.join(sorted(known))}")
    return known[name]


def have_same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the same numbers under the same names."""
    if one is other:
        return True
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in mine.items())


def make_shared(
    knowledge: Mapping[int, LayerKnowledge] | None,
    network: nn.Module | None,
    scope: TrainedScope | None = None,
) -> Shared:
    """What edits share, as it is passed to ``Edit.load``; UserError for something else."""
    layers = {} if knowledge is None else knowledge
    if not isinstance(layers, Mapping) or not all(isinstance(v, LayerKnowledge) for v in layers.values()):
        raise UserError(f"knowledge: expected method.knowledge, got {type(knowledge).__name__}")
    if network is not None and not isinstance(network, nn.Module):
        raise UserError(f"network: expected a network, got {type(network).__name__}")
    if scope is not None and not isinstance(scope, TrainedScope):
        raise UserError(f"scope: expected a trained scope classifier, got {type(scope).__name__}")
    return Shared(layers, network, scope)


def load_edit(saved: SavedEdit, backbone: Backbone, shared: Shared) -> Edit:
    """The edit of a folder that was read; UserError as ``Edit.load``."""
    at = one_line(saved.folder)
    saved.require(backbone)
    whole = sum(t.nbytes for t in backbone.model.state_dict().values())
    if saved.bytes > len(saved.origins) * whole:
        raise UserError(f"{at}: {saved.bytes} bytes of tensors; expected no more than the model has")
    tensors = {name: t.to(backbone.device) for name, t in saved.tensors().items()}
    content = Content(dict(saved.values), tensors)
    try:
        edit = find_kind(saved.kind).unpack(content, backbone, shared)
        content.require_empty()
    except (ValueError, TypeError, LookupError, UserError) as error:
        raise UserError(f"{at}: {one_line(error)}") from error
    found = edit.needs()
    for name in sorted({*found, *saved.needs}):
        if found.get(name) != saved.needs.get(name):
            had = saved.places.get(name)
            where = "" if had is None else f" ({PLACES.get(name)}: {one_line(had)})"
            given = "another one" if found.get(name) else "none"
            wanted = (saved.needs.get(name) or "of its own")[:12]
            raise UserError(f"{at}: was made with {name} {wanted}{where}; {given} is given")
    edit.origins, edit.info, edit.id = saved.origins, dict(saved.info), saved.id
    if len(edit.parts) > 1:
        share_origins(edit)
    return edit
