"""Edits as folders: what comes back is what was saved, and nothing else comes back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import Project
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_methods import IDS, ROOT, ROWS, each_row
from untouched import assert_untouched
from worlds import COLORS, World, case, query, snapshot

from unike.backbones.base import encode_queries
from unike.config.hparams import HyperParams
from unike.editor import MultimodalEditor
from unike.edits import Edit, PromptEdit, RoutedEdit, files
from unike.edits.content import digest
from unike.edits.files import CARD, INDEX, TENSORS, read_edit
from unike.types import Query, UserError

SCOPED = ("unike", {"scope_gate": "nearest", "scope_halves": "both", "memory": "edit", "alpha": 0.5})
PROMPT = ("unike", {"external": "prompt", "zeta": "random", "beta": 0.5})
PROJECTION = ("ft", {"ft_target": "projection"})


def asked(edit: Edit) -> list[Query]:
    return [edit.rewrite(q) for q in (query(0), query(1, "two dogs"), Query(None, "where is it?", "there"))]


def logits(world: World, edit: Edit) -> torch.Tensor:
    with edit.applied(world.backbone):
        return world.logits(asked(edit))


def loaded(world: World, folder: Path, row: tuple[str, dict]) -> Edit:
    return Edit.load(folder, world.backbone, **vars(world.method(*row).get_shared_parts()))


# ---------------------------------------------------------------- what is saved comes back


@pytest.mark.parametrize("row", [*ROWS, SCOPED, PROMPT], ids=[*IDS, "scoped", "prompt"])
def test_a_loaded_edit_gives_the_same_logits_bit_for_bit(world: World, row, tmp_path) -> None:
    edit, base = world.edit(row), world.logits([query(0)])
    edit.save(tmp_path / "fox")
    before, hooks = snapshot(world.backbone)
    drawn = torch.get_rng_state()
    again = loaded(world, tmp_path / "fox", row)
    assert torch.equal(torch.get_rng_state(), drawn), "loading draws no random number"
    assert_untouched(world.backbone, before, hooks)
    assert torch.equal(world.logits([query(0)]), base)
    inside = logits(world, again)
    assert torch.equal(inside, logits(world, edit))
    assert [q.prompt for q in asked(again)] == [q.prompt for q in asked(edit)]
    changed = world.logits([query(0)])
    assert inside.shape != changed.shape or not torch.equal(inside, changed)
    assert again.id == edit.id == "e0"
    assert (again.origins, again.info) == (edit.origins, edit.info)


@each_row
def test_a_loaded_edit_goes_on_like_its_own(world: World, row, tmp_path) -> None:
    first, second = world.edit(row, 0), world.edit(row, 1)
    first.save(tmp_path / "first")
    again = loaded(world, tmp_path / "first", row)
    both = first | second
    assert torch.equal(logits(world, again | second), logits(world, both))
    assert both.id == "e0+e1"
    both.save(tmp_path / "both")
    whole = loaded(world, tmp_path / "both", row)
    assert torch.equal(logits(world, whole), logits(world, both))
    assert [origin.id for origin in whole.origins] == ["e0", "e1"]
    whole.save(tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / "both" / TENSORS).read_bytes()


def test_edits_of_all_kinds_together(world: World, tmp_path) -> None:
    whole = None
    # LiveEdit's network is another one than SERAC's, and a folder has one.
    for i, row in enumerate(row for row in ROWS if row[0] != "liveedit"):
        edit = world.edit(row, i % len(COLORS))
        whole = edit if whole is None else whole | edit
    whole.save(tmp_path / "all")
    parts = vars(world.method("unike", {}).get_shared_parts()) | {"network": world.learnt["serac"].network}
    again = Edit.load(tmp_path / "all", world.backbone, **parts)
    assert torch.equal(logits(world, again), logits(world, whole))
    assert again.origins == whole.origins


def test_edits_made_side_by_side_say_what_they_were_made_from(world: World, tmp_path) -> None:
    method = world.method("unike", {})
    edits = method.edit_many(world.backbone, [case(i).request for i in (0, 1)], world.prefixes(method))
    assert [edit.id for edit in edits] == ["e0", "e1"]
    (origin,) = edits[1].origins
    assert (origin.prompt, origin.target, origin.method) == ("what is it?", "a fox", "unike")
    assert origin.image is None
    assert origin.image_key != edits[0].origins[0].image_key
    assert origin.backbone == world.backbone.fingerprint
    assert origin.hparams["n_keys"] == 4
    assert origin.info["steps"] == edits[1].info["steps"]


def test_loaded_edits_are_asked_side_by_side_with_their_likes_alone(world: World, tmp_path) -> None:
    row = ("unike", {"beta": 0.5})
    first, second = world.edit(row, 0), world.edit(row, 1)
    first.save(tmp_path / "first")
    second.save(tmp_path / "second")
    again = [loaded(world, tmp_path / name, row) for name in ("first", "second")]
    assert again[0].batch(again) is not None
    assert again[0].batch([again[0], second]) is None
    together = again[0].batch(again)
    with together.applied(world.backbone, torch.tensor([1])):
        found = world.logits([query(1)])
    with second.applied(world.backbone):
        torch.testing.assert_close(found, world.logits([query(1)]), atol=2e-5, rtol=0)


# ---------------------------------------------------------------- the folder


def test_a_folder_says_what_is_in_it(world: World, tmp_path) -> None:
    edit = world.edit(("unike", {"beta": 0.5}))
    edit.id = "the fox | `1`"
    edit.save(tmp_path / "deep" / "fox")
    assert sorted(p.name for p in (tmp_path / "deep").rglob("*") if p.is_file()) == sorted(
        [CARD, INDEX, TENSORS]
    )
    saved = read_edit(tmp_path / "deep" / "fox")
    assert (saved.id, saved.kind, saved.backbone) == (edit.id, "routed", world.backbone.fingerprint)
    assert set(saved.needs) == {"knowledge"}
    assert saved.origins[0].hparams["seed"] == 42
    assert saved.info["steps"] == edit.info["steps"]
    assert {"torch", "unike"} <= saved.versions.keys()
    assert saved.licence
    front, body = (tmp_path / "deep" / "fox" / CARD).read_text().split("---\n")[1:3]
    assert yaml.safe_load(front)["library_name"] == "unike"
    assert "the fox" in body
    assert "what is it?" in body


def test_what_edits_share_is_not_kept_in_each(world: World, tmp_path) -> None:
    """Own pairs and patches only: zeta, its projection, bank and encoders are not in the file."""
    edit = world.edit(("unike", {"beta": 0.5}))
    edit.save(tmp_path / "fox")
    width, keys, gated = world.backbone.layout.width, 4, world.backbone.layout.ffn(4).gated
    a_layer = 2 * width + (3 * keys * width if gated else 2 * keys * width + keys)
    sizes = [t.numel() for t in load_file(tmp_path / "fox" / TENSORS).values()]
    assert sum(sizes) == 2 * a_layer
    assert edit.nbytes > 4 * 2 * a_layer
    again = loaded(world, tmp_path / "fox", ("unike", {"beta": 0.5}))
    assert again.nbytes == 4 * 2 * a_layer


def test_a_folder_appears_whole_or_not_at_all(world: World, tmp_path, monkeypatch) -> None:
    edit = world.edit(("ike", {"ike_retriever": "states", "ike_demonstrations": 2}))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "render_card", full)
        with pytest.raises(UserError, match="cannot be written: No space left"):
            edit.save(tmp_path / "fox")
    assert list(tmp_path.iterdir()) == []
    edit.save(tmp_path / "fox")
    with pytest.raises(UserError, match="is not empty"):
        edit.save(tmp_path / "fox")


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def fox(tmp_path_factory, worlds) -> tuple[World, Path]:
    """A saved edit that no test changes."""
    world = worlds.setdefault("blip2", World("blip2"))
    folder = tmp_path_factory.mktemp("edits") / "fox"
    world.edit(("unike", {})).save(folder)
    return world, folder


def refused(world: World, folder: Path, *words: str, **shared: Any) -> None:
    """Loading ends with one line, and the model is as before."""
    before, hooks = snapshot(world.backbone)
    with pytest.raises(UserError) as caught:
        Edit.load(folder, world.backbone, **(shared or vars(world.method("unike", {}).get_shared_parts())))
    (line,) = caught.value.problems
    assert all(word in line for word in words), line
    assert "\n" not in line
    assert_untouched(world.backbone, before, hooks)


def test_an_edit_of_another_backbone_is_refused(fox, worlds) -> None:
    world, folder = fox
    other = worlds.setdefault("minigpt4", World("minigpt4"))
    refused(other, folder, "another model", world.backbone.fingerprint, other.backbone.fingerprint)


def test_other_knowledge_is_refused(fox) -> None:
    world, folder = fox
    refused(world, folder, "was made with knowledge", "none is given", knowledge={})
    other = world.method("unike", {}).knowledge
    other[5].bank.values = other[5].bank.values + (torch.arange(6) == 2)[:, None]
    refused(world, folder, "was made with knowledge", "another one is given", knowledge=other)
    fewer = world.method("unike", {}).knowledge
    del fewer[4]
    refused(world, folder, "none is given", knowledge=fewer)
    assert loaded(world, folder, ("unike", {})).id == "e0"


def test_serac_wants_its_own_network(fox, tmp_path) -> None:
    world, _ = fox
    row = ROWS[IDS.index("serac-multimodal")]
    world.edit(row).save(tmp_path / "fox")
    refused(world, tmp_path / "fox", "needs the trained network", network=None)
    other = world.method(*row).build(world.backbone)
    refused(world, tmp_path / "fox", "was made with network", "another one is given", network=other)


def signed_again(folder: Path, index: dict[str, Any]) -> None:
    """As somebody writes it who knows how: the checksums fit."""
    data = (folder / TENSORS).read_bytes()
    own = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / INDEX).write_text(json.dumps(files.sign(index | own)))


TENSOR_CHANGES = {
    "another shape": (lambda t: t | {"0.4.key": torch.zeros(3)}, "shape"),
    "more rows": (lambda t: t | {"0.4.patch.values": torch.zeros(5, 64)}, "shape"),
    "missing": (lambda t: {k: v for k, v in t.items() if k != "0.5.value"}, "0.5.value: missing"),
    "one too many": (lambda t: t | {"1.4.key": torch.zeros(3)}, "is not part"),
    "not a number": (lambda t: t | {"0.4.key": t["0.4.key"] * float("nan")}, "not finite"),
    "whole numbers": (lambda t: t | {"0.4.key": t["0.4.key"].int()}, "torch.int32"),
    "huge": (lambda t: t | {"0.4.key": torch.zeros(1 << 22)}, "bytes of tensors"),
    "none": (lambda t: {}, "missing"),
}
INDEX_CHANGES: dict[str, tuple[Any, str]] = {
    "format": (lambda i: i | {"format": 2}, "format 2; expected 1"),
    "kind": (lambda i: i | {"kind": "pickle"}, "'pickle' is unknown"),
    "id": (lambda i: i | {"id": 7}, "id: expected str"),
    "layers": (lambda i: i | {"values": i["values"] | {"layers": [4, 99]}}, "layers: expected ascending"),
    "routing": (lambda i: i | {"values": i["values"] | {"routing": {}}}, "routing: expected external"),
    "k": (
        lambda i: i | {"values": i["values"] | {"routing": i["values"]["routing"] | {"k": -1}}},
        "k: expected a whole number at least 1",
    ),
    "no needs": (lambda i: i | {"needs": {}}, "was made with knowledge of its own"),
    "no origins": (lambda i: i | {"origins": []}, "origins: expected one or more"),
    "values": (lambda i: i | {"values": []}, "values: expected dict"),
    "bytes": (lambda i: i | {"bytes": True}, "checksum"),
}


@pytest.mark.parametrize("name", TENSOR_CHANGES)
def test_tensors_that_do_not_fit_are_refused(fox, tmp_path, name) -> None:
    world, folder = fox
    change, words = TENSOR_CHANGES[name]
    shutil.copytree(folder, tmp_path / "bad")
    save_file(change(load_file(folder / TENSORS)), tmp_path / "bad" / TENSORS)
    refused(world, tmp_path / "bad", TENSORS)
    signed_again(tmp_path / "bad", json.loads((folder / INDEX).read_text()))
    refused(world, tmp_path / "bad", words)


@pytest.mark.parametrize("name", INDEX_CHANGES)
def test_an_index_that_does_not_fit_is_refused(fox, tmp_path, name) -> None:
    world, folder = fox
    change, words = INDEX_CHANGES[name]
    shutil.copytree(folder, tmp_path / "bad")
    changed = change(json.loads((folder / INDEX).read_text()))
    (tmp_path / "bad" / INDEX).write_text(json.dumps(changed))
    refused(world, tmp_path / "bad", INDEX)
    if name != "bytes":
        signed_again(tmp_path / "bad", changed)
        refused(world, tmp_path / "bad", words)


def test_files_that_are_none_are_refused(fox, tmp_path) -> None:
    world, folder = fox
    refused(world, tmp_path / "nowhere", "no such folder")
    refused(world, tmp_path, INDEX, "cannot be read")
    for name in (INDEX, TENSORS):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / name).unlink()
        os.mkfifo(tmp_path / name / name)
        refused(world, tmp_path / name, "is no file")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from([INDEX, TENSORS]))
def test_a_damaged_byte_changes_nothing_or_is_refused(fox, tmp_path, data, name) -> None:
    world, folder = fox
    content = bytearray((folder / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at:] = data.draw(
        st.sampled_from([content[at + 1 :], bytes([content[at] ^ 8]) + content[at + 1 :], b""])
    )
    shutil.rmtree(tmp_path / "bad", ignore_errors=True)
    shutil.copytree(folder, tmp_path / "bad")
    (tmp_path / "bad" / name).write_bytes(content)
    try:
        found = loaded(world, tmp_path / "bad", ("unike", {}))
    except UserError as error:
        (line,) = error.problems
        assert "bad" in line
        return
    sound = loaded(world, folder, ("unike", {}))
    assert isinstance(found, RoutedEdit)
    assert (found.id, found.origins, found.routing) == (sound.id, sound.origins, sound.routing)
    assert all(torch.equal(t, found.state_dict()[n]) for n, t in sound.state_dict().items())


ELSEWHERE = """
import sys, torch
from unike import MultimodalEditor
from test_edit_files import told
torch.manual_seed(7)
editor = MultimodalEditor.from_hparams(sys.argv[1], False)
print(told(editor, editor.load(sys.argv[2])))
"""


def told(editor: MultimodalEditor, edit: Edit) -> str:
    """A checksum of logits under the edit."""
    picture = str(Path(editor.hparams.image_root) / "5.png")
    queries = [Query(picture, "what is number 5?", "two dogs"), Query(None, "who?", "a man")]
    with torch.no_grad(), edit.applied(editor.backbone):
        return digest({"logits": editor.backbone(encode_queries(editor.backbone, queries)).logits})


@pytest.mark.slow
def test_an_edit_loads_in_another_process_with_another_seed(copied: Project) -> None:
    hparams = HyperParams.from_hparams(copied.yaml)
    paths = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    editor = MultimodalEditor.from_hparams(hparams, progress=False)
    _, edited, _ = editor.edit("what is number 5?", "two dogs", str(copied.data / "5.png"))
    (edit,) = edited.edits
    edited.remove()
    edit.save(copied.root / "fox")
    command = [sys.executable, "-c", ELSEWHERE, str(copied.yaml), str(copied.root / "fox")]
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == told(editor, edit)
    assert told(editor, edit) != told(editor, PromptEdit((), 0)), "the edit changes them"
