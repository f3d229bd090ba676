"""Devices, several of them, quantization, and the precision of what an edit trains."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Project
from original_files import FAMILIES, make_spec
from PIL import Image
from transformers import Blip2ForConditionalGeneration
from untouched import hook_count

from unike.backbones import huggingface, loading, placement
from unike.backbones.base import encode_queries
from unike.backbones.loading import load_backbone
from unike.backbones.placement import build_quantization_config, check_placement, map_devices, pick_device
from unike.backbones.prefix import PrefixCache
from unike.config.hparams import HyperParams
from unike.methods import build, check_method, resolve_layers
from unike.runs.checks import MODEL_CHECKS, find_all, require_backbone
from unike.runs.request import RunRequest
from unike.system import processes
from unike.types import BackboneSpec, EditRequest, Query, UserError

ROOT = Path(__file__).parents[1]
PLACEMENT = [check for check in MODEL_CHECKS if check.name == "placement"]
OPTIONS = {
    "model_name": "blip2", "name": "unused", "layers": 2, "external": "none", "zeta": "none",
    "n_keys": 4, "lr": 5e-2, "max_steps": 80,
}  # fmt: skip


def query(answer: str = "a fox") -> Query:
    return Query(Image.new("RGB", (84, 84), "teal"), "Question: what is this? Short answer:", answer)


def edit(backbone: Any, **changes: Any) -> Any:
    method = build(HyperParams.from_dict({**OPTIONS, **changes}))
    prefixes = PrefixCache(backbone, method.layers(backbone)[0])
    return method.edit(backbone, EditRequest("e", query()), prefixes)


@torch.no_grad()
def logits(backbone: Any) -> torch.Tensor:
    return backbone(encode_queries(backbone, [query()])).logits


# ---------------------------------------------------------------- one device


def test_auto_is_what_accelerate_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = torch.accelerator.current_accelerator() or torch.device("cpu")
    assert pick_device("auto").type == expected.type
    monkeypatch.setattr(processes, "get_default_device", lambda: torch.device("xpu"))
    assert pick_device("auto").type == "xpu"
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("wanted", ["cuda", "cuda:1", "mps", "xpu:2"])
def test_a_device_that_is_not_there(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_count_devices", lambda kind: 0)
    name = wanted.split(":")[0].upper()
    with pytest.raises(UserError, match=f"device: {wanted}; found 0 {name} devices, expected auto or cpu"):
        pick_device(wanted)
    assert HyperParams.from_dict({**OPTIONS, "device": wanted}).device == wanted
    monkeypatch.setattr(placement, "_count_devices", lambda kind: 3)
    assert pick_device(wanted) == torch.device(wanted)


# ---------------------------------------------------------------- several devices


@pytest.mark.parametrize("family", FAMILIES)
def test_edited_layers_lie_with_embeddings_and_head(family: str) -> None:
    model: Any = load_backbone(make_spec(family)).model
    whole = sum(p.nbytes for p in model.parameters())
    limits = dict.fromkeys(range(4), int(0.55 * whole))
    placed = map_devices(model, torch.float32, 2, limits)
    # Every weight has one place, and no device more than it can hold.
    held: dict[int, int] = {}
    for name, tensor in model.named_parameters():
        owners = [unit for unit in placed if name == unit or name.startswith(f"{unit}.")]
        assert len(owners) == 1, (name, owners)
        held[placed[owners[0]]] = held.get(placed[owners[0]], 0) + tensor.nbytes
    assert len(held) > 1, "the limits must force a split for this to test anything"
    assert all(held[device] <= limits[device] for device in held)
    layers = {name: d for name, d in placed.items() if "language_model" in name and "layers." in name}
    at = {int(name.split("layers.")[1]): d for name, d in layers.items()}
    assert [at[i] for i in sorted(at)[-2:]] == [0, 0]
    others = [d for name, d in placed.items() if name.startswith("language_model.") and "layers." not in name]
    assert set(others) == {0}
    # Without need, everything lies on one device.
    assert set(map_devices(model, torch.float32, 2, {0: 2 * whole}).values()) == {0}
    with pytest.raises(UserError, match="do not fit the 2 devices"):
        map_devices(model, torch.float32, 2, {0: whole // 4, 1: whole // 4})
    half = map_devices(model, torch.bfloat16, 2, dict.fromkeys(range(4), int(0.55 * whole)))
    assert list(half.values()).count(0) > list(placed.values()).count(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_work_through_accelerates_hooks(family: str) -> None:
    backbone = load_backbone(make_spec(family))
    before = logits(backbone)
    expected = edit(backbone).state_dict()
    placed = dict.fromkeys(placement._list_units(backbone.model), "cpu")
    backbone.model = placement.dispatch(backbone.model, placed, force_hooks=True)
    layer: Any = backbone.layout.layer(0)
    assert hasattr(layer, "_hf_hook"), "the layers carry accelerate's hooks"
    hooks = hook_count(backbone.model)
    torch.testing.assert_close(logits(backbone), before, atol=0, rtol=0)
    made = edit(backbone)
    assert made.info["steps"] > 1
    assert expected.keys() == made.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.state_dict().items())
    with made.applied(backbone):
        assert not torch.equal(logits(backbone), before)
        assert backbone.generate([query().image], [query().prompt])
    torch.testing.assert_close(logits(backbone), before, atol=0, rtol=0)
    assert hook_count(backbone.model) == hooks


def test_a_folder_and_original_files_load_with_a_device_map(blip2_project: Project, monkeypatch) -> None:
    seen: list[int] = []

    def mapped(model: Any, dtype: torch.dtype, last: int, limits: Any = None) -> dict[str, Any]:
        seen.append(last)
        return map_devices(model, dtype, last, limits)

    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {"cpu": 1 << 40})
    monkeypatch.setattr(huggingface, "map_devices", mapped)
    hparams = HyperParams.from_hparams(blip2_project.yaml)
    plain = load_backbone(hparams)
    changes = {"device": "auto", "device_map": "auto"}
    spread = load_backbone(HyperParams.from_dict(hparams.to_dict() | changes))
    assert plain.fingerprint == spread.fingerprint
    assert spread.device.type == "cpu"
    originals = [load_backbone(make_spec("blip2", device_map=placed)) for placed in (None, "auto")]
    assert originals[0].fingerprint == originals[1].fingerprint
    assert seen == [2, 4]
    assert [huggingface._count_last_layers(layers, 32) for layers in (4, (20, 31))] == [4, 12]


def test_layers_that_were_not_meant_to_be_edited_may_lie_elsewhere(monkeypatch) -> None:
    backbone = load_backbone(make_spec("blip2"))
    assert resolve_layers(HyperParams.from_dict(OPTIONS), backbone) == [4, 5]
    monkeypatch.setattr(type(backbone), "device", torch.device("cuda"))
    with pytest.raises(UserError, match=r"layers: \[4, 5\] lie on another device than the embeddings"):
        resolve_layers(HyperParams.from_dict(OPTIONS), backbone)


# ---------------------------------------------------------------- what can't be had


def spec(**changes: Any) -> BackboneSpec:
    return make_spec("blip2", **changes)


def test_quantization_without_cuda_is_refused_before_loading(
    blip2_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    hparams = HyperParams.from_hparams(blip2_project.yaml, ["quantization=int8"])
    with pytest.raises(UserError) as caught:
        require_backbone(hparams)
    lines = caught.value.problems
    assert len(lines) == 2
    assert "quantization: int8: needs a CUDA device" in lines[0]
    assert "bitsandbytes is not installed; pip install 'unike[quantization]'" in lines[1]
    assert all(line.startswith(str(blip2_project.yaml)) for line in lines)
    found = find_all(RunRequest(hparams), PLACEMENT)
    assert [finding.line for finding in found if not finding.ok] == list(lines)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(placement, "find_spec", lambda name: object())
    check_placement(spec(quantization="int8"))
    with pytest.raises(UserError, match="needs a CUDA device"):
        check_placement(spec(quantization="int8", device="cpu"))
    assert find_all(RunRequest(HyperParams.from_hparams(blip2_project.yaml)), PLACEMENT) == []


def test_weights_in_int8_are_not_trained() -> None:
    values = {**OPTIONS, "method": "ft", "quantization": "int8"}
    with pytest.raises(UserError, match="method: ft trains the weights of `layers`"):
        check_method(HyperParams.from_dict(values))
    check_method(HyperParams.from_dict(values | {"ft_target": "projection"}))
    check_method(HyperParams.from_dict(values | {"method": "unike"}))


def test_a_device_map_wants_all_devices_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    check_placement(spec(device_map="auto"))
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(UserError) as caught:
        check_placement(spec(device_map="auto", device="cuda:1", quantization="int4"))
    text = "\n".join(caught.value.problems)
    assert "device_map: auto: expected device: auto, got cuda:1" in text
    assert "expected one process" in text
    assert "quantization: int4: expected device_map: null" in text


def test_the_configuration_of_quantized_weights() -> None:
    assert build_quantization_config(spec(), torch.bfloat16) is None
    eight = build_quantization_config(spec(quantization="int8"), torch.bfloat16)
    four = build_quantization_config(spec(quantization="int4"), torch.bfloat16)
    assert eight.load_in_8bit
    assert not eight.load_in_4bit
    assert four.load_in_4bit
    assert four.bnb_4bit_quant_type == "nf4"
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    # The vision side and the head keep their type, as the model names them.
    names = {part for name, _ in load_backbone(spec()).model.named_modules() for part in name.split(".")}
    assert eight.llm_int8_skip_modules == four.llm_int8_skip_modules
    kept = {"vision_model", "qformer", "language_projection", "lm_head"}
    assert set(eight.llm_int8_skip_modules) & names == kept


@pytest.mark.parametrize("original", [False, True])
def test_quantized_weights_are_loaded_where_they_stay(
    blip2_project: Project, monkeypatch: pytest.MonkeyPatch, original: bool
) -> None:
    """The loaders get the configuration and the device; loading itself needs CUDA."""
    given: dict[str, Any] = {}

    class LoadedError(OSError):
        pass

    def loads(name: str, **options: Any) -> None:
        given.update(options)
        raise LoadedError("stop here")

    monkeypatch.setattr(loading, "check_placement", lambda spec: None)
    language = SimpleNamespace(from_pretrained=loads)
    monkeypatch.setattr("unike.backbones.checkpoints.AutoModelForCausalLM", language)
    monkeypatch.setattr(Blip2ForConditionalGeneration, "from_pretrained", loads)
    chosen = spec() if original else HyperParams.from_hparams(blip2_project.yaml).backbone
    chosen = BackboneSpec(**{**vars(chosen), "quantization": "int4", "device": "cpu"})
    with pytest.raises(UserError, match="stop here"):
        load_backbone(chosen)
    assert given["quantization_config"].load_in_4bit
    assert given["device_map"] == {"": torch.device("cpu")}


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None,
    reason="needs a CUDA device and bitsandbytes",
)
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("original", [False, True])
def test_an_edit_of_quantized_weights(blip2_project: Project, quantization: str, original: bool) -> None:
    chosen = spec() if original else HyperParams.from_hparams(blip2_project.yaml).backbone
    changes = {"quantization": quantization, "device": "auto", "dtype": "bfloat16"}
    backbone = load_backbone(BackboneSpec(**{**vars(chosen), **changes}))
    kinds = {type(module).__name__ for module in backbone.layout.layer(0).modules()}
    assert kinds & {"Linear8bitLt", "Linear4bit"}
    assert edit(backbone).info["reached"]


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["tiny_blip2", "tiny_minigpt4"])
def test_patches_and_adam_are_fp32_whatever_the_weights(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    changes = [f"dtype={dtype}", "device=cpu", "external=none", "zeta=none"]
    hparams = HyperParams.from_hparams(f"hparams/{name}.yaml", changes)
    backbone = load_backbone(hparams)
    assert str(backbone.dtype) == f"torch.{dtype}"
    optimisers: list[torch.optim.Adam] = []

    class Watched(torch.optim.Adam):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            optimisers.append(self)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    method = build(hparams)
    prefixes = PrefixCache(backbone, method.layers(backbone)[0])
    made = method.edit(backbone, EditRequest("e", query()), prefixes)
    assert made.info["reached"], made.info
    assert made.info["steps"] > 0
    patches = {k: v for k, v in made.state_dict().items() if ".patch." in k}
    assert patches
    assert {v.dtype for v in patches.values()} == {torch.float32}
    (optimiser,) = optimisers
    states = [v for state in optimiser.state.values() for v in state.values()]
    assert len(states) >= 3 * len(patches)
    assert {v.dtype for v in states} == {torch.float32}
    with made.applied(backbone):
        batch = encode_queries(backbone, [query()])
        after = backbone(batch).logits
    assert str(after.dtype) == f"torch.{dtype}"
    goal = batch.labels[:, 1:]
    assert torch.equal(after[:, :-1].argmax(-1)[goal != -100], goal[goal != -100])


def test_the_manifest_states_precision_and_device(copied: Project, monkeypatch, tmp_path: Path) -> None:
    import run_edit
    from unike.runs.records import read_manifest

    out = tmp_path / "run"
    arguments = ["--hparams_dir", str(copied.yaml), "--size", "1", "--output", str(out), "--no_generated"]
    assert run_edit.main([*arguments, "dtype=bfloat16", "external=none", "zeta=none"]) == 0
    machine = read_manifest(out)["machine"]
    expected = {"weights": "bfloat16", "patches": "float32", "device": "cpu", "processes": 1}
    assert {key: machine[key] for key in expected} == expected
