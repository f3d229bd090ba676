"""The atomic writer: a target is the former file or the new one, whoever writes and whatever fails."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from unike.system.files import (
    check_tensors,
    move_into_place,
    read_index,
    replace_atomically,
    write_index,
    write_text,
)
from unike.types import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_reader_sees_the_former_file_until_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_text(target, "former")
    with replace_atomically(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "former"
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".a.json.")
        assert temporary.name.endswith(".tmp")
    assert target.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_former_one_alone(tmp_path: Path, is_folder: bool, error: type) -> None:
    target = tmp_path / "target"
    if not is_folder:
        target.write_text("former")
    before = names(tmp_path)

    def fail() -> None:
        with replace_atomically(target, is_folder) as temporary:
            (temporary / "part" if is_folder else temporary).write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == before
    assert is_folder or target.read_text() == "former"


def test_nothing_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replace_atomically(tmp_path / "a"):
        pass
    assert names(tmp_path) == []


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "edit"
    with replace_atomically(target, is_folder=True) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a").write_text("1")
        assert not target.exists()
    assert (target / "inner" / "a").read_text() == "1"
    with (
        pytest.raises(OSError, match=r"not empty|exists"),
        replace_atomically(target, is_folder=True) as part,
    ):
        (part / "b").write_text("2")
    assert names(tmp_path) == ["edit"]
    assert names(target) == ["inner"]


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "text")
    assert names(tmp_path) == []


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_nothing_is_moved_over_what_is_there(tmp_path: Path, there: str) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a").write_text("new")
    target = tmp_path / "deep" / "target"
    move_into_place(tmp_path / "new", target)
    assert (target / "a").read_text() == "new"
    (tmp_path / "newer").write_text("newer")
    place = {"file": target / "a", "folder": target, "link": tmp_path / "link"}[there]
    if there == "link":
        place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is there already; move it away"):
        move_into_place(tmp_path / "newer", place)
    assert (target / "a").read_text() == "new"
    assert (tmp_path / "newer").is_file()


def test_two_calls_in_one_process_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with replace_atomically(target) as one, replace_atomically(target) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert target.read_text() == "one"


@pytest.mark.parametrize("name", ["x" * 255, "\u6f22" * 85], ids=["ascii", "three bytes each"])
def test_the_longest_name_is_taken(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "text")
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("is_durable", [True, False])
def test_what_is_durable_is_flushed_before_it_is_seen(tmp_path: Path, monkeypatch, is_durable: bool) -> None:
    seen: list[bool] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append((tmp_path / "a").exists()), sync(handle)))
    with replace_atomically(tmp_path / "a", is_durable=is_durable) as temporary:
        temporary.write_text("1")
    assert seen == ([False, True] if is_durable else []), "the file, then its folder's entry"


def write_many(folder: str, mark: int) -> int:
    """Writes one index again and again; gives how often another process's was read in between."""
    index, tensors, others = Path(folder, "index.json"), Path(folder, "tensors"), 0
    write_index(index, {"mark": mark}, tensors)
    Path(folder, f"ready-{mark}").touch()
    while len(list(Path(folder).glob("ready-*"))) < 2:
        time.sleep(0.001)
    for number in range(200):
        write_index(index, {"mark": mark, "number": number, "more": "x" * 5000}, tensors)
        others += read_index(index)["mark"] != mark
        check_tensors(index, tensors)
    return others


def test_two_processes_write_the_same_index(tmp_path: Path) -> None:
    (tmp_path / "tensors").write_bytes(b"the same for both")
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        met = list(pool.map(write_many, [str(tmp_path)] * 2, [1, 2]))
    assert sum(met) > 0, "they wrote at the same time"
    assert json.loads((tmp_path / "index.json").read_text())["number"] == 199
    assert names(tmp_path) == ["index.json", "ready-1", "ready-2", "tensors"]
