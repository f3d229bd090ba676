"""The trained measure of scope: its loss and threshold against loops, its training, its files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from worlds import World
from worlds import case as short_case

from unike.config.hparams import HyperParams
from unike.knowledge.scope import (
    ScopeEncoder,
    ScopeSamples,
    TrainedScope,
    calibrate,
    choose_threshold,
    compare_all,
    fit_scope,
    scope_loss,
    score_scope,
    select_edits,
)
from unike.methods import check_method
from unike.methods.preparation.folders import find_scope_classifier
from unike.methods.preparation.scope import (
    collect_scope_samples,
    ensure_scope,
)
from unike.methods.preparation.training_cases import INSIDE, OUTSIDE, make_training_cases
from unike.types import Case, Probe, UserError

WIDTH = 8
HPARAMS = {
    "model_name": "blip2", "name": "unused", "scope_gate": "nearest", "scope_measure": "trained",
    "scope_threshold": None, "scope_hidden": 16, "scope_dim": 6, "scope_heads": 2, "scope_steps": 2,
    "scope_batch": 4, "scope_records": 20,
}  # fmt: skip


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoder(seed: int = 0, dropout: float = 0.0) -> ScopeEncoder:
    torch.manual_seed(seed)
    return ScopeEncoder(WIDTH, 16, 6, 2, dropout).eval()


def naive_loss(encoded: torch.Tensor, inside: int, tau: float) -> float:
    n, v = encoded.shape[:2]
    s = [[[float(encoded[i, j] @ encoded[k, 0]) / tau for k in range(n)] for j in range(v)] for i in range(n)]
    total = 0.0
    for k in range(n):
        far = [s[i][j][k] for i in range(n) for j in range(v) if i != k or j >= inside]
        for j in range(1, inside):
            own = s[k][j][k]
            total -= own - math.log(math.exp(own) + sum(math.exp(x) for x in far))
            total -= own - math.log(sum(math.exp(x) for x in s[k][j]))
    return total / n / (inside - 1)


def test_the_loss_against_a_loop() -> None:
    encoded = torch.nn.functional.normalize(randn(5, 4, 6), dim=-1)
    for inside, tau in ((2, 0.1), (3, 0.5)):
        assert scope_loss(encoded, inside, tau).item() == pytest.approx(
            naive_loss(encoded, inside, tau), rel=1e-4
        )


def test_the_loss_falls_where_neighbours_come_near_and_others_go_away() -> None:
    keys = torch.eye(3)[:, None]
    good = torch.cat([keys, keys, -keys], 1)
    bad = torch.cat([keys, -keys, keys], 1)
    assert scope_loss(good, 2, 0.1) < scope_loss(bad, 2, 0.1)


@settings(max_examples=30, deadline=None)
@given(left=st.integers(0, 4), right=st.integers(0, 4), noise=st.floats(-50, 50))
def test_padding_on_either_side_does_not_count(left: int, right: int, noise: float) -> None:
    states, net = randn(2, 5, WIDTH), encoder()
    padded = torch.full((2, left + 5 + right, WIDTH), noise)
    padded[:, left : left + 5] = states
    mask = torch.zeros(2, left + 5 + right, dtype=torch.bool)
    mask[:, left : left + 5] = True
    plain = net(states, torch.ones(2, 5, dtype=torch.bool))
    torch.testing.assert_close(net(padded, mask), plain, atol=1e-5, rtol=0)
    assert plain.norm(dim=-1).tolist() == pytest.approx([1, 1], abs=1e-5)


def test_a_prompt_lies_elsewhere_when_any_of_its_states_changes() -> None:
    states, net, mask = randn(1, 4, WIDTH), encoder(), torch.ones(1, 4, dtype=torch.bool)
    for place in range(4):
        moved = states.clone()
        moved[0, place] += randn(WIDTH, seed=place + 1)
        assert not torch.allclose(net(moved, mask), net(states, mask), atol=1e-4)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="divisor of the width 8"):
        ScopeEncoder(WIDTH, 16, 6, 3)


def naive_shares(similarity: torch.Tensor, inside: int, threshold: float) -> list[float]:
    n, v = similarity.shape[:2]
    right = [0] * v
    for i in range(n):
        for j in range(v):
            row = similarity[i, j].tolist()
            best = max(row)
            good = best >= threshold and row.index(best) == i if j < inside else best < threshold
            right[j] += good
    return [count / n for count in right]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.floats(-1, 1))
def test_shares_and_threshold_against_loops(seed: int, threshold: float) -> None:
    similarity = randn(4, 3, 4, seed=seed).tanh()
    shares = score_scope(similarity, 2, threshold).tolist()
    assert shares == pytest.approx(naive_shares(similarity, 2, threshold))

    def quality(t: float) -> float:
        return 3 / sum(1 / max(s, 1e-6) for s in naive_shares(similarity, 2, t))

    chosen = quality(choose_threshold(similarity, 2))
    assert chosen >= max(quality(t / 50 - 1) for t in range(101)) - 1e-6


def test_which_edits_are_open() -> None:
    similarity = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.1, 0.3], [0.7, 0.1, 0.7]])
    assert select_edits(similarity, 0.6, nearest=False).tolist() == [
        [True, True, False], [False] * 3, [True, False, True],
    ]  # fmt: skip
    # The same prompt edited twice: the newer edit holds.
    assert select_edits(similarity, 0.6, nearest=True).tolist() == [
        [True, False, False], [False] * 3, [False, False, True],
    ]  # fmt: skip


def learnable(count: int = 200) -> ScopeSamples:
    """Edits told apart by one half of their last token's state; the other half is noise."""
    states = 0.1 * randn(count, 4, 4, WIDTH, seed=1)
    states[:, :, 3] += 3 * randn(count, 4, WIDTH, seed=2)
    states[:, 1, 3, : WIDTH // 2] = states[:, 0, 3, : WIDTH // 2]
    return ScopeSamples(states.half(), torch.ones(count, 4, 4, dtype=torch.bool), 2)


def test_training_learns_what_untrained_encoders_do_not_know() -> None:
    samples = learnable()
    torch.manual_seed(0)
    nets = [ScopeEncoder(WIDTH, 64, 16, 2, 0.0) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    fits = zip(nets, (0, 200), strict=True)
    reports = [fit_scope(samples, net, steps, 64, 5e-3, 0.1, seed=1) for net, steps in fits]
    assert reports[1].losses[-1] < 0.5 * reports[1].losses[0]
    untrained, trained = (sum(r.shares[20]) / 4 for r in reports)
    assert trained > untrained + 0.1
    assert list(reports[1].thresholds) == [1, 10, 20]
    assert sorted(reports[1].thresholds.values()) == list(reports[1].thresholds.values())


def test_thresholds_are_for_edits_that_the_base_gets_wrong() -> None:
    samples, net = learnable(60), encoder()
    half = torch.arange(60) < 30
    chosen = calibrate(replace(samples, wrong=half), net, 0)
    assert chosen == calibrate(samples[half.nonzero().flatten()], net, 0)
    assert list(chosen[0]) == [1, 10, 30]
    assert chosen != calibrate(samples, net, 0)
    # Too few of them: all count.
    assert calibrate(replace(samples, wrong=torch.arange(60) < 3), net, 0) == calibrate(samples, net, 0)
    alone = compare_all(samples, net)
    own = torch.stack([alone[i, :, i] for i in range(60)])
    first = calibrate(samples, net, 0)[0][1]
    expected = [(own[:, j] >= first) == (j < 2) for j in range(4)]
    assert calibrate(samples, net, 0)[1][1] == pytest.approx([e.float().mean().item() for e in expected])


def test_the_threshold_grows_with_the_logarithm_of_the_edits() -> None:
    measure = TrainedScope(encoder(), {1: 0.2, 10: 0.4, 100: 0.8})
    for edits, expected in ((0, 0.2), (1, 0.2), (10, 0.4), (100, 0.8), (5000, 0.8)):
        assert measure.find_threshold(edits) == pytest.approx(expected)
    assert measure.find_threshold(round(10**1.5)) == pytest.approx(0.6, abs=0.01)


def test_the_same_seed_learns_the_same() -> None:
    nets = [encoder(3, 0.1) for _ in range(3)]
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        torch.manual_seed(len(nets) + seed)
        fit_scope(learnable(), net, 3, 8, 1e-3, 0.1, seed)
    weights = [torch.cat([p.flatten() for p in net.parameters()]) for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    with pytest.raises(ValueError, match="19 edits; expected 20 or more"):
        fit_scope(learnable(19), nets[0], 1, 4, 1e-3, 0.1, 0)


def test_similarities_do_not_depend_on_the_batch() -> None:
    samples, net = learnable(), encoder()
    torch.testing.assert_close(compare_all(samples, net, 7), compare_all(samples, net, 64))


# ---------------------------------------------------------------- from records to files


def hparams(folder: Path, **changes: object) -> HyperParams:
    return HyperParams.from_dict({**HPARAMS, "scope_dir": str(folder), **changes}, source="x.yaml")


def case(i: int, answer: str = "a fox") -> Case:
    """A record with all five probes."""
    one, unrelated = short_case(i, answer), short_case(i + 1).request.query
    probe = Probe("m_locality", replace(unrelated, prompt="where?"), "unchanged")
    return replace(one, probes=(*(p for p in one.probes if p.name != "m_locality"), probe))


def test_a_record_is_asked_inside_and_outside_its_scope() -> None:
    one = case(0)
    asked = {p.name: p.query for p in make_training_cases([one])[0].probes}
    probes = {p.name: p.query for p in one.probes}
    assert asked["edit"] == one.request.query
    joint, elsewhere, here = (
        asked[name] for name in ("both rephrased", "same question elsewhere", "other question here")
    )
    assert (joint.image, joint.prompt) == (probes["m_generality"].image, probes["t_generality"].prompt)
    assert (elsewhere.image, elsewhere.prompt) == (probes["m_locality"].image, one.request.query.prompt)
    assert (here.image, here.prompt) == (one.request.query.image, probes["m_locality"].prompt)
    lacking = replace(one, probes=tuple(p for p in one.probes if p.name != "m_locality"))
    with pytest.raises(UserError, match="m_locality: missing"):
        make_training_cases([lacking])


def test_samples_are_the_prompts_states_without_the_answer(world: World) -> None:
    cases = [case(0), case(1)]
    first = len(world.backbone.layout) - 2
    others = [case(0, "quite another answer"), case(1)]
    samples = collect_scope_samples(world.backbone, make_training_cases(cases), first, batch=3).load_all()
    again = collect_scope_samples(world.backbone, make_training_cases(others), first, batch=64).load_all()
    assert samples.inside == len(INSIDE)
    assert samples.mask.shape[:2] == (2, len(INSIDE + OUTSIDE))
    assert torch.equal(samples.mask, again.mask)
    torch.testing.assert_close(samples.states, again.states, atol=2e-3, rtol=0)


def test_the_measure_is_learnt_once_and_read_afterwards(world: World, tmp_path: Path) -> None:
    hp, first, calls = hparams(tmp_path), len(world.backbone.layout) - 2, []
    cases = [case(i % 4) for i in range(20)]

    def given_cases() -> list:
        calls.append(1)
        return cases

    assert find_scope_classifier(hp) is None
    one = ensure_scope(world.backbone, hp, first, given_cases)
    two = ensure_scope(world.backbone, hp, first, given_cases)
    assert (len(calls), one.thresholds) == (1, two.thresholds)
    for name, tensor in one.encoder.state_dict().items():
        assert torch.equal(tensor, two.encoder.state_dict()[name])
    assert not any(p.requires_grad for p in two.encoder.parameters())
    folder = find_scope_classifier(hp)
    assert folder is not None
    held = json.loads((folder / "scope.json").read_text())["held_out"]
    assert all(list(shares) == list(INSIDE + OUTSIDE) for shares in held.values())
    assert find_scope_classifier(hparams(tmp_path, scope_steps=3)) is None
    save_file({"nothing": torch.zeros(1)}, folder / "scope.safetensors")
    with pytest.raises(UserError, match=r"scope\.safetensors: is damaged"):
        ensure_scope(world.backbone, hp, first, given_cases)


def test_what_is_missing_is_said(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.yaml: scope_dir: missing"):
        find_scope_classifier(hparams(tmp_path, scope_dir=None))
    with pytest.raises(UserError, match=r"x\.yaml: scope_measure: 19 train records; expected 20 or more"):
        ensure_scope(world.backbone, hparams(tmp_path), 4, lambda: [case(0)] * 19)
    with pytest.raises(UserError, match="scope_threshold: null; expected a number"):
        check_method(hparams(tmp_path, scope_measure="cosine"))
    check_method(hparams(tmp_path, scope_measure="cosine", scope_gate="none"))
