"""What an editing method is, and how the YAML's is made."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar, Protocol, TypeVar, final, runtime_checkable

from unike.backbones.base import Backbone
from unike.backbones.guard import Guard
from unike.backbones.prefix import PrefixCache
from unike.config.hparams import HyperParams
from unike.config.sections import LayerOptions
from unike.edits import Edit, LayerKnowledge, Origin
from unike.edits.conflicts import find_contradicted, share_origins
from unike.edits.gate import Gate
from unike.edits.gated import GatedEdit
from unike.edits.shares import Shared
from unike.knowledge.scope import TrainedScope
from unike.methods.catalogue import CaseSource
from unike.methods.isolation import train_apart
from unike.methods.registry import find_entry, register, resolve_needs
from unike.types import EditRequest, Query, UserError

__all__ = [
    "CaseSource",
    "EditMethod",
    "Knowledge",
    "build",
    "edited_layers",
    "register",
    "require_reachable",
    "resolve_layers",
    "unwrap",
]

Knowledge = Mapping[int, LayerKnowledge]
MadeEdit = TypeVar("MadeEdit", bound=Edit)


class EditMethod(ABC):
    """Makes edits. A method sees the backbone and the request, never a probe or a metric.

    A method of your own defines ``_edit``, and ``_edit_many`` where it can train several edits in one batch.
    ``hparams`` are the options; ``knowledge`` holds memory and encoders by layer, where the method needs
    them.
    """

    hparams: HyperParams
    knowledge: Knowledge = MappingProxyType({})
    # Of the gate around edits, where the YAML has one that reads states; ``runs.parts`` sets it.
    scope: TrainedScope | None = None
    # Whether the method is trained on cases before its first edit.
    trainable: ClassVar[bool] = False

    def __init__(self, hparams: HyperParams, knowledge: Knowledge) -> None:
        self.hparams, self.knowledge = hparams, knowledge

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        _take_former_names(cls)

    def layers(self, backbone: Backbone) -> list[int]:
        """The edited layers, ascending: what lies below the first is computed once per query. UserError
        as ``resolve_layers``."""
        return resolve_layers(self.hparams, backbone)

    @final
    def edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None = None
    ) -> Edit:
        """The edit for one request, made while ``history`` is applied; its ``origins`` say what it was
        made from. What it contradicts in ``history`` (another answer to the same question about the same
        image) is left out of it. What a block has applied to the backbone is off meanwhile.

        The new edit stands alone; ``history | edit`` is both. ``prefixes`` starts at this method's
        first layer. FloatingPointError where the loss stops being a number; UserError for a target that could
        never be generated.
        """
        require_reachable(backbone, [request])
        with Guard.of(backbone).bare(), train_apart(backbone):
            if history is not None:
                own = Origin.of(request, self.hparams.decisive(), backbone, {})
                places = find_contradicted(history.origins, (own,))
                history = history.drop(places) if places else history
            made = self._edit(backbone, request, prefixes, history)
            return self._sign(self._gate(made, backbone, request), backbone, request)

    @final
    def edit_many(
        self, backbone: Backbone, requests: Sequence[EditRequest], prefixes: PrefixCache
    ) -> list[Edit | FloatingPointError]:
        """Independent edits, each from the base model: batched where the method can, else one by one.

        An edit whose loss stops being a number has the error in its place. UserError, before any edit is
        made, for targets that could never be generated.
        """
        require_reachable(backbone, requests)
        with Guard.of(backbone).bare(), train_apart(backbone):
            outcomes = list(self._edit_many(backbone, requests, prefixes))
            return [
                self._sign(self._gate(outcome, backbone, request), backbone, request)
                if isinstance(outcome, Edit)
                else outcome
                for outcome, request in zip(outcomes, requests, strict=True)
            ]

    def _gate(self, edit: Edit, backbone: Backbone, request: EditRequest) -> Edit:
        """The edit, with the gate around it that the YAML has for edits of any method, if it has one."""
        gate = self._make_gate(backbone)
        return edit if gate is None else GatedEdit.wrap(edit, request, gate, backbone, self.scope)

    def _make_gate(self, backbone: Backbone) -> Gate | None:
        hp, needs = self.hparams, resolve_needs(self.hparams)
        if not needs.gate and hp.scope_overlap is None:
            return None
        layer = None
        if needs.gate_scope:
            assert self.scope is not None, "runs.parts sets it"
            layer = find_gate_layer(hp, backbone, self.layers(backbone))
        # A classifier inside the edit decides by its own threshold.
        similarity = hp.scope_threshold if needs.gate_scope else None
        return Gate(
            overlap=hp.scope_overlap,
            tokens=hp.scope_overlap_tokens,
            nearest=hp.scope_gate == "nearest",
            layer=layer,
            similarity=similarity,
            recall=hp.scope_recall,
            recall_few=hp.scope_recall_few,
            weighs=hp.alpha_overlap,
        )

    def write_lesson(self, request: EditRequest) -> Query:
        """What an edit is trained on: the request's query, with the answer's end as the YAML has it."""
        return replace(request.query, end=self.hparams.answer_end)

    def get_shared_parts(self) -> Shared:
        """What the method's edits share and do not keep themselves."""
        return Shared(self.knowledge, scope=self.scope)

    @abstractmethod
    def _edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None
    ) -> Edit:
        """The edit for one request: what your method defines. ``edit`` calls it, and fills in ``origins``."""

    def _edit_many(
        self, backbone: Backbone, requests: Sequence[EditRequest], prefixes: PrefixCache
    ) -> Sequence[Edit | FloatingPointError]:
        """One edit for each request, or the error in its place, from the base model; one by one unless your
        method defines it. ``edit_many`` calls it, and fills in ``origins``."""
        outcomes: list[Edit | FloatingPointError] = []
        for request in requests:
            try:
                outcomes.append(self._edit(backbone, request, prefixes, None))
            except FloatingPointError as error:
                outcomes.append(error)
        return outcomes

    def _sign(self, edit: Edit, backbone: Backbone, request: EditRequest) -> Edit:
        edit.origins = (Origin.of(request, self.hparams.decisive(), backbone, edit.info),)
        if len(edit.parts) > 1:
            share_origins(edit)
        return edit


def require_reachable(backbone: Backbone, requests: Iterable[EditRequest]) -> None:
    """UserError with a line for each request whose target could never be generated: an edit to it would
    count as successful, and never be read in an answer."""
    found = ((r.id, backbone.find_target_problem(r.query.prompt, str(r.query.target))) for r in requests)
    if problems := [f"edit {name}: {problem}" for name, problem in found if problem]:
        raise UserError(*problems)


def unwrap(outcome: MadeEdit | FloatingPointError) -> MadeEdit:
    """The edit; the error is raised in its place."""
    if isinstance(outcome, FloatingPointError):
        raise outcome
    return outcome


def build(
    hparams: HyperParams, knowledge: Knowledge | None = None, cases: CaseSource | None = None
) -> EditMethod:
    """The method that the YAML names; ``cases`` is only called by one that needs them. UserError where
    the name is unknown, or the method can't work with the YAML."""
    method = find_entry(hparams).make(hparams, knowledge or {}, cases or tuple)
    if isinstance(method, EditMethod):
        return method
    if isinstance(method, _FormerMethod):
        return _AdaptedMethod(method)
    at = f"{hparams.source}: method: {hparams.method}"
    raise UserError(f"{at}: {type(method).__name__} makes no edits; expected a subclass of EditMethod")


def resolve_layers(hparams: LayerOptions, backbone: Backbone) -> list[int]:
    """The YAML's ``layers`` as indices: the last n, or a list. UserError where the decoder has fewer, or
    where ``device_map`` has put one of them elsewhere."""
    found = hparams.list_layers(len(backbone.layout))
    if lost := _list_far_layers(found, backbone):
        raise UserError(
            f"{hparams.source}: layers: {lost} lie on another device than the embeddings; "
            "expected layers that the YAML which loads the backbone names, too"
        )
    return found


def _list_far_layers(layers: Sequence[int], backbone: Backbone) -> list[int]:
    """Those that lie on another device than the embeddings."""
    home = backbone.device
    return [i for i in layers if next(backbone.layout.layer(i).parameters()).device != home]


def find_gate_layer(hparams: HyperParams, backbone: Backbone, layers: Sequence[int]) -> int:
    """The decoder layer whose input the scope classifier of a gate around edits reads: ``scope_layer``, or
    the first of the edited ``layers``. UserError where the decoder has no such layer, or where ``device_map``
    has put it elsewhere."""
    found = hparams.find_scope_layer(len(backbone.layout), layers[0])
    if _list_far_layers([found], backbone):
        expected = "expected an edited layer, or null"
        at = f"{hparams.source}: scope_layer: {found}"
        raise UserError(f"{at}: lies on another device than the embeddings; {expected}")
    return found


# The former name, for one release.
edited_layers = resolve_layers


# ---------------------------------------------------------------- the former shape, for one release

_REMEDY = (
    "a method is a subclass of unike.methods.EditMethod and defines _edit, and _edit_many where it can; "
    "the next release takes no other (docs/adding_a_method.md)"
)


def _take_former_names(method: type[EditMethod]) -> None:
    """Lets a class that defines ``edit`` in place of ``_edit`` work, with a DeprecationWarning."""
    if "edit" not in vars(method):
        return
    warnings.warn(f"{method.__name__} defines edit: {_REMEDY}", DeprecationWarning, stacklevel=4)
    if getattr(method._edit, "__isabstractmethod__", False):
        for name in ("edit", "edit_many"):
            if name in vars(method):
                setattr(method, f"_{name}", vars(method)[name])
                delattr(method, name)


@runtime_checkable
class _FormerMethod(Protocol):
    """A method that is no ``EditMethod`` and defines ``edit`` itself; ``edit_many`` was optional."""

    hparams: HyperParams

    def layers(self, backbone: Backbone) -> list[int]: ...

    def edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None = None
    ) -> Edit: ...


class _AdaptedMethod(EditMethod):
    """A method of the former shape as an ``EditMethod``."""

    def __init__(self, method: _FormerMethod) -> None:
        super().__init__(method.hparams, getattr(method, "knowledge", {}))
        self.method = method
        text = f"method: {self.hparams.method}: {type(method).__name__} defines edit: {_REMEDY}"
        warnings.warn(text, DeprecationWarning, stacklevel=3)

    def layers(self, backbone: Backbone) -> list[int]:
        return self.method.layers(backbone)

    def get_shared_parts(self) -> Shared:
        return Shared(self.knowledge, getattr(self.method, "network", None), self.scope)

    def _edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None
    ) -> Edit:
        return self.method.edit(backbone, request, prefixes, history)

    def _edit_many(
        self, backbone: Backbone, requests: Sequence[EditRequest], prefixes: PrefixCache
    ) -> Sequence[Edit | FloatingPointError]:
        many = getattr(self.method, "edit_many", None)
        if many is None:
            return super()._edit_many(backbone, requests, prefixes)
        outcomes: Sequence[Edit | FloatingPointError] = many(backbone, requests, prefixes)
        return outcomes
