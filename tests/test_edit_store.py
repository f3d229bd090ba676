"""A store of edits: order, ids, several writers, and the command line over it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import Project
from test_run_edit import ROOT, errors, start

from unike.edits import Edit, EditStore, Fact, Origin, PromptEdit, PromptText
from unike.edits.__main__ import apply_edits, main, parse_arguments
from unike.edits.files import read_edit
from unike.runs.records import read_lines
from unike.system.text import one_line
from unike.types import UserError


def made(name: str, backbone: str = "abc", target: str = "a fox") -> PromptEdit:
    """An edit that needs no model."""
    edit = PromptEdit((Fact(name, PromptText(f"New Fact: {name}\n", 3)),), 100, {"steps": 0})
    hparams = {"method": "ike", "name": "some/model", "seed": 1}
    edit.origins = (Origin(name, "ike", f"what is {name}?", target, None, None, hparams, backbone, "m"),)
    return edit


def add_many(folder: str, name: str, count: str) -> None:
    store = EditStore(folder)
    for i in range(int(count)):
        store.add(made(f"{name}{i}"))


# ---------------------------------------------------------------- the store


def test_order_is_that_of_adding(tmp_path: Path) -> None:
    store, other = EditStore(tmp_path / "s"), EditStore(tmp_path / "s")
    assert len(store) == 0
    for name in ("b", "a", "../c", "a b/ü" * 40):
        store.add(made(name))
    assert other.ids() == store.ids() == ["b", "a", "../c", "a b/ü" * 40]
    assert {p.parent for p in tmp_path.rglob("edit.json")} == {
        p for p in (tmp_path / "s").iterdir() if p.is_dir()
    }
    other.remove("a")
    assert store.ids() == EditStore(tmp_path / "s").ids() == ["b", "../c", "a b/ü" * 40]
    store.add(made("a"))
    assert other.ids()[-1] == "a"
    assert other.read("../c").origins == made("../c").origins
    assert "a" in other
    assert "d" not in other


def test_an_id_is_taken_once(tmp_path: Path) -> None:
    store = EditStore(tmp_path)
    store.add(made("a"))
    store.add(made("b"))
    with pytest.raises(UserError, match="holds an edit a already"):
        store.add(made("a"))
    store.add(made("a", target="a cat"), replace=True)
    store.add(made("a", target="a cat"), replace=True)
    assert store.ids() == ["a", "b"]
    assert store.read("a").origins[0].target == "a cat"
    assert len(list(tmp_path.glob("*/edit.json"))) == 2
    with pytest.raises(UserError, match="another model, fingerprint abc"):
        store.add(made("c", backbone="xyz"))
    with pytest.raises(UserError, match="no edit c; there are a, b"):
        store.remove("c")
    assert sorted(p.name[0] for p in tmp_path.iterdir()) == [".", "a", "b", "i"]


def test_a_folder_that_somebody_deleted_can_be_added_again(tmp_path: Path) -> None:
    store = EditStore(tmp_path)
    store.add(made("a"))
    store.add(made("b"))
    shutil.rmtree(store.read("a").folder)
    with pytest.raises(UserError, match="no such folder"):
        store.read("a")
    store.add(made("a"), replace=True)
    assert store.read("a").origins == made("a").origins
    assert store.ids() == ["a", "b"]


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    """A half-written line, and a folder that no line names."""
    store = EditStore(tmp_path)
    store.add(made("a"))
    index = tmp_path / "index.jsonl"
    whole = index.read_bytes()
    store.add(made("b"))
    for cut in range(len(whole), index.stat().st_size, 9):
        again = tmp_path.parent / f"{tmp_path.name}-{cut}"
        shutil.copytree(tmp_path, again)
        os.truncate(again / "index.jsonl", cut)
        other = EditStore(again)
        assert other.ids() == ["a"]
        other.add(made("b"))
        assert EditStore(again).ids() == ["a", "b"]
        assert EditStore(again).read("b").id == "b"
        shutil.rmtree(again)


@pytest.mark.parametrize(
    "line", [b"{}", b"[]", b"\xff", b'{"id": "a", "folder": "../../etc"}', b'{"id": 1, "folder": "a"}',
             b'{"id": "x", "removed": true}', b'{"id": "x", "folder": 3}']
)  # fmt: skip
def test_a_damaged_index_is_refused(tmp_path: Path, line: bytes) -> None:
    EditStore(tmp_path).add(made("a"))
    with open(tmp_path / "index.jsonl", "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(UserError, match=r"index.jsonl: is damaged"):
        EditStore(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(UserError, match="expected a store of edits"):
            EditStore(path)


def test_a_name_that_no_disk_takes_is_one_line(tmp_path: Path, capsys) -> None:
    name = str(tmp_path / ("n" * 300))
    assert main(["list", name]) == 2
    (line,) = errors(capsys)
    assert "cannot be read: File name too long" in line
    with pytest.raises(UserError, match=r"cannot be written: File name too long$"):
        made("a").save(name)
    with pytest.raises(UserError, match="no such folder"):
        read_edit(name)


def test_what_a_method_reports_must_be_json(tmp_path: Path) -> None:
    for info in ({"loss": float("inf")}, {("layer", 1): 2}):
        edit = made("a")
        edit.info = info
        with pytest.raises(UserError, match="edit a: cannot be written as JSON"):
            edit.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(add_many, [str(tmp_path / "s")] * 2, "ab", ["20", "20"]))
    ids = EditStore(tmp_path / "s").ids()
    assert len(set(ids)) == len(ids) == 40
    assert [name for name in ids if name[0] == "b"] == [f"b{i}" for i in range(20)]


@pytest.mark.slow
def test_two_processes_add_two_hundred_each(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_edit_store as t; t.add_many(*sys.argv[2:])"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(ROOT / "tests"), str(tmp_path / "s"), n, "200"], cwd=ROOT
        )
        for n in "ab"
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    store = EditStore(tmp_path / "s")
    ids = store.ids()
    assert len(set(ids)) == len(ids) == 400
    for n in "ab":
        assert [name for name in ids if name[0] == n] == [f"{n}{i}" for i in range(200)]
    assert all(store.read(name).id == name for name in ids)


# ---------------------------------------------------------------- the command line


def test_list_show_diff_and_remove(tmp_path: Path, capsys) -> None:
    store = EditStore(tmp_path)
    store.add(made("a"))
    store.add(made("[red]b", target="two dogs"))
    assert main(["list", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "[red]b" in out
    assert "two dogs" in out
    assert main(["show", str(tmp_path), "a"]) == 0
    assert json.loads(capsys.readouterr().out)["origins"][0]["target"] == "a fox"
    assert main(["diff", str(tmp_path), "a", "[red]b"]) == 0
    out = capsys.readouterr().out
    assert "target" in out
    assert "method" not in out
    assert main(["remove", str(tmp_path), "a", "c"]) == 2
    assert "no edit c" in errors(capsys)[0]
    assert main(["remove", str(tmp_path), "a", "a"]) == 0
    assert store.ids() == ["[red]b"]
    assert main(["list", str(tmp_path / "nowhere")]) == 2
    assert not (tmp_path / "nowhere").exists()


def test_a_run_keeps_its_edits_and_they_apply(copied: Project, capsys) -> None:
    folder = copied.root / "edits"
    options = ("--size", "2", "--output", str(copied.root / "run"), "--save_edits", str(folder))
    assert start(copied, *options) == 0
    store = EditStore(folder)
    assert store.ids() == [r["id"] for r in read_lines(copied.root / "run")]
    assert start(copied, *options[:1], "3", *options[2:], "--resume") == 0
    assert store.ids() == [r["id"] for r in read_lines(copied.root / "run")]
    assert len(store) == 3
    told = read_lines(copied.root / "run")[1]
    command = ["apply", str(folder), "--hparams_dir", str(copied.yaml), "--edits", told["id"]]
    table, words = apply_edits(store, parse_arguments(command))
    answers = told["answers"]["reliability"]
    row = (told["id"], answers["prompt"], answers["target"], answers["before"], answers["after"])
    assert tuple(str(next(column.cells)) for column in table.columns) == tuple(map(one_line, row))
    assert answers["before"] != answers["after"]
    assert words.startswith("1 edits attached; ")
    assert words.endswith("of 1 answers equal the target")
    Path(store.read(told["id"]).origins[0].image or "").rename(copied.root / "moved.png")
    table, words = apply_edits(store, parse_arguments(command))
    assert str(next(table.columns[3].cells)) == "(its image is gone)"
    assert words == "1 edits attached; 0 of 0 answers equal the target; 1 left out"
    other = [*options[:3], str(copied.root / "other"), *options[4:]]
    assert start(copied, *other, "protocol=sequential", "sequence_length=2", "sequences=2") == 2
    assert "expected sequences: 1" in errors(capsys)[0]
    assert not (copied.root / "other").exists()


@pytest.mark.usefixtures("nothing_loads")
def test_bad_input_ends_before_a_model_is_loaded(copied: Project, capsys) -> None:
    folder, apply = (
        copied.root / "edits",
        ["apply", str(copied.root / "edits"), "--hparams_dir", str(copied.yaml)],
    )
    EditStore(folder).add(made("a"))
    for more, words in (
        (["--edits", "b"], "no edit b"),
        (["--image", "x.png"], "expected --prompt"),
        (["--prompt", " "], "--prompt: is empty"),
        (["--prompt", "what?", "--image", "x.png"], "no such image"),
    ):
        assert main([*apply, *more]) == 2
        assert words in errors(capsys)[0]
    next(folder.glob("a*/edit.json")).write_text("{}")
    assert main(apply) == 2
    assert "edit.json" in errors(capsys)[0]
    (copied.root / "data" / "x").write_text("")
    assert start(copied, "--save_edits", str(copied.root / "data")) == 2
    assert "expected a store of edits" in errors(capsys)[0]


@pytest.mark.parametrize("options", [(), ("protocol=sequential", "sequence_length=4", "sequences=1")])
def test_an_edit_that_cannot_be_kept_is_not_recorded(copied: Project, capsys, monkeypatch, options) -> None:
    folder, run = copied.root / "edits", copied.root / "run"
    command = ("--save_edits", str(folder), "--output", str(run), "method=ft", "layers=1", *options)
    add, count = EditStore.add, []

    def fill(store: EditStore, edit: Edit, replace: bool = False) -> None:
        count.append(edit.id)
        if len(count) == 3:
            raise UserError("no room")
        add(store, edit, replace)

    with monkeypatch.context() as patched:
        patched.setattr(EditStore, "add", fill)
        assert start(copied, *command, "edit_batch_size=1") == 2
    assert errors(capsys) == ["error: no room"]
    assert len(read_lines(run)) == 2
    assert EditStore(folder).ids() == count[:2]
    assert start(copied, *command, "edit_batch_size=1", "--resume") == 0
    made = [r for r in read_lines(run) if "kind" not in r or r["kind"] == "step"]
    assert EditStore(folder).ids() == [r["case"] if "case" in r else r["id"] for r in made]
    assert len(made) == 4


def test_a_sequence_keeps_its_edits(copied: Project) -> None:
    folder, run = copied.root / "edits", str(copied.root / "run")
    sequence = (
        "protocol=sequential",
        "sequence_length=2",
        "sequences=1",
        "method=ike",
        "ike_retriever=states",
    )
    assert start(copied, "--save_edits", str(folder), "--output", run, *sequence) == 0
    steps = [r["case"] for r in read_lines(run) if r["kind"] == "step"]
    assert EditStore(folder).ids() == steps
