"""Run folders: a killed run loses nothing complete and doubles nothing."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unike.runs.records import RECORDS, SHARDS, RecordWriter, merge, read_lines, read_manifest
from unike.system.files import write_json
from unike.types import UserError

HPARAMS = {"k": 40, "layers": [1, 2], "data": {"vqa": {"train": "a.json"}}, "tau": None}
CASES = [
    {"id": "vqa-0", "answers": "naïve } \n\u2028 {", "loss": 0.5},
    {"id": "vqa-1", "nested": {"id": "x", "list": [1, {"a": "b\\"}]}},
    {"id": "ü", "status": "failed"},
]


def lines(folder):
    return (folder / RECORDS).read_bytes().split(b"\n")


def write_all(folder, cases=CASES):
    with RecordWriter(folder, False, HPARAMS) as writer:
        for case in cases:
            writer.write(case)


def problems_of(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        RecordWriter(*args, **kwargs)
    return caught.value.problems


def test_records_come_back(tmp_path):
    write_all(tmp_path / "results" / "run")
    assert read_lines(tmp_path / "results" / "run") == CASES
    assert lines(tmp_path / "results" / "run")[-1] == b""


def test_each_record_is_on_the_disk_at_once(tmp_path, monkeypatch):
    synced = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), sync(fd)))
    writer = RecordWriter(tmp_path / "run", False, HPARAMS)
    synced.clear()
    for number, case in enumerate(CASES, start=1):
        writer.write(case)
        assert read_lines(tmp_path / "run") == CASES[:number]
        assert len(synced) == number
    writer.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_at_any_byte_and_resumed(tmp_path, data):
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    write_all(folder)
    whole = (folder / RECORDS).read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    (folder / RECORDS).write_bytes(whole[:cut])
    # A record is complete once its last brace is written; the line's end may be missing.
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    complete = sum(end <= cut for end in ends)
    assert read_lines(folder) == CASES[:complete]
    with RecordWriter(folder, True, HPARAMS) as writer:
        assert writer.list_done() == {case["id"] for case in CASES[:complete]}
        for case in CASES:
            if case["id"] not in writer.list_done():
                writer.write(case)
    assert (folder / RECORDS).read_bytes() == whole


def test_a_torn_line_is_said(tmp_path, caplog):
    write_all(tmp_path / "run")
    with open(tmp_path / "run" / RECORDS, "ab") as file:
        file.write(b'{"id": "vqa-9", "los')
    with caplog.at_level(logging.WARNING, logger="unike"):
        RecordWriter(tmp_path / "run", True, HPARAMS).close()
    assert "half written" in caplog.text
    assert read_lines(tmp_path / "run") == CASES


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    write_all(tmp_path / "run")
    path = tmp_path / "run" / RECORDS
    path.write_bytes(path.read_bytes().replace(b'"vqa-1"', b'"vqa-1'))
    (problem,) = problems_of(tmp_path / "run", True, HPARAMS)
    assert problem.startswith(f"{path}:2: is not a record")


def test_a_failed_write_leaves_whole_lines(tmp_path, monkeypatch):
    writer = RecordWriter(tmp_path / "run", False, HPARAMS)
    writer.write(CASES[0])

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, line):
            self.file.write(line[:5])
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_file", Full(writer._file))
        with pytest.raises(UserError, match="cannot be written: No space"):
            writer.write(CASES[1])
    writer.write(CASES[1])
    writer.close()
    assert read_lines(tmp_path / "run") == CASES[:2]


def test_an_id_is_written_once(tmp_path):
    with RecordWriter(tmp_path / "run", False, HPARAMS) as writer:
        writer.write(CASES[0])
        with pytest.raises(ValueError, match="already written"):
            writer.write(CASES[0])
        with pytest.raises(KeyError):
            writer.write({"status": "ok"})


def test_a_used_folder_is_refused(tmp_path):
    write_all(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert "holds a run already" in problems_of(tmp_path / "run", False, HPARAMS)[0]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    assert "no manifest.json" in problems_of(tmp_path / "notes", True, HPARAMS)[0]
    (tmp_path / "file").write_text("x")
    assert "cannot be made a run folder" in problems_of(tmp_path / "file", True, HPARAMS)[0]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_changed_inputs_are_refused_and_shown(tmp_path):
    with RecordWriter(tmp_path / "run", False, HPARAMS, weights={"a.pth": "11"}) as writer:
        writer.write(CASES[0])
    former = (tmp_path / "run" / "manifest.json").read_bytes()
    changed = {"k": 10, "layers": (1, 2), "data": {"vqa": {"train": "b.json"}}, "beta": 0.5}
    found = problems_of(tmp_path / "run", True, changed, weights={"a.pth": "12"})
    at = tmp_path / "run"
    assert found == (
        f"{at}: beta: 'absent' in the run to resume, 0.5 now",
        f"{at}: data.vqa.train: 'a.json' in the run to resume, 'b.json' now",
        f"{at}: k: 40 in the run to resume, 10 now",
        f"{at}: tau: None in the run to resume, 'absent' now",
        f"{at}: weights: a.pth: '11' in the run to resume, '12' now",
    )
    assert (tmp_path / "run" / "manifest.json").read_bytes() == former
    RecordWriter(tmp_path / "run", True, HPARAMS, weights={"a.pth": "11"}).close()


def test_manifest(tmp_path):
    RecordWriter(
        tmp_path / "run", False, HPARAMS, seed=7, weights={"w": "1"}, data={"d": "2"}, command=["run", "-x"]
    ).close()
    manifest = read_manifest(tmp_path / "run")
    assert (manifest["hparams"], manifest["seed"], manifest["command"]) == (HPARAMS, 7, ["run", "-x"])
    assert (manifest["weights"], manifest["data"]) == ({"w": "1"}, {"d": "2"})
    assert set(manifest["versions"]) == {"python", "torch", "transformers", "unike"}
    RecordWriter(tmp_path / "run", True, HPARAMS, weights={"w": "1"}, data={"d": "2"}).close()
    resumed = read_manifest(tmp_path / "run")
    assert len(resumed.pop("resumed")) == 1
    assert resumed == manifest


def test_fresh_folders_of_all_kinds(tmp_path):
    RecordWriter(tmp_path / "new", True, HPARAMS).close()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".manifest.json.12.tmp").write_text('{"hpar')
    RecordWriter(tmp_path / "killed", False, HPARAMS).close()
    assert read_lines(tmp_path / "killed") == []
    with pytest.raises(UserError, match="no such file"):
        read_lines(tmp_path)
    with pytest.raises(UserError, match="manifest"):
        read_manifest(tmp_path)


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_values_outside_json(tmp_path):
    with RecordWriter(tmp_path / "run", False, HPARAMS) as writer:
        writer.write({"id": 3, "loss": float("nan"), "x": np.float32(0.5), "y": np.array([1, np.inf])})
        writer.write({"id": "s", "text": "\ud800", "path": Path("a") / "b", "t": (1, 2)})
        writer.write_summary({"n": 2})
        assert writer.list_done() == {"3", "s"}
    first, second = read_lines(tmp_path / "run")
    assert first == {"id": 3, "loss": None, "x": 0.5, "y": [1.0, None]}
    assert second == {"id": "s", "text": "\ud800", "path": os.path.join("a", "b"), "t": [1, 2]}
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"n": 2}


# ---------------------------------------------------------------- several processes

MANY = [{"id": f"vqa-{i}", "loss": i / 7} for i in range(5)]
ORDER = [case["id"] for case in MANY]


def write_shares(folder, count=2, cases=MANY):
    """As ``count`` processes leave their files behind when all of them are killed."""
    writers = [RecordWriter(folder, False, HPARAMS, rank=rank) for rank in range(count)]
    for number, case in enumerate(cases):
        writers[number % count].write(case)
    for writer in writers:
        writer.close()


def test_processes_write_files_of_their_own_that_are_merged_in_order(tmp_path):
    folder = tmp_path / "run"
    writers = [RecordWriter(folder, False, HPARAMS, rank=rank) for rank in (0, 1)]
    for number, case in enumerate(MANY):
        writers[1 - number % 2].write(case)
        assert read_lines(folder) == []
    assert len(list(folder.glob(SHARDS))) == 2
    writers[1].finish(ORDER)
    assert read_lines(folder) == [], "the first process merges"
    writers[0].finish(ORDER)
    assert read_lines(folder) == MANY
    assert not list(folder.glob(SHARDS))
    assert {path.name for path in folder.iterdir()} == {RECORDS, "manifest.json"}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_files_of_processes_cut_anywhere_and_resumed_by_any_number(tmp_path, data):
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    write_shares(folder, data.draw(st.integers(1, 4)))
    shards = sorted(folder.glob(SHARDS))
    complete = set()
    for shard in shards:
        whole = shard.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        shard.write_bytes(whole[:cut])
        rest = whole[:cut].split(b"\n")
        complete |= {json.loads(line)["id"] for line in rest if line.endswith(b"}")}
    count = data.draw(st.integers(0, 3))
    ranks = list(range(count)) or [None]
    writers = [RecordWriter(folder, True, HPARAMS, rank=rank) for rank in ranks]
    assert all(writer.list_done() == complete for writer in writers)
    for number, case in enumerate(case for case in MANY if case["id"] not in complete):
        writers[number % len(writers)].write(case)
    for writer in reversed(writers):
        writer.finish(ORDER)
    assert read_lines(folder) == MANY
    assert not list(folder.glob(SHARDS))


def test_a_kill_between_merging_and_removing_doubles_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    write_shares(folder)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: missing_ok or killed(path))
        with pytest.raises(KeyboardInterrupt):
            merge(folder, ORDER)
    assert len(list(folder.glob(SHARDS))) == 2
    with RecordWriter(folder, True, HPARAMS) as writer:
        assert writer.list_done() == set(ORDER)
    assert read_lines(folder) == MANY


def test_records_outside_the_order_stay(tmp_path):
    write_all(tmp_path / "run", MANY)
    former = (tmp_path / "run" / RECORDS).read_bytes()
    merge(tmp_path / "run", ["vqa-0", "vqa-1"])
    assert (tmp_path / "run" / RECORDS).read_bytes() == former
    merge(tmp_path / "run", ["vqa-3", "vqa-0"])
    assert [record["id"] for record in read_lines(tmp_path / "run")] == [
        "vqa-3", "vqa-0", "vqa-1", "vqa-2", "vqa-4"
    ]  # fmt: skip


def test_one_process_stops_the_others(tmp_path):
    folder = tmp_path / "run"
    first, second = (RecordWriter(folder, False, HPARAMS, rank=rank) for rank in (0, 1))
    assert not first.is_stopped()
    second.stop()
    assert first.is_stopped()
    second.close()
    first.close()
    again = RecordWriter(folder, True, HPARAMS, rank=0)
    assert not again.is_stopped(), "a new start is not stopped by the former one"
    again.close()
    with RecordWriter(tmp_path / "alone", False, HPARAMS) as alone:
        alone.stop()
        assert not alone.is_stopped()


def test_what_a_run_is_made_on_is_told_and_not_compared(tmp_path):
    RecordWriter(tmp_path / "run", False, HPARAMS, about={"machine": {"processes": 2}}).close()
    RecordWriter(tmp_path / "run", True, HPARAMS, about={"machine": {"processes": 1}}).close()
    assert read_manifest(tmp_path / "run")["machine"] == {"processes": 2}
