"""Forward passes of preparation: queries of one length share a batch, in which nothing is padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from unike.backbones.base import Backbone
from unike.backbones.prefix import PrefixCache, open_prefixes
from unike.config.sections import PrefixOptions
from unike.types import Query


def group_by_length(backbone: Backbone, queries: Sequence[Query], most: int) -> list[list[int]]:
    """The numbers of all queries, in batches of up to ``most`` with equally many tokens.

    Without padding a row's states hardly depend on its batch: on the CPU that docs/performance.md names they
    were those of the query alone, bit for bit. Where a template joins tokens, lengths are off by one: such
    a batch is padded.
    """
    lengths = [_count_tokens(backbone, query) for query in queries]
    order = sorted(range(len(queries)), key=lambda i: lengths[i])
    batches: list[list[int]] = []
    for i in order:
        if not batches or len(batches[-1]) >= most or lengths[batches[-1][-1]] != lengths[i]:
            batches.append([])
        batches[-1].append(i)
    return batches


def _count_tokens(backbone: Backbone, query: Query) -> tuple[bool, int]:
    target = "" if query.target is None else str(query.target)
    return query.image is not None, len(backbone.tokens(f"{query.prompt} {target}"))


@contextmanager
def open_preparation(hparams: PrefixOptions, backbone: Backbone, first: int) -> Iterator[PrefixCache]:
    """Inside the block, lower-layer activations in the batches of preparation; they are kept on disk alone.

    Afterwards the backbone computes vision features again as the YAML has it.
    """
    size = hparams.states_batch
    try:
        yield open_prefixes(hparams, backbone, first, size, memory=False, alone=size == 1)
    finally:
        open_prefixes(hparams, backbone, first)
