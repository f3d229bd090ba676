"""What every registered method keeps, on small random backbones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from original_files import FAMILIES
from todays import OWN, TODAY
from untouched import assert_untouched
from worlds import BASE, COLORS, SETTINGS, World, case, query, snapshot, world_of

from unike.backbones.base import answer_loss, encode_queries
from unike.config.hparams import HyperParams
from unike.evaluation.protocols import run_one_step
from unike.evaluation.reader import Reader
from unike.methods import build, list_methods, register
from unike.types import Query, UserError

ROOT = Path(__file__).parents[1]
ROWS = [(name, row) for name, rows in SETTINGS.items() for row in rows]
IDS = [f"{name}-{'-'.join(map(str, row.values()))}".strip("-") for name, row in ROWS]
# Today's backbones keep the contract too; what is quick of it is in test_todays_methods.py.
EVERY = (*FAMILIES, *OWN, *(pytest.param(family, marks=pytest.mark.slow) for family in TODAY))
each_row = pytest.mark.parametrize("row", ROWS, ids=IDS)
STEPWISE = ("ft", "grace", "lora", "tpatcher", "unike")
# Methods that lower an edit's own loss step by step; the others learnt to edit before, or show it.
TRAINED = {i: row for i, row in zip(IDS, ROWS, strict=True) if row[0] in STEPWISE}


@pytest.fixture(params=EVERY)
def world(request: pytest.FixtureRequest, worlds: dict[str, World], monkeypatch) -> World:
    return world_of(request.param, worlds, monkeypatch)


def test_every_registered_method_is_held_to_the_contract() -> None:
    assert list_methods() == sorted(SETTINGS)


@each_row
def test_an_edit_changes_answers_and_leaves_the_base_bit_for_bit(world: World, row) -> None:
    backbone = world.backbone
    before, hooks = snapshot(backbone)
    asked = [query(0), query(1), Query(None, "where is it?", "there")]
    base_logits = world.logits(asked)
    edit = world.edit(row)
    assert torch.equal(world.logits(asked), base_logits)
    written = [edit.rewrite(q) for q in asked]
    with edit.applied(backbone):
        inside = world.logits(written)
    assert inside.shape != base_logits.shape or not torch.equal(inside, base_logits)
    assert torch.equal(world.logits(asked), base_logits)
    assert_untouched(backbone, before, hooks)
    # A view would keep all that it is a part of in memory.
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in edit.state_dict().values()}
    assert sum(kept.values()) <= edit.nbytes


@each_row
def test_the_base_is_whole_after_an_exception(world: World, row) -> None:
    backbone = world.backbone
    edit = world.edit(row)
    before, hooks = snapshot(backbone)

    def ask_and_fail() -> None:
        with edit.applied(backbone):
            world.logits([query(0)])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask_and_fail()
    assert_untouched(backbone, before, hooks)


@pytest.mark.parametrize("row", TRAINED.values(), ids=TRAINED)
def test_training_lowers_the_edits_loss_in_the_whole_model(world: World, row) -> None:
    backbone, batch = world.backbone, encode_queries(world.backbone, [query(0)])
    start = answer_loss(world.logits([query(0)]), batch.labels).item()
    edit = world.edit(row)
    assert edit.info["steps"] > 0
    # One state of one layer of a random model says little of an answer's later tokens.
    assert edit.info["loss"] < (0.9 if row[0] == "grace" else 0.8) * start
    with edit.applied(backbone):
        again = answer_loss(world.logits([query(0)]), batch.labels).item()
    assert again == pytest.approx(edit.info["loss"], rel=1e-3, abs=1e-5)


@each_row
def test_an_edit_is_the_same_for_the_same_seed(world: World, row) -> None:
    one, other = world.edit(row), world.edit(row)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())
    assert one.rewrite(query(3)).prompt == other.rewrite(query(3)).prompt
    assert one.nbytes == sum(t.nbytes for t in one.state_dict().values())


@each_row
def test_padding_and_batch_size_change_nothing_under_an_edit(world: World, row) -> None:
    # T-Patcher as published starts with values ten times as large: logits round a little more coarsely.
    atol = 4e-5 if row[0] == "tpatcher_published" else 2e-5
    # All items are retrieved: which of two that are equally near is among the k is chance.
    backbone, edit = world.backbone, world.edit((row[0], row[1] | {"k": len(COLORS) + 1}))
    asked = [edit.rewrite(q) for q in (query(0), query(1, "two dogs there"), Query(None, "where?", "here"))]
    columns = list(zip(*((q.image, q.prompt, q.target) for q in asked), strict=True))
    with edit.applied(backbone), torch.no_grad():
        for side in ("right", "left"):
            batch = backbone.encode(*columns, side)
            logits = backbone(batch).logits
            for i, one in enumerate(asked):
                got = logits[i][batch.attention_mask[i].bool()]
                torch.testing.assert_close(got, world.logits([one])[0], atol=atol, rtol=0)


@each_row
def test_a_later_edit_goes_on_from_the_former(world: World, row) -> None:
    first = world.edit(row, 0)
    # To the last step: the first edit may have brought the second one's answer with it.
    second = world.edit((row[0], row[1] | {"stop_loss": 0.0}), 1, first)
    both = first | second
    with pytest.raises(TypeError):
        both | 1  # type: ignore[operator]
    asked = [both.rewrite(query(0)), both.rewrite(query(1))]
    with both.applied(world.backbone):
        together = world.logits(asked)
    alone = [first.rewrite(query(0)), first.rewrite(query(1))]
    with first.applied(world.backbone):
        former = world.logits(alone)
    # T-Patcher as published adds no neuron to a target that the first edit has brought with it.
    unneeded = second.info.get("neurons") == 0
    assert unneeded or together.shape != former.shape or not torch.equal(together, former)
    assert not unneeded or torch.equal(together, former)


@each_row
def test_answers_read_by_the_protocol_are_the_whole_models(world: World, row) -> None:
    backbone, one, method = world.backbone, case(0), world.method(*row)
    reader = Reader(backbone, world.prefixes(method))
    before = reader.predict_base(one)
    edit = method.edit(backbone, one.request, reader.prefixes)
    after = reader.predict_edited(one, edit, before).predictions
    asked = [edit.rewrite(p.query) for p in one.probes]
    batch = encode_queries(backbone, asked)
    with edit.applied(backbone):
        best = world.logits(asked).argmax(-1)[:, :-1]
        written = backbone.generate([q.image for q in asked], [q.prompt for q in asked])
    at = batch.labels[:, 1:] != -100
    assert [r.predicted_ids for r in after] == [tuple(best[i][at[i]].tolist()) for i in range(len(asked))]
    assert [r.generated for r in after] == written
    assert run_one_step(backbone, method, one, reader).record.ok


# ---------------------------------------------------------------- the register


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'ft' is registered already"):
        register("ft")(lambda *_: None)  # type: ignore[arg-type, return-value]


def test_an_unknown_method_is_named_with_its_neighbour() -> None:
    with pytest.raises(UserError, match="did you mean 'tpatcher'"):
        build(HyperParams.from_dict({**BASE, "method": "t_patcher"}))


@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "unike"])
@pytest.mark.parametrize("backbone", ["blip2", "minigpt4", "tiny_blip2", "tiny_minigpt4", *TODAY, *OWN])
def test_each_method_has_a_yaml_for_each_backbone(name: str, backbone: str) -> None:
    path = ROOT / "hparams" / name / f"{backbone}.yaml"
    hparams = HyperParams.from_hparams(path)
    command = path.read_text(encoding="utf-8").splitlines()[0]
    assert command.startswith(f"# python run_edit.py --hparams_dir hparams/{name}/{backbone}.yaml --task ")
    assert hparams.method == name
    assert hparams.model_name == backbone.removeprefix("tiny_")
    whole = HyperParams.from_hparams(ROOT / "hparams" / f"{backbone}.yaml")
    assert hparams.backbone == replace(whole.backbone, source=hparams.source)
    assert (hparams.data, hparams.image_root) == (whole.data, whole.image_root)
    if hparams.ike_retriever != "sentences":
        build(hparams)
