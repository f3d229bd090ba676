"""Independent edits side by side: made and asked together, each is what it is alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_methods import IDS, ROWS
from worlds import BASE, World, case, query

from unike.backbones.base import encode_queries
from unike.backbones.prefix import _make_key
from unike.config.hparams import HyperParams
from unike.evaluation.protocols import run_one_step, run_one_step_batch
from unike.evaluation.reader import Reader
from unike.knowledge.batching import OwnedMemory, Owners
from unike.knowledge.memory import GrowingRows, KnowledgeMemory
from unike.knowledge.scope import ScopeEncoder, TrainedScope
from unike.methods import build
from unike.types import Case, Query

# Adam makes steps of the rounding of gradients that are nearly nothing; a step is 2e-2 here.
CLOSE = 1e-3
CASES = [case(0), case(1, "two red dogs there"), case(2, "two dogs"), case(3, "a fox")]
GATED = [
    ("unike", {"scope_gate": "threshold", "scope_threshold": 0.9}),
    ("unike", {"scope_gate": "nearest", "scope_threshold": 0.9, "scope_halves": "both"}),
    ("unike", {"memory": "edit", "scope_gate": "threshold", "scope_threshold": 0.9, "scope_halves": "both"}),
    ("unike", {"memory": "bank"}),
    ("unike", {"memory": "edit", "alpha": 0.3, "similarity_bias": 2.0, "tau": 0.1}),
    ("unike", {"intrinsic": False, "alpha": 0.3}),
    ("unike", {"external": "none", "key_init": "query"}),
    ("unike", {"external": "prompt", "beta": 0.0}),
]
# All items of the bank: it holds the edits' own questions, and which of equally near ones is found is chance.
WAYS = [(name, {"k": 10, **row} if name == "unike" else row) for name, row in [*ROWS, *GATED]]
each_way = pytest.mark.parametrize("row", WAYS, ids=[*IDS, *(str(r[1]) for r in GATED)])


def uneven(cases: list[Case]) -> list[Case]:
    """Cases with different numbers of probes, some of them asked without a picture."""
    extra = replace(cases[0].probes[3], name="same_image", query=Query(None, "why is it there?", "so"))
    return [replace(c, probes=c.probes + (extra,) * (i % 2)) for i, c in enumerate(cases)]


@each_way
def test_edits_made_together_are_those_made_alone(world: World, row) -> None:
    method = world.method(*row)
    prefixes = world.prefixes(method)
    requests = [c.request for c in CASES]
    alone = [method.edit(world.backbone, r, prefixes) for r in requests]
    together = method.edit_many(world.backbone, requests, prefixes)
    for request, one, other in zip(requests, alone, together, strict=True):
        assert one.info.get("steps") == other.info.get("steps")
        assert one.state_dict().keys() == other.state_dict().keys()
        # One edit that is kept does not keep the whole batch in memory.
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in other.state_dict().values()}
        assert sum(storage.nbytes() for storage in storages.values()) <= other.nbytes
        # Its own question among them: GRACE's edits are silent on most others.
        asked = [one.rewrite(query(1)), one.rewrite(query(3)), one.rewrite(request.query)]
        with one.applied(world.backbone):
            wanted = world.logits(asked)
        with other.applied(world.backbone):
            found = world.logits(asked)
        torch.testing.assert_close(found[:2], wanted[:2], atol=CLOSE, rtol=CLOSE)
        # Where an edit does most, steps that differ in their last digits add up to more (0.0017 with FT).
        torch.testing.assert_close(found[2], wanted[2], atol=3 * CLOSE, rtol=3 * CLOSE)
        if one.state_dict():
            assert not torch.equal(world.logits(asked), wanted)
        assert not any(t.requires_grad for t in other.state_dict().values())


@each_way
def test_rows_asked_together_answer_as_under_their_own_edit(world: World, row) -> None:
    method, backbone = world.method(*row), world.backbone
    prefixes = world.prefixes(method)
    edits = method.edit_many(backbone, [c.request for c in CASES[:3]], prefixes)
    together = edits[0].batch(edits)
    if row[1].get("ft_target") == "projection":
        assert edits[0].changes_prefix(backbone, prefixes.first)
        return
    if row[0] in ("tpatcher_published", "wise") or row[1].get("ike_patches"):
        assert together is None, "edits of different sizes or kinds are asked one by one"
        return
    assert together is not None
    for owners in ([0, 1, 2], [2, 0, 1], [0, 0, 1, 1, 2, 2], [1, 2, 2, 1, 1], [2]):
        queries = [edits[o].rewrite(query(i % 4, "a fox")) for i, o in enumerate(owners)]
        batch = encode_queries(backbone, queries)
        index = torch.tensor(owners)
        with together.applied(backbone, index):
            found = world.logits(queries)
        for i, owner in enumerate(owners):
            with edits[owner].applied(backbone):
                wanted = world.logits([queries[i]])[0]
            got = found[i][batch.attention_mask[i].bool()]
            torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)
        written = [q.image for q in queries], [q.prompt for q in queries]
        with together.applied(backbone, index):
            texts = backbone.generate(*written)
        for i, owner in enumerate(owners):
            with edits[owner].applied(backbone):
                assert backbone.generate(*([column[i]] for column in written)) == [texts[i]]


@each_way
def test_records_of_a_batch_are_those_of_one_by_one(world: World, row) -> None:
    method, backbone = world.method(*row), world.backbone
    cases = uneven(CASES)
    one, many = (Reader(backbone, world.prefixes(method), presets=("paper", "easyedit")) for _ in range(2))
    alone = [run_one_step(backbone, method, c, one).record.to_json() for c in cases]
    together = [o.record.to_json() for o in run_one_step_batch(backbone, method, cases, many)]
    for left, right in zip(alone, together, strict=True):
        for key in left.keys() - {"seconds", "loss", "memory_loss", "margin_loss", "decisions"}:
            assert left[key] == right[key], key
        assert right.get("loss", 0.0) == pytest.approx(left.get("loss", 0.0), rel=1e-3, abs=1e-5)
        for what, values in left["decisions"].items():
            assert right["decisions"][what] == pytest.approx(values, abs=2e-3)
    targets = [r["answers"][c.probes[0].name]["target"] for r, c in zip(together, cases, strict=True)]
    assert targets == [c.request.query.target for c in cases]


def test_one_that_diverges_leaves_the_others_what_they_are(world: World) -> None:
    method, backbone = world.method("unike", {"k": 10}), world.backbone
    prefixes = world.prefixes(method)
    requests = [c.request for c in CASES]
    state = prefixes.state([requests[1].query])
    fine = method.edit_many(backbone, [requests[i] for i in (0, 2, 3)], prefixes)
    spoilt = prefixes._rows.get(_make_key(requests[1].query))
    assert torch.equal(spoilt.labels, state.labels[0])
    kept = spoilt.hidden.clone()
    try:
        spoilt.hidden.fill_(float("nan"))
        mixed = method.edit_many(backbone, requests, prefixes)
    finally:
        spoilt.hidden.copy_(kept)
    assert isinstance(mixed[1], FloatingPointError)
    for wanted, found in zip(fine, (mixed[0], mixed[2], mixed[3]), strict=True):
        for name, tensor in wanted.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], tensor, atol=1e-4, rtol=1e-4)
    reader = Reader(backbone, prefixes)
    assert [o.record.status for o in run_one_step_batch(backbone, method, CASES, reader)] == ["ok"] * 4


def test_a_trained_measure_opens_each_row_for_its_own_edit_alone(world: World) -> None:
    torch.manual_seed(0)
    width = world.backbone.layout.width
    measure = TrainedScope(ScopeEncoder(width, 16, 8, 2).eval(), {1: -1.0, 100: 1.0})
    settings = {"scope_gate": "nearest", "scope_measure": "trained", "scope_threshold": None}
    hparams = HyperParams.from_dict({**BASE, **settings})
    plain = world.method("unike", {})
    known = dict(plain.knowledge)  # type: ignore[attr-defined]
    known[4] = replace(known[4], scope=measure)
    method = build(hparams, known)
    edits = method.edit_many(world.backbone, [c.request for c in CASES], world.prefixes(method))
    together = edits[0].batch(edits)
    queries = [query(i) for i in range(4)]
    with together.applied(world.backbone, torch.arange(4)):
        found = world.logits(queries)
    # The threshold is that of one edit in memory, however many stand side by side.
    assert together.explain()["scope"] == pytest.approx([1.0] * 4, abs=1e-4)
    for i in range(4):
        with edits[i].applied(world.backbone):
            torch.testing.assert_close(found[i], world.logits([queries[i]])[0], atol=2e-4, rtol=1e-4)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("index", [[0, 1], [0, 0, 1, 1], [1, 0, 1], [1, 1], [0]])
def test_rows_are_folded_by_owner_and_back(index: list[int]) -> None:
    owners = Owners(torch.tensor(index), 2)
    x = torch.arange(len(index) * 6.0).view(len(index), 3, 2) + 1
    folded = owners.fold(x)
    assert torch.equal(owners.unfold(folded), x)
    for owner in range(2):
        own = [x[i] for i, o in enumerate(index) if o == owner]
        for place, row in enumerate(own):
            assert torch.equal(folded[owner, place], row)
        assert not folded[owner, len(own) :].any()


@pytest.mark.parametrize("items", [0, 5])
def test_an_owned_item_is_found_by_its_row_alone(items: int) -> None:
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(items, 4, generator=generator) for _ in range(2))
    own, held = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    bank = KnowledgeMemory(keys, values)
    memory = OwnedMemory(bank, own, held)
    allowed = torch.ones(3, items + 1, dtype=torch.bool)
    allowed[1, -1] = False
    found = memory.retrieve(own, 3, allowed)
    for row in range(3):
        alone = bank.join_pairs(own[row : row + 1], held[row : row + 1])
        wanted = alone.retrieve(own[row : row + 1], 3, allowed[row : row + 1])
        torch.testing.assert_close(found.similarity[row], wanted.similarity[0])
        torch.testing.assert_close(found.states[row], wanted.states[0])
        assert found.index[row].tolist() == wanted.index[0].tolist()
    if items:
        assert found.index[0, 0] == items
        assert items not in found.index[1].tolist()


def test_rows_grow_without_moving_what_is_there() -> None:
    first = GrowingRows(torch.zeros(1, 2))
    chain = [first]
    for i in range(1, 9):
        chain.append(chain[-1].grow(torch.full((1, 2), float(i))))
    other = chain[3].grow(torch.full((2, 2), -1.0))
    for count, grown in enumerate(chain, 1):
        assert torch.equal(grown.tensor[:, 0], torch.arange(float(count)))
    assert other.tensor[:, 0].tolist() == [0, 1, 2, 3, -1, -1]
    assert chain[5].tensor.data_ptr() == chain[6].tensor.data_ptr()
