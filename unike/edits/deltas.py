"""Edits of weights: new values, or low-rank factors that are added to the weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.func import functional_call

from unike.backbones.base import Backbone
from unike.backbones.hooks import After, transform, unhooked
from unike.edits.activity import Activity, WeightChange
from unike.edits.base import Edit, EditBatch, Inspection, compose
from unike.edits.content import Content
from unike.edits.shares import Shared
from unike.knowledge.batching import Owners

logger = logging.getLogger("unike")


@contextmanager
def _warn_of_writes(parameters: Iterable[torch.Tensor | None]) -> Iterator[None]:
    """Says so where somebody writes to an edit's values in the belief that they are the base model's."""
    before = [(p, p._version) for p in parameters if p is not None and not p.is_inference()]
    yield
    if any(parameter._version != version for parameter, version in before):
        logger.warning(
            "weights were changed in place while an edit had set them: the change is in the edit, and the "
            "base model's weights are as they were; detach the edit first"
        )


class WeightDelta(Edit):
    """New values for some of the model's parameters, by name."""

    kind = "weights"

    def __init__(self, weights: Mapping[str, torch.Tensor], info: Mapping[str, object] | None = None) -> None:
        self.weights: Mapping[str, torch.Tensor] = dict(weights)
        self.info = dict(info or {})

    @contextmanager
    def applied(self, backbone: Backbone) -> Iterator[None]:
        former: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        try:
            for name, tensor in self.weights.items():
                path, _, leaf = name.rpartition(".")
                owner = backbone.model.get_submodule(path)
                former.append((owner, leaf, owner._parameters[leaf]))
                # What is rounded from a master in training keeps its way back to it.
                kept = isinstance(tensor, nn.Parameter) or tensor.requires_grad
                new = tensor if kept else nn.Parameter(tensor, requires_grad=False)
                owner._parameters[leaf] = cast(nn.Parameter, new)
            with _warn_of_writes(owner._parameters[leaf] for owner, leaf, _ in former):
                yield
        finally:
            for owner, leaf, parameter in reversed(former):
                owner._parameters[leaf] = parameter

    def changes_prefix(self, backbone: Backbone, first: int) -> bool:
        layers = [backbone.layout.layer(i) for i in range(first, len(backbone.layout))]
        behind = {id(module) for layer in layers for module in layer.modules()}
        owners = (backbone.model.get_submodule(name.rpartition(".")[0]) for name in self.weights)
        return any(id(owner) not in behind for owner in owners)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: w.detach() for name, w in self.weights.items()}

    def pack(self) -> Content:
        return Content({}, self.state_dict())

    @classmethod
    def unpack(cls, content: Content, backbone: Backbone, shared: Shared) -> WeightDelta:
        known, weights = dict(backbone.model.named_parameters()), {}
        for name in list(content.tensors):
            if name not in known:
                raise ValueError(f"tensor {name}: the model has no such parameter")
            weights[name] = content.take_tensor(name, *known[name].shape, dtypes=(str(known[name].dtype),))
        if not weights:
            raise ValueError("holds no tensor")
        return cls(weights)

    def describe_prompt(self, inspection: Inspection) -> tuple[Activity, ...]:
        """Active unless later edits set all of its weights anew."""
        model, parts = inspection.backbone.model, inspection.whole.parts
        active = any(part.weights.get(n) is new for part in parts for n, new in self.weights.items())
        changes = []
        for name, new in self.weights.items():
            base = model.get_parameter(name)
            changes.append(WeightChange.of(name, (new.float() - base.float()).norm(), base))
        return (Activity(active, weights=tuple(changes)),)

    def batch(self, edits: Sequence[Edit]) -> EditBatch | None:
        same = [e for e in edits if isinstance(e, WeightDelta) and e.weights.keys() == self.weights.keys()]
        return WeightBatch([e.weights for e in same]) if len(same) == len(edits) else None

    def yields_to(self, other: Edit) -> bool:
        return self.weights.keys() <= other.weights.keys()

    def join(self, other: Edit) -> Edit | None:
        if not isinstance(other, WeightDelta):
            return None
        return WeightDelta({**self.weights, **other.weights}, self.info | other.info)


class WeightBatch(EditBatch):
    """New values of the same parameters, ``weights (B, ...)`` by name: each row runs through its own.

    Those that are ``trained`` are masters in single precision, and are rounded to the model's type for each
    forward pass: in half precision small steps would vanish, and Adam's epsilon is 0.
    """

    def __init__(self, weights: Sequence[Mapping[str, torch.Tensor]], trained: bool = False) -> None:
        self.types = {name: tensor.dtype for name, tensor in weights[0].items()}
        self.weights = {
            name: make_master(torch.stack([w[name].detach() for w in weights]), trained)
            for name in weights[0]
        }

    def round_row(self, row: int) -> dict[str, torch.Tensor]:
        """One edit's values, in the model's types, on their own."""
        return {n: w.detach()[row].to(self.types[n], copy=True) for n, w in self.weights.items()}

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all edits but ``rows``."""
        for name, tensor in self.weights.items():
            self.weights[name] = tensor.detach()[rows].requires_grad_(tensor.requires_grad)

    def _round(self, name: str) -> torch.Tensor:
        return self.weights[name].to(self.types[name])

    @contextmanager
    def applied(self, backbone: Backbone, owners: torch.Tensor) -> Iterator[None]:
        owned = Owners(owners, len(next(iter(self.weights.values()))))
        names: dict[str, list[str]] = {}
        for name in self.weights:
            path, _, leaf = name.rpartition(".")
            names.setdefault(path, []).append(leaf)
        afters: list[tuple[nn.Module, nn.Module, After]] = []
        for path, leaves in names.items():
            module = backbone.model.get_submodule(path)
            own = {leaf: self._round(f"{path}.{leaf}") for leaf in leaves}
            afters.append((module, module, _run_by_row(module, own, owned)))
        with transform(afters):
            yield


def make_master(values: torch.Tensor, trained: bool = True) -> torch.Tensor:
    """Values as they are trained: in single precision where the model's is lower."""
    if trained and values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    return values.requires_grad_(trained)


def _run_by_row(module: nn.Module, own: Mapping[str, torch.Tensor], owned: Owners) -> After:
    """Runs a module with weights of each row's own; it must treat each token by itself."""

    def call(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(module, weights, (x,))

    def after(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        # OPT hands its feed-forward network all rows' tokens in one dimension.
        rows = x.reshape(len(owned.index), -1, x.shape[-1])
        with unhooked(module):
            y = torch.vmap(call)(dict(own), owned.fold(rows))
        return owned.unfold(y).reshape(output.shape)

    return after


Site = tuple[int, str]
# Of an edit, by site: ``left (r, in)`` and ``right (r, out)``.
Factors = dict[Site, tuple[torch.Tensor, torch.Tensor]]
# One of several joined edits: how many requests it is of, and the number of its factors by site.
_Member = tuple[int, Mapping[Site, int]]


def ffn_sites(backbone: Backbone, layers: Sequence[int]) -> dict[Site, nn.Linear]:
    """Every linear module of the layers' feed-forward networks, by layer and role: ``key0``, ``key1`` where
    the network is gated, ``value``."""
    out: dict[Site, nn.Module] = {}
    for index in layers:
        site = backbone.layout.ffn(index)
        out |= {(index, f"key{j}"): module for j, module in enumerate(site.keys)}
        out[index, "value"] = site.value
    return {at: cast(nn.Linear, module) for at, module in out.items()}


def attention_sites(backbone: Backbone, layers: Sequence[int]) -> dict[Site, nn.Linear]:
    """The layers' projections of queries and values, by layer and role."""
    out: dict[Site, nn.Linear] = {}
    for index in layers:
        site = backbone.layout.attention(index)
        out[index, "attention_query"] = cast(nn.Linear, site.q)
        out[index, "attention_value"] = cast(nn.Linear, site.v)
    return out


def _find_sites(backbone: Backbone, layers: Iterable[int]) -> dict[Site, nn.Linear]:
    """Every linear module of these layers that factors can be added to."""
    some = sorted(set(layers))
    return ffn_sites(backbone, some) | attention_sites(backbone, some)


class LowRankDelta(Edit):
    """Changes to weights of linear modules as factors: ``W + sum_r right[r] left[r]^T``.

    ``factors`` holds ``left (r, in)`` and ``right (r, out)`` by site. The factors of several edits are
    stacked: their changes add up. The base weight is neither copied nor changed.
    """

    kind = "factors"

    def __init__(
        self,
        factors: Mapping[Site, tuple[torch.Tensor, torch.Tensor]],
        info: Mapping[str, object] | None = None,
    ) -> None:
        # Laid out as when they are loaded: the last bits of a product may depend on it.
        self.factors = {at: (left.contiguous(), right.contiguous()) for at, (left, right) in factors.items()}
        self.info = dict(info or {})
        self._members: tuple[_Member, ...] = ()

    @contextmanager
    def applied(self, backbone: Backbone) -> Iterator[None]:
        modules = _find_sites(backbone, (index for index, _ in self.factors))
        afters: list[tuple[nn.Module, nn.Module, After]] = [
            (modules[at], modules[at], _add_factors(*pair)) for at, pair in self.factors.items()
        ]
        with transform(afters):
            yield

    def changes_prefix(self, backbone: Backbone, first: int) -> bool:
        return any(index < first for index, _ in self.factors)

    def state_dict(self) -> dict[str, torch.Tensor]:
        out = {}
        for (index, role), (left, right) in self.factors.items():
            out[f"{index}.{role}.left"], out[f"{index}.{role}.right"] = left.detach(), right.detach()
        return out

    def pack(self) -> Content:
        # As a list: a file of tensors does not keep the order of the sites.
        return Content({"sites": [list(at) for at in self.factors]}, self.state_dict())

    @classmethod
    def unpack(cls, content: Content, backbone: Backbone, shared: Shared) -> LowRankDelta:
        known, factors = _find_sites(backbone, range(len(backbone.layout))), {}
        for index, role in content.take_value("sites", list):
            if (index, role) not in known:
                raise ValueError(f"sites: the decoder has no {index!r}, {role!r}")
            module, at = known[index, role], f"{index}.{role}"
            left = content.take_tensor(f"{at}.left", None, module.in_features)
            factors[index, role] = left, content.take_tensor(f"{at}.right", len(left), module.out_features)
        if not factors:
            raise ValueError("sites: expected one or more")
        return cls(factors)

    def describe_prompt(self, inspection: Inspection) -> tuple[Activity, ...]:
        modules = _find_sites(inspection.backbone, (i for i, _ in self.factors))
        changes = []
        for (i, role), pair in self.factors.items():
            # The norm of their product, without building it.
            left, right = (factor.double() for factor in pair)
            square = ((left @ left.T) * (right @ right.T)).sum().clamp(min=0)
            changes.append(WeightChange.of(f"{i}.{role}", square.sqrt(), modules[i, role].weight))
        return (Activity(True, weights=tuple(changes)),)

    def batch(self, edits: Sequence[Edit]) -> EditBatch | None:
        same = [e for e in edits if isinstance(e, LowRankDelta) and e.factors.keys() == self.factors.keys()]
        return FactorBatch([e.factors for e in same]) if len(same) == len(edits) else None

    def join(self, other: Edit) -> Edit | None:
        if not isinstance(other, LowRankDelta):
            return None
        both = dict(self.factors)
        for at, pair in other.factors.items():
            if at in both:
                pair = (torch.cat([both[at][0], pair[0]]), torch.cat([both[at][1], pair[1]]))
            both[at] = pair
        out = LowRankDelta(both, self.info | other.info)
        out._members = (*self._list_members(), *other._list_members())
        return out

    def _list_members(self) -> tuple[_Member, ...]:
        """The edits that were joined into this one, in order."""
        return self._members or (
            (len(self.origins), {at: len(left) for at, (left, _) in self.factors.items()}),
        )

    def drop(self, places: Sequence[int]) -> Edit | None:
        gone, kept, start = set(places), list[LowRankDelta](), 0
        used = dict.fromkeys(self.factors, 0)
        for count, ranks in self._list_members():
            own = range(start, start + count)
            if gone.isdisjoint(own):
                factors = {
                    at: (left[used[at] : used[at] + ranks[at]], right[used[at] : used[at] + ranks[at]])
                    for at, (left, right) in self.factors.items()
                    if at in ranks
                }
                kept.append(LowRankDelta(factors, self.info))
                kept[-1].origins = self.origins[start : start + count]
            elif not gone.issuperset(own):
                return self
            used = {at: n + ranks.get(at, 0) for at, n in used.items()}
            start += count
        if start != len(self.origins):
            return self
        return compose(kept)


def _add_factors(left: torch.Tensor, right: torch.Tensor) -> After:
    def after(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output + (x.to(left.dtype) @ left.T @ right).to(output.dtype)

    return after


class FactorBatch(EditBatch):
    """Factors of the same weights, for each row its own: ``left (B, r, in)``, ``right (B, r, out)``."""

    def __init__(self, edits: Sequence[Mapping[Site, tuple[torch.Tensor, torch.Tensor]]]) -> None:
        pad = nn.utils.rnn.pad_sequence
        self.count = len(edits)
        self.factors = {
            at: tuple(pad([e[at][side] for e in edits], batch_first=True) for side in (0, 1))
            for at in edits[0]
        }

    @contextmanager
    def applied(self, backbone: Backbone, owners: torch.Tensor) -> Iterator[None]:
        owned = Owners(owners, self.count)
        modules = _find_sites(backbone, (index for index, _ in self.factors))
        afters: list[tuple[nn.Module, nn.Module, After]] = [
            (modules[at], modules[at], _add_factors_by_row(owned, *pair)) for at, pair in self.factors.items()
        ]
        with transform(afters):
            yield


def _add_factors_by_row(owned: Owners, left: torch.Tensor, right: torch.Tensor) -> After:
    def after(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        rows = owned.fold(x.reshape(len(owned.index), -1, x.shape[-1]).to(left.dtype))
        moved = (rows.flatten(1, 2) @ left.transpose(1, 2) @ right).unflatten(1, rows.shape[1:3])
        return output + owned.unfold(moved).reshape(output.shape).to(output.dtype)

    return after
