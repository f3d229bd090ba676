"""Caches know what is applied and which weights there are: a short walk of ``benchmarks.interleavings``."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Project

from benchmarks.interleavings import Walk, blind
from unike.config.hparams import HyperParams

pytestmark = pytest.mark.usefixtures("one_thread")


def walk(project: Project, folder: Path, seed: int) -> Walk:
    return Walk(HyperParams.from_hparams(project.yaml), folder, seed)


@pytest.mark.parametrize("seed", [1, 2])
def test_every_answer_is_that_of_a_fresh_model(blip2_project: Project, tmp_path: Path, seed: int) -> None:
    tally = walk(blip2_project, tmp_path, seed).run(80)
    assert tally.wrong == []
    assert tally.compared > 40
    assert len(tally.done) == 11


def test_a_blind_editor_is_found_out(blip2_project: Project, tmp_path: Path) -> None:
    with blind():
        assert walk(blip2_project, tmp_path, 1).run(80).wrong
