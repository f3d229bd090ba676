"""Whether a model is still the one that cached states and edits are of.

Nobody reports that weights were changed in place: an optimiser's step, ``load_state_dict``, a merged adapter,
``half()``. So what can be seen of a change is compared before each use: identity, version counter and address
of every tensor, and a sample of the numbers, since writing through ``.data`` leaves all of these as they are.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from unike.backbones.hooks import is_hooked, list_foreign_hooks

# Models of up to so many numbers are compared whole before each use, of larger ones so many numbers.
SMALL, SAMPLE = 1 << 19, 1 << 16
# Up to this size the checksum of all numbers is taken at once, so that restored weights are recognised.
SMALL_BYTES = 1 << 28
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Modules of these packages keep what they compute in their tensors; others may keep it in plain attributes,
# as an adapter does that is scaled or switched off.
_PLAIN_PACKAGES = ("torch.", "transformers.")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class WeightWatch:
    """Notices changes of a model's weights and of its modules.

    ``epoch`` counts the changes that were noticed. What is computed from the weights is valid as long as the
    epoch is the same.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.epoch = model, 0
        self._tensors: list[torch.Tensor] = []
        self._checksum: str | None = None
        # By fingerprint the first checksum that had it.
        self._owners: dict[str, str | None] = {}
        self._fingerprint: str | None = None
        self._remember()
        if sum(t.nbytes for t in self._tensors) <= SMALL_BYTES:
            self._checksum = self._compute_checksum()

    @property
    def device(self) -> str:
        """The type of the model's device."""
        return self._tensors[0].device.type if self._tensors else "cpu"

    @property
    def is_training(self) -> bool:
        """Whether a module is in training mode."""
        return any(module.training for module in self._known)

    def seems_changed(self, bare: bool) -> bool:
        """Whether anything differs from what was last seen; modules are only compared while no edit is
        applied (``bare``)."""
        if self._list_marks() != self._marks or (bare and self._have_modules_changed()):
            return True
        return not _are_equal(self._take_sample(), self._sample)

    def renew(self) -> bool:
        """Looks at all numbers while no edit is applied; whether they differ, in which case the epoch is a
        new one. Modules with other hooks, or switched by plain attributes, differ too."""
        before, hooked = self._checksum, self._hooked
        self._remember()
        self._checksum = self._compute_checksum()
        if before == self._checksum and hooked == self._hooked:
            return False
        self.epoch += 1
        self._fingerprint = None
        return True

    @property
    def fingerprint(self) -> str | None:
        """What ``read_fingerprint`` gave for the weights of this epoch; None before that."""
        return self._fingerprint

    def read_checksum(self) -> str:
        """Of all numbers, the names, and the modules; to be read while no edit is applied."""
        if self._checksum is None:
            self._checksum = self._compute_checksum()
        return self._checksum

    def read_fingerprint(self, kind: str) -> str:
        """The checksum by which edits know their model: of names and a few numbers of every tensor, so that
        gigabytes need not be read. Where it would be that of other weights seen before, all numbers count.

        ``kind`` names the decoder's family. To be read while no edit is applied.
        """
        if self._fingerprint is None:
            plain = _compute_fingerprint(self.model, kind)
            if plain not in self._owners:
                self._owners[plain] = self._checksum
            if self._owners[plain] != self._checksum:
                plain = hashlib.sha256(f"{plain} {self.read_checksum()}".encode()).hexdigest()[:16]
            self._fingerprint = plain
        return self._fingerprint

    def are_plain(self, modules: Iterable[nn.Module]) -> bool:
        """Whether these modules compute what the base model does: none is hooked, whoever did it, and each
        has the parameters that were seen last."""
        return all(
            not is_hooked(m) and self._parameters.get(id(m)) == tuple(map(id, m._parameters.values()))
            for m in modules
        )

    def _remember(self) -> None:
        # The tensors themselves: while an edit is applied, others may stand in their places.
        self._tensors = [t for _, t in _list_tensors(self.model)]
        self._known = list(self.model.modules())
        self._parameters = {id(m): tuple(map(id, m._parameters.values())) for m in self._known}
        self._marks = self._list_marks()
        self._modules = [_describe_module(module, {}) for module in self._known]
        self._plain, self._hooked = _list_plain(self.model), _list_hooked(self.model)
        count = sum(t.numel() for t in self._tensors)
        step = 1 if count <= SMALL else count // SAMPLE
        self._views: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for tensor in self._tensors:
            if tensor.numel() and tensor.device.type != "meta":
                bits = _BITS[tensor.element_size()]
                # A view sees what is written later; a copy, of what lies in other orders, would not.
                flat = tensor.detach()
                flat = flat.view(-1) if flat.is_contiguous() else _flatten_dense(flat)
                self._views.setdefault((flat.device, bits), []).append(flat[::step].view(bits))
        self._sample = self._take_sample()

    def _have_modules_changed(self) -> bool:
        # The known ones are kept alive: where each has the modules it had, the whole tree is the same.
        attention: dict[int, object] = {}
        return any(
            _describe_module(module, attention) != before
            for module, before in zip(self._known, self._modules, strict=True)
        )

    def _take_sample(self) -> list[torch.Tensor]:
        return [torch.cat(views) for views in self._views.values()]

    def _list_marks(self) -> list[tuple[object, ...]]:
        return [
            (0 if t.is_inference() else t._version, t.data_ptr(), t.dtype, t.device) for t in self._tensors
        ]

    def _compute_checksum(self) -> str:
        total = hashlib.sha256(repr(self._plain).encode())
        for name, tensor in _list_tensors(self.model):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device}".encode())
            if tensor.numel() and tensor.device.type != "meta":
                raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                total.update(f"{zlib.crc32(raw.data):08x}{zlib.adler32(raw.data):08x}".encode())
        return total.hexdigest()[:32]


def _list_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _flatten_dense(tensor: torch.Tensor) -> torch.Tensor:
    """All numbers of a tensor in the order of its memory; a copy where it has gaps."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


def _describe_module(module: nn.Module, attention: dict[int, object]) -> tuple[object, ...]:
    """Which modules and tensors a module has, and what else decides on what it computes.

    ``attention`` remembers what ``_read_attention`` read, by config: many modules share one, which is slow to
    read.
    """
    own = module.__dict__
    config = own.get("config")
    if config is not None and id(config) not in attention:
        attention[id(config)] = _read_attention(module)
    return (
        # Most modules have no modules or no tensors of their own.
        tuple(map(id, inner.values())) if (inner := own["_modules"]) else (),
        tuple(map(id, parameters.values())) if (parameters := own["_parameters"]) else (),
        tuple(map(id, buffers.values())) if (buffers := own["_buffers"]) else (),
        id(own.get("forward")),
        list_foreign_hooks(module) if own["_forward_pre_hooks"] or own["_forward_hooks"] else (),
        _list_attributes(module),
        None if config is None else attention[id(config)],
    )


def _list_plain(model: nn.Module) -> list[object]:
    """Plain attributes by the modules' names: what no tensor shows."""
    own = ((name, _list_attributes(module)) for name, module in model.named_modules())
    return [entry for entry in own if entry[1]]


def _list_hooked(model: nn.Module) -> list[object]:
    """Hooks that are not this package's, and ways of attention, by the modules' names."""
    own = ((n, list_foreign_hooks(m), _read_attention(m)) for n, m in model.named_modules())
    return [entry for entry in own if entry[1] or entry[2]]


def _read_attention(module: nn.Module) -> object:
    """How a module computes attention: other ways give other last bits."""
    return getattr(vars(module).get("config"), "_attn_implementation", None)


def _list_attributes(module: nn.Module) -> str:
    """The plain attributes of a module that is neither torch's nor transformers'."""
    if type(module).__module__.startswith(_PLAIN_PACKAGES):
        return ""
    kinds = (bool, int, float, str, list, tuple, dict, set)
    return repr({n: v for n, v in vars(module).items() if isinstance(v, kinds) and n not in _OF_EVERY_MODULE})


def _are_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _compute_fingerprint(model: nn.Module, kind: str) -> str:
    digest = hashlib.sha256(kind.encode())
    state: Mapping[str, torch.Tensor] = model.state_dict()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        flat = tensor.detach().flatten()
        digest.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
