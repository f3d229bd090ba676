"""What every backbone offers to editing methods: encode, whole forward, prefix and suffix, generate.

Shapes: ``b`` batch, ``s`` sequence (image tokens, prompt, answer, padding), ``d`` decoder width,
``v`` vocabulary. The edited layers are the last ones, so what enters the first of them is a
constant of the query: ``prefix`` computes it, ``suffix`` runs the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

from unike.backbones.layout import DecoderLayout
from unike.backbones.store import RowStore
from unike.types import ImageLike, Query, UserError

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Encoded queries.

    ``inputs_embeds [b,s,d]``; ``attention_mask [b,s]`` of 0 and 1; ``labels [b,s]``, -100 outside the answer;
    ``question_end [b]``, the position ``p`` of the last prompt token; ``prompts``, the texts; ``positions
    [b,3,s]``, the tokens' positions in time, height and width, for decoders that do not simply count tokens;
    ``images``, as they were given.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    question_end: torch.Tensor
    prompts: tuple[str, ...] = ()
    positions: torch.Tensor | None = None
    images: tuple[ImageLike | None, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def position_ids(self) -> torch.Tensor:
        """The decoder's position ids: ``[b,s]``, or ``[3,b,s]``."""
        if self.positions is not None:
            return self.positions.transpose(0, 1)
        return (self.attention_mask.cumsum(1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Output:
    """``logits [b,s,v]``, unnormalised: position ``t`` predicts token ``t + 1``."""

    logits: torch.Tensor


@dataclass(frozen=True)
class PrefixState:
    """Queries at the input of the first edited layer.

    ``hidden [b,s,d]`` enters layer ``first``; ``layer_inputs`` are the other arguments (mask, rotary
    positions) that this layer and all further ones take. ``positions`` and ``images`` are the batch's.
    """

    hidden: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    question_end: torch.Tensor
    first: int
    layer_inputs: Mapping[str, object] = field(repr=False, default_factory=dict)
    prompts: tuple[str, ...] = ()
    positions: torch.Tensor | None = None
    images: tuple[ImageLike | None, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def answer_mask(self) -> torch.Tensor:
        """``[b, s-1]``: true where a logit predicts an answer token."""
        return self.labels[:, 1:] != IGNORED


# Transformers' own forward and ``generate`` don't say where a prompt ends, or what its words are.
CALLED_BARE = (
    "an attached edit decides by the prompt, which transformers' own model(...) and model.generate(...) do "
    "not name; ask with editor.generate(image, prompt, edited=True), edited_model.generate or "
    "backbone.generate"
)


@dataclass(frozen=True)
class PromptRows:
    """The prompts of a forward pass, by row: ``question_end (R)``, ``attention_mask (R, s)``, texts, and
    whether each has an image."""

    question_end: torch.Tensor
    attention_mask: torch.Tensor
    texts: tuple[str, ...]
    with_image: tuple[bool, ...] = ()


class Prompt:
    """Which prompts the model reads now: set by the backbone, read by edits.

    ``number`` changes with every new batch of prompts. An edit decides at ``question_end`` when the number is
    new to it, and keeps its decision while the answer is decoded. ``attention_mask [b,s]`` is the batch's,
    and covers its answers where these are given. ``with_image (b)`` says which prompts have an image, as far
    as the batch says. ``rewriters`` are those of the edits that are texts in the
    prompt. ``weights (b)``, where there are any, say how much of an edit's in-context knowledge each prompt
    gets.
    """

    def __init__(self) -> None:
        self.number = 0
        self.question_end: torch.Tensor | None = None
        self.attention_mask: torch.Tensor | None = None
        self.texts: tuple[str, ...] = ()
        self.with_image: tuple[bool, ...] = ()
        self.rewriters: list[Callable[[str], str]] = []
        self.weights: torch.Tensor | None = None
        self._numbers = count(1)

    def require_announced(self) -> None:
        """UserError where the model was called by itself, so that nothing is known of its prompts."""
        if self.question_end is None:
            raise UserError(CALLED_BARE)

    def write(self, texts: Sequence[str]) -> list[str]:
        """The texts as the edits that are applied show them."""
        for rewrite in self.rewriters:
            texts = [rewrite(text) for text in texts]
        return list(texts)

    def spread(self, rows: int) -> PromptRows:
        """The prompts as ``rows`` rows of a forward pass: as many for each prompt, one after the other, as
        there are beams or answers to it. UserError where the model was called by itself, so that nothing is
        known of its prompts.
        """
        if self.question_end is None or self.attention_mask is None:
            raise UserError(CALLED_BARE)
        copies, rest = divmod(rows, len(self.question_end))
        if rest or not copies:
            raise UserError(f"{CALLED_BARE} ({rows} rows for {len(self.question_end)} prompts)")
        if copies == 1:
            return PromptRows(self.question_end, self.attention_mask, self.texts, self.with_image)
        return PromptRows(
            self.question_end.repeat_interleave(copies, 0),
            self.attention_mask.repeat_interleave(copies, 0),
            tuple(text for text in self.texts for _ in range(copies)),
            tuple(shown for shown in self.with_image for _ in range(copies)),
        )

    def spread_weights(self, rows: int) -> torch.Tensor | None:
        """The ``weights`` as ``rows`` rows of a forward pass, as ``spread`` does; None without any.
        ValueError where the rows are not those of the prompts that have weights."""
        if self.weights is None:
            return None
        copies, rest = divmod(rows, len(self.weights))
        if rest or not copies:
            raise ValueError(f"{rows} rows for {len(self.weights)} weights")
        return self.weights.repeat_interleave(copies, 0)

    @contextmanager
    def weigh(self, weights: torch.Tensor | None) -> Iterator[None]:
        """Inside the block the prompts have these ``weights``."""
        former, self.weights = self.weights, weights
        try:
            yield
        finally:
            self.weights = former

    @contextmanager
    def announce(self, batch: Batch | PrefixState) -> Iterator[None]:
        """Inside the block the model reads the prompts of ``batch``."""
        former = (self.number, self.question_end, self.attention_mask, self.texts, self.with_image)
        self.number, self.question_end = next(self._numbers), batch.question_end
        self.attention_mask, self.texts = batch.attention_mask, batch.prompts
        self.with_image = tuple(image is not None for image in batch.images)
        try:
            yield
        finally:
            self.number, self.question_end, self.attention_mask, self.texts, self.with_image = former


class Sight(NamedTuple):
    """One prompt as the unedited model sees it: the most probable next tokens along its greedy answer, up to
    its end, ``ids (m, t)`` with their ``probabilities (m, t)``, best first, and what the reader makes of the
    prompt's states, ``(r)``; None without a reader."""

    ids: torch.Tensor
    probabilities: torch.Tensor
    vector: torch.Tensor | None = None


class StateReader(Protocol):
    """Reads a prompt's states ``(t, d)``, as they enter the attention of decoder layer ``layer``."""

    @property
    def layer(self) -> int: ...

    @property
    def key(self) -> str:
        """The same for readers that read alike, and for these only."""
        ...

    def read(self, states: torch.Tensor) -> torch.Tensor:
        """The states as a vector, ``(r)``."""
        ...


@runtime_checkable
class Backbone(Protocol):
    """A frozen vision-language model: what methods and evaluation see of it.

    Shapes: ``b`` batch, ``s`` sequence (image tokens, prompt, answer, padding), ``d`` decoder width, ``v``
    vocabulary. ``model`` is the module of transformers, ``layout`` names the edited modules of its decoder,
    ``prompt`` says which prompts are read now, ``max_new_tokens`` is the most tokens of an answer.
    """

    model: nn.Module
    layout: DecoderLayout
    prompt: Prompt
    max_new_tokens: int

    @property
    def device(self) -> torch.device:
        """That of the embeddings and of the edited layers."""
        ...

    @property
    def projection(self) -> nn.Module:
        """What projects the vision side's states into the decoder; it comes before every layer."""
        ...

    @property
    def fingerprint(self) -> str:
        """A checksum of configuration and weights."""
        ...

    @property
    def identity(self) -> str:
        """A checksum of all that a query's states depend on, other than the query itself."""
        ...

    def keep_features(
        self, store: RowStore | None, alone: bool = True, sights: RowStore | None = None
    ) -> None:
        """Sets where vision features and ``sights``, what ``observe`` gives, are kept on disk, if anywhere,
        and whether each image and prompt is computed by itself rather than in a batch."""
        ...

    def encode(
        self,
        images: Sequence[ImageLike | None],
        prompts: Sequence[str],
        targets: Sequence[str | None] | None = None,
        padding_side: str = "right",
        ends: Sequence[str] | None = None,
    ) -> Batch:
        """The queries as one batch of ``b`` rows; an image may be None, and without ``targets`` there are no
        answers. ``ends``, one of ``unike.types.ANSWER_ENDS`` for each row, is what follows the answer.

        UserError for an image that cannot be read, ValueError for lists of different lengths.
        """
        ...

    def __call__(self, batch: Batch) -> Output:
        """The logits of the whole decoder, ``[b,s,v]``."""
        ...

    def prefix(self, batch: Batch, first: int) -> PrefixState:
        """Runs the layers below ``first``, without gradients: ``hidden [b,s,d]`` enters layer ``first``."""
        ...

    def suffix(self, state: PrefixState) -> torch.Tensor:
        """Logits ``[b,s,v]`` of the layers from ``state.first`` on, the final norm and the head."""
        ...

    def suffix_hidden(self, state: PrefixState) -> torch.Tensor:
        """``[b,s,d]``: what enters ``layout.head``, the final norm first."""
        ...

    def answer_logits(self, state: PrefixState) -> torch.Tensor:
        """``[n,v]``: those of ``suffix``'s logits that predict the rows' answer tokens, row after row."""
        ...

    def layer_inputs(
        self, attention_mask: torch.Tensor, positions: torch.Tensor | None = None
    ) -> Mapping[str, object]:
        """The arguments of a decoder layer besides its hidden state, for a mask ``[b,s]`` and positions
        ``[b,3,s]``."""
        ...

    def generate(
        self,
        images: Sequence[ImageLike | None],
        prompts: Sequence[str],
        max_new_tokens: int | None = None,
        **decoding: object,
    ) -> list[str]:
        """A text for each prompt, greedy by default: ``decoding`` is that of
        ``unike.backbones.decoding.Decoding``. With ``num_return_sequences=n`` there are ``n`` texts for each
        prompt, one after the other. Attached edits apply.

        UserError for an image that cannot be read, and for a prompt that leaves no room for an answer."""
        ...

    def observe(
        self,
        images: Sequence[ImageLike | None],
        prompts: Sequence[str],
        tokens: int,
        top: int,
        reader: StateReader | None = None,
    ) -> list[Sight]:
        """Each prompt as the unedited model sees it, whatever is applied: the ``top`` most probable tokens at
        each of the first ``tokens`` of its greedy answer, and what the ``reader`` makes of its states."""
        ...

    def use_router(self, router: Any) -> AbstractContextManager[None]:
        """Inside the block a ``unike.backbones.routing.Router`` decides what each row of a batch is computed
        under."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        ...

    def ends_answer(self, token: int) -> bool:
        """Whether a generated answer ends at this token."""
        ...

    def find_target_problem(self, prompt: str, target: str) -> str | None:
        """Why a target could never be generated after a prompt, for a message; None where it could be."""
        ...

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text alone, without BOS and EOS."""
        ...

    def count_around_image(self, prompt: str) -> tuple[int, int]:
        """How many tokens of a query stand before its image, and how many follow it up to the prompt's
        last."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids of the tokens that end a text."""
        ...


def encode_queries(backbone: Backbone, queries: Sequence[Query]) -> Batch:
    """The queries as one batch."""
    columns = [q.image for q in queries], [q.prompt for q in queries], [q.target for q in queries]
    if all(q.end == "none" for q in queries):
        return backbone.encode(*columns)
    return backbone.encode(*columns, ends=[q.end for q in queries])


def narrow(backbone: Backbone, state: PrefixState, rows: torch.Tensor) -> PrefixState:
    """Some rows of a state that is padded on the right, cut to the length of the longest of them."""
    mask = state.attention_mask[rows]
    width = int(mask.sum(1).max())
    mask = mask[:, :width]
    positions = None if state.positions is None else state.positions[rows, :, :width]
    return replace(
        state,
        hidden=state.hidden[rows, :width],
        attention_mask=mask,
        labels=state.labels[rows, :width],
        question_end=state.question_end[rows],
        layer_inputs=backbone.layer_inputs(mask, positions),
        prompts=tuple(state.prompts[i] for i in rows.tolist()) if state.prompts else (),
        positions=positions,
        images=tuple(state.images[i] for i in rows.tolist()) if state.images else (),
    )


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each row's answer tokens, ``[b]``."""
    goal = labels[:, 1:]
    at = goal != IGNORED
    losses = torch.zeros(goal.shape, dtype=torch.float32, device=goal.device)
    picked = nn.functional.cross_entropy(logits[:, :-1][at].float(), goal[at], reduction="none")
    losses = losses.masked_scatter(at, picked)
    return losses.sum(1) / at.sum(1)
