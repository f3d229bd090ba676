"""Inputs made to do harm: each is refused in one line, with exit code 2, soon, and leaves no trace."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import Project, record
from original_files import make_spec
from test_run_edit import errors, start

from benchmarks.mutants import LONG
from unike.backbones.checkpoint_files import load_state
from unike.config.hparams import HyperParams
from unike.datasets.images import open_image
from unike.datasets.mmedit import IMAGE_FIELDS, load_records
from unike.runs.inputs import open_datasets
from unike.types import UserError

SECONDS = 5


class Code:
    """What a pickle runs when it is trusted: it makes the folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


def all_files(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(project: Project, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a run ends with: soon, and with every file as it was, the project's folder
    and what lies around it."""
    before, began = all_files(project.root.parent), time.process_time()
    capsys.readouterr()
    assert start(project, "--task", "vqa", *arguments) == 2
    assert time.process_time() - began < SECONDS
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert len(line) < 2000
    assert all_files(project.root.parent) == before
    return line


# ---------------------------------------------------------------- YAML

ALIASES = "\n".join(
    ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
)
YAMLS = {
    "aliases": (ALIASES, "with its aliases written out"),
    "self": ("data: &a {vqa: *a}", "alias refers to what it stands in"),
    "deep": ("data: " + "[" * 5000, "not valid YAML"),
    "deep and closed": ("data: " + "[" * 5000 + "]" * 5000, "not valid YAML"),
    "python": ("name: !!python/object/apply:os.mkdir [canary]", "could not determine a constructor"),
    "python name": ("name: !!python/name:os.system ''", "could not determine a constructor"),
    "long": ("name: " + "a" * LONG, "more than 262144 bytes"),
    "long key": ("a" * (1 << 17) + ": 1", ""),
    "long value": ("name: " + "a" * (1 << 17), "expected at most 16384"),
    "not a number": ("lr: .nan", "lr: expected a number above 0"),
    "twice": ("seed: 1\nseed: 2", "seed: given twice"),
}


@pytest.mark.parametrize("name", YAMLS)
@pytest.mark.usefixtures("nothing_loads")
def test_yaml(copied: Project, capsys, monkeypatch, name: str) -> None:
    text, reason = YAMLS[name]
    kept = copied.options()
    kept.pop(text.partition(":")[0], None)
    copied.yaml.write_text(yaml.safe_dump(kept) + text)
    monkeypatch.chdir(copied.root)
    assert reason in refused(copied, capsys)


# ---------------------------------------------------------------- annotations

SOUND = json.dumps([record(5)])
ANNOTATIONS = {
    "long field": (json.dumps([record(5) | {"src": "w" * LONG}]), "field 'src': 10485760 characters"),
    "long key": (json.dumps([{"w" * LONG: 1}]), "field 'src' is missing"),
    "deep": ("[" * LONG, "cannot be read"),
    "deep in a field": (
        SOUND[:-2] + ', "x": ' + '{"a":' * 10**5 + "1" + "}" * 10**5 + "}]",
        "cannot be read",
    ),
    "nan": (SOUND.replace('"nothing"', "NaN"), "NaN is no JSON value"),
    "infinity": (SOUND[:-2] + ', "x": -Infinity}]', "-Infinity is no JSON value"),
    "twice": (SOUND[:-2] + ', "alt": "another"}]', "record 0: field 'alt' is given twice"),
    "huge number": (SOUND[:-2] + ', "x": ' + "9" * 10**6 + "}]", "cannot be read"),
    "null byte": (json.dumps([record(5) | {"image": "5\0.png"}]), "missing image"),
    "surrogate": (json.dumps([record(5) | {"alt": "\ud800"}]), "half of a surrogate pair"),
    "no text": ('[{"src": "\udcff"}]'.encode("utf-8", "surrogateescape"), "not UTF-8"),
}


@pytest.mark.parametrize("name", ANNOTATIONS)
@pytest.mark.usefixtures("nothing_loads")
def test_annotations(copied: Project, capsys, name: str) -> None:
    content, reason = ANNOTATIONS[name]
    data = content if isinstance(content, bytes) else content.encode()
    (copied.data / "vqa_eval.json").write_bytes(data)
    assert reason in refused(copied, capsys)


def test_a_field_given_twice_is_one_broken_record(copied: Project) -> None:
    path = copied.data / "vqa_eval.json"
    path.write_text(SOUND[:-2] + ', "alt": "another"}, ' + json.dumps(record(6)) + "]")
    hparams = HyperParams.from_hparams(copied.yaml)
    (case,) = open_datasets(hparams, "vqa", skip_broken=True)
    assert case.request.id == "vqa-1"
    path.write_text("{" + '"a": 1, ' * 2 + '"b": 2}')
    with pytest.raises(UserError, match="expected a list of records, got an object"):
        load_records(path)


OUTSIDE = {
    "above": lambda project: "../outside.png",
    "deep": lambda project: "a/../../outside.png",
    "absolute": lambda project: str(project.root / "outside.png"),
    "link": lambda project: "link.png",
    "link to a folder": lambda project: "folder/outside.png",
}


@pytest.mark.parametrize("field", IMAGE_FIELDS)
@pytest.mark.parametrize("way", OUTSIDE)
@pytest.mark.usefixtures("nothing_loads")
def test_pictures_outside_of_their_folder(copied: Project, capsys, way: str, field: str) -> None:
    shutil.copy(copied.data / "5.png", copied.root / "outside.png")
    (copied.data / "link.png").symlink_to(copied.root / "outside.png")
    (copied.data / "folder").symlink_to(copied.root, target_is_directory=True)
    (copied.data / "a").mkdir()
    asked = record(5) | {field: OUTSIDE[way](copied), "same_question_a": "a fox"}
    copied.write_records([{"same_question_image": "5.png"} | asked])
    line = refused(copied, capsys)
    assert f"record 0: field {field!r}: " in line
    assert "lies outside of" in line
    # The picture itself is sound, and is taken where that is wanted.
    with pytest.raises(AssertionError, match="a backbone is loaded"):
        start(copied, "--task", "vqa", "allow_outside=true")


def test_links_within_the_folder_are_taken(copied: Project) -> None:
    (copied.data / "link.png").symlink_to("5.png")
    copied.write_records([record(5) | {"image": "link.png", "m_loc": "../data/5.png"}])
    assert len(open_datasets(HyperParams.from_hparams(copied.yaml), "vqa")) == 1


# ---------------------------------------------------------------- pictures


def png(width: int, height: int) -> bytes:
    """A PNG of some kilobytes that unpacks to as many black pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" * (1 + width)) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG whose comment unpacks to 100 MB."""
    sound, comment = png(2, 2), b"Comment\0\0" + zlib.compress(b"x" * 10**8, 9)
    data = struct.pack(">I", len(comment)) + b"zTXt" + comment
    return sound[:33] + data + struct.pack(">I", zlib.crc32(b"zTXt" + comment)) + sound[33:]


def test_a_picture_of_too_many_pixels_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(12_000, 10_000))
    assert path.stat().st_size < 1 << 20
    began = time.process_time()
    with pytest.raises(UserError, match="120000000 pixels; expected at most"):
        open_image(path)
    assert time.process_time() - began < 1
    path.write_bytes(png(200, 100))
    assert open_image(path).size == (200, 100)


def test_a_picture_with_a_bomb_for_a_comment(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(text_bomb())
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UserError, match=r"bomb\.png: image cannot be read"):
        open_image(path)


@pytest.mark.slow
def test_a_picture_of_too_many_pixels_in_a_run(copied: Project, capsys) -> None:
    (copied.data / "5.png").write_bytes(png(12_000, 10_000))
    around = {p for p in copied.root.parent.rglob("*") if copied.root not in p.parents}
    assert start(copied, "--task", "vqa", "--output", str(copied.root / "run")) == 2
    (line,) = errors(capsys)
    assert "5.png: 120000000 pixels; expected at most" in line
    assert not (copied.root / "run").exists()
    assert {p for p in copied.root.parent.rglob("*") if copied.root not in p.parents} == around


# ---------------------------------------------------------------- checkpoints


def deflated(folder: Path) -> bytes:
    """A checkpoint of zeros, packed a thousandfold."""
    torch.save({"cls_token": torch.zeros(LONG)}, folder / "plain.pth")
    out = io.BytesIO()
    with (
        zipfile.ZipFile(folder / "plain.pth") as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    (folder / "plain.pth").unlink()
    return out.getvalue()


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    path.write_bytes(deflated(tmp_path))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UserError, match=r"bomb\.pth: claims \d+ bytes in \d+; expected"):
        load_state(path)


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("kind", ["code", "bomb"])
def test_original_files_that_do_harm(copied: Project, capsys, kind: str) -> None:
    canary, path = copied.root / "canary", copied.root / "eva.pth"
    if kind == "code":
        torch.save({"cls_token": Code(canary)}, path)
    else:
        path.write_bytes(deflated(copied.root))
    spec = make_spec("blip2")
    copied.write_yaml(name=spec.name, state_dict_file=str(path), qformer_checkpoint=spec.qformer_checkpoint)
    line = refused(copied, capsys)
    assert ("was not run" if kind == "code" else "claims") in line
    assert not canary.exists()
    if kind == "code":
        torch.load(path, weights_only=False)
        assert canary.exists(), "the file is a live trap"


def folder_code(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"x": Code(model.parent / "canary")}, model / "pytorch_model.bin")


def remote_code(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModel": "mine.M"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text("import os\nos.mkdir('canary')\n")


def in_config(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    config["text_config"] |= values
    (model / "config.json").write_text(json.dumps(config))


def put(name: str, text: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        (model / name).write_text(text)

    return damage


def renamed_tensor(model: Path) -> None:
    """One bit of a tensor's name: transformers would draw these weights at random."""
    content = (model / "model.safetensors").read_bytes()
    assert content.count(b"decoder.embed_tokens.weight") == 1
    swapped = content.replace(b"decoder.embed_tokens.weight", b"decoder.embed_tokens.weighu")
    (model / "model.safetensors").write_bytes(swapped)


def endless_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b'{"a":')


# What is done to a model's folder, what is said of it, and whether before anything is loaded.
FOLDERS: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "code": (folder_code, "was not run", True),
    "remote code": (remote_code, "holds a `mine` model", True),
    "layers": (lambda m: in_config(m, num_hidden_layers=10**9), "num_hidden_layers 1000000000", True),
    "no object": (put("config.json", '{"text_config": "x"}'), "holds a", True),
    "deep": (put("config.json", "[" * 10**6), "not JSON", True),
    "header": (endless_header, "is truncated or not a checkpoint", True),
    "width": (lambda m: in_config(m, vocab_size=10**15), "cannot be loaded", False),
    "type": (lambda m: in_config(m, hidden_size="wide"), "cannot be loaded", False),
    "name": (renamed_tensor, "lacks the weights", False),
    "tokenizer": (put("tokenizer.json", "{"), "tokenizer does not load", False),
    "pictures": (put("preprocessor_config.json", "["), "cannot be read", False),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_models_folder(copied: Project, capsys, monkeypatch, name: str, request) -> None:
    damage, reason, before = FOLDERS[name]
    damage(copied.root / "model")
    monkeypatch.chdir(copied.root)
    if before:
        request.getfixturevalue("nothing_loads")
    assert reason in refused(copied, capsys)
