"""Further cases of silent wrong answers: what is learnt in a block, copies, shared models, trained scopes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Project
from test_truth import METHODS, PROMPT, QUICK, are_equal, load_fresh, logits, make, picture, tensors
from worlds import BASE, World, case, query

from unike.backbones.guard import Guard
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.editor import MultimodalEditor
from unike.edits import EditStore, Mixed, RoutedEdit, WeightDelta
from unike.evaluation.protocols import run_one_step
from unike.evaluation.reader import Reader
from unike.knowledge.scope import ScopeEncoder, TrainedScope
from unike.methods import build
from unike.types import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def editor(blip2_project: Project) -> MultimodalEditor:
    return load_fresh(blip2_project, **QUICK)


def shift(editor: MultimodalEditor, part: str = "language_model.model.decoder.layers.0") -> WeightDelta:
    """An edit far below the layers that are edited otherwise."""
    name = next(n for n, _ in editor.backbone.model.named_parameters() if n.startswith(part))
    return WeightDelta({name: editor.backbone.model.get_parameter(name) + 0.5})


def test_edits_of_different_trained_scopes_stay_apart(world: World) -> None:
    """Each one's own prompt keeps a similarity of 1 with its own key."""
    settings = {"scope_gate": "nearest", "scope_measure": "trained", "scope_threshold": None}
    plain, width, edits = world.method("unike", {}), world.backbone.layout.width, []
    for seed in (0, 1):
        torch.manual_seed(seed)
        scope = TrainedScope(ScopeEncoder(width, 16, 8, 2).eval(), {1: 0.5, 100: 0.9})
        known = dict(plain.knowledge)
        known[4] = replace(known[4], scope=scope)
        method = build(HyperParams.from_dict({**BASE, **settings}), known)
        edits.append(method.edit(world.backbone, case(seed).request, world.prefixes(method)))
    whole = edits[0] | edits[1]
    assert isinstance(whole, Mixed)
    for i, part in enumerate(whole.parts):
        assert isinstance(part, RoutedEdit)
        with whole.applied(world.backbone):
            world.logits([query(i)])
        assert part.gate is not None
        assert part.gate.similarity is not None
        assert part.gate.similarity[0, 0].item() == pytest.approx(1.0, abs=1e-5)
        assert bool(part.gate.open[0, 0])
    # Another prompt is not as similar.
    with whole.applied(world.backbone):
        world.logits([query(3, prompt="why?")])
    assert whole.parts[0].gate.similarity[0, 0].item() < 0.9999


def test_what_is_learnt_in_a_block_is_learnt_from_the_base(blip2_project: Project, tmp_path: Path) -> None:
    image, options = picture(blip2_project), {"knowledge_dir": str(tmp_path / "knowledge")}
    wanted = tensors(make(load_fresh(blip2_project, knowledge_dir=str(tmp_path / "clean")), image))
    editor = load_fresh(blip2_project, **options)
    with shift(editor).applied(editor.backbone):
        editor.prepare()
    assert are_equal(tensors(make(load_fresh(blip2_project, **options), image)), wanted)


def test_methods_and_readers_in_a_block_see_the_base(world: World) -> None:
    method, backbone = world.method("tpatcher", {"activation_loss": 0.1, "memory_loss": 0.1}), world.backbone
    alone = run_one_step(backbone, method, case(0), Reader(backbone, world.prefixes(method)))
    name, weight = next(iter(backbone.model.named_parameters()))
    with WeightDelta({name: weight + 0.5}).applied(backbone):
        changed = backbone.generate([query(0).image], ["what is it?"])
        inside = run_one_step(backbone, method, case(0), Reader(backbone, world.prefixes(method)))
        assert backbone.generate([query(0).image], ["what is it?"]) == changed
    assert alone.edit is not None
    assert inside.edit is not None
    assert are_equal(tensors(alone.edit), tensors(inside.edit))
    assert alone.record.scores == inside.record.scores
    assert alone.record.answers == inside.record.answers


def test_a_reader_forgets_the_answers_of_former_weights(blip2_project: Project) -> None:
    editor, other = (load_fresh(blip2_project, **QUICK) for _ in range(2))
    cases = [replace(c, probes=c.probes[:1]) for c in (case(0), case(1))]
    reader = editor.prepare().make_reader()
    before = [reader.predict_base(c)[0].predicted_ids for c in cases]
    for one in (editor, other):
        for parameter in one.backbone.model.parameters():
            parameter.data += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    after = [reader.predict_base(c)[0].predicted_ids for c in cases]
    wanted = other.prepare().make_reader()
    assert after == [wanted.predict_base(c)[0].predicted_ids for c in cases]
    assert after != before


def test_two_backbones_of_one_model_share_what_is_applied(editor: MultimodalEditor, blip2_project) -> None:
    image, backbone = picture(blip2_project), editor.backbone
    twin = copy.copy(backbone)
    assert Guard.of(twin) is Guard.of(backbone)
    mine = MultimodalEditor(editor.hparams, twin, progress=False)
    base, edit = mine.generate(image, PROMPT), make(editor, image)
    with edit.applied(backbone):
        assert mine.generate(image, PROMPT) == base
        inside = editor.backbone.generate([image], [PROMPT])
        assert inside != [base]


def test_a_copied_backbone_has_a_lock_of_its_own(editor: MultimodalEditor, blip2_project: Project) -> None:
    image = picture(blip2_project)
    editor.generate(image, PROMPT)
    twin: VisionLanguageBackbone = copy.deepcopy(editor.backbone)
    assert Guard.of(twin) is not Guard.of(editor.backbone)
    assert twin.generate([image], [PROMPT]) == editor.backbone.generate([image], [PROMPT])


def test_edits_of_former_weights_are_named(
    editor: MultimodalEditor, blip2_project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An attached one and an edited model by a warning, others where they are attached or loaded."""
    image = picture(blip2_project)
    _, edited, _ = editor.edit(PROMPT, "a red fox", image)
    (edit,) = edited.edits
    EditStore(tmp_path / "edits").add(edit)
    edited.generate(image, PROMPT)
    assert "other weights" not in caplog.text
    weight = editor.backbone.model.get_parameter("language_model.model.decoder.layers.0.fc1.weight")
    weight.data *= 1.5
    edited.generate(image, PROMPT)
    assert f"edit {edit.id}: was made with other weights" in caplog.text
    edited.remove()
    with pytest.raises(UserError, match="other weights"):
        editor.attach(edit)
    with pytest.raises(UserError, match="is an edit of another model"):
        editor.load(EditStore(tmp_path / "edits").read(edit.id).folder)


def test_weights_written_under_an_edit_of_them_are_named(
    editor: MultimodalEditor, blip2_project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    image, model = picture(blip2_project), editor.backbone.model
    base, delta = logits(editor, image), shift(editor)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with delta.applied(editor.backbone):
        logits(editor, image)
    assert "changed in place" not in caplog.text
    with delta.applied(editor.backbone):
        model.load_state_dict(state)
    assert "the change is in the edit" in caplog.text
    assert torch.equal(logits(editor, image), base)


def test_weights_changed_under_an_attached_edit_are_noticed(blip2_project: Project) -> None:
    """The base model's answers are those of its weights of now; the attached edit stays."""
    image = picture(blip2_project)
    editor, other = (load_fresh(blip2_project, **QUICK) for _ in range(2))
    _, edited, _ = editor.edit(PROMPT, "a red fox", image)
    editor.generate(image, PROMPT)
    for one in (editor, other):
        weight = one.backbone.model.get_parameter("language_model.model.decoder.layers.0.fc1.weight")
        weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    assert editor.generate(image, PROMPT) == other.generate(image, PROMPT)
    with edited.edits[0].applied(other.backbone):
        wanted = logits(other, image)
    assert torch.equal(logits(editor, image), wanted)
    edited.remove()
    assert are_equal(tensors(make(editor, image)), tensors(make(other, image)))
    assert torch.equal(logits(editor, image), logits(other, image))


@pytest.mark.parametrize("name", ["unike", "ft"])
def test_editing_goes_on_in_a_block_as_outside(blip2_project: Project, name: str) -> None:
    """In sequence too: what a block applies is part of no edit."""
    image, made = picture(blip2_project), []
    for inside in (False, True):
        editor = load_fresh(blip2_project, **METHODS[name])
        around = shift(editor).applied(editor.backbone)
        if inside:
            around.__enter__()
        for asked, target in ((PROMPT, "a red fox"), ("Question: why? Short answer:", "two dogs")):
            _, edited, _ = editor.edit(asked, target, image, keep_original_weight=False)
        if inside:
            around.__exit__(None, None, None)
        made.append((edited.generate(image, PROMPT), *map(tensors, edited.edits)))
    assert made[0][0] == made[1][0]
    assert all(are_equal(one, other) for one, other in zip(made[0][1:], made[1][1:], strict=True))


def test_what_was_learnt_from_former_weights_is_not_used(blip2_project: Project, tmp_path: Path) -> None:
    """Knowledge is made anew; where that is impossible, the reason comes first."""
    project = blip2_project.copy(tmp_path / "project")
    image = picture(project)
    editor, other = (load_fresh(project) for _ in range(2))
    former = tensors(make(editor, image))
    for one in (editor, other):
        weight = one.backbone.model.get_parameter("language_model.model.decoder.layers.0.fc1.weight")
        weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    found = tensors(make(editor, image))
    assert are_equal(found, tensors(make(other, image)))
    assert not are_equal(found, former)
    weight = editor.backbone.model.get_parameter("language_model.model.decoder.layers.0.fc1.weight")
    weight.data *= 2
    (project.data / "vqa_train.json").unlink()
    with pytest.raises(UserError, match=r"weights were changed(.|\n)*vqa_train.json: no such file"):
        make(editor, image)
