"""``backend: lavis``: what it says where LAVIS is missing, and where it is not, that LAVIS answers.

The second half runs in LAVIS's own environment (`make test-lavis`), as do the contracts of backbones and
methods there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import OPTIONS, Project, record, save_pictures
from original_files import FILES, LAVIS, make_spec
from ours import LIMIT, PROMPTS, TARGET, answers, pictures, pixels
from safetensors.torch import load_file
from untouched import assert_untouched, hook_count, weights_of

from unike.backbones import load_backbone
from unike.backbones.checking import check_spec, require_files
from unike.config.hparams import HyperParams
from unike.runs.packages import check_packages
from unike.types import BackboneSpec, UserError

ROOT = Path(__file__).parents[1]
YAML = ROOT / "hparams" / "lavis" / "blip2.yaml"
CLOSE = {"atol": 5e-6, "rtol": 0}
SPEC = {k: v for k, v in vars(make_spec("lavis")).items() if k != "source"} | {
    "device": "cpu",
    "max_new_tokens": 8,
}
here = pytest.mark.skipif(not LAVIS, reason="needs LAVIS: make test-lavis")


def problems(**changes: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        require_files(make_spec("lavis", **changes))
    return [p for p in caught.value.problems if LAVIS or "not installed" not in p]


# ---------------------------------------------------------------- before anything is loaded


@pytest.mark.skipif(LAVIS, reason="LAVIS is here")
def test_without_lavis_one_line_says_how_to_get_it() -> None:
    ran = subprocess.run(
        [sys.executable, ROOT / "run_edit.py", "--hparams_dir", YAML, "--check"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    lines = [line for line in ran.stdout.splitlines() if "salesforce-lavis" in line]
    assert ran.returncode == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"✗ {YAML}: backend: lavis:")
    assert "pip install -r requirements-lavis.txt" in lines[0]
    with pytest.raises(UserError, match="salesforce-lavis is not installed"):
        load_backbone(make_spec("lavis"))


def test_beside_lavis_the_other_backend_is_refused(monkeypatch) -> None:
    if not LAVIS:
        monkeypatch.setattr("unike.backbones.checking.metadata.version", lambda _: "4.26.1")
    with pytest.raises(UserError, match="backend: transformers: finds transformers 4"):
        load_backbone(make_spec("blip2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device_map": "auto"}, "device_map: auto: not with backend: lavis; leave device_map out"),
        ({"quantization": "int8"}, "quantization: int8: not with backend: lavis"),
        (
            {"model_name": "minigpt4", "pretrained_ckpt": str(FILES / "pretrained_minigpt4.pth")},
            "has no minigpt4",
        ),
        ({"name": str(FILES / "opt")}, "holds no vocabulary; expected one of vocab.json"),
        ({"state_dict_file": "no.pth"}, "state_dict_file: no.pth: does not exist"),
        (
            {"state_dict_file": None, "qformer_checkpoint": None, "image_size": None, "name": "opt2.7b"},
            "is no model type of LAVIS; expected pretrain_opt2.7b, ",
        ),
        (
            {"state_dict_file": None, "qformer_checkpoint": None, "name": "pretrain_opt2.7b"},
            "image_size: 84: not with backend: lavis",
        ),
    ],
)
def test_what_lavis_cannot_do_is_said_before_loading(changes: dict[str, Any], message: str) -> None:
    assert any(message in problem for problem in problems(**changes))
    if LAVIS:
        assert all(finding.ok for finding in check_spec(make_spec("lavis")))


def test_the_yaml_is_that_of_our_own_blip2_through_lavis() -> None:
    ours, lavis = (HyperParams.from_hparams(p).to_dict() for p in (ROOT / "hparams" / "blip2.yaml", YAML))
    assert lavis.pop("backend") == "lavis"
    assert ours.pop("backend") == "transformers"
    # Ours comes from the hub, LAVIS's from the original files.
    for key in ("name", "state_dict_file", "qformer_checkpoint", "qformer_name_or_path"):
        assert ours.pop(key) != lavis.pop(key)
    assert ours == lavis
    assert YAML.read_text().startswith(
        "# .venv-lavis/bin/python run_edit.py --hparams_dir hparams/lavis/blip2.yaml"
    )


def test_the_environment_is_checked_by_its_own_versions(monkeypatch) -> None:
    if not LAVIS:
        # One line says all: that LAVIS is not here.
        assert check_packages("lavis") == []
        monkeypatch.setattr("unike.runs.packages.importlib.util.find_spec", lambda _: object())
    found = check_packages("lavis")
    named = {finding.what.split()[0].rstrip(":") for finding in found}
    assert {"salesforce-lavis", "transformers", "torch", "torchvision", "accelerate"} <= named
    assert all(finding.ok for finding in found) == LAVIS


# ---------------------------------------------------------------- LAVIS's own modules


@pytest.fixture(scope="module")
def backbone() -> Any:
    return load_backbone(make_spec("lavis"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What our own BLIP2-OPT computes from the same files now, in the environment of `make test`."""
    python, target = ROOT / ".venv" / "bin" / "python", tmp_path_factory.mktemp("ours") / "ours.safetensors"
    there = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([python, ROOT / "tests" / "ours.py", target], check=True, cwd=ROOT, env=there)
    return load_file(target)


@here
@torch.no_grad()
def test_our_blip2_is_lavis(backbone, ours: dict[str, torch.Tensor]) -> None:
    """Ours beside LAVIS's modules, called as LAVIS calls them: nothing of the backbone is between."""
    model = backbone.model
    shown = ours["pixels"]
    vision = model.ln_vision(model.visual_encoder(shown))
    torch.testing.assert_close(ours["vision"], vision, **CLOSE)
    query = model.query_tokens.expand(len(shown), -1, -1)
    read = model.Qformer.bert(query_embeds=query, encoder_hidden_states=vision).last_hidden_state
    torch.testing.assert_close(ours["qformer"], read, **CLOSE)
    tokens = model.opt_proj(read)
    for i, prompt in enumerate((*PROMPTS, PROMPTS[0])):
        ids = model.opt_tokenizer(f"{prompt} {TARGET}", return_tensors="pt").input_ids
        words = model.opt_model.model.decoder.embed_tokens(ids)
        embeds = torch.cat([tokens[i : i + 1], words], 1) if i < len(shown) else words
        logits = model.opt_model(inputs_embeds=embeds).logits[0]
        torch.testing.assert_close(ours[f"logits.{i}"], logits, **CLOSE)
    assert not torch.allclose(ours["qformer"][0], ours["qformer"][1], atol=1e-3), "the pictures must differ"
    for i, prompt in enumerate(PROMPTS):
        samples = {"image": shown[i : i + 1], "prompt": prompt}
        (written,) = model.generate(samples, num_beams=1, max_length=LIMIT)
        text = bytes(ours[f"text.{i}"].tolist()).decode()
        assert text == backbone.cut(written)
        assert text, "an empty answer would show nothing"


@here
def test_the_backbone_is_ours(backbone, ours: dict[str, torch.Tensor]) -> None:
    """LAVIS behind the protocol, in one batch, beside our own BLIP2-OPT behind it."""
    found = answers(backbone, ours["pixels"])
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, ours[name], **CLOSE)


@here
def test_a_new_token_reads_itself_alone(backbone, monkeypatch) -> None:
    layer, lengths = backbone.layout.layer(0), []
    forward = layer.forward

    def watched(hidden: torch.Tensor, **given: Any) -> Any:
        lengths.append(hidden.shape[1])
        return forward(hidden, **given)

    monkeypatch.setattr(layer, "forward", watched)
    backbone.generate([pictures()[0]], [PROMPTS[0]], 3)
    assert lengths[0] > len(backbone.tokens(PROMPTS[0]))
    assert lengths[1:] == [1] * len(lengths[1:])
    assert lengths[1:], "one token alone would show nothing"


@here
def test_pictures_go_through_lavis_processor(backbone, ours: dict[str, torch.Tensor]) -> None:
    from lavis.processors.blip_processors import BlipImageEvalProcessor

    made = pixels(backbone)
    own = BlipImageEvalProcessor(image_size=84)
    assert torch.equal(made, torch.stack([own(picture) for picture in pictures()]))
    # The same resizing by Pillow; its rounding to whole levels may come before or after.
    torch.testing.assert_close(made, ours["pixels"], atol=1e-4, rtol=0)


@here
def test_a_model_type_is_loaded_by_lavis_name(backbone, monkeypatch) -> None:
    from unike.backbones import lavis

    asked = []

    def load(*names: str) -> Any:
        asked.append(names)
        return lavis._from_files(make_spec("lavis"))

    monkeypatch.setattr(lavis, "load_model", load)
    spec = BackboneSpec("blip2", "pretrain_opt2.7b", backend="lavis", source="small.yaml")
    loaded = load_backbone(spec)
    assert asked == [("blip2_opt", "pretrain_opt2.7b")]
    assert loaded.generate([None], ["where?"]) == backbone.generate([None], ["where?"])

    def refuse(*_: str) -> Any:
        raise OSError("no network\nand more")

    monkeypatch.setattr(lavis, "load_model", refuse)
    with pytest.raises(UserError, match=r"pretrain_opt2.7b cannot be loaded by LAVIS: no network"):
        load_backbone(spec)


@here
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_precision_is_that_of_tower_and_decoder(backbone, dtype: str) -> None:
    loaded = load_backbone(make_spec("lavis", dtype=dtype))
    kinds = {n.split(".")[0]: p.dtype for n, p in loaded.model.named_parameters()}
    half = getattr(torch, dtype)
    assert (kinds["visual_encoder"], kinds["opt_model"], loaded.dtype) == (half, half, half)
    assert kinds["Qformer"] == kinds["opt_proj"] == kinds["ln_vision"] == torch.float32
    batch = loaded.encode([pictures()[0]], ["what?"])
    whole = backbone.encode([pictures()[0]], ["what?"])
    torch.testing.assert_close(loaded(batch).logits.float(), backbone(whole).logits, atol=0.1, rtol=0)
    assert loaded.identity != backbone.identity


@here
def test_files_that_do_not_fit_are_one_line(tmp_path) -> None:
    state = torch.load(FILES / "eva_vit.pth", weights_only=True)
    state["blocks.1.mlp.fc2.weight"] = state["blocks.1.mlp.fc2.weight"][:-1]
    torch.save(state, tmp_path / "eva.pth")
    with pytest.raises(
        UserError, match=r"the original files do not fit: .*size mismatch for blocks.1.mlp.fc2"
    ):
        load_backbone(make_spec("lavis", state_dict_file=str(tmp_path / "eva.pth")))
    blip2 = torch.load(FILES / "blip2_pretrained_opt.pth", weights_only=True)["model"]
    del blip2["Qformer.bert.encoder.layer.1.attention.self.key.weight"]
    torch.save({"model": blip2}, tmp_path / "blip2.pth")
    with pytest.raises(UserError, match=r"the original files lack Qformer.bert.encoder.layer.1.attention"):
        load_backbone(make_spec("lavis", qformer_checkpoint=str(tmp_path / "blip2.pth")))


# ---------------------------------------------------------------- edits


@here
def test_a_run_makes_the_targets(tmp_path) -> None:
    """``run_edit.py`` as in any environment: knowledge is built, UniKE edits."""
    project = Project(tmp_path, "blip2")
    save_pictures(project.data)
    for split, numbers in (("train", range(5)), ("eval", range(5, 8))):
        project.write_records([record(i) for i in numbers], "vqa", split)
    project.write_yaml(**OPTIONS | SPEC | {"data": {"vqa": project.options()["data"]["vqa"]}})
    ran = subprocess.run(
        [sys.executable, ROOT / "run_edit.py", "--hparams_dir", project.yaml, "--task", "vqa"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    (summary,) = project.root.glob("results/*/summary.json")
    held = json.loads(summary.read_text())["metrics"]["reliability"]["teacher_forced"]
    assert (held["before"]["mean"], held["after"]["mean"]) == (0, 100)


@here
def test_an_edit_makes_the_target_and_comes_off_bit_for_bit(tmp_path) -> None:
    from unike import MultimodalEditor

    hparams = HyperParams.from_dict(OPTIONS | SPEC | {"external": "none", "zeta": "none"})
    editor = MultimodalEditor.from_hparams(hparams)
    backbone = editor.backbone
    before, hooks = weights_of(backbone), hook_count(backbone.model)
    picture, prompt = pictures()[0], PROMPTS[0]
    base = backbone.generate([picture], [prompt])
    metrics, edited, _ = editor.edit(prompts=prompt, targets="a red fox", image=picture)
    assert not base[0].startswith("a red")
    assert metrics[0]["post"]["rewrite_acc"] == 1.0
    # Nobody taught it to end there.
    assert edited.generate(picture, prompt).startswith("a red fox")
    edited.remove()
    assert backbone.generate([picture], [prompt]) == base
    assert_untouched(backbone, before, hooks)
