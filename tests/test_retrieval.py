"""Memories of many items: FAISS finds what exact search finds, while they grow, and from disk."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from unike.knowledge import index as retrieval
from unike.knowledge.disk import DiskPairs
from unike.knowledge.index import IndexedMemory, RamPairs, check_faiss, open_memory
from unike.knowledge.memory import JoinedMemory, KnowledgeMemory
from unike.types import UserError

pytest.importorskip("faiss")
WIDTH, K = 32, 40


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(items, seed=0, clusters=50, width=WIDTH):
    """Points around centres, as the states of questions of a kind lie around each other."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.randint(clusters, (items,), generator=generator)
    return randn(clusters, width, seed=99)[at] + 0.5 * torch.randn(items, width, generator=generator)


def pairs(items, seed=0):
    return clustered(items, seed), randn(items, WIDTH, seed=seed + 1)


def recall(found, expected):
    hits = [len(set(a) & set(b)) for a, b in zip(found.index.tolist(), expected.index.tolist(), strict=True)]
    return sum(hits) / expected.index.numel()


def check(found, keys, values, queries):
    """Whatever was found: its cosine is exact, its value its own, the best first, nothing twice."""
    cosine = F.normalize(queries, dim=-1) @ F.normalize(keys.float(), dim=-1).T
    torch.testing.assert_close(found.similarity, cosine.gather(1, found.index), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.states, values[found.index])
    assert (found.similarity.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == len(row) for row in found.index.tolist())


# ---------------------------------------------------------------- against exact search


def noise(items, seed=0):
    """The worst case of an inverted file: no item's neighbours lie together."""
    return randn(items, WIDTH, seed=seed)


@pytest.mark.parametrize(("data", "least"), [(clustered, 0.99), (noise, 0.85)])
def test_faiss_finds_what_exact_search_finds(data, least):
    keys, values, queries = data(5000), randn(5000, WIDTH, seed=1), data(20, seed=2)
    exact = KnowledgeMemory(keys, values).retrieve(queries, K)
    memory = open_memory(keys, values, "faiss")
    found = memory.retrieve(queries, K)
    assert memory.indexed == 5000
    check(found, keys, values, queries)
    assert recall(found, exact) > least
    memory.probes = memory.segments[0].index.nlist
    assert recall(memory.retrieve(queries, K), exact) > 0.999, "all lists: only 8 bits can miss an item"


def test_fewer_lists_find_less():
    keys, queries = noise(5000), noise(20, seed=2)
    memory = open_memory(keys, keys, "faiss")
    memory.probes = 1
    assert recall(memory.retrieve(queries, K), KnowledgeMemory(keys, keys).retrieve(queries, K)) < 0.6


@pytest.mark.parametrize("items", [1, 3, 100])
def test_few_items_are_all_found(items):
    keys, values = pairs(items)
    queries = torch.cat([randn(3, WIDTH, seed=5), torch.zeros(1, WIDTH)])
    found = open_memory(keys, values, "faiss").retrieve(queries, K)
    assert found.index.shape == (4, min(items, K))
    check(found, keys, values, queries)
    exact = KnowledgeMemory(keys, values).retrieve(queries, K)
    torch.testing.assert_close(found.similarity, exact.similarity, rtol=1e-5, atol=1e-6)


def test_more_items_than_the_probed_lists_hold():
    keys, values = pairs(3000)
    memory = open_memory(keys, values, "faiss")
    memory.probes = 1
    found = memory.retrieve(randn(2, WIDTH), 2000)
    assert found.index.shape == (2, 2000)
    check(found, keys, values, randn(2, WIDTH))


def test_half_precision_and_other_shapes_of_the_call():
    keys, values = pairs(500)
    memory = open_memory(keys.half(), values.half(), "faiss")
    queries = randn(3, WIDTH).half()
    assert memory.retrieve(queries, 5).states.dtype == torch.float32
    whole = KnowledgeMemory(keys.half(), values.half())
    cosines = whole.similarities(queries)
    torch.testing.assert_close(memory.similarities(queries), cosines, rtol=1e-5, atol=1e-6)
    assert len(memory) == 500
    index = torch.tensor([[3, 1], [0, 499]])
    assert torch.equal(memory.states(index), whole.states(index))


def test_similarities_carry_gradients_as_those_of_exact_search_do():
    keys, values = pairs(300)
    grads = []
    for memory in (KnowledgeMemory(keys, values), open_memory(keys, values, "faiss")):
        queries = clustered(3, seed=6).requires_grad_()
        similarity = memory.retrieve(queries, K).similarity
        grads.append(torch.autograd.grad(similarity.sum(), queries)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert grads[0].abs().max() > 0


# ---------------------------------------------------------------- growing


def test_appended_items_are_found_at_once():
    keys, values = pairs(900)
    memory = IndexedMemory(RamPairs(keys[:300], values[:300]), tail=100)
    queries, sizes = clustered(6, seed=7), []
    for start in range(300, 900, 60):
        memory.append(keys[start : start + 60], values[start : start + 60])
        stop = start + 60
        sizes.append((memory.indexed, len(memory.segments)))
        own = memory.retrieve(keys[stop - 1 : stop], 1)
        assert own.index.tolist() == [[stop - 1]]
        found = memory.retrieve(queries, K)
        check(found, keys[:stop], values[:stop], queries)
        assert recall(found, KnowledgeMemory(keys[:stop], values[:stop]).retrieve(queries, K)) > 0.95
    assert any(indexed < 300 + 60 * (i + 1) for i, (indexed, _) in enumerate(sizes)), "a tail was searched"
    assert sizes[-1][0] > sizes[0][0], "and it was indexed when it was full"
    spans = [(s.start, s.stop) for s in memory.segments]
    assert spans[0][0] == 0
    assert [stop for _, stop in spans[:-1]] == [start for start, _ in spans[1:]]


def test_appending_copies_nothing_that_is_there():
    keys, values = pairs(10)
    kept = RamPairs(keys, values)
    kept.append(*pairs(1))
    before = kept.keys.data_ptr()
    kept.append(*pairs(5))
    assert kept.keys.data_ptr() == before
    assert len(kept) == 16
    assert torch.equal(keys, pairs(10)[0]), "what was given is left alone"


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("kind", ["exact", "faiss"])
def test_a_joined_memory_asks_each_part_and_masks_its_last_items(kind):
    keys, values = pairs(2000)
    own_keys, own_values = pairs(5, seed=50)
    bank = open_memory(keys, values, kind)
    joined = bank.join_pairs(own_keys, own_values)
    whole = KnowledgeMemory(torch.cat([keys, own_keys]), torch.cat([values, own_values]))
    queries = torch.cat([own_keys[:3], clustered(3, seed=3)])
    open_to = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) > 0.5
    open_to[0, 0], open_to[1, 1] = False, True
    wide = torch.cat([torch.ones(6, 2000, dtype=torch.bool), open_to], 1)
    expected = whole.retrieve(queries, K, wide)
    for mask in (open_to, wide):
        found = joined.retrieve(queries, K, mask)
        assert recall(found, expected) > (0.999 if kind == "exact" else 0.95)
        assert torch.equal(found.allowed, wide.gather(1, found.index))
        assert 2000 not in found.index[0]
        assert found.index[1, 0] == 2001
    assert joined.retrieve(queries, K).index[0, 0] == 2000
    assert joined.retrieve(queries, K).allowed is None


def test_what_is_masked_comes_last():
    keys, values = pairs(30)
    mask = torch.arange(30)[None] % 2 == 0
    mask = mask.repeat(2, 1)
    memories = [
        KnowledgeMemory(keys, values),
        JoinedMemory((KnowledgeMemory(keys[:7], values[:7]), KnowledgeMemory(keys[7:], values[7:]))),
        open_memory(keys, values, "faiss"),
        IndexedMemory(RamPairs(keys, values), tail=100),
    ]
    for memory in memories:
        found = memory.retrieve(randn(2, WIDTH, seed=8), 20, mask)
        assert (found.index[:, :15] % 2 == 0).all()
        assert (found.index[:, 15:] % 2 == 1).all()
        assert torch.equal(found.allowed, found.index % 2 == 0)
        assert torch.equal(found.states, values[found.index])


def test_masks_over_tail_and_index_of_a_memory():
    keys, values = pairs(600)
    memory = IndexedMemory(RamPairs(keys[:550], values[:550]), tail=100)
    memory.append(keys[550:], values[550:])
    assert memory.indexed == 550
    whole, queries = KnowledgeMemory(keys, values), keys[[555, 540]]
    for covered in (10, 50, 60, 600):
        mask = torch.ones(2, covered, dtype=torch.bool)
        mask[:, -10:] = False
        found, expected = memory.retrieve(queries, K, mask), whole.retrieve(queries, K, mask)
        assert recall(found, expected) > 0.95
        assert found.allowed.all()
        if covered >= 60:
            mask[:, -60] = False
            assert memory.retrieve(queries, 1).index[1, 0] == 540
            assert 540 not in memory.retrieve(queries, K, mask).index[1]


# ---------------------------------------------------------------- on disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pairs_on_disk_reopen_as_they_were(tmp_path, dtype):
    keys, values = (t.to(dtype) for t in pairs(700))
    memory = IndexedMemory(DiskPairs.create(tmp_path / "m", WIDTH, dtype), tail=200)
    assert len(memory.retrieve(randn(1, WIDTH), K).index[0]) == 0
    for start in range(0, 700, 140):
        memory.append(keys[start : start + 140], values[start : start + 140])
    queries = clustered(4, seed=9)
    found = memory.retrieve(queries, K)
    check(found, keys, values, queries)
    again = IndexedMemory(DiskPairs(tmp_path / "m"), tail=200)
    assert torch.equal(again.keys, keys)
    assert torch.equal(again.values, values)
    assert again.indexed == memory.indexed > 0
    assert torch.equal(again.retrieve(queries, K).index, found.index)
    assert recall(found, KnowledgeMemory(keys, values).retrieve(queries, K)) > 0.95


def test_a_crash_while_appending_leaves_the_items_from_before(tmp_path, monkeypatch):
    keys, values = pairs(30)
    kept = DiskPairs.create(tmp_path / "m", WIDTH, torch.float32)
    kept.append(keys[:10], values[:10])

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("unike.knowledge.disk._write_about", crash)
    with pytest.raises(KeyboardInterrupt):
        kept.append(keys[10:20], values[10:20])
    monkeypatch.undo()
    again = DiskPairs(tmp_path / "m")
    assert torch.equal(again.keys, keys[:10])
    again.append(keys[20:], values[20:])
    assert torch.equal(DiskPairs(tmp_path / "m").values, torch.cat([values[:10], values[20:]]))


def test_two_writers_see_each_other(tmp_path):
    keys, values = pairs(30)
    one = DiskPairs.create(tmp_path / "m", WIDTH, torch.float32)
    two = IndexedMemory(DiskPairs(tmp_path / "m"))
    one.append(keys[:10], values[:10])
    two.append(keys[10:20], values[10:20])
    assert (len(one), len(two)) == (10, 20)
    assert two.retrieve(keys[[3, 15]], 1).index.tolist() == [[3], [15]]
    one.refresh()
    assert torch.equal(one.keys, keys[:20])


def test_what_is_written_into_the_tensor_does_not_reach_the_file(tmp_path):
    kept = DiskPairs.create(tmp_path / "m", WIDTH, torch.float32)
    keys, values = pairs(3)
    kept.append(keys, values)
    kept.keys.zero_()
    assert torch.equal(DiskPairs(tmp_path / "m").keys, keys)


def test_a_broken_index_is_built_anew(tmp_path, caplog):
    keys, values = pairs(300)
    memory = IndexedMemory(DiskPairs.create(tmp_path / "m", WIDTH, torch.float32), tail=100)
    memory.append(keys, values)
    (path,) = (tmp_path / "m").glob("index-*.faiss")
    path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, "unike"):
        again = IndexedMemory(DiskPairs(tmp_path / "m"), tail=100)
    assert [path.name in r.message for r in caplog.records] == [True]
    assert again.indexed == 300
    check(again.retrieve(keys[:2], K), keys, values, keys[:2])


@pytest.mark.parametrize(
    ("name", "content"),
    [("pairs.json", "{"), ("pairs.json", "[]"), ("pairs.json", '{"format": "x"}'), ("keys.bin", "short")],
)
def test_a_folder_that_is_not_pairs_is_one_line(tmp_path, name, content):
    kept = DiskPairs.create(tmp_path / "m", WIDTH)
    kept.append(*pairs(3))
    (tmp_path / "m" / name).write_text(content)
    with pytest.raises(UserError, match=name) as caught:
        DiskPairs(tmp_path / "m")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="holds pairs already"):
        DiskPairs.create(tmp_path / "m", WIDTH)
    with pytest.raises(ValueError, match="expected"):
        kept.append(torch.zeros(2, WIDTH + 1), torch.zeros(2, WIDTH + 1))


OPENING = """
import resource, sys, time
import torch
from unike.knowledge.disk import DiskPairs
from unike.knowledge.index import IndexedMemory
import faiss

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
memory = IndexedMemory(DiskPairs(sys.argv[1]))
seconds = time.perf_counter() - started
memory.retrieve(torch.randn(1, memory.keys.shape[1]), 40)
print(len(memory), seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_opening_is_instant_and_takes_little_memory(tmp_path):
    items, width = 100_000, 256
    memory = IndexedMemory(DiskPairs.create(tmp_path / "m", width, torch.float16))
    data = randn(items, width).half()
    memory.append(data, data)
    run = subprocess.run(
        [sys.executable, "-c", OPENING, str(tmp_path / "m")], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found, seconds, taken = (float(word) for word in run.stdout.split())
    assert found == items
    assert seconds < 1
    assert taken < 0.5 * 2 * data.nbytes


# ---------------------------------------------------------------- the choice


def test_auto_is_exact_up_to_a_size():
    keys, values = pairs(100)
    assert type(open_memory(keys, values)) is KnowledgeMemory
    assert type(open_memory(keys, values, "auto", 100)) is KnowledgeMemory
    assert isinstance(open_memory(keys, values, "auto", 99), IndexedMemory)
    assert type(open_memory(keys, values, "exact", 0)) is KnowledgeMemory
    assert isinstance(open_memory(keys, values, "faiss"), IndexedMemory)
    assert type(open_memory(keys[:0], values[:0], "faiss")) is KnowledgeMemory


def test_without_faiss_only_asking_for_it_by_name_is_an_error(monkeypatch, caplog):
    keys, values = pairs(100)
    check_faiss("faiss")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"file.yaml: retrieval: faiss .*\[scale\]"):
        check_faiss("faiss", "file.yaml")
    check_faiss("auto")
    with pytest.raises(UserError, match=r"\[scale\]"):
        open_memory(keys, values, "faiss")
    with caplog.at_level(logging.WARNING, "unike"):
        assert type(open_memory(keys, values, "auto", 10)) is KnowledgeMemory
    assert "100 items" in caplog.text


def test_a_kept_memory_is_read_again_or_replaced(tmp_path, monkeypatch):
    keys, values = pairs(300)
    keep = {"retrieval": "faiss", "folder": tmp_path / "memory-3", "dtype": torch.float16}
    first = open_memory(keys, values, origin="one", **keep)
    assert first.keys.dtype == torch.float16
    monkeypatch.setattr(retrieval.IndexedMemory, "_build_index", lambda *_: pytest.fail("built again"))
    again = open_memory(keys, values, origin="one", **keep)
    assert torch.equal(again.retrieve(keys[:3], K).index, first.retrieve(keys[:3], K).index)
    monkeypatch.undo()
    other = open_memory(-keys, values, origin="two", **keep)
    assert torch.equal(other.keys, -keys.half())
    assert json.loads((tmp_path / "memory-3" / "pairs.json").read_text())["origin"] == "two"
