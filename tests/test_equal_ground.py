"""One protocol for all that learns: the same train cases, and training until validation stops improving."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers import Project
from test_trained_methods import CASES, METHODS, KilledError, World, hparams, killer, query

from scripts import prepare
from unike.backbones.base import answer_loss
from unike.backbones.hooks import transform
from unike.backbones.prefix import PrefixCache
from unike.config.hparams import HyperParams
from unike.edits.counterfactual import ScopeClassifier
from unike.methods.base import build
from unike.methods.constants import Constants
from unike.methods.meta_training import (
    CAP,
    PATIENCE,
    Progress,
    TrainableMethod,
    meta_train,
    split_by_scope,
)
from unike.methods.preparation.editors import ensure_editor, load_editor
from unike.methods.preparation.folders import find_editor, list_editor_options
from unike.methods.preparation.training_cases import INSIDE, OUTSIDE, make_training_cases
from unike.methods.training import compute_answer_gradients
from unike.system.files import write_index
from unike.types import Case, EditRequest, Query, UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World("blip2", tmp_path_factory.mktemp("blip2"))


# ---------------------------------------------------------------- the same cases for all


def test_train_cases_are_recombined_as_the_scope_classifier_reads_them() -> None:
    (taught,) = make_training_cases(CASES[:1])
    given = {p.name: p.query for p in CASES[0].probes}
    edit, far = CASES[0].request.query, given["m_locality"]
    expected = {
        "edit": (edit.image, edit.prompt),
        "rephrased": (edit.image, given["t_generality"].prompt),
        "rephrased image": (given["m_generality"].image, edit.prompt),
        "both rephrased": (given["m_generality"].image, given["t_generality"].prompt),
        "text only": (None, given["t_locality"].prompt),
        "unrelated": (far.image, far.prompt),
        "same question elsewhere": (far.image, edit.prompt),
        "other question here": (edit.image, far.prompt),
    }
    assert {p.name: (p.query.image, p.query.prompt) for p in taught.probes} == expected
    assert [p.expect for p in taught.probes] == ["target"] * len(INSIDE) + ["unchanged"] * len(OUTSIDE)
    assert {p.query.target for p in taught.probes if p.expect == "target"} == {edit.target}
    assert (taught.request, taught.task) == (CASES[0].request, CASES[0].task)


def test_a_record_without_a_probe_cannot_be_recombined() -> None:
    lacking = replace(CASES[0], probes=CASES[0].probes[:-2])
    with pytest.raises(UserError, match=r"^record c0: m_locality: missing"):
        make_training_cases([CASES[1], lacking])


@pytest.mark.parametrize(
    ("probes", "inside", "outside"),
    [("five", 3, 2), ("all", 3, 3), ("easyedit", 3, 1), ("recombined", 4, 4)],
)
def test_editors_train_on_the_probes_that_the_yaml_names(probes: str, inside: int, outside: int) -> None:
    (case,) = make_training_cases(CASES[:1]) if probes == "recombined" else CASES[:1]
    found = split_by_scope(case, probes, "eos")
    assert tuple(map(len, found)) == (inside, outside)
    assert {q.end for q in found[0]} == {"eos"}
    if probes == "easyedit":
        assert [q.image for q in found[1]] == [None]


@pytest.mark.parametrize("name", METHODS)
def test_an_editor_is_trained_on_recombined_records(world: World, name: str, monkeypatch, tmp_path) -> None:
    seen: list[tuple[str, ...]] = []

    def record(method: TrainableMethod, backbone, case: Case, prefixes: PrefixCache) -> torch.Tensor:
        seen.append(tuple(p.name for p in case.probes))
        return sum(p.sum() for p in method.trained.parameters()) * 0

    options = hparams(name, editor_dir=str(tmp_path), editor_steps=2)
    for probes in ("five", "recombined"):
        method = build(replace(options, editor_probes=probes))
        monkeypatch.setattr(type(method), "loss", record)
        monkeypatch.setattr(type(method), "validation", record)
        ensure_editor(method, world.backbone, lambda: [replace(CASES[i % 5]) for i in range(10)])
        expected = INSIDE + OUTSIDE if probes == "recombined" else tuple(p.name for p in CASES[0].probes)
        assert set(seen) == {expected}
        seen.clear()


def test_serac_can_be_trained_without_image_locality(world: World) -> None:
    """With EasyEdit's probes the unrelated question on its image is not looked at; with the five it is."""
    moved = [
        replace(p, query=replace(p.query, prompt="Question: quite another one?"))
        if p.name == "m_locality"
        else p
        for p in CASES[0].probes
    ]
    other = replace(CASES[0], probes=tuple(moved))
    losses = {}
    for probes in ("five", "easyedit"):
        method = build(hparams("serac", editor_probes=probes))
        method.start(world.backbone)
        prefixes = PrefixCache(world.backbone, method.layers(world.backbone)[0])
        with torch.no_grad():
            losses[probes] = [method.loss(world.backbone, c, prefixes).item() for c in (CASES[0], other)]
    assert losses["five"][0] != losses["five"][1]
    assert losses["easyedit"][0] == losses["easyedit"][1]


# ---------------------------------------------------------------- when training ends


def stop_slowly(losses: Sequence[float], every: int, patience: int, cap: int) -> tuple[int, int, str]:
    """Step, step of the best, and why it ended: by its definition, from the whole history at each step."""
    history: list[tuple[int, float]] = []
    step = 0
    while True:
        best = min((loss for _, loss in history), default=math.inf)
        first = next((s for s, loss in history if loss == best), 0)
        if len([s for s, _ in history if s > first]) >= patience:
            return step, first, PATIENCE
        if step >= cap:
            return step, first, CAP
        step += 1
        if step % every == 0 or step == cap:
            history.append((step, losses[len(history)]))


@pytest.mark.parametrize("seed", range(12))
def test_training_ends_by_patience_or_by_the_cap(world: World, seed: int, monkeypatch, tmp_path) -> None:
    drawn = torch.Generator().manual_seed(seed)
    losses = (torch.rand(60, generator=drawn) * 20).round().tolist()
    every, patience, cap = (int(torch.randint(1, n, (), generator=drawn)) for n in (4, 6, 30))
    options = {"editor_steps": cap, "editor_val_every": every, "editor_patience": patience}
    method, values = build(hparams("serac", **options)), iter(losses)
    seen: list[str] = []

    def judge(method, backbone, case: Case, prefixes) -> torch.Tensor:
        seen.append(case.request.id)
        return torch.tensor(next(values))

    monkeypatch.setattr(type(method), "validation", judge)
    monkeypatch.setattr(type(method), "loss", lambda own, *_: own.trained.scope.bias * 0)
    progress = meta_train(method, world.backbone, CASES, CASES[:1], method.hparams, tmp_path)
    found = (progress.step, progress.best_step, progress.stopped)
    assert found == stop_slowly(losses, every, patience, cap)
    assert progress.visits == 2 * progress.step
    assert progress.seconds > 0
    assert set(seen) == {"c0"}


def test_the_stopping_rule_meets_both_ends() -> None:
    falling, flat = [9.0 - i for i in range(9)], [1.0] * 9
    assert stop_slowly(falling, 1, 2, 5) == (5, 5, CAP)
    assert stop_slowly(flat, 1, 2, 5) == (3, 1, PATIENCE)


def test_each_validation_is_on_the_same_cases(world: World, monkeypatch, tmp_path: Path) -> None:
    method = build(hparams("mend", editor_steps=6, editor_val_every=2))
    seen: list[str] = []
    real = type(method).validation

    def watch(own, backbone, case: Case, prefixes) -> torch.Tensor:
        seen.append(case.request.id)
        return real(own, backbone, case, prefixes)

    monkeypatch.setattr(type(method), "validation", watch)
    meta_train(method, world.backbone, CASES, CASES[1:4], method.hparams, tmp_path)
    assert seen == ["c1", "c2", "c3"] * 3


def test_the_index_says_what_ended_training_and_a_binding_cap_is_warned_of(
    world: World, caplog, tmp_path: Path
) -> None:
    def train(**changes) -> dict:
        method = build(hparams("serac", editor_dir=str(tmp_path), **changes))
        with caplog.at_level(logging.WARNING, "unike"):
            folder = ensure_editor(method, world.backbone, lambda: [replace(c) for c in CASES * 2])
        return json.loads((folder / "editor.json").read_text())["training"]

    capped = train(editor_steps=3, editor_val_every=2)
    assert (capped["stopped"], capped["visits"]) == (CAP, 6)
    (line,) = caplog.messages
    assert "editor_steps: 3: training ended at this cap" in line
    caplog.clear()
    patient = train(editor_steps=400, editor_val_every=1, editor_patience=1, editor_lr=1.0)
    assert patient["stopped"] == PATIENCE
    assert patient["seconds"] > 0
    assert not caplog.messages
    assert "stopped: patience" in prepare.describe_training(patient)
    assert f"{patient['visits']} record visits" in prepare.describe_training(patient)


def test_files_from_before_training_said_how_it_ended_are_read(world: World, tmp_path: Path) -> None:
    options = hparams("mend", editor_dir=str(tmp_path / "editors"))
    method = build(options)
    folder = ensure_editor(method, world.backbone, lambda: [replace(c) for c in CASES * 2])
    index = folder / "editor.json"
    values = json.loads(index.read_text())
    assert "mend_scale_lr" not in values["options"]
    for name in ("stopped", "visits", "seconds"):
        del values["training"][name]
    del values["sha256"]
    write_index(index, values, folder / "editor.safetensors")
    assert find_editor(options) == folder
    again = build(options)
    load_editor(again, world.backbone, folder)
    assert all(torch.equal(v, again.trained.state_dict()[k]) for k, v in method.trained.state_dict().items())


def test_a_checkpoint_from_before_visits_were_counted_is_continued(world: World, tmp_path: Path) -> None:
    whole = build(hparams("mend"))
    expected = meta_train(whole, world.backbone, CASES, CASES[:2], whole.hparams, tmp_path / "whole")
    part = build(hparams("mend"))
    with pytest.raises(KilledError):
        meta_train(part, world.backbone, CASES, CASES[:2], part.hparams, tmp_path / "part", killer(9))
    index = tmp_path / "part/checkpoint.json"
    kept = json.loads(index.read_text())
    assert kept["progress"]["step"] == 2
    for name in ("stopped", "visits", "seconds"):
        del kept["progress"][name]
    del kept["sha256"]
    write_index(index, kept, index.parent / kept["tensors"])
    again = build(hparams("mend"))
    ticks: list[int] = []
    progress = meta_train(
        again,
        world.backbone,
        CASES,
        CASES[:2],
        again.hparams,
        tmp_path / "part",
        lambda _, n: ticks.append(n),
    )
    assert asdict(progress) | {"seconds": 0} == asdict(expected) | {"seconds": 0}
    assert ticks[0] == 4, "goes on from step 2"


def test_progress_has_no_end_before_there_is_one() -> None:
    assert Progress().stopped is None


# ---------------------------------------------------------------- what is constant is computed once


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("probes", ["five", "recombined"])
def test_losses_are_the_same_with_constants_kept(world: World, name: str, probes: str) -> None:
    method = build(hparams(name, editor_probes=probes, serac_scope="multimodal"))
    method.start(world.backbone)
    prefixes = PrefixCache(world.backbone, method.layers(world.backbone)[0], batch=1)
    cases = make_training_cases(CASES) if probes == "recombined" else CASES
    with torch.no_grad():
        # Something for the network to do: untrained, some of its parts are silent.
        for p in method.trained.parameters():
            p.add_(0.05 * torch.ones_like(p))

    def compute() -> list[torch.Tensor]:
        with torch.no_grad():
            return [method.loss(world.backbone, c, prefixes) for c in cases]

    plain = compute()
    method.constants = constants = Constants(1 << 30)
    first, second = compute(), compute()
    count = constants.computed
    assert count > 0
    assert plain == first == second
    assert len(set(map(float, plain))) == len(plain)
    compute()
    assert constants.computed == count
    with torch.no_grad():
        for p in method.trained.parameters():
            p.add_(0.05 * torch.ones_like(p))
    assert compute() != plain, "the network itself is not kept"


def test_constants_are_kept_up_to_their_bytes() -> None:
    kept = Constants(16)
    for name in ("a", "b", "a", "c", "b"):
        kept.get(name, lambda: (torch.zeros(2), {"x": torch.zeros(0)}))
    assert kept.computed == 4, "a and b fit; c takes b's place"
    assert torch.equal(kept.get("b", lambda: (torch.ones(2),))[0], torch.zeros(2))


def test_constants_are_given_up_after_training(world: World, tmp_path: Path) -> None:
    method = build(hparams("ke"))
    meta_train(method, world.backbone, CASES, CASES[:2], method.hparams, tmp_path)
    assert method.constants is None


def test_seracs_answer_loss_is_that_of_the_whole_model(world: World) -> None:
    """Computed where answers are predicted alone; by its definition, from the logits of all positions."""
    method = build(hparams("serac", c_loc=0.0, c_edit=1.0))
    method.start(world.backbone)
    method.trained.counterfactual.turn[1].weight.data.normal_(0, 0.3)
    backbone = world.backbone
    prefixes = PrefixCache(backbone, method.layers(backbone)[0])
    case = CASES[0]
    with torch.no_grad():
        record = method._remember(backbone, case.request, prefixes)
        state = prefixes.state(split_by_scope(case)[0])

        def answer(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            keys, values = (t.expand(len(x), *t.shape) for t in (record.keys, record.values))
            return output + method.trained.counterfactual(x, keys, values)

        last = backbone.layout.layer(len(backbone.layout) - 1)
        with transform([(last, last, answer)]):
            expected = answer_loss(backbone.suffix(state), state.labels).mean()
        found = method.loss(backbone, case, prefixes)
        plain = answer_loss(backbone.suffix(state), state.labels).mean()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert abs(plain - expected) > 1e-3, "the counterfactual model changes something"


def test_questions_read_together_are_those_read_one_by_one() -> None:
    torch.manual_seed(0)
    scope = ScopeClassifier(12, 6, multimodal=True)
    words = [torch.randn(n, 12) for n in (3, 7, 1, 4)]
    words.append(words[1])
    ends = torch.randn(5, 12)
    one_by_one, together = scope(words, ends), scope(words, ends, packed=True)
    torch.testing.assert_close(together, one_by_one, atol=1e-6, rtol=1e-5)
    for result in (one_by_one, together):
        scope.zero_grad()
        (result * torch.arange(30).view(5, 6)).sum().backward(retain_graph=True)
        result.gradients = [p.grad.clone() for p in scope.parameters() if p.grad is not None]
    for a, b in zip(one_by_one.gradients, together.gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(scope(words[:2], ends[:2]), scope(words[2:4], ends[2:4]))


# ---------------------------------------------------------------- KE in sequences


def read_gates(method: TrainableMethod, condition: torch.Tensor, site) -> list[torch.Tensor]:
    conditioner = method.trained.conditioners[method.trained.names[site]]
    return list(conditioner.net(condition).split(conditioner.sizes))


def test_kes_edit_is_made_from_the_base_models_gradient_whatever_came_before(world: World) -> None:
    backbone, method = world.backbone, world.method("ke")
    prefixes, request = world.prefixes("ke"), EditRequest("e", query(0))
    history = method.edit(backbone, EditRequest("h", query(1, "two dogs")), prefixes)
    history.factors = {at: (left, 200 * right) for at, (left, right) in history.factors.items()}
    alone = method.edit(backbone, request, prefixes)
    after = method.edit(backbone, request, prefixes, history)
    # By its definition: the dense gradient of the base model's weights, gated and shifted.
    state = prefixes.state([query(0)])
    site = (len(backbone.layout) - 1, "value")
    weight = backbone.layout.ffn(site[0]).value.weight
    weight.requires_grad_(True)
    loss = answer_loss(backbone.suffix(state), state.labels).mean()
    (gradient,) = torch.autograd.grad(loss, [weight])
    weight.requires_grad_(False)
    with torch.no_grad():
        condition = method.trained.read_condition(state.hidden[0])
        rows, columns, more_rows, more_columns, size = read_gates(method, condition, site)
        gated = gradient * torch.outer(rows.softmax(0) * len(rows), 1 + columns)
        offset = torch.outer(more_rows.softmax(0), more_columns)
        expected = -method.hparams.edit_scale * size.sigmoid() * (gated + offset)
    for edit in (alone, after):
        left, right = edit.factors[site]
        torch.testing.assert_close(right.T @ left, expected, atol=1e-6, rtol=1e-3)
    for at, (left, right) in alone.factors.items():
        assert torch.equal(left, after.factors[at][0])
        assert torch.equal(right, after.factors[at][1])
    # The history would have changed it.
    module = {site: backbone.layout.ffn(site[0]).value}
    bare, under = (compute_answer_gradients(backbone, state, module, h)[site][1] for h in (None, history))
    assert (bare - under).norm() > 0.01 * bare.norm()


# ---------------------------------------------------------------- MEND's step sizes


def test_mends_step_sizes_have_a_learning_rate_of_their_own(world: World, tmp_path: Path) -> None:
    """Adam's first step is the rate itself, whatever the gradient's size."""

    def move(**changes) -> tuple[torch.Tensor, torch.Tensor]:
        method = build(hparams("mend", editor_steps=1, editor_val_every=1, **changes))
        method.start(world.backbone)
        before = {k: v.clone() for k, v in method.trained.state_dict().items()}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        meta_train(method, world.backbone, CASES, CASES[:1], method.hparams, folder)
        after = method.trained.state_dict()
        shift = next(k for k in before if k.endswith("blocks.1.shift"))
        return ((after[k] - before[k]).abs().max() for k in ("log_scale", shift))

    scale, shift = move()
    assert (scale.item(), shift.item()) == pytest.approx((1e-2, 1e-2), rel=1e-3)
    scale, shift = move(mend_scale_lr=0.3)
    assert (scale.item(), shift.item()) == pytest.approx((0.3, 1e-2), rel=1e-3)


def test_the_option_is_part_of_an_editors_key_only_where_it_is_set() -> None:
    plain, own = hparams("mend"), hparams("mend", mend_scale_lr=0.1)
    assert list_editor_options(own).items() - list_editor_options(plain).items() == {("mend_scale_lr", 0.1)}
    assert "mend_scale_lr" not in list_editor_options(hparams("serac", mend_scale_lr=0.1))


def test_shipped_editors_have_their_key_still() -> None:
    for method in ("ke", "mend", "serac", "serac_multimodal"):
        options = HyperParams.from_hparams(f"hparams/{method}/tiny_blip2.yaml")
        folder = find_editor(options)
        assert folder is not None, method
        index = json.loads((folder / "editor.json").read_text())
        assert index["options"] == list_editor_options(options)


# ---------------------------------------------------------------- the command


def test_prepare_says_what_ended_training(copied: Project, capsys, caplog) -> None:
    train = [json.loads((copied.data / f"{task}_train.json").read_text()) for task in ("vqa", "caption")]
    copied.write_records((train[0] + train[1]) * 2, split="train")
    options = copied.options(
        method="mend", editor_probes="recombined", editor_rank=4, editor_steps=2, editor_val_every=1,
        editor_batch=2, editor_dir=str(copied.root / "editors"),
    )  # fmt: skip
    copied.yaml.write_text(yaml.safe_dump(options))
    assert prepare.main(["--hparams_dir", str(copied.yaml)]) == 0
    assert "2 steps, 4 record visits" in (out := capsys.readouterr().out)
    assert "stopped: cap" in out
    assert any("editor_steps: 2: training ended at this cap" in line for line in caplog.messages)
    assert prepare.main(["--hparams_dir", str(copied.yaml)]) == 0
    assert "stopped" not in capsys.readouterr().out


def test_mistaken_probes_are_refused_in_a_line(copied: Project, capsys) -> None:
    copied.write_yaml(method="mend", editor_probes="recombine", editor_dir=str(copied.root / "editors"))
    assert prepare.main(["--hparams_dir", str(copied.yaml)]) == 2
    assert "editor_probes: expected one of five, all, recombined, easyedit" in capsys.readouterr().err
    assert not (copied.root / "editors").exists()


def test_a_query_out_of_scope_keeps_its_own_target() -> None:
    (taught,) = make_training_cases(CASES[:1])
    probes = {p.name: p.query for p in taught.probes}
    assert probes["other question here"].target == probes["unrelated"].target == "two dogs"
    assert isinstance(probes["text only"], Query)
