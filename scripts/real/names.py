"""Names as the projector has them: scores of the image, and the tokens that write them.

A projector that nobody has trained yet takes both from what is there: its scores are EfficientNet's own class
vectors, and a name is written with the embeddings of its own tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from scripts.real.folder import LANGUAGE, load_tensor
from scripts.real.packages import CLASSES, TOWER, find_part
from scripts.real.tower import convert_tower
from unike.backbones.checkpoint_files import load_state
from unike.types import UserError

# Tokens that write a name; 96% of ImageNet's names have no more.
SLOTS = 4
PROJECTOR_HIDDEN = 256
# Stands where a name has no further token: the sentence around the image ends with it.
PADDING = "."


def read_class_names(path: Path) -> list[str]:
    """The first name of each of the tower's classes, in their order."""
    found = json.loads(path.read_text(encoding="utf-8"))
    names = [str(found[str(i)]).split(",")[0].strip() for i in range(len(found))]
    if len(names) != 1000:
        raise UserError(f"names of the tower's classes: {len(names)} of them; expected 1000")
    return names


def embed_names(
    names: Sequence[str], tokenizer: PreTrainedTokenizerBase, embeddings: torch.Tensor, slots: int
) -> torch.Tensor:
    """``(names, slots, d)``: the embeddings of each name's tokens. Of a longer name, the last slot has the
    mean of what is left; a shorter one is filled up with ``PADDING``."""
    (padding,) = tokenizer(PADDING, add_special_tokens=False).input_ids
    rows = []
    for name in names:
        ids = list(tokenizer(f" {name}", add_special_tokens=False).input_ids)
        ids += [padding] * (slots - len(ids))
        found = embeddings[ids].float()
        rows.append(torch.cat([found[: slots - 1], found[slots - 1 :].mean(0, keepdim=True)]))
    return torch.stack(rows)


def make_projector(
    classifier: dict[str, torch.Tensor], words: torch.Tensor, hidden: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The tensors of a ``NameProjector`` before any training; its second path adds nothing yet."""
    width, out = classifier["weight"].shape[1], words.flatten(1)
    generator = torch.Generator().manual_seed(seed)
    return {
        "scores.weight": classifier["weight"],
        "scores.bias": classifier["bias"],
        "words.weight": out.T.contiguous(),
        "inner.weight": torch.randn(hidden, width, generator=generator) * width**-0.5,
        "inner.bias": torch.zeros(hidden),
        "outer.weight": torch.zeros(out.shape[1], hidden),
    }


def start_projector(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """A projector that nobody has trained, and its names, from the packages and the folder's language model.

    UserError where a package or the language model is missing.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    embeddings = load_tensor(folder, LANGUAGE, "model.embed_tokens.weight")
    _, classifier = convert_tower(load_state(find_part(TOWER), "EfficientNet-Lite2's weights"))
    names = read_class_names(find_part(CLASSES))
    words = embed_names(names, tokenizer, embeddings, SLOTS)
    return make_projector(classifier, words, PROJECTOR_HIDDEN), names
