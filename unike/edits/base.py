"""What an edit is. Applied for the length of a ``with`` block, then gone.

No edit changes, copies or concatenates a base weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from unike.backbones.base import Backbone
from unike.types import Query


class Edit(ABC):
    """A change to what a backbone answers.

    ``info`` holds what the method reports of making it: steps, final loss, seconds.
    """

    info: dict[str, Any]

    @abstractmethod
    def applied(self, backbone: Backbone) -> AbstractContextManager[None]:
        """The backbone answers edited inside the block, and is as it was after it."""

    @abstractmethod
    def state_dict(self) -> dict[str, torch.Tensor]:
        """All tensors of the edit."""

    @abstractmethod
    def __or__(self, other: Any) -> Edit:
        """Both edits, this one first."""

    def rewrite(self, query: Query) -> Query:
        """The query as the edited model is asked it: the same, unless the edit lives in the prompt."""
        return query

    def changes_prefix(self, backbone: Backbone, first: int) -> bool:
        """Whether the edit changes what enters decoder layer ``first``.

        The base model's prefix states then say nothing about the edited model's answers.
        """
        return False

    def explain(self) -> dict[str, list[float]]:
        """What the edit decided for each prompt of the last forward pass: the mean over its layers of
        ``alpha`` and of the best ``similarity`` in memory; empty where it decides nothing."""
        return {}

    def together(self, edits: Sequence[Edit]) -> Together | None:
        """``edits``, this one the first of them, side by side; None where they can't be."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of the edit's own tensors."""
        return sum(t.nbytes for t in self.state_dict().values())


class Together(ABC):
    """Independent edits side by side: each row of a batch is asked under one of them."""

    @abstractmethod
    def applied(self, backbone: Backbone, owners: torch.Tensor) -> AbstractContextManager[None]:
        """Inside the block every batch has as many rows as ``owners (R)``, which says by number whose
        each row is."""

    def explain(self) -> dict[str, list[float]]:
        """As ``Edit.explain``, by row."""
        return {}


def compose(edits: Sequence[Edit]) -> Edit | None:
    """All edits in order, or None without any."""
    whole: Edit | None = None
    for edit in edits:
        whole = edit if whole is None else whole | edit
    return whole
