"""Retrieval against a loop, and the external half's decisions: which items, what alpha."""

import pytest
import reference as naive
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from unike.backbones.layout import AttentionSite
from unike.knowledge.adapter import AdapterLayer, shift
from unike.knowledge.batching import OwnedMemory
from unike.knowledge.memory import JoinedMemory, KnowledgeMemory

SINGLE = {"rtol": 1e-5, "atol": 1e-6}
WIDTH = 8


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def memory(items, seed=0, width=WIDTH):
    return KnowledgeMemory(randn(items, width, seed=2 * seed + 10), randn(items, width, seed=2 * seed + 11))


def check_retrieval(found, queries, keys, values, k):
    """``found`` is what the loop finds; near ties may come in either order."""
    for b, query in enumerate(queries):
        expected = naive.top_k(query, keys, k)
        assert found.index.shape[1] == len(expected) == len(set(found.index[b].tolist()))
        assert_close(found.similarity[b].double(), torch.tensor([c for c, _ in expected]).double(), **SINGLE)
        for rank, index in enumerate(found.index[b].tolist()):
            assert naive.cosine(naive.rows(query), naive.rows(keys[index])) == pytest.approx(
                expected[rank][0], abs=1e-6
            )
            assert torch.equal(found.states[b, rank], values[index])


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(("items", "k"), [(1, 1), (7, 3), (40, 40), (5, 40)])
def test_top_k(items, k):
    known, queries = memory(items), 5 * randn(3, WIDTH)
    found = known.retrieve(queries, k)
    assert found.states.shape == (3, min(k, items), WIDTH)
    check_retrieval(found, queries, known.keys, known.values, k)
    indices = [[i for _, i in naive.top_k(q, known.keys, k)] for q in queries]
    assert found.index.tolist() == indices


def test_retrieval_is_by_cosine_not_by_length():
    known = KnowledgeMemory(torch.tensor([[100.0, 100.0], [0.1, 0.0]]), torch.eye(2))
    assert known.retrieve(torch.tensor([[1.0, 0.0]]), 2).index.tolist() == [[1, 0]]


def test_zero_vectors_give_no_nan():
    known = KnowledgeMemory(torch.cat([torch.zeros(1, WIDTH), randn(2, WIDTH)]), randn(3, WIDTH, seed=1))
    for queries in (randn(2, WIDTH, seed=2), torch.zeros(2, WIDTH)):
        found = known.retrieve(queries, 3)
        assert found.similarity.isfinite().all()
        assert (found.similarity[found.index == 0] == 0).all()


def test_half_precision_memory():
    keys, values = randn(9, WIDTH).half(), randn(9, WIDTH, seed=1).half()
    found = KnowledgeMemory(keys, values).retrieve(randn(2, WIDTH, seed=2).half(), 4)
    assert found.states.dtype == torch.float32
    check_retrieval(found, randn(2, WIDTH, seed=2).half(), keys, values, 4)


@pytest.mark.parametrize(
    ("keys", "values"), [((3, 4), (2, 4)), ((3, 4), (3, 5)), ((4,), (4,)), ((1, 3, 4), (1, 3, 4))]
)
def test_shapes_that_do_not_match_are_refused(keys, values):
    with pytest.raises(ValueError, match="expected"):
        KnowledgeMemory(torch.zeros(keys), torch.zeros(values))


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    k=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)
def test_joined_memory_is_one_concatenated_memory(sizes, k, seed):
    parts = tuple(memory(size, seed + i) for i, size in enumerate(sizes))
    joined = JoinedMemory(parts)
    whole = KnowledgeMemory(torch.cat([p.keys for p in parts]), torch.cat([p.values for p in parts]))
    queries = randn(3, WIDTH, seed=seed)
    assert len(joined) == len(whole) == sum(sizes)
    assert_close(joined.similarities(queries), whole.similarities(queries), **SINGLE)
    found, expected = joined.retrieve(queries, k), whole.retrieve(queries, k)
    assert_close(found.similarity, expected.similarity, **SINGLE)
    check_retrieval(found, queries, whole.keys, whole.values, k)


@pytest.mark.parametrize("first", [0, 3])
def test_extended_appends_and_leaves_the_memory_alone(first):
    bank = memory(first) if first else KnowledgeMemory.empty(WIDTH)
    one, two = memory(2, seed=1), memory(1, seed=2)
    grown = bank.join_pairs(one.keys, one.values).join_pairs(two.keys, two.values)
    assert (len(bank), len(grown)) == (first, first + 3)
    found = grown.retrieve(two.keys, 1)
    assert found.index.tolist() == [[first + 2]]
    assert torch.equal(found.states[:, 0], two.values)
    assert grown.parts[-1].keys is two.keys, "nothing is copied"
    assert first == 0 or grown.parts[0] is bank


def test_joined_memories_nest():
    inner = memory(3).join_pairs(randn(2, WIDTH), randn(2, WIDTH, seed=1))
    found = JoinedMemory((inner, memory(2, seed=5))).retrieve(randn(1, WIDTH, seed=2), 7)
    assert found.states.shape == (1, 7, WIDTH)


@pytest.mark.parametrize("tau", [None, -0.9])
def test_rows_that_may_not_have_their_own_item_attend_to_the_bank_alone(tau):
    bank, own = memory(3), memory(2, seed=7)
    owned = OwnedMemory(bank, own.keys, own.values)
    allowed = torch.tensor([[True], [False]])
    found = owned.retrieve(own.keys, 4, allowed)
    assert found.allowed.tolist() == [[True] * 4, [True, True, True, False]]
    assert [row[0] for row in found.index.tolist()] == [3, bank.retrieve(own.keys[1:], 1).index.item()]
    x, output = randn(2, 5, WIDTH), randn(2, 5, WIDTH, seed=1)
    layer, alone = (adapter(memory=m, alpha=1.0, tau=tau) for m in (owned, bank))
    got = layer.apply(x, output, layer.decide(own.keys, allowed))
    banks = alone.apply(x, output, alone.decide(own.keys))
    assert_close(got[1], banks[1], **SINGLE)
    assert not torch.allclose(got[0], banks[0])


# ---------------------------------------------------------------- the adapter's decisions


def site(width=WIDTH, heads=2, dtype=torch.float32):
    torch_state = torch.get_rng_state()
    torch.manual_seed(0)
    layers = [nn.Linear(width, width).requires_grad_(False) for _ in range(4)]
    torch.set_rng_state(torch_state)
    return AttentionSite(nn.Identity(), *(layer.to(dtype) for layer in layers), width // heads)


SITE = site()
# A query along the first axis, and keys at known cosines from it, not sorted.
QUERY = F.one_hot(torch.tensor([0]), WIDTH).float() * 3
COSINES = (0.1, 0.9, 0.5, -0.3)


def known_memory():
    keys = torch.zeros(len(COSINES), WIDTH)
    for i, c in enumerate(COSINES):
        keys[i, 0], keys[i, i + 1] = c, (1 - c * c) ** 0.5
    return KnowledgeMemory(2 * keys, randn(len(COSINES), WIDTH, seed=3))


def adapter(**options):
    return AdapterLayer(SITE, options.pop("memory", known_memory()), options.pop("semantic", None), **options)


def attended(x, states, bias=None):
    return naive.attention(x, states, SITE.q, SITE.k, SITE.v, SITE.o, SITE.head_dim, bias)


X, OUTPUT = randn(1, 5, WIDTH, seed=6), randn(1, 5, WIDTH, seed=7)


def applied(layer, query=QUERY, x=X, output=OUTPUT):
    return layer.apply(x, output, layer.decide(query))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("attention", ["projected", "plain"])
def test_apply(alpha, attention):
    values = known_memory().values
    knowledge = attended(X[0], values) if attention == "projected" else naive.plain(X[0], values)
    expected = naive.shifted(OUTPUT[0], knowledge, alpha)
    assert_close(applied(adapter(alpha=alpha, attention=attention))[0].double(), expected, **SINGLE)


def test_plain_and_projected_differ():
    assert not torch.allclose(applied(adapter(alpha=0.5)), applied(adapter(alpha=0.5, attention="plain")))


def test_alpha_weighs_the_knowledge():
    output, knowledge = randn(3, 4, WIDTH), randn(3, 4, WIDTH, seed=1)
    mixed = shift(output, knowledge, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(mixed[0], output[0])
    assert torch.equal(mixed[1], knowledge[1])
    assert_close(mixed[2].double(), naive.shifted(output[2], knowledge[2], 0.25), **SINGLE)
    assert not torch.allclose(output, knowledge)


@pytest.mark.parametrize(
    ("tau", "kept"), [(None, [0, 1, 2, 3]), (0.4, [1, 2]), (0.7, [1]), (-0.1, [0, 1, 2])]
)
@pytest.mark.parametrize("attention", ["projected", "plain"])
def test_tau_drops_items(tau, kept, attention):
    values = known_memory().values[kept]
    knowledge = attended(X[0], values) if attention == "projected" else naive.plain(X[0], values)
    got = applied(adapter(alpha=1.0, tau=tau, attention=attention))
    assert_close(got[0].double(), knowledge, **SINGLE)
    assert tau is None or not torch.allclose(got, applied(adapter(alpha=1.0, attention=attention)))


@pytest.mark.parametrize("attention", ["projected", "plain"])
@pytest.mark.parametrize("alpha", [1.0, "adaptive"])
def test_alpha_is_zero_where_tau_leaves_nothing(attention, alpha):
    layer = adapter(alpha=alpha, tau=0.8, attention=attention, semantic=lambda h: h + 5)
    queries = torch.cat([QUERY, -QUERY, torch.zeros_like(QUERY)])
    decision = layer.decide(queries)
    assert decision.alpha[0] > 0
    assert decision.alpha[1:].tolist() == [0.0, 0.0]
    x, output = X.repeat(3, 1, 1).requires_grad_(), OUTPUT.repeat(3, 1, 1)
    got = layer.apply(x, output, decision)
    assert torch.equal(got[1:], output[1:])
    assert not torch.allclose(got[0], output[0])
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert got.isfinite().all()
    assert grad.isfinite().all()


def test_similarity_bias_lets_the_best_speak():
    values = known_memory().values
    for strength in (2.0, 7.0):
        bias = [strength * (c - max(COSINES)) for c in COSINES]
        layer = adapter(alpha=1.0, similarity_bias=strength)
        got = applied(layer)
        assert_close(layer.decide(QUERY).bias[0], torch.tensor(sorted(bias, reverse=True)), **SINGLE)
        assert_close(got[0].double(), attended(X[0], values, bias), **SINGLE)
    assert not torch.allclose(got, applied(adapter(alpha=1.0)))
    alone = applied(adapter(alpha=1.0, similarity_bias=1000.0))
    assert_close(alone[0].double(), attended(X[0], values[[1]]), **SINGLE)


def test_similarity_bias_and_tau_together():
    got = applied(adapter(alpha=1.0, similarity_bias=3.0, tau=0.4))
    expected = attended(X[0], known_memory().values[[1, 2]], [0.0, 3.0 * (0.5 - 0.9)])
    assert_close(got[0].double(), expected, **SINGLE)


def test_k_limits_what_is_attended():
    got = applied(adapter(alpha=1.0, k=2))
    assert_close(got[0].double(), attended(X[0], known_memory().values[[1, 2]]), **SINGLE)


@pytest.mark.parametrize("items", [1, 4])
@pytest.mark.parametrize("similarity_bias", [0.0, 4.0])
def test_adaptive_alpha(items, similarity_bias):
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH)).requires_grad_(False)
    known = memory(items)
    layer = adapter(memory=known, semantic=encoder, similarity_bias=similarity_bias)
    queries = randn(12, WIDTH, seed=4)
    decision = layer.decide(queries)
    expected = []
    for query in queries:
        found = naive.top_k(query, known.keys, 40)
        bias = [similarity_bias * (c - found[0][0]) for c, _ in found]
        mixed = naive.plain(query[None], known.values[[i for _, i in found]], bias)
        expected.append(naive.adaptive_alpha(query, encoder(mixed.float())[0]))
    assert_close(decision.alpha.double(), torch.tensor(expected, dtype=torch.float64), **SINGLE)
    assert min(expected) == 0.0 < max(expected) < 1.0, "both sides of the clamp are seen"


def test_adaptive_alpha_at_its_ends():
    toward = adapter(semantic=lambda h: QUERY.expand_as(h)).decide(QUERY)
    away = adapter(semantic=lambda h: -QUERY.expand_as(h)).decide(QUERY)
    assert_close(toward.alpha, torch.ones(1))
    assert away.alpha.tolist() == [0.0]
    with pytest.raises(ValueError, match="semantic encoder"):
        adapter()


def test_a_prompt_decides_alone():
    """Batch size changes no decision, and one alpha holds for every token of its prompt."""
    layer = adapter(memory=memory(6), semantic=nn.Tanh(), k=3, tau=0.1, similarity_bias=2.0)
    queries, x, output = randn(4, WIDTH), randn(4, 5, WIDTH, seed=1), randn(4, 5, WIDTH, seed=2)
    together = layer.apply(x, output, layer.decide(queries))
    for b in range(4):
        alone = layer.apply(x[b : b + 1], output[b : b + 1], layer.decide(queries[b : b + 1]))
        assert_close(together[b : b + 1], alone, **SINGLE)
    decision = layer.decide(queries)
    stepwise = [layer.apply(x[:, t : t + 1], output[:, t : t + 1], decision) for t in range(5)]
    assert_close(torch.cat(stepwise, 1), together, **SINGLE)
    assert not torch.allclose(together, layer.apply(x, output, layer.decide(queries.flip(0))))


@pytest.mark.parametrize("attention", ["projected", "plain"])
@pytest.mark.parametrize("alpha", [0.5, "adaptive"])
@pytest.mark.parametrize("bank_dtype", [torch.float16, torch.float32])
def test_half_precision_model(attention, alpha, bank_dtype):
    known = memory(5)
    known = KnowledgeMemory(known.keys.to(bank_dtype), known.values.to(bank_dtype))
    half = site(dtype=torch.float16)
    layer = AdapterLayer(
        half, known, nn.Tanh(), alpha=alpha, attention=attention, tau=-0.5, similarity_bias=1.0
    )
    got = layer.apply(X.half(), OUTPUT.half(), layer.decide(QUERY.half()))
    full = AdapterLayer(
        SITE, known, nn.Tanh(), alpha=alpha, attention=attention, tau=-0.5, similarity_bias=1.0
    )
    assert got.dtype == torch.float16
    assert_close(got.float(), applied(full), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("tau", [None, 0.5])
@pytest.mark.parametrize("alpha", [0.5, "adaptive"])
@pytest.mark.parametrize("attention", ["projected", "plain"])
def test_an_empty_memory_shifts_nothing(tau, alpha, attention):
    options = {"alpha": alpha, "attention": attention, "tau": tau, "semantic": lambda h: h + 1}
    assert torch.equal(applied(adapter(memory=KnowledgeMemory.empty(WIDTH), **options)), OUTPUT)
    assert not torch.equal(applied(adapter(**{**options, "tau": None})), OUTPUT)
