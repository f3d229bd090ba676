"""The original files of LAVIS and MiniGPT-4: what is loaded from them computes what the originals do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from original_files import FAMILIES, FILES, make_spec
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, LlamaConfig, OPTConfig

from unike.backbones.checkpoints import build_configs, convert_states, load_original, load_state
from unike.types import BackboneSpec, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
EXPECTED = load_file(FILES / "expected.safetensors")
TEXTS = json.loads((FILES / "expected.json").read_text())
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def models() -> dict[str, Blip2ForConditionalGeneration]:
    return {family: load_original(make_spec(family)) for family in FAMILIES}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the files that a test may damage."""
    return Path(shutil.copytree(FILES, tmp_path / "files"))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def token_ids(family: str, text: str) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(make_spec(family).name)
    return tokenizer(text, add_special_tokens=False).input_ids


# ---------------------------------------------------------------- what the files compute


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_are_those_of_lavis(models: dict[str, Blip2ForConditionalGeneration], family: str) -> None:
    features = models[family].get_image_features(EXPECTED["pixel_values"])
    assert distance(features.vision_outputs.last_hidden_state, EXPECTED["image_embeds"]) < TOLERANCE
    assert distance(features.qformer_outputs.last_hidden_state, EXPECTED["query_output"]) < TOLERANCE
    projection = {
        "blip2": ("blip2_pretrained_opt.pth", "opt"),
        "minigpt4": ("pretrained_minigpt4.pth", "llama"),
    }
    file, name = projection[family]
    state = load_state(FILES / file)
    wanted = EXPECTED["query_output"] @ state[f"{name}_proj.weight"].T + state[f"{name}_proj.bias"]
    assert distance(features.pooler_output, wanted) < TOLERANCE


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_the_originals(
    models: dict[str, Blip2ForConditionalGeneration], family: str, case: int
) -> None:
    model, text = models[family], TEXTS[family][case]
    ids = token_ids(family, text["prompt"] + text["target"])
    assert ids == text["text_ids"]
    assert len(token_ids(family, text["prompt"])) == text["prompt_len"]
    embed = model.get_input_embeddings()
    words = embed(torch.tensor([ids]))
    alone = model.language_model(inputs_embeds=words).logits[0]
    assert distance(alone, EXPECTED[f"{family}_text_only_logits.{case}"]) < TOLERANCE

    picture = model.get_image_features(EXPECTED["pixel_values"][case : case + 1]).pooler_output
    parts = [picture, words]
    if family == "minigpt4":
        before, after = (embed(torch.tensor([token_ids(family, wrap)])) for wrap in TEXTS["wrap"])
        parts = [before, picture, after, words]
    logits = model.language_model(inputs_embeds=torch.cat(parts, dim=1)).logits[0]
    assert distance(logits, EXPECTED[f"{family}_logits.{case}"]) < TOLERANCE
    # Query tokens in another order give other logits, so the comparison above can fail.
    parts[-2 if family == "blip2" else 1] = picture.flip(1)
    other = model.language_model(inputs_embeds=torch.cat(parts, dim=1)).logits[0]
    assert distance(other, EXPECTED[f"{family}_logits.{case}"]) > TOLERANCE


@torch.no_grad()
def test_a_batch_of_ids_gives_the_logits_of_opt(models: dict[str, Blip2ForConditionalGeneration]) -> None:
    model, ids = models["blip2"], EXPECTED["opt_input_ids"]
    assert distance(model.language_model(input_ids=ids).logits, EXPECTED["opt_text_only_logits"]) < TOLERANCE
    picture = model.get_image_features(EXPECTED["pixel_values"]).pooler_output
    embeds = torch.cat([picture, model.get_input_embeddings()(ids)], dim=1)
    assert distance(model.language_model(inputs_embeds=embeds).logits, EXPECTED["opt_logits"]) < TOLERANCE


def test_eva_has_no_key_bias(models: dict[str, Blip2ForConditionalGeneration]) -> None:
    """Softmax cannot see a key bias, so no output would show a wrong one."""
    state = load_state(FILES / "eva_vit.pth")
    for i, layer in enumerate(models["blip2"].vision_model.encoder.layers):
        query, key, value = layer.self_attn.qkv.bias.chunk(3)
        assert torch.equal(query, state[f"blocks.{i}.attn.q_bias"])
        assert torch.equal(value, state[f"blocks.{i}.attn.v_bias"])
        assert query.any()
        assert not key.any()


def test_a_visual_encoder_in_the_blip2_file_wins(copied: Path) -> None:
    spec = make_spec("blip2", copied)
    eva, blip2 = load_state(FILES / "eva_vit.pth"), load_state(FILES / "blip2_pretrained_opt.pth")
    torch.save({"model": blip2 | {f"visual_encoder.{k}": v for k, v in eva.items()}}, spec.qformer_checkpoint)
    torch.save({k: torch.zeros_like(v) for k, v in eva.items()}, spec.state_dict_file)
    with torch.no_grad():
        features = load_original(spec).get_image_features(EXPECTED["pixel_values"])
    assert distance(features.vision_outputs.last_hidden_state, EXPECTED["image_embeds"]) < TOLERANCE


def test_other_containers_hold_the_same_weights(copied: Path) -> None:
    """A file from before torch 1.6, and safetensors."""
    eva, blip2 = load_state(FILES / "eva_vit.pth"), load_state(FILES / "blip2_pretrained_opt.pth")
    torch.save(eva, copied / "old.pth", _use_new_zipfile_serialization=False)
    save_file(blip2, copied / "blip2.safetensors")
    spec = make_spec(
        "blip2",
        state_dict_file=str(copied / "old.pth"),
        qformer_checkpoint=str(copied / "blip2.safetensors"),
    )
    with torch.no_grad():
        features = load_original(spec).get_image_features(EXPECTED["pixel_values"])
    assert distance(features.qformer_outputs.last_hidden_state, EXPECTED["query_output"]) < TOLERANCE


# ---------------------------------------------------------------- the state of a loaded model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_whole_frozen_and_in_eval_mode(
    models: dict[str, Blip2ForConditionalGeneration], family: str
) -> None:
    model = models[family]
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.device.type == "cpu" for tensor in tensors)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert model.config.text_config is model.language_model.config
    if family == "blip2":
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_model_does_not_depend_on_the_files_any_more(copied: Path) -> None:
    model = load_original(make_spec("blip2", copied))
    before = [parameter.clone() for parameter in model.vision_model.parameters()]
    with (copied / "eva_vit.pth").open("r+b") as file:
        file.write(b"\0" * (copied / "eva_vit.pth").stat().st_size)
    assert all(map(torch.equal, before, model.vision_model.parameters()))


@pytest.mark.parametrize(("dtype", "qformer"), [("float16", "float32"), ("bfloat16", "bfloat16")])
def test_half_precision_as_transformers_has_it(dtype: str, qformer: str) -> None:
    model = load_original(make_spec("minigpt4", dtype=dtype))
    kept = {p.dtype for p in model.qformer.parameters()} | {model.query_tokens.dtype}
    assert kept == {getattr(torch, qformer)}
    rest = [model.vision_model, model.language_projection, model.language_model]
    assert {p.dtype for part in rest for p in part.parameters()} == {getattr(torch, dtype)}
    with torch.no_grad():
        features = model.get_image_features(EXPECTED["pixel_values"]).pooler_output
    assert features.dtype == getattr(torch, dtype)
    assert features.isfinite().all()


# ---------------------------------------------------------------- full-size files, without memory


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def linear(name: str, out: int, into: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": meta(out, into), f"{name}.bias": meta(out)}


def norm(name: str, width: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": meta(width), f"{name}.bias": meta(width)}


def real_eva() -> dict[str, torch.Tensor]:
    """Names and shapes of eva_vit_g.pth: 40 blocks, 224 px, and keys that LAVIS ignores."""
    state = {"cls_token": meta(1, 1, 1408), "pos_embed": meta(1, 257, 1408)}
    state |= {"patch_embed.proj.weight": meta(1408, 3, 14, 14), "patch_embed.proj.bias": meta(1408)}
    for i in range(40):
        at = f"blocks.{i}"
        state |= norm(f"{at}.norm1", 1408) | norm(f"{at}.norm2", 1408)
        state |= {f"{at}.attn.q_bias": meta(1408), f"{at}.attn.v_bias": meta(1408)}
        state |= {f"{at}.attn.qkv.weight": meta(3 * 1408, 1408)} | linear(f"{at}.attn.proj", 1408, 1408)
        state |= linear(f"{at}.mlp.fc1", 6144, 1408) | linear(f"{at}.mlp.fc2", 1408, 6144)
    return state | norm("norm", 1408) | linear("head", 1000, 1408) | {"rope.freqs_cos": meta(256, 88)}


def real_qformer(projection: str, width: int) -> dict[str, torch.Tensor]:
    """Names and shapes of a BLIP-2 file, with the text side of stage 1 still in it."""
    state = {"query_tokens": meta(1, 32, 768)} | norm("ln_vision", 1408) | linear(projection, width, 768)
    state |= norm("Qformer.bert.embeddings.LayerNorm", 768)
    state |= {"Qformer.bert.embeddings.word_embeddings.weight": meta(30523, 768)}
    state |= {"Qformer.bert.embeddings.position_embeddings.weight": meta(512, 768)}
    state |= {"Qformer.bert.embeddings.position_ids": meta(1, 512), "temp": meta()}
    state |= linear("Qformer.cls.predictions.decoder", 30523, 768) | linear("itm_head", 2, 768)
    for i in range(12):
        at = f"Qformer.bert.encoder.layer.{i}"
        kinds = [("attention", 768)] + ([("crossattention", 1408)] if i % 2 == 0 else [])
        for kind, source in kinds:
            state |= linear(f"{at}.{kind}.self.query", 768, 768)
            state |= linear(f"{at}.{kind}.self.key", 768, source)
            state |= linear(f"{at}.{kind}.self.value", 768, source)
            state |= linear(f"{at}.{kind}.output.dense", 768, 768)
            state |= norm(f"{at}.{kind}.output.LayerNorm", 768)
        for side in ("", "_query"):
            state |= linear(f"{at}.intermediate{side}.dense", 3072, 768)
            state |= linear(f"{at}.output{side}.dense", 768, 3072)
            state |= norm(f"{at}.output{side}.LayerNorm", 768)
    return state


OPT_27B = OPTConfig(
    hidden_size=2560,
    word_embed_proj_dim=2560,
    ffn_dim=10240,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=50272,
)
VICUNA_7B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32000,
)
FULL_SIZE: dict[str, tuple[Any, dict[str, dict[str, torch.Tensor]]]] = {
    "blip2": (
        OPT_27B,
        {"state_dict_file": real_eva(), "qformer_checkpoint": real_qformer("opt_proj", 2560)},
    ),
    "minigpt4": (
        VICUNA_7B,
        {
            "state_dict_file": real_eva(),
            "qformer_checkpoint": real_qformer("t5_proj", 4096),
            "pretrained_ckpt": linear("llama_proj", 4096, 768),
        },
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_files_cover_every_parameter(family: str) -> None:
    text_config, states = FULL_SIZE[family]
    spec = BackboneSpec(family, "language-model", "eva_vit_g.pth", "blip2.pth")
    config = build_configs(spec, text_config, states)
    vision, qformer = config.vision_config, config.qformer_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (1408, 39, 16)
    assert (vision.intermediate_size, vision.patch_size, vision.image_size) == (6144, 14, 364)
    assert int(1408 * 4.3637) == vision.intermediate_size
    assert (qformer.hidden_size, qformer.num_hidden_layers, qformer.num_attention_heads) == (768, 12, 12)
    assert (qformer.intermediate_size, qformer.encoder_hidden_size) == (3072, 1408)
    assert (config.num_query_tokens, vision.layer_norm_eps, qformer.layer_norm_eps) == (32, 1e-6, 1e-12)
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    wanted = {k: tuple(v.shape) for k, v in model.named_parameters() if not k.startswith("language_model.")}
    given = {k: tuple(v.shape) for k, v in convert_states(config, states).items()}
    assert given == wanted
    assert given["vision_model.embeddings.position_embedding"] == (1, 26 * 26 + 1, 1408)
    assert model.language_projection.out_features == model.get_input_embeddings().embedding_dim


# ---------------------------------------------------------------- overrides that don't fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vision_config": {"hidden_size": 64}},
            "vision_config.hidden_size is 64, but the original file has 48",
        ),
        ({"vision_config": {"num_heads": 4}}, "unknown key `num_heads`; did you mean `num_attention_heads`?"),
        ({"qformer_config": {"zzz": 4}}, "unknown key `zzz`; expected one of"),
        ({"vision_config": {"image_size": 84}}, "`image_size` is a key of its own"),
        ({"vision_config": {"num_attention_heads": 5}}, "5 does not divide the width 48"),
        ({"vision_config": {"num_attention_heads": "four"}}, "the configuration does not fit"),
        ({"qformer_config": {}}, "qformer_config.num_attention_heads 12 does not divide the width 32"),
        (
            {"vision_config": {"num_hidden_layers": 5, "num_attention_heads": 4}},
            "the original files lack vision",
        ),
        (
            {"qformer_config": {"num_attention_heads": 4, "cross_attention_frequency": 4}},
            "unexpected qformer.encoder.layer.2.crossattention",
        ),
        ({"image_size": 85}, "image_size 85 is not a multiple of the patch size 14"),
        ({"dtype": "float"}, "dtype `float`; expected one of float32, float16, bfloat16"),
    ],
)
def test_an_override_that_does_not_fit_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_original(make_spec("blip2", **changes))
    assert message in str(caught.value)


def test_a_projection_of_another_language_model_is_an_error(copied: Path) -> None:
    spec = make_spec("minigpt4", copied)
    torch.save(
        {"model": {"llama_proj.weight": torch.ones(52, 32), "llama_proj.bias": torch.ones(52)}},
        spec.pretrained_ckpt,
    )
    with pytest.raises(UserError, match=r"language_projection\.bias has shape \[52\]"):
        load_original(spec)
