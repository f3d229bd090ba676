"""Predictions before and after an edit: drafts stand for decoding exactly, the base is evaluated once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import diverging
from original_files import FAMILIES, make_spec
from PIL import Image

from unike.backbones import load_backbone
from unike.backbones.base import encode_queries
from unike.backbones.prefix import PrefixCache
from unike.config.hparams import HyperParams
from unike.evaluation.protocols import run_one_step
from unike.evaluation.reader import Reader
from unike.methods import build
from unike.types import METRIC_PRESETS, METRICS, Case, EditRequest, Probe, Query

COLORS = ("teal", "navy", "olive", "maroon")
HPARAMS = {
    "model_name": "blip2", "name": "unused", "layers": 2, "external": "latent", "memory": "edit",
    "alpha": 0.5, "zeta": "none", "lr": 2e-2, "max_steps": 15, "n_keys": 4,
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request: pytest.FixtureRequest):
    loaded = load_backbone(make_spec(request.param))
    loaded.max_new_tokens = 5
    return loaded


def case(backbone, answer: str = "a fox") -> Case:
    """A case whose unchanged probes expect what the base writes, or something else."""
    pictures = [Image.new("RGB", (84, 84), c) for c in COLORS]
    asked = Query(pictures[0], "Question: what is it? Short answer:", answer)
    own = backbone.generate([pictures[1]], ["Question: how many? Short answer:"])[0]
    queries = [
        asked,
        replace(asked, prompt="Question: what? Short answer:"),
        replace(asked, image=pictures[2]),
        Query(None, "where is it?", "two dogs"),
        Query(pictures[1], "Question: how many? Short answer:", own or "x"),
    ]
    probes = [
        Probe(m, q, "target" if i < 3 else "unchanged")
        for i, (m, q) in enumerate(zip(METRICS, queries, strict=False))
    ]
    return Case(EditRequest("e0", asked), tuple(probes))


def method(**changes):
    return build(HyperParams.from_dict({**HPARAMS, **changes}))


def test_drafts_stand_for_decoding(backbone) -> None:
    one = case(backbone)
    maker = method()
    reader = Reader(backbone, PrefixCache(backbone, maker.layers(backbone)[0]))
    base = reader.predict_base(one)
    edit = maker.edit(backbone, one.request, reader.prefixes)
    after = reader.predict_edited(one, edit, base).predictions
    queries = [p.query for p in one.probes]
    asked = ([q.image for q in queries], [q.prompt for q in queries])
    assert [r.generated for r in base] == backbone.generate(*asked)
    with edit.applied(backbone):
        assert [r.generated for r in after] == backbone.generate(*asked)
    assert [r.generated for r in after] != [r.generated for r in base]


def test_teacher_forced_readings_are_the_whole_models(backbone) -> None:
    one = case(backbone)
    maker = method()
    reader = Reader(backbone, PrefixCache(backbone, maker.layers(backbone)[0]), generated=False)
    base = reader.predict_base(one)
    edit = maker.edit(backbone, one.request, reader.prefixes)
    after = reader.predict_edited(one, edit, base).predictions
    batch = encode_queries(backbone, [p.query for p in one.probes])

    def whole() -> list[tuple[int, ...]]:
        best = backbone(batch).logits.argmax(-1)[:, :-1]
        at = batch.labels[:, 1:] != -100
        return [tuple(best[i][at[i]].tolist()) for i in range(len(batch))]

    assert [r.predicted_ids for r in base] == whole()
    with edit.applied(backbone):
        assert [r.predicted_ids for r in after] == whole()
    assert all(r.generated is None for r in (*base, *after))


def test_one_forward_pass_serves_all_presets(backbone, monkeypatch) -> None:
    one = case(backbone)
    maker = method()
    reader = Reader(backbone, PrefixCache(backbone, maker.layers(backbone)[0]), False, METRIC_PRESETS)
    base = reader.predict_base(one)
    edit = maker.edit(backbone, one.request, reader.prefixes)
    passes, hidden = [], backbone.suffix_hidden
    monkeypatch.setattr(backbone, "suffix_hidden", lambda state: passes.append(len(state)) or hidden(state))
    after = reader.predict_edited(one, edit, base).predictions
    assert passes == [len(one.probes)]
    monkeypatch.undo()
    batch = encode_queries(backbone, [p.query for p in one.probes])

    def whole() -> list[list[list[int]]]:
        logits = backbone(batch).logits
        kept = [logits[i][batch.attention_mask[i].bool()] for i in range(len(batch))]
        return [rows.topk(10).indices.tolist() for rows in kept]

    assert [r.ranked.tolist() for r in base] == whole()
    assert [r.best.tolist() for r in base] == [[row[0] for row in rows] for rows in whole()]
    with edit.applied(backbone):
        assert [r.ranked.tolist() for r in after] == whole()


def test_the_base_is_asked_once(backbone, monkeypatch) -> None:
    one = case(backbone)
    reader = Reader(backbone, PrefixCache(backbone, 4))
    first = reader.predict_base(one)
    monkeypatch.setattr(backbone, "suffix_hidden", lambda *_: pytest.fail("asked again"))
    assert reader.predict_base(one) is first


def test_a_record_holds_scores_answers_and_decisions(backbone) -> None:
    one = case(backbone)
    maker = method()
    reader = Reader(backbone, PrefixCache(backbone, maker.layers(backbone)[0]))
    record = run_one_step(backbone, maker, one, reader).record.to_json()
    names = [p.name for p in one.probes]
    assert record["status"] == "ok"
    assert list(record["scores"]["teacher_forced"]) == list(record["scores"]["generated"]) == names
    for mode in record["scores"].values():
        assert all(0 <= v <= 1 for entry in mode.values() for v in entry.values())
        assert mode["t_locality"]["before"] == mode["m_locality"]["before"] == 1
    assert record["answers"]["reliability"]["target"] == "a fox"
    assert all(v == pytest.approx(0.5) for v in record["decisions"]["alpha"].values())
    assert record["bytes"] > 0
    assert record["steps"] > 0


def test_an_edit_that_diverges_is_marked_failed_and_the_next_one_works(backbone, monkeypatch) -> None:
    one = case(backbone)
    maker = method()
    reader = Reader(backbone, PrefixCache(backbone, maker.layers(backbone)[0]))
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    with monkeypatch.context() as patched:
        patched.setattr("unike.methods.training._score_rows", diverging(float("inf")))
        record = run_one_step(backbone, maker, one, reader).record.to_json()
    assert record["status"] == "failed"
    assert "inf after 0 steps" in record["error"]
    assert "scores" not in record
    assert all(torch.equal(v, backbone.model.state_dict()[k]) for k, v in before.items())
    assert run_one_step(backbone, maker, one, reader).record.status == "ok"


def test_edits_in_the_prompt_are_asked_in_the_prompt(backbone) -> None:
    one = case(backbone)
    maker = method(external="prompt", memory="both")
    reader = Reader(backbone, PrefixCache(backbone, maker.layers(backbone)[0]))
    edit = maker.edit(backbone, one.request, reader.prefixes)
    query = edit.rewrite(one.probes[3].query)
    shown = "New Fact: Question: what is it? Short answer: a fox\nPrompt: where is it?"
    assert query.prompt == shown
    record = run_one_step(backbone, maker, one, reader).record
    assert record.answers["t_locality"].prompt == "where is it?"
