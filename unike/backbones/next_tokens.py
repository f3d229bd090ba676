"""What an unedited model is about to say after a prompt."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from unike.backbones.decoding import Decoding
from unike.backbones.guard import Guard
from unike.backbones.images import content_key
from unike.system.cache import BoundedCache
from unike.types import ImageLike, TooLongError

# Token ids and their probabilities, ``(m, t)`` each.
Said = tuple[torch.Tensor, torch.Tensor]


def recall_next(
    backbone: Any,
    known: BoundedCache[Hashable, Said],
    images: Sequence[ImageLike | None],
    prompts: Sequence[str],
    tokens: int,
    top: int,
) -> list[Said]:
    """As ``Backbone.predict_next``; what was computed is kept in ``known``."""
    out = []
    for image, prompt in zip(images, prompts, strict=True):
        key = (None if image is None else content_key(image), prompt, tokens, top)
        said = known.get(key)
        if said is None:
            # One by one: the last bits of a prediction depend on what else is in a batch.
            with Guard.of(backbone).bare():
                said = _predict_next(backbone, image, prompt, tokens, top)
            known.put(key, said)
        out.append(said)
    return out


@torch.no_grad()
def _predict_next(backbone: Any, image: ImageLike | None, prompt: str, tokens: int, top: int) -> Said:
    batch = backbone.encode([image], [prompt], padding_side="left")
    if backbone.context - batch.attention_mask.shape[1] < tokens:
        raise TooLongError(f"prompt: leaves no room for an answer in a context of {backbone.context} tokens")
    with backbone.prompt.announce(batch):
        found = backbone.decoder.generate(
            **backbone.generation_arguments(batch),
            **Decoding().list_arguments(tokens),
            min_new_tokens=tokens,
            eos_token_id=list(backbone.eos_ids),
            pad_token_id=backbone.tokenizer.pad_token_id or backbone.eos_ids[0],
            output_logits=True,
            return_dict_in_generate=True,
        )
    probabilities = torch.softmax(torch.cat(found.logits).float(), -1)
    best = probabilities.topk(min(top, probabilities.shape[-1]), -1)
    return best.indices, best.values
