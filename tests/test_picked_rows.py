"""A table of some of its rows: which are run, and that the others are named."""

from __future__ import annotations

import pytest
from test_verdicts import SUBJECT, block, row, second

from scripts import tables
from scripts.plan import PLAN, read_plan, read_tables
from unike.report.paper.short import write_short
from unike.report.paper.tables import latex, markdown
from unike.types import UserError


def test_rows_that_were_left_out_are_named_wherever_a_verdict_stands() -> None:
    rows = row(SUBJECT, second(70.0), ours=True), row("FT", second(10.0))
    said = "Not run: KE; MEND."
    whole, part = block(*rows), block(*rows, not_run=("KE", "MEND"))
    for text in (markdown(part), write_short([part, whole], "python -m x"), latex(part)):
        assert text.count(said) == 1
    assert "Not run" not in markdown(whole) + write_short([whole], "python -m x")


def test_some_rows_of_a_table_are_picked_by_name() -> None:
    planned = read_plan(PLAN, ["1"], ["tiny_blip2"])
    picked = tables.pick_rows(planned, ["MEND", "KE"])
    assert {run.row.name for run in picked} == {"KE", "MEND"}
    assert tables.pick_rows(planned, []) == planned
    (made,) = {b.not_run for b in tables.make_blocks(picked, read_tables(PLAN))}
    assert "IKE" in made
    assert not {"KE", "MEND"} & set(made)
    with pytest.raises(UserError, match=r"--rows: T-Pacher: no such row; the nearest is 'T-Patcher'$"):
        tables.pick_rows(planned, ["KE", "T-Pacher"])
