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

from unike.knowledge.disk import ABOUT, LOCK, DiskPairs
from unike.knowledge.memory import GrowingRows, KnowledgeMemory, Retrieved, merge_retrieved
from unike.system.files import replace_atomically
from unike.system.places import lock
from unike.system.shipped import name_extra
from unike.types import UserError

logger = logging.getLogger("unike")
# Items after the indexed ones that are searched exactly; where there are more, they are indexed.
TAIL = 10_000
# Candidates that FAISS searches for, as a multiple of k: it ranks them by 8 bits a number.
REFINE = 2
# The least share of an index's lists that is searched; with fewer, a million items lose recall.
PROBED_SHARE = 1 / 12
_CHUNK_BYTES = 64 << 20
_TRAINING_ITEMS_PER_LIST = 64
_INDEX = re.compile(r"index-(\d+)-(\d+)\.faiss")


class PairStorage(Protocol):
    """Where a memory keeps its pairs: ``keys`` and ``values (m, d)``, which can be appended to."""

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
        self._keys, self._values = self._keys.grow(keys), self._values.grow(values)


@dataclass(frozen=True)
class _Segment:
    """An index over the items from ``start`` to ``stop``."""

    start: int
    stop: int
    index: Any
    file: Path | None = None

    def search(self, queries: torch.Tensor, k: int, probes: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates ``(B, k)``: their similarity by FAISS, and their index into the memory; minus infinity
        and 0 where there are fewer. At least ``probes`` lists are searched; None: all."""
        lists = self.index.nlist
        wanted = lists if probes is None else min(lists, max(probes, round(lists * PROBED_SHARE)))
        parameters = _import_faiss().SearchParametersIVF(nprobe=wanted)
        count = min(k, self.stop - self.start)
        near, found = self.index.search(queries.detach().contiguous().numpy(), count, params=parameters)
        similarity, index = torch.from_numpy(near), torch.from_numpy(found)
        none = index < 0
        return similarity.masked_fill(none, -torch.inf), (index + self.start).masked_fill(none, 0)


class IndexedMemory(KnowledgeMemory):
    """A memory that is searched by FAISS; it is used like any ``KnowledgeMemory``.

    An inverted file of 8-bit vectors (``IVF,SQ8``, inner product of directions) gives ``REFINE`` times ``k``
    candidates, whose cosines with the query are then computed from the keys themselves: similarities are
    exact, and only an item that FAISS misses can be missing. The last items, up to ``tail``, are searched
    exactly; when there are more, they get an index of their own, merged with former ones that are not much
    larger. The index of ``DiskPairs`` is kept in their folder, and mapped too.
    """

    def __init__(self, pairs: PairStorage, tail: int = TAIL, probes: int = 32) -> None:
        self.pairs, self.tail, self.probes = pairs, tail, probes
        self.folder = pairs.folder if isinstance(pairs, DiskPairs) else None
        self.segments: list[_Segment] = (
            [] if self.folder is None else list(_read_segments(self.folder, len(pairs)))
        )
        self._directions = self._start_tail()
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
        """How many items, from the first on, are indexed."""
        return self.segments[-1].stop if self.segments else 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Adds further pairs ``(n, d)``, which are retrieved from now on."""
        self.pairs.append(keys, values)
        self._take_up()

    def build(self) -> None:
        """Indexes all items that have been searched exactly so far."""
        start, stop, former = self.indexed, len(self), []
        if start == stop:
            return
        while self.segments and self.segments[-1].stop - self.segments[-1].start <= 2 * (stop - start):
            former.append(self.segments.pop())
            start = former[-1].start
        self.segments.append(_save_segment(self.folder, start, stop, self._build_index(start, stop)))
        self._directions = self._start_tail()
        for segment in former:
            if segment.file is not None:
                with suppress(OSError):
                    segment.file.unlink(missing_ok=True)

    def _take_up(self) -> None:
        """Adds new pairs to the tail, or indexes them where the tail becomes too long."""
        if len(self) - self.indexed > self.tail:
            self.build()
        known = self.indexed + len(self._directions)
        # Read back: they may be stored in less precision, and another process may have appended, too.
        new = F.normalize(self.keys[known:].float(), dim=-1).cpu()
        self._directions = self._directions.grow(new)

    def _start_tail(self) -> GrowingRows:
        return GrowingRows(torch.zeros(0, self.keys.shape[1]))

    def similarities(self, queries: torch.Tensor) -> torch.Tensor:
        unit = F.normalize(queries.float(), dim=-1).cpu()
        parts = [unit @ part.T for _, part in self._iterate_directions(len(self))]
        empty = unit.new_zeros(len(unit), 0)
        return torch.cat(parts or [empty], dim=-1).to(queries.device)

    def states(self, index: torch.Tensor) -> torch.Tensor:
        return self.values[index.to(self.values.device)].to(index.device).float()

    def retrieve(self, queries: torch.Tensor, k: int, allowed: torch.Tensor | None = None) -> Retrieved:
        k = min(k, len(self))
        masked = 0 if allowed is None else allowed.shape[1] - len(self._directions)
        if allowed is not None and masked > 0 and not bool(allowed[:, :masked].all()):
            # An inverted file cannot be masked: all items are compared.
            return self._retrieve_exactly(queries, k, allowed)
        unit = F.normalize(queries.float(), dim=-1).cpu()
        similarity, index, enough = self._find_candidates(unit, k, self.probes)
        if not enough:
            similarity, index, _ = self._find_candidates(unit, k, None)
        own, rank = None, similarity
        if allowed is not None:
            last = allowed[:, max(0, masked) :].cpu()
            first = len(self) - last.shape[1]
            own = index < first
            if last.shape[1]:
                own |= last.gather(1, (index - first).clamp(min=0))
            # Below every cosine, and above the places where there is no item.
            rank = similarity - 4 * (~own)
        best = rank.topk(k, dim=-1).indices
        index = index.gather(1, best).to(queries.device)
        return Retrieved(
            similarity.gather(1, best).to(queries.device),
            index,
            self.states(index),
            None if own is None else own.gather(1, best).to(queries.device),
        )

    def _find_candidates(
        self, unit: torch.Tensor, k: int, probes: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Exact similarities and indices ``(B, C)``, with all items of the tail, minus infinity where there
        is no item; and whether each row has ``k`` of them."""
        tail = torch.arange(self.indexed, len(self)).expand(len(unit), -1)
        in_tail = unit @ self._directions.tensor.T
        if not self.segments:
            return in_tail, tail, True
        parts = [s.search(unit, REFINE * k, probes) for s in self.segments]
        rough, found = (torch.cat(both, dim=1) for both in zip(*parts, strict=True))
        rough, order = rough.topk(min(REFINE * k, rough.shape[1]), dim=-1)
        found = found.gather(1, order)
        near = self.keys[found.to(self.keys.device)].float().cpu()
        lengths = torch.linalg.vector_norm(near, dim=-1).clamp(min=1e-12)
        similarity = (near @ unit[:, :, None])[..., 0] / lengths
        similarity = similarity.masked_fill(rough.isneginf(), -torch.inf)
        enough = int((~rough.isneginf()).sum(1).min()) + tail.shape[1] >= k
        return torch.cat([similarity, in_tail], dim=1), torch.cat([found, tail], dim=1), enough

    def _retrieve_exactly(self, queries: torch.Tensor, k: int, allowed: torch.Tensor) -> Retrieved:
        found, masks = [], allowed.shape[1] - len(self)
        for start, directions in self._iterate_directions(len(self)):
            part = KnowledgeMemory.empty(directions.shape[1])
            part.keys = part.values = part.directions = directions
            low, high = max(0, start + masks), start + len(directions) + masks
            own = None if high <= low else allowed[:, low:high].cpu()
            hit = part.retrieve(queries.cpu(), k, own)
            # Values are only read of the best items, at the end.
            found.append(
                (start, Retrieved(hit.similarity, hit.index, hit.similarity[..., None], hit.allowed))
            )
        best = merge_retrieved(found, k)
        index = best.index.to(queries.device)
        own = None if best.allowed is None else best.allowed.to(queries.device)
        return Retrieved(best.similarity.to(queries.device), index, self.states(index), own)

    def _iterate_directions(self, stop: int, start: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
        """Directions in full precision, part by part, each with the index of its first item."""
        step = max(1, _CHUNK_BYTES // (4 * self.keys.shape[1]))
        for low in range(start, stop, step):
            yield low, F.normalize(self.keys[low : min(stop, low + step)].float(), dim=-1).cpu()

    def _build_index(self, start: int, stop: int) -> Any:
        faiss, items = _import_faiss(), stop - start
        lists = max(1, min(round(math.sqrt(items)), items // _TRAINING_ITEMS_PER_LIST))
        index = faiss.index_factory(self.keys.shape[1], f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.cp.niter, index.cp.min_points_per_centroid = 10, 1
        picked = torch.randperm(items, generator=torch.Generator().manual_seed(0))
        picked = picked[: _TRAINING_ITEMS_PER_LIST * lists].sort().values + start
        index.train(F.normalize(self.keys[picked].float(), dim=-1).cpu().numpy())
        for _, directions in self._iterate_directions(stop, start):
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
    """A memory of pairs ``(m, d)``, searched as ``retrieval`` says: ``exact``, ``faiss``, or ``auto``, by
    FAISS where there are more than ``exact_up_to`` items.

    With a ``folder``, what FAISS searches is stored there, in ``dtype``, and mapped; it is reused where it
    was made from the same ``origin``, and replaced where not. UserError where FAISS is needed and not
    installed.
    """
    if not _wants_faiss(len(keys), retrieval, exact_up_to):
        return KnowledgeMemory.compact(keys, values)
    pairs: PairStorage = RamPairs(keys, values)
    if folder is not None:
        try:
            pairs = _map_pairs(keys, values, folder, origin, dtype or keys.dtype)
        except (OSError, UserError) as error:
            logger.warning("%s: cannot be written, memory stays in RAM: %s", folder, error)
    memory = IndexedMemory(pairs)
    memory.build()
    return memory


def _map_pairs(
    keys: torch.Tensor, values: torch.Tensor, folder: Path, origin: str, dtype: torch.dtype
) -> DiskPairs:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder.parent / f".{folder.name}.lock"):
        with suppress(UserError):
            kept = DiskPairs(folder)
            if kept.about.get("origin") == origin and len(kept) == len(keys):
                return kept
        _remove_pairs(folder)
        pairs = DiskPairs.create(folder, keys.shape[1], dtype, origin)
        pairs.append(keys, values)
        return pairs


def _remove_pairs(folder: Path) -> None:
    """Removes pairs and their indices. UserError where the folder is something else."""
    if not os.path.lexists(folder):
        return
    own = {ABOUT, LOCK, "keys.bin", "values.bin"}
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder}: is in the way of a memory on disk; move it away")
    if foreign := [p for p in folder.iterdir() if p.name not in own and not _is_index_file(p.name)]:
        raise UserError(f"{foreign[0]}: is in the way of a memory on disk; move it away")
    shutil.rmtree(folder, ignore_errors=True)


def _is_index_file(name: str) -> bool:
    # Temporary ones of a killed process begin with a dot.
    return _INDEX.fullmatch(name) is not None or (name.startswith(".") and name.endswith(".tmp"))


def _wants_faiss(items: int, retrieval: str, exact_up_to: int) -> bool:
    if retrieval == "auto" and items > exact_up_to:
        if _has_faiss():
            return True
        logger.warning("%d items are searched exactly; pip install %s is faster", items, name_extra("scale"))
    return retrieval == "faiss" and items > 0


def _has_faiss() -> bool:
    return importlib.util.find_spec("faiss") is not None


def check_faiss(retrieval: str, source: str = "hparams") -> None:
    """UserError where the YAML names FAISS and it is not installed."""
    if retrieval == "faiss" and not _has_faiss():
        raise UserError(
            f"{source}: retrieval: faiss needs the package faiss-cpu; pip install {name_extra('scale')}"
        )


def _import_faiss() -> Any:
    check_faiss("faiss")
    return importlib.import_module("faiss")


# ---------------------------------------------------------------- indices on disk


def _read_segments(folder: Path, items: int) -> Iterator[_Segment]:
    """The indices in a folder of pairs, mapped, as far as they are contiguous from the first item on."""
    spans = sorted(
        ((int(m[1]), int(m[2])) for p in folder.iterdir() if (m := _INDEX.fullmatch(p.name))),
        key=lambda span: (span[0], -span[1]),
    )
    stop = 0
    for low, high in spans:
        if low == stop and high <= items:
            path = folder / f"index-{low}-{high}.faiss"
            try:
                index = _import_faiss().read_index(str(path), _import_faiss().IO_FLAG_MMAP)
                if index.ntotal != high - low:
                    raise RuntimeError(f"holds {index.ntotal} items")
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                logger.warning("%s: is broken and is built anew: %s", path, reason)
                return
            yield _Segment(low, high, index, path)
            stop = high


def _save_segment(folder: Path | None, start: int, stop: int, index: Any) -> _Segment:
    if folder is None:
        return _Segment(start, stop, index)
    path = folder / f"index-{start}-{stop}.faiss"
    faiss = _import_faiss()
    with replace_atomically(path) as temporary:
        faiss.write_index(index, str(temporary))
    return _Segment(start, stop, faiss.read_index(str(path), faiss.IO_FLAG_MMAP), path)
