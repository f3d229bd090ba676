"""The benchmark of a GPU, in miniature on the CPU: every part runs, and what goes wrong is said."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_models import SCALES, TITLES, draw_backbone
from benchmarks.measuring import Measurements
from unike.backbones.base import encode_queries
from unike.types import Query

SMALL = ["--device", "cpu", "--scale", "small"]


def test_every_part_runs_and_its_figures_are_kept(tmp_path: Path, capsys) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main([*SMALL, "--models", "llava", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    found = {row["metric"]: row["median"] for row in rows if row["case"] == TITLES["llava"]}
    assert {"an edit", "probes after it", "a training step", "an edit, in a batch of 4"} <= found.keys()
    assert {f"tokens a second, {n} edits" for n in (0, 1, 5)} <= found.keys()
    assert all(value > 0 for value in found.values())
    parity = {(row["case"], row["metric"]): row for row in rows if row["case"].startswith("parity")}
    exact = parity["parity, float32", "logits: largest difference, share"]
    assert exact["median"] <= 1e-3
    # Or parity could not fail.
    assert parity["parity, bfloat16", "logits: largest difference, share"]["median"] > exact["median"]
    assert parity["parity, float32", "what the edit changes, share"]["median"] > 0.01
    said = capsys.readouterr().err
    assert said.split("\n")[:2] == ["not run: int8: needs --weights", "not run: int4: needs --weights"]


def test_a_part_that_fails_is_a_line_and_the_next_one_follows(capsys) -> None:
    session = gpu.Session(torch.device("cpu"), SCALES["small"], 1.0, Measurements("gpu"))
    ran: list[str] = []

    def fail() -> None:
        raise torch.OutOfMemoryError("no room\nfor it")

    session.run("first", fail)
    session.run("second", partial(ran.append, "second"))
    assert (session.failed, ran) == (["first"], ["second"])
    assert capsys.readouterr().err == "first: failed: OutOfMemoryError: no room\n"
    late = gpu.Session(torch.device("cpu"), SCALES["small"], -1.0, Measurements("gpu"))
    late.run("third", partial(ran.append, "third"))
    assert (late.skipped, ran) == (["third: its time was over"], ["second"])


def test_full_size_needs_an_accelerator(tmp_path: Path, capsys) -> None:
    assert gpu.main(["--device", "cpu", "--json", str(tmp_path / "gpu.json")]) == 2
    assert "expected --scale small" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("family", TITLES)
def test_weights_drawn_on_a_device_make_a_whole_model(family: str) -> None:
    draw = partial(draw_backbone, family, SCALES["small"], torch.device("cpu"), torch.float32)
    asked = [Query(None, "what is it?", "a fox")]
    with torch.no_grad():
        one, again, other = (b(encode_queries(b, asked)).logits for b in (draw(), draw(), draw(seed=1)))
    assert torch.isfinite(one).all()
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
