"""Which texts an answer can be, known without torch: where generation stops, and what it never writes."""

from __future__ import annotations

import json
from collections.abc import Collection

from unike.system.hub import find_model_folder
from unike.system.text import one_line

# A generated answer ends at the first of these, by family; of the others at a line break.
STOPS = {"minigpt4": ("###", "\n")}
LINE_BREAK = ("\n",)


def find_stops(model_name: str) -> tuple[str, ...]:
    """Where generated answers of a family end, other than at its end token."""
    return STOPS.get(model_name, LINE_BREAK)


def explain_unreachable(target: str, stops: Collection[str], specials: Collection[str]) -> str | None:
    """Why an answer could never be generated whole, for a message; None where its text does not tell."""
    text = target.strip()
    for stop in stops:
        if stop in text:
            name = "a line break" if stop == "\n" else one_line(stop)
            return f"target {one_line(repr(text), 60)} holds {name}, at which a generated answer ends"
    for special in specials:
        if special and special in text:
            name = one_line(special, 40)
            return f"target {one_line(repr(text), 60)} holds {name}, a special token, which no answer shows"
    return None


def read_special_texts(folder: str) -> tuple[str, ...]:
    """The texts of the special tokens in a folder's ``tokenizer.json``; empty where there is no such file."""
    try:
        found = json.loads((find_model_folder(folder) / "tokenizer.json").read_text(encoding="utf-8"))
        return tuple(str(t["content"]) for t in found["added_tokens"] if t["special"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ()
