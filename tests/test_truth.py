"""No silent wrong answers: what is applied, which weights there are, which thread asks: all is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Project
from torch import nn
from untouched import hook_count, weights_of

from unike.backbones import guard, load_backbone
from unike.backbones.base import encode_queries
from unike.config.hparams import HyperParams
from unike.editor import MultimodalEditor
from unike.edits import Edit, WeightDelta
from unike.types import Query, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "Question: what is it? Short answer:"
METHODS: dict[str, dict[str, Any]] = {
    "unike": {},
    "ft": {"method": "ft", "layers": 1},
    "projection": {"method": "ft", "ft_target": "projection"},
    "ike": {"method": "ike", "ike_demonstrations": 0},
    "tpatcher": {"method": "tpatcher", "activation_loss": 0.1},
}

QUICK = METHODS["tpatcher"] | {"max_steps": 15}


@pytest.fixture(scope="module")
def loaded(blip2_project: Project) -> MultimodalEditor:
    return MultimodalEditor.from_hparams(blip2_project.yaml, progress=False)


@pytest.fixture
def editor(loaded: MultimodalEditor) -> Iterator[MultimodalEditor]:
    """An editor whose model must end as it began."""
    loaded._slot.put(())
    before, hooks = weights_of(loaded.backbone), hook_count(loaded.backbone.model)
    yield loaded
    loaded._slot.put(())
    after = loaded.backbone.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert hook_count(loaded.backbone.model) == hooks


def like(editor: MultimodalEditor, **changes: Any) -> MultimodalEditor:
    """An editor with other options on the same backbone."""
    hparams = HyperParams.from_dict(editor.hparams.to_dict() | changes, editor.hparams.source)
    return MultimodalEditor(hparams, editor.backbone, progress=False)


def load_fresh(project: Project, **changes: Any) -> MultimodalEditor:
    """An editor on a model of its own, with nothing in memory."""
    hparams = HyperParams.from_dict(project.options(**changes), str(project.yaml))
    return MultimodalEditor(hparams, load_backbone(hparams), progress=False)


def picture(project: Project, i: int = 0) -> str:
    return str(project.data / f"{i}.png")


def make(editor: MultimodalEditor, image: str, target: str = "a red fox") -> Edit:
    """An edit that is detached again."""
    _, edited, _ = editor.edit(PROMPT, target, image)
    (edit,) = edited.edits
    edited.remove()
    return edit


@torch.no_grad()
def logits(editor: MultimodalEditor, image: str) -> torch.Tensor:
    return editor.backbone(encode_queries(editor.backbone, [Query(image, PROMPT, "a red fox")])).logits


def tensors(edit: Edit) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in edit.state_dict().items()}


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


# ---------------------------------------------------------------- what a block applies


@pytest.mark.parametrize("name", METHODS)
def test_an_editor_answers_the_same_inside_a_block(
    editor: MultimodalEditor, blip2_project: Project, name: str
) -> None:
    image = picture(blip2_project)
    edit = make(like(editor, **METHODS[name]), image)
    base, base_logits = editor.generate(image, PROMPT), logits(editor, image)
    editor.attach(edit)
    edited = editor.generate(image, PROMPT, edited=True)
    editor.detach(edit.id)
    assert edited != base, "else nothing could differ"
    with edit.applied(editor.backbone):
        inside = logits(editor, image)
        assert name == "ike" or not torch.equal(inside, base_logits)
        assert editor.generate(image, PROMPT) == base
        assert editor.generate(image, PROMPT, edited=True) == base, "nothing is attached"
        explanation = editor.ask(image, PROMPT)
        assert (explanation.before, explanation.after, explanation.edits) == (base, base, ())
        # The block goes on after the editor's calls.
        assert torch.equal(logits(editor, image), inside)
        editor.attach(edit)
        explanation = editor.ask(image, PROMPT)
        assert (explanation.before, explanation.after) == (base, edited)
        assert editor.generate(image, PROMPT, edited=True) == edited
        assert editor.detach(edit.id) is edit
        assert torch.equal(logits(editor, image), inside)
    assert torch.equal(logits(editor, image), base_logits)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("applied", ["projection", "ft", "unike"])
def test_an_edit_made_inside_a_block_is_a_clean_one(
    editor: MultimodalEditor, blip2_project: Project, name: str, applied: str, tmp_path: Path
) -> None:
    image, other = picture(blip2_project), picture(blip2_project, 1)
    around = make(like(editor, **METHODS[applied]), other, "two dogs")
    options = METHODS[name] | {"prefix_dir": str(tmp_path / "states")}
    wanted = tensors(make(load_fresh(blip2_project, **METHODS[name]), image))
    with around.applied(editor.backbone):
        inside = tensors(make(like(editor, **options), image))
    assert are_equal(inside, wanted)
    # What was kept on disk is the base model's: a fresh process reads it.
    assert are_equal(tensors(make(load_fresh(blip2_project, **options), image)), wanted)
    if wanted:
        assert not are_equal(tensors(make(like(editor, **METHODS[name]), image, "two dogs")), wanted)


def test_the_fingerprint_is_the_base_models_inside_a_block(blip2_project: Project) -> None:
    plain = load_fresh(blip2_project).backbone
    backbone = load_backbone(HyperParams.from_hparams(blip2_project.yaml))
    name, weight = next(iter(backbone.model.named_parameters()))
    with WeightDelta({name: weight + 1}).applied(backbone):
        inside = backbone.fingerprint, backbone.identity
    assert inside == (plain.fingerprint, plain.identity) == (backbone.fingerprint, backbone.identity)
    changed = load_backbone(HyperParams.from_hparams(blip2_project.yaml))
    changed.model.get_parameter(name).add_(1)
    assert changed.fingerprint != plain.fingerprint
    assert changed.identity != plain.identity


def test_features_are_read_anew_under_an_edit_of_the_vision_side(
    editor: MultimodalEditor, blip2_project: Project
) -> None:
    """And those of the edited model are not kept as the base model's."""
    image, backbone = picture(blip2_project), editor.backbone
    name = next(n for n, _ in backbone.model.named_parameters() if n.startswith("vision_model"))
    weight = backbone.model.get_parameter(name)
    delta = WeightDelta(
        {name: weight + torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))}
    )
    backbone.cache.forget()
    with delta.applied(backbone):
        first = logits(editor, image)
    base = logits(editor, image)
    with delta.applied(backbone):
        second = logits(editor, image)
    assert torch.equal(first, second)
    assert not torch.equal(first, base)


def test_blocks_may_end_in_any_order(editor: MultimodalEditor, blip2_project: Project) -> None:
    image = picture(blip2_project)
    base = logits(editor, image)
    edits = [
        make(like(editor, **METHODS[n]), image, t) for n, t in (("ft", "a fox"), ("projection", "the sea"))
    ]
    alone = []
    for edit in edits:
        with edit.applied(editor.backbone):
            alone.append(logits(editor, image))
    one, other = (edit.applied(editor.backbone) for edit in edits)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert torch.equal(logits(editor, image), alone[1])
    editor.attach(edits[0])
    other.__exit__(None, None, None)
    assert torch.equal(logits(editor, image), alone[0])
    editor.detach(edits[0].id)
    assert torch.equal(logits(editor, image), base)


def test_a_block_within_a_block_and_an_error_leave_nothing(
    editor: MultimodalEditor, blip2_project: Project
) -> None:
    image = picture(blip2_project)
    base, edit = logits(editor, image), make(editor, image)
    with pytest.raises(ZeroDivisionError), edit.applied(editor.backbone), edit.applied(editor.backbone):
        print(editor.generate(image, PROMPT), 1 / 0)
    assert torch.equal(logits(editor, image), base)
    assert guard.Guard.of(editor.backbone).is_bare
    with pytest.raises(UserError), edit.applied(editor.backbone):
        editor.edit(PROMPT, "", image)
    assert torch.equal(logits(editor, image), base)


# ---------------------------------------------------------------- weights that are changed in place


class Adapter(nn.Module):
    """A low-rank adapter around a linear module, as a user would write one."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.enabled = inner, True
        generator = torch.Generator().manual_seed(1)
        self.down, self.up = (
            nn.Parameter(torch.randn(*shape, generator=generator)) for shape in
            ((2, inner.in_features), (inner.out_features, 2))
        )  # fmt: skip
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + (x @ self.down.T @ self.up.T if self.enabled else 0)


def _draw_noise(weight: torch.Tensor) -> torch.Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))


def _merge(model: nn.Module, at: str) -> None:
    weight = model.get_submodule(at).weight
    weight.data += _draw_noise(weight)


def _add(model: nn.Module, at: str) -> None:
    with torch.no_grad():
        model.get_submodule(at).weight[0, 0] += 1


def _assign(model: nn.Module, at: str) -> None:
    weight = model.get_submodule(at).weight
    weight.data = weight.data + _draw_noise(weight)


def _load(model: nn.Module, at: str) -> None:
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state[f"{at}.weight"] += _draw_noise(state[f"{at}.weight"])
    model.load_state_dict(state)


def _poke(model: nn.Module, at: str) -> None:
    model.get_submodule(at).weight.data.view(-1)[3] += 1


def _adapt(model: nn.Module, at: str) -> None:
    path, _, leaf = at.rpartition(".")
    setattr(model.get_submodule(path), leaf, Adapter(model.get_submodule(at)))


def _replace(model: nn.Module, at: str) -> None:
    module = model.get_submodule(at)
    module.weight = nn.Parameter(module.weight + _draw_noise(module.weight), requires_grad=False)


def _step(model: nn.Module, at: str) -> None:
    weight = model.get_submodule(at).weight
    weight.requires_grad_(True)
    weight.grad = _draw_noise(weight)
    torch.optim.SGD([weight], 5.0).step()
    weight.requires_grad_(False)
    weight.grad = None


def _halve(model: nn.Module, at: str) -> None:
    model.to(torch.bfloat16)


CHANGES: dict[str, Callable[[nn.Module, str], None]] = {
    "merged adapter": _merge, "in place": _add, "data assigned": _assign, "load_state_dict": _load,
    "one number by data": _poke, "adapter": _adapt, "parameter replaced": _replace, "optimiser": _step,
    "bfloat16": _halve,
}  # fmt: skip
PLACES = {
    "decoder": "language_model.model.decoder.layers.0.fc1",
    "vision": "vision_model.encoder.layers.0.mlp.fc1",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(
    blip2_project: Project, change: str, place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Answers, states and edits are those of a model that has had these weights from the start."""
    image, options = picture(blip2_project), {"prefix_dir": str(tmp_path / "states")}
    editor = load_fresh(blip2_project, **options, **QUICK)
    base, edit = editor.generate(image, PROMPT), make(editor, image)
    before, fingerprint, identity = (
        logits(editor, image),
        editor.backbone.fingerprint,
        editor.backbone.identity,
    )
    CHANGES[change](editor.backbone.model, PLACES[place])

    wanted = load_fresh(blip2_project, **QUICK)
    CHANGES[change](wanted.backbone.model, PLACES[place])
    asked, found = logits(wanted, image), logits(editor, image)
    assert not torch.equal(asked, before)
    assert torch.equal(asked, found)
    assert editor.generate(image, PROMPT) == wanted.generate(image, PROMPT)
    assert are_equal(tensors(make(editor, image)), tensors(make(wanted, image)))
    assert editor.backbone.fingerprint != fingerprint
    assert editor.backbone.identity not in (identity,)
    with pytest.raises(UserError, match="other weights"):
        editor.attach(edit)
    # The old states are still the old model's.
    fresh = load_fresh(blip2_project, **options, **QUICK)
    assert fresh.generate(image, PROMPT) == base
    assert are_equal(tensors(make(fresh, image)), tensors(edit))


def test_restored_weights_are_recognised(blip2_project: Project) -> None:
    image, editor = picture(blip2_project), load_fresh(blip2_project, **QUICK)
    edit, fingerprint = make(editor, image), editor.backbone.fingerprint
    state = {name: t.clone() for name, t in editor.backbone.model.state_dict().items()}
    editor.backbone.model.load_state_dict(state)
    assert editor.backbone.fingerprint == fingerprint, "the same numbers"
    _add(editor.backbone.model, PLACES["decoder"])
    assert editor.backbone.fingerprint != fingerprint
    editor.backbone.model.load_state_dict(state)
    editor.attach(edit)
    assert are_equal(tensors(make(editor, image)), tensors(edit))


def test_an_adapter_that_is_switched_is_noticed(blip2_project: Project) -> None:
    image, editor = picture(blip2_project), load_fresh(blip2_project, **QUICK)
    plain = tensors(make(editor, image))
    _adapt(editor.backbone.model, PLACES["decoder"])
    on, named = tensors(make(editor, image)), editor.backbone.fingerprint
    editor.backbone.model.get_submodule(PLACES["decoder"]).enabled = False
    assert editor.backbone.fingerprint != named
    assert are_equal(tensors(make(editor, image)), plain)
    assert not are_equal(on, plain)


@pytest.mark.parametrize("place", PLACES)
def test_a_foreign_hook_is_noticed_whatever_it_does(blip2_project: Project, place: str) -> None:
    """Its strength may change at any time: states below the edited layers are not kept while it is there."""
    image, editor = picture(blip2_project), load_fresh(blip2_project, **QUICK)
    plain = tensors(make(editor, image))
    strength = [0.5]
    module = editor.backbone.model.get_submodule(PLACES[place])
    handle = module.register_forward_hook(lambda *given: given[-1] + strength[0])
    made = {}
    for value in (0.5, 2.0, 0.0):
        strength[0] = value
        made[value] = tensors(make(editor, image))
    assert not are_equal(made[0.5], plain)
    assert not are_equal(made[0.5], made[2.0])
    assert are_equal(made[0.0], plain)
    handle.remove()
    strength[0] = 0.5
    assert are_equal(tensors(make(editor, image)), plain)


@pytest.mark.parametrize("at", ["", "language_model"])
def test_training_mode_changes_no_answer(
    blip2_project: Project, at: str, caplog: pytest.LogCaptureFixture
) -> None:
    image, editor = picture(blip2_project), load_fresh(blip2_project, **QUICK)
    drop = editor.backbone.model.get_submodule("language_model.model.decoder")
    before, wanted = logits(editor, image), tensors(make(editor, image))
    drop.dropout = 0.5
    for layer in drop.layers:
        layer.dropout = 0.5
    editor.backbone.model.get_submodule(at).train()
    assert torch.equal(logits(editor, image), before)
    assert "training mode" in caplog.text
    editor.backbone.model.get_submodule(at).train()
    assert are_equal(tensors(make(editor, image)), wanted)
