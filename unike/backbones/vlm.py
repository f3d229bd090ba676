"""The one implementation of all backbones: a vision side, a decoder, and what is written around a query.

An ``Architecture`` names the class of ``transformers``, and what differs between backbones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unike.backbones.architecture import Architecture
from unike.backbones.base import IGNORED, Batch, Output, PrefixState, Prompt
from unike.backbones.dialogue import Chat, Dialogue, prompt_and_answer
from unike.backbones.hooks import first_tensor, hidden_states, inputs_of
from unike.backbones.images import FeatureCache, Parts
from unike.backbones.layout import DecoderLayout
from unike.backbones.store import RowStore
from unike.system.cache import BoundedCache
from unike.types import ImageLike, UserError

# Number of masks whose layer inputs are kept: those of a training loop and of its probes.
MASKS = 32
# Number of texts whose token ids are kept.
TEXTS = 100_000
# Decoding is greedy, whatever a checkpoint's own generation settings are.
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
}


class VisionLanguageBackbone:
    """A frozen vision-language model; implements ``backbones.base.Backbone``."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        architecture: Architecture,
        dialogue: Dialogue | Chat,
        folder: str | None = None,
        image_size: int | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.dialogue = dialogue
        self.max_new_tokens = max_new_tokens
        self.decoder = architecture.find_decoder(model)
        self.layout = DecoderLayout(self.decoder)
        self.prompt = Prompt()
        self.vision = architecture.vision(model, folder, image_size)
        self.cache = FeatureCache(self.vision.see)
        self._token_ids = BoundedCache[str, list[int]](TEXTS)
        self._fingerprint: str | None = None
        self._identity: str | None = None
        self._layer_inputs = BoundedCache[Hashable, dict[str, object]](MASKS)

    @property
    def device(self) -> torch.device:
        where: torch.device = self.decoder.get_input_embeddings().weight.device
        return where

    @property
    def dtype(self) -> torch.dtype:
        kind: torch.dtype = self.decoder.dtype
        return kind

    @property
    def context(self) -> int:
        """How many tokens the decoder takes: the image's, the prompt's and the answer's together."""
        return self.layout.context

    @property
    def eos_ids(self) -> tuple[int, ...]:
        config = self.decoder.generation_config.eos_token_id
        ids = {self.tokenizer.eos_token_id, *(config if isinstance(config, list) else [config])}
        return tuple(sorted(i for i in ids if i is not None))

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            digest = hashlib.sha256(self.layout.config.model_type.encode())
            for name, tensor in sorted(self.model.state_dict().items()):
                digest.update(name.encode())
                # A few numbers of every tensor distinguish weights without reading gigabytes.
                flat = tensor.detach().flatten()
                digest.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    @property
    def identity(self) -> str:
        """A checksum of weights, configuration, precision, device, image processing, tokeniser, dialogue and
        versions."""
        if self._identity is None:
            where = {"_name_or_path", "transformers_version"}
            settings = {k: v for k, v in _flatten(self._settings) if k.rpartition(".")[2] not in where}
            backend = getattr(self.tokenizer, "backend_tokenizer", None)
            parts = (
                self.fingerprint,
                sorted(settings.items()),
                self.vision.settings,
                repr(self.dialogue),
                sorted(self.tokenizer.get_vocab().items()),
                None if backend is None else backend.to_str(),
                self.device.type,
                getattr(self.layout.config, "_attn_implementation", None),
                [(n, str(p.dtype)) for n, p in self.model.named_parameters()],
                torch.__version__,
                transformers.__version__,
            )
            self._identity = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        return self._identity

    @property
    def _settings(self) -> Mapping[str, object]:
        """The model's configuration, as plain values."""
        settings: dict[str, object] = self.model.config.to_dict()
        return settings

    def keep_features(self, store: RowStore | None, alone: bool = True) -> None:
        if alone != self.cache.alone:
            self.cache.forget()
        self.cache.store, self.cache.alone = store, alone

    @property
    def projection(self) -> torch.nn.Module:
        return self.vision.projection

    def tokens(self, text: str) -> list[int]:
        """Token ids of ``text`` alone, without BOS or EOS."""
        ids = self._token_ids.get(text)
        if ids is None:
            ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
            self._token_ids.put(text, ids)
        return ids

    def prompt_and_answer(self, prompt: str, target: str | None) -> tuple[list[int], list[int]]:
        """Token ids of a text and of the answer after it, without what a dialogue writes around them."""
        return prompt_and_answer(self.tokens, prompt, target)

    def encode(
        self,
        images: Sequence[ImageLike | None],
        prompts: Sequence[str],
        targets: Sequence[str | None] | None = None,
        padding_side: str = "right",
    ) -> Batch:
        """One batch of queries; without ``targets`` they have no answers.

        An image is encoded once, but projected each time: an edit of the projection has its effect, and a
        gradient reaches it.

        Raises UserError for an image that cannot be read, and ValueError where the lists differ in length.
        """
        targets = [None] * len(prompts) if targets is None else targets
        shown = [i for i in images if i is not None]
        seen = iter(self.cache.get(shown, self.vision.pixels, device=self.device))
        rows = [
            self._encode_row(next(seen) if i is not None else None, p, t)
            for i, p, t in zip(images, prompts, targets, strict=True)
        ]
        return self._pad(rows, padding_side, tuple(prompts))

    def _encode_row(self, seen: Parts | None, prompt: str, target: str | None) -> _EncodedRow:
        """One query, unpadded; ``seen`` is what the vision side computed of its image."""
        if not self.tokens(prompt):
            raise UserError("prompt: is empty; expected a question")
        words = self.dialogue.words(self.tokenizer, self.tokens, prompt, target, seen is not None)
        embed = self.decoder.get_input_embeddings()
        before, after = (
            embed(torch.tensor(ids, device=self.device, dtype=torch.long))
            for ids in (words.before, words.after)
        )
        parts = [before, after]
        if seen is not None:
            parts.insert(1, self.vision.tokens(seen, prompt).to(before))
        row = torch.cat(parts)
        if len(row) > self.context:
            raise UserError(
                f"prompt: {len(row)} tokens; expected at most {self.context}, the decoder's context"
            )
        return _EncodedRow(row, words.answer, self.vision.positions(len(before), seen, len(after)))

    def _pad(self, rows: list[_EncodedRow], side: str, prompts: tuple[str, ...]) -> Batch:
        if side not in ("left", "right"):
            raise ValueError(f"padding_side: {side!r}; expected 'left' or 'right'")
        width, device = max(len(row.embeds) for row in rows), self.device
        embeds = rows[0].embeds.new_zeros(len(rows), width, rows[0].embeds.shape[-1])
        mask = torch.zeros(len(rows), width, dtype=torch.long, device=device)
        labels = torch.full((len(rows), width), IGNORED, device=device)
        positions = None if rows[0].positions is None else mask.new_zeros(len(rows), 3, width)
        ends = []
        for i, row in enumerate(rows):
            start = width - len(row.embeds) if side == "left" else 0
            stop = start + len(row.embeds)
            embeds[i, start:stop] = row.embeds
            mask[i, start:stop] = 1
            if row.answer:
                labels[i, stop - len(row.answer) : stop] = torch.tensor(row.answer, device=device)
            if positions is not None and row.positions is not None:
                positions[i, :, start:stop] = row.positions
            ends.append(stop - len(row.answer) - 1)
        return Batch(embeds, mask, labels, torch.tensor(ends, device=device), prompts, positions)

    def _decode_whole(self, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = self.decoder(**self._decoder_arguments(batch), use_cache=False).logits
        return logits

    def _decoder_arguments(self, batch: Batch) -> dict[str, torch.Tensor]:
        """A batch by the names of the decoder's arguments."""
        return {
            "inputs_embeds": batch.inputs_embeds,
            "attention_mask": batch.attention_mask,
            "position_ids": _position_ids(batch),
        }

    def _generation_arguments(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The input of the decoder's ``generate``; the batch is padded on the left."""
        return self._decoder_arguments(batch)

    def __call__(self, batch: Batch) -> Output:
        """The whole decoder over a batch."""
        with self.prompt.announce(batch):
            return Output(self._decode_whole(batch))

    @torch.no_grad()
    def prefix(self, batch: Batch, first: int) -> PrefixState:
        """Runs the layers below ``first``, without gradients."""
        args, kwargs = inputs_of(self.layout.layer(first), lambda: self._decode_whole(batch))
        hidden = hidden_states(args, kwargs)
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        return PrefixState(
            hidden,
            batch.attention_mask,
            batch.labels,
            batch.question_end,
            first,
            rest,
            batch.prompts,
            batch.positions,
        )

    @torch.no_grad()
    def layer_inputs(
        self, attention_mask: torch.Tensor, positions: torch.Tensor | None = None
    ) -> dict[str, object]:
        """What decoder layers take besides the hidden state, for a mask ``[b,s]`` and positions ``[b,3,s]``.

        It depends on these alone; what was computed for the latest of them is kept.
        """
        given = (attention_mask,) if positions is None else (attention_mask, positions)
        raw = [tensor.cpu().numpy() for tensor in given]
        key = (attention_mask.device, *((array.dtype, array.shape, array.tobytes()) for array in raw))
        inputs = self._layer_inputs.get(key)
        if inputs is None:
            # Kept for later, when gradients may be wanted.
            with torch.inference_mode(False):
                inputs = self._read_layer_inputs(attention_mask, positions)
            self._layer_inputs.put(key, inputs)
        return dict(inputs)

    def _read_layer_inputs(
        self, attention_mask: torch.Tensor, positions: torch.Tensor | None = None
    ) -> dict[str, object]:
        embed = self.decoder.get_input_embeddings()
        nothing = torch.zeros(
            *attention_mask.shape, embed.embedding_dim, dtype=self.dtype, device=self.device
        )
        batch = Batch(nothing, attention_mask, attention_mask, attention_mask[:, 0], positions=positions)
        _, kwargs = inputs_of(self.layout.layer(0), lambda: self._decode_whole(batch))
        return {k: v for k, v in kwargs.items() if k != "hidden_states"}

    def suffix(self, state: PrefixState) -> torch.Tensor:
        """Logits ``[b,s,v]``: the layers from ``state.first`` on, final norm and head."""
        return self.layout.head(self.suffix_hidden(state))

    def answer_logits(self, state: PrefixState) -> torch.Tensor:
        """``[n,v]``: the head only runs where an answer token is predicted."""
        return self.layout.head(self.suffix_hidden(state)[:, :-1][state.answer_mask])

    def suffix_hidden(self, state: PrefixState) -> torch.Tensor:
        """What enters the final norm, ``[b,s,d]``."""
        hidden = state.hidden
        with self.prompt.announce(state):
            for index in range(state.first, len(self.layout)):
                hidden = first_tensor(self.layout.layer(index)(hidden, **state.layer_inputs))
        return hidden

    @torch.no_grad()
    def generate(
        self, images: Sequence[ImageLike | None], prompts: Sequence[str], max_new_tokens: int | None = None
    ) -> list[str]:
        """Greedy answers, each cut at the first stop; an answer ends where the decoder's context ends.

        Raises UserError for an image that cannot be read, and for a prompt that leaves no room for an answer.
        """
        batch = self.encode(images, prompts, padding_side="left")
        room = self.context - batch.attention_mask.shape[1]
        if room < 1:
            raise UserError(f"prompt: leaves no room for an answer in a context of {self.context} tokens")
        with self.prompt.announce(batch):
            start = self._generation_arguments(batch)
            ids = self.decoder.generate(
                **start,
                **GREEDY,
                max_new_tokens=min(room, max_new_tokens or self.max_new_tokens),
                eos_token_id=list(self.eos_ids),
                pad_token_id=self.tokenizer.pad_token_id or self.eos_ids[0],
            )
        # The output begins with the ids that generation starts from.
        ids = ids[:, start["input_ids"].shape[1] if "input_ids" in start else 0 :]
        return [self.cut(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def ends_answer(self, token: int) -> bool:
        """Whether a generated answer ends at this token: EOS, or a stop."""
        if token in self.eos_ids:
            return True
        text = str(self.tokenizer.decode([token]))
        return any(text.lstrip(" ").startswith(stop) for stop in self.dialogue.stops)

    def cut(self, text: str) -> str:
        """An answer up to its first stop, without surrounding whitespace."""
        text = text.lstrip()
        for stop in self.dialogue.stops:
            text = text.split(stop)[0]
        return text.strip()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self.cut(str(self.tokenizer.decode(list(ids), skip_special_tokens=True)))


@dataclass(frozen=True)
class _EncodedRow:
    """One query: ``embeds (s, d)``, the answer's token ids at their end, ``positions (3, s)`` or None."""

    embeds: torch.Tensor
    answer: list[int]
    positions: torch.Tensor | None


def _position_ids(batch: Batch) -> torch.Tensor:
    """The decoder's position ids: ``[b,s]``, or ``[3,b,s]``."""
    if batch.positions is not None:
        return batch.positions.transpose(0, 1)
    return (batch.attention_mask.cumsum(1) - 1).clamp(min=0)


def _flatten(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """``(dotted key, value's text)`` of nested settings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)
