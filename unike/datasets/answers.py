"""Answers as strings: the VQA convention for comparing them."""

from __future__ import annotations

import re
import string
import unicodedata

ARTICLES = frozenset({"a", "an", "the"})
_COUNTING = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
NUMBER_WORDS = {word: str(number) for number, word in enumerate(_COUNTING.split())}

# VQA's own map counts "none" as an answer to "how many".
_DIGITS = {**NUMBER_WORDS, "none": "0"}
_APOSTROPHE = re.compile(r"(?<=\w)['\u2019](?=\w)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_INSIDE_NUMBER = re.compile(r"(?<=\d)[.:](?=\d)")


def is_punctuation(char: str) -> bool:
    """Whether one character is ASCII punctuation or in Unicode's categories ``P*``."""
    return char in string.punctuation or unicodedata.category(char).startswith("P")


def normalise_answer(text: str) -> str:
    """An answer as VQA compares it: two answers are the same iff their normal forms are equal.

    Lower case; punctuation and articles dropped; number words up to twenty (and "none") as digits;
    whitespace collapsed. A decimal point or colon between digits stays ("3.5", "12:30"), a thousands
    comma and an apostrophe inside a word vanish ("1,000" is "1000", "don't" is "dont"), any other
    punctuation separates words ("t-shirt" is "t shirt"). An answer made of nothing but articles or
    punctuation keeps them, so that "A" and "the" do not become equal. Idempotent.
    """
    lowered = unicodedata.normalize("NFC", text.lower())
    joined = _THOUSANDS.sub("", _APOSTROPHE.sub("", lowered))
    kept = {match.start() for match in _INSIDE_NUMBER.finditer(joined)}
    spaced = "".join(
        " " if is_punctuation(char) and position not in kept else char for position, char in enumerate(joined)
    )
    words = spaced.split()
    if not words:
        return " ".join(lowered.split())
    content = [word for word in words if word not in ARTICLES] or words
    return " ".join(_DIGITS.get(word, word) for word in content)
