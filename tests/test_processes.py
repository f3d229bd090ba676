"""Several processes at one run: their records, knowledge and editors are those of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import die, talk
from helpers import Project
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import run_edit  # noqa: E402
from scripts import prepare  # noqa: E402
from unike.runs.records import SHARDS, read_lines, read_manifest  # noqa: E402
from unike.system import launching, processes  # noqa: E402
from unike.types import UserError  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def one_thread_in_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def shell(project: Project, *arguments: str, script: str = "run_edit.py") -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / script), "--hparams_dir", str(project.yaml), *arguments]
    environment = os.environ | {"PYTHONUTF8": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=project.root, env=environment, stdout=pipe, stderr=pipe, text=True,
        start_new_session=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], code: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


def errors(text: str) -> list[str]:
    return [line for line in text.replace("\r", "\n").splitlines() if line.startswith("error: ")]


def without_times(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_lines(folder)]


# ---------------------------------------------------------------- the same results


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["one_step", "sequential"])
def test_two_processes_write_the_records_of_one(copied: Project, protocol: str) -> None:
    # Whole batches are shared: one large batch would leave nothing to the second process.
    options = ["--protocol", protocol, "edit_batch_size=1"]
    if protocol == "sequential":
        options += ["--sequence_length", "2", "--sequences", "3"]
    out, err = ended(shell(copied, *options, "--output", "two", "--num_processes", "2"), 0)
    assert out.count("Reliability") == 1, "one table"
    assert "Rel " in err
    assert not list((copied.root / "two").glob(SHARDS))
    assert read_manifest(copied.root / "two")["machine"]["processes"] == 2
    together = [file.read_bytes() for file in (copied.root / "knowledge").rglob("*.safetensors")]
    for file in (copied.root / "knowledge").rglob("*.*"):
        file.unlink()
    # A process of its own, too: in one that has run other things, last bits may differ.
    ended(shell(copied, *options, "--output", "one"), 0)
    assert without_times(copied.root / "two") == without_times(copied.root / "one")
    assert len(read_lines(copied.root / "two")) == (4 if protocol == "one_step" else 12)
    alone = [file.read_bytes() for file in (copied.root / "knowledge").rglob("*.safetensors")]
    assert alone == together, "knowledge states and what is learnt from them"
    ours, theirs = (json.loads((copied.root / name / "summary.json").read_text()) for name in ("one", "two"))
    for summary in (ours, theirs):
        assert summary["costs"].pop("seconds")["mean"] == summary.pop("seconds")
        assert summary.pop("peak_memory_bytes")["resident"] > 100 << 20
    assert ours == theirs


@pytest.mark.slow
def test_two_processes_train_the_editor_of_one(copied: Project, capsys: pytest.CaptureFixture[str]) -> None:
    train = [json.loads((copied.data / f"vqa_{split}.json").read_text()) for split in ("train", "eval")]
    copied.write_records((train[0] + train[1]) * 3, split="train")
    options = {
        "method": "mend",
        "editor_rank": 4,
        "editor_steps": 4,
        "editor_val_every": 2,
        "editor_batch": 3,
    }
    files = []
    for number in (1, 2):
        folder = copied.root / f"editors{number}"
        copied.write_yaml(**options, editor_dir=str(folder))
        arguments = ["--hparams_dir", str(copied.yaml), "--num_processes", str(number)]
        assert prepare.main(arguments) == 0
        (file,) = folder.rglob("editor.safetensors")
        files.append((load_file(file), json.loads(file.with_suffix(".json").read_text())["training"]))
    (one, alone), (two, together) = files
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=1e-5)
    assert alone["losses"] == pytest.approx(together["losses"], rel=1e-5)
    assert len(alone["losses"]) == 2
    assert len(set(alone["losses"])) == 2, "training changes something"


# ---------------------------------------------------------------- ends before the end


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ctrl-c", "death"])
def test_what_is_done_is_kept_and_any_number_goes_on(copied: Project, how: str) -> None:
    slow = ("--output", "run", "max_steps=300", "stop_loss=0.0", "edit_batch_size=1")
    folder = copied.root / "run"
    process = shell(copied, *slow, "--num_processes", "2")
    until = time.monotonic() + 120
    # Of both: one that is stopped before its first edit has nothing to sum up.
    while sum(file.stat().st_size > 0 for file in folder.glob(SHARDS)) < 2:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
        out, _ = ended(process, 130)
        assert out.count("Reliability") == 1
        assert json.loads((folder / "summary.json").read_text())["interrupted"]
        done = len(read_lines(folder))
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            pytest.skip("needs /proc to find the processes")
        found = [int(child) for child in children.read_text().split()]
        spawned = [c for c in found if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
        os.kill(spawned[0], signal.SIGKILL)
        _, err = ended(process, 1)
        (line,) = errors(err)
        assert "process 1 of 2 ended with signal 9" in line
        assert "--resume" in line
        done = sum(file.read_bytes().count(b"\n") for file in folder.glob("records*.jsonl"))
    assert 1 <= done < 4
    assert (
        run_edit.main(["--hparams_dir", str(copied.yaml), *slow[2:], "--output", str(folder), "--resume"])
        == 0
    )
    assert [r["id"] for r in read_lines(folder)] == [f"vqa-{i}" for i in range(4)]
    assert not list(folder.glob(SHARDS))


@pytest.mark.slow
def test_a_problem_of_one_process_is_said_once(copied: Project) -> None:
    path = copied.data / "5.png"
    path.write_bytes(path.read_bytes()[:200])
    _, err = ended(shell(copied, "--output", "run", "--num_processes", "2"), 2)
    (line,) = errors(err)
    assert "5.png" in line
    assert "Traceback" not in err


def test_wrong_input_is_said_once_before_processes_start(
    copied: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[int] = []
    monkeypatch.setattr(launching, "launch", lambda number, *_: started.append(number) or 0)
    arguments = ["--hparams_dir", str(copied.yaml), "--num_processes"]
    assert run_edit.main([*arguments, "2", "k=none"]) == 2
    assert run_edit.main([*arguments, "0"]) == 2
    assert len(errors(capsys.readouterr().err)) == 2
    assert started == []
    assert run_edit.main([*arguments, "2"]) == 0
    assert prepare.main([*arguments, "3"]) == 0
    assert started == [2, 3]
    # Under a launcher from outside, the option starts nothing more.
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launching.wants_launch(2)


# ---------------------------------------------------------------- processes of their own


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    assert launching.launch(2, talk, [str(tmp_path)]) == 0
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for rank, found in enumerate(both):
        assert found["gathered"] == [10, 11]
        assert found["first"] == "from 0"
        assert found["in turn"] == rank
        assert found["spread"] == [[0, 0], [1, 1], [2, 0], [3, 1], [4, 0]]
        assert found["heard"] == [0, 1, 2, 3, 4]
        for name in ("spread fails", "each fails", "first fails", "in turn fails"):
            assert found[name] == ["3: is bad"], name
        assert found["share"] == list(range(rank, 5, 2))
        assert found["gradients"] == [[2.0, 1.0], [1.0, 1.0], None]


def test_alone_nothing_is_shared(tmp_path: Path) -> None:
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.spread([1, 2], lambda n: -n) == [-1, -2]
    assert processes.gather("x") == ["x"]
    assert (processes.get_rank(), processes.count(), processes.has_joined()) == (0, 1, False)
    with pytest.raises(UserError) as caught:
        processes.run_once(
            lambda: processes.run_everywhere(lambda: (_ for _ in ()).throw(UserError("a", "b")))
        )
    assert caught.value.problems == ("a", "b")


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        (["0", "0"], 0, None),
        (["2", "2"], 2, None),
        (["3", "2"], 2, None),
        (["0", "7"], 1, "process 2 of 2 ended with code 7"),
        (["kill", "3"], 1, "process 1 of 2 ended with signal 9"),
        (["kill", "wait"], 1, "process 1 of 2 ended with signal 9"),
    ],
)
def test_many_codes_become_one(
    how: list[str], code: int, said: str | None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(launching, "_GRACE", 0.2)
    started = time.monotonic()
    assert launching.launch(2, die, how) == code
    assert time.monotonic() - started < 50, "those that are left are ended"
    lines = errors(capsys.readouterr().err)
    assert [said in line for line in lines] == ([True] if said else [])


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (UserError("a: is wrong", "b: is lost"), 2, ["error: a: is wrong", "error: b: is lost"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (processes.LostError(), 1, [f"error: {processes.LOST}"]),
    ],
)
def test_a_commands_end(fault: BaseException, code: int, said: list[str], monkeypatch, capsys) -> None:
    def work() -> int:
        raise fault

    assert launching.run_guarded(work) == code
    assert capsys.readouterr().err.splitlines() == said
    monkeypatch.setenv("RANK", "1")
    assert launching.run_guarded(work) == code
    assert capsys.readouterr().err == "", "the first process says it"
    assert launching.run_guarded(lambda: 5) == 5


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:1", "one device for 2 processes"), ("cuda:0", "expected auto or cpu")]
)
def test_processes_need_a_device_each(device: str, message: str, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=message):
        processes.join(device)
    assert not processes.has_joined()
