"""An edit in plain parts, as its file keeps it, with the checks for reading them back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# Types of tensors by name, so that whoever only reads an edit's values does without torch.
FULL = ("torch.float32",)
# A model's own states and weights.
ANY = ("torch.float32", "torch.bfloat16", "torch.float16")


class Content:
    """What an edit consists of: ``values`` as in JSON, and ``tensors`` by name.

    Each tensor is taken once. ValueError where something is missing or of another type than expected, and
    where a tensor is of another shape or holds numbers that are not finite.
    """

    def __init__(self, values: dict[str, object], tensors: Mapping[str, torch.Tensor]) -> None:
        self.values, self.tensors = values, dict(tensors)
        self._used: set[str] = set()

    def take_value(self, name: str, kind: type[T]) -> T:
        """A value of the type ``kind``; ``True`` is no whole number."""
        found = self.values.get(name)
        self._used.add(name)
        if not isinstance(found, kind) or isinstance(found, bool) != (kind is bool):
            raise ValueError(f"{name}: expected {kind.__name__}, got {type(found).__name__}")
        return found

    def take_texts(self, name: str) -> list[str | None]:
        """A list whose entries are texts or null."""
        found = self.take_value(name, list)
        if not all(entry is None or isinstance(entry, str) for entry in found):
            raise ValueError(f"{name}: expected texts")
        return found

    def take_tensor(self, name: str, *shape: int | None, dtypes: Sequence[str] = FULL) -> torch.Tensor:
        """A tensor of that shape, None for a side of any length from 1 on, and of one of these types."""
        if name not in self.tensors:
            raise ValueError(f"tensor {name}: missing")
        found = self.tensors.pop(name)
        sides = zip(found.shape, shape, strict=False)
        fits = all(side == wanted or (wanted is None and side > 0) for side, wanted in sides)
        if found.ndim != len(shape) or not fits:
            wanted = tuple("any" if side is None else side for side in shape)
            raise ValueError(f"tensor {name}: shape {tuple(found.shape)}, expected {wanted}")
        if str(found.dtype) not in dtypes:
            raise ValueError(f"tensor {name}: {found.dtype}, expected {' or '.join(dtypes)}")
        if not bool(found.isfinite().all()):
            raise ValueError(f"tensor {name}: holds numbers that are not finite")
        return found

    def take_part(self, number: int) -> Content:
        """One of several contents, as ``merge_contents`` numbered them."""
        start, values = f"{number}.", self.take_value("parts", list)[number]
        if not isinstance(values, dict):
            raise ValueError("parts: expected objects")
        own = [name for name in self.tensors if name.startswith(start)]
        return Content(values, {name[len(start) :]: self.tensors.pop(name) for name in own})

    def require_empty(self) -> None:
        """ValueError where a value or a tensor has not been taken."""
        if left := [*(self.values.keys() - self._used), *self.tensors]:
            raise ValueError(f"{min(left)}: is not part of such an edit")


def merge_contents(parts: list[Content]) -> tuple[list[dict[str, object]], dict[str, torch.Tensor]]:
    """Values and tensors of several contents; the tensors' names begin with the content's number."""
    tensors = {f"{i}.{name}": t for i, part in enumerate(parts) for name, t in part.tensors.items()}
    return [part.values for part in parts], tensors


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A checksum of names, types, shapes and all numbers; the same on every device."""
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().cpu().contiguous()
        total.update(f"{name} {raw.dtype} {tuple(raw.shape)}".encode())
        total.update(raw.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
