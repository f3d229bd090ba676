"""Scorers of free answers: each against a slow definition of its own, and published examples."""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unike.datasets.answers import normalise_answer
from unike.runs.rescoring import repeats_pair
from unike.scoring import SCORERS, Scorer, find_scorer, list_scorers, register_scorer
from unike.scoring.aliases import Aliases, read_aliases
from unike.types import UserError

WORDS = st.lists(st.sampled_from(["a", "cat", "the", "dog", "sat", "2"]), max_size=6).map(" ".join)
TEXTS = st.one_of(WORDS, st.text(max_size=12))


def compare(name: str, answer: str, reference: str) -> float:
    return find_scorer(name).score(answer, [reference])


def slow_f1(answer: str, reference: str) -> float:
    """SQuAD's evaluation: shared words are crossed out one by one."""

    def clean(text: str) -> list[str]:
        kept = "".join(c for c in text.lower() if c not in string.punctuation)
        return [word for word in kept.split() if word not in ("a", "an", "the")]

    left, right = clean(answer), clean(reference)
    if not left or not right:
        return float(left == right)
    open_words, shared = list(right), 0
    for word in left:
        if word in open_words:
            open_words.remove(word)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(left), shared / len(right)
    return 2 * precision * recall / (precision + recall)


def slow_rouge(answer: str, reference: str) -> float:
    """All subsequences of the shorter one are tried."""

    def clean(text: str) -> list[str]:
        return "".join(c if c.isalnum() else " " for c in text.lower()).split()

    left, right = clean(answer), clean(reference)
    if not left or not right:
        return float(left == right)
    short, long = sorted((left, right), key=len)
    longest = 0
    for size in range(len(short), 0, -1):
        for part in itertools.combinations(short, size):
            rest = iter(long)
            if all(word in rest for word in part):
                longest = size
                break
        if longest:
            break
    if not longest:
        return 0.0
    precision, recall = longest / len(left), longest / len(right)
    return 2 * precision * recall / (precision + recall)


@given(WORDS, WORDS)
def test_token_f1_and_rouge_against_slow_definitions(answer: str, reference: str) -> None:
    assert compare("token_f1", answer, reference) == pytest.approx(slow_f1(answer, reference))
    assert compare("rouge_l", answer, reference) == pytest.approx(slow_rouge(answer, reference))


@given(WORDS, WORDS)
def test_contains_is_a_search_of_whole_words(answer: str, reference: str) -> None:
    padded, wanted = (f" {' '.join(normalise_answer(text).split())} " for text in (answer, reference))
    expected = wanted in padded if wanted.strip() else not padded.strip()
    assert compare("contains", answer, reference) == float(expected)
    assert compare("exact", answer, reference) == float(
        normalise_answer(answer) == normalise_answer(reference)
    )


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_a_score_is_a_share_and_the_best_reference_counts(answer: str, references: list[str]) -> None:
    for scorer in list_scorers():
        each = [scorer.score(answer, [reference]) for reference in references]
        assert scorer.score(answer, references) == max(each)
        assert all(0 <= value <= 1 for value in each)
        assert scorer.score(answer, [answer]) == 1
    # What is equal is contained.
    exact, contained = (find_scorer(name).score(answer, references) for name in ("exact", "contains"))
    assert exact <= contained


def test_published_examples() -> None:
    """ROUGE-L's sentences of Lin (2004): "police killed the gunman" against the two candidates."""
    reference = "police killed the gunman"
    assert compare("rouge_l", "police kill the gunman", reference) == pytest.approx(3 / 4)
    assert compare("rouge_l", "the gunman kill police", reference) == pytest.approx(2 / 4)
    # SQuAD's evaluation drops articles, case and punctuation.
    assert compare("token_f1", "The Denver Broncos!", "denver broncos") == 1
    assert compare("token_f1", "Broncos", "Denver Broncos") == pytest.approx(2 / 3)
    # VQA's turns number words into digits.
    assert compare("exact", "two", "2") == 1
    assert compare("contains", "there are two dogs", "2") == 1
    assert compare("contains", "category", "cat") == 0


def test_scorers_of_ones_own_and_bad_ones() -> None:
    own = Scorer("same_length", "same length", lambda a, b: float(len(a) == len(b)))
    try:
        assert register_scorer(own) is register_scorer(own)
        assert find_scorer("same_length").score("ab", ["cd", "e"]) == 1
        with pytest.raises(UserError, match="is registered already"):
            register_scorer(Scorer("same_length", "another", lambda a, b: 0.0))
    finally:
        from unike.scoring import scorers

        del scorers._KNOWN["same_length"]
    assert SCORERS == ("exact", "contains", "token_f1", "rouge_l")
    with pytest.raises(UserError, match="the nearest one is token_f1"):
        find_scorer("tokenf1")
    with pytest.raises(UserError, match="is an evaluation mode that runs have"):
        Scorer("generated", "x", lambda a, b: 0.0)
    with pytest.raises(ValueError, match="from 0 to 1"):
        Scorer("much", "much", lambda a, b: 2.0).score("a", ["a"])
    with pytest.raises(ValueError, match="one reference or more"):
        find_scorer("exact").score("a", [])


def test_aliases_are_found_as_answers_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "aliases.json"
    path.write_text(json.dumps({"Kangaroo": ["roo"], "kangaroo!": ["wallaby"]}))
    found = read_aliases(path)
    assert found["the kangaroo"] == ("roo", "wallaby")
    assert found.get("zebra", ()) == ()
    assert len(Aliases()) == 0
    for text in ("{", "[]", '{"a": "b"}', '{"a": [1]}', '{"a": [" "]}', '{" ": ["a"]}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"aliases\.json: .*expected"):
            read_aliases(path)
    with pytest.raises(UserError, match=r"none\.json: cannot be read as aliases"):
        read_aliases(tmp_path / "none.json")


@given(st.lists(st.sampled_from("ab"), max_size=7))
def test_a_repeated_pair_is_one_that_stands_in_two_places(words: list[str]) -> None:
    places = [(i, j) for i in range(len(words) - 1) for j in range(i + 1, len(words) - 1)]
    slow = any(words[i : i + 2] == words[j : j + 2] for i, j in places)
    assert repeats_pair(words) == slow
