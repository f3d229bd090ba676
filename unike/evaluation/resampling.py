"""The hierarchical bootstrap: seeds of the whole pipeline are drawn first, then records within each.

Davison and Hinkley (1997), *Bootstrap Methods and their Application*, section 3.8: both levels are drawn
with replacement. With few seeds the interval is somewhat too narrow: three values vary less than what they
are drawn from. So results show each seed's own figure, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def resample_strata(
    values: np.ndarray,
    strata: Sequence[int],
    seed: int,
    samples: int,
    groups: Sequence[int | None] | None = None,
) -> np.ndarray:
    """``samples`` means of resampled ``values (n,)``: as many strata are drawn as there are, and within each
    as many values (or whole ``groups``) as it has. A mean is over all values that were drawn.

    The draws depend on the seed and on how many units each stratum has: columns of the same records are
    resampled alike.
    """
    own = range(len(values)) if groups is None else [-1 if group is None else group for group in groups]
    pairs = np.array([*zip(strata, own, strict=True)], dtype=np.int64)
    units, unit_of = np.unique(pairs, axis=0, return_inverse=True)
    unit_of = unit_of.reshape(-1)
    sums = np.bincount(unit_of, weights=values)
    sizes = np.bincount(unit_of, weights=np.ones_like(values))
    # Units are sorted by stratum: those of one lie together.
    counts = np.unique(units[:, 0], return_counts=True)[1]
    weights = _draw_weights(tuple(counts.tolist()), seed, samples)
    means: np.ndarray = (weights @ sums) / (weights @ sizes)
    return means


@lru_cache(maxsize=4)
def _draw_weights(counts: tuple[int, ...], seed: int, samples: int) -> np.ndarray:
    """How often each unit is drawn in each resample, ``(samples, units)``."""
    generator = np.random.default_rng(seed)
    starts = np.cumsum((0, *counts))
    weights = np.zeros((samples, starts[-1]))
    for row, drawn in enumerate(generator.integers(0, len(counts), (samples, len(counts)))):
        for stratum in drawn:
            picked = generator.integers(0, counts[stratum], counts[stratum])
            weights[row, starts[stratum] : starts[stratum + 1]] += np.bincount(
                picked, minlength=counts[stratum]
            )
    weights.setflags(write=False)
    return weights
