"""Wrong weight files: each is named with its key, what was expected and where to get it."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original_files import FILES, make_spec
from safetensors.torch import load_file, save_file

from unike.backbones import checking
from unike.backbones.checkpoints import check_spec, estimate_memory, load_original, load_state, require_files
from unike.types import BackboneSpec, UserError


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the files that a test may damage."""
    return Path(shutil.copytree(FILES, tmp_path / "files"))


Damage = Callable[[Path], None]


class Trap:
    """Makes a folder when it is unpickled by somebody who runs what a file says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def write(text: bytes) -> Damage:
    return lambda path: path.write_bytes(text) and None


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_old_format(path: Path) -> None:
    torch.save({"cls_token": torch.ones(5000)}, path, _use_new_zipfile_serialization=False)
    cut(path)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (Path.unlink, "does not exist"),
    "folder": (replace_by_folder, "is a directory"),
    "empty": (write(b""), "is empty"),
    "text": (write(b"weights go here\n"), "is not a checkpoint"),
    "web page": (write(b"<!DOCTYPE html><title>Sign in</title>"), "is a web page"),
    "pointer": (write(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS pointer"),
    "truncated": (cut, "is truncated"),
    "truncated, old format": (cut_old_format, "is truncated"),
    "no tensors": (lambda path: torch.save({"model": {"epoch": 3}}, path), "holds no named tensors"),
    "a bare tensor": (lambda path: torch.save(torch.ones(3), path), "holds no named tensors"),
    "other tensors": (lambda path: torch.save({"a": torch.ones(3)}, path), "has no `"),
}
KEYS = ("state_dict_file", "qformer_checkpoint", "pretrained_ckpt")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_its_key_and_remedy(copied: Path, key: str, damage: str) -> None:
    spec = make_spec("minigpt4", copied)
    require_files(spec)
    path = Path(getattr(spec, key))
    act, reason = DAMAGES[damage]
    act(path)
    with pytest.raises(UserError) as caught:
        load_original(spec)
    (problem,) = caught.value.problems
    assert problem.startswith(f"small.yaml: {key}: {path}: ")
    assert reason in problem
    assert "expected " in problem
    assert "; get " in problem
    assert "\n" not in problem


@pytest.mark.parametrize("old_format", [False, True])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, old_format: bool) -> None:
    target, path = tmp_path / "was-run", tmp_path / "weights.pth"
    if old_format:
        path.write_bytes(pickle.dumps({"model": Trap(target)}, protocol=2))
    else:
        torch.save({"model": Trap(target)}, path)
    with pytest.raises(UserError, match="holds code or objects other than tensors, and was not run"):
        load_state(path)
    assert not target.exists()
    # The trap is a live one: whoever trusts the file springs it.
    if old_format:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert target.exists()


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 100])
def test_a_bad_safetensors_file_is_an_error_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_state(path, "EVA")
    (problem,) = caught.value.problems
    assert str(path) in problem
    assert "expected EVA" in problem
    assert "\n" not in problem


def test_swapped_files_are_recognised() -> None:
    spec = make_spec("minigpt4")
    swapped = dataclasses.replace(
        spec, state_dict_file=spec.pretrained_ckpt, pretrained_ckpt=spec.state_dict_file
    )
    first, _, third, _ = check_spec(swapped)
    assert "is MiniGPT-4's projection" in first.what
    assert "is EVA ViT-g" in third.what
    other = make_spec("blip2", qformer_checkpoint=spec.qformer_checkpoint)
    with pytest.raises(UserError, match="is BLIP-2's Q-Former for FlanT5-xxl"):
        require_files(other)


def test_everything_missing_is_reported_at_once_before_anything_is_loaded() -> None:
    spec = BackboneSpec("minigpt4", "no/such/folder", state_dict_file="no-eva.pth", source="my.yaml")
    with pytest.raises(UserError) as caught:
        load_original(spec)
    keys = [problem.split(": ")[1] for problem in caught.value.problems]
    assert keys == ["state_dict_file", "qformer_checkpoint", "pretrained_ckpt", "name"]
    text = str(caught.value)
    for remedy in ("eva_vit_g.pth", "flant5xxl.pth", "MiniGPT-4 (Vicuna 7B)", "Vicuna-7B V0"):
        assert remedy in text


# ---------------------------------------------------------------- the folder of the language model


def test_a_hub_name_is_a_note_and_a_lost_folder_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    note = check_spec(make_spec("blip2", name="facebook/opt-2.7b"))[-1]
    assert note.ok
    assert note.remedy
    assert not check_spec(make_spec("blip2", name="hugging_cache/opt-2.7b"))[-1].ok
    (tmp_path / "models").mkdir()
    assert not check_spec(make_spec("blip2", name="models/opt-2.7b"))[-1].ok


def test_the_folder_must_hold_the_right_model(copied: Path) -> None:
    llama = check_spec(make_spec("blip2", name=str(copied / "llama")))[-1]
    assert "holds a `llama` model, not `opt`" in llama.what
    assert "facebook/opt-2.7b" in (llama.remedy or "")
    alone = BackboneSpec("blip2", str(copied / "opt"))
    assert "state_dict_file" in check_spec(alone)[-1].what
    (copied / "opt" / "config.json").write_text(
        '{"model_type": "blip-2", "text_config": {"model_type": "opt"}}'
    )
    assert check_spec(alone) == [check_spec(alone)[0]]
    assert check_spec(alone)[0].ok
    assert "whole BLIP-2 model" in check_spec(make_spec("blip2", copied))[-1].what


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: cut(folder / "model.safetensors"), "is truncated"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer"),
        (lambda folder: (folder / "config.json").unlink(), "is missing or not JSON"),
        (lambda folder: (folder / "config.json").write_text("{"), "is missing or not JSON"),
        (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), "is a file, not a folder"),
    ],
)
def test_a_damaged_folder_is_an_error(copied: Path, act: Callable[[Path], Any], reason: str) -> None:
    act(copied / "opt")
    finding = check_spec(make_spec("blip2", copied))[-1]
    assert not finding.ok
    assert reason in finding.what


def test_every_shard_must_be_there(copied: Path) -> None:
    (copied / "opt" / "model.safetensors").rename(copied / "opt" / "model-1-of-2.safetensors")
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (copied / "opt" / "model.safetensors.index.json").write_text(json.dumps(index))
    finding = check_spec(make_spec("blip2", copied))[-1]
    assert "lacks model-2-of-2.safetensors" in finding.what


def test_vicuna_v15_is_noticed(copied: Path) -> None:
    path = copied / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 4096}))
    note = check_spec(make_spec("minigpt4", copied))[-1]
    assert note.ok
    assert "Vicuna v1.5" in note.what
    assert "V0" in (note.remedy or "")


def test_absent_weights_never_become_random_ones(copied: Path) -> None:
    path = copied / "llama" / "model.safetensors"
    state = load_file(path)
    del state["model.layers.2.mlp.up_proj.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the weights model\.layers\.2\.mlp\.up_proj\.weight"):
        load_original(make_spec("minigpt4", copied))


# ---------------------------------------------------------------- memory


def test_memory_is_compared_with_what_is_free(monkeypatch: pytest.MonkeyPatch, copied: Path) -> None:
    spec = make_spec("minigpt4")
    assert estimate_memory(spec).ok
    monkeypatch.setattr(checking, "_measure_free_memory", lambda: 1_000_000)
    full = estimate_memory(spec)
    assert not full.ok
    assert "1.0 MB are free" in full.what
    assert "bfloat16" in (full.remedy or "")
    assert estimate_memory(dataclasses.replace(spec, dtype="bfloat16")).ok
    monkeypatch.setattr(checking, "_measure_free_memory", lambda: None)
    assert estimate_memory(spec).ok
    assert not estimate_memory(dataclasses.replace(spec, dtype="float")).ok
    # An original file that is not there counts as the published one: 986 M numbers.
    (copied / "eva_vit.pth").unlink()
    assert "the weights take 3.9 GB in float32" in estimate_memory(make_spec("minigpt4", copied)).what
    for weights in (copied / "llama").glob("*.safetensors"):
        weights.unlink()
    assert "cannot be estimated" in estimate_memory(make_spec("minigpt4", copied)).what


def test_free_memory_is_known_here() -> None:
    free = checking._measure_free_memory()
    assert free is None or free > 0
