"""VLKEB's protocol: a case is evaluated when ``gap`` edits have been made after its own."""

from __future__ import annotations

import pytest
from test_sequences import FT, UNIKE, Keeping, afters, case, of_kind, predictions, reader_of, recorded, share
from test_sequences import backbone as backbone  # the fixture

from unike.config.hparams import HyperParams
from unike.edits import compose
from unike.evaluation.sequences import check_sequence_length
from unike.methods import build
from unike.types import UserError

K = 4


@pytest.mark.parametrize("values", [UNIKE, FT], ids=["unike", "ft"])
@pytest.mark.parametrize("gap", [0, 1, K - 1])
def test_each_case_is_asked_under_the_edits_up_to_the_gap(backbone, values, gap: int) -> None:
    cases = [case(i) for i in range(1, K + 1)]
    method = Keeping(values)
    records = recorded(backbone, method, cases, reader_of(backbone, method), gap=gap)
    finals = of_kind(records, "final")
    assert [r["position"] for r in finals] == list(range(1, K - gap + 1))
    assert len(of_kind(records, "step")) == K
    base = [predictions(backbone, one) for one in cases]
    seen = []
    for made in range(1, K + 1):
        with compose(method.edits[:made]).applied(backbone):
            seen.append([predictions(backbone, one) for one in cases])
    for at, record in enumerate(finals):
        found = seen[at + gap][at]
        for probe, after, before in zip(cases[at].probes, found, base[at], strict=True):
            if probe.expect == "unchanged":
                assert afters(record)[probe.name] == pytest.approx(share(after, before)), (at, probe.name)
        assert record["bytes"] > 0
    order = [(r["kind"], r["position"]) for r in records]
    for at in range(1, K - gap + 1):
        assert order.index(("final", at)) == order.index(("step", at + gap)) + 1


def test_the_largest_gap_asks_the_first_case_under_all_edits(backbone) -> None:
    cases = [case(i) for i in range(1, K + 1)]
    method = build(HyperParams.from_dict(UNIKE))
    whole = of_kind(recorded(backbone, method, cases, reader_of(backbone, method)), "final")
    part = of_kind(recorded(backbone, method, cases, reader_of(backbone, method), gap=K - 1), "final")
    assert [r["scores"] for r in part] == [whole[0]["scores"]]


def test_a_failed_edit_fails_where_it_is_due(backbone) -> None:
    cases = [case(i) for i in range(1, K + 1)]
    method = Keeping(FT, broken=("e2",))
    records = recorded(backbone, method, cases, reader_of(backbone, method), gap=1)
    assert [r["status"] for r in of_kind(records, "final")] == ["ok", "failed", "ok"]
    first = of_kind(records, "final")[0]
    assert afters(first) == afters(of_kind(records, "step")[0]), "the edit after it left no trace"


def test_a_gap_as_long_as_the_sequence_is_refused() -> None:
    options = {"protocol": "sequential", "sequence_length": 4}
    check_sequence_length(HyperParams.from_dict({**FT, **options, "gap": 3}))
    with pytest.raises(UserError, match="gap: 4; expected less than sequence_length, which is 4"):
        check_sequence_length(HyperParams.from_dict({**FT, **options, "gap": 4}))
