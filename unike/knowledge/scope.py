"""The scope classifier: a learned similarity of prompts and edits decides which edits apply to a prompt.

Edit and prompt are compared by the states that enter the first edited layer, of the whole prompt with its
image: the state at the last token alone tells more of the question than of the image. Shapes: ``b`` prompts,
``t`` tokens, ``d`` decoder width, ``w`` the width of attention, ``e`` edits, ``r`` width of the learned
space.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from unike.types import UserError

HELD_OUT = 10
# Numbers of edits in memory for which a threshold is chosen, as far as there are enough edits.
POOLS = (1, 10, 100)
# Of training with early stopping: steps until the full learning rate, and what it is multiplied by later.
WARM_UP = 50
DECAY = 1 / 3
_THRESHOLDS = torch.linspace(-1, 1, 401)


def pool_tokens(states: torch.Tensor, mask: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt of more than ``most`` tokens as ``most`` states: its last ``most // 2`` tokens as they are,
    and those before, the image among them, as means of contiguous groups of nearly equal size.

    ``states (b, t, d)`` and ``mask (b, t)`` to ``(b, min(t, most), d)``, in full precision, and its mask.
    What is pooled already stays as it is, bit for bit.
    """
    if states.shape[1] <= most:
        return states.float(), mask
    kept = most // 2
    rank, length = mask.long().cumsum(1) - 1, mask.sum(1, keepdim=True)
    early = (length - kept).clamp(min=1)
    group = torch.where(rank < length - kept, rank * (most - kept) // early, rank - length + most)
    group = torch.where(length <= most, rank, group)
    own = (group[:, None] == torch.arange(most, device=mask.device)[:, None]) & mask[:, None]
    # Products with ones and zeros: the mean of one state is that state.
    total = own.float() @ states.float()
    count = own.sum(-1)
    return total / count.clamp(min=1)[..., None], count > 0


class ScopeEncoder(nn.Module):
    """A prompt's states as a unit vector: its last token's, and that token's attention over all of them.

    With ``inner`` attention is of that width: the states are projected to it first. With ``tokens`` longer
    prompts are pooled to so many states (``pool_tokens``). ValueError where ``heads`` does not divide the
    width of attention.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        out: int,
        heads: int,
        dropout: float = 0.1,
        inner: int | None = None,
        tokens: int | None = None,
    ) -> None:
        super().__init__()
        wide = width if inner is None else inner
        if wide % heads:
            raise ValueError(f"heads {heads}: expected a divisor of the width {wide}")
        self.heads, self.tokens = heads, tokens
        self.norm = nn.LayerNorm(width)
        # Without a bias: what follows has its own.
        self.squeeze = None if inner is None else nn.Linear(width, inner, bias=False)
        self.query, self.key, self.value = (nn.Linear(wide, wide) for _ in range(3))
        self.out = nn.Sequential(
            nn.Linear(2 * wide, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, out)
        )

    @property
    def width(self) -> int:
        """Of the learned space, ``r``."""
        last = self.out[-1]
        assert isinstance(last, nn.Linear)
        return last.out_features

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``(b, t, d)`` to ``(b, r)``; ``mask (b, t)`` is true on the prompt's tokens."""
        if self.tokens is not None:
            states, mask = pool_tokens(states, mask, self.tokens)
        # Without the norm's own scale, which is applied where there is one state for each prompt.
        states = F.layer_norm(states.float(), states.shape[-1:], eps=self.norm.eps)
        b, t, _ = states.shape
        last = t - 1 - mask.long().flip(1).argmax(1)
        end = self._narrow(states[torch.arange(b, device=states.device), last])
        seen = self._attend(end, states, mask)
        return F.normalize(self.out(torch.cat([end, seen], -1)), dim=-1)

    def _narrow(self, states: torch.Tensor) -> torch.Tensor:
        """Normalised states ``(..., d)`` with the norm's scale, at the width of attention, ``(..., w)``."""
        scaled = states * self.norm.weight + self.norm.bias
        return scaled if self.squeeze is None else self.squeeze(scaled)

    def _attend(self, end: torch.Tensor, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Multi-head attention of one query ``end (b, w)`` over the narrowed ``states (b, t, d)``.

        No state is narrowed or projected, and none needs a gradient: the query is taken through the weights
        of both steps instead, and so is each head's mixture of the states. Biases of the keys add the same to
        all scores, so they do nothing.
        """
        width = end.shape[-1]
        shape = (self.heads, width // self.heads, width)
        query = self.query(end).unflatten(-1, shape[:2])
        asked = torch.einsum("bhe,hew->bhw", query, self.key.weight.view(shape))
        if self.squeeze is not None:
            asked = asked @ self.squeeze.weight
        scores = torch.einsum("bhd,btd->bht", asked * self.norm.weight, states) / shape[1] ** 0.5
        shares = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        mixture = self._narrow(torch.einsum("bht,btd->bhd", shares, states))
        mixed = torch.einsum("bhw,hew->bhe", mixture, self.value.weight.view(shape)).flatten(1)
        return mixed + self.value.bias


@dataclass(frozen=True)
class TrainedScope:
    """A trained scope classifier: its encoder, and by the number of edits in memory the similarity from which
    on a prompt is in an edit's scope. Among more edits an unrelated prompt more easily finds one.

    ``passing`` is what ``measure_passing`` gives; classifiers from before it existed have none."""

    encoder: ScopeEncoder
    thresholds: Mapping[int, float]
    passing: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def find_passed(self, share: float, are_few: bool) -> float:
        """The threshold that this share of the prompts in an edit's scope passes; ``are_few``: whether few
        answers to it are possible. UserError where that was not measured."""
        marks = self.passing.get("few" if are_few else "many")
        if marks is None:
            raise UserError("scope_recall: the classifier was trained before shares were measured")
        place = (1 - share) * (len(marks) - 1)
        below = min(int(place), len(marks) - 2)
        return marks[below] + (marks[below + 1] - marks[below]) * (place - below)

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


class ScopeSource(Protocol):
    """Edits with their queries' states, of which a batch at a time is loaded; as ``ScopeSamples`` has
    them."""

    @property
    def inside(self) -> int: ...

    @property
    def wrong(self) -> torch.Tensor | None: ...

    @property
    def few(self) -> torch.Tensor | None: ...

    def __len__(self) -> int: ...

    def select(self, index: torch.Tensor) -> ScopeSource:
        """The edits of these numbers; nothing is loaded."""
        ...

    def load(self, index: torch.Tensor) -> ScopeSamples:
        """The states of the edits of these numbers, padded to the longest of them."""
        ...


@dataclass(frozen=True)
class ScopeSamples:
    """What training compares: ``n`` edits with ``v`` queries each.

    ``states (n, v, t, d)``, ``mask (n, v, t)``. Of the ``v`` queries the first is the edit itself; the first
    ``inside`` are in its scope, the others are not. ``wrong (n)``: whether the base model answers the edit
    wrong; ``few (n)``: whether it finds few answers possible; None where that is not known.
    """

    states: torch.Tensor
    mask: torch.Tensor
    inside: int
    wrong: torch.Tensor | None = None
    few: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: torch.Tensor) -> ScopeSamples:
        wrong, few = (None if known is None else known[index] for known in (self.wrong, self.few))
        return ScopeSamples(self.states[index], self.mask[index], self.inside, wrong, few)

    def select(self, index: torch.Tensor) -> ScopeSamples:
        return self[index]

    def load(self, index: torch.Tensor) -> ScopeSamples:
        return self[index]

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
    if its own edit is the nearest, and applies; one out of scope if no edit applies. ``losses`` by step,
    ``held_losses`` by the step after which they were measured. ``stopped`` by ``patience`` or ``cap``;
    ``best_step`` is the step whose weights are kept, ``visits`` counts the records of all batches.
    ``passing`` is what ``measure_passing`` gives, ``queries`` are the names of the ``v`` queries."""

    thresholds: dict[int, float]
    shares: dict[int, list[float]]
    passing: dict[str, list[float]] = field(default_factory=dict)
    queries: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    held_losses: dict[int, float] = field(default_factory=dict)
    stopped: str = "cap"
    best_step: int = 0
    visits: int = 0
    seconds: float = 0.0


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


@dataclass
class EarlyStop:
    """When training ends, and how fast it learns until then.

    The held-out loss is measured every ``every`` steps; training ends once it has not fallen ``patience``
    times in a row. How many steps that takes is not known beforehand, so the learning rate follows no plan
    over all of them: it rises over ``WARM_UP`` steps, stays, and falls to a third each time the loss has not
    fallen for half the patience.
    """

    every: int
    patience: int
    best: float = math.inf
    best_step: int = 0
    stale: int = 0
    drops: int = 0

    def observe(self, step: int, loss: float) -> bool:
        """Takes note of the held-out loss after ``step`` steps; whether it is the least so far."""
        if loss < self.best:
            self.best, self.best_step, self.stale = loss, step, 0
            return True
        self.stale += 1
        self.drops += self.stale == max(1, self.patience // 2)
        return False

    @property
    def is_over(self) -> bool:
        return self.stale >= self.patience

    def scale_rate(self, step: int) -> float:
        """What the learning rate of step ``step``, counted from 0, is multiplied by."""
        return min(1.0, (step + 1) / WARM_UP) * DECAY**self.drops


def fit_scope(
    samples: ScopeSource,
    encoder: ScopeEncoder,
    steps: int,
    batch: int,
    lr: float,
    tau: float,
    seed: int,
    tick: Callable[[], None] = lambda: None,
    stop: EarlyStop | None = None,
) -> ScopeReport:
    """Trains the encoder in place, and chooses the thresholds on every tenth edit, which is held out.

    It takes ``steps`` steps; with ``stop`` at most so many, and the weights with the least held-out loss are
    kept. Only a batch of the states is on the encoder's device. ``tick`` is called after each step.
    ValueError for fewer than ``2 * HELD_OUT`` edits.
    """
    if len(samples) < 2 * HELD_OUT:
        raise ValueError(f"{len(samples)} edits; expected {2 * HELD_OUT} or more")
    started = time.perf_counter()
    numbers = torch.arange(len(samples))
    held = samples.select(numbers[numbers % HELD_OUT == HELD_OUT - 1])
    train = numbers[numbers % HELD_OUT != HELD_OUT - 1]
    device = next(encoder.parameters()).device
    optimiser = torch.optim.AdamW(encoder.parameters(), lr)
    schedule = _plan_rates(optimiser, lr, steps, stop)
    report, best = ScopeReport({}, {}), None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(1, steps + 1):
            encoder.train()
            part = samples.load(train[torch.randperm(len(train))[:batch]])
            some = ScopeSamples(part.states.to(device), part.mask.to(device), part.inside)
            loss = scope_loss(some.encode(encoder), some.inside, tau)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            report.losses.append(loss.item())
            report.visits += len(part)
            tick()
            if stop is not None and (step % stop.every == 0 or step == steps):
                report.held_losses[step] = measure_loss(held, encoder, tau)
                if stop.observe(step, report.held_losses[step]):
                    best = {k: v.clone() for k, v in encoder.state_dict().items()}
                if stop.is_over:
                    break
            schedule.step()
    if best is not None:
        encoder.load_state_dict(best)
    encoder.eval().requires_grad_(False)
    report.stopped = "patience" if stop is not None and stop.is_over else "cap"
    report.best_step = len(report.losses) if stop is None else stop.best_step
    report.thresholds, report.shares = calibrate(held, encoder, seed)
    report.passing = measure_passing(held, encoder)
    report.seconds = time.perf_counter() - started
    return report


def _plan_rates(
    optimiser: torch.optim.Optimizer, lr: float, steps: int, stop: EarlyStop | None
) -> torch.optim.lr_scheduler.LRScheduler:
    if stop is None:
        return torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, max(2, steps))
    return torch.optim.lr_scheduler.LambdaLR(optimiser, stop.scale_rate)


def measure_loss(samples: ScopeSource, encoder: ScopeEncoder, tau: float) -> float:
    """``scope_loss`` of all samples as one batch, without dropout."""
    return float(scope_loss(encode_all(samples, encoder.eval()), samples.inside, tau))


def calibrate(
    samples: ScopeSource, encoder: ScopeEncoder, seed: int
) -> tuple[dict[int, float], dict[int, list[float]]]:
    """Thresholds, and ``score_scope`` at them, by the number of edits in memory; the largest is that of all.

    Edits that the base model answers right are left out if enough others remain: nobody makes such edits,
    and they are easier to tell apart.
    """
    if samples.wrong is not None and int(samples.wrong.sum()) >= 2 * HELD_OUT:
        samples = samples.select(samples.wrong.nonzero().flatten())
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


def measure_passing(samples: ScopeSource, encoder: ScopeEncoder) -> dict[str, list[float]]:
    """Of edits with ``many`` and with ``few`` possible answers, the similarities with the queries in their
    scope: the percentiles from 0 to 100. Where there are none of a kind, those of all edits; empty where it
    is not known which edits are of which kind."""
    if samples.few is None:
        return {}
    encoded = encode_all(samples, encoder)
    own = torch.einsum("nvr,nr->nv", encoded[:, : samples.inside], encoded[:, 0])[:, 1:].cpu()
    marks, out = torch.linspace(0, 1, 101), {}
    for name, chosen in (("many", ~samples.few), ("few", samples.few)):
        kept = own[chosen] if bool(chosen.any()) else own
        out[name] = kept.flatten().quantile(marks).tolist()
    return out


@torch.no_grad()
def encode_all(samples: ScopeSource, encoder: ScopeEncoder, batch: int = 32) -> torch.Tensor:
    """All queries in the learned space, ``(n, v, r)``; the states of ``batch`` edits at a time are loaded."""
    device = next(encoder.parameters()).device
    parts = []
    for start in range(0, len(samples), batch):
        part = samples.load(torch.arange(start, min(start + batch, len(samples))))
        parts.append(ScopeSamples(part.states.to(device), part.mask.to(device), 0).encode(encoder))
    return torch.cat(parts)


def compare_all(samples: ScopeSource, encoder: ScopeEncoder, batch: int = 32) -> torch.Tensor:
    """Similarity of every query with every edit of the samples, ``(n, v, n)``."""
    encoded = encode_all(samples, encoder, batch)
    return torch.einsum("nvr,kr->nvk", encoded, encoded[:, 0])


def select_edits(similarity: torch.Tensor, threshold: float, nearest: bool) -> torch.Tensor:
    """Which edits apply to which prompts, ``(b, e)``: those similar enough, or with ``nearest`` only the most
    similar of them. Of equally similar edits the newest counts as nearest: it corrects the others."""
    open_ = similarity >= threshold
    if nearest:
        last = similarity.shape[1] - 1 - similarity.flip(1).argmax(1)
        open_ = open_ & F.one_hot(last, similarity.shape[1]).bool()
    return open_
