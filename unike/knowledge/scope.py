"""Scope: how near a prompt is to an edit, learnt, and which edits are near enough to speak.

An edit and a prompt are compared by what enters the first edited layer, the whole prompt with its
picture. The state at the prompt's last token alone is more question than picture. Shapes: ``b``
prompts, ``t`` tokens, ``d`` decoder width, ``e`` edits, ``r`` width of the learnt space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

HELD_OUT = 10
# Sizes of memory for which a threshold is chosen, where there are edits enough.
POOLS = (1, 10, 100)
_THRESHOLDS = torch.linspace(-1, 1, 401)


class ScopeEncoder(nn.Module):
    """A prompt's states as a unit vector: its last token's, and what that one attends to in all of them."""

    def __init__(self, width: int, hidden: int, out: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads {heads}: expected a divisor of the width {width}")
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Sequential(
            nn.Linear(2 * width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, out)
        )

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``(b, t, d)``, and ``mask (b, t)`` true where the prompt stands, to ``(b, r)``."""
        b, t, width = states.shape
        states = self.norm(states.float())
        last = t - 1 - mask.long().flip(1).argmax(1)
        end = states[torch.arange(b, device=states.device), last]
        shape = (b, -1, self.heads, width // self.heads)
        q, k, v = (
            f(x).view(shape).transpose(1, 2)
            for f, x in ((self.query, end), (self.key, states), (self.value, states))
        )
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return F.normalize(self.out(torch.cat([end, seen.transpose(1, 2).reshape(b, width)], -1)), dim=-1)


@dataclass(frozen=True)
class ScopeMeasure:
    """A trained encoder, and by the number of edits in memory the similarity from which on a prompt is
    in an edit's scope: among many edits a stray prompt finds a similar one more easily."""

    encoder: ScopeEncoder
    thresholds: Mapping[int, float]

    def threshold(self, edits: int) -> float:
        """Between the sizes that were measured by the logarithm of ``edits``, beyond them the last one."""
        sizes = sorted(self.thresholds)
        below = max((size for size in sizes if size <= edits), default=sizes[0])
        above = min((size for size in sizes if size >= edits), default=sizes[-1])
        low, high = self.thresholds[below], self.thresholds[above]
        if below >= above:
            return low if edits >= below else high
        return low + (high - low) * math.log(edits / below) / math.log(above / below)


@dataclass(frozen=True)
class ScopeSamples:
    """What training compares: ``n`` edits, each asked in ``v`` ways.

    ``states (n, v, t, d)``, ``mask (n, v, t)``. Of the ``v`` queries the first is the edit itself,
    the first ``inside`` are in its scope, the others are not. ``wrong (n)``: whether the base model
    answers the edit wrong; None where that is not known.
    """

    states: torch.Tensor
    mask: torch.Tensor
    inside: int
    wrong: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: torch.Tensor) -> ScopeSamples:
        wrong = None if self.wrong is None else self.wrong[index]
        return ScopeSamples(self.states[index], self.mask[index], self.inside, wrong)

    def encoded(self, encoder: ScopeEncoder) -> torch.Tensor:
        """``(n, v, r)``."""
        n, v = self.mask.shape[:2]
        used = int(self.mask.any((0, 1)).nonzero().max()) + 1
        flat = encoder(self.states[:, :, :used].flatten(0, 1), self.mask[:, :, :used].flatten(0, 1))
        return flat.view(n, v, -1)


@dataclass
class ScopeReport:
    """How well the measure was learnt: by the size of memory the threshold, and the shares of held-out
    edits' queries that go right, by query: in scope its own edit is the nearest, and open; out of it
    none is open. Also the contrastive loss along the way."""

    thresholds: dict[int, float]
    shares: dict[int, list[float]]
    losses: list[float] = field(default_factory=list)


def scope_loss(encoded: torch.Tensor, inside: int, tau: float) -> torch.Tensor:
    """``encoded (n, v, r)``: every query in an edit's scope is drawn to that edit's key, against all
    queries that are not in it (the other edits' ones among them), and to it rather than to another
    edit's key."""
    n, v = encoded.shape[:2]
    keys = encoded[:, 0]
    logits = (encoded.flatten(0, 1) @ keys.T).view(n, v, n) / tau
    own = torch.eye(n, dtype=torch.bool, device=encoded.device)
    near = own[:, None] & (torch.arange(v, device=encoded.device) < inside)[None, :, None]
    far = logits.masked_fill(near, -torch.inf).flatten(0, 1).logsumexp(0)
    right = torch.arange(n, device=encoded.device)
    loss = encoded.new_zeros(())
    for j in range(1, inside):
        hit = logits[right, j, right]
        loss = loss + (torch.logaddexp(far, hit) - hit).mean() + F.cross_entropy(logits[:, j], right)
    return loss / max(1, inside - 1)


def scope_shares(similarity: torch.Tensor, inside: int, threshold: float) -> torch.Tensor:
    """``similarity (n, v, n)`` of every query with every edit: the share that goes right, ``(v)``."""
    best, nearest = similarity.max(-1)
    own = nearest == torch.arange(len(similarity), device=similarity.device)[:, None]
    open_ = best >= threshold
    right = torch.cat([(open_ & own)[:, :inside], ~open_[:, inside:]], 1)
    return right.float().mean(0)


def best_threshold(similarity: torch.Tensor, inside: int) -> float:
    """The threshold with the highest harmonic mean of ``scope_shares``, amid all that reach it."""
    means = torch.stack(
        [1 / (1 / scope_shares(similarity, inside, float(t)).clamp(min=1e-6)).mean() for t in _THRESHOLDS]
    )
    good = _THRESHOLDS[means >= means.max() - 1e-9]
    return float(good[len(good) // 2])


def fit_scope(
    samples: ScopeSamples,
    encoder: ScopeEncoder,
    steps: int,
    batch: int,
    lr: float,
    tau: float,
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> ScopeReport:
    """Trains the encoder in place, and chooses the thresholds on every tenth edit, held out.

    ValueError for fewer than ``2 * HELD_OUT`` edits.
    """
    if len(samples) < 2 * HELD_OUT:
        raise ValueError(f"{len(samples)} edits; expected {2 * HELD_OUT} or more")
    numbers = torch.arange(len(samples))
    held, train = numbers[numbers % HELD_OUT == HELD_OUT - 1], numbers[numbers % HELD_OUT != HELD_OUT - 1]
    device = next(encoder.parameters()).device
    optimiser = torch.optim.AdamW(encoder.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, max(2, steps))
    losses = []
    encoder.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(steps):
            chosen = train[torch.randperm(len(train))[:batch]]
            part = samples[chosen]
            some = ScopeSamples(part.states.to(device), part.mask.to(device), part.inside)
            loss = scope_loss(some.encoded(encoder), some.inside, tau)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            tick()
    encoder.eval().requires_grad_(False)
    thresholds, shares = calibrated(samples[held], encoder, seed)
    return ScopeReport(thresholds, shares, losses)


def calibrated(
    samples: ScopeSamples, encoder: ScopeEncoder, seed: int
) -> tuple[dict[int, float], dict[int, list[float]]]:
    """Thresholds, and the shares that go right with them, by the size of memory.

    Edits that the base model answers right are left out where enough others are there: nobody makes
    them, and they are easier to tell apart. The largest memory holds all edits.
    """
    if samples.wrong is not None and int(samples.wrong.sum()) >= 2 * HELD_OUT:
        samples = samples[samples.wrong.nonzero().flatten()]
    similarity = similarities(samples, encoder)
    generator = torch.Generator().manual_seed(seed)
    sizes = [size for size in POOLS if size < len(samples)] + [len(samples)]
    thresholds, shares, least = {}, {}, -1.0
    for size in sizes:
        # Every query meets its own edit and size - 1 others, drawn for each edit alike.
        rank = torch.rand(len(samples), len(samples), generator=generator).fill_diagonal_(-1)
        absent = rank > rank.sort(1).values[:, size - 1 : size]
        met = similarity.cpu().masked_fill(absent[:, None], -torch.inf)
        least = max(least, best_threshold(met, samples.inside))
        thresholds[size] = least
        shares[size] = scope_shares(met, samples.inside, least).tolist()
    return thresholds, shares


@torch.no_grad()
def similarities(samples: ScopeSamples, encoder: ScopeEncoder, batch: int = 32) -> torch.Tensor:
    """Of every query with every edit of the samples, ``(n, v, n)``."""
    device = next(encoder.parameters()).device
    parts = []
    for start in range(0, len(samples), batch):
        part = samples[torch.arange(start, min(start + batch, len(samples)))]
        parts.append(ScopeSamples(part.states.to(device), part.mask.to(device), 0).encoded(encoder))
    encoded = torch.cat(parts)
    return torch.einsum("nvr,kr->nvk", encoded, encoded[:, 0])


def open_edits(similarity: torch.Tensor, threshold: float, nearest: bool) -> torch.Tensor:
    """Which edits speak for which prompts, ``(b, e)``: those similar enough, or with ``nearest`` only
    the most similar of them. Of equally similar ones the newest is nearest: it corrects the others."""
    open_ = similarity >= threshold
    if nearest:
        last = similarity.shape[1] - 1 - similarity.flip(1).argmax(1)
        open_ = open_ & F.one_hot(last, similarity.shape[1]).bool()
    return open_
