"""The small original files (random weights, real layout), and specs and copies of them for tests."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from unike.types import BackboneSpec

FILES = Path(__file__).parent / "fixtures" / "original_checkpoints"
# An environment with LAVIS (`make test-lavis`) has no class that the other families need, and the other
# way round.
LAVIS = find_spec("lavis") is not None
FAMILIES = ("lavis",) if LAVIS else ("blip2", "minigpt4")


def make_spec(family: str, folder: Path = FILES, **changes: Any) -> BackboneSpec:
    """The spec of the small files, whose head counts aren't the originals'."""
    minigpt4 = family == "minigpt4"
    spec = BackboneSpec(
        model_name="minigpt4" if minigpt4 else "blip2",
        name=str(folder / ("llama" if minigpt4 else "opt")),
        state_dict_file=str(folder / "eva_vit.pth"),
        qformer_checkpoint=str(
            folder / ("blip2_pretrained_flant5xxl.pth" if minigpt4 else "blip2_pretrained_opt.pth")
        ),
        pretrained_ckpt=str(folder / "pretrained_minigpt4.pth") if minigpt4 else None,
        image_size=84,
        vision_config={"num_hidden_layers": 3, "num_attention_heads": 4},
        qformer_config={"num_attention_heads": 4},
        source="small.yaml",
    )
    if family == "lavis":
        spec = dataclasses.replace(spec, backend="lavis", name=str(published_opt()))
    return dataclasses.replace(spec, **changes)


@cache
def _kept() -> TemporaryDirectory[str]:
    """Stays until the tests end."""
    return TemporaryDirectory()


def published_opt() -> Path:
    """The small OPT folder as OPT was published: vocabulary and merges in files of their own."""
    folder = Path(_kept().name) / "opt"
    if folder.is_dir():
        return folder
    shutil.copytree(FILES / "opt", folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    # The published one puts BOS before a text; what LAVIS asks is then not what we ask.
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
