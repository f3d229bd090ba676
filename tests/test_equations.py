"""Equations 2 to 7 against loops over Python floats (``reference.py``)."""

import math

import pytest
import reference as naive
import torch
from torch import nn
from torch.testing import assert_close

from unike.backbones.hooks import transform
from unike.backbones.layout import AttentionSite
from unike.knowledge.adapter import knowledge_attention, plain_attention, shift
from unike.knowledge.encoders import (
    Disentangler,
    KnowledgeStates,
    batches,
    fit,
    joint_loss,
    semantic_loss,
    truthfulness_loss,
)
from unike.knowledge.patch import QUERY_BIAS, KeyValuePatch, activation_loss, memory_loss

# The softmax runs in float32 whatever the input's type.
SINGLE = {"rtol": 1e-5, "atol": 1e-6}
DOUBLE = {"rtol": 1e-10, "atol": 1e-12}
ACTIVATIONS = {
    "relu": (nn.ReLU(), naive.relu),
    "silu": (nn.SiLU(), naive.silu),
    "gelu": (nn.GELU(), naive.gelu),
}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomised(module, seed=0):
    """Every parameter drawn anew: zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module


def random_site(width, heads, kv_heads, head_dim, bias=True):
    def draw(rows, columns, seed):
        return randomised(nn.Linear(columns, rows, bias=bias), seed).double().requires_grad_(False)

    q, k = draw(heads * head_dim, width, 1), draw(kv_heads * head_dim, width, 2)
    v, o = draw(kv_heads * head_dim, width, 3), draw(width, heads * head_dim, 4)
    return AttentionSite(nn.Identity(), q, k, v, o, head_dim)


class FeedForward(nn.Module):
    def __init__(self, width, inner, act):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(width, inner), act, nn.Linear(inner, width)

    def forward(self, x):
        return self.last(self.act(self.first(x)))


def patched(network, patch, x):
    with transform([(network.first, network.last, lambda q, out: out + patch(q))]):
        return network(x)


# ---------------------------------------------------------------- Eq. 2


@pytest.mark.parametrize(
    ("width", "heads", "kv_heads", "head_dim", "tokens", "items"),
    [(4, 1, 1, 4, 1, 1), (8, 2, 2, 4, 3, 5), (12, 4, 2, 3, 5, 2), (6, 4, 1, 5, 2, 7)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_knowledge_attention(width, heads, kv_heads, head_dim, tokens, items, bias):
    site = random_site(width, heads, kv_heads, head_dim, bias)
    x, states = randn(2, tokens, width, seed=5), randn(2, items, width, seed=6)
    logit_bias = randn(2, items, seed=7)
    got, got_biased = knowledge_attention(site, x, states), knowledge_attention(site, x, states, logit_bias)
    for b in range(2):
        weights = (site.q, site.k, site.v, site.o, head_dim)
        assert_close(got[b], naive.attention(x[b], states[b], *weights), **SINGLE)
        assert_close(
            got_biased[b], naive.attention(x[b], states[b], *weights, naive.rows(logit_bias[b])), **SINGLE
        )
    assert items == 1 or not torch.allclose(got, got_biased)


def test_mixture_equals_attention_over_the_concatenation():
    """What Eq. 2 rests on: one softmax over ``[x; H_pos]`` is the two attentions, mixed by their mass."""
    site = random_site(6, 1, 1, 6)
    x, states = randn(1, 1, 6, seed=1), randn(1, 4, 6, seed=2)
    own = knowledge_attention(site, x, x)
    mass = [(site.queries(x) @ site.keys(s).transpose(-1, -2)).exp().sum() for s in (x, states)]
    alpha = (mass[1] / (mass[0] + mass[1])).reshape(1)
    both = naive.attention(x[0], torch.cat([x, states], 1)[0], site.q, site.k, site.v, site.o, 6)
    assert_close(shift(own, knowledge_attention(site, x, states), alpha)[0], both, **SINGLE)


def test_minus_infinity_drops_a_state():
    site = random_site(8, 2, 2, 4)
    x, states = randn(1, 3, 8), randn(1, 4, 8, seed=1)
    bias = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    for attend in (plain_attention, lambda *a: knowledge_attention(site, *a)):
        assert_close(attend(x, states, bias), attend(x, states[:, [0, 2]]), **SINGLE)
        assert not torch.allclose(attend(x, states, bias), attend(x, states))


@pytest.mark.parametrize(("width", "tokens", "items"), [(3, 1, 1), (5, 4, 2), (8, 2, 6)])
def test_plain_attention(width, tokens, items):
    x, states, bias = randn(2, tokens, width), randn(2, items, width, seed=1), randn(2, items, seed=2)
    for b in range(2):
        assert_close(plain_attention(x, states)[b], naive.plain(x[b], states[b]), **SINGLE)
        biased = naive.plain(x[b], states[b], naive.rows(bias[b]))
        assert_close(plain_attention(x, states, bias)[b], biased, **SINGLE)


# ---------------------------------------------------------------- Eq. 3 and Eq. 6


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("width", "n", "tokens", "beta"), [(3, 1, 1, 0.5), (6, 4, 3, 0.0), (8, 10, 5, 2.0)])
def test_patched_network_is_the_network_with_more_pairs(act, width, n, tokens, beta):
    """Written as in the paper: one network over the concatenated keys and values."""
    module, loop = ACTIVATIONS[act]
    zeta = randn(5, seed=3)
    network = randomised(FeedForward(width, 7, module)).double()
    patch = randomised(KeyValuePatch(width, n, module, zeta=zeta, beta=beta), seed=2).double()
    patch.zeta.copy_(zeta)
    x = randn(tokens, width, seed=4)
    extra = naive.edited_values(patch.values, beta, zeta, patch.zeta_projection)
    assert_close(patch.edited_values, torch.tensor(extra, dtype=torch.float64), **DOUBLE)
    expected = naive.memory_network(
        x,
        naive.rows(network.first.weight) + naive.rows(patch.keys.T),
        naive.rows(network.first.bias) + naive.rows(patch.bias),
        naive.rows(network.last.weight.T) + extra,
        loop,
        value_bias=naive.rows(network.last.bias),
    )
    assert_close(patched(network, patch, x), expected, **DOUBLE)


@pytest.mark.parametrize("beta", [0.0, 1.5])
def test_gated_patch(beta):
    zeta = randn(4)
    patch = randomised(KeyValuePatch(6, 3, nn.SiLU(), gated=True, zeta=zeta, beta=beta)).double()
    patch.zeta.copy_(zeta)
    assert patch.bias is None
    assert {name for name, _ in patch.named_parameters()} == {"keys", "up", "values", "zeta_projection"}
    x = randn(5, 6, seed=1)
    values = naive.edited_values(patch.values, beta, zeta, patch.zeta_projection)
    keys, up = naive.rows(patch.keys.T), naive.rows(patch.up.T)
    expected = naive.memory_network(x, keys, [0.0] * 3, values, naive.silu, up)
    assert_close(patch(x), expected, **DOUBLE)
    assert_close(patch(x.reshape(1, 5, 6))[0], expected, **DOUBLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("zeta", [None, randn(5)])
def test_fresh_patch_changes_no_bit_and_a_step_does(dtype, gated, zeta):
    network = randomised(FeedForward(8, 6, nn.SiLU())).to(dtype)
    patch = KeyValuePatch(8, 4, nn.SiLU(), gated=gated, zeta=zeta, beta=0.0)
    x = randn(3, 8, dtype=torch.float32).to(dtype)
    base = network(x)
    assert torch.equal(patched(network, patch, x), base)
    optimiser = torch.optim.SGD(patch.parameters(), lr=1.0)
    patched(network, patch, x).float().pow(2).sum().backward()
    optimiser.step()
    changed = patched(network, patch, x)
    assert changed.dtype == dtype
    assert not torch.equal(changed, base)
    assert torch.equal(network(x), base)


def test_zeta_alone_changes_the_output_only_with_beta():
    x = randn(3, 8, dtype=torch.float32)
    for beta, changes in ((0.0, False), (0.3, True)):
        patch = KeyValuePatch(8, 4, nn.SiLU(), zeta=randn(5), beta=beta)
        assert not patch(x).any(), "zeta' starts at zero"
        (patch(x) - 1).pow(2).sum().backward()
        assert (patch.zeta_projection.grad is not None) == changes
        with torch.no_grad():
            patch.zeta_projection.normal_(generator=torch.Generator().manual_seed(0))
        assert bool(patch(x).any()) == changes
    assert KeyValuePatch(8, 4, nn.SiLU(), beta=0.3).beta == 0.0, "no zeta, no beta"


def test_every_part_of_the_patch_learns():
    patch = randomised(KeyValuePatch(8, 4, nn.SiLU(), zeta=randn(5), beta=0.3))
    patch(randn(3, 8)).pow(2).sum().backward()
    assert {n for n, p in patch.named_parameters() if p.grad.any()} == {
        "keys",
        "bias",
        "values",
        "zeta_projection",
    }
    assert not patch.zeta.requires_grad


def test_patch_is_drawn_from_its_generator():
    def draw(seed):
        return KeyValuePatch(
            8, 4, nn.ReLU(), gated=True, generator=torch.Generator().manual_seed(seed)
        ).state_dict()

    before = torch.get_rng_state()
    one, same, other = draw(1), draw(1), draw(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["keys"], other["keys"])


# ---------------------------------------------------------------- T-Patcher's parts


@pytest.mark.parametrize(("width", "n", "tokens"), [(64, 6, 6), (256, 10, 3), (128, 4, 9)])
@pytest.mark.parametrize("gated", [False, True])
def test_keys_started_at_queries_answer_their_own_with_one(width, n, tokens, gated):
    queries = 3 * randn(tokens, width, dtype=torch.float32)
    for noise, off in ((0.0, 1e-5), (0.1, 5 * 0.1 * width**-0.5)):
        patch = KeyValuePatch(width, n, nn.ReLU(), gated=gated, generator=torch.Generator().manual_seed(1))
        patch.start_at_queries(queries, noise)
        for key in range(n):
            own = naive.dot(naive.rows(queries[key % tokens]), naive.rows(patch.keys[:, key]))
            assert own == pytest.approx(1, abs=off)
        if not gated:
            assert_close(patch.bias.detach(), torch.full((n,), QUERY_BIAS))
            own = patch.pairs.scores(queries)[0, 0].item()
            assert own == pytest.approx(1 + QUERY_BIAS, abs=off)
        if n > tokens:
            assert torch.equal(patch.keys[:, 0], patch.keys[:, tokens]) == (noise == 0.0)


def test_zero_query_gives_finite_keys():
    patch = KeyValuePatch(8, 3, nn.ReLU(), generator=torch.Generator().manual_seed(1))
    patch.start_at_queries(torch.zeros(2, 8))
    assert patch.keys.isfinite().all()


@pytest.mark.parametrize(("tokens", "n", "top"), [(1, 1, 5), (4, 8, 3), (3, 5, 5)])
def test_activation_and_memory_loss(tokens, n, top):
    margin, scores = 0.7, randn(2, tokens + 2, n)
    at = torch.zeros(2, tokens + 2, dtype=torch.bool)
    at[0, :tokens], at[1, 1 : tokens + 1] = True, True
    for edit in range(2):
        fire = silent = 0.0
        for place, row in enumerate(naive.rows(scores[edit])):
            best = sorted(row, reverse=True)[:top]
            fire += sum(math.exp(-s) for s in best) / len(best) / tokens * bool(at[edit, place])
            silent += sum(math.exp(s + margin) for s in best) / len(best) / (tokens + 2)
        assert activation_loss(scores, at, top)[edit].item() == pytest.approx(fire)
        assert memory_loss(scores, margin, top)[edit].item() == pytest.approx(silent)
    assert (activation_loss(scores + 1, at, top) < activation_loss(scores, at, top)).all()
    assert (memory_loss(scores + 1, margin, top) > memory_loss(scores, margin, top)).all()


# ---------------------------------------------------------------- Eq. 4 and Eq. 5


@pytest.mark.parametrize(("n", "width"), [(2, 3), (5, 4), (7, 2)])
@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("include_anchor", [False, True])
def test_truthfulness_loss(n, width, tau, include_anchor):
    pos, neg = randn(n, width), randn(n, width, seed=1)
    got = truthfulness_loss(pos, neg, tau, include_anchor)
    assert got.item() == pytest.approx(naive.truthfulness(pos, neg, tau, include_anchor), rel=1e-9)
    assert not torch.allclose(got, truthfulness_loss(pos, neg, tau, not include_anchor))


def test_one_pair_has_a_loss_only_with_its_anchor():
    pos, neg = randn(1, 3), randn(1, 3, seed=1)
    assert truthfulness_loss(pos, neg, 0.5, True).item() == pytest.approx(
        naive.truthfulness(pos, neg, 0.5, True)
    )


@pytest.mark.parametrize("include_anchor", [False, True])
def test_truthfulness_loss_learns(include_anchor):
    pos, neg = randn(6, 4).requires_grad_(), randn(6, 4, seed=1).requires_grad_()
    loss = truthfulness_loss(pos, neg, 0.1, include_anchor)
    grads = torch.autograd.grad(loss, [pos, neg])
    assert all(g.isfinite().all() for g in grads)
    stepped = truthfulness_loss(pos - 0.01 * grads[0], neg - 0.01 * grads[1], 0.1, include_anchor)
    assert stepped < loss


@pytest.mark.parametrize(("n", "width"), [(1, 3), (2, 2), (6, 5)])
@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
def test_semantic_loss(n, width, tau):
    sem, pos, neg = (randn(n, width, seed=s) for s in range(3))
    assert semantic_loss(sem, pos, neg, tau).item() == pytest.approx(
        naive.semantics(sem, pos, neg, tau), abs=1e-9
    )
    if n > 1:
        wrong_order = semantic_loss(sem, pos.roll(1, 0), neg, tau)
        assert not torch.allclose(wrong_order, semantic_loss(sem, pos, neg, tau))


# ---------------------------------------------------------------- the encoders, trained


def separable(n=300, width=8):
    """Answers are the question's state moved along one direction: right one way, wrong the other."""
    sem, truth = randn(n, width, dtype=torch.float32), randn(width, seed=9, dtype=torch.float32)
    turned = sem @ torch.linalg.qr(randn(width, width, seed=8, dtype=torch.float32)).Q
    return KnowledgeStates(sem, turned + truth, turned - truth)


def trained(**options):
    return fit(separable(), **{"steps": 150, "batch": 64, **options})


def test_joint_loss_is_the_sum():
    encoders, states = Disentangler(8), separable(6)
    pos, neg = states.pos, states.neg
    with torch.no_grad():
        truth = truthfulness_loss(encoders.truthful(pos), encoders.truthful(neg), 0.2, True)
        meaning = semantic_loss(states.sem, encoders.semantic(pos), encoders.semantic(neg), 0.2)
        assert_close(joint_loss(encoders, states, 0.2, True), truth + meaning)


def test_fit_improves_both_losses_on_held_out_states():
    _, before = trained(steps=0)
    encoders, after = trained()
    assert after.held_semantic < 0.5 * before.held_semantic
    assert after.held_truthful < 0.5 * before.held_truthful
    assert len(after.losses) == 150
    assert after.losses[-1] < 0.5 * after.losses[0]
    assert before.top1 < 0.5 <= after.top1
    assert after.truth_accuracy == 1.0
    assert not any(p.requires_grad for p in encoders.parameters())
    states, swap = separable(), (randn(300, seed=4) > 0)[:, None]
    pos, neg = torch.where(swap, states.neg, states.pos), torch.where(swap, states.pos, states.neg)
    _, chance = fit(KnowledgeStates(states.sem, pos, neg), steps=20, batch=64)
    assert chance.truth_accuracy < 0.8, "labels without truth teach nothing"


def test_fit_never_sees_the_held_out_states():
    states = separable()
    changed = KnowledgeStates(*(t.clone() for t in (states.sem, states.pos, states.neg)))
    changed.pos[255:] = 7.0
    one, same = fit(states, steps=5, held=0.15)[0], fit(changed, steps=5, held=0.15)[0]
    changed.pos[:255] = 7.0
    other = fit(changed, steps=5, held=0.15)[0]
    assert torch.equal(one.semantic[0].weight, same.semantic[0].weight)
    assert not torch.equal(one.semantic[0].weight, other.semantic[0].weight)


def test_fit_depends_on_its_seed_alone():
    ticks = []
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, report = trained(steps=10, tick=lambda: ticks.append(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    same, again = trained(steps=10)
    other, _ = trained(steps=10, seed=5)
    assert report == again
    assert len(ticks) == 10
    pairs = zip(one.state_dict().values(), same.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.semantic[0].weight, other.semantic[0].weight)


def test_batches_draw_without_replacement():
    drawn = list(batches(10, 3, 6, torch.Generator().manual_seed(0)))
    assert [len(b) for b in drawn] == [3] * 6
    for first in (0, 3):
        assert len(set(torch.cat(drawn[first : first + 3]).tolist())) == 9
    assert [b.tolist() for b in drawn[:3]] != [b.tolist() for b in drawn[3:]]


def test_zeta_kinds():
    encoders, states = Disentangler(8, hidden=12, truth_width=5), separable(9)
    assert encoders.zeta(states, "none") is None
    for kind, encoder, width in (("truthfulness", encoders.truthful, 5), ("semantic", encoders.semantic, 8)):
        zeta = encoders.zeta(states, kind)
        assert zeta.shape == (width,)
        assert not zeta.requires_grad
        assert_close(
            zeta.double(), naive.zeta(encoder(states.pos), encoder(states.neg)), rtol=1e-4, atol=1e-6
        )
    state = torch.get_rng_state()
    truth, drawn = encoders.zeta(states, "truthfulness"), encoders.zeta(states, "random")
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(drawn.norm(), truth.norm())
    assert torch.equal(drawn, encoders.zeta(states, "random"))
    assert not torch.allclose(drawn, encoders.zeta(states, "random", seed=1))
    assert not torch.allclose(drawn, truth)


def test_unknown_zeta_kind_is_refused():
    with pytest.raises(ValueError, match="truthfullness"):
        Disentangler(8).zeta(separable(4), "truthfullness")
