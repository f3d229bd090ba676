"""A scope classifier at full width: bounded parameters, pooled prompts, states on disk, early stopping,
batched preparation. Each against a slow reference, and beside what would differ."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_scope import encoder, learnable, randn
from torch import nn

from unike.config.hparams import HyperParams
from unike.knowledge.scope import (
    DECAY,
    HELD_OUT,
    WARM_UP,
    EarlyStop,
    ScopeEncoder,
    ScopeSamples,
    fit_scope,
    measure_loss,
    pool_tokens,
    scope_loss,
)
from unike.knowledge.scope_states import ScopeStates, StateRows, pool_prompt
from unike.methods.preparation.folders import choose_inner_width, describe_scope
from unike.methods.preparation.scope import (
    make_scope_encoder,
)

ROOT = Path(__file__).parents[1]
FULL = sorted(p for p in (ROOT / "hparams/scoped").glob("*.yaml") if not p.name.startswith("tiny_"))
TINY = sorted((ROOT / "hugging_cache").glob("tiny-*/scope/*"))
WIDTHS = (768, 2560, 4096, 5120)
WIDTH = 8


# ---------------------------------------------------------------- pooling


def naive_pool(rows: list[list[float]], most: int) -> list[list[float]]:
    """Each prompt's states after pooling, by loops."""
    n, kept = len(rows), most // 2
    if n <= most:
        return rows
    groups: list[list[list[float]]] = [[] for _ in range(most)]
    for i, row in enumerate(rows):
        late = i - (n - kept)
        groups[most - kept + late if late >= 0 else i * (most - kept) // (n - kept)].append(row)
    return [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=3),
    left=st.integers(0, 2),
    most=st.integers(2, 7),
)
def test_pooling_against_a_loop(lengths: list[int], left: int, most: int) -> None:
    t = left + max(lengths)
    states, mask = torch.full((len(lengths), t, 3), 7.0), torch.zeros(len(lengths), t, dtype=torch.bool)
    own = [randn(n, 3, seed=n + i) for i, n in enumerate(lengths)]
    for i, rows in enumerate(own):
        states[i, left : left + len(rows)], mask[i, left : left + len(rows)] = rows, True
    pooled, there = pool_tokens(states, mask, most)
    assert pooled.shape[1] == min(t, most)
    for i, rows in enumerate(own):
        expected = torch.tensor(naive_pool(rows.tolist(), most))
        torch.testing.assert_close(pooled[i][there[i]], expected, atol=1e-5, rtol=0)
    again, still = pool_tokens(pooled, there, most)
    assert torch.equal(again, pooled)
    assert torch.equal(still, there)


def test_a_prompt_pooled_beforehand_lies_where_it_lies_at_run_time() -> None:
    net = ScopeEncoder(WIDTH, 16, 6, 2, inner=4, tokens=6).eval()
    prompts = [randn(n, WIDTH, seed=n) for n in (3, 6, 11, 40)]

    def place(states: torch.Tensor) -> torch.Tensor:
        return net(states[None], torch.ones(1, len(states), dtype=torch.bool))

    for states in prompts:
        assert torch.equal(place(pool_prompt(states, 6)), place(states))
    assert torch.equal(pool_prompt(prompts[0], 6), prompts[0])
    assert pool_prompt(prompts[3], None) is prompts[3]
    # Pooled to another number of states it lies elsewhere, and so does a prompt with other early tokens.
    assert not torch.allclose(place(pool_prompt(prompts[3], 4)), place(prompts[3]), atol=1e-4)
    moved = prompts[3].clone()
    moved[0] += 3 * randn(WIDTH, seed=9)
    assert not torch.allclose(place(moved), place(prompts[3]), atol=1e-4)


# ---------------------------------------------------------------- the encoder's two forms


def naive_forward(net: ScopeEncoder, states: torch.Tensor) -> torch.Tensor:
    """One prompt ``(t, d)`` without padding, head by head and token by token, in double precision."""
    weights = {name: value.double() for name, value in net.state_dict().items()}
    x = states.double()
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = x * weights["norm.weight"] + weights["norm.bias"]
    if "squeeze.weight" in weights:
        x = x @ weights["squeeze.weight"].T
    q, k, v = (x @ weights[f"{n}.weight"].T + weights[f"{n}.bias"] for n in ("query", "key", "value"))
    size, seen = x.shape[1] // net.heads, []
    for head in range(net.heads):
        part = slice(head * size, (head + 1) * size)
        scores = [float(q[-1, part] @ k[i, part]) / math.sqrt(size) for i in range(len(x))]
        shares = [math.exp(s) / sum(math.exp(o) for o in scores) for s in scores]
        seen.append(sum(share * v[i, part] for i, share in enumerate(shares)))
    h = torch.cat([x[-1], *seen]) @ weights["out.0.weight"].T + weights["out.0.bias"]
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    out = h @ weights["out.3.weight"].T + weights["out.3.bias"]
    return out / out.norm()


@pytest.mark.parametrize("inner", [None, 4])
def test_both_forms_against_a_loop(inner: int | None) -> None:
    torch.manual_seed(0)
    net = ScopeEncoder(WIDTH, 16, 6, 2, inner=inner).eval()
    states = randn(2, 5, WIDTH)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found = net(states, mask)
    for row, n in zip(range(2), (5, 3), strict=True):
        torch.testing.assert_close(
            found[row].double(), naive_forward(net, states[row, :n]), atol=1e-6, rtol=0
        )


class FormerEncoder(nn.Module):
    """The classifier as it was before there were two forms of it."""

    def __init__(self, width: int, hidden: int, out: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Sequential(
            nn.Linear(2 * width, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, out)
        )

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        b, t, width = states.shape
        states = self.norm(states.float())
        last = t - 1 - mask.long().flip(1).argmax(1)
        end = states[torch.arange(b), last]
        shape = (b, -1, self.heads, width // self.heads)
        q, k, v = (
            f(x).view(shape).transpose(1, 2)
            for f, x in ((self.query, end), (self.key, states), (self.value, states))
        )
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return F.normalize(self.out(torch.cat([end, seen.transpose(1, 2).reshape(b, width)], -1)), dim=-1)


@pytest.mark.parametrize("folder", TINY, ids=lambda p: p.parts[-3])
def test_shipped_classifiers_are_read_as_they_were(folder: Path) -> None:
    width = json.loads((folder.parents[1] / "config.json").read_text())["text_config"]["hidden_size"]
    options = HyperParams.from_dict({"model_name": "blip2", "name": "unused"})
    now, former = make_scope_encoder(width, options).eval(), FormerEncoder(width, 2 * width, 128, 4).eval()
    weights = load_file(folder / "scope.safetensors")
    now.load_state_dict(weights)
    former.load_state_dict(weights)
    states = randn(3, 20, width)
    mask = torch.arange(20) < torch.tensor([20, 11, 4])[:, None]
    assert torch.equal(now(states, mask), former(states, mask))
    assert now.squeeze is None
    pooled = ScopeEncoder(width, 2 * width, 128, 4, tokens=10).eval()
    pooled.load_state_dict(weights)
    assert not torch.allclose(pooled(states, mask), former(states, mask), atol=1e-4)


def count_parameters(width: int, options: HyperParams) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make_scope_encoder(width, options).parameters())


@pytest.mark.parametrize("path", FULL, ids=lambda p: p.stem)
def test_a_shipped_yaml_takes_at_most_8_million_parameters_at_any_width(path: Path) -> None:
    options = HyperParams.from_hparams(path)
    for width in WIDTHS:
        inner = 512
        own = 2 * width + width * inner + 3 * (inner + 1) * inner
        own += (2 * inner + 1) * 2 * inner + (2 * inner + 1) * 128
        assert count_parameters(width, options) == own <= 8_000_000


def test_without_options_wide_decoders_are_projected_and_narrow_ones_are_not() -> None:
    plain = HyperParams.from_dict({"model_name": "blip2", "name": "unused"})
    for width in WIDTHS:
        assert choose_inner_width(plain, width) == 512
        assert count_parameters(width, plain) <= 8_000_000
    assert choose_inner_width(plain, 192) is None
    whole = HyperParams.from_dict({"model_name": "blip2", "name": "unused", "scope_width": 4096})
    assert choose_inner_width(whole, 4096) is None
    # What it was before.
    assert count_parameters(4096, whole) > 118_000_000


def test_what_a_classifier_belongs_to_has_new_options_only_where_they_are_set() -> None:
    base = {"model_name": "blip2", "name": "unused"}
    plain = describe_scope(HyperParams.from_dict(base))
    assert set(plain["options"]) == {  # type: ignore[call-overload]
        "scope_hidden", "scope_dim", "scope_heads", "scope_records", "scope_steps", "scope_batch",
        "scope_lr", "scope_tau", "seed",
    }  # fmt: skip
    assert describe_scope(HyperParams.from_dict(base | {"scope_val_every": 7})) == plain
    changes = [{"scope_width": 4}, {"scope_tokens": 4}, {"scope_patience": 3}]
    changes.append({"scope_patience": 3, "scope_val_every": 7})
    described = [describe_scope(HyperParams.from_dict(base | change)) for change in changes]
    assert all(described[i] != other for i in range(4) for other in [plain, *described[:i]])
    # Where they are kept meanwhile, and in what batches they are read, is not part of it.
    for free in ({"scope_memory_gb": 0.1}, {"scope_disk_gb": 1.0}, {"prepare_batch": 1}):
        assert describe_scope(HyperParams.from_dict(base | free)) == plain


# ---------------------------------------------------------------- states in memory and on disk


def ragged(count: int, queries: int = 4) -> list[torch.Tensor]:
    lengths = torch.randint(1, 7, (count * queries,), generator=torch.Generator().manual_seed(3))
    return [randn(int(n), WIDTH, seed=i).half() for i, n in enumerate(lengths)]


def keep(rows: list[torch.Tensor], *place: object) -> StateRows:
    kept = StateRows(*place)  # type: ignore[arg-type]
    for row in rows:
        kept.append(row)
    return kept


def test_rows_come_back_from_memory_and_disk(tmp_path: Path) -> None:
    rows = ragged(6)
    size = sum(row.nbytes for row in rows)
    memory = keep(rows)
    half = keep(rows, tmp_path / "new", size // 2, size)
    disk = keep(rows, tmp_path, 0, size)
    assert (memory.memory_bytes, memory.disk_bytes) == (size, 0)
    assert (disk.memory_bytes, disk.disk_bytes) == (0, size)
    assert 0 < half.memory_bytes <= size // 2 <= half.disk_bytes < size
    for kept in (memory, half, disk):
        for number in (5, 0, 23, 5):
            assert torch.equal(kept.read([number])[0], rows[number])
    assert not [p for p in tmp_path.rglob("*") if p.is_file()], "the file has no name"
    with pytest.raises(OverflowError, match="GB of memory"):
        keep(rows, tmp_path, 0, size - 1)
    half.require_room(24)
    with pytest.raises(OverflowError, match="they take"):
        half.require_room(48)


def test_a_batch_is_loaded_as_it_was_padded(tmp_path: Path) -> None:
    rows = ragged(6)
    wrong = torch.arange(6) % 2 == 0
    states = ScopeStates(keep(rows, tmp_path, 100, 10**6), 4, 2, wrong)
    whole = states.load_all()
    assert whole.states.shape[:2] == (6, 4)
    chosen = torch.tensor([4, 0, 3])
    some, narrow = states.load(chosen), states.select(chosen)
    for place, edit in enumerate(chosen.tolist()):
        for j in range(4):
            assert torch.equal(some.states[place, j][some.mask[place, j]], rows[4 * edit + j])
    longest = max(len(rows[4 * i + j]) for i in chosen.tolist() for j in range(4))
    assert some.states.shape[2] == longest
    assert (len(narrow), narrow.wrong.tolist()) == (3, [True, True, False])  # type: ignore[union-attr]
    assert torch.equal(narrow.load(torch.tensor([1])).states, states.load(torch.tensor([0])).states)
    assert torch.equal(narrow.select(torch.tensor([2])).load_all().states, states.load(chosen[2:]).states)


def test_training_from_disk_is_training_from_one_tensor(tmp_path: Path) -> None:
    rows = ragged(24)
    padded = ScopeStates(keep(rows), 4, 2).load_all()
    moved = [rows[0] + 1, *rows[1:]]
    kept = [ScopeStates(keep(r, tmp_path, 0, 10**6), 4, 2) for r in (rows, moved)]
    nets = [encoder(3, 0.1) for _ in range(3)]
    for net, samples in zip(nets, (padded, *kept), strict=True):
        fit_scope(samples, net, 4, 8, 1e-3, 0.1, seed=1)
    one, two, other = (torch.cat([p.flatten() for p in net.parameters()]) for net in nets)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


# ---------------------------------------------------------------- early stopping


def former_fit(samples: ScopeSamples, net: ScopeEncoder, steps: int, lr: float, seed: int) -> list[float]:
    """Training as it was before there was early stopping."""
    numbers = torch.arange(len(samples))
    train = numbers[numbers % HELD_OUT != HELD_OUT - 1]
    optimiser = torch.optim.AdamW(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, max(2, steps))
    losses = []
    net.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(steps):
            loss = scope_loss(samples[train[torch.randperm(len(train))[:16]]].encode(net), 2, 0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
    return losses


def test_without_patience_training_is_what_it_was() -> None:
    nets = [encoder(3, 0.1) for _ in range(3)]
    expected = former_fit(learnable(), nets[0], 8, 5e-3, 1)
    report = fit_scope(learnable(), nets[1], 8, 16, 5e-3, 0.1, 1)
    assert report.losses == expected
    stopped = fit_scope(learnable(), nets[2], 8, 16, 5e-3, 0.1, 1, stop=EarlyStop(3, 5))
    weights = [torch.cat([p.flatten() for p in net.parameters()]) for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert (report.stopped, report.best_step, report.visits, report.held_losses) == ("cap", 8, 128, {})
    assert list(stopped.held_losses) == [3, 6, 8]


def naive_stop(losses: list[float], patience: int) -> tuple[int, int, list[int]]:
    """After how many validations training ends, which was the best, and how often the rate had fallen after
    each."""
    best, drops, count, falls = 0, 0, 0, []
    for i, loss in enumerate(losses):
        count = i + 1
        if i == 0 or loss < losses[best]:
            best = i
        if i - best == max(1, patience // 2):
            drops += 1
        falls.append(drops)
        if i - best >= patience:
            break
    return count, best, falls


@settings(max_examples=60, deadline=None)
@given(losses=st.lists(st.integers(0, 9), min_size=1, max_size=20), patience=st.integers(1, 6))
def test_when_to_stop_against_a_loop(losses: list[int], patience: int) -> None:
    stop, seen, falls = EarlyStop(10, patience), 0, []
    for seen, loss in enumerate(losses, 1):
        stop.observe(10 * seen, float(loss))
        falls.append(stop.drops)
        assert stop.scale_rate(WARM_UP) == pytest.approx(DECAY**stop.drops)
        if stop.is_over:
            break
    count, best, expected = naive_stop([float(loss) for loss in losses], patience)
    assert (seen, stop.best_step, falls) == (count, 10 * (best + 1), expected)


def test_the_rate_rises_first() -> None:
    stop = EarlyStop(10, 4)
    rates = [stop.scale_rate(step) for step in (0, WARM_UP // 2 - 1, WARM_UP - 1, 10 * WARM_UP)]
    assert rates == pytest.approx([1 / WARM_UP, 0.5, 1, 1])


def test_training_stops_and_keeps_the_best_weights() -> None:
    samples, net = learnable(), encoder(3, 0.1)
    # A rate that is far too high: the held-out loss soon rises.
    report = fit_scope(samples, net, 400, 64, 0.5, 0.1, 1, stop=EarlyStop(5, 3))
    assert report.stopped == "patience"
    assert len(report.losses) < 400
    assert report.best_step == len(report.losses) - 15
    assert report.visits == 64 * len(report.losses)
    held = samples[torch.arange(200) % HELD_OUT == HELD_OUT - 1]
    kept = measure_loss(held, net, 0.1)
    assert kept == pytest.approx(min(report.held_losses.values()), abs=1e-6)
    assert kept == report.held_losses[report.best_step] < list(report.held_losses.values())[-1]
    capped = fit_scope(samples, encoder(3, 0.1), 7, 64, 1e-3, 0.1, 1, stop=EarlyStop(5, 3))
    assert (capped.stopped, len(capped.losses), list(capped.held_losses)) == ("cap", 7, [5, 7])


def test_the_held_out_loss_is_that_of_one_batch() -> None:
    samples, net = learnable(40), encoder()
    with torch.no_grad():
        expected = scope_loss(samples.encode(net), 2, 0.1).item()
    assert measure_loss(samples, net, 0.1) == pytest.approx(expected, rel=1e-5)
