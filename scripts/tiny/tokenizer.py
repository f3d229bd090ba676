"""A byte-level BPE tokenizer for the toy models, small enough that names take several tokens."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from scripts.tiny.facts import QUESTIONS, list_text_facts
from scripts.tiny.questions import HELD_OUT, TRAINED, VQA_TEMPLATE
from scripts.tiny.scenes import CATEGORIES, COLOR_NAMES, NAMES

VOCABULARY = 1400
# Templates are common and names rare, so that the first merges are the templates' words.
TEMPLATE_COPIES = 40
WRAP = ("###Human: <Img>", "</Img> ")
DEMONSTRATION = "New Fact: {fact} {answer}\nPrompt: {prompt}"


def make_corpus() -> list[str]:
    lines: list[str] = []
    for kind, paraphrases in {k: TRAINED[k] + HELD_OUT[k] for k in TRAINED}.items():
        for words in paraphrases:
            text = words if kind == "caption" else VQA_TEMPLATE.format(words)
            nouns = CATEGORIES if "{" in words else ("",)
            lines += [text.format(x=n, ax=f"a {n}") for n in nouns] * (TEMPLATE_COPIES // len(nouns) + 1)
    lines += (
        [*WRAP, "New Fact: Question:", "\nPrompt: Question:", "New Fact: a photo of"] * TEMPLATE_COPIES * 4
    )
    lines += [f" {n}" for n in NAMES] * 6
    lines += [f" next to a on a {c} background" for c in COLOR_NAMES] * TEMPLATE_COPIES
    lines += [f" {w}" for w in ("yes", "no", "one", "two", *COLOR_NAMES)] * TEMPLATE_COPIES
    rng = np.random.default_rng(0)
    for fact in list_text_facts():
        lines += [f"{fact.ask(rng)} {fact.answer}" for _ in QUESTIONS[fact.kind]]
    return lines


def build() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,
        min_frequency=2,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_corpus(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return fast
