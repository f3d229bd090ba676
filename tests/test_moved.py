"""Modules that have moved still load under their former names."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from unike.system.moved import MOVED

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("former", MOVED)
def test_a_former_name_gives_the_module_and_a_warning(former: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, former, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{former} has moved to {MOVED[former]}"):
        module = importlib.import_module(former)
    assert module is importlib.import_module(MOVED[former])
    assert module.__spec__.name == MOVED[former]


def test_other_names_are_not_forwarded() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("unike.nowhere")


def test_names_imported_from_a_former_module_work_in_a_fresh_process() -> None:
    line = (
        "from unike.hparams import HyperParams; from unike import HyperParams as H; assert H is HyperParams"
    )
    subprocess.run([sys.executable, "-c", line], cwd=ROOT, check=True)


def test_the_change_log_lists_each() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [a for a, b in MOVED.items() if f"`{a}` -> `{b}`" not in text] == []
