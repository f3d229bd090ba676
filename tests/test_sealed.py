"""Damaged files of what is kept (knowledge, editors, scopes, runs): never read with another meaning."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers import Project
from test_hostile import refused
from test_run_edit import ROOT, start

from unike.config.hparams import HyperParams
from unike.knowledge.encoders import Disentangler, KnowledgeStates
from unike.methods.preparation.folders import find_editor, find_scope_classifier
from unike.methods.preparation.knowledge import LayerStates, load_states, save_knowledge
from unike.runs.checks import find_all
from unike.runs.records import RecordWriter, read_lines, read_manifest
from unike.runs.request import RunRequest
from unike.system import files as sealed
from unike.types import UserError


@pytest.fixture
def knowledge(tmp_path: Path) -> Path:
    folder, generator = tmp_path / "knowledge", torch.Generator().manual_seed(1)
    states = KnowledgeStates(*(torch.randn(6, 8, generator=generator) for _ in range(3)))
    ffn = torch.randn(6, 8, generator=generator)
    save_knowledge(folder, {1: LayerStates(states, ffn)}, {1: Disentangler(8, 16, 8)}, {}, {"layers": [1]})
    return folder


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("at", [0, 9, 300, -1])
def test_damaged_knowledge_is_one_line(knowledge: Path, at: int) -> None:
    assert list(load_states(knowledge, torch.device("cpu"))[0]) == [1]
    flipped(knowledge / "knowledge.safetensors", at)
    with pytest.raises(UserError) as caught:
        load_states(knowledge, torch.device("cpu"))
    (line,) = caught.value.problems
    assert "knowledge.safetensors: is damaged: its checksum" in line


def test_every_bit_of_an_index_counts(knowledge: Path) -> None:
    index = knowledge / "knowledge.json"
    sound, values, harmless = index.read_bytes(), sealed.read_index(index), 0
    assert values == {"layers": [1], "fit": {}}
    for at in range(len(sound)):
        flipped(index, at)
        try:
            kept = sealed.read_index(index)
            sealed.check_tensors(index, knowledge / "knowledge.safetensors")
        except UserError as error:
            (line,) = error.problems
            assert "is damaged" in line
        else:
            assert kept == values
            harmless += 1
        index.write_bytes(sound)
    assert harmless < 20, "spaces and line ends alone"


def test_an_index_without_a_checksum_is_refused(knowledge: Path) -> None:
    index = knowledge / "knowledge.json"
    index.write_text('{"layers": [1]}')
    with pytest.raises(UserError, match="it has no checksum; delete the folder"):
        load_states(knowledge, torch.device("cpu"))


@pytest.mark.parametrize("content", ["", "[]", "[" * 10**5, '{"sha256": 1}', '{"sha256": {"index": []}}'])
def test_an_index_that_is_none(knowledge: Path, content: str) -> None:
    (knowledge / "knowledge.json").write_text(content)
    with pytest.raises(UserError, match=r"knowledge\.json: is damaged"):
        sealed.read_index(knowledge / "knowledge.json")


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_damaged_knowledge_in_a_run(copied: Project, capsys, suffix: str) -> None:
    assert start(copied, "--size", "1", "max_steps=1") == 0
    (folder,) = (copied.root / "knowledge").iterdir()
    flipped(folder / f"knowledge{suffix}", 60)
    assert f"knowledge{suffix}: is damaged" in refused(copied, capsys, "max_steps=1")


def test_a_damaged_index_is_found_by_the_check(copied: Project, knowledge: Path) -> None:
    hparams = HyperParams.from_dict(copied.options(knowledge_dir=str(knowledge)))
    index, tensors = knowledge / "knowledge.json", knowledge / "knowledge.safetensors"

    def found() -> tuple[bool, str]:
        named = (f for f in find_all(RunRequest(hparams)) if "knowledge_dir" in f.what)
        # These are of another width than the model's, which is said besides.
        (one,) = (f for f in named if "of width" not in f.what)
        return one.ok, one.what

    problem = f"hparams: knowledge_dir: {index}: is damaged: it has no options; delete the folder"
    assert found() == (False, problem)
    sealed.write_index(index, {"layers": [1], "options": {"seed": hparams.seed}}, tensors)
    assert found() == (True, f"knowledge_dir: {knowledge}: memory and encoders are there")
    index.write_text(index.read_text().replace('"seed": ', '"seed": 1'))
    assert found()[0] is False
    assert "knowledge.json: is damaged: its checksum" in found()[1]


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize(("yaml", "what"), [("mend", "editor"), ("serac", "editor"), ("scoped", "scope")])
def test_shipped_editors_and_scopes_vouch_for_themselves(tmp_path, yaml: str, what: str, suffix: str) -> None:
    """Their folders are found while inputs are checked: a damaged index ends the run before it begins."""
    hparams = HyperParams.from_hparams(ROOT / "hparams" / yaml / "tiny_blip2.yaml")
    kept = {"editor": find_editor, "scope": find_scope_classifier}[what]
    key, parts = f"{what}_dir", {"editor": (hparams.method,), "scope": ()}[what]
    shipped = ROOT / str(getattr(hparams, key))
    shutil.copytree(shipped.joinpath(*parts), tmp_path.joinpath(*parts), dirs_exist_ok=True)
    copied = HyperParams.from_dict(hparams.to_dict() | {key: str(tmp_path)})
    folder = kept(copied)
    assert folder is not None
    index, tensors = folder / f"{what}.json", folder / f"{what}.safetensors"
    sealed.check_tensors(index, tensors)
    flipped(index.with_suffix(suffix), 100)
    with pytest.raises(UserError, match=f"{what}{suffix}: is damaged"):
        kept(copied) if suffix == ".json" else sealed.check_tensors(index, tensors)


def test_a_runs_own_files(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "run", False, {}) as writer:
        writer.write({"id": "a"})
    path = tmp_path / "run" / "records.jsonl"
    path.write_bytes(b"[" * 10**6 + b"\n" + path.read_bytes())
    with pytest.raises(UserError, match=r"records\.jsonl:1: is not a record"):
        read_lines(tmp_path / "run")
    (tmp_path / "run" / "manifest.json").write_text("[" * 10**6)
    with pytest.raises(UserError, match="cannot be read as a run's manifest"):
        read_manifest(tmp_path / "run")
