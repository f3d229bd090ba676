"""What surrounds a call decides on no answer: torch's modes, rewritten files, event loops, copies."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import re
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from helpers import Project
from PIL import Image
from test_truth import PROMPT, QUICK, are_equal, load_fresh, make, picture, tensors

from unike.backbones import guard
from unike.easyedit import MultimodalEditor as EasyEditEditor
from unike.editor import MultimodalEditor
from unike.types import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def editor(blip2_project: Project) -> MultimodalEditor:
    return load_fresh(blip2_project, **QUICK)


@contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": float64_by_default,
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["unike", "quick"])
def test_an_edit_is_the_same_under_a_callers_modes(
    blip2_project: Project, tmp_path: Path, mode: str, method: str
) -> None:
    image, options = picture(blip2_project), QUICK if method == "quick" else {}
    plain = load_fresh(blip2_project, **options)
    wanted, base = tensors(make(plain, image)), plain.generate(image, PROMPT)
    options = options | {"prefix_dir": str(tmp_path / "states")}
    edited = load_fresh(blip2_project, **options)
    with MODES[mode]():
        seen = torch.ones(2, 2) @ torch.ones(2, 2)
        assert (seen.dtype, seen.device.type) != (torch.float32, "cpu"), "else nothing could differ"
        assert edited.generate(image, PROMPT) == base
        inside = make(edited, image)
        with inside.applied(edited.backbone):
            pass
        after = torch.ones(2, 2) @ torch.ones(2, 2)
        assert (after.dtype, after.device) == (seen.dtype, seen.device), "the caller's mode goes on"
    assert are_equal(tensors(inside), wanted)
    assert are_equal(tensors(make(edited, image)), wanted)
    # What was kept on disk is the model's, too.
    assert are_equal(tensors(make(load_fresh(blip2_project, **options), image)), wanted)


def test_a_file_that_is_rewritten_with_its_time_set_back_is_another_image(
    editor: MultimodalEditor, tmp_path: Path
) -> None:
    path, keys = tmp_path / "a.bmp", []
    for color in ("red", "teal"):
        Image.new("RGB", (32, 32), color).save(path)
        os.utime(path, ns=(10**18, 10**18))
        keys.append(make(editor, str(path)).origins[0].image_key)
    keys.append(make(editor, Image.new("RGB", (32, 32), "teal")).origins[0].image_key)
    assert keys[0] != keys[1] == keys[2]


def test_an_event_loop_that_waits_in_a_block_is_refused(
    editor: MultimodalEditor, blip2_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "PATIENCE_SECONDS", 1.0)
    image = picture(blip2_project)
    edit = make(editor, image)

    async def ask() -> object:
        with edit.applied(editor.backbone):
            return await asyncio.to_thread(editor.generate, image, PROMPT)

    with pytest.raises(UserError, match="may last for ever"):
        asyncio.run(ask())


@pytest.mark.parametrize("patience", [1.0, 60.0])
def test_a_block_that_looks_again_and_again_is_refused_in_the_end(
    editor: MultimodalEditor, blip2_project: Project, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    monkeypatch.setattr(guard, "LONG_PATIENCE_SECONDS", patience)
    image, found = picture(blip2_project), list[object]()
    edit, base = make(editor, image), editor.generate(image, PROMPT)

    def ask() -> None:
        try:
            found.append(editor.generate(image, PROMPT))
        except UserError as error:
            found.append(error)

    with edit.applied(editor.backbone):
        thread, start = threading.Thread(target=ask), time.monotonic()
        thread.start()
        while thread.is_alive() and time.monotonic() - start < 4:
            time.sleep(0.2)
    thread.join()
    (one,) = found
    assert "may last for ever" in str(one) if patience == 1.0 else one == base


def test_a_copied_editor_carries_the_same_edits_on_a_model_of_its_own(
    blip2_project: Project,
) -> None:
    editor, image = load_fresh(blip2_project, **QUICK), picture(blip2_project)
    _, edited, _ = editor.edit(PROMPT, "a red fox", image)
    base, fox = editor.generate(image, PROMPT), edited.generate(image, PROMPT)
    other, other_edited = copy.deepcopy((editor, edited))
    assert other.backbone is not editor.backbone
    assert other_edited.attached
    assert other.generate(image, PROMPT, edited=True) == other_edited.generate(image, PROMPT) == fox
    assert other.generate(image, PROMPT) == base
    dogs = other.edit(PROMPT, "two dogs", image)[1].generate(image, PROMPT)
    assert len({base, fox, dogs}) == 3
    assert other.generate(image, PROMPT, edited=True) == dogs
    assert editor.generate(image, PROMPT, edited=True) == fox
    edited.remove()
    assert other.generate(image, PROMPT, edited=True) == dogs
    # A copied backbone is the base model.
    editor.attach(*other.edits)
    assert copy.deepcopy(editor.backbone).generate([image], [PROMPT]) == [base]
    assert editor.backbone.generate([image], [PROMPT]) == [dogs]


def test_a_pickled_editor_is_one_line(editor: MultimodalEditor, blip2_project: Project) -> None:
    _, edited, _ = editor.edit(PROMPT, "a red fox", picture(blip2_project))
    for value in (editor, edited):
        with pytest.raises(UserError, match=r"cannot be pickled; save the edits"):
            pickle.dumps(value)
    edited.remove()


# ---------------------------------------------------------------- what is handed over, once more


@pytest.mark.parametrize("kind", [MultimodalEditor, EasyEditEditor])
def test_an_editor_of_something_else_is_one_line(editor: MultimodalEditor, kind: type) -> None:
    for hparams, backbone, name in (
        (None, editor.backbone, "hparams: expected hyper-parameters, got NoneType"),
        ({}, editor.backbone, "hparams: expected hyper-parameters, got dict"),
        (editor.hparams, None, "backbone: expected one of unike.load_backbone"),
        (editor.hparams, editor.backbone.model, "backbone: expected one of unike.load_backbone"),
    ):
        with pytest.raises(UserError) as raised:
            kind(hparams, backbone)
        (line,) = raised.value.problems
        assert line.startswith(name)
    assert kind(editor.hparams, editor.backbone, progress=False).backbone is editor.backbone


def test_whether_edits_count_is_true_or_false(editor: MultimodalEditor, blip2_project: Project) -> None:
    image = picture(blip2_project)
    for wrong in ("no", 0, "false"):
        with pytest.raises(UserError, match="edited: expected True or False"):
            editor.generate(image, PROMPT, edited=wrong)


def train_rows(project: Project) -> list[dict[str, str]]:
    same = {"target": "a red fox", "wrong": "a dog", "image": picture(project)}
    return [{"prompt": prompt, **same} for prompt in ("what is it?", "what is shown?")]


@pytest.mark.parametrize("wrong", [[1], 5, "nowhere.json", ["a"]])
def test_what_is_no_train_data_is_one_line(blip2_project: Project, wrong: object) -> None:
    editor = load_fresh(blip2_project)
    with pytest.raises(UserError):
        editor.prepare(wrong)
    assert editor.prepare(train_rows(blip2_project)).method.knowledge


def test_encoders_are_not_trained_on_one_question(blip2_project: Project, tmp_path: Path) -> None:
    row, other = train_rows(blip2_project)
    editor = load_fresh(blip2_project, knowledge_dir=str(tmp_path))
    for few in ([row], [row] * 3):
        with pytest.raises(UserError, match="train data: 1 distinct questions; expected two or more"):
            editor.edit(PROMPT, "a red fox", picture(blip2_project), train_ds=few)
    assert list(tmp_path.iterdir()) == []
    assert editor.prepare([row, other]).method.knowledge


def test_train_data_that_nothing_reads_are_named(
    blip2_project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = train_rows(blip2_project)
    load_fresh(blip2_project, **QUICK).prepare(rows)
    assert "train_ds: is not read: tpatcher needs none with these options" in caplog.text
    caplog.clear()
    own = load_fresh(blip2_project, knowledge_dir=str(tmp_path / "own"))
    own.prepare(rows)
    assert "train_ds" not in caplog.text
    (folder,) = (tmp_path / "own").iterdir()
    load_fresh(blip2_project, knowledge_dir=str(folder)).prepare(rows[::-1])
    assert "train_ds: is not read: what is learnt from train data is there already" in caplog.text


def test_a_text_that_is_too_long_is_named(editor: MultimodalEditor, blip2_project: Project) -> None:
    image, long = picture(blip2_project), "word " * 900
    for changes, place in (
        ({"targets": long}, "target"),
        ({"prompts": long}, "prompt"),
        ({"rephrase_prompts": long}, "prompt of t_generality"),
        ({"locality_inputs": {"text": {"prompt": "who?", "ground_truth": long}}}, "target of t_locality"),
    ):
        request = {"prompts": PROMPT, "targets": "a red fox", "image": image, **changes}
        with pytest.raises(UserError, match=rf"^edit edit-\w+: {place}: \d+ tokens; expected at most"):
            editor.edit(**request)
    rows = [{"prompt": PROMPT, "target": t, "image": image} for t in ("a red fox", long, "two dogs")]
    metrics, edited, _ = editor.edit_dataset(rows)
    assert [m.get("error", "").partition(" tokens")[2] != "" for m in metrics] == [False, True, False]
    assert re.match(r"edit edit-\w+: target: ", metrics[1]["error"])
    edited.remove()
