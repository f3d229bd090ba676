"""Knowledge states, and their retrieval by cosine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Retrieved:
    """What a prompt gets from memory; ``B`` prompts, ``K`` items, best first.

    ``similarity (B, K)``, ``index (B, K)`` into the memory, ``states (B, K, d)``.
    """

    similarity: torch.Tensor
    index: torch.Tensor
    states: torch.Tensor


class KnowledgeMemory:
    """Pairs ``(h_sem, h_pos)`` of one layer.

    ``keys (m, d)`` are compared with queries by cosine; ``values (m, d)`` are handed over.
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
    def empty(cls, width: int, device: torch.device | None = None) -> KnowledgeMemory:
        nothing = torch.zeros(0, width, device=device)
        return cls(nothing, nothing)

    def extended(self, keys: torch.Tensor, values: torch.Tensor) -> JoinedMemory:
        """This memory with further pairs behind it; nothing is copied."""
        return JoinedMemory((self, KnowledgeMemory(keys, values)))

    def similarities(self, queries: torch.Tensor) -> torch.Tensor:
        """Cosine of every query with every key, ``(B, d) -> (B, m)``."""
        return F.normalize(queries.float(), dim=-1) @ self.directions.T

    def states(self, index: torch.Tensor) -> torch.Tensor:
        """Values by index, ``(B, K) -> (B, K, d)``."""
        return self.values[index]

    def retrieve(self, queries: torch.Tensor, k: int, allowed: torch.Tensor | None = None) -> Retrieved:
        """The ``k`` most similar items of each query, or all where there are fewer.

        Items that ``allowed (B, m)`` excludes come after all others.
        """
        similarity = self.similarities(queries)
        rank = similarity if allowed is None else similarity.masked_fill(~allowed, -torch.inf)
        index = rank.topk(min(k, len(self)), dim=-1).indices
        return Retrieved(similarity.gather(-1, index), index, self.states(index))


class JoinedMemory(KnowledgeMemory):
    """Several memories read as one, in order, without copying any of them."""

    def __init__(self, parts: tuple[KnowledgeMemory, ...]) -> None:
        flat = [q for p in parts for q in (p.parts if isinstance(p, JoinedMemory) else (p,))]
        self.parts: tuple[KnowledgeMemory, ...] = tuple(p for p in flat if len(p)) or tuple(flat[:1])

    def __len__(self) -> int:
        return sum(len(p) for p in self.parts)

    def extended(self, keys: torch.Tensor, values: torch.Tensor) -> JoinedMemory:
        return JoinedMemory((*self.parts, KnowledgeMemory(keys, values)))

    def similarities(self, queries: torch.Tensor) -> torch.Tensor:
        return torch.cat([p.similarities(queries) for p in self.parts], dim=-1)

    def states(self, index: torch.Tensor) -> torch.Tensor:
        width = self.parts[0].values.shape[-1]
        out = self.parts[0].values.new_zeros(*index.shape, width)
        start = 0
        for part in self.parts:
            here = (index >= start) & (index < start + len(part))
            out[here] = part.values[index[here] - start].to(out.dtype)
            start += len(part)
        return out
