"""Rows of the ablation: read strictly, shown with the paper's figures beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import ablation
from unike.hparams import HyperParams
from unike.tables import summarise
from unike.types import METRICS, UserError

ROOT = Path(__file__).parents[1]


def summary(after: float) -> dict:
    scores = {m: {"before": 0.25, "after": after} for m in METRICS}
    decisions = {"alpha": dict.fromkeys(METRICS, 0.5)}
    record = {"id": "0", "status": "ok", "seconds": 0.5, "steps": 3, "decisions": decisions}
    return summarise([record | {"scores": {"teacher_forced": scores, "generated": scores}}], 0)


def test_every_row_of_the_shipped_file_is_valid_hparams() -> None:
    base = HyperParams.from_hparams(ROOT / "hparams" / "tiny_blip2.yaml").to_dict()
    rows = ablation.read_rows(ROOT / "hparams" / "ablation.yaml", None)
    assert {"only Intrin", "only Latent-IKE", "Intrin+IKE", "Intrin+Latent-IKE", "UniKE"} <= {
        n for n, _ in rows
    }
    for _, changes in rows:
        HyperParams.from_dict({**base, **changes})


def test_rows_can_be_picked_and_unknown_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text("- {name: one, set: {k: 3}}\n- {name: two, set: {}}\n")
    assert ablation.read_rows(path, ["two"]) == [("two", {})]
    with pytest.raises(UserError, match=r"three.*known.*one"):
        ablation.read_rows(path, ["three"])
    for text in ("- {set: {}}", "5", "- ["):
        path.write_text(text)
        with pytest.raises(UserError, match=r"rows\.yaml: expected a list"):
            ablation.read_rows(path, None)


def test_the_table_shows_ours_and_the_papers_figures() -> None:
    text = ablation.markdown([("UniKE", summary(0.75)), ("ours alone", summary(0.5))], "vqa")
    assert "| UniKE | 75.0 |" in text
    assert "| base | 25.0 |" in text
    assert "| *paper, MiniGPT-4* | 98.0 | 97.4 | 92.8 | 98.7 | 88.8 |" in text
    assert text.count("*paper, MiniGPT-4*") == 1
    assert "| UniKE | 0.50 |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| ") and "0.50" not in line}
    assert len(widths) <= 2
