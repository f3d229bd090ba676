"""How alike two prompts' next tokens are: whether a model makes the same mistake at both.

An edit corrects a wrong answer of the base model. Where the base model, asked something else, is about to say
what it said wrongly, the edit applies; where it is about to say another thing, it does not. This needs no
training. Shapes: ``m`` tokens along the base model's own greedy answer, ``t`` most probable tokens at each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

# From which probability on two answers are all that are possible.
FEW = 0.98


@dataclass(frozen=True)
class NextTokens:
    """What the base model says after a prompt: at each of the first ``m`` tokens of its answer, the end among
    them, the ``t`` most probable ones, ``ids (m, t)``, with their ``probabilities (m, t)``, best first. The
    best ones are the greedy answer."""

    ids: torch.Tensor
    probabilities: torch.Tensor

    @property
    def are_few(self) -> bool:
        """Whether two tokens take nearly all of the probability, everywhere along the answer, as with yes and
        no."""
        return bool((self.probabilities[:, :2].sum(-1) >= FEW).all())


def measure_overlap(one: NextTokens, others: Sequence[NextTokens]) -> torch.Tensor:
    """The overlap of one prompt's next tokens with each of ``others``, ``(n)``, in [0, 1].

    At one token it is the Bhattacharyya coefficient ``sum_v sqrt(p(v) q(v))``, over the tokens that both
    keep; each side's add up to 1, so that a prompt's overlap with itself is 1. Along an answer it is the
    least of these, as far as the two greedy answers agree, and where they part: a sentence is another one
    where one word is.
    """
    rows = max(len(kept.ids) for kept in (one, *others))
    mine, theirs = _pad([one], rows), _pad(others, rows)
    # Both sides' tokens compared: with t kept tokens there are t * t pairs, whatever the vocabulary.
    same = mine.ids[:, :, :, None] == theirs.ids[:, :, None, :]
    products = mine.probabilities.sqrt()[:, :, :, None] * theirs.probabilities.sqrt()[:, :, None, :]
    by_token = (products * same).sum((-1, -2))
    agrees = (mine.ids[:, :, 0] == theirs.ids[:, :, 0]).long().cumprod(1)
    met = torch.cat([torch.ones_like(agrees[:, :1]), agrees[:, :-1]], 1).bool() & theirs.is_said
    return by_token.masked_fill(~met, 1.0).amin(1)


@dataclass(frozen=True)
class _Padded:
    """``ids`` and ``probabilities (n, m, t)``, the latter adding up to 1, and which rows there are."""

    ids: torch.Tensor
    probabilities: torch.Tensor
    is_said: torch.Tensor


def _pad(kept: Sequence[NextTokens], rows: int) -> _Padded:
    ids, probabilities = (
        pad_sequence([getattr(one, name) for one in kept], batch_first=True)
        for name in ("ids", "probabilities")
    )
    more = (0, 0, 0, rows - ids.shape[1])
    lengths = torch.tensor([len(one.ids) for one in kept], device=ids.device)
    is_said = torch.arange(rows, device=ids.device) < lengths[:, None]
    total = probabilities.sum(-1, keepdim=True).clamp(min=1e-12)
    return _Padded(F.pad(ids, more), F.pad(probabilities / total, more), is_said)
