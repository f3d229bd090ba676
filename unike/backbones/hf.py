"""The one implementation behind BLIP2-OPT and MiniGPT-4: vision tower, Q-Former, decoder.

Both are ``transformers.Blip2ForConditionalGeneration``, with an OPT or a LLaMA decoder; they differ
in what stands around the image, which is data (see ``blip2_opt`` and ``minigpt4``).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import Blip2ForConditionalGeneration, PreTrainedTokenizerBase

from unike.backbones.base import IGNORED, Batch, Output, PrefixState, Prompt
from unike.backbones.images import FeatureCache, image_processor
from unike.backbones.layout import DecoderLayout
from unike.backbones.store import RowStore
from unike.hooks import first_tensor, hidden_states, inputs_of
from unike.types import ImageLike, UserError

# Masks whose layer inputs are kept: those of a training loop and of the probes around it.
MASKS = 32


@dataclass(frozen=True)
class Dialogue:
    """What a backbone writes around image and answer.

    ``before_image`` and ``after_image`` are tokenised on their own; a generated answer ends at the
    first of ``stops``.
    """

    decoders: tuple[str, ...]
    before_image: str = ""
    after_image: str = ""
    stops: tuple[str, ...] = ("\n",)


class VisionLanguageBackbone:
    """A frozen BLIP-2-style model; implements ``backbones.base.Backbone``."""

    def __init__(
        self,
        model: Blip2ForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        dialogue: Dialogue,
        folder: str | None = None,
        image_size: int | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.dialogue = dialogue
        self.max_new_tokens = max_new_tokens
        self.layout = DecoderLayout(model.language_model)
        self.prompt = Prompt()
        vision: Any = model.config.vision_config
        trained = vision.image_size
        self.image_size = image_size or trained
        self._resize_positions = self.image_size != trained
        self.processor = image_processor(folder, self.image_size)
        self.cache = FeatureCache(self._see)
        self._token_ids: dict[str, list[int]] = {}
        self._fingerprint: str | None = None
        self._identity: str | None = None
        self._layer_inputs: OrderedDict[Any, dict[str, object]] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return self.model.language_model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.language_model.dtype

    @property
    def context(self) -> int:
        """How many tokens the decoder takes, the picture's, the prompt's and the answer's together."""
        return int(self.model.config.text_config.max_position_embeddings)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        config = self.model.language_model.generation_config.eos_token_id
        ids = {self.tokenizer.eos_token_id, *(config if isinstance(config, list) else [config])}
        return tuple(sorted(i for i in ids if i is not None))

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            digest = hashlib.sha256(self.model.config.text_config.model_type.encode())
            for name, tensor in sorted(self.model.state_dict().items()):
                digest.update(name.encode())
                # A few numbers of every tensor tell weights apart without reading gigabytes.
                flat = tensor.detach().flatten()
                digest.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    @property
    def identity(self) -> str:
        """Weights, configuration, precision, device, picture processing, tokeniser, dialogue, versions."""
        if self._identity is None:
            config = self.model.config.to_dict()
            where = {"_name_or_path", "transformers_version"}
            settings = {k: v for k, v in _flat(config) if k.rpartition(".")[2] not in where}
            backend = getattr(self.tokenizer, "backend_tokenizer", None)
            parts = (
                self.fingerprint, sorted(settings.items()), self.processor.to_json_string(), self.image_size,
                repr(self.dialogue), sorted(self.tokenizer.get_vocab().items()),
                None if backend is None else backend.to_str(), self.device.type,
                self.model.language_model.config._attn_implementation,
                [(n, str(p.dtype)) for n, p in self.model.named_parameters()],
                torch.__version__, transformers.__version__,
            )  # fmt: skip
            self._identity = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        return self._identity

    def keep_features(self, store: RowStore | None, alone: bool = True) -> None:
        if alone != self.cache.alone:
            self.cache.forget()
        self.cache.store, self.cache.alone = store, alone

    @property
    def projection(self) -> torch.nn.Module:
        return self.model.language_projection

    @torch.no_grad()
    def _see(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The Q-Former's output, in the vision tower's precision: what the projection receives."""
        vision = self.model.vision_model
        given = pixel_values.to(vision.device, vision.dtype)
        seen = self.model.get_image_features(given, interpolate_pos_encoding=self._resize_positions)
        return seen.qformer_outputs[0].to(given.dtype)

    def tokens(self, text: str) -> list[int]:
        """Token ids of ``text`` alone, without BOS or EOS."""
        if text not in self._token_ids:
            if len(self._token_ids) > 100_000:
                self._token_ids.clear()
            self._token_ids[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._token_ids[text]

    def prompt_and_answer(self, prompt: str, target: str | None) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the answer behind it, which starts with one space.

        The two are tokenised together, unless the tokeniser merges across their border: then the
        prompt keeps its own tokens, and the answer the tokens that it has behind them.
        """
        asked = self.tokens(prompt)
        if target is None:
            return asked, []
        answer = " " + target.strip()
        both = self.tokens(prompt + answer)
        if both[: len(asked)] == asked:
            return asked, both[len(asked) :]
        return asked, self.tokens(answer)

    def encode(
        self,
        images: Sequence[ImageLike | None],
        prompts: Sequence[str],
        targets: Sequence[str | None] | None = None,
        padding_side: str = "right",
    ) -> Batch:
        """One batch of queries; ``targets`` may be left out to ask without an answer.

        Pictures are seen once, but projected each time: an edit of the projection shows here, and a
        gradient reaches it.

        Raises UserError for a picture that cannot be read, and ValueError where the lists differ
        in length.
        """
        targets = [None] * len(prompts) if targets is None else targets
        shown = [i for i in images if i is not None]
        features = iter(self.cache.features(shown, self.processor, device=self.device)) if shown else iter(())
        rows = [
            self._row(next(features) if i is not None else None, p, t)
            for i, p, t in zip(images, prompts, targets, strict=True)
        ]
        return replace(self._pad(rows, padding_side), prompts=tuple(prompts))

    def _row(
        self, features: torch.Tensor | None, prompt: str, target: str | None
    ) -> tuple[torch.Tensor, list[int]]:
        """Embeddings ``(s, d)`` and the answer's token ids at their end; ``features`` as ``_see`` gives."""
        asked, answer = self.prompt_and_answer(prompt, target)
        if not asked:
            raise UserError("prompt: is empty; expected a question")
        embed = self.model.language_model.get_input_embeddings()
        parts = [embed(torch.tensor(asked + answer, device=self.device))]
        if features is not None:
            around = (self.dialogue.before_image, self.dialogue.after_image)
            before, after = (
                embed(torch.tensor(self.tokens(t), device=self.device, dtype=torch.long)) for t in around
            )
            parts = [before, self.projection(features).to(before), after, *parts]
        row = torch.cat(parts)
        if len(row) > self.context:
            raise UserError(
                f"prompt: {len(row)} tokens; expected at most {self.context}, the decoder's context"
            )
        return row, answer

    def _pad(self, rows: list[tuple[torch.Tensor, list[int]]], side: str) -> Batch:
        if side not in ("left", "right"):
            raise ValueError(f"padding_side: {side!r}; expected 'left' or 'right'")
        width, device = max(len(e) for e, _ in rows), self.device
        embeds = rows[0][0].new_zeros(len(rows), width, rows[0][0].shape[-1])
        mask = torch.zeros(len(rows), width, dtype=torch.long, device=device)
        labels = torch.full((len(rows), width), IGNORED, device=device)
        ends = []
        for i, (row, answer) in enumerate(rows):
            start = width - len(row) if side == "left" else 0
            stop = start + len(row)
            embeds[i, start:stop] = row
            mask[i, start:stop] = 1
            if answer:
                labels[i, stop - len(answer) : stop] = torch.tensor(answer, device=device)
            ends.append(stop - len(answer) - 1)
        return Batch(embeds, mask, labels, torch.tensor(ends, device=device))

    def _decode_whole(self, batch: Batch) -> torch.Tensor:
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
        return self.model.language_model(
            inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask,
            position_ids=positions, use_cache=False,
        ).logits  # fmt: skip

    def __call__(self, batch: Batch) -> Output:
        """The whole decoder over a batch."""
        with self.prompt.asking(batch):
            return Output(self._decode_whole(batch))

    @torch.no_grad()
    def prefix(self, batch: Batch, first: int) -> PrefixState:
        """Runs the layers below ``first``, without gradients."""
        args, kwargs = inputs_of(self.layout.layer(first), lambda: self._decode_whole(batch))
        hidden = hidden_states(args, kwargs)
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        return PrefixState(
            hidden, batch.attention_mask, batch.labels, batch.question_end, first, rest, batch.prompts
        )

    @torch.no_grad()
    def layer_inputs(self, attention_mask: torch.Tensor) -> dict[str, object]:
        """What decoder layers take beside the hidden state for a mask ``[b,s]``.

        It depends on the mask alone, so that of the masks asked last is kept.
        """
        raw = attention_mask.cpu().numpy()
        key = (attention_mask.device, raw.dtype, raw.shape, raw.tobytes())
        if key not in self._layer_inputs:
            self._layer_inputs[key] = self._read_layer_inputs(attention_mask)
            if len(self._layer_inputs) > MASKS:
                self._layer_inputs.popitem(last=False)
        self._layer_inputs.move_to_end(key)
        return dict(self._layer_inputs[key])

    def _read_layer_inputs(self, attention_mask: torch.Tensor) -> dict[str, object]:
        embed = self.model.language_model.get_input_embeddings()
        nothing = torch.zeros(
            *attention_mask.shape, embed.embedding_dim, dtype=self.dtype, device=self.device
        )
        batch = Batch(nothing, attention_mask, attention_mask, attention_mask[:, 0])
        _, kwargs = inputs_of(self.layout.layer(0), lambda: self._decode_whole(batch))
        return {k: v for k, v in kwargs.items() if k != "hidden_states"}

    def suffix(self, state: PrefixState) -> torch.Tensor:
        """Logits ``[b,s,v]``: the layers from ``state.first`` on, final norm and head."""
        return self.layout.head(self.suffix_hidden(state))

    def answer_logits(self, state: PrefixState) -> torch.Tensor:
        """``[n,v]``: the head is only asked where an answer token is predicted."""
        return self.layout.head(self.suffix_hidden(state)[:, :-1][state.answer_mask])

    def suffix_hidden(self, state: PrefixState) -> torch.Tensor:
        """What enters the final norm, ``[b,s,d]``."""
        hidden = state.hidden
        with self.prompt.asking(state):
            for index in range(state.first, len(self.layout)):
                hidden = first_tensor(self.layout.layer(index)(hidden, **state.layer_inputs))
        return hidden

    @torch.no_grad()
    def generate(
        self, images: Sequence[ImageLike | None], prompts: Sequence[str], max_new_tokens: int | None = None
    ) -> list[str]:
        """Greedy answers, each cut at the first stop; an answer ends where the decoder's context does.

        Raises UserError for a picture that cannot be read and a prompt that leaves no room.
        """
        batch = self.encode(images, prompts, padding_side="left")
        room = self.context - batch.attention_mask.shape[1]
        if room < 1:
            raise UserError(f"prompt: leaves no room for an answer in a context of {self.context} tokens")
        with self.prompt.asking(batch):
            ids = self.model.language_model.generate(
                inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask, do_sample=False,
                max_new_tokens=min(room, max_new_tokens or self.max_new_tokens),
                eos_token_id=list(self.eos_ids),
                pad_token_id=self.tokenizer.pad_token_id or self.eos_ids[0],
            )  # fmt: skip
        return [self.cut(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def ends_answer(self, token: int) -> bool:
        """Whether a generated answer ends where this token comes: EOS, or a stop."""
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


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """``(dotted key, value's text)`` of nested settings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)
