"""Whole runs over a folder of prefix states and a memory searched by FAISS."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import Project

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import run_edit  # noqa: E402
from unike.backbones.vision import Blip2Vision  # noqa: E402
from unike.backbones.vlm import VisionLanguageBackbone  # noqa: E402
from unike.config.hparams import HyperParams  # noqa: E402
from unike.runs.records import read_lines  # noqa: E402


def run(project: Project, name: str, *overrides: str) -> list[dict]:
    output = project.root / name
    arguments = ["--hparams_dir", str(project.yaml), "--task", "vqa", "--size", "3", "--output", str(output)]
    assert run_edit.main([*arguments, *overrides]) == 0
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_lines(output)]


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """How many queries' prefixes and pictures are computed."""
    counts = {"prefix": 0, "see": 0}
    for name, kind in (("prefix", VisionLanguageBackbone), ("see", Blip2Vision)):
        straight = getattr(kind, name)

        def count(self, first, *rest, name=name, straight=straight):
            counts[name] += len(first)
            return straight(self, first, *rest)

        monkeypatch.setattr(kind, name, count)
    return counts


def test_a_second_run_and_another_method_start_warm(copied, counted):
    folder = f"prefix_dir={copied.root / 'states'}"
    without = run(copied, "without")
    plain = dict(counted)
    cold = run(copied, "cold", folder)
    assert min(plain.values()) > 0
    assert counted["see"] > plain["see"]
    before = dict(counted)
    warm = run(copied, "warm", folder)
    # Answers of the base that no target explains are decoded, and that sees pictures; here from disk.
    assert counted == before
    assert cold == warm == without
    # The base's queries are known; those with an answer of the edited model as their draft may be new.
    run(copied, "other", folder, "method=tpatcher", "activation_loss=0.1")
    assert counted["see"] == before["see"]
    assert counted["prefix"] - before["prefix"] < plain["prefix"]


def test_where_states_are_cached_is_no_part_of_a_run(copied):
    run(copied, "one", f"prefix_dir={copied.root / 'states'}")
    resumed = ["--task", "vqa", "--size", "3", "--output", str(copied.root / "one"), "--resume"]
    assert run_edit.main(["--hparams_dir", str(copied.yaml), *resumed, "prefix_memory_gb=1"]) == 0
    assert run_edit.main(["--hparams_dir", str(copied.yaml), *resumed, "k=2"]) == 2
    one, other = (
        HyperParams.from_dict({"model_name": "blip2", "name": "x", "prefix_dir": p}) for p in (None, "y")
    )
    assert one.decisive() == other.decisive()
    assert one.decisive() != HyperParams.from_dict({"model_name": "blip2", "name": "z"}).decisive()


def test_a_run_whose_memory_is_searched_by_faiss(copied):
    pytest.importorskip("faiss")
    exact = run(copied, "exact", "retrieval=exact")
    assert list(copied.root.glob("knowledge/**/memory-*")) == []
    found = run(copied, "faiss", "retrieval=faiss")
    kept = list(copied.root.glob("knowledge/**/memory-*/index-*.faiss"))
    assert len(kept) == 2, "one of each edited layer"
    stamps = [path.stat().st_mtime_ns for path in kept]
    again = run(copied, "again", "retrieval=faiss")
    assert [path.stat().st_mtime_ns for path in kept] == stamps, "built once"
    # So few items are all found: what differs is rounding.
    for records in (found, again):
        for one, other in zip(exact, records, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
            assert one["scores"] == other["scores"]


@pytest.mark.usefixtures("nothing_loads")
def test_a_folder_that_is_a_file_ends_before_anything_is_loaded(copied, capsys):
    (copied.root / "file").touch()
    arguments = ["--hparams_dir", str(copied.yaml), "--task", "vqa", f"prefix_dir={copied.root / 'file'}"]
    assert run_edit.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "prefix_dir" in lines[0]
    assert run_edit.main([*arguments, "--check"]) == 2
    assert "✗" in capsys.readouterr().out
