"""How others compute locality, against naive versions of their definitions on random logits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unike.evaluation.metrics import PRESETS, Prediction, needs_ranks, ngram_entropy, preset_score, score
from unike.evaluation.reader import find_leaders
from unike.types import METRIC_PRESETS, Probe, Query

TEXT = Probe("t_locality", Query(None, "who?", "a dog"), "unchanged")
IMAGE = Probe("m_locality", Query("j.png", "who?", "a dog"), "unchanged")
TARGET = Probe("reliability", Query("i.png", "what?", "two cats"), "target")


def reading(logits: torch.Tensor, target: list[int], edited: bool) -> Prediction:
    """As the reader makes it: ``logits (s, v)`` of prompt and answer, the answer at their end."""
    best, ranked = find_leaders(logits)
    predicted = logits.argmax(-1)[-len(target) - 1 : -1].tolist()
    return Prediction(target, predicted, edited=edited, best=best, ranked=ranked)


def softmax(row: list[float]) -> list[float]:
    most = max(row)
    powers = [math.exp(value - most) for value in row]
    return [power / sum(powers) for power in powers]


def top(row: list[float], k: int) -> list[int]:
    probable = softmax(row)
    return sorted(range(len(row)), key=lambda token: -probable[token])[:k]


def naive_ranks(before: list[list[float]], after: list[list[float]], k: int) -> float:
    """EasyEdit: topk of the softmax at every position, flattened, share of equal entries."""
    one = [token for row in before for token in top(row, k)]
    other = [token for row in after for token in top(row, k)]
    equal = 0
    for a, b in zip(one, other, strict=True):
        equal += a == b
    return equal / len(one)


def naive_answer(before: list[list[float]], after: list[list[float]], n: int) -> float:
    """The release: argmax at the last n positions but the final one."""
    one = [top(row, 1)[0] for row in before[:-1][-n:]]
    other = [top(row, 1)[0] for row in after[:-1][-n:]]
    equal = 0
    for a, b in zip(one, other, strict=True):
        equal += a == b
    return equal / n


def naive(name: str, probe: Probe, before: list[list[float]], after: list[list[float]], n: int) -> float:
    if name in ("paper", "release"):
        return naive_answer(before, after, n)
    shared = min(len(before), len(after))
    before, after = before[-shared:], after[-shared:]
    return naive_ranks(before, after, 1 if name == "easyedit" and probe is TEXT else 10)


@pytest.mark.parametrize("probe", [TEXT, IMAGE], ids=["text", "image"])
@pytest.mark.parametrize("name", METRIC_PRESETS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    answer=st.integers(1, 4),
    lengths=st.tuples(st.integers(5, 14), st.integers(5, 14)),
    vocabulary=st.integers(10, 40),
    closeness=st.sampled_from([0.0, 0.05, 0.5, 2.0]),
)
def test_a_preset_is_its_definition(name, probe, seed, answer, lengths, vocabulary, closeness):
    generator = torch.Generator().manual_seed(seed)
    long = torch.randn(max(lengths), vocabulary, generator=generator)
    noise = closeness * torch.randn(long.shape, generator=generator)
    before, after = long[-lengths[0] :], (long + noise)[-lengths[1] :]
    target = torch.randint(vocabulary, (answer,), generator=generator).tolist()
    value = preset_score(name, probe, reading(before, target, False), reading(after, target, True))
    assert value == naive(name, probe, before.tolist(), after.tolist(), answer)


def test_the_definitions_differ_and_the_target_is_measured_alike():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(12, 30, generator=generator)
    after = before + 0.3 * torch.randn(before.shape, generator=generator)
    one, other = reading(before, [1, 2], False), reading(after, [1, 2], True)
    values = {name: preset_score(name, IMAGE, one, other) for name in PRESETS}
    assert len({values["paper"], values["easyedit"]}) == 2
    assert preset_score("easyedit", TEXT, one, other) != values["easyedit"]
    assert {preset_score(name, TARGET, one, other) for name in PRESETS} == {score(TARGET, one, other)}


def test_what_a_preset_needs():
    assert tuple(PRESETS) == METRIC_PRESETS
    assert not needs_ranks(["paper", "release"])
    assert needs_ranks(["paper", "easyedit"])
    bare = Prediction([1], [1], edited=False), Prediction([1], [1], edited=True)
    assert preset_score("release", IMAGE, *bare) == 1.0
    with pytest.raises(ValueError, match="no ranks"):
        preset_score("easyedit", IMAGE, *bare)
    ranked = reading(torch.randn(5, 12), [1], False)
    with pytest.raises(ValueError, match="unedited model"):
        preset_score("easyedit", IMAGE, ranked, ranked)
    with pytest.raises(ValueError, match="edited model"):
        preset_score("easyedit", IMAGE, replace(ranked, edited=True), replace(ranked, edited=True))


def naive_entropy(text: str) -> float:
    """ROME's, for words between spaces."""
    words, total = text.split(), 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        for gram in set(grams):
            share = grams.count(gram) / len(grams)
            total -= weight * share * math.log(share) / math.log(2)
    return total / 2


@given(words=st.lists(st.sampled_from(["a", "red", "dog", "sits"]), max_size=20))
def test_ngram_entropy(words):
    text = " ".join(words)
    assert ngram_entropy(text) == pytest.approx(naive_entropy(text), abs=1e-12)


def test_repetition_and_short_texts_have_no_entropy():
    assert ngram_entropy("dog dog dog dog dog") == ngram_entropy("a dog") == ngram_entropy("") == 0.0
    assert ngram_entropy("a dog, isn't it?") == ngram_entropy("a dog , isn't it ?") > 1.0
