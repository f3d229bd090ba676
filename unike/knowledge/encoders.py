"""Knowledge collaboration: two encoders per layer separate meaning from truthfulness.

Knowledge states of one layer, for ``n`` samples: ``sem (n, d)`` at the question's end, ``pos`` and
``neg (n, d)`` at the end of question + right answer and question + wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class KnowledgeStates:
    """``sem``, ``pos``, ``neg``: each ``(n, d)``, one layer."""

    sem: torch.Tensor
    pos: torch.Tensor
    neg: torch.Tensor

    def __len__(self) -> int:
        return len(self.sem)

    def __getitem__(self, index: slice | torch.Tensor) -> KnowledgeStates:
        return KnowledgeStates(self.sem[index], self.pos[index], self.neg[index])


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out))


class Disentangler(nn.Module):
    """``Enc_sem: d -> d`` and ``Enc_tru: d -> d_t`` of one layer."""

    def __init__(self, width: int, hidden: int | None = None, truth_width: int | None = None) -> None:
        super().__init__()
        hidden = hidden or 2 * width
        self.semantic = _mlp(width, hidden, width)
        self.truthful = _mlp(width, hidden, truth_width or width)

    @torch.no_grad()
    def compute_zeta(self, states: KnowledgeStates, kind: str, seed: int = 0) -> torch.Tensor | None:
        """The direction added to the extra values; ``kind`` as in the YAML.

        ``truthfulness``: ``mean Enc_tru(pos) - mean Enc_tru(neg)``; ``semantic`` the same through
        ``Enc_sem``; ``random`` a random direction of the truthfulness direction's length; ``none``.
        """
        if kind == "none":
            return None
        if kind == "semantic":
            return self.semantic(states.pos).mean(0) - self.semantic(states.neg).mean(0)
        truth = self.truthful(states.pos).mean(0) - self.truthful(states.neg).mean(0)
        if kind == "truthfulness":
            return truth
        if kind != "random":
            raise ValueError(f"zeta {kind!r}: expected none, random, semantic or truthfulness")
        drawn = torch.randn(len(truth), generator=torch.Generator().manual_seed(seed)).to(truth)
        return drawn / drawn.norm() * truth.norm()


def truthfulness_loss(
    pos: torch.Tensor, neg: torch.Tensor, tau: float = 0.1, include_anchor: bool = False
) -> torch.Tensor:
    """For each anchor all states of its own truth value are positives, all others negatives, as the
    ratio of sums inside the log: Eq. (4).

    ``pos``, ``neg`` ``(n, d_t)``: encoded states. An anchor's similarity to itself carries no
    gradient but saturates the ratio at small ``tau``; with ``include_anchor`` it is in the sums, as printed.
    That is not yet the print to the letter. A departure, with either: both printed terms are anchored at
    ``h_pos``, here the second one at ``h_neg``. Otherwise no negative state would be pulled to the others.
    """
    encoded = F.normalize(torch.cat([pos, neg]), dim=-1)
    logits = encoded @ encoded.T / tau
    truth = torch.cat([torch.ones(len(pos)), torch.zeros(len(neg))]).to(logits.device)
    same = truth[:, None] == truth[None]
    if not include_anchor:
        self_pair = torch.eye(len(encoded), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(self_pair, -torch.inf)
    return (logits.logsumexp(1) - logits.masked_fill(~same, -torch.inf).logsumexp(1)).mean()


def semantic_loss(sem: torch.Tensor, pos: torch.Tensor, neg: torch.Tensor, tau: float = 0.1) -> torch.Tensor:
    """A sample's raw ``sem`` attracts its own encoded ``pos`` and ``neg`` and repels every other
    sample's: Eq. (5). All ``(n, d)``."""
    anchors = F.normalize(sem, dim=-1)
    others = F.normalize(torch.cat([pos, neg]), dim=-1)
    logits = anchors @ others.T / tau
    own = torch.eye(len(sem), dtype=torch.bool, device=logits.device).repeat(1, 2)
    return (logits.logsumexp(1) - logits.masked_fill(~own, -torch.inf).logsumexp(1)).mean()


@dataclass(frozen=True)
class FitReport:
    """Losses per step, and on held-out states after training: both losses, the ``top1`` accuracy of
    retrieving a sample's own encoded answer, and the accuracy of telling ``pos`` from ``neg`` along zeta."""

    losses: tuple[float, ...]
    held_semantic: float
    held_truthful: float
    top1: float
    truth_accuracy: float


def draw_batches(n: int, size: int, steps: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches of indices, drawn without replacement within each pass."""
    order, at = torch.randperm(n, generator=generator), 0
    for _ in range(steps):
        if at + size > n:
            order, at = torch.randperm(n, generator=generator), 0
        yield order[at : at + size]
        at += size


def fit(
    states: KnowledgeStates,
    hidden: int | None = None,
    truth_width: int | None = None,
    steps: int = 600,
    batch: int = 256,
    lr: float = 1e-3,
    tau: float = 0.1,
    include_anchor: bool = False,
    held: float = 0.15,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Disentangler, FitReport]:
    """Trains both encoders of one layer on ``L1 + L2`` with Adam.

    The last share ``held`` of the states is held out of training, and reported on.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoders = Disentangler(states.sem.shape[-1], hidden, truth_width).to(states.sem.device)
    cut = max(2, round(len(states) * (1 - held)))
    train, test = states[:cut], states[cut:]
    optimiser = torch.optim.Adam(encoders.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for index in draw_batches(cut, min(batch, cut), steps, generator):
        loss = joint_loss(encoders, train[index], tau, include_anchor)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        tick()
    encoders.requires_grad_(False)
    return encoders, _evaluate(encoders, train, test, losses, tau, include_anchor)


def joint_loss(
    encoders: Disentangler, states: KnowledgeStates, tau: float, include_anchor: bool
) -> torch.Tensor:
    """``L1 + L2``, as the release trains them together."""
    truth = truthfulness_loss(
        encoders.truthful(states.pos), encoders.truthful(states.neg), tau, include_anchor
    )
    meaning = semantic_loss(states.sem, encoders.semantic(states.pos), encoders.semantic(states.neg), tau)
    return truth + meaning


@torch.no_grad()
def _evaluate(
    encoders: Disentangler,
    train: KnowledgeStates,
    test: KnowledgeStates,
    losses: list[float],
    tau: float,
    include_anchor: bool,
) -> FitReport:
    test = test if len(test) >= 2 else train
    pos, neg = encoders.semantic(test.pos), encoders.semantic(test.neg)
    similarity = F.normalize(test.sem, dim=-1) @ F.normalize(pos, dim=-1).T
    top1 = (similarity.argmax(1) == torch.arange(len(test), device=similarity.device)).float().mean()
    zeta = encoders.compute_zeta(train, "truthfulness")
    assert zeta is not None
    apart = (encoders.truthful(test.pos) - encoders.truthful(test.neg)) @ zeta
    return FitReport(
        tuple(losses),
        semantic_loss(test.sem, pos, neg, tau).item(),
        truthfulness_loss(
            encoders.truthful(test.pos), encoders.truthful(test.neg), tau, include_anchor
        ).item(),
        top1.item(),
        (apart > 0).float().mean().item(),
    )
