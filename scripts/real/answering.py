"""Stage 1 of the projector: the answers of the language model, which stays frozen.

The question of a batch is one: rows differ by their answers alone, and little is padded. The image stands
before the question, so that no state of the question's can be kept from one step to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from unike.backbones.smol import NameProjector
from unike.backbones.vlm import VisionLanguageBackbone

IGNORED = -100
# Images that are asked about at once.
ANSWERED = 64


@dataclass(frozen=True)
class Lesson:
    """One question for some images: rows of a tensor of features, and the answer to each."""

    prompt: str
    rows: Sequence[int]
    answers: Sequence[str]


class Teacher:
    """The loss of lessons through a frozen language model."""

    def __init__(self, backbone: VisionLanguageBackbone) -> None:
        self.backbone = backbone
        self.embed = backbone.decoder.get_input_embeddings()
        self.end = backbone.find_end("line_break")

    def compute_loss(self, projector: NameProjector, features: torch.Tensor, lesson: Lesson) -> torch.Tensor:
        """Mean cross entropy of the answers' tokens and of the line break after them; ``features``
        ``(n, 1 + cells, d)`` are those of the lesson's rows."""
        backbone = self.backbone
        words = [
            backbone.dialogue.words(backbone.tokenizer, backbone.tokens, lesson.prompt, answer, True)
            for answer in lesson.answers
        ]
        texts = [[*w.after, *self.end] for w in words]
        width = max(map(len, texts))
        ids = torch.tensor([text + [self.end[0]] * (width - len(text)) for text in texts])
        labels = torch.full_like(ids, IGNORED)
        for row, (text, w) in enumerate(zip(texts, words, strict=True)):
            first = len(w.after) - len(w.answer)
            labels[row, first : len(text)] = ids[row, first : len(text)]
        before = torch.tensor(words[0].before).expand(len(texts), -1)
        shown = projector(features.float()).to(self.embed.weight.dtype)
        embeds = torch.cat([self.embed(before), shown, self.embed(ids)], 1)
        # Causal attention never looks at the padding after a row: no mask is needed.
        hidden = backbone.decoder.get_decoder()(inputs_embeds=embeds).last_hidden_state
        # What predicts a token stands one place before it.
        start = embeds.shape[1] - width
        hidden, wanted = hidden[:, start - 1 : -1], labels
        at = wanted != IGNORED
        logits = backbone.decoder.get_output_embeddings()(hidden[at])
        return F.cross_entropy(logits.float(), wanted[at])

    @torch.no_grad()
    def answer(
        self, projector: NameProjector, features: torch.Tensor, prompt: str, tokens: int = 8, beams: int = 1
    ) -> list[list[str]]:
        """The likeliest answers to one question about each image, ``beams`` of them, best first."""
        backbone, out = self.backbone, list[list[str]]()
        words = backbone.dialogue.words(backbone.tokenizer, backbone.tokens, prompt, None, True)
        before, after = (self.embed(torch.tensor(ids)) for ids in (words.before, words.after))
        stops = [*backbone.eos_ids, *self.end]
        for part in features.split(max(1, ANSWERED // beams)):
            shown = projector(part.float()).to(before)
            embeds = torch.cat([before.expand(len(part), -1, -1), shown, after.expand(len(part), -1, -1)], 1)
            ids = backbone.decoder.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                max_new_tokens=tokens,
                do_sample=False,
                num_beams=beams,
                num_return_sequences=beams,
                eos_token_id=stops,
                pad_token_id=stops[0],
            )
            texts = [backbone.decode(row.tolist()) for row in ids]
            out += [texts[i : i + beams] for i in range(0, len(texts), beams)]
        return out
