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
    """The routers that a backbone has now; the latest one decides first."""

    def __init__(self) -> None:
        self._routers: list[Router] = []

    @contextmanager
    def use(self, router: Router) -> Iterator[None]:
        """Inside the block the backbone asks ``router``."""
        self._routers.append(router)
        try:
            yield
        finally:
            self._routers.remove(router)

    def run(
        self,
        given: G,
        run: Callable[[G], torch.Tensor],
        select: Callable[[G, torch.Tensor], G],
    ) -> torch.Tensor:
        """``run`` of ``given``, group by group: ``(b, s, ...)``. Rows that ``select`` shortens are filled up
        with zeros on the right."""
        return _run(given, run, select, tuple(self._routers))

    def answer(
        self,
        images: Sequence[ImageLike | None],
        prompts: Sequence[str],
        answer: Callable[[Sequence[ImageLike | None], Sequence[str]], list[str]],
    ) -> list[str]:
        """The answers to all prompts, the same number of them to each, group by group."""
        return _answer(images, prompts, answer, tuple(self._routers))


def _run(
    given: G,
    run: Callable[[G], torch.Tensor],
    select: Callable[[G, torch.Tensor], G],
    routers: tuple[Router, ...],
) -> torch.Tensor:
    if not routers:
        return run(given)
    parts: list[tuple[list[int], torch.Tensor]] = []
    for group in routers[-1].group(given.images, given.prompts):
        whole = len(group.rows) == len(given)
        rows = torch.tensor(group.rows, device=given.labels.device)
        with group.under():
            parts.append(
                (group.rows, _run(given if whole else select(given, rows), run, select, routers[:-1]))
            )
    if len(parts) == 1:
        return parts[0][1]
    first = parts[0][1]
    out = first.new_zeros(len(given), given.labels.shape[1], *first.shape[2:])
    for chosen, part in parts:
        # Not written in place: an edit may be in training.
        padded = first.new_zeros(len(chosen), *out.shape[1:])
        padded[:, : part.shape[1]] = part
        out = out.index_add(0, torch.tensor(chosen, device=out.device), padded)
    return out


def _answer(
    images: Sequence[ImageLike | None],
    prompts: Sequence[str],
    answer: Callable[[Sequence[ImageLike | None], Sequence[str]], list[str]],
    routers: tuple[Router, ...],
) -> list[str]:
    if not routers:
        return answer(images, prompts)
    found: dict[int, list[str]] = {}
    for group in routers[-1].group(images, prompts):
        own = [images[i] for i in group.rows], [prompts[i] for i in group.rows]
        with group.under():
            texts = _answer(*own, answer, routers[:-1])
        each = len(texts) // len(group.rows)
        for place, row in enumerate(group.rows):
            found[row] = texts[place * each : (place + 1) * each]
    return [text for row in sorted(found) for text in found[row]]


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
