"""Texts that are too long for a model, found by its tokenizer alone, without its weights."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from unike.datasets.images import PathLike
from unike.system.hub import find_model_folder
from unike.types import Case, Query, UserError

logger = logging.getLogger("unike")
T = TypeVar("T")
# The fields of an annotation that a probe's prompt and answer come from.
PROBE_FIELDS = {
    "reliability": ("src", "alt"),
    "t_generality": ("rephrase", "alt"),
    "m_generality": ("src", "alt"),
    "t_locality": ("loc", "loc_ans"),
    "m_locality": ("m_loc_q", "m_loc_a"),
    "same_question": ("src", "same_question_a"),
    "same_image": ("same_image_q", "same_image_a"),
    "joint": ("rephrase", "alt"),
}
# Characters from which on a text is long for any model; and a file that no tokenizer exceeds.
LONG_TEXT, _FILE_BYTES = 1000, 1 << 27


@dataclass(frozen=True)
class TextLimit:
    """How many tokens a model takes: ``context`` of them, ``image`` of which an image takes."""

    folder: str
    context: int
    image: int
    tokenizer: Any

    def count(self, text: str) -> int:
        """The tokens of a text, without special ones."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def measure(self, query: Query) -> int | None:
        """The tokens of a question with its image and answer, where they are more than the context takes;
        None where they fit. At least so many: a dialogue's own words come on top."""
        texts, image = (query.prompt, query.target or ""), self.image if query.image is not None else 0
        # No tokenizer makes more tokens than bytes; nearly every text ends here.
        if sum(len(text.encode(errors="replace")) for text in texts) + image + 8 <= self.context:
            return None
        count = sum(map(self.count, texts)) + image
        return count if count > self.context else None


@lru_cache(maxsize=4)
def read_limit(folder: str) -> TextLimit | None:
    """The limit of the model in a Hugging Face folder, or of an id; None where its files do not tell."""
    path = find_model_folder(folder)
    tokens, config = path / "tokenizer.json", path / "config.json"
    try:
        if not tokens.is_file() or max(tokens.stat().st_size, config.stat().st_size) > _FILE_BYTES:
            return None
        settings = json.loads(config.read_text(encoding="utf-8"))
        text = settings.get("text_config") or settings
        context, image = text["max_position_embeddings"], settings.get("num_query_tokens", 0)
        # Imported late: whoever reads no long text should not wait for it.
        from tokenizers import Tokenizer

        return TextLimit(os.fspath(folder), int(context), int(image), Tokenizer.from_file(str(tokens)))
    except Exception:  # the library's errors have no common type; loading the model says what is wrong
        return None


def check_question(folder: str, prompt: str, has_image: bool) -> None:
    """UserError for a question that the model in ``folder`` does not take, as far as its files tell."""
    query = Query("image" if has_image else None, prompt)
    limit = read_limit(folder) if may_be_long(query) else None
    if limit is not None and (count := limit.measure(query)) is not None:
        raise UserError(f"prompt: {count} tokens; expected at most {limit.context}, the decoder's context")


def find_long_texts(case: Case, limit: TextLimit) -> list[str]:
    """A line for each field of a record that makes a question too long for the model."""
    found: dict[str, str] = {}
    for probe in case.probes:
        if (count := limit.measure(probe.query)) is not None:
            field = name_longer_field(probe.name, probe.query)
            found.setdefault(field, _describe(field, count, limit))
    return list(found.values())


def _describe(field: str, count: int, limit: TextLimit) -> str:
    return f"{field}: {count} tokens with its question; the model takes {limit.context}"


def list_queries(case: Case) -> list[Query]:
    """All questions of a record."""
    return [case.request.query, *(probe.query for probe in case.probes)]


def leave_out_long(folder: str, given: Sequence[T], ask: Callable[[T], Sequence[Query]]) -> Sequence[T]:
    """What is trained on, without what the model in ``folder`` does not take, which is counted in a
    warning."""
    few = [one for one in given if any(may_be_long(query) for query in ask(one))]
    limit = read_limit(folder) if few else None
    if limit is None:
        return given
    long = {id(one) for one in few if any(limit.measure(query) is not None for query in ask(one))}
    if not long:
        return given
    logger.warning(
        "%d train records are too long for the model, which takes %d tokens; they are left out",
        len(long),
        limit.context,
    )
    return [one for one in given if id(one) not in long]


def may_be_long(query: Query) -> bool:
    """Whether a question might not fit into a decoder's context, with an image; most are far shorter."""
    return len(query.prompt) + len(query.target or "") > 100


def name_longer_field(probe: str, query: Query) -> str:
    """The field of the longer of a question's texts."""
    prompt, answer = PROBE_FIELDS.get(probe, ("prompt", "target"))
    return prompt if len(query.prompt) >= len(query.target or "") else answer


def name_long_field(case: Case) -> str:
    """The field of the longest text of a record."""
    found = [(len(p.query.prompt) + len(p.query.target or ""), p) for p in case.probes]
    if not found:
        return name_longer_field("reliability", case.request.query)
    _, longest = max(found, key=lambda entry: entry[0])
    return name_longer_field(longest.name, longest.query)


def find_long_fields(record: Mapping[str, object], limit: TextLimit | None) -> list[str]:
    """As ``find_long_texts`` for an annotation; without a limit, fields longer than ``LONG_TEXT``."""
    if limit is None:
        texts = ((name, value) for name, value in record.items() if isinstance(value, str))
        return [f"{n}: {len(t)} characters" for n, t in texts if len(t) > LONG_TEXT and n in _list_fields()]
    found: dict[str, str] = {}
    for probe, (asked, answer) in PROBE_FIELDS.items():
        prompt, target = record.get(asked), record.get(answer)
        if isinstance(prompt, str) and isinstance(target, str):
            query = Query(None if probe == "t_locality" else "image", prompt, target)
            if (count := limit.measure(query)) is not None:
                field = name_longer_field(probe, query)
                found.setdefault(field, _describe(field, count, limit))
    return list(found.values())


def _list_fields() -> Iterable[str]:
    return {name for pair in PROBE_FIELDS.values() for name in pair}


def require_limit(folder: PathLike) -> TextLimit:
    """The limit of the model in a folder. UserError where its files do not tell."""
    limit = read_limit(os.fspath(folder))
    if limit is None:
        raise UserError(f"{os.fspath(folder)}: expected a model's folder with tokenizer.json and config.json")
    return limit
