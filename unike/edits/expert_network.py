"""LiveEdit's networks: what writes an expert for an edit, and what routes a prompt to experts.

Shapes: ``b`` rows, ``t`` tokens, ``d`` the decoder's width, ``m`` the inner width, ``k`` feature vectors,
``r`` the rank of an expert, ``E`` experts. A mask ``(b, t)`` is true where a token belongs to the row's
image, to its question, or to the whole query; every row has one or more such tokens.

``LiveEdit (n)`` in a docstring is equation n of Chen et al. 2025 (arXiv 2411.15432).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unike.types import UserError


class CrossAttention(nn.Module):
    """LiveEdit (2), with several heads: learnt vectors attend to a row's states.

    Its values are as wide as what it returns; nothing projects the heads' outputs afterwards.
    """

    def __init__(self, inner: int, width: int, outputs: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(inner, inner)
        self.key = nn.Linear(width, inner)
        self.value = nn.Linear(width, outputs)

    def forward(self, vectors: torch.Tensor, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``(b, n, outputs)`` from ``vectors (1 or b, n, m)`` and ``states (b, t, d)``."""
        query = self._split(self.query(vectors)).expand(len(states), -1, -1, -1)
        key, value = self._split(self.key(states)), self._split(self.value(states))
        scores = query @ key.transpose(2, 3) / key.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
        return (weights @ value).transpose(1, 2).flatten(2)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """``(b, n, heads * w)`` as ``(b, heads, n, w)``."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _make_vectors(*shape: int) -> nn.Parameter:
    vectors = nn.Parameter(torch.empty(1, *shape))
    nn.init.kaiming_normal_(vectors)
    return vectors


class FeatureExtractor(nn.Module):
    """LiveEdit (3): what matters of an image for a question, and of the question itself."""

    def __init__(self, width: int, inner: int, heads: int, vectors: int) -> None:
        super().__init__()
        self.image_norm, self.question_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.image_vectors = _make_vectors(vectors, inner)
        self.asks = CrossAttention(inner, width, inner, heads)
        self.looks = CrossAttention(inner, width, inner, heads)
        self.question_vectors = _make_vectors(vectors, inner)
        self.reads = CrossAttention(inner, width, inner, heads)

    def read_image(
        self, questions: torch.Tensor, asked: torch.Tensor, images: torch.Tensor, shown: torch.Tensor
    ) -> torch.Tensor:
        """``(b, k, m)``: what the question's states ``(b, t, d)``, where ``asked (b, t)``, look for in the
        image's ``(b, t', d)``, where ``shown (b, t')``."""
        wanted = self.asks(self.image_vectors, self.image_norm(questions), asked)
        found: torch.Tensor = self.looks(wanted, self.image_norm(images), shown)
        return found

    def read_question(self, questions: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """``(b, k, m)`` of the question's states ``(b, t, d)``, where ``asked (b, t)``."""
        found: torch.Tensor = self.reads(self.question_vectors, self.question_norm(questions), asked)
        return found


class InputExtractor(FeatureExtractor):
    """The extractor of prompts, with the learnt image (the sentinel) that an expert's image must beat."""

    def __init__(self, width: int, inner: int, heads: int, vectors: int, image_tokens: int) -> None:
        super().__init__(width, inner, heads, vectors)
        self.sentinel = _make_vectors(image_tokens, width)

    def read_sentinel(self, questions: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """``(b, k, m)``: what each question looks for, in the learnt image."""
        images = self.sentinel.expand(len(questions), -1, -1)
        return self.read_image(questions, asked, images, asked.new_ones(images.shape[:2]))


class FactorWriter(nn.Module):
    """Half of LiveEdit (1): one of an expert's two factors, from all of the edit's states."""

    def __init__(self, width: int, inner: int, heads: int, rank: int, scale: float) -> None:
        super().__init__()
        self.vectors = _make_vectors(rank, inner)
        self.attention = CrossAttention(inner, width, width, heads)
        self.norm = nn.LayerNorm(width)
        self.factor = 1 / (scale * rank**0.5)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``(b, r, d)``."""
        written: torch.Tensor = self.attention(self.vectors, self.norm(states), mask)
        return written * self.factor


@dataclass(frozen=True)
class ExpertSizes:
    """``rank``: of an expert; ``vectors``: k; ``image_tokens``: of the learnt image; ``scale``: what divides
    an expert's factors, with the root of the rank."""

    width: int
    inner: int
    heads: int
    rank: int
    vectors: int
    image_tokens: int
    scale: float

    def require_heads(self, source: str) -> None:
        """UserError where the heads do not divide the two widths."""
        for name, size in (("editor_rank", self.inner), ("the decoder's width", self.width)):
            if size % self.heads:
                raise UserError(
                    f"{source}: live_heads: {self.heads}; expected a divisor of {name}, {size}, such as "
                    f"{max(n for n in range(1, self.heads) if size % n == 0)}"
                )


class ExpertNetwork(nn.Module):
    """Both extractors, the writers of an expert's factors, and the norm before experts."""

    def __init__(self, sizes: ExpertSizes) -> None:
        super().__init__()
        self.sizes = sizes
        own = (sizes.width, sizes.inner, sizes.heads)
        self.edits = FeatureExtractor(*own, sizes.vectors)
        self.prompts = InputExtractor(*own, sizes.vectors, sizes.image_tokens)
        self.left = FactorWriter(*own, sizes.rank, sizes.scale)
        self.right = FactorWriter(*own, sizes.rank, sizes.scale)
        self.norm = nn.LayerNorm(sizes.width)

    def apply_experts(
        self, states: torch.Tensor, left: torch.Tensor, right: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The sum of LiveEdit (6): what experts ``left, right (E, r, d)`` add to ``states (b, t, d)`` by
        their ``weights (b, E)``."""
        firing = (self.norm(states) @ left.flatten(0, 1).T).relu()
        weighted = firing * weights.repeat_interleave(left.shape[1], 1)[:, None]
        return weighted @ right.flatten(0, 1)


def compare_features(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``(b, E)``: the products of ``(b, k, m)`` and ``(E, k, m)``, their mean over k, divided by the root of
    m."""
    return one.flatten(1) @ other.flatten(1).T / (one.shape[1] * one.shape[2] ** 0.5)


def compare_each(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``(b)``: as ``compare_features``, each row of ``(b, k, m)`` with the same row of the other."""
    return (one * other).sum((1, 2)) / (one.shape[1] * one.shape[2] ** 0.5)


def keep_near(similarity: torch.Tensor, sentinel: torch.Tensor) -> torch.Tensor:
    """The hard routing, LiveEdit (5): whether each of ``similarity (b, E)`` is above the row's own
    ``sentinel (b)``."""
    return similarity > sentinel[:, None]


def weigh_kept(similarity: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The soft routing, LiveEdit (7): the weights ``(b, E)`` of the experts that are ``kept``, zeros for
    others and in rows that keep none."""
    some = kept.any(1, keepdim=True)
    relative = similarity.masked_fill(some & ~kept, float("-inf")).softmax(1)
    return torch.where(kept, relative * similarity.sigmoid(), torch.zeros_like(relative))


def compute_nce(similarity: torch.Tensor, right: int) -> torch.Tensor:
    """InfoNCE, LiveEdit (14): ``similarity (n)`` of one feature with n others, of which number ``right`` is
    its partner."""
    return -F.log_softmax(similarity, 0)[right]
