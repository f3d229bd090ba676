"""Nonsense for every argument of every public function: what leaves is a UserError, in whole lines."""

from __future__ import annotations

import io
import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Project, record
from PIL import Image

import unike.easyedit
from unike import HyperParams, MultimodalEditor, UniKEHyperParams, load_backbone
from unike.datasets.images import open_image
from unike.datasets.mmedit import CaptionDataset, CapVQADataset, VQADataset, load_records
from unike.datasets.rows import read_rows
from unike.edits import Edit, EditStore, compose
from unike.edits.files import read_edit
from unike.types import Case, EditRequest, Probe, Query, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT, TARGET = "Question: what is it? Short answer:", "a red fox"


class Odd:
    """Something of which nothing can be asked."""

    def __len__(self) -> int:
        raise RuntimeError("no length")

    def __iter__(self) -> Iterator[int]:
        raise RuntimeError("no members")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


JUNK: list[Callable[[], Any]] = [
    lambda: None,
    lambda: 0,
    lambda: -1,
    lambda: 10**30,
    lambda: 1.5,
    lambda: float("nan"),
    lambda: True,
    lambda: 1j,
    lambda: "",
    lambda: "  ",
    lambda: "\ud800",
    lambda: "a\0b",
    lambda: "no such thing",
    lambda: "https://example.org/a.png",
    lambda: b"",
    lambda: b"\xff\x00",
    lambda: bytearray(b"a"),
    list,
    lambda: [None],
    lambda: [[], [[]]],
    lambda: [1, "a"],
    lambda: ["a", "b", "c"],
    tuple,
    dict,
    lambda: {"a": 1},
    lambda: {1: {2: 3}},
    lambda: {"text": 1, "vision": None},
    lambda: {"text": {"prompt": 1, "ground_truth": [None]}},
    lambda: {"bytes": b"abc", "path": None},
    lambda: {"src": None, "alt": 3, "image": []},
    set,
    lambda: {"a"},
    lambda: frozenset([1]),
    lambda: (x for x in ()),
    lambda: (x for x in [1, None]),
    lambda: iter([]),
    lambda: range(3),
    object,
    lambda: object,
    Odd,
    lambda: len,
    lambda: Path("nowhere"),
    lambda: Path("."),
    lambda: Ellipsis,
    lambda: np.str_("nowhere"),
    lambda: np.float32("nan"),
    lambda: np.bool_(True),
    lambda: np.array(["a", "b"]),
    lambda: np.zeros((0, 0, 3), np.uint8),
    lambda: np.zeros((3, 4, 5, 6, 7)),
    lambda: np.full((4, 4, 3), np.nan),
    lambda: np.array(3),
    lambda: np.array([None, {}], object),
    lambda: torch.full((3, 28, 28), torch.nan),
    lambda: torch.zeros(0),
    lambda: torch.tensor(3.0),
    lambda: torch.zeros(3, 5, 5),
    lambda: torch.zeros(2, 2, dtype=torch.complex64),
    lambda: torch.nn.Linear(1, 1),
    lambda: Image.new("RGB", (0, 0)),
    lambda: io.StringIO("a"),
    io.BytesIO,
    lambda: Query(None, "a"),
    lambda: UserError("a"),
    lambda: NotImplemented,
]  # fmt: skip


def throw(call: Callable[..., Any], junk: Callable[[], Any]) -> str | None:
    """What is wrong with how a call ends; None where it runs, or is refused in whole lines."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(junk())
    except UserError as error:
        bad = [line for line in error.problems if not line.strip() or "\n" in line]
        return f"{bad[0]!r}" if bad or not error.problems else None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.fixture(scope="module")
def project(blip2_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return blip2_project.copy(tmp_path_factory.mktemp("junk") / "project")


@pytest.fixture(scope="module")
def editor(project: Project) -> MultimodalEditor:
    # One step an edit: some of the junk is a sound argument.
    path = project.write_yaml(max_steps=1, max_new_tokens=2)
    return MultimodalEditor.from_hparams(path, progress=False)


@pytest.fixture(scope="module")
def edit(editor: MultimodalEditor, project: Project) -> Edit:
    (edit,) = editor.edit(PROMPT, TARGET, project.data / "0.png")[1].edits
    editor._slot.put(())
    return edit


Calls = dict[str, tuple[Callable[..., Any], dict[str, Any]]]


def list_files(editor: MultimodalEditor, edit: Edit, tmp: Path) -> Calls:
    """Edits and stores on disk."""
    return {
        "EditStore": (EditStore, {"folder": tmp / "s"}),
        "EditStore.add": (EditStore(tmp / "s").add, {"edit": edit}),
        "EditStore.remove": (EditStore(tmp / "s").remove, {"name": "a"}),
        "EditStore.read": (EditStore(tmp / "s").read, {"name": "a"}),
        "EditStore.load": (EditStore(tmp / "s").load, {"name": edit.id, "backbone": editor.backbone,
                                                       "knowledge": None}),
        "EditStore.in": (EditStore(tmp / "s").__contains__, {"name": "a"}),
        "Edit.save": (edit.save, {"folder": tmp / "e"}),
        "Edit.load": (Edit.load, {"folder": tmp / "saved", "backbone": editor.backbone, "knowledge": None}),
        "Edit.applied": (lambda backbone: enter(edit, backbone), {"backbone": editor.backbone}),
        "compose": (compose, {"edits": [edit]}),
        "read_edit": (read_edit, {"folder": "a"}),
    }  # fmt: skip


def list_readers(project: Project, hparams: HyperParams, row: dict[str, Any]) -> Calls:
    """Nouns and readers."""
    query = Query(None, "a", "b")
    request = EditRequest("a", query)
    return {
        "Query": (Query, {"image": None, "prompt": "a", "target": "b"}),
        "EditRequest": (EditRequest, {"id": "a", "query": query, "wrong": None}),
        "Probe": (Probe, {"name": "a", "query": query, "expect": "target"}),
        "Case": (Case, {"request": request, "probes": (), "task": "vqa"}),
        "VQADataset": (VQADataset, {"path": str(project.data / "vqa_eval.json"), "image_root": None,
                                    "rephrase_root": None, "size": 1, "template": "{}"}),
        "CaptionDataset": (CaptionDataset, {"path": "a", "size": 1}),
        "CapVQADataset": (CapVQADataset, {"vqa_path": str(project.data / "vqa_eval.json"),
                                          "caption_path": str(project.data / "caption_eval.json")}),
        "load_records": (load_records, {"path": "a"}),
        "read_rows": (read_rows, {"source": []}),
        "open_image": (open_image, {"source": project.data / "0.png", "root": None}),
        "easyedit.VQADataset": (unike.easyedit.VQADataset, {
            "data_dir": str(project.data / "vqa_eval.json"), "size": 1, "config": None}),
        "easyedit.hparams": (unike.easyedit.MENDMultimodalHparams.from_hparams, {"path": "a"}),
        "easyedit.trainer": (unike.easyedit.MultimodalTrainer, {
            "config": hparams.replace(method="mend"), "train_set": [row], "val_set": [row]}),
    }  # fmt: skip


def list_calls(
    editor: MultimodalEditor, edit: Edit, project: Project, tmp: Path
) -> dict[str, Callable[..., Any]]:
    """By name, each public function as a function of one of its arguments; the others are sound."""
    image = project.data / "0.png"
    edited = editor.edit(PROMPT, TARGET, image)[1]
    row, hparams = {**record(5), "image": str(image)}, editor.hparams
    calls: Calls = {
        "edit": (editor.edit, {
            "prompts": PROMPT, "targets": TARGET, "image": image, "file_type": None, "rephrase_prompts": None,
            "rephrase_image": None, "locality_inputs": None, "keep_original_weight": None, "template": None,
            "sequential_edit": None, "verbose": False, "train_ds": None, "nonsense": None,
        }),
        "edit_dataset": (editor.edit_dataset, {
            "ds": [row], "train_ds": None, "template": None, "generated": False, "keep_original_weight": None,
            "verbose": False,
        }),
        "generate": (editor.generate, {"image": image, "prompt": PROMPT}),
        "edited.generate": (edited.generate, {"image": image, "prompt": PROMPT}),
        "ask": (editor.ask, {"image": image, "prompt": PROMPT, "top": 3}),
        "attach": (editor.attach, {"edit": edit}),
        "detach": (editor.detach, {"id": "a"}),
        "load": (editor.load, {"folder": "a"}),
        "MultimodalEditor.from_hparams": (MultimodalEditor.from_hparams, {"hparams": "a.yaml"}),
        "load_backbone": (load_backbone, {"source": "a.yaml"}),
        "HyperParams.from_hparams": (HyperParams.from_hparams, {"path": str(project.yaml), "overrides": ()}),
        "HyperParams.from_dict": (HyperParams.from_dict, {"values": {}, "overrides": ()}),
        "UniKEHyperParams": (UniKEHyperParams, {"model_name": "blip2", "name": "a", "layers": 1, "data": {}}),
        "replace": (hparams.replace, {"lr": 1e-3, "layers": 2, "data": {}, "device": "cpu", "name": "a"}),
    }  # fmt: skip
    edit.save(tmp / "saved")
    out = {}
    all_calls = calls | list_files(editor, edit, tmp) | list_readers(project, editor.hparams, row)
    for name, (function, sound) in all_calls.items():
        for argument in sound:

            def call(
                junk: Any, function: Any = function, sound: Any = sound, argument: str = argument
            ) -> Any:
                return function(**{**sound, argument: junk})

            out[f"{name}({argument})"] = call
    return out


def enter(edit: Edit, backbone: Any) -> None:
    with edit.applied(backbone):
        pass


def test_nothing_but_a_user_error_leaves(
    editor: MultimodalEditor, edit: Edit, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = []
    for name, call in list_calls(editor, edit, project, tmp_path).items():
        for i, junk in enumerate(JUNK):
            if problem := throw(call, junk):
                wrong.append(f"{name}, junk {i}: {problem}"[:300])
    assert not wrong, "\n".join(wrong)
    assert set(os.listdir(tmp_path)) <= {"s", "e", "saved", "nowhere", "no such thing"}


def test_a_bare_error_is_seen() -> None:
    """The test above can fail."""

    def bare(_: Any) -> None:
        raise TypeError("'int' object is not iterable")

    def broken(_: Any) -> None:
        raise UserError("one\ntwo")

    assert throw(bare, lambda: 3) == "TypeError: 'int' object is not iterable"
    assert throw(broken, lambda: 3)
    assert throw(lambda _: None, lambda: 3) is None


def test_an_editor_is_as_before_after_all_of_it(
    editor: MultimodalEditor, edit: Edit, project: Project
) -> None:
    editor._slot.put(())
    (again,) = editor.edit(PROMPT, TARGET, project.data / "0.png")[1].edits
    one, two = edit.state_dict(), again.state_dict()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("seed", range(3))
def test_several_arguments_are_nonsense_at_once(
    editor: MultimodalEditor, project: Project, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chooser = random.Random(seed)
    sound = {"prompts": PROMPT, "targets": TARGET, "image": project.data / "0.png"}
    names = [*sound, "rephrase_prompts", "rephrase_image", "locality_inputs", "file_type", "template"]
    wrong = []
    for _ in range(60):
        given: dict[str, Any] = dict(sound)
        for name in chooser.sample(names, 3):
            given[name] = chooser.choice(JUNK)()
        others = [chooser.choice(JUNK)() for _ in range(chooser.choice((0, 0, 1, 3)))]

        def call(_: Any, given: Any = given, others: Any = others) -> None:
            if others:
                editor.edit(given["prompts"], given["targets"], given["image"], *others)
            else:
                editor.edit(**given)

        if problem := throw(call, lambda: None):
            wrong.append(f"{problem} {given} {others}"[:300])
    assert not wrong, "\n".join(wrong)
