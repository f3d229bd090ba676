"""Small random folders of the newer backbones, as their checkpoints lie on the hub: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from unike.backbones.huggingface import ARCHITECTURES
from unike.backbones.smol import SmolConfig
from unike.types import BackboneSpec

TODAY = ("llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "instructblip")
# Made here of packages, not published as a whole.
OWN = ("smol",)
TEXTS = (
    "what is it? a fox, two dogs, the sea. where is it? there, here, over there.",
    "Question: what is in the picture? Short answer: a red fox. Who was the king? a man.",
    "USER: ASSISTANT: user assistant system You are a helpful assistant.",
)
# What the hub's folders hold, down to their line breaks.
LLAVA_CHAT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
    "{% endif %}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ONEVISION_CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}"
    "{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = {
    "llava": LLAVA_CHAT, "llava_onevision": ONEVISION_CHAT, "qwen2_vl": QWEN_CHAT, "qwen2_5_vl": QWEN_CHAT,
}  # fmt: skip
_EYE = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_TILES = [[h, w] for h in (28, 56, 84) for w in (28, 56, 84)]


def llama_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """Spaces are letters, one before the first word; BOS before every text."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    letters = sorted({*"".join(TEXTS), *map(chr, range(33, 127)), "\n"})
    names = ["<unk>", "<s>", "</s>", "<pad>", *special]
    trainer = trainers.BpeTrainer(vocab_size=220, special_tokens=names, initial_alphabet=letters)
    bpe.train_from_iterator(TEXTS, trainer)
    bos = ("<s>", bpe.token_to_id("<s>"))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def qwen_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """Bytes; nothing before a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None
    )


def reader() -> PreTrainedTokenizerFast:
    """The Q-Former's: whole words between [CLS] and [SEP]."""
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=names))
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")


def _llava(tok: Any) -> Any:
    eye = {**_EYE, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    return transformers.LlavaConfig(
        vision_config=eye, text_config={**_TEXT, "model_type": "llama", "vocab_size": len(tok)},
        image_token_index=tok.convert_tokens_to_ids("<image>"), image_seq_length=4,
    )  # fmt: skip


def _onevision(tok: Any) -> Any:
    eye = {**_EYE, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    return transformers.LlavaOnevisionConfig(
        vision_config={**eye, "vision_use_head": False}, image_grid_pinpoints=_TILES,
        text_config={**_TEXT, "model_type": "qwen2", "vocab_size": len(tok)},
        image_token_id=tok.convert_tokens_to_ids("<image>"), vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip


def _qwen(tok: Any, kind: str, eye: dict[str, Any]) -> Any:
    ids = {
        f"{part}_token_id": tok.convert_tokens_to_ids(f"<|{name}|>")
        for part, name in (
            ("image", "image_pad"), ("video", "video_pad"),
            ("vision_start", "vision_start"), ("vision_end", "vision_end"),
        )
    }  # fmt: skip
    text = {**_TEXT, **_MROPE, "vocab_size": len(tok), "bos_token_id": None, "eos_token_id": 2}
    return getattr(transformers, kind)(text_config=text, vision_config=eye, **ids)


def _qwen2(tok: Any) -> Any:
    eye = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    return _qwen(tok, "Qwen2VLConfig", eye)


def _qwen2_5(tok: Any) -> Any:
    eye = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
        "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return _qwen(tok, "Qwen2_5_VLConfig", eye)


def _instructblip(tok: Any) -> Any:
    queries = {
        **_EYE, "vocab_size": len(reader()), "encoder_hidden_size": 32, "max_position_embeddings": 24,
        "cross_attention_frequency": 2,
    }  # fmt: skip
    return transformers.InstructBlipConfig(
        vision_config={**_EYE, "image_size": 28, "patch_size": 14}, qformer_config=queries,
        text_config={**_TEXT, "model_type": "llama", "vocab_size": len(tok)},
        num_query_tokens=4, image_token_index=tok.convert_tokens_to_ids("<image>"),
    )  # fmt: skip


def _smol(tok: Any) -> Any:
    tower = {
        "image_size": 28, "stem": 8, "hidden_size": 24,
        "stages": [[3, 1, 1, 1, 8], [3, 2, 2, 3, 12], [5, 1, 2, 3, 12]],
    }  # fmt: skip
    return SmolConfig(
        text_config={**_TEXT, "model_type": "llama", "vocab_size": len(tok), "eos_token_id": 2},
        vision_config=tower, names=20, slots=2, projector_hidden=16,
    )  # fmt: skip


_SQUARE = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
_CONFIGS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "llava": (_llava, {"image_processor_type": "CLIPImageProcessor", **_SQUARE}),
    "llava_onevision": (
        _onevision,
        {
            "image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 28, "width": 28},
            "image_grid_pinpoints": _TILES,
        },
    ),
    **{
        name: (
            config,
            {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 28**2, "max_pixels": 16 * 28**2},
        )
        for name, config in (("qwen2_vl", _qwen2), ("qwen2_5_vl", _qwen2_5))
    },
    "instructblip": (
        _instructblip, {"image_processor_type": "BlipImageProcessor", "size": {"height": 28, "width": 28}},
    ),
    "smol": (_smol, {"image_processor_type": "CLIPImageProcessor", **_SQUARE}),
}  # fmt: skip


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    if family in ("llava", "instructblip"):
        return llama_tokenizer("<image>")
    if family == "smol":
        return qwen_tokenizer()
    if family == "llava_onevision":
        return qwen_tokenizer("<image>", "<video>")
    return qwen_tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def save_folder(folder: Path, family: str) -> Path:
    """A random checkpoint of the family."""
    tokenizer, (config, pictures) = tokenizer_of(family), _CONFIGS[family]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    if family in CHATS:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATS[family]}))
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    if family == "instructblip":
        reader().save_pretrained(folder / "qformer_tokenizer")
    made = config(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = ARCHITECTURES[family].model(made)
        # A wider spread than the initial one, so that random models answer differently.
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        # Behind a norm of this width, small head weights could not make any answer likely.
        model.get_output_embeddings().weight.data.mul_(5)
        if family == "smol":
            # Small random convolutions make nearly the same of all images.
            for part in (model.vision_tower, model.multi_modal_projector):
                for parameter in part.parameters():
                    parameter.data.mul_(3)
    model.save_pretrained(folder)
    return folder


def todays_spec(family: str, folder: Path, **changes: Any) -> BackboneSpec:
    """The spec of a folder that ``save_folder`` made."""
    return BackboneSpec(
        **{"model_name": family, "name": str(folder), "device": "cpu", "source": "small.yaml", **changes}
    )
