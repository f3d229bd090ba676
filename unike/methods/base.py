"""What an editing method is, and the register of all of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol, TypeVar

from unike.backbones.base import Backbone
from unike.backbones.prefix import PrefixCache
from unike.config.hparams import HyperParams
from unike.edits import Edit, LayerKnowledge, Origin
from unike.edits.content import Shared
from unike.methods.plugins import load_own_methods
from unike.types import Case, EditRequest, UserError

Knowledge = Mapping[int, LayerKnowledge]


class EditMethod(Protocol):
    """Makes edits; sees the backbone and the request, never a probe or a metric."""

    hparams: HyperParams

    def layers(self, backbone: Backbone) -> list[int]:
        """The edited layers, ascending."""
        ...

    def edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None = None
    ) -> Edit:
        """The edit for one request, made while ``history`` is applied.

        The new edit stands alone; ``history | edit`` is both. ``prefixes`` starts at this method's
        first layer.
        """
        ...


Made = TypeVar("Made", bound=Edit)


def made(outcome: Made | FloatingPointError) -> Made:
    """The edit, or its error raised."""
    if isinstance(outcome, FloatingPointError):
        raise outcome
    return outcome


def edit_many(
    method: EditMethod, backbone: Backbone, requests: Sequence[EditRequest], prefixes: PrefixCache
) -> list[Edit | FloatingPointError]:
    """Independent edits, each from the base model: side by side where the method can, else one by one.

    An edit whose loss stops being a number has the error in its place.
    """
    together = getattr(method, "edit_many", None)
    if together is not None:
        found: list[Edit | FloatingPointError] = together(backbone, requests, prefixes)
        return found
    return one_by_one(lambda request: method.edit(backbone, request, prefixes), requests)


def one_by_one(
    make: Callable[[EditRequest], Made], requests: Sequence[EditRequest]
) -> list[Made | FloatingPointError]:
    """What ``make`` gives for each request, or the error in its place."""
    out: list[Made | FloatingPointError] = []
    for request in requests:
        try:
            out.append(make(request))
        except FloatingPointError as error:
            out.append(error)
    return out


# The training split's cases, read when they are first needed.
CaseSource = Callable[[], Sequence[Case]]
Factory = Callable[..., EditMethod]


@dataclass(frozen=True)
class _Entry:
    factory: Factory
    needs_knowledge: Callable[[HyperParams], bool]
    needs_cases: Callable[[HyperParams], bool] | None
    check: Callable[[HyperParams], None]
    needs_scope: Callable[[HyperParams], bool]


_REGISTER: dict[str, _Entry] = {}


def register(
    name: str,
    needs_knowledge: Callable[[HyperParams], bool] = lambda _: False,
    needs_cases: Callable[[HyperParams], bool] | None = None,
    check: Callable[[HyperParams], None] = lambda _: None,
    needs_scope: Callable[[HyperParams], bool] = lambda _: False,
) -> Callable[[Factory], Factory]:
    """Makes a method known under ``name``; its edits carry their ``origins``. ValueError if the name is
    taken.

    A factory takes hyper-parameters and knowledge, and with ``needs_cases`` a ``CaseSource`` too.
    ``check`` raises UserError where the method can't work with the YAML; it runs before anything is
    loaded. With ``needs_scope`` the first edited layer's knowledge holds the trained measure of scope.
    """

    def keep(factory: Factory) -> Factory:
        if name in _REGISTER:
            raise ValueError(f"a method named {name!r} is registered already")
        _REGISTER[name] = _Entry(factory, needs_knowledge, needs_cases, check, needs_scope)
        for name_of_one, signing in (("edit", _signing), ("edit_many", _signing_many)):
            if (make := getattr(factory, name_of_one, None)) is not None:
                setattr(factory, name_of_one, signing(make))
        return factory

    return keep


def _signed(edit: Edit, hparams: HyperParams, backbone: Backbone, request: EditRequest) -> Edit:
    edit.origins = (Origin.of(request, hparams.decisive(), backbone, edit.info),)
    return edit


def _signing(make: Callable[..., Edit]) -> Callable[..., Edit]:
    """A method's ``edit``; what it makes says what it was made from."""

    @wraps(make)
    def edit(self: Any, backbone: Backbone, request: EditRequest, *rest: Any, **options: Any) -> Edit:
        return _signed(make(self, backbone, request, *rest, **options), self.hparams, backbone, request)

    return edit


def _signing_many(make: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """The same for ``edit_many``."""

    @wraps(make)
    def edit_many(self: Any, backbone: Backbone, requests: Sequence[EditRequest], *rest: Any) -> list[Any]:
        outcomes = make(self, backbone, requests, *rest)
        for outcome, request in zip(outcomes, requests, strict=True):
            if isinstance(outcome, Edit):
                _signed(outcome, self.hparams, backbone, request)
        return outcomes

    return edit_many


def shared_parts(method: EditMethod) -> Shared:
    """What a method's edits lean on."""
    return Shared(getattr(method, "knowledge", {}), getattr(method, "network", None))


def methods() -> list[str]:
    """The registered names, sorted; those of the user's own methods are among them."""
    load_own_methods()
    return sorted(_REGISTER)


def check_method(hparams: HyperParams) -> None:
    """UserError where the YAML names a method that is not registered, or that can't work with it."""
    if hparams.method not in methods():
        near = difflib.get_close_matches(hparams.method, methods(), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"{hparams.source}: method: {hparams.method!r} is unknown; {hint}known: {', '.join(methods())}"
        )
    _REGISTER[hparams.method].check(hparams)


def needs_knowledge(hparams: HyperParams) -> bool:
    """Whether the method wants memory and encoders."""
    check_method(hparams)
    return _REGISTER[hparams.method].needs_knowledge(hparams)


def needs_scope(hparams: HyperParams) -> bool:
    """Whether the method wants the trained measure of scope."""
    check_method(hparams)
    return _REGISTER[hparams.method].needs_scope(hparams)


def needs_cases(hparams: HyperParams) -> bool:
    """Whether the method reads the training split while it edits."""
    check_method(hparams)
    wanted = _REGISTER[hparams.method].needs_cases
    return wanted is not None and wanted(hparams)


def build(
    hparams: HyperParams, knowledge: Knowledge | None = None, cases: CaseSource | None = None
) -> EditMethod:
    """The method that the YAML names; ``cases`` is only called by one that needs them."""
    check_method(hparams)
    entry = _REGISTER[hparams.method]
    if entry.needs_cases is None:
        return entry.factory(hparams, knowledge or {})
    return entry.factory(hparams, knowledge or {}, cases or tuple)


def edited_layers(hparams: HyperParams, backbone: Backbone) -> list[int]:
    """The YAML's ``layers`` as indices: the last n, or a list. UserError where the decoder has fewer, or
    where ``device_map`` has put one of them elsewhere."""
    found = _layer_numbers(hparams, backbone)
    home = backbone.device
    lost = [i for i in found if next(backbone.layout.layer(i).parameters()).device != home]
    if lost:
        raise UserError(
            f"{hparams.source}: layers: {lost} lie on another device than the embeddings; "
            "expected layers that the YAML which loads the backbone names, too"
        )
    return found


def _layer_numbers(hparams: HyperParams, backbone: Backbone) -> list[int]:
    count = len(backbone.layout)
    wanted = hparams.layers
    if isinstance(wanted, int):
        if not 1 <= wanted <= count:
            raise UserError(f"{hparams.source}: layers: {wanted}; the decoder has {count}")
        return backbone.layout.last(wanted)
    bad = [i for i in wanted if not 0 <= i < count]
    if bad or not wanted:
        raise UserError(f"{hparams.source}: layers: {bad or wanted}; expected numbers from 0 to {count - 1}")
    return sorted(set(wanted))
