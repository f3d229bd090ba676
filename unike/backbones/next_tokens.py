"""What an unedited model computes at a prompt: what it is about to say, and how a reader sees its states."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from unike.backbones.base import Sight, StateReader
from unike.backbones.decoding import Decoding
from unike.backbones.guard import Guard
from unike.backbones.hooks import watch
from unike.backbones.images import content_key
from unike.system.cache import BoundedCache
from unike.types import ImageLike, TooLongError


def recall_sights(
    backbone: Any,
    known: BoundedCache[Hashable, Sight],
    images: Sequence[ImageLike | None],
    prompts: Sequence[str],
    tokens: int,
    top: int,
    reader: StateReader | None,
) -> list[Sight]:
    """As ``Backbone.observe``; what was computed is kept in ``known``."""
    out = []
    for image, prompt in zip(images, prompts, strict=True):
        about = None if reader is None else (reader.layer, reader.key)
        key = (None if image is None else content_key(image), prompt, tokens, top, about)
        sight = known.get(key)
        if sight is None:
            # One by one: the last bits of a prediction depend on what else is in a batch.
            with Guard.of(backbone).bare():
                sight = _observe(backbone, image, prompt, tokens, top, reader)
            known.put(key, sight)
        out.append(sight)
    return out


@contextmanager
def _collect_states(backbone: Any, reader: StateReader | None) -> Iterator[list[torch.Tensor]]:
    """What enters the reader's layer at the prompt's tokens, ``(1, t, d)``: the first pass of ``generate``,
    whose later ones see a token each."""
    states: list[torch.Tensor] = []
    if reader is None:
        yield states
        return

    def keep(x: torch.Tensor) -> None:
        if not states:
            states.append(x)

    with watch(backbone.layout.attention(reader.layer).module, keep):
        yield states


@torch.no_grad()
def _observe(
    backbone: Any, image: ImageLike | None, prompt: str, tokens: int, top: int, reader: StateReader | None
) -> Sight:
    batch = backbone.encode([image], [prompt], padding_side="left")
    if backbone.context - batch.attention_mask.shape[1] < tokens:
        raise TooLongError(f"prompt: leaves no room for an answer in a context of {backbone.context} tokens")
    with backbone.prompt.announce(batch), _collect_states(backbone, reader) as states:
        found = backbone.decoder.generate(
            **backbone.generation_arguments(batch),
            **Decoding().list_arguments(tokens),
            eos_token_id=list(backbone.eos_ids),
            pad_token_id=backbone.tokenizer.pad_token_id or backbone.eos_ids[0],
            output_logits=True,
            return_dict_in_generate=True,
        )
    probabilities = torch.softmax(torch.cat(found.logits).float(), -1)
    best = probabilities.topk(min(top, probabilities.shape[-1]), -1)
    said = best.indices[:, 0].tolist()
    length = next((n for n, token in enumerate(said, 1) if backbone.ends_answer(token)), len(said))
    vector = None if reader is None else reader.read(states[0][0])
    return Sight(best.indices[:length], best.values[:length], vector)
