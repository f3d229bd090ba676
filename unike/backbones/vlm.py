"""The one implementation of all backbones: a vision side, a decoder, and what is written around a query.

An ``Architecture`` names the class of ``transformers``, and what differs between backbones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unike.backbones.answer_texts import explain_unreachable
from unike.backbones.architecture import Architecture
from unike.backbones.base import IGNORED, Batch, Output, PrefixState, Prompt, Sight, StateReader, narrow
from unike.backbones.decoding import Decoding
from unike.backbones.dialogue import Chat, Dialogue, prompt_and_answer
from unike.backbones.guard import Guard, copy_bare, held
from unike.backbones.hooks import first_tensor, hidden_states, inputs_of
from unike.backbones.images import FeatureCache, Parts
from unike.backbones.layout import DecoderLayout
from unike.backbones.next_tokens import SightCache
from unike.backbones.routing import Router, Routers, select_rows
from unike.backbones.store import RowStore
from unike.datasets.answers import normalise_answer
from unike.system.cache import BoundedCache
from unike.system.text import one_line
from unike.types import ImageLike, TooLongError, UserError

Images = Sequence[ImageLike | None]
# Number of masks whose layer inputs are kept: those of a training loop and of its probes.
MASKS = 32
# Number of texts whose token ids are kept.
TEXTS = 100_000


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
        # With the epoch of the weights that it is of.
        self._identity: tuple[int, str] | None = None
        self._epoch = 0
        self._vision_modules: tuple[int, list[torch.nn.Module]] | None = None
        self._layer_inputs = BoundedCache[Hashable, dict[str, object]](MASKS)
        self._sights = SightCache()
        self.routers = Routers()

    def __getstate__(self) -> dict[str, Any]:
        """Without its lock and what is attached: a copy has its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_guard", "_slot")}

    def __deepcopy__(self, memo: dict[int, Any]) -> VisionLanguageBackbone:
        """The base model: what is applied stays with the original."""
        copied: VisionLanguageBackbone = copy_bare(self, memo)
        return copied

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
        guard = Guard.of(self)
        with guard.hold():
            if (known := guard.watch.fingerprint) is not None:
                return known
            with guard.bare():
                return guard.watch.read_fingerprint(self.layout.config.model_type)

    @property
    def identity(self) -> str:
        """A checksum of weights, configuration, precision, device, image processing, tokeniser, dialogue and
        versions."""
        guard = Guard.of(self)
        with guard.hold():
            if self._identity is None or self._identity[0] != guard.epoch:
                with guard.bare():
                    self._identity = guard.epoch, self._compute_identity(guard.watch.read_checksum())
            return self._identity[1]

    def _compute_identity(self, weights: str) -> str:
        where = {"_name_or_path", "transformers_version"}
        settings = {k: v for k, v in _flatten(self._settings) if k.rpartition(".")[2] not in where}
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        parts = (
            weights,
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
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    @property
    def _settings(self) -> Mapping[str, object]:
        """The model's configuration, as plain values."""
        settings: dict[str, object] = self.model.config.to_dict()
        return settings

    def keep_features(
        self, store: RowStore | None, alone: bool = True, sights: RowStore | None = None
    ) -> None:
        if alone != self.cache.alone:
            self.cache.forget()
            self._sights.forget()
        self.cache.store, self.cache.alone = store, alone
        self._sights.store, self._sights.alone = sights, alone

    def _forget_former_weights(self) -> None:
        """Drops what was computed with other weights than the model has now."""
        if self._epoch != (epoch := Guard.of(self).epoch):
            self._epoch = epoch
            self.cache.forget()
            self._layer_inputs.clear()
            self._sights.forget()
            for kept in (self.cache, self._sights):
                if kept.store is not None:
                    kept.store = kept.store.move(self.identity)

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

    def count_around_image(self, prompt: str) -> tuple[int, int]:
        words = self.dialogue.words(self.tokenizer, self.tokens, prompt, None, True)
        return len(words.before), len(words.after)

    def prompt_and_answer(self, prompt: str, target: str | None) -> tuple[list[int], list[int]]:
        """Token ids of a text and of the answer after it, without what a dialogue writes around them."""
        return prompt_and_answer(self.tokens, prompt, target)

    @held
    def encode(
        self,
        images: Sequence[ImageLike | None],
        prompts: Sequence[str],
        targets: Sequence[str | None] | None = None,
        padding_side: str = "right",
        ends: Sequence[str] | None = None,
    ) -> Batch:
        """One batch of queries; without ``targets`` they have no answers. With ``ends``, one of
        ``types.ANSWER_ENDS`` for each query, the token that ends an answer belongs to it.

        An image is encoded once, but projected each time: an edit of the projection has its effect, and a
        gradient reaches it.

        Raises UserError for an image that cannot be read, and ValueError where the lists differ in length.
        """
        targets = [None] * len(prompts) if targets is None else targets
        ends = ["none"] * len(prompts) if ends is None else ends
        queries = list(zip(images, prompts, targets, ends, strict=True))
        rows = self.routers.spread(images, prompts, lambda own: self._encode_rows([queries[i] for i in own]))
        return replace(self._pad(rows, padding_side, tuple(prompts)), images=tuple(images))

    def _see(self, shown: Sequence[ImageLike]) -> list[Parts]:
        """What the vision side computes of each image. It is kept by the image's content; where an edit, or
        anybody's hook, is in the vision side, nothing that is kept is its."""
        self._forget_former_weights()
        if Guard.of(self).watch.are_plain(self._list_vision_modules()):
            return self.cache.get(shown, self.vision.pixels, device=self.device)
        return [self.vision.see([self.vision.pixels(image)])[0] for image in shown]

    def _list_vision_modules(self) -> list[torch.nn.Module]:
        """All modules that an image's features may depend on: neither decoder layers nor the projection."""
        if self._vision_modules is None or self._vision_modules[0] != self._epoch:
            layers = [self.layout.layer(i) for i in range(len(self.layout))]
            others = {id(m) for part in (*layers, self.projection) for m in part.modules()}
            own = [m for m in self.model.modules() if id(m) not in others]
            self._vision_modules = self._epoch, own
        return self._vision_modules[1]

    def _encode_rows(
        self, queries: Sequence[tuple[ImageLike | None, str, str | None, str]]
    ) -> list[_EncodedRow]:
        seen = iter(self._see([query[0] for query in queries if query[0] is not None]))
        return [self._encode_row(None if i is None else next(seen), p, t, end) for i, p, t, end in queries]

    def _encode_row(self, seen: Parts | None, prompt: str, target: str | None, end: str) -> _EncodedRow:
        """One query, unpadded; ``seen`` is what the vision side computed of its image."""
        if not self.tokens(prompt):
            raise UserError("prompt: is empty; expected a question")
        words = self.dialogue.words(self.tokenizer, self.tokens, prompt, target, seen is not None)
        if words.answer and (last := self.find_end(end)):
            words = replace(words, after=[*words.after, *last], answer=[*words.answer, *last])
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
            raise TooLongError(
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
            "position_ids": batch.position_ids,
        }

    def generation_arguments(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The input of the decoder's ``generate``; the batch is padded on the left."""
        return self._decoder_arguments(batch)

    @held
    def __call__(self, batch: Batch) -> Output:
        """The whole decoder over a batch."""
        return Output(self.routers.run(batch, self._decode_announced, select_rows))

    def _decode_announced(self, batch: Batch) -> torch.Tensor:
        with self.prompt.announce(batch):
            return self._decode_whole(batch)

    @held
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
            batch.images,
        )

    @held
    @torch.no_grad()
    def layer_inputs(
        self, attention_mask: torch.Tensor, positions: torch.Tensor | None = None
    ) -> dict[str, object]:
        """What decoder layers take besides the hidden state, for a mask ``[b,s]`` and positions ``[b,3,s]``.

        It depends on these, and on how the decoder runs; what was computed for the latest of them is kept.
        """
        self._forget_former_weights()
        given = (attention_mask,) if positions is None else (attention_mask, positions)
        raw = [tensor.cpu().numpy() for tensor in given]
        how = (attention_mask.device, self.dtype, getattr(self.layout.config, "_attn_implementation", None))
        key = (*how, *((array.dtype, array.shape, array.tobytes()) for array in raw))
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

    @held
    def suffix(self, state: PrefixState) -> torch.Tensor:
        """Logits ``[b,s,v]``: the layers from ``state.first`` on, final norm and head."""
        return self.layout.head(self.suffix_hidden(state))

    @held
    def answer_logits(self, state: PrefixState) -> torch.Tensor:
        """``[n,v]``: the head only runs where an answer token is predicted."""
        return self.layout.head(self.suffix_hidden(state)[:, :-1][state.answer_mask])

    @held
    def suffix_hidden(self, state: PrefixState) -> torch.Tensor:
        """What enters the final norm, ``[b,s,d]``."""
        return self.routers.run(state, self._run_suffix, partial(narrow, self))

    def _run_suffix(self, state: PrefixState) -> torch.Tensor:
        hidden = state.hidden
        with self.prompt.announce(state):
            for index in range(state.first, len(self.layout)):
                hidden = first_tensor(self.layout.layer(index)(hidden, **state.layer_inputs))
        return hidden

    @held
    @torch.no_grad()
    def generate(
        self,
        images: Sequence[ImageLike | None],
        prompts: Sequence[str],
        max_new_tokens: int | None = None,
        **decoding: object,
    ) -> list[str]:
        """Answers, each cut at the first stop; an answer ends where the decoder's context ends.

        Greedy, and of at most the backbone's ``max_new_tokens``, unless the arguments or ``decoding`` say
        otherwise: ``num_beams``, ``do_sample``, ``temperature``, ``top_p``, ``num_return_sequences`` and
        ``seed``, see ``Decoding``. Of several answers to each prompt, those to the first prompt come first.

        Raises UserError for an image that cannot be read, for a prompt that leaves no room for an answer, and
        for values that do not fit.
        """
        how = Decoding.of(max_new_tokens, decoding)

        def answer(rows: list[int]) -> list[str]:
            return self._generate([images[i] for i in rows], [prompts[i] for i in rows], how)

        return self.routers.spread(images, prompts, answer)

    def _generate(
        self, images: Sequence[ImageLike | None], prompts: Sequence[str], how: Decoding
    ) -> list[str]:
        batch = self.encode(images, self.prompt.write(prompts), padding_side="left")
        room = self.context - batch.attention_mask.shape[1]
        if room < 1:
            raise TooLongError(f"prompt: leaves no room for an answer in a context of {self.context} tokens")
        with self.prompt.announce(batch), how.draw():
            start = self.generation_arguments(batch)
            ids = self.decoder.generate(
                **start,
                **how.list_arguments(min(room, how.max_new_tokens or self.max_new_tokens)),
                eos_token_id=list(self.eos_ids),
                pad_token_id=self.tokenizer.pad_token_id or self.eos_ids[0],
            )
        # The output begins with the ids that generation starts from.
        ids = ids[:, start["input_ids"].shape[1] if "input_ids" in start else 0 :]
        return [self.cut(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @held
    def observe(
        self, images: Images, prompts: Sequence[str], tokens: int, top: int, reader: StateReader | None = None
    ) -> list[Sight]:
        self._forget_former_weights()
        return self._sights.recall(self, images, prompts, tokens, top, reader)

    def use_router(self, router: Router) -> AbstractContextManager[None]:
        return self.routers.use(router)

    def find_end(self, end: str) -> list[int]:
        """The token that ends an answer, of one of ``types.ANSWER_ENDS``; none for ``none``."""
        if end == "none":
            return []
        own = self.tokenizer.eos_token_id
        found = list(self.eos_ids[:1] if own is None else [int(own)])
        if end == "line_break":
            # Some tokenisers put a space before a text that begins with it.
            found = self.tokens("\n")[-1:]
        if not found or not self.ends_answer(found[0]):
            raise UserError(
                f"answer_end: {end}: the model's tokenizer has no such token; expected another end"
            )
        return found

    def ends_answer(self, token: int) -> bool:
        """Whether a generated answer ends at this token: EOS, or a stop."""
        if token in self.eos_ids:
            return True
        text = str(self.tokenizer.decode([token]))
        return any(text.lstrip(" ").startswith(stop) for stop in self.dialogue.stops)

    def find_target_problem(self, prompt: str, target: str) -> str | None:
        """Why a target could never be generated after a prompt, for a message; None where it could be."""
        # Some are left out when answers are read, and are none of the tokeniser's named ones.
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        specials = [
            *self.tokenizer.all_special_tokens,
            *(str(t) for t in added if getattr(t, "special", False)),
        ]
        if problem := explain_unreachable(target, self.dialogue.stops, specials):
            return problem
        ids, shown = self.prompt_and_answer(prompt, target)[1], one_line(repr(target.strip()), 60)
        if not {*self.eos_ids, *self.tokenizer.all_special_ids}.isdisjoint(ids):
            return f"target {shown} holds text that the model's tokenizer does not know"
        if normalise_answer(found := self.decode(ids)) != normalise_answer(target):
            return f"target {shown} would be read as {one_line(repr(found), 60)} when it is generated"
        return None

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


def _flatten(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """``(dotted key, value's text)`` of nested settings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)
