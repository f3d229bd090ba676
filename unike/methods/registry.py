"""The register of all methods, the user's own among them, and what the YAML's one needs. No torch here."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from unike.config.hparams import HyperParams
from unike.methods.catalogue import BUILT_IN, Entry, Predicate, accept, check_gate, check_overlap, needs_none
from unike.methods.plugins import load_own_methods
from unike.types import UserError

Factory = TypeVar("Factory", bound=Callable[..., object])


@dataclass(frozen=True)
class MethodNeeds:
    """What a YAML's method needs before it edits.

    ``knowledge``: memory and encoders. ``scope``: a trained scope classifier, its own or that of the gate
    around its edits. ``cases``: the training split, read while it edits. ``training``: it is a
    ``TrainableMethod``, trained before its first edit. ``gate``: its edits get the YAML's gate around them,
    which with ``gate_scope`` reads states.
    """

    knowledge: bool = False
    scope: bool = False
    cases: bool = False
    training: bool = False
    gate: bool = False
    gate_scope: bool = False


_REGISTER = dict(BUILT_IN)


def register(
    name: str,
    needs_knowledge: Predicate = needs_none,
    needs_cases: Predicate | None = None,
    check: Callable[[HyperParams], None] = accept,
    needs_scope: Predicate = needs_none,
) -> Callable[[Factory], Factory]:
    """A decorator that makes a method known under ``name``, for the YAML's key ``method``. The class stays as
    it is. ValueError if the name is taken.

    The class takes hyper-parameters and knowledge, and with ``needs_cases`` a ``CaseSource`` too.
    ``needs_knowledge``, ``needs_cases`` and ``needs_scope`` take the hyper-parameters and say whether the
    method needs memory and encoders, the train split, or a trained scope classifier (which the first edited
    layer's knowledge then holds). ``check`` raises UserError where the method can't work with the
    hyper-parameters; it runs before anything is loaded.
    """

    def keep(factory: Factory) -> Factory:
        if name in _REGISTER:
            raise ValueError(f"a method named {name!r} is registered already")
        trainable = getattr(factory, "trainable", False) if isinstance(factory, type) else None
        _REGISTER[name] = Entry(factory, needs_knowledge, needs_cases, check, needs_scope, trainable)
        return factory

    return keep


def list_methods() -> list[str]:
    """The registered names, sorted, with those of your own methods (``UNIKE_METHODS``, entry points).
    UserError where one of these cannot be imported."""
    load_own_methods()
    return sorted(_REGISTER)


def find_entry(hparams: HyperParams) -> Entry:
    """The YAML's method. UserError where the name is not registered, or the method can't work with the
    YAML."""
    known = list_methods()
    if hparams.method not in known:
        near = difflib.get_close_matches(hparams.method, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"{hparams.source}: method: {hparams.method!r} is unknown; {hint}known: {', '.join(known)}"
        )
    entry = _REGISTER[hparams.method]
    entry.check(hparams)
    check_overlap(hparams)
    if gates_edits(hparams, entry):
        check_gate(hparams)
    return entry


def gates_edits(hparams: HyperParams, entry: Entry) -> bool:
    """Whether the edits of a method get the YAML's gate around them: where it has one that the method does
    not decide by itself."""
    if hparams.scope_gate == "none" or entry.uses_own_gate(hparams) or entry.needs_scope(hparams):
        return False
    if hparams.scope_measure != "cosine":
        return True
    # An overlap alone, with scope_gate: nearest, is of the time before scope_measure had a name for it. A
    # user's own method may compute UniKE's cosine itself.
    return hparams.scope_overlap is None and hparams.method in BUILT_IN


def check_method(hparams: HyperParams) -> None:
    """UserError as ``find_entry``."""
    find_entry(hparams)


def resolve_needs(hparams: HyperParams) -> MethodNeeds:
    """What the YAML's method needs. UserError as ``find_entry``."""
    entry = find_entry(hparams)
    trainable = entry.trainable
    if trainable is None:
        trainable = bool(getattr(entry.make(hparams, {}, tuple), "trainable", False))
    gate = gates_edits(hparams, entry)
    gate_scope = gate and hparams.scope_measure in ("trained", "both")
    return MethodNeeds(
        knowledge=entry.needs_knowledge(hparams),
        scope=entry.needs_scope(hparams) or gate_scope,
        cases=entry.needs_cases is not None and entry.needs_cases(hparams),
        training=trainable,
        gate=gate,
        gate_scope=gate_scope,
    )


def resolve_needs_if_valid(hparams: HyperParams) -> MethodNeeds:
    """As ``resolve_needs``; no needs where ``check_method`` refuses the YAML, so that one list can hold
    that problem and all others."""
    try:
        return resolve_needs(hparams)
    except UserError:
        return MethodNeeds()
