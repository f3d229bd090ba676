"""Knowledge states, and their retrieval by cosine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Retrieved:
    """What prompts get from memory: ``B`` prompts, ``K`` items each, best first.

    ``similarity (B, K)``, ``index (B, K)`` into the memory, ``states (B, K, d)``. ``allowed (B, K)`` says
    which of the items the prompt may use; None where it may use all.
    """

    similarity: torch.Tensor
    index: torch.Tensor
    states: torch.Tensor
    allowed: torch.Tensor | None = None


class KnowledgeMemory:
    """Pairs ``(h_sem, h_pos)`` of one layer.

    ``keys (m, d)`` are compared with queries by cosine; ``values (m, d)`` are what is retrieved. ValueError
    for keys and values of different shapes.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if keys.shape != values.shape or keys.ndim != 2:
            raise ValueError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)}: expected (m, d) both"
            )
        self.keys = keys
        self.values = values
        self.directions = F.normalize(keys.float(), dim=-1)

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def compact(cls, keys: torch.Tensor, values: torch.Tensor) -> KnowledgeMemory:
        """A memory in less room: of the keys only the directions, which is all that retrieval uses, and the
        values in half precision where that is exact."""
        memory = cls(keys, values)
        memory.keys, half = memory.directions, values.half()
        if torch.equal(half.to(values.dtype), values):
            memory.values = half
        return memory

    @classmethod
    def empty(cls, width: int, device: torch.device | None = None) -> KnowledgeMemory:
        """A memory without items."""
        nothing = torch.zeros(0, width, device=device)
        return cls(nothing, nothing)

    def join_pairs(self, keys: torch.Tensor, values: torch.Tensor) -> JoinedMemory:
        """This memory with further pairs ``(n, d)`` after it; nothing is copied."""
        return JoinedMemory((self, KnowledgeMemory(keys, values)))

    def similarities(self, queries: torch.Tensor) -> torch.Tensor:
        """Cosine of every query with every key, ``(B, d) -> (B, m)``."""
        return F.normalize(queries.float(), dim=-1) @ self.directions.T

    def states(self, index: torch.Tensor) -> torch.Tensor:
        """Values by index in fp32, ``(B, K) -> (B, K, d)``; any shape of index will do."""
        return self.values[index].float()

    def retrieve(self, queries: torch.Tensor, k: int, allowed: torch.Tensor | None = None) -> Retrieved:
        """The ``k`` most similar items of each query, or all where there are fewer.

        ``allowed (B, n)`` masks the last ``n`` items; the items before them are allowed to all queries. Items
        that are not allowed come after all others.
        """
        similarity = self.similarities(queries)
        allowed = _widen_mask(allowed, len(self))
        rank = similarity if allowed is None else similarity.masked_fill(~allowed, -torch.inf)
        index = rank.topk(min(k, len(self)), dim=-1).indices
        open_to = None if allowed is None else allowed.gather(-1, index)
        return Retrieved(similarity.gather(-1, index), index, self.states(index), open_to)


class JoinedMemory(KnowledgeMemory):
    """Several memories read as one, in order, without copying any of them."""

    def __init__(self, parts: tuple[KnowledgeMemory, ...]) -> None:
        flat = [q for p in parts for q in (p.parts if isinstance(p, JoinedMemory) else (p,))]
        self.parts: tuple[KnowledgeMemory, ...] = tuple(p for p in flat if len(p)) or tuple(flat[:1])

    def __len__(self) -> int:
        return sum(len(p) for p in self.parts)

    def join_pairs(self, keys: torch.Tensor, values: torch.Tensor) -> JoinedMemory:
        return JoinedMemory((*self.parts, KnowledgeMemory(keys, values)))

    def similarities(self, queries: torch.Tensor) -> torch.Tensor:
        return torch.cat([p.similarities(queries) for p in self.parts], dim=-1)

    def states(self, index: torch.Tensor) -> torch.Tensor:
        width = self.parts[0].values.shape[-1]
        out = index.new_zeros(*index.shape, width, dtype=torch.float32)
        start = 0
        for part in self.parts:
            here = (index >= start) & (index < start + len(part))
            out[here] = part.states(index[here] - start)
            start += len(part)
        return out

    def retrieve(self, queries: torch.Tensor, k: int, allowed: torch.Tensor | None = None) -> Retrieved:
        """The best of what each part retrieves; a part reads only its own items, and searches as it likes."""
        asked = 0 if allowed is None else allowed.shape[1]
        found, start = [], 0
        for part in self.parts:
            stop = start + len(part)
            # The columns of the mask, which covers the last items, that cover this part.
            low, high = max(0, start - len(self) + asked), stop - len(self) + asked
            own = None if allowed is None or high <= low else allowed[:, low:high]
            found.append((start, part.retrieve(queries, k, own)))
            start = stop
        return merge_retrieved(found, k)


def merge_retrieved(found: list[tuple[int, Retrieved]], k: int) -> Retrieved:
    """The ``k`` best of what several memories retrieved, each with the index at which its items start."""
    similarity = torch.cat([r.similarity for _, r in found], dim=-1)
    index = torch.cat([r.index + start for start, r in found], dim=-1)
    dtype = found[0][1].states.dtype
    states = torch.cat([r.states.to(dtype) for _, r in found], dim=1)
    allowed = None
    if any(r.allowed is not None for _, r in found):
        masks = (r.allowed if r.allowed is not None else r.index >= 0 for _, r in found)
        allowed = torch.cat(list(masks), dim=-1)
    rank = similarity if allowed is None else similarity.masked_fill(~allowed, -torch.inf)
    best = rank.topk(min(k, rank.shape[1]), dim=-1).indices
    rows = torch.arange(len(best), device=best.device)[:, None]
    return Retrieved(
        similarity[rows, best],
        index[rows, best],
        states[rows, best],
        None if allowed is None else allowed[rows, best],
    )


def _widen_mask(allowed: torch.Tensor | None, items: int) -> torch.Tensor | None:
    """A mask of the last items, widened to all: ``(B, items)``."""
    if allowed is None or allowed.shape[1] == items:
        return allowed
    return torch.cat([allowed.new_ones(len(allowed), items - allowed.shape[1]), allowed], dim=-1)


@dataclass
class _Room:
    """Rows, of which the first ``filled`` are in use."""

    rows: torch.Tensor
    filled: int


class GrowingRows:
    """Rows ``(n, ...)`` that are added to at the end, in room that doubles when it is full.

    What is there is shared with what it grows into, not copied, as long as only the longest is extended; it
    is never written to again.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self._room, self._count = _Room(rows, len(rows)), len(rows)

    def __len__(self) -> int:
        return self._count

    @property
    def tensor(self) -> torch.Tensor:
        """All rows, a view of the room."""
        return self._room.rows[: self._count]

    def grow(self, more: torch.Tensor) -> GrowingRows:
        """These rows and ``more (m, ...)``; this one stays as it is."""
        count, room = self._count + len(more), self._room
        if room.filled != self._count or count > len(room.rows):
            rows = self.tensor.new_empty(max(count, 2 * self._count), *more.shape[1:])
            rows[: self._count] = self.tensor
            room = _Room(rows, self._count)
        room.rows[self._count : count] = more
        room.filled = count
        out = object.__new__(GrowingRows)
        out._room, out._count = room, count
        return out
