"""Models with random weights for the benchmarks, built from configurations without a download.

``python -m benchmarks.models --model blip2 --weights DIR`` writes one of full dimensions in bf16.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, Blip2Config, Blip2ForConditionalGeneration

from unike.backbones import load_backbone
from unike.backbones.base import Backbone
from unike.backbones.huggingface import BLIP2_OPT
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.edits import LayerKnowledge
from unike.knowledge.encoders import Disentangler, KnowledgeStates
from unike.methods.base import Knowledge
from unike.methods.preparation.knowledge import LayerStates, make_knowledge, save_knowledge
from unike.types import BackboneSpec, Case, EditRequest, Expectation, Probe, Query

ROOT = Path(__file__).parents[1]
# The paper's preset; the options of a run are added to it.
PRESET: dict[str, Any] = {
    "model_name": "blip2", "name": "random", "method": "unike", "layers": 4, "n_keys": 10,
    "key_init": "query", "k": 40, "alpha": "adaptive", "zeta": "truthfulness", "beta": 0.02,
    "memory": "both", "scope_gate": "none", "encoder_dim": 64, "device": "cpu",
}  # fmt: skip
SHARD_BYTES = 2 << 30


def locate_tokenizer(family: str) -> Path:
    """A bundled toy model's folder, for its tokenizer."""
    return ROOT / "hugging_cache" / ("tiny-minigpt4" if family == "minigpt4" else "tiny-blip2-opt")


def make_opt_config(
    width: int,
    layers: int,
    vision_layers: int = 24,
    vision_width: int = 512,
    side: int = 24,
    vocabulary: int = 1400,
    queries: int = 32,
) -> Blip2Config:
    """BLIP2-OPT with ``side * side`` patches an image and heads of 64 (or two of half the width)."""

    def shape(wide: int, deep: int) -> dict[str, Any]:
        heads = max(2, wide // 64)
        return {"hidden_size": wide, "num_hidden_layers": deep, "num_attention_heads": heads}

    text = {
        "model_type": "opt", **shape(width, layers), "ffn_dim": 4 * width, "word_embed_proj_dim": width,
        "vocab_size": vocabulary, "max_position_embeddings": 512, "dropout": 0.0, "attention_dropout": 0.0,
        "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip
    vision = {
        **shape(vision_width, vision_layers), "intermediate_size": 4 * vision_width, "patch_size": 14,
        "image_size": 14 * side, "initializer_range": 0.02,
    }  # fmt: skip
    qformer = {
        **shape(vision_width, 2), "intermediate_size": 4 * vision_width, "vocab_size": 8,
        "encoder_hidden_size": vision_width,
    }  # fmt: skip
    return Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=queries,
        image_token_index=vocabulary - 1,
    )  # fmt: skip


def make_random_backbone(config: Blip2Config, seed: int = 0) -> VisionLanguageBackbone:
    """A BLIP2-OPT in fp32 with the toy model's tokenizer, which has 1,400 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(locate_tokenizer("blip2"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Blip2ForConditionalGeneration(config)
        with torch.no_grad():
            # They are initialised with zeros, all equal.
            model.query_tokens.normal_()
    return VisionLanguageBackbone(model, tokenizer, BLIP2_OPT, BLIP2_OPT.dialogue)


def make_wide_backbone(seed: int = 0) -> VisionLanguageBackbone:
    """32 decoder layers of width 512 after 24 vision layers of width 512 with 576 patches."""
    return make_random_backbone(make_opt_config(width=512, layers=32), seed)


@torch.no_grad()
def draw_states(
    width: int,
    layers: Sequence[int],
    hparams: HyperParams,
    items: int = 1000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, LayerStates, Disentangler]]:
    """``items`` states with the distribution of layer norms' outputs, and encoders, one layer at a time.

    The semantic encoder is the identity as far as its hidden width allows: a random encoder would set every
    alpha to zero, and so turn off the attention shift.
    """
    generator = torch.Generator().manual_seed(seed)
    for i in layers:
        sem, *others = (torch.randn(items, width, generator=generator).to(device) for _ in range(3))
        # In the precision in which knowledge is stored.
        pos, neg = ((0.6 * sem + 0.8 * other).half().float() for other in others)
        states = LayerStates(KnowledgeStates(sem, pos, neg), sem[: min(items, 200)])
        yield i, states, _make_encoders(width, hparams, seed + i).to(device)


def draw_knowledge(
    backbone: Backbone, layers: Sequence[int], hparams: HyperParams, items: int = 1000, seed: int = 0
) -> Knowledge:
    """``draw_states`` in the form that an edit uses."""
    out: dict[int, LayerKnowledge] = {}
    drawn = draw_states(backbone.layout.width, layers, hparams, items, seed, backbone.device)
    for i, states, encoders in drawn:
        out |= make_knowledge({i: states}, {i: encoders}, hparams)
    return out


def _make_encoders(width: int, hparams: HyperParams, seed: int) -> Disentangler:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        own = Disentangler(width, hparams.encoder_hidden, hparams.encoder_dim)
    into, out = cast(nn.Linear, own.semantic[0]), cast(nn.Linear, own.semantic[2])
    count = min(width, into.out_features // 2)
    # relu(x) - relu(-x) = x: two rows of the hidden layer copy one entry.
    for linear in (into, out):
        linear.weight.zero_()
        linear.bias.zero_()
    for entry in range(count):
        into.weight[2 * entry, entry], into.weight[2 * entry + 1, entry] = 1, -1
        out.weight[entry, 2 * entry], out.weight[entry, 2 * entry + 1] = 1, -1
    return own.requires_grad_(False)


def draw_cases(count: int, size: int, seed: int = 0) -> list[Case]:
    """Records with the paper's five probes and three images each, ``size`` pixels a side."""
    rng = np.random.default_rng(seed)

    def draw_image() -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))

    answers = ("a red fox", "two dogs", "the sea", "green")
    cases = []
    for i in range(count):
        asked = Query(draw_image(), f"Question: what is number {i}? Short answer:", answers[i % len(answers)])
        other = Query(draw_image(), f"Question: what color is thing {i} here? Short answer:", "blue")
        probes: list[tuple[str, Query, Expectation]] = [
            ("reliability", asked, "target"),
            (
                "t_generality",
                Query(asked.image, f"Question: which one is number {i}? Short answer:", asked.target),
                "target",
            ),
            ("m_generality", Query(draw_image(), asked.prompt, asked.target), "target"),
            ("t_locality", Query(None, f"who was the king of land {i}?", "a man"), "unchanged"),
            ("m_locality", other, "unchanged"),
        ]
        cases.append(Case(EditRequest(f"r{i}", asked), tuple(Probe(*p) for p in probes)))
    return cases


# ---------------------------------------------------------------- full dimensions

_TEXT: dict[str, dict[str, Any]] = {
    "blip2": {
        "model_type": "opt", "hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 50272, "pad_token_id": 1,
        "bos_token_id": 2, "eos_token_id": 2,
    },
    "minigpt4": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": False,
    },
}  # fmt: skip


def make_full_config(family: str) -> Blip2Config:
    """BLIP2-OPT-2.7B or MiniGPT-4-7B after EVA ViT-g (39 blocks, 364 pixels) and BERT-base's Q-Former."""
    vision = {
        "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 364,
    }  # fmt: skip
    return Blip2Config(
        vision_config=vision, qformer_config={"encoder_hidden_size": 1408}, text_config=_TEXT[family],
        num_query_tokens=32, image_token_index=_TEXT[family]["vocab_size"] - 1,
    )  # fmt: skip


def write_random_folder(family: str, folder: Path, config: Blip2Config | None = None) -> Path:
    """Writes a Hugging Face folder of random bf16 weights, by shards; a complete one is left as it is."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = config or make_full_config(family)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(locate_tokenizer(family)).save_pretrained(folder)
    where: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(_draw_shards(model)):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
        total += sum(t.nbytes for t in shard.values())
    # Written last: without this file the folder counts as missing.
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    return folder


def _draw_shards(model: Blip2ForConditionalGeneration) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    text: Any = model.config.text_config
    tied = text.tie_word_embeddings
    for name, like in model.state_dict().items():
        if tied and name.endswith("lm_head.weight"):
            continue
        shard[name] = _draw_tensor(name, like.shape, generator)
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    yield shard


def _draw_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Norms at one, biases at zero, matrices with the standard deviation that keeps activations' size."""
    if len(shape) == 1:
        return torch.full(shape, float("norm" in name.lower() and "weight" in name), dtype=torch.bfloat16)
    spread = 0.02 if "embed" in name or "query_tokens" in name else 0.5 / math.sqrt(shape[1:].numel())
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, spread, generator=generator)


def load_full(family: str, folder: Path) -> VisionLanguageBackbone:
    """The folder's model through unike's own loader, on the CPU, in bf16."""
    spec = BackboneSpec(model_name=family, name=str(folder), dtype="bfloat16", device="cpu")
    return load_backbone(spec)


def locate_knowledge(family: str, weights: Path, hparams: HyperParams, items: int) -> Path:
    """The folder of the model's knowledge of ``items`` states in each of its edited layers."""
    return weights / f"{family}-knowledge-{items}-{hparams.encoder_hidden}"


def write_knowledge(
    folder: Path, width: int, layers: Sequence[int], hparams: HyperParams, items: int
) -> Path:
    """Writes ``draw_states`` as the library stores them; a complete folder is left as it is."""
    if not (folder / "knowledge.json").is_file():
        drawn = list(draw_states(width, layers, hparams, items))
        save_knowledge(folder, {i: s for i, s, _ in drawn}, {i: e for i, _, e in drawn}, {}, {})
    return folder


def make_full_hparams(steps: int = 10, encoder_hidden: int | None = None) -> HyperParams:
    """The paper's preset with a fixed number of steps, and encoders as wide as in the full-size YAMLs."""
    shipped = HyperParams.from_hparams(ROOT / "hparams" / "blip2.yaml").encoder_hidden
    changes = {"beta": 0.1, "max_steps": steps, "stop_loss": 0.0, "encoder_hidden": encoder_hidden or shipped}
    return HyperParams.from_dict({**PRESET, **changes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(_TEXT), required=True)
    parser.add_argument("--weights", type=Path, required=True, help="parent of the models' folders")
    parser.add_argument("--items", type=int, default=2000, help="items in each layer's knowledge memory")
    parser.add_argument("--encoder-hidden", type=int, help="hidden width of the encoders")
    args = parser.parse_args()
    print(write_random_folder(args.model, args.weights / args.model))
    hparams = make_full_hparams(encoder_hidden=args.encoder_hidden)
    count, width = _TEXT[args.model]["num_hidden_layers"], _TEXT[args.model]["hidden_size"]
    knowledge = locate_knowledge(args.model, args.weights, hparams, args.items)
    print(write_knowledge(knowledge, width, range(count)[-PRESET["layers"] :], hparams, args.items))


if __name__ == "__main__":
    main()
