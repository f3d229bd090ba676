"""What is particular to MEND, KE and SERAC, and the way from a YAML to a trained editor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Project
from original_files import FAMILIES
from test_trained_methods import BASE, CASES, World, hparams, query
from untouched import hook_count

import run_edit
from scripts import prepare
from unike.backbones.base import encode_queries
from unike.backbones.hooks import tape
from unike.backbones.prefix import PrefixCache
from unike.methods.base import build
from unike.methods.training import compute_answer_gradients
from unike.types import EditRequest

EDITOR = {k: v for k, v in BASE.items() if k.startswith(("edit", "c_"))}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World("blip2", tmp_path_factory.mktemp("blip2"))


# ---------------------------------------------------------------- MEND


def test_an_untrained_mend_edits_with_the_normalised_gradient(world: World) -> None:
    method = build(hparams("mend"))
    method.start(world.backbone)
    prefixes = PrefixCache(world.backbone, 4)
    edit = method.edit(world.backbone, EditRequest("e", query(0)), prefixes)
    state = prefixes.state([query(0)])
    value = world.backbone.layout.ffn(5).value
    inputs, outputs = compute_answer_gradients(world.backbone, state, {"v": value})["v"]
    left, right = edit.factors[5, "value"]
    torch.testing.assert_close(right.T @ left, -BASE["edit_scale"] * outputs.T @ inputs, atol=1e-6, rtol=1e-3)


def test_every_shape_has_one_network_and_every_module_its_own_mode(world: World) -> None:
    network = world.method("mend").trained
    assert len(network.editors) == 2
    assert sorted(network.place.values()) == sorted((n, m) for n in network.editors for m in range(2))
    moved = [p.grad is None and not p.requires_grad for p in network.parameters()]
    assert all(moved)


def test_the_first_block_learns_from_the_start(world: World) -> None:
    method = build(hparams("mend"))
    method.start(world.backbone)
    method.loss(world.backbone, CASES[0], PrefixCache(world.backbone, 4)).backward()
    for editor in method.trained.editors.values():
        assert all(block.up.weight.grad.abs().sum() > 0 for block in editor.blocks)


# ---------------------------------------------------------------- KE


def test_the_multiplier_rises_while_the_constraint_is_broken(world: World, tmp_path: Path) -> None:
    def slope(margin: float) -> float:
        method = build(hparams("ke", ke_margin=margin))
        method.start(world.backbone)
        method.loss(world.backbone, CASES[0], PrefixCache(world.backbone, 4)).backward()
        return method.trained.multiplier.grad.item()

    assert slope(0.0) < 0 < slope(1e3)


def test_the_multiplier_never_falls_below_zero(world: World) -> None:
    method = build(hparams("ke"))
    method.start(world.backbone)
    method.trained.multiplier.data.fill_(-1.0)
    method.settle()
    assert method.trained.multiplier.item() == 0


# ---------------------------------------------------------------- SERAC


def serac(world: World, scope: str, bias: float):
    method = build(hparams("serac", serac_scope=scope))
    method.start(world.backbone)
    method.trained.requires_grad_(False)
    method.trained.scope.bias.fill_(bias)
    return method, PrefixCache(world.backbone, 4)


@pytest.mark.parametrize("scope", ["text", "multimodal"])
def test_the_classifier_never_sees_the_answer(world: World, scope: str) -> None:
    method, prefixes = serac(world, scope, 0.0)
    edits = [
        method.edit(world.backbone, EditRequest("e", query(0, a)), prefixes) for a in ("a fox", "two dogs")
    ]
    one, other = (e.records[0] for e in edits)
    torch.testing.assert_close(one.question, other.question, atol=1e-5, rtol=0)
    assert one.values.shape != other.values.shape or not torch.equal(one.values, other.values)
    scopes = []
    for answer in ("a fox", "the sea"):
        with edits[0].applied(world.backbone):
            world.logits(encode_queries(world.backbone, [query(0, answer)]))
        scopes.append(edits[0].explain()["scope"])
    assert scopes[0] == pytest.approx(scopes[1], abs=1e-5)


@pytest.mark.parametrize(("scope", "same"), [("text", True), ("multimodal", False)])
def test_only_the_multimodal_scope_sees_the_picture(world: World, scope: str, same: bool) -> None:
    method, prefixes = serac(world, scope, 0.0)
    edit = method.edit(world.backbone, EditRequest("e", query(0)), prefixes)
    with edit.applied(world.backbone):
        world.logits(encode_queries(world.backbone, [query(0), replace(query(0), image=query(3).image)]))
    own, other = edit.explain()["scope"]
    assert (own == pytest.approx(other, abs=1e-6)) == same


def test_out_of_scope_the_base_answers_bit_for_bit(world: World) -> None:
    batch = encode_queries(world.backbone, [query(0), query(1)])
    base = world.logits(batch)
    for bias, same in ((-100.0, True), (100.0, False)):
        method, prefixes = serac(world, "text", bias)
        edit = method.edit(world.backbone, EditRequest("e", query(0)), prefixes)
        with edit.applied(world.backbone):
            assert torch.equal(world.logits(batch), base) == same


def test_the_nearest_edit_answers(world: World) -> None:
    method, prefixes = serac(world, "multimodal", 100.0)
    first, second = (
        method.edit(world.backbone, EditRequest(f"e{i}", query(i, a)), prefixes)
        for i, a in enumerate(("a fox", "two dogs there"))
    )
    batch = encode_queries(world.backbone, [query(0), query(1)])
    with (first | second).applied(world.backbone):
        both = world.logits(batch)
    for row, alone in enumerate((first, second)):
        with alone.applied(world.backbone):
            torch.testing.assert_close(both[row], world.logits(batch)[row], atol=1e-5, rtol=0)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_and_output_gradients_make_up_the_weights_gradient(family: str, tmp_path: Path) -> None:
    backbone = World(family, tmp_path).backbone
    site = backbone.layout.ffn(4)
    modules = {f"key{j}": m for j, m in enumerate(site.keys)} | {"value": site.value}
    state = PrefixCache(backbone, 4).state([query(0)])
    gradients = compute_answer_gradients(backbone, state, modules)
    for key, module in modules.items():
        module.weight.requires_grad_(True)
        try:
            logits = backbone.suffix(state)
            goal = state.labels[0, 1:]
            at = goal != -100
            loss = torch.nn.functional.cross_entropy(logits[0, :-1][at], goal[at])
            (expected,) = torch.autograd.grad(loss, module.weight)
        finally:
            module.weight.requires_grad_(False)
        inputs, outputs = gradients[key]
        torch.testing.assert_close(outputs.T @ inputs, expected, atol=1e-6, rtol=1e-4)


def test_the_tape_takes_its_hooks_away(world: World) -> None:
    backbone = world.backbone
    hooks, value = hook_count(backbone.model), backbone.layout.ffn(5).value

    def fail_inside() -> None:
        with tape({"value": value}):
            assert hook_count(backbone.model) == hooks + 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert hook_count(backbone.model) == hooks


# ---------------------------------------------------------------- from a YAML


def yaml_of(project: Project, root: Path, method: str) -> tuple[Project, Path]:
    own = project.copy(root)
    for task in ("vqa", "caption"):
        records = json.loads((own.data / f"{task}_train.json").read_text())
        own.write_records(records * 2, task, "train")
    return own, own.write_yaml(method=method, editor_dir=str(root / "editors"), **EDITOR)


@pytest.mark.parametrize("method", ["mend", "serac", "ke"])
def test_prepare_trains_what_a_run_then_uses(project: Project, tmp_path: Path, method: str, capsys) -> None:
    _, path = yaml_of(project, tmp_path / "p", method)
    assert run_edit.main(["--hparams_dir", str(path), "--check"]) == 0
    assert "no editor of these options; trained first" in capsys.readouterr().out
    assert prepare.main(["--hparams_dir", str(path)]) == 0
    first = capsys.readouterr().out
    assert "20 records, 5 steps" in first
    assert prepare.main(["--hparams_dir", str(path)]) == 0
    folder = first.split("editor: ")[1].strip()
    assert capsys.readouterr().out.strip() == f"editor: {folder}"
    assert run_edit.main(["--hparams_dir", str(path), "--check"]) == 0
    assert "the editor is there" in capsys.readouterr().out
    out = tmp_path / "run"
    assert run_edit.main(["--hparams_dir", str(path), "--size", "2", "--output", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert "editor_dir" in json.dumps(manifest)


def test_a_run_trains_the_editor_that_is_not_there(project: Project, tmp_path: Path) -> None:
    own, path = yaml_of(project, tmp_path / "p", "mend")
    arguments = ["--hparams_dir", str(path), "--size", "1", "--output", str(tmp_path / "run")]
    assert run_edit.main(arguments) == 0
    assert len(list((own.root / "editors/mend").glob("*/editor.safetensors"))) == 1


def test_missing_train_data_is_found_before_anything_is_loaded(
    project: Project, tmp_path: Path, capsys
) -> None:
    own, path = yaml_of(project, tmp_path / "p", "mend")
    (own.data / "vqa_train.json").unlink()
    for arguments in (["--check"], ["--output", str(tmp_path / "run")]):
        assert run_edit.main(["--hparams_dir", str(path), *arguments]) == 2
        said = capsys.readouterr()
        assert "data.vqa.train" in said.out + said.err
