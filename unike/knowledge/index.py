"""Memories of many items: FAISS finds candidates, the exact cosine ranks them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from filelock import FileLock

from unike.knowledge.disk import DiskPairs
from unike.knowledge.memory import GrowingRows, KnowledgeMemory, Retrieved, merged
from unike.types import UserError

logger = logging.getLogger("unike")
# Items behind the index that are searched exactly; more of them are indexed.
TAIL = 10_000
# Candidates that FAISS is asked for, as a multiple of k: its own ranking is that of 8 bits a number.
REFINE = 2
# The least share of an index's lists that is looked at; with fewer, a million items lose recall.
PROBED_SHARE = 1 / 12
_CHUNK_BYTES = 64 << 20
_TRAINING_ITEMS_PER_LIST = 64
_INDEX = re.compile(r"index-(\d+)-(\d+)\.faiss")


class PairStorage(Protocol):
    """What a memory stands on: ``keys`` and ``values (m, d)``, appended to."""

    @property
    def keys(self) -> torch.Tensor: ...

    @property
    def values(self) -> torch.Tensor: ...

    def __len__(self) -> int: ...

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None: ...


class RamPairs:
    """Pairs in memory."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._keys, self._values = GrowingRows(keys), GrowingRows(values)

    @property
    def keys(self) -> torch.Tensor:
        return self._keys.tensor

    @property
    def values(self) -> torch.Tensor:
        return self._values.tensor

    def __len__(self) -> int:
        return len(self._keys)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._keys, self._values = self._keys.extended(keys), self._values.extended(values)


@dataclass(frozen=True)
class _Segment:
    """An index over the items from ``start`` to ``stop``."""

    start: int
    stop: int
    index: Any
    file: Path | None = None

    def search(self, asked: torch.Tensor, k: int, probes: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates ``(B, k)``, their similarity as FAISS has it and their index into the memory, minus
        infinity and 0 where none is left; at least ``probes`` lists are looked at, or all."""
        lists = self.index.nlist
        wanted = lists if probes is None else min(lists, max(probes, round(lists * PROBED_SHARE)))
        parameters = _faiss().SearchParametersIVF(nprobe=wanted)
        count = min(k, self.stop - self.start)
        near, found = self.index.search(asked.detach().contiguous().numpy(), count, params=parameters)
        similarity, index = torch.from_numpy(near), torch.from_numpy(found)
        none = index < 0
        return similarity.masked_fill(none, -torch.inf), (index + self.start).masked_fill(none, 0)


class IndexedMemory(KnowledgeMemory):
    """A memory whose items FAISS finds; the call and what it gives are those of ``KnowledgeMemory``.

    An inverted file of 8-bit vectors (``IVF,SQ8``, inner product of directions) names ``REFINE`` times
    ``k`` candidates, whose cosines with the query are then computed from the keys themselves: the
    similarities are exact, and only an item that FAISS misses can be missing. The last items, up to
    ``tail``, are searched exactly; when there are more, they get an index of their own, joined with
    former ones that are not much larger. The index of ``DiskPairs`` lies beside them and is mapped too.
    """

    def __init__(self, pairs: PairStorage, tail: int = TAIL, probes: int = 32) -> None:
        self.pairs, self.tail, self.probes = pairs, tail, probes
        self.folder = pairs.folder if isinstance(pairs, DiskPairs) else None
        self.segments: list[_Segment] = [] if self.folder is None else list(_kept(self.folder, len(pairs)))
        self._directions = self._none()
        self._take_up()

    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        return self.pairs.keys

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        return self.pairs.values

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def indexed(self) -> int:
        """How many items, from the first on, have an index."""
        return self.segments[-1].stop if self.segments else 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Further pairs ``(n, d)``, found from now on."""
        self.pairs.append(keys, values)
        self._take_up()

    def build(self) -> None:
        """Indexes all items that are searched exactly so far."""
        start, stop, former = self.indexed, len(self), []
        if start == stop:
            return
        while self.segments and self.segments[-1].stop - self.segments[-1].start <= 2 * (stop - start):
            former.append(self.segments.pop())
            start = former[-1].start
        self.segments.append(_saved(self.folder, start, stop, self._built(start, stop)))
        self._directions = self._none()
        for segment in former:
            if segment.file is not None:
                with suppress(OSError):
                    segment.file.unlink(missing_ok=True)

    def _take_up(self) -> None:
        """The pairs behind those that are known: to the tail, or to an index with it."""
        if len(self) - self.indexed > self.tail:
            self.build()
        known = self.indexed + len(self._directions)
        # Read back: they may be kept in less precision, and another process may have appended too.
        new = F.normalize(self.keys[known:].float(), dim=-1).cpu()
        self._directions = self._directions.extended(new)

    def _none(self) -> GrowingRows:
        return GrowingRows(torch.zeros(0, self.keys.shape[1]))

    def similarities(self, queries: torch.Tensor) -> torch.Tensor:
        asked = F.normalize(queries.float(), dim=-1).cpu()
        parts = [asked @ part.T for _, part in self._chunks(len(self))]
        empty = asked.new_zeros(len(asked), 0)
        return torch.cat(parts or [empty], dim=-1).to(queries.device)

    def states(self, index: torch.Tensor) -> torch.Tensor:
        return self.values[index.to(self.values.device)].to(index.device).float()

    def retrieve(self, queries: torch.Tensor, k: int, allowed: torch.Tensor | None = None) -> Retrieved:
        k = min(k, len(self))
        masked = 0 if allowed is None else allowed.shape[1] - len(self._directions)
        if allowed is not None and masked > 0 and not bool(allowed[:, :masked].all()):
            # An inverted file cannot tell which items a prompt may have: all are compared.
            return self._exactly(queries, k, allowed)
        asked = F.normalize(queries.float(), dim=-1).cpu()
        similarity, index, enough = self._candidates(asked, k, self.probes)
        if not enough:
            similarity, index, _ = self._candidates(asked, k, None)
        own, rank = None, similarity
        if allowed is not None:
            behind = allowed[:, max(0, masked) :].cpu()
            first = len(self) - behind.shape[1]
            own = index < first
            if behind.shape[1]:
                own |= behind.gather(1, (index - first).clamp(min=0))
            # Below every cosine, and above the places where there is no item.
            rank = similarity - 4 * (~own)
        best = rank.topk(k, dim=-1).indices
        index = index.gather(1, best).to(queries.device)
        return Retrieved(
            similarity.gather(1, best).to(queries.device), index, self.states(index),
            None if own is None else own.gather(1, best).to(queries.device),
        )  # fmt: skip

    def _candidates(
        self, asked: torch.Tensor, k: int, probes: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Exact similarities and indices ``(B, C)``, all of the tail's among them, minus infinity where
        there is no item; and whether each row has ``k``."""
        tail = torch.arange(self.indexed, len(self)).expand(len(asked), -1)
        in_tail = asked @ self._directions.tensor.T
        if not self.segments:
            return in_tail, tail, True
        parts = [s.search(asked, REFINE * k, probes) for s in self.segments]
        rough, found = (torch.cat(both, dim=1) for both in zip(*parts, strict=True))
        rough, order = rough.topk(min(REFINE * k, rough.shape[1]), dim=-1)
        found = found.gather(1, order)
        near = self.keys[found.to(self.keys.device)].float().cpu()
        lengths = torch.linalg.vector_norm(near, dim=-1).clamp(min=1e-12)
        similarity = (near @ asked[:, :, None])[..., 0] / lengths
        similarity = similarity.masked_fill(rough.isneginf(), -torch.inf)
        enough = int((~rough.isneginf()).sum(1).min()) + tail.shape[1] >= k
        return torch.cat([similarity, in_tail], dim=1), torch.cat([found, tail], dim=1), enough

    def _exactly(self, queries: torch.Tensor, k: int, allowed: torch.Tensor) -> Retrieved:
        found, masks = [], allowed.shape[1] - len(self)
        for start, directions in self._chunks(len(self)):
            part = KnowledgeMemory.empty(directions.shape[1])
            part.keys = part.values = part.directions = directions
            low, high = max(0, start + masks), start + len(directions) + masks
            own = None if high <= low else allowed[:, low:high].cpu()
            hit = part.retrieve(queries.cpu(), k, own)
            # Values of the best alone are read, at the end.
            found.append(
                (start, Retrieved(hit.similarity, hit.index, hit.similarity[..., None], hit.allowed))
            )
        best = merged(found, k)
        index = best.index.to(queries.device)
        own = None if best.allowed is None else best.allowed.to(queries.device)
        return Retrieved(best.similarity.to(queries.device), index, self.states(index), own)

    def _chunks(self, stop: int, start: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
        """Directions in full precision, some at a time, each with where it starts."""
        step = max(1, _CHUNK_BYTES // (4 * self.keys.shape[1]))
        for low in range(start, stop, step):
            yield low, F.normalize(self.keys[low : min(stop, low + step)].float(), dim=-1).cpu()

    def _built(self, start: int, stop: int) -> Any:
        faiss, items = _faiss(), stop - start
        lists = max(1, min(round(math.sqrt(items)), items // _TRAINING_ITEMS_PER_LIST))
        index = faiss.index_factory(self.keys.shape[1], f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.cp.niter, index.cp.min_points_per_centroid = 10, 1
        picked = torch.randperm(items, generator=torch.Generator().manual_seed(0))
        picked = picked[: _TRAINING_ITEMS_PER_LIST * lists].sort().values + start
        index.train(F.normalize(self.keys[picked].float(), dim=-1).cpu().numpy())
        for _, directions in self._chunks(stop, start):
            index.add(directions.numpy())
        return index


def open_memory(
    keys: torch.Tensor,
    values: torch.Tensor,
    retrieval: str = "auto",
    exact_up_to: int = 50_000,
    folder: Path | None = None,
    origin: str = "",
    dtype: torch.dtype | None = None,
) -> KnowledgeMemory:
    """A memory of pairs ``(m, d)`` that is searched as ``retrieval`` says: exactly, by FAISS, or by
    FAISS where there are more than ``exact_up_to`` items.

    With a ``folder``, what FAISS searches is kept there, in ``dtype``, and mapped: read again where it
    was made from the same ``origin``, replaced where not. UserError where FAISS is asked for and is
    not installed.
    """
    if not _by_faiss(len(keys), retrieval, exact_up_to):
        return KnowledgeMemory.compact(keys, values)
    pairs: PairStorage = RamPairs(keys, values)
    if folder is not None:
        try:
            pairs = _mapped_pairs(keys, values, folder, origin, dtype or keys.dtype)
        except OSError as error:
            logger.warning("%s: cannot be written, memory stays in RAM: %s", folder, error)
    memory = IndexedMemory(pairs)
    memory.build()
    return memory


def _mapped_pairs(
    keys: torch.Tensor, values: torch.Tensor, folder: Path, origin: str, dtype: torch.dtype
) -> DiskPairs:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        with suppress(UserError):
            kept = DiskPairs(folder)
            if kept.about.get("origin") == origin and len(kept) == len(keys):
                return kept
        shutil.rmtree(folder, ignore_errors=True)
        pairs = DiskPairs.create(folder, keys.shape[1], dtype, origin)
        pairs.append(keys, values)
        return pairs


def _by_faiss(items: int, retrieval: str, exact_up_to: int) -> bool:
    if retrieval == "auto" and items > exact_up_to:
        if _installed():
            return True
        logger.warning("%d items are searched exactly; pip install '.[scale]' is faster", items)
    return retrieval == "faiss" and items > 0


def _installed() -> bool:
    return importlib.util.find_spec("faiss") is not None


def check_faiss(retrieval: str, source: str = "hparams") -> None:
    """UserError where FAISS is asked for by name and not installed."""
    if retrieval == "faiss" and not _installed():
        raise UserError(f"{source}: retrieval: faiss needs the package faiss-cpu; pip install '.[scale]'")


def _faiss() -> Any:
    check_faiss("faiss")
    return importlib.import_module("faiss")


# ---------------------------------------------------------------- indices on disk


def _kept(folder: Path, items: int) -> Iterator[_Segment]:
    """The indices beside pairs, mapped, as far as they follow each other from the first item on."""
    spans = sorted(
        ((int(m[1]), int(m[2])) for p in folder.iterdir() if (m := _INDEX.fullmatch(p.name))),
        key=lambda span: (span[0], -span[1]),
    )
    stop = 0
    for low, high in spans:
        if low == stop and high <= items:
            path = folder / f"index-{low}-{high}.faiss"
            try:
                index = _faiss().read_index(str(path), _faiss().IO_FLAG_MMAP)
                if index.ntotal != high - low:
                    raise RuntimeError(f"holds {index.ntotal} items")
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                logger.warning("%s: is broken and is built anew: %s", path, reason)
                return
            yield _Segment(low, high, index, path)
            stop = high


def _saved(folder: Path | None, start: int, stop: int, index: Any) -> _Segment:
    if folder is None:
        return _Segment(start, stop, index)
    path = folder / f"index-{start}-{stop}.faiss"
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    faiss = _faiss()
    faiss.write_index(index, str(temporary))
    os.replace(temporary, path)
    return _Segment(start, stop, faiss.read_index(str(path), faiss.IO_FLAG_MMAP), path)
