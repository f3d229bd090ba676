"""What the rows of a table share: a process's groups of rows, and what they know of the base model."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import Project
from original_files import make_spec
from test_plan import FT, INTRIN, ROOT, UNIKE, measured, read, write_plan
from test_sequences import case

from scripts import plan, workers
from unike.backbones import load_backbone
from unike.backbones.prefix import PrefixCache
from unike.evaluation.reader import Reader
from unike.types import METRIC_PRESETS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def backbone():
    loaded = load_backbone(make_spec("blip2"))
    loaded.max_new_tokens = 4
    return loaded


def reader(backbone: Any, first: int = 1, alone: bool = False, **changes: Any) -> Reader:
    return Reader(backbone, PrefixCache(backbone, first, alone=alone), **changes)


def test_rows_on_the_same_cases_are_one_group(copied: Project) -> None:
    path = write_plan(copied, [FT, UNIKE], [UNIKE])
    planned = list({run.folder: run for run in read(copied, path)}.values())
    by_length = [["FT", "UniKE"], ["UniKE"]]
    assert [len(group) for group in workers.group_runs(planned, 1)] == [3]
    assert sorted([r.row.name for r in group] for group in workers.group_runs(planned, 2)) == by_length
    assert sorted([r.row.name for r in group] for group in workers.group_runs(planned, 8)) == by_length
    fewer = read(copied, path, size=1)
    assert len(workers.group_runs([*planned, *fewer], 1)) == 2


def test_the_most_work_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    planned = [r for r in plan.read_plan(tables=["2", "3"]) if r.row.name == "UniKE"]
    groups = workers.group_runs(planned, 2)
    assert [group[0].task for group in groups] == ["caption", "caption", "vqa", "vqa", "cross", "cross"]
    assert [len(group) for group in groups] == [2, 2, 2, 2, 1, 1]
    assert len(workers.group_runs(planned, 8)) == 10


def test_rows_together_give_what_each_gives_alone(copied: Project) -> None:
    path = write_plan(copied, [FT, INTRIN, UNIKE], [FT, UNIKE])
    for run in read(copied, path):
        if not plan.is_complete(run):
            assert not workers.ensure([run], jobs=1).failures
    alone = measured(copied.root / "out")
    planned = plan.read_plan(path, backbones=["small"], output=copied.root / "together")
    assert not workers.ensure(planned, jobs=1).failures
    assert measured(copied.root / "together") == alone
    assert len(alone) == 5


def test_the_base_model_is_asked_once_for_all_rows(copied: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    whole = Reader._predict

    def counted(self: Reader, queries: Any, drafts: Any, edit: Any, *args: Any, **kwargs: Any) -> Any:
        asked.extend(queries if edit is None else [])
        return whole(self, queries, drafts, edit, *args, **kwargs)

    monkeypatch.setattr(Reader, "_predict", counted)
    path = write_plan(copied, [FT, UNIKE], [FT, UNIKE])
    found = []
    for output, rows, more in (
        ("one", [0], ["batch_invariant=false"]),
        ("all", range(6), ["batch_invariant=false"]),
        ("alone", range(6), []),
    ):
        where = {"backbones": ["small"], "output": copied.root / output, "overrides": more}
        planned = [plan.read_plan(path, **where)[i] for i in rows]
        asked.clear()
        assert not workers.ensure(planned, jobs=1).failures
        found.append(len(asked))
    one, together, alone = found
    assert together == one > 0
    assert alone == 2 * one, "once for each first layer, where last bits must not differ"


def test_what_one_reader_knows_the_other_does_not_ask(backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case(i) for i in range(3)]
    one, other, third = (reader(backbone, first) for first in (1, 2, 2))
    one.cache_base(cases[:2])
    assert other.share_base(one)
    asked: list[int] = []
    whole = Reader._predict

    def counted(self: Reader, queries: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(queries))
        return whole(self, queries, *args, **kwargs)

    monkeypatch.setattr(Reader, "_predict", counted)
    known = [other.predict_base(c) for c in cases[:2]]
    assert asked == []
    assert known == [one.predict_base(c) for c in cases[:2]] == [third.predict_base(c) for c in cases[:2]]
    assert len(asked) == 2, "one that has learnt from nobody asks"
    other.predict_base(cases[2])
    one.predict_base(cases[2])
    assert len(asked) == 3, "what either reads is known to both"


def test_a_reader_learns_from_no_other_that_reads_less(backbone) -> None:
    ranks, plain = {"presets": METRIC_PRESETS}, {"presets": ("paper",)}
    assert reader(backbone, **plain).share_base(reader(backbone, **ranks))
    assert not reader(backbone, **ranks).share_base(reader(backbone, **plain))
    assert not reader(backbone).share_base(reader(backbone, generated=False))
    assert not reader(backbone).share_base(reader(load_backbone(make_spec("blip2"))))
    # Where last bits must not depend on what else is run, they may not come from another first layer.
    assert reader(backbone, 1, alone=True).share_base(reader(backbone, 1, alone=True))
    assert not reader(backbone, 2, alone=True).share_base(reader(backbone, 1, alone=True))
    assert not reader(backbone, 1, alone=True).share_base(reader(backbone, 1))
