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
    measure_passing,
)
from unike.methods.preparation.scope import load_scope, save_scope
from unike.system.files import read_index, write_index
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


def make_samples(n: int, few: list[bool] | None, wrong: list[bool] | None = None) -> ScopeSamples:
    """Edits whose queries in scope have states near the edit's own."""
    own = randn(n, 1, 3, WIDTH, seed=1)
    states = torch.cat(
        [own, *(own + 0.4 * randn(n, 1, 3, WIDTH, seed=s) for s in (2, 3)), randn(n, 2, 3, WIDTH, seed=4)], 1
    )
    mask = torch.ones(n, 5, 3, dtype=torch.bool)
    known = [None if row is None else torch.tensor(row) for row in (wrong, few)]
    return ScopeSamples(states, mask, 3, *known)


@pytest.mark.parametrize("are_few", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 0.985, 1.0])
def test_thresholds_by_recall_against_loops(share: float, are_few: bool) -> None:
    count, net = 24, encoder()
    few = [i % 3 == 0 for i in range(count)]
    samples = make_samples(count, few)
    passing = measure_passing(samples, net)
    assert {name: len(marks) for name, marks in passing.items()} == {"many": 101, "few": 101}
    similarity = compare_all(samples, net)
    # The edit itself is not among them: it passes always.
    own = sorted(similarity[i, j, i].item() for i in range(count) if few[i] == are_few for j in (1, 2))
    marks = []
    for percent in range(101):
        place = percent / 100 * (len(own) - 1)
        low = int(place)
        marks.append(own[low] + (place - low) * (own[min(low + 1, len(own) - 1)] - own[low]))
    assert list(passing["few" if are_few else "many"]) == pytest.approx(marks, abs=1e-5)
    level = TrainedScope(net, {1: 0.0}, passing).find_passed(share, are_few)
    at = (1 - share) * 100
    low = min(int(at), 99)
    assert level == pytest.approx(marks[low] + (at - low) * (marks[low + 1] - marks[low]), abs=1e-5)
    passed = sum(value >= level - 1e-6 for value in own) / len(own)
    assert passed >= share - 1.5 / len(own)
    assert passed <= share + 1.5 / len(own)


def test_more_recall_opens_for_more() -> None:
    scope = TrainedScope(encoder(), {1: 0.0}, measure_passing(make_samples(24, [False] * 24), encoder()))
    levels = [scope.find_passed(share, False) for share in (0.3, 0.6, 0.9)]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] > levels[2]


def test_recall_where_all_edits_are_of_one_kind() -> None:
    net = encoder()
    for few in ([True] * 24, [False] * 24):
        passing = measure_passing(make_samples(24, few), net)
        assert passing["few"] == passing["many"]
    mixed = measure_passing(make_samples(24, [i % 3 == 0 for i in range(24)]), net)
    assert mixed["few"] != mixed["many"]
    assert measure_passing(make_samples(24, None), net) == {}
    with pytest.raises(UserError, match="before shares were measured"):
        TrainedScope(net, {1: 0.0}).find_passed(0.9, False)


def test_which_answers_are_possible_changes_no_threshold_of_its_own() -> None:
    few, net = [i % 3 == 0 for i in range(24)], encoder()
    plain = calibrate(make_samples(24, None), net, 0)
    assert calibrate(make_samples(24, few), net, 0) == plain
    similarity = compare_all(make_samples(24, None), net)
    assert plain[0][24] == pytest.approx(max(plain[0][10], choose_threshold(similarity, 3)), abs=1e-6)
    assert plain[1][24] == pytest.approx(naive_shares(similarity, 3, plain[0][24]))


def test_shares_that_pass_are_kept_and_read(tmp_path: Path) -> None:
    shares = {1: [1.0] * 5, 24: [0.5] * 5}
    passing = {"many": [0.25, 0.5], "few": [0.5, 0.75]}
    report = ScopeReport({1: 0.25, 24: 0.5}, shares, passing, list("abcde"), [0.1])
    save_scope(tmp_path / "both", encoder(), report, {"seed": 0})
    read = load_scope(tmp_path / "both", encoder(1))
    assert read.thresholds == report.thresholds
    assert {name: list(marks) for name, marks in read.passing.items()} == passing
    assert not any(parameter.requires_grad for parameter in read.encoder.parameters())
    index = json.loads((tmp_path / "both" / "scope.json").read_text())
    assert index["held_out"]["24"] == dict.fromkeys("abcde", 0.5)
    report.passing = {}
    save_scope(tmp_path / "one", encoder(), report, {"seed": 0})
    assert "passing" not in json.loads((tmp_path / "one" / "scope.json").read_text())
    assert load_scope(tmp_path / "one", encoder(1)).passing == {}
    assert set(POOLS) == {1, 10, 100}


@pytest.mark.parametrize("passing", [{"many": [0.5]}, {"few": ["y", "z"]}, [0.5], {"few": None}])
def test_damaged_shares_are_refused_in_a_line(tmp_path: Path, passing: object) -> None:
    save_scope(tmp_path, encoder(), ScopeReport({1: 0.5}, {1: [1.0]}, queries=["a"]), {})
    index = read_index(tmp_path / "scope.json") | {"passing": passing}
    write_index(tmp_path / "scope.json", index, tmp_path / "scope.safetensors")
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
