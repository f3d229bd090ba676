"""Metrics against slow references, and the mistakes that they refuse."""

import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unike.datasets.answers import normalise_answer
from unike.evaluation.metrics import (
    Prediction,
    agreement,
    base_score,
    base_score_generated,
    bootstrap_interval,
    harmonic_mean,
    score,
    score_generated,
    token_accuracy,
)
from unike.types import Probe, Query

TARGET = Probe("reliability", Query("i.png", "what?", "two cats"), "target")
UNCHANGED = Probe("m_locality", Query("j.png", "who?", "a dog"), "unchanged")
ids = st.integers(0, 3)
triples = st.lists(st.tuples(ids, ids, ids), min_size=1)


def naive_share(one, other):
    same = 0
    for a, b in zip(one, other, strict=True):
        if a == b:
            same += 1
    return same / len(one)


@given(rows=triples)
def test_teacher_forced_values(rows):
    target, was, now = zip(*rows, strict=True)
    before, after = Prediction(target, was, edited=False), Prediction(target, now, edited=True)
    assert token_accuracy(now, target) == pytest.approx(naive_share(now, target))
    assert agreement(was, now) == pytest.approx(naive_share(was, now))
    assert score(TARGET, before, after) == pytest.approx(naive_share(now, target))
    assert score(UNCHANGED, before, after) == pytest.approx(naive_share(was, now))
    assert base_score(TARGET, before) == pytest.approx(naive_share(was, target))
    assert base_score(UNCHANGED, before) == 1.0


def test_locality_compares_with_the_model_not_with_the_answer():
    before, after = Prediction([1, 2], [8, 9], edited=False), Prediction([1, 2], [1, 2], edited=True)
    assert score(UNCHANGED, before, after) == 0.0
    assert score(TARGET, before, after) == 1.0


@pytest.mark.parametrize(
    ("was", "now", "target_value", "unchanged_value"),
    [
        ("a dog", "The 2 cats.", 1.0, 0.0),
        ("Dog!", "the dog", 0.0, 1.0),
        ("two cats", "two cat", 0.0, 0.0),
        ("", "", 0.0, 1.0),
    ],
)
def test_generated_values(was, now, target_value, unchanged_value):
    before, after = Prediction([1], [2], was, edited=False), Prediction([1], [1], now, edited=True)
    assert score_generated(TARGET, before, after) == target_value
    assert score_generated(UNCHANGED, before, after) == unchanged_value
    assert base_score_generated(TARGET, before) == float(was == "two cats")
    assert base_score_generated(UNCHANGED, before) == 1.0


@pytest.mark.parametrize("measure", [score, score_generated])
def test_a_model_cannot_be_compared_with_itself(measure):
    before, after = Prediction([1], [2], "x", edited=False), Prediction([1], [1], "y", edited=True)
    measure(TARGET, before, after)
    for pair in [(before, before), (after, after), (after, before)]:
        with pytest.raises(ValueError, match="edited model"):
            measure(TARGET, *pair)
    with pytest.raises(ValueError, match="different answers"):
        measure(TARGET, before, Prediction([3], [3], "y", edited=True))
    with pytest.raises(TypeError):
        Prediction([1], [1], "y")


def test_readings_that_lack_something():
    before, after = Prediction([1], [2], edited=False), Prediction([1], [1], edited=True)
    for probe in (TARGET, UNCHANGED):
        with pytest.raises(ValueError, match="no generated text"):
            score_generated(probe, before, after)
    with pytest.raises(ValueError, match="expects a target"):
        score_generated(Probe("x", Query(None, "q"), "target"), before, after)
    with pytest.raises(ValueError, match="as many predictions"):
        Prediction([1, 2], [1], edited=True)
    with pytest.raises(ValueError, match="as many predictions"):
        token_accuracy([], [])
    with pytest.raises(ValueError, match="edited model"):
        base_score(TARGET, after)


def test_readings_take_arrays_and_hold_plain_integers():
    reading = Prediction(np.array([1, 2]), np.array([3, 4]), edited=False)
    assert reading == Prediction((1, 2), (3, 4), edited=False)
    assert type(reading.target_ids[0]) is int


@pytest.mark.parametrize("block", [7, 1_000_000])
def test_bootstrap_matches_a_loop(monkeypatch, block):
    monkeypatch.setattr("unike.evaluation.metrics._BLOCK", block)
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    mean, low, high = bootstrap_interval(values, seed=3, samples=500)
    generator = np.random.default_rng(3)
    means = []
    for _ in range(500):
        draws = [values[i] for i in generator.integers(0, len(values), len(values))]
        means.append(sum(draws) / len(draws))
    assert mean == pytest.approx(statistics.mean(values))
    assert (low, high) == pytest.approx((np.quantile(means, 0.025), np.quantile(means, 0.975)))


def test_bootstrap_of_groups_matches_a_loop():
    values, groups = [0.0, 1.0, 1.0, 0.5, 0.25], ["b", "a", "b", "c", "a"]
    generator = np.random.default_rng(3)
    named = {g: [v for v, own in zip(values, groups, strict=True) if own == g] for g in sorted(set(groups))}
    means = []
    for _ in range(500):
        drawn = [v for i in generator.integers(0, 3, 3) for v in list(named.values())[i]]
        means.append(sum(drawn) / len(drawn))
    mean, low, high = bootstrap_interval(values, seed=3, samples=500, groups=groups)
    assert mean == pytest.approx(statistics.mean(values))
    assert (low, high) == pytest.approx((np.quantile(means, 0.025), np.quantile(means, 0.975)))
    single = bootstrap_interval(values, seed=3, groups=range(5))
    assert single == bootstrap_interval(values, seed=3)


@settings(deadline=None, max_examples=50)
@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=30), seed=st.integers(0, 2**32 - 1))
def test_bootstrap_is_deterministic_and_bounded(values, seed):
    once = bootstrap_interval(values, seed, samples=200)
    assert once == bootstrap_interval(values, seed, samples=200)
    assert min(values) - 1e-9 <= once[1] <= once[2] <= max(values) + 1e-9
    narrow = bootstrap_interval(values, seed, samples=200, level=0.5)
    assert once[1] <= narrow[1]
    assert narrow[2] <= once[2]


def test_bootstrap_covers_the_true_mean():
    generator = random.Random(0)
    hits = 0
    for seed in range(100):
        _, low, high = bootstrap_interval([generator.gauss(5, 1) for _ in range(60)], seed, samples=400)
        hits += low <= 5 <= high
    assert 85 <= hits <= 100
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([], 0)


@given(values=st.lists(st.floats(0.01, 1), min_size=1))
def test_harmonic_mean(values):
    assert harmonic_mean(values) == pytest.approx(statistics.harmonic_mean(values))
    assert harmonic_mean([*values, 0.0]) == 0.0
    for wrong in ([], [-1.0]):
        with pytest.raises(ValueError, match="harmonic mean"):
            harmonic_mean(wrong)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat.", "cat"),
        ("  two   dogs!", "2 dogs"),
        ("ten", "10"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("don't", "dont"),
        ("t-shirt", "t shirt"),
        ("red,blue", "red blue"),
        ("A", "a"),
        ("an  a", "an a"),
        ("none", "0"),
        ("theatre", "theatre"),
        ("?!", "?!"),
        ("", ""),
    ],
)
def test_normalised_answers(text, normal):
    assert normalise_answer(text) == normal


@given(text=st.text() | st.text("aten 1,.':-\u2019"))
def test_normalising_twice_changes_nothing(text):
    assert normalise_answer(normalise_answer(text)) == normalise_answer(text)
