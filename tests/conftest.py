"""Fixtures that several test files share."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Project, make_project
from original_files import FAMILIES
from worlds import World, world_of

from unike.editor import MultimodalEditor

# A shell's background jobs ignore Ctrl-C, and so would every program that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# A family decides how a method finds its modules: for these methods tests/test_methods.py and their own files
# ask that of every family, and what else methods share is asked of one.
_ONE_FAMILY = re.compile(r"\bminigpt4-(?:[\w ]+-)?(?:grace|liveedit|lora|wise)\b")
_ALL_FAMILIES = re.compile(r"test_(?:methods|grace|lora|wise|liveedit\w*)\.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [
        item for item in items if _ONE_FAMILY.search(item.name) and not _ALL_FAMILIES.search(item.nodeid)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


@pytest.fixture(scope="session")
def blip2_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A BLIP2-OPT project; never written to outside its knowledge and results folders."""
    return make_project(tmp_path_factory.mktemp("blip2"), "blip2")


@pytest.fixture(scope="session")
def minigpt4_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A MiniGPT-4 project; never written to outside its knowledge and results folders."""
    return make_project(tmp_path_factory.mktemp("minigpt4"), "minigpt4")


@pytest.fixture(scope="session", params=["blip2", "minigpt4"])
def project(request: pytest.FixtureRequest) -> Project:
    """Each of the two projects in turn."""
    return request.getfixturevalue(f"{request.param}_project")


@pytest.fixture(scope="module")
def loaded(project: Project) -> MultimodalEditor:
    return MultimodalEditor.from_hparams(project.yaml, progress=False)


@pytest.fixture
def editor(loaded: MultimodalEditor) -> Iterator[MultimodalEditor]:
    """The loaded editor; each test begins and ends without anything attached."""
    loaded._slot.put(())
    yield loaded
    loaded._slot.put(())


@pytest.fixture
def copied(blip2_project: Project, tmp_path: Path) -> Project:
    """A BLIP2-OPT project that a test may damage."""
    return blip2_project.copy(tmp_path / "project")


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that gets as far as loading a backbone."""

    def load(*_: Any) -> None:
        raise AssertionError("a backbone is loaded")

    for place in ("unike.backbones", "unike.editor"):
        monkeypatch.setattr(f"{place}.load_backbone", load)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch, then the former number: another one gives other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def worlds() -> dict[str, World]:
    return {}


@pytest.fixture(params=FAMILIES)
def world(request: pytest.FixtureRequest, worlds: dict[str, World], monkeypatch) -> World:
    return world_of(request.param, worlds, monkeypatch)
