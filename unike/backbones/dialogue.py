"""How a query becomes text: what a backbone writes around image, prompt and answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from unike.types import UserError

Tokenise = Callable[[str], list[int]]


@dataclass(frozen=True)
class Words:
    """Token ids of a query: those before its image, those after it, and the answer's at their end."""

    before: list[int]
    after: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Dialogue:
    """What a backbone without a chat template writes around the image.

    ``before_image`` and ``after_image`` are tokenised on their own; with ``bos`` the tokeniser's own
    beginning stands before the prompt. A generated answer ends at the first of ``stops``.
    """

    before_image: str = ""
    after_image: str = ""
    stops: tuple[str, ...] = ("\n",)
    bos: bool = False

    def words(
        self, tokenizer: Tokenizer, tokens: Tokenise, prompt: str, target: str | None, shown: bool
    ) -> Words:
        """A query's tokens; ``shown``: whether it has an image."""
        asked, answer = prompt_and_answer(tokens, prompt, target)
        begin = find_beginning(tokenizer, tokens) if self.bos else []
        if not shown:
            return Words([], [*begin, *asked, *answer], answer)
        after = [*tokens(self.after_image), *begin, *asked, *answer]
        return Words(tokens(self.before_image), after, answer)


@dataclass(frozen=True)
class Chat:
    """A query as the user's turn of a conversation, written by the checkpoint's own chat ``template``.

    ``image`` is the text that the template writes for an image, one token.
    """

    template: str
    image: str
    stops: tuple[str, ...] = ("\n",)

    def words(
        self, tokenizer: Tokenizer, tokens: Tokenise, prompt: str, target: str | None, shown: bool
    ) -> Words:
        """A query's tokens; ``shown``: whether it has an image. UserError where the prompt holds
        ``image``."""
        text = self.text(tokenizer, prompt, shown)
        if text.count(self.image) != shown:
            raise UserError(f"prompt: holds {self.image}, which stands for an image; expected plain text")
        asked, answer = prompt_and_answer(tokens, text, target)
        # As in transformers' processors: a template may write BOS itself.
        given = tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))
        ids = [*([] if given else find_beginning(tokenizer, tokens)), *asked]
        at = ids.index(tokens(self.image)[0]) if shown else -1
        return Words(ids[: max(at, 0)], [*ids[at + 1 :], *answer], answer)

    def text(self, tokenizer: Tokenizer, prompt: str, shown: bool) -> str:
        """All that is written before the answer."""
        content = [*([{"type": "image"}] if shown else []), {"type": "text", "text": prompt}]
        turns: Any = [{"role": "user", "content": content}]
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        )


def prompt_and_answer(tokens: Tokenise, asked: str, target: str | None) -> tuple[list[int], list[int]]:
    """Token ids of the prompt ``asked`` and of the answer after it.

    The answer starts with one space, unless it stands on a line of its own. The two are tokenised
    together, unless the tokeniser merges across their border: then each keeps the tokens that it has alone.
    """
    prompt = tokens(asked)
    if target is None:
        return prompt, []
    answer = target.strip() if asked.endswith("\n") else " " + target.strip()
    both = tokens(asked + answer)
    if both[: len(prompt)] == prompt:
        return prompt, both[len(prompt) :]
    return prompt, tokens(answer)


def find_beginning(tokenizer: Tokenizer, tokens: Tokenise) -> Sequence[int]:
    """What the tokeniser puts before a text by itself (BOS, as a rule)."""
    plain, whole = tokens("a"), tokenizer("a").input_ids
    return next(whole[:at] for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
