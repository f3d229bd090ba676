"""Thresholds of the scope classifier and its attention, and the overlap along an answer, against loops."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scope import WIDTH, encoder, naive_shares, randn
from torch import nn

from unike.knowledge.overlap import FEW, NextTokens, measure_overlap
from unike.knowledge.scope import (
    POOLS,
    ScopeEncoder,
    ScopeReport,
    ScopeSamples,
    TrainedScope,
    calibrate,
    choose_threshold,
    compare_all,
    score_scope,
)
from unike.methods.preparation.scope import load_scope, save_scope
from unike.types import UserError

# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_attention_is_torchs(heads: int) -> None:
    torch.manual_seed(heads)
    net = ScopeEncoder(WIDTH, 16, 6, heads).eval()
    whole = nn.MultiheadAttention(WIDTH, heads, batch_first=True)
    parts = (net.query, net.key, net.value)
    with torch.no_grad():
        for part in parts:
            part.bias.normal_()
        whole.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        whole.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        whole.out_proj.weight.copy_(torch.eye(WIDTH))
        whole.out_proj.bias.zero_()
    end, states = randn(3, WIDTH, seed=1), 3 * randn(3, 7, WIDTH, seed=2)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, :4], mask[1, 5:] = False, False
    found = net._attend(end, states, mask)
    expected, _ = whole(end[:, None], states, states, key_padding_mask=~mask)
    torch.testing.assert_close(found, expected[:, 0], atol=1e-5, rtol=1e-5)
    # What is masked does not count, what is not does.
    moved = states.clone()
    moved[0, 0] += 5
    assert torch.equal(net._attend(end, moved, mask)[0], found[0])
    moved[0, 5] += 5
    assert not torch.allclose(net._attend(end, moved, mask)[0], found[0], atol=1e-3)


# ---------------------------------------------------------------- thresholds


@pytest.mark.parametrize("seed", range(4))
def test_shares_by_a_threshold_for_each_edit_against_loops(seed: int) -> None:
    n, v, inside = 6, 5, 3
    similarity = randn(n, v, n, seed=seed).tanh()
    levels = randn(n, seed=seed + 10).tanh()
    found = score_scope(similarity, inside, levels)
    for i in range(n):
        for j in range(v):
            row = similarity[i, j].tolist()
            nearest = row.index(max(row))
            is_open = row[nearest] >= float(levels[nearest])
            right = is_open and nearest == i if j < inside else not is_open
            assert found[i, j].item() == float(right)
    alike = torch.full((n,), 0.3)
    assert torch.equal(score_scope(similarity, inside, alike), score_scope(similarity, inside, 0.3))
    assert 0 < found.mean() < 1
    assert not torch.equal(found, score_scope(similarity, inside, 0.3))


def naive_threshold(similarity: torch.Tensor, inside: int, rows: list[int]) -> float:
    """The middle one of those with the best harmonic mean, over some of the edits."""
    best: list[float] = []
    most = -1.0
    for number in range(401):
        level = -1 + number / 200
        right = torch.stack([score_scope(similarity, inside, level)[i] for i in rows]).mean(0).tolist()
        mean = len(right) / sum(1 / max(share, 1e-6) for share in right)
        if mean > most + 1e-9:
            best, most = [level], mean
        elif mean >= most - 1e-9:
            best.append(level)
    return best[len(best) // 2]


def make_samples(n: int, few: list[bool] | None, wrong: list[bool] | None = None) -> ScopeSamples:
    """Edits whose queries in scope have states near the edit's own."""
    own = randn(n, 1, 3, WIDTH, seed=1)
    states = torch.cat(
        [own, *(own + 0.4 * randn(n, 1, 3, WIDTH, seed=s) for s in (2, 3)), randn(n, 2, 3, WIDTH, seed=4)], 1
    )
    mask = torch.ones(n, 5, 3, dtype=torch.bool)
    known = [None if row is None else torch.tensor(row) for row in (wrong, few)]
    return ScopeSamples(states, mask, 3, *known)


@pytest.mark.parametrize("recall", [0.5, 0.9, 1.0])
def test_thresholds_by_recall_against_loops(recall: float) -> None:
    count, net = 24, encoder()
    few = [i % 3 == 0 for i in range(count)]
    samples = make_samples(count, few)
    thresholds, strict, shares = calibrate(samples, net, 0, recall)
    similarity = compare_all(samples, net)
    assert set(thresholds) == set(strict) == set(shares) == {1, 10, count}
    own = sorted(
        similarity[i, j, i].item() for i in range(count) if not few[i] for j in range(samples.inside)
    )
    place = (1 - recall) * (len(own) - 1)
    low, part = int(place), place - int(place)
    expected = own[low] + part * (own[min(low + 1, len(own) - 1)] - own[low])
    for level in thresholds.values():
        assert level == pytest.approx(expected, abs=1e-6)
        passed = sum(value >= level - 1e-6 for value in own) / len(own)
        assert passed >= recall - 1 / len(own)
    # Among all edits nothing is left out, so that the loops need no draw.
    rows = [i for i in range(count) if few[i]]
    found = naive_threshold(similarity, samples.inside, rows)
    assert strict[count] == pytest.approx(max(found, strict[10]), abs=1e-5)
    assert sorted(strict.values()) == [strict[1], strict[10], strict[count]]
    levels = torch.tensor([strict[count] if f else thresholds[count] for f in few])
    assert shares[count] == pytest.approx(score_scope(similarity, samples.inside, levels).mean(0).tolist())


def test_more_recall_opens_for_more() -> None:
    samples, net = make_samples(24, [i % 3 == 0 for i in range(24)]), encoder()
    levels = [calibrate(samples, net, 0, recall)[0][24] for recall in (0.3, 0.6, 0.9)]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] > levels[2]


def test_without_recall_one_threshold_decides_for_all() -> None:
    few, net = [i % 3 == 0 for i in range(24)], encoder()
    plain = calibrate(make_samples(24, None), net, 0)
    assert calibrate(make_samples(24, few), net, 0) == plain
    assert plain[1] == {}
    similarity = compare_all(make_samples(24, None), net)
    assert plain[0][24] == pytest.approx(max(plain[0][10], choose_threshold(similarity, 3)), abs=1e-6)
    assert plain[2][24] == pytest.approx(naive_shares(similarity, 3, plain[0][24]))


def test_recall_where_all_edits_are_of_one_kind() -> None:
    net = encoder()
    best = calibrate(make_samples(24, None), net, 0)
    # All have few possible answers, or nobody knows: what decides best decides.
    for few in ([True] * 24, None):
        assert calibrate(make_samples(24, few), net, 0, 0.9) == best
    # All have many: recall is theirs, and what decides best is for others that may come.
    thresholds, strict, _ = calibrate(make_samples(24, [False] * 24), net, 0, 0.9)
    similarity = compare_all(make_samples(24, None), net)
    own = similarity[torch.arange(24), :3, torch.arange(24)]
    assert thresholds[24] == pytest.approx(own.quantile(0.1).item(), abs=1e-6)
    assert strict == best[0]
    assert thresholds[24] != pytest.approx(strict[24], abs=1e-4)


def test_recall_is_of_the_edits_that_the_base_gets_wrong() -> None:
    net, count = encoder(), 32
    few, wrong = [i % 3 == 0 for i in range(count)], [i % 8 != 1 for i in range(count)]
    kept = torch.tensor(wrong).nonzero().flatten()
    whole = make_samples(count, few)
    part = ScopeSamples(whole.states[kept], whole.mask[kept], 3, None, whole.few[kept])
    assert calibrate(make_samples(count, few, wrong), net, 0, 0.9) == calibrate(part, net, 0, 0.9)
    assert calibrate(make_samples(count, few, wrong), net, 0, 0.9) != calibrate(whole, net, 0, 0.9)


def test_a_kind_of_edit_has_its_own_threshold() -> None:
    scope = TrainedScope(encoder(), {1: 0.1, 10: 0.3}, {1: 0.5, 10: 0.9})
    for edits, many, few in ((1, 0.1, 0.5), (10, 0.3, 0.9), (99, 0.3, 0.9)):
        assert scope.find_threshold(edits) == pytest.approx(many)
        assert scope.find_threshold(edits, are_few=True) == pytest.approx(few)
    part = math.log(4) / math.log(10)
    assert scope.find_threshold(4, are_few=True) == pytest.approx(0.5 + part * 0.4)
    plain = TrainedScope(encoder(), {1: 0.1, 10: 0.3})
    assert plain.find_threshold(4, are_few=True) == plain.find_threshold(4) == pytest.approx(0.1 + part * 0.2)


def test_strict_thresholds_are_kept_and_read(tmp_path: Path) -> None:
    shares = {1: [1.0] * 5, 24: [0.5] * 5}
    report = ScopeReport({1: 0.25, 24: 0.5}, shares, {1: 0.75, 24: 0.875}, list("abcde"), [0.1])
    save_scope(tmp_path / "both", encoder(), report, {"seed": 0})
    read = load_scope(tmp_path / "both", encoder(1))
    assert (read.thresholds, read.strict) == (report.thresholds, report.strict)
    assert not any(parameter.requires_grad for parameter in read.encoder.parameters())
    index = json.loads((tmp_path / "both" / "scope.json").read_text())
    assert index["held_out"]["24"] == dict.fromkeys("abcde", 0.5)
    report.strict = {}
    save_scope(tmp_path / "one", encoder(), report, {"seed": 0})
    assert "strict" not in json.loads((tmp_path / "one" / "scope.json").read_text())
    assert load_scope(tmp_path / "one", encoder(1)).strict == {}
    assert set(POOLS) == {1, 10, 100}


@pytest.mark.parametrize("strict", [{"x": 1}, {"1": "y"}, [0.5], {"1": None}])
def test_damaged_strict_thresholds_are_refused_in_a_line(tmp_path: Path, strict: object) -> None:
    report = ScopeReport({1: 0.5}, {1: [1.0]}, queries=["a"])
    report.strict = strict
    save_scope(tmp_path, encoder(), report, {})
    with pytest.raises(UserError, match=r"scope\.safetensors: expected a scope classifier") as caught:
        load_scope(tmp_path, encoder())
    assert len(caught.value.problems) == 1


# ---------------------------------------------------------------- overlap along an answer

VOCABULARY = 5


@st.composite
def next_tokens(draw: st.DrawFn, length: int | None = None, most: int = 3) -> NextTokens:
    """Few words, so that greedy answers agree now and then."""
    rows = draw(st.integers(1, 4)) if length is None else length
    ids, shares = list[list[int]](), list[list[float]]()
    for _ in range(rows):
        order = draw(st.permutations(range(VOCABULARY)))[:most]
        values = draw(st.lists(st.floats(0.01, 1), min_size=most, max_size=most))
        ids.append(order)
        shares.append([value / (1.3 * sum(values)) for value in sorted(values, reverse=True)])
    return NextTokens(torch.tensor(ids), torch.tensor(shares))


def overlap_slowly(one: NextTokens, other: NextTokens) -> float:
    """By loops: the least along the other one's answer, up to where the two part."""
    found = []
    for row in range(len(other.ids)):
        if row == len(one.ids):
            found.append(0.0)
            break
        p, q = (
            dict(zip(kept.ids[row].tolist(), kept.probabilities[row].tolist(), strict=True))
            for kept in (one, other)
        )
        whole = math.sqrt(sum(p.values()) * sum(q.values()))
        found.append(sum(math.sqrt(p[token] * q[token]) for token in p if token in q) / whole)
        if one.ids[row, 0] != other.ids[row, 0]:
            break
    return min(found)


@settings(max_examples=60, deadline=None)
@given(one=next_tokens(), others=st.lists(next_tokens(), min_size=1, max_size=4))
def test_the_overlap_of_answers_of_any_length_against_loops(
    one: NextTokens, others: list[NextTokens]
) -> None:
    found = measure_overlap(one, others).tolist()
    assert found == pytest.approx([overlap_slowly(one, other) for other in others], abs=1e-5)
    assert all(-1e-6 <= value <= 1 + 1e-5 for value in found)
    # The others do not change each other's.
    assert found == pytest.approx([measure_overlap(one, [other]).item() for other in others], abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), length=st.integers(1, 4))
def test_it_is_symmetric_for_equal_lengths_and_1_with_itself(data: st.DataObject, length: int) -> None:
    one, other = (data.draw(next_tokens(length)) for _ in range(2))
    assert measure_overlap(one, [other]).item() == pytest.approx(
        measure_overlap(other, [one]).item(), abs=1e-6
    )
    assert measure_overlap(one, [one, other])[0].item() == pytest.approx(1, abs=1e-5)


def test_the_overlap_tells_words_apart() -> None:
    """Later words count as long as the earlier ones agree, and none after two answers part."""
    sure = torch.tensor([[0.9, 0.1]])
    cat, dog = torch.tensor([[1, 2]]), torch.tensor([[2, 1]])
    red = [NextTokens(torch.cat([cat, last]), sure.repeat(2, 1)) for last in (cat, dog)]
    two = 2 * math.sqrt(0.09)
    assert measure_overlap(red[0], red).tolist() == pytest.approx([1, two], abs=1e-6)
    blue = NextTokens(torch.cat([dog, dog]), sure.repeat(2, 1))
    far = NextTokens(torch.cat([dog, torch.tensor([[3, 4]])]), sure.repeat(2, 1))
    assert measure_overlap(red[0], [blue, far]).tolist() == pytest.approx([two, two], abs=1e-6)
    # An answer that goes on where the other has ended is another one.
    assert measure_overlap(NextTokens(cat, sure), [red[0]]).item() == 0
    assert measure_overlap(NextTokens(cat, sure), [NextTokens(torch.tensor([[3, 4]]), sure)]).item() == 0


@pytest.mark.parametrize(
    ("shares", "few"),
    [
        ([0.5, 0.48], True),
        ([0.97], False),
        ([0.99], True),
        ([0.5, 0.4, 0.1], False),
        ([FEW - 0.01, 0.02], True),
    ],
)
def test_few_answers_are_possible_where_two_take_nearly_all(shares: list[float], few: bool) -> None:
    later = [[1 / len(shares)] * len(shares)]
    kept = NextTokens(torch.arange(len(shares)).repeat(2, 1), torch.tensor([shares, *later]))
    assert kept.are_few is few
