"""Probes of a train record drawn anew at each visit: ``editor_queries``."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trained_methods import CASES, METHODS, World, hparams

from unike.methods import meta_training
from unike.methods.base import build
from unike.methods.meta_training import draw_probes, meta_train
from unike.methods.preparation.folders import list_editor_options
from unike.methods.preparation.training_cases import make_training_cases
from unike.types import Case, Probe

TAUGHT = make_training_cases(CASES)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World("blip2", tmp_path_factory.mktemp("blip2"))


@given(st.integers(0, 9), st.integers(0, 9), st.integers(2, 20), st.integers(0, 99))
def test_half_of_what_is_drawn_is_in_scope(inside: int, outside: int, count: int, seed: int) -> None:
    query = CASES[0].request.query
    sides = [("target", inside), ("unchanged", outside)]
    probes = tuple(Probe(f"{side} {i}", query, side) for side, n in sides for i in range(n))
    case = replace(CASES[0], probes=probes)
    drawn = draw_probes(case, count, "all", random.Random(seed))
    assert drawn.request is case.request
    names = [p.name for p in drawn.probes]
    # In their order, none twice.
    assert names == [p.name for p in probes if p.name in names]
    assert len(names) == min(count, inside + outside)
    found = sum(p.expect == "target" for p in drawn.probes)
    if inside + outside > count:
        assert found == min(inside, max((count + 1) // 2, count - outside))


def test_every_probe_is_drawn_now_and_then_and_only_what_is_trained_on() -> None:
    for probes, case in (("recombined", TAUGHT[0]), ("five", CASES[0]), ("easyedit", CASES[0])):
        counts: Counter[str] = Counter()
        for seed in range(200):
            counts.update(p.name for p in draw_probes(case, 2, probes, random.Random(seed)).probes)
        used = [p.name for p in case.probes if meta_training._is_used(p.name, probes)]
        assert counts.keys() == set(used)
        assert min(counts.values()) > 0.5 * 200 * 2 / len(used) / 2
    assert draw_probes(CASES[0], None, "five", random.Random(0)) is CASES[0]


@pytest.mark.parametrize("name", METHODS)
def test_training_sees_so_many_and_validation_all(world: World, name: str, monkeypatch, tmp_path) -> None:
    method = build(hparams(name, editor_probes="recombined", editor_queries=4, editor_steps=6))
    seen: dict[bool, list[tuple[str, ...]]] = {True: [], False: []}
    losses = {"loss": type(method).loss, "validation": type(method).validation}

    def note(own: str):
        def compute(self, backbone, case: Case, prefixes):
            seen[torch.is_grad_enabled()].append(tuple(p.name for p in case.probes))
            return losses[own](self, backbone, case, prefixes)

        return compute

    for own in losses:
        monkeypatch.setattr(type(method), own, note(own))
    method.start(world.backbone)
    meta_train(method, world.backbone, TAUGHT, TAUGHT[:2], method.hparams, tmp_path / "one")
    assert {len(names) for names in seen[True]} == {4}
    assert {len(names) for names in seen[False]} == {8}
    assert len(set(seen[True])) > 2, "drawn anew at each visit"
    first, trained = seen[True], meta_training.copy_tensors(method.trained.state_dict())
    # The draw depends on seed, step and record alone.
    seen[True] = []
    again = build(method.hparams)
    again.start(world.backbone)
    meta_train(again, world.backbone, TAUGHT, TAUGHT[:2], again.hparams, tmp_path / "two")
    assert seen[True] == first
    assert all(torch.equal(t, trained[n]) for n, t in again.trained.state_dict().items())
    whole = build(hparams(name, editor_probes="recombined", editor_steps=6))
    whole.start(world.backbone)
    meta_train(whole, world.backbone, TAUGHT, TAUGHT[:2], whole.hparams, tmp_path / "three")
    assert not all(torch.equal(t, trained[n]) for n, t in whole.trained.state_dict().items())


def test_the_number_is_part_of_an_editors_key_only_where_it_is_given() -> None:
    plain, own = hparams("ke"), hparams("ke", editor_queries=6)
    assert list_editor_options(own).items() - list_editor_options(plain).items() == {("editor_queries", 6)}
