"""Questions as users ask them: one, or a list of them, each checked before a model sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from unike.backbones.images import take_image
from unike.system.text import describe_value, is_unicode
from unike.types import ImageLike, UserError

Locate = Callable[[ImageLike | None], ImageLike | None]


def check_question(
    image: ImageLike | None, prompt: object, locate: Locate = take_image
) -> tuple[ImageLike | None, str]:
    """Image and prompt as they are asked; UserError, in one line, for what is no image or no text."""
    if not isinstance(prompt, str):
        raise UserError(f"prompt: expected a text, got {describe_value(prompt)}")
    if not prompt.strip():
        raise UserError("prompt: is empty; expected a question")
    if not is_unicode(prompt):
        raise UserError("prompt: half of a surrogate pair, which is no text")
    return locate(image), str(prompt).strip()


def answer_each(
    answer: Callable[[ImageLike | None, str], Any],
    image: object,
    prompt: object,
    locate: Locate = take_image,
) -> Any:
    """The answer to one question, or a list of answers where prompts, images or both are lists.

    One prompt serves all images, and one image all prompts. UserError, before anything is answered, for
    lists of different lengths and for what is no image or no text.
    """
    images = list(image) if isinstance(image, (list, tuple)) else None
    prompts = list(prompt) if isinstance(prompt, (list, tuple)) else None
    if images is None and prompts is None:
        with torch.inference_mode(False):
            return answer(*check_question(image, prompt, locate))
    n = len(prompts if prompts is not None else images or ())
    images = [image] * n if images is None else images
    prompts = [prompt] * n if prompts is None else prompts
    if len(images) != len(prompts):
        raise UserError(f"image: expected as many as prompts, {len(prompts)}, got {len(images)}")
    asked = []
    for i, (shown, text) in enumerate(zip(images, prompts, strict=True)):
        try:
            asked.append(check_question(shown, text, locate))
        except UserError as error:
            raise UserError(*(f"[{i}] {line}" for line in error.problems)) from error
    # What is kept for later edits must carry gradients then, whatever the caller has switched off.
    with torch.inference_mode(False):
        return [answer(*question) for question in asked]
