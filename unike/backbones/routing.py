"""Rows of one batch answered under different edits: each group of rows is computed by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

from unike.backbones.base import Batch, PrefixState
from unike.types import ImageLike

G = TypeVar("G", Batch, PrefixState)
T = TypeVar("T")


@dataclass(frozen=True)
class RowGroup:
    """``rows`` of a batch, and what they are computed under; a new context manager each time."""

    rows: list[int]
    under: Callable[[], AbstractContextManager[Any]]


class Router(Protocol):
    """Decides which rows of a batch are computed under what."""

    def group(self, images: Sequence[ImageLike | None], prompts: Sequence[str]) -> list[RowGroup]:
        """All rows, each in one group."""
        ...


class Routers:
    """The routers that a backbone has now; the latest one decides first.

    While a group of rows is computed, the router that made it is not asked again.
    """

    def __init__(self) -> None:
        self._routers: list[Router] = []
        self._busy: list[Router] = []

    @contextmanager
    def use(self, router: Router) -> Iterator[None]:
        """Inside the block the backbone asks ``router``."""
        self._routers.append(router)
        try:
            yield
        finally:
            self._routers.remove(router)

    def run(
        self, given: G, run: Callable[[G], torch.Tensor], select: Callable[[G, torch.Tensor], G]
    ) -> torch.Tensor:
        """``run`` of ``given``, group by group: ``(b, s, ...)``. Rows that ``select`` shortens are filled up
        with zeros on the right."""
        router = self._choose_router()
        if router is None:
            return run(given)
        parts: list[tuple[list[int], torch.Tensor]] = []
        for group in router.group(given.images, given.prompts):
            whole = len(group.rows) == len(given)
            own = given if whole else select(given, torch.tensor(group.rows, device=given.labels.device))
            with self._compute(router, group):
                parts.append((group.rows, self.run(own, run, select)))
        return parts[0][1] if len(parts) == 1 else _put_together(given, parts)

    def spread(
        self,
        images: Sequence[ImageLike | None],
        prompts: Sequence[str],
        compute: Callable[[list[int]], list[T]],
    ) -> list[T]:
        """``compute`` of all rows, given by number, group by group: as many values for each row as it gives,
        in the rows' order."""
        return self._spread(list(range(len(prompts))), images, prompts, compute)

    def _spread(
        self,
        rows: list[int],
        images: Sequence[ImageLike | None],
        prompts: Sequence[str],
        compute: Callable[[list[int]], list[T]],
    ) -> list[T]:
        router = self._choose_router()
        if router is None:
            return compute(rows)
        found: dict[int, list[T]] = {}
        for group in router.group([images[i] for i in rows], [prompts[i] for i in rows]):
            own = [rows[i] for i in group.rows]
            with self._compute(router, group):
                values = self._spread(own, images, prompts, compute)
            each = len(values) // len(own)
            found |= {row: values[i * each : (i + 1) * each] for i, row in enumerate(own)}
        return [value for row in rows for value in found[row]]

    def _choose_router(self) -> Router | None:
        free = [router for router in self._routers if router not in self._busy]
        return free[-1] if free else None

    @contextmanager
    def _compute(self, router: Router, group: RowGroup) -> Iterator[None]:
        self._busy.append(router)
        try:
            with group.under():
                yield
        finally:
            self._busy.remove(router)


def _put_together(
    given: Batch | PrefixState, parts: Sequence[tuple[list[int], torch.Tensor]]
) -> torch.Tensor:
    first = parts[0][1]
    out = first.new_zeros(len(given), given.labels.shape[1], *first.shape[2:])
    for rows, part in parts:
        # Not written in place: an edit may be in training.
        padded = first.new_zeros(len(rows), *out.shape[1:])
        padded[:, : part.shape[1]] = part
        out = out.index_add(0, torch.tensor(rows, device=out.device), padded)
    return out


def select_rows(batch: Batch, rows: torch.Tensor) -> Batch:
    """Some rows of a batch, at its width."""
    chosen = rows.tolist()
    return replace(
        batch,
        inputs_embeds=batch.inputs_embeds[rows],
        attention_mask=batch.attention_mask[rows],
        labels=batch.labels[rows],
        question_end=batch.question_end[rows],
        prompts=tuple(batch.prompts[i] for i in chosen),
        positions=None if batch.positions is None else batch.positions[rows],
        images=tuple(batch.images[i] for i in chosen),
    )
