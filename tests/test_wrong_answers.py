"""Whose wrong answer ``A_neg`` is: the annotations' or the backbone's own; and what the print is not."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from worlds import BASE, World, world_of

from unike.config.combined import KnowledgeKeyOptions
from unike.config.hparams import HyperParams
from unike.datasets.answers import normalise_answer
from unike.datasets.triplets import Triplet
from unike.knowledge.encoders import truthfulness_loss
from unike.methods.preparation import knowledge
from unike.methods.preparation.knowledge import (
    build_knowledge,
    ensure_knowledge,
    extract_states,
    find_knowledge,
    save_knowledge,
)
from unike.methods.preparation.wrong_answers import (
    WrongAnswer,
    collect_wrong_answers,
    count_sources,
    describe_sources,
)
from unike.types import Query

ROOT = Path(__file__).parents[1]
SAID = {"q0": "A cat.", "q1": "the dog", "q2": " ", "q3": "two", "q4": "a cow", "q5": "dog"}
KNOWN = {"q0": "horse", "q1": "horse", "q2": "horse", "q3": None, "q4": None, "q5": "A dog"}
RIGHT = {"q0": "dog", "q1": "dog", "q2": "dog", "q3": "2", "q4": "dog", "q5": "dog"}
TRIPLETS = [Triplet(Query(None, name, RIGHT[name]), KNOWN[name]) for name in SAID]


class Speaker:
    """Says what ``SAID`` has, and notes what it was asked."""

    fingerprint = "of some weights"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def tokens(self, text: str) -> list[str]:
        return text.split()

    def generate(self, images, prompts):
        self.asked += prompts
        return [SAID[prompt] for prompt in prompts]


def choose_slowly(name: str, a_neg: str) -> WrongAnswer | None:
    said = SAID[name] if a_neg == "own" or KNOWN[name] is None else ""
    if said.strip() and normalise_answer(said) != normalise_answer(RIGHT[name]):
        return WrongAnswer(said, "own")
    known = KNOWN[name] or ""
    if known.strip() and normalise_answer(known) != normalise_answer(RIGHT[name]):
        return WrongAnswer(known, "file")
    return None


@pytest.mark.parametrize("a_neg", ["file", "own"])
@pytest.mark.parametrize("batch", [1, 4])
def test_each_wrong_answer_is_of_the_source_that_is_asked_for(a_neg: str, batch: int) -> None:
    speaker = Speaker()
    found = collect_wrong_answers(speaker, TRIPLETS, batch, a_neg=a_neg)
    assert found == [choose_slowly(name, a_neg) for name in SAID]
    # By the annotations, only what these do not say is asked.
    assert speaker.asked == (list(SAID) if a_neg == "own" else ["q3", "q4"])
    expected = {"file": {"file": 3, "own": 1, "left_out": 2}, "own": {"file": 2, "own": 2, "left_out": 2}}
    assert count_sources(found) == expected[a_neg]


def test_what_was_used_is_one_line() -> None:
    line = describe_sources({"file": 3, "own": 12, "left_out": 1}, "own")
    assert line == (
        "A_neg: 3 from the annotations, 12 the backbone's own wrong answers; "
        "1 triplets without a wrong answer left out"
    )
    assert (
        describe_sources(None, "file") == "A_neg: a_neg: file; how many are of which source was not counted"
    )


def test_only_own_is_part_of_the_key() -> None:
    options = KnowledgeKeyOptions(layers=2, triplets=8, encoder_steps=3, encoder_lr=1e-3, seed=5)
    key = knowledge.compute_knowledge_key(Speaker(), TRIPLETS, options)
    stated = replace(options, a_neg="file")
    own = replace(options, a_neg="own")
    assert knowledge.compute_knowledge_key(Speaker(), TRIPLETS, stated) == key
    assert knowledge.compute_knowledge_key(Speaker(), TRIPLETS, own) != key
    assert "a_neg" not in knowledge._list_options(stated)


@pytest.fixture
def world(worlds: dict[str, World], monkeypatch) -> World:
    return world_of("blip2", worlds, monkeypatch)


def make_triplets(world: World) -> list[Triplet]:
    return [Triplet(case.request.query, case.request.wrong) for case in world.train]


def test_the_backbones_own_answer_is_what_states_are_read_of(world: World) -> None:
    triplets = make_triplets(world)
    by_file = extract_states(world.backbone, triplets, [5], 4)[5]
    stated = extract_states(world.backbone, triplets, [5], 4, a_neg="file")[5]
    own = extract_states(world.backbone, triplets, [5], 4, a_neg="own")[5]
    assert torch.equal(by_file.states.neg, stated.states.neg)
    assert by_file.sources == {"file": len(triplets), "own": 0, "left_out": 0}
    said = world.backbone.generate([t.query.image for t in triplets], [t.query.prompt for t in triplets])
    assert [item.wrong for item in own.items] == said
    assert own.sources == {"file": 0, "own": len(triplets), "left_out": 0}
    assert torch.equal(by_file.states.pos, own.states.pos)
    assert not torch.allclose(by_file.states.neg, own.states.neg)


def test_the_index_of_the_knowledge_says_which_were_used(world: World, tmp_path: Path) -> None:
    triplets = make_triplets(world)
    counts = {}
    for a_neg in ("file", "own"):
        hparams = HyperParams.from_dict({**BASE, "knowledge_dir": str(tmp_path), "a_neg": a_neg})
        ensure_knowledge(world.backbone, hparams, [4, 5], lambda: triplets)
        folder = find_knowledge(hparams, world.backbone, triplets)
        index = json.loads((folder / "knowledge.json").read_text("utf-8"))
        counts[a_neg] = index["a_neg"]
        assert index["options"].get("a_neg") == (None if a_neg == "file" else "own")
    assert counts == {
        "file": {"file": len(triplets), "own": 0, "left_out": 0},
        "own": {"file": 0, "own": len(triplets), "left_out": 0},
    }
    # Each is found by its own key, and not by the other's.
    assert len(list(tmp_path.glob("*/knowledge.json"))) == 2


def test_knowledge_is_built_as_the_yaml_says_and_saved_without_counts_it_has_not(world, tmp_path) -> None:
    triplets = make_triplets(world)
    hparams = HyperParams.from_dict({**BASE, "a_neg": "own"})
    states, encoders, reports = build_knowledge(world.backbone, triplets, [5], hparams)
    assert states[5].sources["own"] == len(triplets)
    uncounted = {5: replace(states[5], sources={})}
    save_knowledge(tmp_path / "old", uncounted, encoders, reports, {})
    assert "a_neg" not in json.loads((tmp_path / "old" / "knowledge.json").read_text("utf-8"))


# ---------------------------------------------------------------- what the page says of the equations


def test_the_page_and_the_docstrings_agree_on_what_each_metric_equation_is() -> None:
    text = (ROOT / "docs" / "paper.md").read_text("utf-8")
    rows = {int(n): what for n, what in re.findall(r"^\| \((\d+)\) \| `[\w.]+` \| (.*?) \|$", text, re.M)}
    metrics = (ROOT / "unike" / "evaluation" / "metrics.py").read_text("utf-8")
    said = re.findall(r"([TM])-(locality|generality),\s+Eq\. \((\d+)\)", metrics)
    assert len(said) == 4
    for modality, kind, number in said:
        name = f"{modality}-{kind.capitalize()}"
        assert rows[int(number)] == name
        assert rows[int(number) + 5] == f"{name} after K edits"
    assert {n: rows[n].split("-")[1].split()[0] for n in (12, 13, 17, 18)} == dict.fromkeys(
        (12, 13, 17, 18), "Locality"
    )


def test_the_second_term_of_eq_4_is_anchored_at_the_negative_states() -> None:
    """The departure that ``include_anchor`` does not take back, against loops that anchor at ``h_pos``."""
    generator = torch.Generator().manual_seed(0)
    pos, neg = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)

    def term(anchors: torch.Tensor, same: torch.Tensor, other: torch.Tensor) -> float:
        total = 0.0
        for anchor in anchors:
            near = [torch.cosine_similarity(anchor, s, dim=0).div(0.1).exp().item() for s in same]
            far = [torch.cosine_similarity(anchor, s, dim=0).div(0.1).exp().item() for s in other]
            total -= float(torch.tensor(sum(near) / (sum(near) + sum(far)), dtype=torch.float64).log())
        return total / len(anchors)

    ours = (term(pos, pos, neg) + term(neg, neg, pos)) / 2
    printed = (term(pos, pos, neg) + term(pos, neg, pos)) / 2
    assert truthfulness_loss(pos, neg, 0.1, True).item() == pytest.approx(ours, rel=1e-9)
    assert abs(ours - printed) > 0.1
