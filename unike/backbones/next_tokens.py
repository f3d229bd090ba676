"""What an unedited model computes at a prompt: what it is about to say, and how a reader sees its states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from unike.backbones.base import Sight, StateReader
from unike.backbones.decoding import Decoding
from unike.backbones.guard import Guard
from unike.backbones.hooks import watch
from unike.backbones.images import content_key
from unike.backbones.store import RowStore, row_key
from unike.system.cache import BoundedCache
from unike.types import ImageLike, TooLongError

# Image, prompt, number of tokens, of the best of them, layer and key of the reader.
SightKey = tuple[str | None, ...]
# How many prompts are observed in one pass, where they need not be alone: all of its logits are kept.
TOGETHER = 16
# Of how many prompts what was seen is kept in memory.
SIGHTS = 20_000


class SightCache:
    """What an unedited model sees at prompts: in memory, and with a ``store`` on disk, too.

    The last bits of a prediction depend on what else is in a batch: with ``alone`` each prompt is computed by
    itself. Where somebody's hook is in the model, nothing on disk is its.
    """

    def __init__(self) -> None:
        self._known = BoundedCache[SightKey, Sight](SIGHTS)
        self.store: RowStore | None = None
        self.alone = True

    def forget(self) -> None:
        """Drops what is in memory."""
        self._known.clear()

    def recall(
        self,
        backbone: Any,
        images: Sequence[ImageLike | None],
        prompts: Sequence[str],
        tokens: int,
        top: int,
        reader: StateReader | None,
    ) -> list[Sight]:
        """As ``Backbone.observe``."""
        about = ("", "") if reader is None else (str(reader.layer), reader.key)
        keys: list[SightKey] = [
            (None if image is None else content_key(image), prompt, str(tokens), str(top), *about)
            for image, prompt in zip(images, prompts, strict=True)
        ]
        asked = dict(zip(keys, zip(images, prompts, strict=True), strict=True))
        found = {key: sight for key in asked if (sight := self._known.get(key)) is not None}
        if len(found) < len(asked):
            guard = Guard.of(backbone)
            with guard.bare():
                plain = self.store is not None and guard.watch.are_plain(list(backbone.model.modules()))
                store = self.store if plain else None
                found |= _load(store, [key for key in asked if key not in found], backbone.device)
                left = [key for key in asked if key not in found]
                count = 1 if self.alone else TOGETHER
                for start in range(0, len(left), count):
                    some = left[start : start + count]
                    sights = _observe(backbone, [asked[k] for k in some], tokens, top, reader)
                    new = dict(zip(some, sights, strict=True))
                    if store is not None:
                        store.put({row_key(key): _list_tensors(sight) for key, sight in new.items()})
                    found |= new
        for key, sight in found.items():
            self._known.put(key, sight)
        return [found[key] for key in keys]


def _list_tensors(sight: Sight) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in sight._asdict().items() if tensor is not None}


def _load(store: RowStore | None, keys: Sequence[SightKey], device: torch.device) -> dict[SightKey, Sight]:
    if store is None or not keys:
        return {}
    rows = store.get([row_key(key) for key in keys])
    kept = ((key, rows.get(row_key(key))) for key in keys)
    return {
        key: Sight(**{name: tensor.to(device) for name, tensor in row.items()}) for key, row in kept if row
    }


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
    backbone: Any,
    asked: Sequence[tuple[ImageLike | None, str]],
    tokens: int,
    top: int,
    reader: StateReader | None,
) -> list[Sight]:
    batch = backbone.encode(
        [image for image, _ in asked], [prompt for _, prompt in asked], padding_side="left"
    )
    if backbone.context - batch.attention_mask.shape[1] < tokens:
        if len(asked) > 1:
            # Those that fit are not to fail for the one that does not.
            return [sight for one in asked for sight in _observe(backbone, [one], tokens, top, reader)]
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
    # (b, m, v): of a row that has ended before others, the rest is cut off.
    probabilities = torch.softmax(torch.stack(found.logits, 1).float(), -1)
    best = probabilities.topk(min(top, probabilities.shape[-1]), -1)
    sights = []
    for i, said in enumerate(best.indices[:, :, 0].tolist()):
        length = next((n for n, token in enumerate(said, 1) if backbone.ends_answer(token)), len(said))
        vector = None if reader is None else reader.read(states[0][i][batch.attention_mask[i].bool()])
        sights.append(Sight(best.indices[i, :length].clone(), best.values[i, :length].clone(), vector))
    return sights
