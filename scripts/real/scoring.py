"""Stage 0 of the projector: which name an image has, without the language model.

The scores start from EfficientNet's own class vectors. A name that is none of its classes starts from the
vectors of the classes that the tower sees in its photographs, each as far as it sees it. Training is that of
a classifier, with mixed images and a pull back to the start: a few photographs of a name must not undo what
the tower learnt from thousands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from unike.datasets.answers import normalise_answer

State = dict[str, torch.Tensor]
# Weight of the cells' loss beside that of the image as a whole.
CELLS = 0.3


@dataclass(frozen=True)
class Labelled:
    """Features ``(n, 1 + cells, d)`` in half precision, and for each cell the index of its name, -1 for none;
    the first cell may have a second name, of equal share."""

    features: torch.Tensor
    names: torch.Tensor
    second: torch.Tensor

    def __len__(self) -> int:
        return len(self.features)


def index_names(names: Sequence[str]) -> dict[str, int]:
    """The number of each name by its normal form; of two that are the same, the first."""
    return {normalise_answer(name): i for i, name in reversed(list(enumerate(names)))}


def label_photos(features: torch.Tensor, names: Sequence[int]) -> Labelled:
    """Each photograph's cells show what the photograph is named after."""
    own = torch.tensor(names)
    return Labelled(features, own[:, None].expand(-1, features.shape[1]), torch.full((len(own),), -1))


def label_scenes(features: torch.Tensor, objects: Sequence[Sequence[int]]) -> Labelled:
    """A scene's cells have its object; of two, those on the left the first, those on the right the second."""
    cells = features.shape[1] - 1
    side = round(cells**0.5)
    names = torch.full((len(objects), 1 + cells), -1)
    second = torch.full((len(objects),), -1)
    for row, found in enumerate(objects):
        names[row, 0] = found[0]
        if len(found) > 1:
            second[row] = found[1]
        for cell in range(cells):
            column = cell % side
            # The middle column of an odd grid shows both.
            if len(found) == 1 or 2 * column + 1 != side:
                names[row, 1 + cell] = found[int(len(found) > 1 and 2 * column + 1 > side)]
    return Labelled(features, names, second)


def join(parts: Sequence[Labelled]) -> Labelled:
    """All rows together."""
    return Labelled(
        torch.cat([p.features for p in parts]),
        torch.cat([p.names for p in parts]),
        torch.cat([p.second for p in parts]),
    )


@torch.no_grad()
def add_names(state: Mapping[str, torch.Tensor], words: torch.Tensor, shown: Labelled) -> State:
    """The projector with scores for ``words`` ``(new, slots, d)``, which follow the names that it has."""
    out = dict(state)
    old = len(state["scores.weight"])
    shares = F.linear(shown.features[:, 0].float(), state["scores.weight"], state["scores.bias"]).softmax(-1)
    rows, biases = [], []
    for new in range(old, old + len(words)):
        own = shares[(shown.names[:, 0] == new) | (shown.second == new)]
        # A name without an image is never likely.
        share = own.mean(0) if len(own) else shares.mean(0)
        rows.append(share @ state["scores.weight"])
        biases.append(share @ state["scores.bias"] if len(own) else state["scores.bias"].min())
    out["scores.weight"] = torch.cat([state["scores.weight"], torch.stack(rows)])
    out["scores.bias"] = torch.cat([state["scores.bias"], torch.stack(biases)])
    out["words.weight"] = torch.cat([state["words.weight"], words.flatten(1).T], 1)
    return out


def compute_loss(scores: torch.Tensor, names: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the scores ``(n, 1 + cells, names)``: of the whole image, and of cells that have a
    name, weighted by ``CELLS``."""
    whole = F.cross_entropy(scores[:, 0], names[:, 0], reduction="none")
    two = second >= 0
    if two.any():
        other = F.cross_entropy(scores[two, 0], second[two], reduction="none")
        whole = whole.index_put((two.nonzero()[:, 0],), (whole[two] + other) / 2)
    loss = whole.mean()
    if (names[:, 1:] >= 0).any():
        loss = loss + CELLS * F.cross_entropy(
            scores[:, 1:].flatten(0, 1), names[:, 1:].flatten(), ignore_index=-1
        )
    return loss


@dataclass(frozen=True)
class ScoringOptions:
    """``pull`` is the weight of the squared distance from the start, ``mix`` the share of mixed images."""

    epochs: int = 12
    batch: int = 64
    lr: float = 1e-3
    pull: float = 1e-3
    mix: float = 0.5
    dropout: float = 0.2


def train_scores(
    state: State, views: Sequence[Labelled], held: Labelled, options: ScoringOptions, seed: int
) -> tuple[State, list[float]]:
    """The state with the scores of the epoch that names most of the ``held`` images rightly, and the share of
    them after each epoch, the start first. Each epoch draws a view of each image."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (state[f"scores.{part}"].clone().requires_grad_() for part in ("weight", "bias"))
    start = weight.detach().clone()
    optimiser = torch.optim.AdamW([weight, bias], options.lr, weight_decay=0)
    best = dict(state)
    accuracies = [measure_scores(state, held)]
    for _ in range(options.epochs):
        view = views[int(torch.randint(len(views), (), generator=generator))]
        for rows in torch.randperm(len(view), generator=generator).split(options.batch):
            loss = _compute_mixed_loss(weight, bias, view, rows, options, generator)
            loss = loss + options.pull * (weight - start).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        now = {**state, "scores.weight": weight.detach().clone(), "scores.bias": bias.detach().clone()}
        accuracies.append(measure_scores(now, held))
        # Without held images the last epoch's are kept.
        if not len(held) or accuracies[-1] >= max(accuracies):
            best = now
    return best, accuracies


def _compute_mixed_loss(
    weight: torch.Tensor,
    bias: torch.Tensor,
    view: Labelled,
    rows: torch.Tensor,
    options: ScoringOptions,
    generator: torch.Generator,
) -> torch.Tensor:
    """The loss of some rows, or of mixtures of two: features and losses in the same shares."""
    x = view.features[rows].float()
    keep = torch.rand(x.shape, generator=generator) >= options.dropout
    x = x * keep / (1 - options.dropout)
    if torch.rand((), generator=generator) >= options.mix:
        return compute_loss(F.linear(x, weight, bias), view.names[rows], view.second[rows])
    order = torch.randperm(len(rows), generator=generator)
    share = 0.5 + 0.5 * float(torch.rand((), generator=generator))
    scores = F.linear(share * x + (1 - share) * x[order], weight, bias)
    own = compute_loss(scores, view.names[rows], view.second[rows])
    other = compute_loss(scores, view.names[rows][order], view.second[rows][order])
    return share * own + (1 - share) * other


@torch.no_grad()
def measure_scores(state: Mapping[str, torch.Tensor], held: Labelled) -> float:
    """The share of images whose likeliest name is theirs; NaN without images."""
    if not len(held):
        return float("nan")
    scores = F.linear(held.features[:, 0].float(), state["scores.weight"], state["scores.bias"])
    return float((scores.argmax(-1) == held.names[:, 0]).float().mean())
