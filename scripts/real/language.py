"""SmolLM2 out of its GGUF file: configuration, tokenizer and weights, as transformers has them.

GGUF keeps each row of the query and key projections in an order of its own, which interleaves the halves that
rotary positions turn together.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unike.types import UserError

# llama.cpp's name of how SmolLM's texts are split: every digit by itself, then bytes.
SPLITTING = "smollm"
# llama.cpp's kind of a token that is never part of a text.
CONTROL = 3
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ENDS = {"token_embd": "embed_tokens", "output_norm": "norm"}


def open_gguf(path: Path) -> Any:
    """A reader of the package ``gguf``, which maps the file into memory."""
    from gguf import GGUFReader

    return GGUFReader(path)


def _read(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise UserError(f"language model: the GGUF file has no `{key}`; expected SmolLM2's")
    return field.contents()


def read_config(reader: Any) -> dict[str, Any]:
    """The values of a ``LlamaConfig``."""
    kind = _read(reader, "general.architecture")
    if kind != "llama":
        raise UserError(f"language model: the GGUF file holds a `{kind}`; expected `llama`")
    return {
        "model_type": "llama",
        "vocab_size": len(_read(reader, "tokenizer.ggml.tokens")),
        "hidden_size": _read(reader, "llama.embedding_length"),
        "intermediate_size": _read(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _read(reader, "llama.block_count"),
        "num_attention_heads": _read(reader, "llama.attention.head_count"),
        "num_key_value_heads": _read(reader, "llama.attention.head_count_kv"),
        "max_position_embeddings": _read(reader, "llama.context_length"),
        "rms_norm_eps": _read(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": _read(reader, "llama.rope.freq_base")},
        "tie_word_embeddings": not any(t.name == "output.weight" for t in reader.tensors),
        "bos_token_id": _read(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _read(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _read(reader, "tokenizer.ggml.padding_token_id"),
    }


def read_tokenizer(reader: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own."""
    splitting = _read(reader, "tokenizer.ggml.pre")
    if splitting != SPLITTING:
        raise UserError(f"language model: its texts are split by `{splitting}`; expected `{SPLITTING}`")
    texts, kinds = _read(reader, "tokenizer.ggml.tokens"), _read(reader, "tokenizer.ggml.token_type")
    pairs = [tuple(pair.split(" ")) for pair in _read(reader, "tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, pairs))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [text for text, kind in zip(texts, kinds, strict=True) if kind == CONTROL]
    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    names = {
        f"{part}_token": texts[_read(reader, f"tokenizer.ggml.{key}_token_id")]
        for part, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        additional_special_tokens=special,
        model_max_length=_read(reader, "llama.context_length"),
        **names,
    )


def read_weights(
    reader: Any, config: dict[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight by the name that ``LlamaForCausalLM`` has for it."""
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        # A copy: the reader's own numbers lie in the mapped file, which cannot be written.
        values = np.array(dequantize(tensor.data, tensor.tensor_type))
        part = tensor.name.removesuffix(".weight")
        if part == "output":
            yield "lm_head.weight", torch.from_numpy(values).to(dtype)
            continue
        if part in _ENDS:
            name = _ENDS[part]
        else:
            _, layer, part = part.split(".")
            name = f"layers.{layer}.{_BLOCK[part]}"
            if part in heads:
                values = restore_rows(values, heads[part])
        yield f"model.{name}.weight", torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def restore_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """A projection ``(heads * h, d)`` in transformers' order of rows: of each head first one half, then the
    other, where GGUF has them interleaved."""
    halves = weight.reshape(heads, -1, 2, weight.shape[-1])
    return halves.swapaxes(1, 2).reshape(weight.shape)
