"""Fetching from Google Drive, played by a server behind a stand-in for ``gdown``, and unpacking archives."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fetched import fetch, list_files, make_zip, offer, only_line
from stand_in import FakeGdown, StandIn, serve

from unike.fetch import archives
from unike.fetch.catalogue import Piece
from unike.types import UserError


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    monkeypatch.chdir(tmp_path)
    with serve() as state:
        yield state


ANNOTATIONS = ("vqa_train.json", "vqa_eval.json")
IMAGES = {
    "images/val2014/a.jpg": b"a",
    "images/val2014_image_rephrase/a.png": b"b" * 20_000,
    "images/x.txt": b"c",
}
MMEDIT = (
    Piece("drive_folder", "data/mmedit", (), id="FOLDER", files=ANNOTATIONS),
    Piece(
        "drive",
        "data/mmedit",
        (),
        id="IMAGES",
        file="images.zip",
        folders=("val2014", "val2014_image_rephrase"),
    ),
)


@pytest.fixture
def drive(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    listed = {f"vqa/{name}": f"ID-{name}" for name in ANNOTATIONS} | {"locality/train.json": "ID-OTHER"}
    monkeypatch.setitem(sys.modules, "gdown", FakeGdown(hub, {"FOLDER": listed}))
    hub.files |= {f"/drive/ID-{name}": b"[]" for name in ANNOTATIONS}
    hub.files["/drive/IMAGES"] = make_zip(IMAGES)
    offer(monkeypatch, *MMEDIT)
    return hub


MMEDIT_FILES = {*ANNOTATIONS, "val2014/a.jpg", "val2014_image_rephrase/a.png"}


def test_a_benchmark_on_the_drive_is_put_where_the_yamls_look(drive: StandIn, capsys) -> None:
    assert fetch("mmedit") == 0
    assert list_files(Path("data/mmedit")) == MMEDIT_FILES
    assert list_files() == {f"data/mmedit/{name}" for name in MMEDIT_FILES}
    assert "size: not stated; files: 1, of which 0 with a known checksum" in capsys.readouterr().out
    asked = len(drive.asked)
    assert fetch("mmedit") == 0
    assert len(drive.asked) == asked


def test_the_drive_interrupted_goes_on(drive: StandIn, capsys) -> None:
    drive.cuts["IMAGES"] = [9_000]
    assert fetch("mmedit") == 2
    line = only_line(capsys)
    assert line.startswith("error: images.zip: Google Drive: ")
    assert line.endswith("run the same command again to go on")
    assert not Path("data/mmedit/val2014").exists()
    assert fetch("mmedit") == 0
    assert list_files() == {f"data/mmedit/{name}" for name in MMEDIT_FILES}
    assert drive.starts("IMAGES") == [0, 9_000]
    assert drive.count("ID-vqa_train.json") == 1


def test_a_web_page_instead_of_the_file_is_refused(drive: StandIn, capsys) -> None:
    drive.files["/drive/ID-vqa_eval.json"] = b"<!DOCTYPE html><title>Quota exceeded</title>"
    assert fetch("mmedit") == 2
    assert "vqa_eval.json: Google Drive: sent a web page instead of the file" in only_line(capsys)
    assert not Path("data/mmedit").exists()


def test_without_gdown_one_line_says_how_to_get_it(hub: StandIn, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "gdown", None)
    offer(monkeypatch, *MMEDIT)
    assert fetch("mmedit") == 2
    assert only_line(capsys) == (
        "error: gdown: not installed; files on Google Drive need it: pip install 'gdown>=6'"
    )


def test_a_folder_without_the_file_is_named_with_what_it_has(drive: StandIn, monkeypatch, capsys) -> None:
    offer(monkeypatch, Piece("drive_folder", "data/mmedit", (), id="FOLDER", files=("vqa_test.json",)))
    assert fetch("mmedit") == 2
    assert "has no vqa_test.json; it has train.json, vqa_eval.json, vqa_train.json" in only_line(capsys)


def test_an_archive_without_the_folders_is_kept_and_named(drive: StandIn, capsys) -> None:
    drive.files["/drive/IMAGES"] = make_zip({"other/a.jpg": b"a"})
    assert fetch("mmedit") == 2
    line = only_line(capsys)
    assert "has no folder val2014, val2014_image_rephrase; it has other; unpack it by hand" in line
    (kept,) = Path("data").glob(".mmedit.*/files/images.zip")
    assert zipfile.is_zipfile(kept)


@pytest.mark.parametrize("name", ["../out.txt", "/out.txt", "a/../../out.txt", "..\\out.txt"])
def test_an_archive_that_leads_out_is_not_unpacked(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.zip").write_bytes(make_zip({"first.txt": b"1", name: b"2"}))
    with pytest.raises(UserError, match=r"a\.zip: .*leads out of the folder"):
        archives.unpack(tmp_path / "a.zip", tmp_path / "into")
    assert list_files(tmp_path) == {"a.zip"}


def test_a_tar_is_unpacked_without_its_links(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        (tmp_path / "x.txt").write_text("1")
        archive.add(tmp_path / "x.txt", "in/x.txt")
        link = tarfile.TarInfo("in/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    archives.unpack(tmp_path / "a.tar.gz", tmp_path / "into")
    assert list_files(tmp_path / "into") == {"in/x.txt"}


# An archive holds the time it was made at: without ids, two workers would name such a test differently.
@pytest.mark.parametrize(
    "data",
    [b"", b"PK\x03\x04 and no more", make_zip({"a": b"1"})[:-30]],
    ids=["empty", "a beginning", "without its end"],
)
def test_a_damaged_archive_is_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.zip: is no archive, or is damaged"):
        archives.unpack(tmp_path / "a.zip", tmp_path / "into")
