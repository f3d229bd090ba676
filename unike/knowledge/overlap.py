"""How alike two prompts' next tokens are: whether a model makes the same mistake at both.

An edit corrects a wrong answer of the base model. Where the base model, asked something else, is about to say
what it said wrongly, the edit applies; where it is about to say another thing, it does not. This needs no
training. Shapes: ``m`` tokens along the base model's own greedy answer, ``t`` most probable tokens at each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NextTokens:
    """What the base model says after a prompt: at each of its first ``m`` answer tokens the ``t`` most
    probable ones, ``ids (m, t)``, with their ``probabilities (m, t)``, best first. The best ones are the
    greedy answer."""

    ids: torch.Tensor
    probabilities: torch.Tensor


def measure_overlap(one: NextTokens, others: Sequence[NextTokens]) -> torch.Tensor:
    """The overlap of one prompt's next tokens with each of ``others``, ``(n)``, in [0, 1].

    At one token it is the Bhattacharyya coefficient ``sum_v sqrt(p(v) q(v))``, over the tokens that both
    keep; each side's add up to 1, so that a prompt's overlap with itself is 1. Along several it is their
    mean, where tokens after the first one that the two greedy answers do not share count 0: from there on
    they are asked about different texts.
    """
    ids = torch.stack([other.ids for other in others])
    roots = _normalise(torch.stack([other.probabilities for other in others])).sqrt()
    # Both sides' tokens compared: with t kept tokens there are t * t pairs, whatever the vocabulary.
    same = one.ids[None, :, :, None] == ids[:, :, None, :]
    products = _normalise(one.probabilities).sqrt()[None, :, :, None] * roots[:, :, None, :]
    by_token = (products * same).sum((-1, -2))
    agrees = (one.ids[None, :, 0] == ids[:, :, 0]).long().cumprod(1)
    shared = torch.cat([agrees.new_ones(len(others), 1), agrees[:, :-1]], 1)
    return (by_token * shared).mean(1)


def _normalise(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities / probabilities.sum(-1, keepdim=True)
