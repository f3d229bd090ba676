"""The hierarchical bootstrap against one that draws resample by resample, record by record."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from unike.evaluation.metrics import bootstrap_means, harmonic_mean, mean_of, paired_difference
from unike.evaluation.resampling import resample_strata

STRATA = [43] * 4 + [44] * 5 + [45] * 3
GROUPS = [0, 0, 1, 1, 0, 0, 1, 2, 2, 0, 1, 1]


def draw_slowly(strata: Sequence[int], groups: Sequence[int], seed: int, samples: int) -> list[list[int]]:
    """The records of each resample: strata first, then each one's groups, all their records."""
    generator = np.random.default_rng(seed)
    names = sorted(set(strata))
    chosen = generator.integers(0, len(names), (samples, len(names)))
    out = []
    for drawn in chosen:
        picked: list[int] = []
        for stratum in drawn:
            own = sorted({g for s, g in zip(strata, groups, strict=True) if s == names[stratum]})
            for number in generator.integers(0, len(own), len(own)):
                picked += [
                    i
                    for i, (s, g) in enumerate(zip(strata, groups, strict=True))
                    if (s, g) == (names[stratum], own[number])
                ]
        out.append(picked)
    return out


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_strata_are_drawn_first_and_records_within_them(groups: list[int] | None) -> None:
    values = np.random.default_rng(1).uniform(0, 100, len(STRATA)).tolist()
    picked = draw_slowly(STRATA, groups or list(range(len(STRATA))), 5, 200)
    expected = [sum(values[i] for i in some) / len(some) for some in picked]
    assert bootstrap_means(values, 5, 200, groups, STRATA) == pytest.approx(expected)


@pytest.mark.parametrize("of", [mean_of, harmonic_mean])
def test_a_paired_difference_draws_the_same_records_for_both(of) -> None:
    one, other = np.random.default_rng(4).uniform(20, 100, (2, 3, len(STRATA))).tolist()
    expected = []
    for some in draw_slowly(STRATA, GROUPS, 7, 200):
        a, b = ([sum(c[i] for i in some) / len(some) for c in side] for side in (one, other))
        expected.append(of(a) - of(b))
    _, low, high = paired_difference(one, other, 7, of, 200, GROUPS, STRATA)
    assert (low, high) == pytest.approx((np.quantile(expected, 0.025), np.quantile(expected, 0.975)))
    assert paired_difference(one, one, 7, of, 200, GROUPS, STRATA) == (0.0, 0.0, 0.0)


def test_a_single_stratum_is_the_plain_bootstrap_to_the_last_bit() -> None:
    values = np.random.default_rng(2).uniform(0, 1, 30).tolist()
    plain = bootstrap_means(values, 3, 100)
    assert np.array_equal(bootstrap_means(values, 3, 100, strata=[43] * 30), plain)
    assert not np.array_equal(bootstrap_means(values, 3, 100, strata=[43] * 15 + [44] * 15), plain)


def test_what_differs_between_seeds_widens_the_interval() -> None:
    values = [90.0] * 50 + [70.0] * 50 + [80.0] * 50
    strata = [43] * 50 + [44] * 50 + [45] * 50
    plain, layered = bootstrap_means(values, 0), bootstrap_means(values, 0, strata=strata)
    assert np.ptp(np.quantile(layered, [0.025, 0.975])) > 3 * np.ptp(np.quantile(plain, [0.025, 0.975]))
    # Within seeds nothing varies: a resample's mean is that of three seeds drawn with replacement.
    assert set(np.round(layered, 6)) <= {round((a + b + c) / 3, 6) for a in (70, 80, 90) for b in (70, 80, 90)
                                         for c in (70, 80, 90)}  # fmt: skip


def test_values_of_no_sequence_are_one_group_of_their_stratum() -> None:
    found = resample_strata(np.array([1.0, 3.0, 10.0]), [0, 0, 1], 0, 50, [None, None, None])
    assert set(found.round(6)) == {2.0, 10.0, round(14 / 3, 6)}
