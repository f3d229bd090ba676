"""Whether an edit did what it should: one definition of each metric, on token ids and on text.

Two ways of reading a prediction, never mixed: teacher-forced (argmax at each answer position, one
forward pass over prompt and answer) and generated (greedy decoding from the prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from unike.text import normalise_answer
from unike.types import Probe

_BLOCK = 1_000_000


@dataclass(frozen=True)
class Reading:
    """What a model said to one probe.

    ``predicted_ids`` holds the argmax at the position of each of the answer's ``target_ids``,
    ``generated`` the greedily decoded text where it was asked for. ``edited`` has no default: whoever
    takes the reading knows whether an edit was applied.
    """

    target_ids: tuple[int, ...]
    predicted_ids: tuple[int, ...]
    generated: str | None = None
    edited: bool = field(kw_only=True)

    def __post_init__(self) -> None:
        for name in ("target_ids", "predicted_ids"):
            object.__setattr__(self, name, tuple(int(token) for token in getattr(self, name)))
        _same_length(self.predicted_ids, self.target_ids)


def token_accuracy(predicted: Sequence[int], target: Sequence[int]) -> float:
    """Share of the answer's tokens that are predicted."""
    _same_length(predicted, target)
    return float(np.mean(np.asarray(predicted) == np.asarray(target)))


def agreement(before: Sequence[int], after: Sequence[int]) -> float:
    """Share of answer positions whose argmax is the pre-edit model's."""
    return token_accuracy(after, before)


def score(probe: Probe, before: Reading, after: Reading) -> float:
    """Teacher-forced value of a probe after an edit, in [0, 1].

    Probes that expect the target measure ``token_accuracy``: reliability, Eq. (11), T-generality,
    Eq. (12), and M-generality, Eq. (13). Probes that expect no change measure ``agreement``:
    T-locality, Eq. (14), and M-locality, Eq. (15). The hard probes are one or the other.
    """
    _check_pair(before, after)
    if probe.expect == "target":
        return token_accuracy(after.predicted_ids, after.target_ids)
    return agreement(before.predicted_ids, after.predicted_ids)


def score_generated(probe: Probe, before: Reading, after: Reading) -> float:
    """Generated value of a probe after an edit, 0 or 1: equal after ``normalise_answer``.

    The decoded text is compared with the target, or, where no change is expected, with what the
    unedited model said.
    """
    _check_pair(before, after)
    expected = _target(probe) if probe.expect == "target" else before.generated
    return _same_text(after.generated, expected)


def base_score(probe: Probe, before: Reading) -> float:
    """Teacher-forced value of the unedited model; it leaves everything unchanged."""
    _check_base(before)
    if probe.expect == "target":
        return token_accuracy(before.predicted_ids, before.target_ids)
    return 1.0


def base_score_generated(probe: Probe, before: Reading) -> float:
    """Generated value of the unedited model; it leaves everything unchanged."""
    _check_base(before)
    return _same_text(before.generated, _target(probe)) if probe.expect == "target" else 1.0


def bootstrap_interval(
    values: Sequence[float], seed: int, samples: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean with its percentile bootstrap interval: ``(mean, low, high)``, the same for a seed."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError("a bootstrap needs at least one value")
    generator = np.random.default_rng(seed)
    # Blocks bound the memory: 2000 resamples of a whole benchmark are some 100 MB at once.
    rows = max(1, _BLOCK // array.size)
    means = np.concatenate(
        [
            array[generator.integers(0, array.size, (min(rows, samples - start), array.size))].mean(axis=1)
            for start in range(0, samples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(array.mean()), float(low), float(high)


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean of values from 0 on; one zero makes it zero."""
    if not values or min(values) < 0:
        raise ValueError("a harmonic mean needs values, none of them negative")
    return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)


def _same_length(one: Sequence[int], other: Sequence[int]) -> None:
    if len(one) != len(other) or len(one) == 0:
        raise ValueError(f"expected as many predictions as answer tokens, got {len(one)} and {len(other)}")


def _check_base(before: Reading) -> None:
    if before.edited:
        raise ValueError("the reading before the edit comes from an edited model")


def _check_pair(before: Reading, after: Reading) -> None:
    _check_base(before)
    if not after.edited:
        raise ValueError("the reading after the edit comes from the unedited model")
    if before.target_ids != after.target_ids:
        raise ValueError("the readings before and after are of different answers")


def _target(probe: Probe) -> str:
    if probe.query.target is None:
        raise ValueError(f"probe {probe.name} expects a target and has none")
    return probe.query.target


def _same_text(generated: str | None, expected: str | None) -> float:
    if generated is None or expected is None:
        raise ValueError("the reading holds no generated text")
    return float(normalise_answer(generated) == normalise_answer(expected))
