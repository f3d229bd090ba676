"""Preparation at full width: batches of one length, a pooled classifier from records to files, and what it
takes, told beforehand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_scope import case, hparams
from test_scope_scale import ROOT, WIDTHS, count_parameters
from worlds import World

from benchmarks import scope_scale
from benchmarks.measuring import Measurements
from scripts import prepare
from unike.config.hparams import HyperParams
from unike.datasets.triplets import make_triplets
from unike.methods.preparation.batches import group_by_length, open_preparation
from unike.methods.preparation.folders import find_scope_classifier
from unike.methods.preparation.knowledge import extract_states
from unike.methods.preparation.scope import (
    collect_scope_samples,
    ensure_scope,
)
from unike.methods.preparation.training_cases import INSIDE, OUTSIDE, make_training_cases
from unike.methods.registry import MethodNeeds
from unike.runs import costs
from unike.runs.costs import TEXT_TOKENS, estimate_scope, read_model_size
from unike.runs.inspecting import check_effects
from unike.types import UserError

# ---------------------------------------------------------------- batched preparation


def test_batches_hold_queries_of_one_length(world: World) -> None:
    queries = [p.query for c in make_training_cases([case(i) for i in range(4)]) for p in c.probes]
    for most in (1, 3, 100):
        batches = group_by_length(world.backbone, queries, most)
        assert sorted(i for part in batches for i in part) == list(range(len(queries)))
        assert max(len(part) for part in batches) <= most
        for part in batches:
            texts = {len(world.backbone.tokens(f"{queries[i].prompt} {queries[i].target}")) for i in part}
            assert len({queries[i].image is None for i in part}) == len(texts) == 1
    assert len(batches) < len(queries) / 2


def test_batched_preparation_finds_what_single_queries_find(world: World) -> None:
    cases = [case(i % 4, "a fox" if i else "two foxes") for i in range(5)]
    first = len(world.backbone.layout) - 2
    one, many = (
        collect_scope_samples(world.backbone, make_training_cases(cases), first, size) for size in (1, 32)
    )
    assert one.wrong is not None
    assert many.wrong is not None
    assert torch.equal(one.wrong, many.wrong)
    pairs = zip(one.rows.read(range(40)), many.rows.read(range(40)), strict=True)
    assert all(torch.allclose(a.float(), b.float(), atol=2e-3, rtol=0) for a, b in pairs)
    # Rows are in the queries' order: another query's row is another.
    assert not torch.allclose(
        one.rows.read([0])[0][-1].float(), many.rows.read([5])[0][-1].float(), atol=2e-3
    )
    triplets = make_triplets(world.train)
    alone, batched = (extract_states(world.backbone, triplets, [4, 5], size) for size in (1, 32))
    for i in (4, 5):
        assert alone[i].items == batched[i].items
        torch.testing.assert_close(alone[i].ffn, batched[i].ffn, atol=1e-4, rtol=0)
        for name in ("sem", "pos", "neg"):
            mine, other = (getattr(known[i].states, name) for known in (alone, batched))
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
            assert len(mine) < 2 or not torch.allclose(mine, other.roll(1, 0), atol=1e-4)


def test_afterwards_images_are_read_as_the_yaml_has_it(world: World, tmp_path: Path) -> None:
    for changes, during, after in (
        ({}, False, True),
        ({"prepare_batch": 1}, True, True),
        ({"batch_invariant": False}, False, False),
    ):
        options = hparams(tmp_path, **changes)
        with open_preparation(options, world.backbone, 4) as prefixes:
            assert (prefixes.alone, world.backbone.cache.alone) == (during, during)
        assert world.backbone.cache.alone == after


def test_a_pooled_classifier_is_trained_saved_and_read(world: World, tmp_path: Path) -> None:
    cases, first = [case(i % 4) for i in range(20)], len(world.backbone.layout) - 2
    options = hparams(
        tmp_path, scope_width=4, scope_tokens=5, scope_patience=2, scope_val_every=1, scope_steps=3,
        scope_memory_gb=0.0, scope_disk_gb=1.0, scope_hidden=None,
    )  # fmt: skip
    trained = ensure_scope(world.backbone, options, first, lambda: cases)
    assert trained.encoder.tokens == 5
    assert trained.encoder.query.weight.shape == (4, 4)
    folder = find_scope_classifier(options)
    assert folder is not None
    index = json.loads((folder / "scope.json").read_text())
    assert index["width"] == 4
    course = index["training"]
    assert course["stopped"] in ("patience", "cap")
    assert course["record_visits"] == 4 * course["steps"]
    assert list(course["held_losses"]) == [str(step) for step in range(1, course["steps"] + 1)]
    assert course["seconds"] >= 0
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    again = ensure_scope(world.backbone, options, first, list)
    assert torch.equal(again.encoder.squeeze.weight, trained.encoder.squeeze.weight)  # type: ignore[union-attr]


def test_what_does_not_fit_is_said(world: World, tmp_path: Path) -> None:
    first = len(world.backbone.layout) - 2
    small = hparams(tmp_path, scope_memory_gb=0.0, scope_disk_gb=1e-9)
    with pytest.raises(
        UserError, match=r"scope states: they take .* set scope_tokens, or raise scope_disk_gb"
    ):
        ensure_scope(world.backbone, small, first, lambda: [case(0)] * 20)
    with pytest.raises(UserError, match=r"x\.yaml: scope_heads: heads 2: expected a divisor of the width 3"):
        ensure_scope(world.backbone, hparams(tmp_path, scope_width=3), first, lambda: [case(0)] * 20)
    assert find_scope_classifier(small) is None
    with pytest.raises(UserError, match="scope_val_every: has no effect with scope_patience: null"):
        check_effects(hparams(tmp_path, scope_val_every=7), ["scope_val_every"])
    check_effects(hparams(tmp_path, scope_val_every=7, scope_patience=2), ["scope_val_every"])


# ---------------------------------------------------------------- what it takes, beforehand


def write_config(folder: Path) -> HyperParams:
    """LLaVA-1.5-7B's sizes."""
    text = {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32064,
        "intermediate_size": 11008,
    }  # fmt: skip
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "image_size": 336, "patch_size": 14}
    config = {"text_config": text, "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config))
    changes = [f"name={folder}", f"scope_dir={folder / 'scope'}", "device=cpu", "dtype=float32"]
    changes.append("scope_probes=recombined")
    return HyperParams.from_hparams(ROOT / "hparams/scoped/llava.yaml", changes)


def test_costs_against_arithmetic(tmp_path: Path) -> None:
    options = write_config(tmp_path)
    size = read_model_size(options)
    assert size is not None
    assert size.image_tokens + TEXT_TOKENS == 636
    # The published size, without the vision encoder.
    assert size.decoder == pytest.approx(6.74e9 - 4096 * 32000, rel=2e-3)
    cost = estimate_scope(options, size)
    queries = len(INSIDE + OUTSIDE)
    assert cost.states == 2000 * queries * 32 * 4096 * 2
    assert cost.memory == min(2 * 10**9, cost.states) == cost.states - cost.disk
    assert cost.parameters == count_parameters(4096, options)
    whole = estimate_scope(replace(options, scope_tokens=None, scope_width=4096), size)
    # What the classifier took before.
    assert whole.states == 2000 * queries * 636 * 4096 * 2 > 80e9
    assert whole.parameters > 118_000_000
    prompts = options.scope_steps * options.scope_batch * queries
    expected = sum(6 * (cost.parameters + 2 * 32 * 4096) for _ in range(options.scope_heads)) * prompts
    assert cost.training_flops == pytest.approx(expected)
    assert whole.training_flops > 10 * cost.training_flops
    half = estimate_scope(replace(options, scope_records=1000, scope_memory_gb=0.5), size)
    assert (half.states * 2, half.memory) == (cost.states, 5 * 10**8)
    hard = estimate_scope(replace(options, scope_probes="hard"), size)
    assert (cost.passes, cost.images) == (2000 * queries, 3)
    # Seven probes more; of each record three prompts are answered first, and five images are new.
    assert (hard.queries, hard.passes, hard.images) == (queries + 7, 2000 * (queries + 7 + 3), 8)


@pytest.mark.parametrize("changes", [{}, {"scope_width": 96, "scope_hidden": 33}, {"scope_width": 192}])
def test_parameters_are_counted_without_the_classifier(changes: dict[str, int]) -> None:
    options = HyperParams.from_dict({"model_name": "blip2", "name": "unused", **changes})
    for width in (192, *WIDTHS):
        assert costs.count_parameters(options, width) == count_parameters(width, options)


def test_the_notes_say_what_does_not_fit(tmp_path: Path) -> None:
    options, needs = write_config(tmp_path), MethodNeeds(knowledge=True, scope=True)
    notes = [f.line for f in costs.describe_costs(options, needs)]
    assert any("scope states: at most 2000 records" in n and "in memory" in n for n in notes)
    assert any("4.1 M parameters" in n and "forward passes, about" in n and "GFLOP/s" in n for n in notes)
    assert any("memory and encoders: at most 30000 forward passes" in n for n in notes)
    assert not any("scope_disk_gb" in n for n in notes)
    whole = replace(options, scope_tokens=None)
    assert any(
        "more than scope_disk_gb: 20; set scope_tokens" in f.line for f in costs.describe_costs(whole, needs)
    )
    assert costs.describe_costs(options, MethodNeeds()) == []
    absent = [f.line for f in costs.describe_costs(replace(options, device="cuda:77"), needs)]
    assert any("floating-point operations" in n and "speed is not known" in n for n in absent)
    (tmp_path / "config.json").write_text("{}")
    assert costs.describe_costs(options, needs) == []


def test_prepare_checks_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(prepare, "load", lambda _: pytest.fail("loads a model"))
    yaml = ["--hparams_dir", "hparams/scoped/tiny_blip2.yaml", "--check"]
    assert prepare.main([*yaml, f"scope_dir={tmp_path}", "scope_tokens=16"]) == 0
    shown = capsys.readouterr().out
    assert "x 16 states x 192 in half precision" in shown
    assert shown.rstrip().endswith("ready to run")
    # What is there takes nothing.
    assert prepare.main(yaml) == 0
    assert "scope states" not in capsys.readouterr().out
    assert prepare.main([*yaml, "name=/nowhere"]) == 2
    assert "✗" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_measures_and_extrapolates(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["scope_records=40", "scope_batch=4", "scope_width=32", "scope_memory_gb=0.0005"]
    changes.append("scope_probes=recombined")
    options = HyperParams.from_hparams(ROOT / "hparams/scoped/llava.yaml", changes)
    rows = Measurements("scope_scale")
    scope_scale.measure_training(options, 64, 2, rows)
    scope_scale.measure_reading(options, 64, 1, rows)
    found = {row.metric: row.median for row in rows.rows if "before" not in row.case}
    states = 40 * len(INSIDE + OUTSIDE) * 32 * 64 * 2 / 1e9
    kept = found["states in memory"], found["states on disk"]
    assert sum(kept) == pytest.approx(states)
    assert 0 < kept[0] <= 0.0005 < kept[1]
    assert found["parameters"] == pytest.approx(count_parameters(64, options) / 1e6)
    former = {row.metric: row.median for row in rows.rows if "before" in row.case}
    assert former["states, padded, in memory"] == pytest.approx(states * 636 / 32)
    assert found["largest difference of a state, batched from alone"] < 1e-2
    assert all(found[name] > 0 for name in found if "extrapolated" in name or "a forward pass" in name)
    assert "extrapolated" in capsys.readouterr().out
