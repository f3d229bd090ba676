"""The benchmarks on models of a few thousand parameters: that the reference and ours are one method, and
that rows become a table."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from untouched import hook_count
from worlds import World, case

from benchmarks import edit_speed, full_size, models, report
from benchmarks.kinks import find_kink
from benchmarks.measuring import Measurement, Measurements
from benchmarks.reference import Reference, WholeModel, concatenate_patches
from benchmarks.step_profile import Steps, profile_steps
from unike.config.hparams import HyperParams
from unike.methods import build
from unike.methods.unike import UniKE

FIXED = {"max_steps": 5, "stop_loss": 0.0, "key_init": "query", "beta": 0.1}
SMALL = models.make_opt_config(width=64, layers=5, vision_layers=2, vision_width=64, side=2, queries=4)


def method_of(world: World, **changes) -> UniKE:
    method = world.method("unike", {**FIXED, **changes})
    assert isinstance(method, UniKE)
    return method


def test_losses_and_logits_are_those_of_the_reference(world):
    method, asked = method_of(world), case(1)
    done = Reference(world.backbone, method).record(asked)
    ours = edit_speed.OurModes(world.backbone, method)
    records, _ = ours.make_records([asked], cached=False, batched=False)
    (apart,) = edit_speed.compare_records([done], records, ours.compute_logits([asked], batched=False))
    assert apart.is_within(edit_speed.TOLERANCE)
    changed = [(a - b).abs().max() for a, b in zip(done.after, done.before, strict=True)]
    assert min(changed) > 100 * edit_speed.TOLERANCE


def test_each_step_has_the_reference_s_loss(world):
    done = Reference(world.backbone, method_of(world)).record(case(1))
    for steps in range(1, len(done.losses)):
        method = method_of(world, max_steps=steps)
        edit = method.edit(world.backbone, case(1).request, world.prefixes(method))
        assert edit.info["loss"] == pytest.approx(done.losses[steps], abs=edit_speed.TOLERANCE)
    assert len(set(done.losses)) == 6


def test_both_stop_by_the_same_rule(world):
    method = method_of(world, max_steps=60, stop_loss=50.0, lr=5e-2, beta=0.0)
    done = Reference(world.backbone, method).record(case(1))
    edit = method.edit(world.backbone, case(1).request, world.prefixes(method))
    assert 0 < done.steps < 60
    assert edit.info["steps"] == done.steps


def test_side_by_side_is_compared_too(world):
    method, cases = method_of(world), [case(1), case(2)]
    done = [Reference(world.backbone, method).record(c) for c in cases]
    ours = edit_speed.OurModes(world.backbone, method)
    records, _ = ours.make_records(cases, cached=True, batched=True)
    logits = ours.compute_logits(cases, batched=True)
    assert all(a.is_within(edit_speed.TOLERANCE) for a in edit_speed.compare_records(done, records, logits))
    others = edit_speed.compare_records(done[::-1], records, logits)
    assert not any(a.is_within(100 * edit_speed.TOLERANCE) for a in others), "another record's results differ"


def test_the_reference_computes_everything_anew_and_leaves_the_model_as_it_was(world, monkeypatch):
    method, asked, seen = method_of(world), case(1), []
    vision = world.backbone.model.vision_model
    forward = vision.forward
    monkeypatch.setattr(vision, "forward", lambda *a, **k: seen.append(1) or forward(*a, **k))
    before, hooks = world.logits([asked.request.query]), hook_count(world.backbone.model)
    seen.clear()
    reference = Reference(world.backbone, method)
    reference.record(asked)
    # Four probes before and after, one of them text alone, its own states, and a pass a step.
    assert reference.whole.passes == 4 + 1 + 6 + 4
    assert len(seen) == reference.whole.passes - 2
    assert torch.equal(before, world.logits([asked.request.query]))
    assert hooks == hook_count(world.backbone.model)


def test_weights_are_concatenated_at_each_forward(world, monkeypatch):
    method, joined, request = method_of(world), [], case(1).request
    edit = method.edit(world.backbone, request, world.prefixes(method))
    patches = {i: share.patch for i, share in edit.records[0].layers.items()}
    cat = torch.cat

    def counted(tensors, dim=0, **rest):
        joined.append(tuple(getattr(t, "shape", ()) for t in tensors))
        return cat(tensors, dim=dim, **rest)

    with concatenate_patches(world.backbone, patches):
        whole = WholeModel(world.backbone)
        whole.open([request.query])
        monkeypatch.setattr(torch, "cat", counted)
        for passes in (1, 2):
            whole(request.query)
            site = world.backbone.layout.ffn(4)
            big = [shapes for shapes in joined if site.value.weight.shape in shapes]
            assert len(big) == passes * len(patches)


@pytest.mark.parametrize("change", [{"external": "none"}, {"memory_loss": 0.1}, {"intrinsic": False}])
def test_the_reference_refuses_what_it_does_not_do(world, change):
    with pytest.raises(ValueError, match="the reference has"):
        Reference(world.backbone, method_of(world, **change))


def small_world(given) -> edit_speed.TimedSetup:
    backbone = models.make_random_backbone(SMALL)
    hparams = HyperParams.from_dict({**models.PRESET, "max_steps": given.steps, "stop_loss": 0.0, "k": 5})
    method = build(hparams, models.draw_knowledge(backbone, backbone.layout.last(4), hparams, 30))
    assert isinstance(method, UniKE)
    cases = models.draw_cases(4, backbone.vision.image_size)
    return edit_speed.TimedSetup(backbone, method, [cases[:2], cases[2:]], 1, "wide, small")


def test_edit_speed_writes_rows_and_says_where_results_differ(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(edit_speed, "make_wide_setup", small_world)
    out = tmp_path / "speed.json"
    arguments = ["--steps", "3", "--rounds", "1", "--batch", "2", "--json", str(out)]
    assert edit_speed.main(arguments) == 0
    rows = [Measurement(**row) for row in json.loads(out.read_text())["rows"]]
    ratios = [row for row in rows if "reference / ours" in row.metric]
    assert [row.target for row in ratios] == [">= 4", ">= 10", ">= 10", ">= 25"]
    assert {row.runs for row in ratios} == {1}

    record = Reference.record

    def off(self, asked, nudge=0.0):
        done = record(self, asked, nudge)
        return replace(done, losses=[*done.losses[:-1], done.losses[-1] + 1e-3])

    monkeypatch.setattr(Reference, "record", off)
    assert edit_speed.main(arguments[:-2]) == 1


def test_edit_speed_refuses_numbers_below_one(capsys):
    with pytest.raises(SystemExit) as ended:
        edit_speed.main(["--rounds", "0"])
    assert ended.value.code == 2


def test_the_profile_counts_the_flops_of_a_step(capsys):
    rows = Measurements("edit_speed")
    profile_steps(rows, batch=2, runs=1, width=64)
    assert rows.rows[-1].target == ">= 0.5"
    backbone = models.make_random_backbone(SMALL)
    requests = [c.request for c in models.draw_cases(2, backbone.vision.image_size)]
    one, two = Steps(backbone, requests[:1]).count_flops(), Steps(backbone, requests).count_flops()
    # Twice the rows, nearly twice the matmuls; no fewer than the four layers' own forward.
    assert 1.8 * one < two < 2.2 * one
    tokens = 4 + len(backbone.prompt_and_answer(requests[0].query.prompt, requests[0].query.target)[0])
    assert one > 4 * 2 * 12 * 64**2 * tokens


def test_a_folder_of_random_weights_loads_through_unike(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "SHARD_BYTES", 1 << 18)
    folder = models.write_random_folder("blip2", tmp_path / "blip2", SMALL)
    assert len(list(folder.glob("*.safetensors"))) > 1
    backbone = models.load_full("blip2", folder)
    assert {p.dtype for p in backbone.model.parameters()} == {torch.bfloat16}
    hparams = models.make_full_hparams(2, 16)
    knowledge = models.write_knowledge(tmp_path / "known", 64, backbone.layout.last(4), hparams, 20)
    method = full_size.build_method(backbone, hparams, knowledge)
    spent = full_size.time_edit(backbone, method, models.draw_cases(1, backbone.vision.image_size)[0])
    assert min(spent.values()) > 0
    # What is there is not drawn again.
    files = [*folder.iterdir(), *knowledge.iterdir()]
    times = [p.stat().st_mtime_ns for p in files]
    models.write_random_folder("blip2", folder, SMALL)
    models.write_knowledge(knowledge, 64, backbone.layout.last(4), hparams, 20)
    assert times == [p.stat().st_mtime_ns for p in files]


@pytest.mark.parametrize("family", ["blip2", "minigpt4"])
def test_full_dimensions_are_those_of_the_published_models(family):
    with torch.device("meta"):
        model = models.Blip2ForConditionalGeneration(models.make_full_config(family))
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert billions == pytest.approx({"blip2": 3.74, "minigpt4": 7.83}[family], rel=0.01)


def test_rows_become_a_table_in_its_marked_place(tmp_path, capsys):
    def row(**changes) -> Measurement:
        plain = {
            "benchmark": "edit_speed", "case": "wide", "metric": "cold: reference / ours", "median": 5.678,
            "runs": 5, "unit": "x", "target": ">= 4", "command": "python -m benchmarks.edit_speed",
        }  # fmt: skip
        return Measurement(**{**plain, **changes})

    assert [row(median=m).is_met for m in (3.9, 4.0)] == [False, True]
    assert [row(median=m, target="<= 4").is_met for m in (4.0, 4.1)] == [True, False]
    assert row(target=None).is_met is None
    rows = Measurements("edit_speed")
    rows.rows = [row(), row(case="narrow", median=2.0, command="python -m benchmarks.other")]
    rows.write(tmp_path / "one.json")
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- benchmarks all -->\nreplaced\n<!-- end of benchmarks all -->\nbelow\n")
    assert report.main([str(tmp_path / "one.json"), "--write", str(page)]) == 0
    text = page.read_text()
    assert "| edit_speed | wide | cold: reference / ours | 5.68 x | 5 | ≥ 4 x | yes |" in text
    assert "| narrow | cold: reference / ours | 2 x | 5 | ≥ 4 x | **no** |" in text
    assert "python -m benchmarks.other" in text
    assert "replaced" not in text
    assert text.startswith("above")
    assert text.endswith("below\n")


def test_a_report_of_something_else_is_one_line_and_changes_nothing(tmp_path, capsys):
    wrong, page = tmp_path / "wrong.json", tmp_path / "page.md"
    wrong.write_text('{"rows": [{"benchmark": "x"}]}')
    page.write_text("untouched")
    assert report.main([str(wrong), "--write", str(page)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(wrong) in line
    wrong.write_text(json.dumps({"machine": {}, "rows": []}))
    assert page.read_text() == "untouched"


def test_a_neuron_that_fires_on_one_side_alone_is_found(world, monkeypatch):
    """At the second training step one pre-activation is moved across zero, by as little as rounding does."""
    backbone, method, asked = world.backbone, method_of(world), case(1)
    site, layers = backbone.layout.ffn(4), method.layers(backbone)
    run = partial(method.edit, backbone, asked.request, world.prefixes(method))
    assert find_kink(backbone, layers, run, run, 1e-5) is None
    forward = site.keys[0].forward

    def nudged(by: float):
        calls = []

        def changed(x):
            out = forward(x)
            if torch.is_grad_enabled():
                calls.append(1)
                if len(calls) == 2:
                    out[..., -1, 0] += by - out[..., -1, 0].detach()
            return out

        def edited():
            calls.clear()
            with monkeypatch.context() as patch:
                patch.setattr(site.keys[0], "forward", changed)
                run()

        return edited

    found = find_kink(backbone, layers, nudged(2e-7), nudged(-1e-7), 1e-5)
    assert found == (pytest.approx(2e-7, rel=0.1) if isinstance(site.activation, torch.nn.ReLU) else None)
    assert find_kink(backbone, layers, nudged(2e-7), nudged(1e-7), 1e-5) is None, "on the same side"
    assert find_kink(backbone, layers, nudged(2e-3), nudged(-1e-7), 1e-5) is None, "more than rounding"
