"""The scope classifier: a learned similarity of prompts and edits decides which edits apply to a prompt.

Edit and prompt are compared by the states that enter the first edited layer, of the whole prompt with its
image: the state at the last token alone tells more of the question than of the image. Shapes: ``b`` prompts,
``t`` tokens, ``d`` decoder width, ``e`` edits, ``r`` width of the learned space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

HELD_OUT = 10
# Numbers of edits in memory for which a threshold is chosen, as far as there are enough edits.
POOLS = (1, 10, 100)
_THRESHOLDS = torch.linspace(-1, 1, 401)


class ScopeEncoder(nn.Module):
    """A prompt's states as a unit vector: its last token's, and that token's attention over all of them.

    ValueError where ``heads`` does not divide the width.
    """

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
        """``(b, t, d)`` to ``(b, r)``; ``mask (b, t)`` is true on the prompt's tokens."""
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
class TrainedScope:
    """A trained scope classifier: its encoder, and by the number of edits in memory the similarity from which
    on a prompt is in an edit's scope. Among more edits an unrelated prompt more easily finds one."""

    encoder: ScopeEncoder
    thresholds: Mapping[int, float]

    def find_threshold(self, edits: int) -> float:
        """The threshold for ``edits`` edits: interpolated by the logarithm between the sizes that were
        measured, the last one's beyond them."""
        sizes = sorted(self.thresholds)
        below = max((size for size in sizes if size <= edits), default=sizes[0])
        above = min((size for size in sizes if size >= edits), default=sizes[-1])
        low, high = self.thresholds[below], self.thresholds[above]
        if below >= above:
            return low if edits >= below else high
        return low + (high - low) * math.log(edits / below) / math.log(above / below)


@dataclass(frozen=True)
class ScopeSamples:
    """What training compares: ``n`` edits with ``v`` queries each.

    ``states (n, v, t, d)``, ``mask (n, v, t)``. Of the ``v`` queries the first is the edit itself; the first
    ``inside`` are in its scope, the others are not. ``wrong (n)``: whether the base model answers the edit
    wrong; None where that is not known.
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

    def encode(self, encoder: ScopeEncoder) -> torch.Tensor:
        """All queries in the learned space, ``(n, v, r)``."""
        n, v = self.mask.shape[:2]
        used = int(self.mask.any((0, 1)).nonzero().max()) + 1
        flat = encoder(self.states[:, :, :used].flatten(0, 1), self.mask[:, :, :used].flatten(0, 1))
        return flat.view(n, v, -1)


@dataclass
class ScopeReport:
    """How well the classifier was trained: by the number of edits in memory the threshold, and for each of
    the ``v`` queries the share of held-out edits for which it is classified right. A query in scope is right
    if its own edit is the nearest, and applies; one out of scope if no edit applies. ``losses`` by step."""

    thresholds: dict[int, float]
    shares: dict[int, list[float]]
    losses: list[float] = field(default_factory=list)


def scope_loss(encoded: torch.Tensor, inside: int, tau: float) -> torch.Tensor:
    """Contrastive loss of ``encoded (n, v, r)``: a query in an edit's scope is pulled to that edit's key more
    than any query out of that scope (other edits' queries included), and more than to another edit's key."""
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


def score_scope(similarity: torch.Tensor, inside: int, threshold: float) -> torch.Tensor:
    """``similarity (n, v, n)`` of every query with every edit: the share that is classified right,
    ``(v)``."""
    best, nearest = similarity.max(-1)
    own = nearest == torch.arange(len(similarity), device=similarity.device)[:, None]
    open_ = best >= threshold
    right = torch.cat([(open_ & own)[:, :inside], ~open_[:, inside:]], 1)
    return right.float().mean(0)


def choose_threshold(similarity: torch.Tensor, inside: int) -> float:
    """The threshold with the highest harmonic mean of ``score_scope``; the middle one of the best."""
    means = torch.stack(
        [1 / (1 / score_scope(similarity, inside, float(t)).clamp(min=1e-6)).mean() for t in _THRESHOLDS]
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
    """Trains the encoder in place, and chooses the thresholds on every tenth edit, which is held out.

    ``tick`` is called after each step. ValueError for fewer than ``2 * HELD_OUT`` edits.
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
            loss = scope_loss(some.encode(encoder), some.inside, tau)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            tick()
    encoder.eval().requires_grad_(False)
    thresholds, shares = calibrate(samples[held], encoder, seed)
    return ScopeReport(thresholds, shares, losses)


def calibrate(
    samples: ScopeSamples, encoder: ScopeEncoder, seed: int
) -> tuple[dict[int, float], dict[int, list[float]]]:
    """Thresholds, and ``score_scope`` at them, by the number of edits in memory; the largest is that of all.

    Edits that the base model answers right are left out if enough others remain: nobody makes such edits,
    and they are easier to tell apart.
    """
    if samples.wrong is not None and int(samples.wrong.sum()) >= 2 * HELD_OUT:
        samples = samples[samples.wrong.nonzero().flatten()]
    similarity = compare_all(samples, encoder)
    generator = torch.Generator().manual_seed(seed)
    sizes = [size for size in POOLS if size < len(samples)] + [len(samples)]
    thresholds, shares, least = {}, {}, -1.0
    for size in sizes:
        # Every query is compared with its own edit and size - 1 others, the same for all queries of an edit.
        rank = torch.rand(len(samples), len(samples), generator=generator).fill_diagonal_(-1)
        absent = rank > rank.sort(1).values[:, size - 1 : size]
        met = similarity.cpu().masked_fill(absent[:, None], -torch.inf)
        least = max(least, choose_threshold(met, samples.inside))
        thresholds[size] = least
        shares[size] = score_scope(met, samples.inside, least).tolist()
    return thresholds, shares


@torch.no_grad()
def compare_all(samples: ScopeSamples, encoder: ScopeEncoder, batch: int = 32) -> torch.Tensor:
    """Similarity of every query with every edit of the samples, ``(n, v, n)``."""
    device = next(encoder.parameters()).device
    parts = []
    for start in range(0, len(samples), batch):
        part = samples[torch.arange(start, min(start + batch, len(samples)))]
        parts.append(ScopeSamples(part.states.to(device), part.mask.to(device), 0).encode(encoder))
    encoded = torch.cat(parts)
    return torch.einsum("nvr,kr->nvk", encoded, encoded[:, 0])


def select_edits(similarity: torch.Tensor, threshold: float, nearest: bool) -> torch.Tensor:
    """Which edits apply to which prompts, ``(b, e)``: those similar enough, or with ``nearest`` only the most
    similar of them. Of equally similar edits the newest counts as nearest: it corrects the others."""
    open_ = similarity >= threshold
    if nearest:
        last = similarity.shape[1] - 1 - similarity.flip(1).argmax(1)
        open_ = open_ & F.one_hot(last, similarity.shape[1]).bool()
    return open_
