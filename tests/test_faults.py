"""Faults of the machine in the middle of a run: what is recorded stays, the summary says what there is,
and the run goes on to what it would have been without them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Project
from test_run_edit import errors, start
from untouched import assert_untouched, hook_count, weights_of

from benchmarks.kill import read_comparable
from unike import runs
from unike.backbones import load_backbone
from unike.config.hparams import HyperParams
from unike.methods import EditMethod, training
from unike.runs import inputs
from unike.runs.records import RECORDS, SUMMARY, RecordWriter, read_lines
from unike.types import Case, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_BY_ONE = {"edit_batch_size": 1, "max_steps": 3}


@pytest.fixture(scope="module")
def parts(blip2_project: Project) -> runs.Parts:
    hparams = HyperParams.from_dict(blip2_project.options(**ONE_BY_ONE))
    return runs.assemble(hparams, load_backbone(hparams), progress=False)


def changed(parts: runs.Parts, **options: Any) -> runs.Parts:
    """The same backbone with other options."""
    hparams = HyperParams.from_dict(parts.hparams.to_dict() | options)
    return runs.assemble(hparams, parts.backbone, progress=False)


def cases_of(project: Project) -> Sequence[Case]:
    return list(inputs.open_datasets(HyperParams.from_dict(project.options()), "vqa"))


@pytest.fixture(scope="module")
def cases(blip2_project: Project) -> Sequence[Case]:
    return cases_of(blip2_project)


def run(
    parts: runs.Parts, cases: Sequence[Case], folder: Path, resume: bool = False, skip_broken: bool = False
) -> dict[str, Any]:
    with runs.open_run(parts, "vqa", folder, resume) as writer:
        return runs.run_cases(parts, cases, writer, skip_broken=skip_broken, progress=False)


@pytest.fixture(scope="module")
def whole(parts: runs.Parts, cases: Sequence[Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(parts, cases, folder)
    return folder


def lines(folder: Path) -> list[bytes]:
    return read_comparable(folder / RECORDS).splitlines()


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SUMMARY).read_text())


def same_end(folder: Path, whole: Path) -> bool:
    return all(read_comparable(folder / name) == read_comparable(whole / name) for name in (RECORDS, SUMMARY))


# ---------------------------------------------------------------- disks


def no_space(path: Path, fails: Callable[[int], bool]) -> tuple[Callable[[int], None], list[int]]:
    """An ``os.fsync`` of a disk that is full at those records of the file for which ``fails`` holds."""
    sync, seen = os.fsync, []

    def fsync(number: int) -> None:
        if path.exists() and os.path.samestat(os.fstat(number), path.stat()):
            seen.append(number)
            if fails(len(seen)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(number)

    return fsync, seen


@pytest.mark.parametrize("stays", [False, True], ids=["once", "stays full"])
def test_a_disk_that_is_full_at_a_record(parts, cases, whole, tmp_path, monkeypatch, stays: bool) -> None:
    folder = tmp_path / "run"
    fsync, seen = no_space(folder / RECORDS, lambda n: n >= 3 if stays else n == 3)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match=r"run: cannot be written: No space left.*--resume"):
            run(parts, cases, folder)
    assert len(seen) >= 3, "the disk was full"
    assert lines(folder) == lines(whole)[:2]
    assert (folder / RECORDS).read_bytes().endswith(b"\n")
    if stays:
        assert not (folder / SUMMARY).exists()
    else:
        assert (summary_of(folder)["interrupted"], summary_of(folder)["n"]) == (True, 2)
    run(parts, cases, folder, resume=True)
    assert same_end(folder, whole)


def test_a_disk_that_is_full_at_the_summary(parts, cases, whole, tmp_path, monkeypatch) -> None:
    folder, replace, refused = tmp_path / "run", os.replace, []

    def full(source: Any, target: Any) -> None:
        if Path(target).name == SUMMARY:
            refused.append(target)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(UserError, match="No space left"):
            run(parts, cases, folder)
    assert refused
    assert lines(folder) == lines(whole)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "records.jsonl"]
    run(parts, cases, folder, resume=True)
    assert same_end(folder, whole)


def locked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        # Root writes everywhere.
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))


@pytest.mark.usefixtures("nothing_loads")
def test_a_folder_that_cannot_be_written(copied: Project, capsys, monkeypatch) -> None:
    folder = copied.root / "locked"
    folder.mkdir()
    with pytest.raises(AssertionError, match="a backbone is loaded"):
        start(copied, "--output", str(folder / "deep" / "run"))
    with monkeypatch.context() as patched:
        locked(folder, patched)
        assert start(copied, "--output", str(folder / "deep" / "run")) == 2
        copied.write_yaml(results_dir=str(folder / "deep"))
        assert start(copied) == 2
    folder.chmod(0o700)
    for line in errors(capsys):
        assert f"{folder} cannot be written" in line
    assert list(folder.iterdir()) == []
    assert start(copied, "--output", str(copied.yaml / "run")) == 2
    assert "small.yaml cannot be written" in errors(capsys)[0]


# ---------------------------------------------------------------- pictures


def losing(picture: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Takes a picture away as soon as so many records are written; gives its content."""
    write, count = RecordWriter.write, []

    def lose(self: RecordWriter, one: dict[str, Any]) -> None:
        write(self, one)
        count.append(one)
        if len(count) == after:
            picture.unlink()

    monkeypatch.setattr(RecordWriter, "write", lose)
    return picture.read_bytes()


def test_a_picture_that_vanishes_ends_the_run_which_resumes(
    parts, copied: Project, whole, tmp_path, monkeypatch
) -> None:
    folder, picture = tmp_path / "run", copied.data / "10.png"
    with monkeypatch.context() as patched:
        content = losing(picture, 1, patched)
        with pytest.raises(UserError, match=r"10\.png"):
            run(parts, cases_of(copied), folder)
    assert lines(folder) == lines(whole)[:3]
    assert (summary_of(folder)["interrupted"], summary_of(folder)["n"]) == (True, 3)
    picture.write_bytes(content)
    run(parts, cases_of(copied), folder, resume=True)
    assert same_end(folder, whole)


def test_a_picture_that_vanishes_is_a_failed_record_on_request(
    parts, copied: Project, whole, tmp_path, monkeypatch
) -> None:
    cases = cases_of(copied)
    losing(copied.data / "10.png", 1, monkeypatch)
    summary = run(parts, cases, tmp_path / "run", skip_broken=True)
    assert (summary["n"], summary["failed"], summary["interrupted"]) == (3, 1, False)
    assert lines(tmp_path / "run")[:3] == lines(whole)[:3]
    last = read_lines(tmp_path / "run")[3]
    assert (last["id"], last["status"], "10.png" in last["error"]) == ("vqa-3", "failed", True)


SEQUENCE = {"protocol": "sequential", "sequence_length": 4, "sequences": 1}


@pytest.mark.parametrize("after", [1, 4])
def test_a_picture_that_vanishes_in_a_sequence(
    parts, copied: Project, tmp_path, monkeypatch, after: int
) -> None:
    cases, sequence = cases_of(copied), changed(parts, **SEQUENCE)
    run(sequence, cases, tmp_path / "whole")
    with monkeypatch.context() as patched:
        content = losing(copied.data / "10.png", after, patched)
        with pytest.raises(UserError, match=r"10\.png"):
            run(sequence, cases, tmp_path / "ended")
    assert len(read_lines(tmp_path / "ended")) < 8
    (copied.data / "10.png").write_bytes(content)
    losing(copied.data / "10.png", after, monkeypatch)
    summary = run(sequence, cases, tmp_path / "run", skip_broken=True)
    assert (summary["n"], summary["failed"], summary["interrupted"]) == (3, 1, False)
    records = read_lines(tmp_path / "run")
    assert len(records) == 8
    lost = [r for r in records if r["status"] == "failed"]
    assert {r["case"] for r in lost} == {"vqa-3"}
    assert all("10.png" in r["error"] and "scores" not in r for r in lost)
    if after == 4:
        # All edits are made as before: only what could not be asked is another.
        assert [r["kind"] for r in lost] == ["final"]
        kept = [i for i, r in enumerate(records) if r["status"] == "ok"]
        assert [lines(tmp_path / "run")[i] for i in kept] == [lines(tmp_path / "whole")[i] for i in kept]


# ---------------------------------------------------------------- numbers


def diverging_for(parts: runs.Parts, target: str, value: float) -> Callable[..., Any]:
    """Judges as ever, but the loss of the edit with this target becomes ``value``."""
    judged, wanted = training._score_rows, parts.backbone.tokenizer(f" {target}", add_special_tokens=False)

    def judge(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses, right = judged(logits, labels)
        for i, row in enumerate(labels):
            if row[row >= 0].tolist() == wanted["input_ids"]:
                losses = losses.index_fill(0, torch.tensor([i]), value)
        return losses, right

    return judge


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [1, 4])
def test_a_loss_that_is_no_number_fails_its_edit_alone(
    parts, cases, whole, tmp_path, monkeypatch, value: float, size: int
) -> None:
    weights, hooks = weights_of(parts.backbone), hook_count(parts.backbone.model)
    target = str(cases[1].request.query.target)
    monkeypatch.setattr(training, "_score_rows", diverging_for(parts, target, value))
    summary = run(changed(parts, edit_batch_size=size), cases, tmp_path / "run")
    assert (summary["n"], summary["failed"], summary["interrupted"]) == (3, 1, False)
    records = read_lines(tmp_path / "run")
    assert [r["status"] for r in records] == ["ok", "failed", "ok", "ok"]
    assert str(value) in records[1]["error"]
    assert "scores" not in records[1]
    if size == 1:
        found, wanted = lines(tmp_path / "run"), lines(whole)
        assert [found[i] for i in (0, 2, 3)] == [wanted[i] for i in (0, 2, 3)]
    assert_untouched(parts.backbone, weights, hooks)


def test_edits_that_really_diverge_are_failed_and_leave_the_base(parts, cases, tmp_path) -> None:
    weights, hooks = weights_of(parts.backbone), hook_count(parts.backbone.model)
    summary = run(changed(parts, lr=1e30), cases, tmp_path / "run")
    assert (summary["n"], summary["failed"]) == (0, 4)
    assert all(r["error"].startswith("the loss is nan after ") for r in read_lines(tmp_path / "run"))
    assert_untouched(parts.backbone, weights, hooks)


# ---------------------------------------------------------------- memory

FULL: dict[str, Callable[[], Any]] = {
    "python": lambda: bytearray(1 << 62),
    "cpu": lambda: torch.empty(1 << 50),
    "device": lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")),
}


def forgetful(fits: Callable[[Sequence[str]], bool], fail: Callable[[], Any]) -> tuple[Any, list[int]]:
    """An ``edit_many`` that runs out of memory for the requests that don't fit."""
    edit_many, sizes = EditMethod.edit_many, []

    def edit(method: Any, backbone: Any, requests: Any, prefixes: Any) -> Any:
        sizes.append(len(requests))
        if not fits([r.id for r in requests]):
            fail()
        return edit_many(method, backbone, requests, prefixes)

    return edit, sizes


@pytest.mark.parametrize("kind", FULL)
def test_out_of_memory_halves_the_batch(parts, cases, tmp_path, monkeypatch, kind: str) -> None:
    run(changed(parts, edit_batch_size=2), cases, tmp_path / "twos")
    edit, sizes = forgetful(lambda ids: len(ids) <= 2, FULL[kind])
    monkeypatch.setattr(EditMethod, "edit_many", edit)
    summary = run(changed(parts, edit_batch_size=4), cases, tmp_path / "run")
    assert sizes == [4, 2, 2]
    assert (summary["n"], summary["failed"]) == (4, 0)
    assert lines(tmp_path / "run") == lines(tmp_path / "twos")


def test_out_of_memory_alone_fails_the_edit_and_the_run_goes_on(parts, cases, tmp_path, monkeypatch) -> None:
    edit, sizes = forgetful(lambda ids: "vqa-2" not in ids, FULL["cpu"])
    monkeypatch.setattr(EditMethod, "edit_many", edit)
    summary = run(changed(parts, edit_batch_size=4), cases, tmp_path / "run")
    assert sizes == [4, 2, 2, 1, 1]
    assert (summary["n"], summary["failed"]) == (3, 1)
    failed = read_lines(tmp_path / "run")[2]
    assert (failed["id"], failed["status"], failed["error"]) == ("vqa-2", "failed", "out of memory")


def test_out_of_memory_in_a_sequence_fails_one_edit(parts, cases, tmp_path, monkeypatch) -> None:
    sequence = changed(parts, **SEQUENCE)
    edit = sequence.method.edit

    def full(backbone: Any, request: Any, *rest: Any) -> Any:
        return FULL["cpu"]() if request.id == "vqa-2" else edit(backbone, request, *rest)

    monkeypatch.setattr(sequence.method, "edit", full, raising=False)
    summary = run(sequence, cases, tmp_path / "run")
    assert (summary["n"], summary["failed"]) == (3, 1)
    failed = [r for r in read_lines(tmp_path / "run") if r["status"] == "failed"]
    assert [(r["case"], r["error"]) for r in failed] == [("vqa-2", "out of memory")] * 2


def test_other_errors_are_not_taken_for_full_memory(parts, cases, tmp_path, monkeypatch) -> None:
    def bug() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    edit, sizes = forgetful(lambda ids: False, bug)
    monkeypatch.setattr(EditMethod, "edit_many", edit)
    with pytest.raises(RuntimeError, match="shapes cannot"):
        run(parts, cases, tmp_path / "run")
    assert sizes == [1]
