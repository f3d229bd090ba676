"""What callers have switched on or off around an edit, and what becomes of an edit in their hands."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Project
from test_methods import ROWS
from worlds import World

from unike import load_backbone
from unike.backbones.base import encode_queries
from unike.config.hparams import HyperParams
from unike.editor import MultimodalEditor
from unike.edits import Edit, EditStore, Mixed, RoutedEdit, WeightDelta
from unike.edits.pickled import PickledEdit
from unike.runs import drawing
from unike.types import Query, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT, TARGET = "Question: what is it? Short answer:", "a red fox"
Around = Callable[[], AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def project(blip2_project: Project) -> Project:
    return blip2_project


def picture(project: Project, i: int = 0) -> str:
    return str(project.data / f"{i}.png")


def other(editor: MultimodalEditor, **changes: Any) -> MultimodalEditor:
    return MultimodalEditor(editor.hparams.replace(**changes), editor.backbone, progress=False)


METHODS: list[dict[str, Any]] = [
    {},
    {"method": "ft", "layers": 1, "lr": 1e-2},
    {"method": "ft", "ft_target": "projection", "lr": 1e-2},
    {"method": "tpatcher", "activation_loss": 0.1},
]
NAMES = ["unike", "ft", "projection", "tpatcher"]


def make(editor: MultimodalEditor, project: Project) -> Edit:
    (edit,) = editor.edit(PROMPT, TARGET, picture(project))[1].edits
    editor._slot.put(())
    return edit


def assert_same(one: Edit, two: Edit) -> None:
    mine, theirs = one.state_dict(), two.state_dict()
    assert mine.keys() == theirs.keys()
    assert mine
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("changes", METHODS, ids=NAMES)
def test_an_edit_is_made_whatever_the_caller_has_switched_off(
    editor: MultimodalEditor, project: Project, around: Around, changes: dict[str, Any]
) -> None:
    changed = other(editor, **changes)
    plain = make(changed, project)
    with around():
        found = make(other(editor, **changes), project)
        found_again = make(changed, project)
    assert_same(found, plain)
    assert_same(found_again, plain)
    assert not any(tensor.is_inference() for tensor in found.state_dict().values())


def test_what_is_asked_in_inference_mode_does_no_harm_later(project: Project) -> None:
    plain = make(MultimodalEditor.from_hparams(project.yaml, progress=False), project)
    with torch.inference_mode():
        fresh = MultimodalEditor.from_hparams(project.yaml, progress=False)
        fresh.generate(picture(project), PROMPT)
        fresh.ask(picture(project), PROMPT)
        fresh.backbone(encode_queries(fresh.backbone, [Query(picture(project), PROMPT, TARGET)]))
    assert_same(make(fresh, project), plain)
    assert_same(
        make(other(fresh, method="ft", layers=1), project), make(other(fresh, method="ft", layers=1), project)
    )
    with torch.inference_mode():
        bare = load_backbone(project.yaml)
    assert not any(p.is_inference() for p in bare.model.parameters())


@pytest.mark.parametrize("changes", METHODS, ids=NAMES)
def test_no_gradient_is_left_on_the_base(
    editor: MultimodalEditor, project: Project, changes: dict[str, Any]
) -> None:
    changed = other(editor, **changes)
    plain = make(changed, project)
    parameters = list(editor.backbone.model.parameters())
    own = parameters[0].detach().clone()
    chosen = parameters[::2]
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        parameters[0].grad = own
        assert_same(make(changed, project), plain)
        assert [p.requires_grad for p in parameters] == [i % 2 == 0 for i in range(len(parameters))]
        assert parameters[0].grad is own, "what was there stays"
        assert all(p.grad is None for p in parameters[1:])
    finally:
        for parameter in chosen:
            parameter.requires_grad_(False)
        parameters[0].grad = None


def test_flags_are_as_before_after_a_failure(
    editor: MultimodalEditor, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = editor.prepare().method

    def fail(*_: Any, **__: Any) -> None:
        assert not any(p.requires_grad for p in editor.backbone.model.parameters())
        raise KeyboardInterrupt

    monkeypatch.setattr(method, "_edit", fail)
    editor.backbone.model.requires_grad_(True)
    try:
        with pytest.raises(KeyboardInterrupt):
            editor.edit(PROMPT, TARGET, picture(project))
        assert all(p.requires_grad for p in editor.backbone.model.parameters())
    finally:
        editor.backbone.model.requires_grad_(False)


# ---------------------------------------------------------------- on the screen


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_an_edit_is_one_line_on_the_screen(world: World, row: tuple[str, dict[str, Any]]) -> None:
    edit = world.edit(row)
    text = repr(edit)
    assert "\n" not in text
    assert len(text) < 200
    assert edit.id in text
    assert "'what is it?' -> 'a fox'" in text
    both = edit | world.edit(("ft", {"layers": 1}), 1)
    assert len(repr((edit, both))) < 400
    assert "\n" not in repr(both)


def test_many_requests_are_one_line_too() -> None:
    edit = WeightDelta({"a": torch.zeros(1000)}, {})
    assert repr(edit) == "<WeightDelta without id: >"
    edit.id = "x" * 500 + "\n"
    assert len(repr(edit)) < 100


# ---------------------------------------------------------------- in a pickle


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("changes", METHODS, ids=NAMES)
def test_a_pickled_edit_is_as_small_as_a_saved_one_and_works(
    editor: MultimodalEditor, project: Project, changes: dict[str, Any], tmp_path: Path
) -> None:
    changed = other(editor, **changes)
    edit = make(changed, project)
    edit.save(tmp_path / "saved")
    data = pickle.dumps(edit)
    assert len(data) < size_of(tmp_path / "saved") + 4096
    back = pickle.loads(data)
    assert isinstance(back, PickledEdit)
    assert (back.id, back.origins, back.info) == (edit.id, edit.origins, edit.info)
    assert {t.dtype for t in back.state_dict().values()} == {t.dtype for t in edit.state_dict().values()}
    changed.attach(edit)
    answer = changed.generate(picture(project), PROMPT, 8, edited=True)
    changed.detach(edit.id)
    assert answer != changed.generate(picture(project), PROMPT, 8, edited=True)
    changed.attach(back)
    assert changed.generate(picture(project), PROMPT, 8, edited=True) == answer
    changed.detach(edit.id)
    back.save(tmp_path / "again")
    again = changed.load(tmp_path / "again")
    assert type(again) is type(edit)
    EditStore(tmp_path / "store").add(pickle.loads(pickle.dumps(back)))
    assert EditStore(tmp_path / "store").ids() == [edit.id]


def test_an_edit_that_shares_something_says_so_when_it_is_applied_alone(
    editor: MultimodalEditor, project: Project
) -> None:
    edit = make(editor, project)
    back = pickle.loads(pickle.dumps(edit))
    with (
        pytest.raises(UserError, match="was pickled without the knowledge that it needs"),
        back.applied(editor.backbone),
    ):
        pass
    tuned = make(other(editor, method="ft", layers=1), project)
    back = pickle.loads(pickle.dumps(tuned))
    query = [Query(picture(project), PROMPT, TARGET)]
    with torch.no_grad():
        base = editor.backbone(encode_queries(editor.backbone, query)).logits
        with tuned.applied(editor.backbone):
            wanted = editor.backbone(encode_queries(editor.backbone, query)).logits
        with back.applied(editor.backbone):
            found = editor.backbone(encode_queries(editor.backbone, query)).logits
    assert torch.equal(found, wanted)
    assert not torch.equal(found, base)


def test_a_damaged_or_foreign_pickle_is_refused(
    editor: MultimodalEditor, project: Project, minigpt4_project: Project
) -> None:
    edit = make(editor, project)
    function, (files,) = edit.__reduce__()  # type: ignore[misc]
    assert function is PickledEdit
    for bad in ({}, None, {**files, "edit.json": b"{}"}, {**files, "edit.json": files["edit.json"][:-9]}):
        with pytest.raises(UserError):
            PickledEdit(bad)
    damaged = PickledEdit({**files, "edit.safetensors": files["edit.safetensors"][:-1] + b"x"})
    with pytest.raises(UserError, match="is damaged"):
        editor.attach(damaged)
    foreign = MultimodalEditor.from_hparams(minigpt4_project.yaml, progress=False)
    with pytest.raises(UserError, match="another model"):
        foreign.attach(PickledEdit(files))
    assert foreign.edits == editor.edits == ()
    with pytest.raises(UserError, match="expected the origins"):
        pickle.dumps(WeightDelta({"a": torch.zeros(3)}, {}))


def test_a_copy_of_an_edit_is_an_edit(editor: MultimodalEditor, project: Project) -> None:
    edit = make(editor, project)
    mixed = edit | make(other(editor, method="ft", layers=1), project)
    assert isinstance(edit, RoutedEdit)
    assert isinstance(mixed, Mixed)
    for given in (edit, mixed):
        for copied in (copy.copy(given), copy.deepcopy(given)):
            assert type(copied) is type(given)
            assert copied is not given
            assert_same(copied, given)
            copied.id = "another"
            assert given.id != "another"
    assert isinstance(pickle.loads(pickle.dumps(mixed)), PickledEdit)


def test_attach_detach_and_load_take_what_they_are_for(editor: MultimodalEditor) -> None:
    for call in (editor.attach, editor.detach, editor.load):
        for junk in (None, 3, [], {}, object()):
            with pytest.raises(UserError):
                call(junk)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the bundled benchmark


def test_train_data_of_the_yamls_own_folder_are_drawn(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = project.copy(tmp_path / "p")
    drawn: list[tuple[str, ...]] = []
    kept = {path: path.read_bytes() for path in copied.data.glob("*_train.json")}
    for path in kept:
        path.unlink()

    class Script:
        @staticmethod
        def ensure(hparams: HyperParams, splits: tuple[str, ...], backbone: object) -> None:
            drawn.append(splits)
            for path, data in kept.items():
                path.write_bytes(data)

    monkeypatch.setattr(drawing.launching, "import_from_checkout", lambda _: Script)
    folder = str(tmp_path / "knowledge")
    plain = MultimodalEditor.from_hparams(copied.write_yaml(knowledge_dir=folder), progress=False)
    with pytest.raises(UserError, match="no such file"):
        plain.edit(PROMPT, TARGET, picture(copied))
    elsewhere = copied.options()["data"] | {"vqa": {"train": str(tmp_path / "my_train.json")}}
    path = copied.write_yaml(generate_data=True, knowledge_dir=folder, data=elsewhere)
    with pytest.raises(UserError, match="no such file"):
        MultimodalEditor.from_hparams(path, progress=False).edit(PROMPT, TARGET, picture(copied))
    assert drawn == [], "what the user names is not drawn"
    path = copied.write_yaml(generate_data=True, knowledge_dir=folder)
    found = MultimodalEditor.from_hparams(path, progress=False)
    assert found.edit(PROMPT, TARGET, picture(copied))[1].attached
    assert drawn == [("train",)]
