"""Before anything of a model is there: what ``--check`` says of disk, memory and minutes, and refuses."""

from __future__ import annotations

import os
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import Project
from test_run_edit import ROOT

import run_edit
from unike import own
from unike.backbones import downloads
from unike.backbones.checking import check_spec, list_kinds
from unike.backbones.families import find_published
from unike.backbones.published import PUBLISHED
from unike.config.hparams import HyperParams
from unike.methods.preparation.folders import read_knowledge_width
from unike.runs.costs import _count_trained_share, describe_run_costs, read_model_size

LLAVA = "llava-hf/llava-1.5-7b-hf"
CLASSES = {
    "blip-2": "Blip2", "instructblip": "InstructBlip", "llava": "Llava", "llava_onevision": "LlavaOnevision",
    "qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL",
}  # fmt: skip
# Of the published configurations, what changes no size, or is written flat there.
MORE: dict[str, Any] = {
    "llava": {"model_type": "clip_vision_model", "num_attention_heads": 16},
    "llava_onevision": {
        "model_type": "siglip_vision_model", "num_attention_heads": 16, "vision_use_head": False
    },
    "qwen2_vl": {"hidden_size": 3584},
    "qwen2_5_vl": {"out_hidden_size": 3584, "num_heads": 16},
}  # fmt: skip


def check(*arguments: str) -> int:
    return run_edit.main(["--hparams_dir", str(ROOT / "hparams" / "llava.yaml"), *arguments, "--check"])


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Says how many bytes the disk of the hub's cache has free; the cache is empty, the network is off."""
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download"):
        for key, value in (("HF_HUB_CACHE", str(tmp_path / "hub")), ("HF_HUB_OFFLINE", True)):
            monkeypatch.setattr(f"{module}.{key}", value, raising=False)
    monkeypatch.chdir(tmp_path)

    def set_free(free: float) -> None:
        usage = namedtuple("usage", "free")(int(free))
        monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage)

    return set_free


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_size_is_that_of_the_class(name: str) -> None:
    config: dict[str, Any] = dict(PUBLISHED[name].config)
    kind = config.pop("model_type")
    if kind in ("opt", "llama"):
        stem, suffix = {"opt": ("OPT", "ForCausalLM"), "llama": ("Llama", "ForCausalLM")}[kind]
    else:
        stem, suffix = CLASSES[kind], "ForConditionalGeneration"
        vision = dict(config.pop("vision_config"))
        if kind == "qwen2_vl":
            del vision["intermediate_size"]
        vision |= MORE.get(kind, {})
        text = config.pop("text_config", None)
        if text is None:
            config = {"text_config": {**config, "tie_word_embeddings": False}, "tie_word_embeddings": False}
        else:
            config["text_config"] = text
        config["vision_config"] = vision
    with torch.device("meta"):
        model = getattr(transformers, stem + suffix)(getattr(transformers, f"{stem}Config")(**config))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(PUBLISHED[name].parameters, rel=1e-3)


def test_every_yaml_of_a_real_model_names_a_published_one() -> None:
    paths = [p for p in ROOT.glob("hparams/**/*.yaml") if not p.name.startswith(("tiny", "smol"))]
    paths = [p for p in paths if "lavis" not in p.parts]
    names = {HyperParams.from_hparams(p).name for p in paths if "tables" not in p.name and p.stem != "tuning"}
    assert names == set(PUBLISHED) - {"facebook/opt-2.7b"}
    kinds = {kind for kind, _ in list_kinds().values()}
    assert {PUBLISHED[name].config["model_type"] for name in names} <= kinds | {"llama"}


def test_the_check_says_disk_memory_minutes_and_what_to_paste(room: Any, capsys, tmp_path: Path) -> None:
    room(100e9)
    before = sorted(tmp_path.rglob("*"))
    assert check("--task", "vqa", "--size", "50") == 2
    lines = capsys.readouterr().out.splitlines()
    (name,) = (line for line in lines if "name: " in line and line[0] == "•")
    size = PUBLISHED[LLAVA].parameters * 2
    assert f"{size / 1e9:.1f} GB of disk (100.0 GB are free)" in name
    assert f"about {round(size * 8 / 100e6 / 60)} minutes at 100 Mbit/s" in name
    assert any(f"memory: the weights take {size / 1e9:.1f} GB in float16" in line for line in lines)
    assert any(re.search(r"run: 50 edits, at most about \d+ (s|minutes|hours)", line) for line in lines)
    assert lines[-4:-1] == ["to paste:", f"  hf download {LLAVA}", lines[-2]]
    assert "mmedit" in lines[-2].lower()
    yaml = ROOT / "hparams" / "llava.yaml"
    assert lines[-1] == f"  python run_edit.py --hparams_dir {yaml} --task vqa --size 50"
    assert sorted(tmp_path.rglob("*")) == before


def test_own_edits_know_a_published_model_before_it_is_there(room: Any, capsys) -> None:
    room(100e9)
    for name, known in PUBLISHED.items():
        if known.config["model_type"] in CLASSES:
            assert own.run(["--model", name, "--check", "--device", "cpu"]) == 0
            shown = capsys.readouterr().out
            assert f"{known.disk / 1e9:.1f} GB of disk" in shown
            assert shown.splitlines()[-1] == f"  hf download {name}"
    ends = {name: find_published(name).answer_end for name in PUBLISHED if name != "Vision-CAIR/vicuna-7b"
            and name != "facebook/opt-2.7b"}  # fmt: skip
    assert {name for name, end in ends.items() if end == "line_break"} == {"Salesforce/blip2-opt-2.7b"}
    room(1e9)
    assert own.run(["--model", LLAVA, "--check"]) == 2


def test_a_full_disk_is_a_problem_before_the_download(room: Any, capsys) -> None:
    room(3e9)
    assert check() == 2
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("✗")]
    assert any("only 3.0 GB are free in" in line and "set HF_HOME" in line for line in wrong)
    spec = HyperParams.from_hparams(ROOT / "hparams" / "llava.yaml").backbone
    assert [finding.ok for finding in check_spec(spec)] == [False]
    room(100e9)
    assert [finding.ok for finding in check_spec(spec)] == [True]


def test_a_model_in_the_hubs_cache_is_looked_at(room: Any, tmp_path: Path) -> None:
    room(0)
    place = tmp_path / "hub" / "models--llava-hf--llava-1.5-7b-hf"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    toy = ROOT / "hugging_cache" / "tiny-blip2-opt"
    shutil.copytree(
        toy, place / "snapshots" / ("a" * 40), ignore=lambda *_: ["knowledge", "scope", "editors"]
    )
    hparams = HyperParams.from_hparams(ROOT / "hparams" / "llava.yaml")
    (found,) = check_spec(hparams.backbone)
    assert not found.ok
    assert "holds a `blip-2` model" in found.what
    (found,) = check_spec(HyperParams(model_name="blip2", name=LLAVA).backbone)
    assert found.ok
    assert "is in the Hugging Face hub's cache" in found.what
    # Its configuration alone is not the model.
    os.remove(place / "snapshots" / ("a" * 40) / "model.safetensors")
    (found,) = check_spec(HyperParams(model_name="blip2", name=LLAVA).backbone)
    assert "will be looked for on the Hugging Face hub" in found.what


def test_a_runs_time_grows_with_what_it_does() -> None:
    hparams = HyperParams.from_hparams(ROOT / "hparams" / "llava.yaml", ["device=cuda:77"])
    size = read_model_size(hparams)
    assert size is not None
    assert (size.width, size.image_tokens) == (4096, 576)
    assert _count_trained_share(hparams) == 5 / 32
    assert _count_trained_share(hparams.replace(layers=32)) == 1

    def count(edits: int | None, **changes: Any) -> float:
        (found,) = describe_run_costs(hparams.replace(**changes), edits)
        (flops,) = re.findall(r"at most (\S+) floating-point operations", found.what)
        return float(flops)

    assert count(20) == pytest.approx(20 * count(None), rel=0.1)
    assert count(1, max_steps=600) > count(1) > count(1, max_steps=6)
    assert count(1, max_new_tokens=512) > count(1)


def test_a_toys_knowledge_is_refused_wherever_it_lies(
    tmp_path: Path, blip2_project: Project, capsys, monkeypatch
) -> None:
    shipped = ROOT / "hugging_cache" / "tiny-blip2-opt" / "knowledge"
    assert read_knowledge_width(shipped) == 192
    shutil.copytree(shipped, tmp_path / "knowledge")
    given = ["--hparams_dir", str(blip2_project.yaml), "--check"]
    line = "was made for a decoder of width 192, and that of name: "
    monkeypatch.chdir(blip2_project.root)
    assert run_edit.main([*given, f"knowledge_dir={tmp_path / 'knowledge'}"]) == 2
    assert line in capsys.readouterr().out
    assert run_edit.main(given) == 0
    assert line not in capsys.readouterr().out
    toy = ["--hparams_dir", str(ROOT / "hparams" / "tiny_blip2.yaml"), "--check"]
    assert run_edit.main([*toy, f"knowledge_dir={tmp_path / 'knowledge'}"]) == 0
    (tmp_path / "knowledge" / "knowledge.safetensors").write_bytes(b"\xff" * 20)
    assert read_knowledge_width(tmp_path / "knowledge") is None
