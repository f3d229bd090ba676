"""Options that contradict each other, resumed runs, images and bars: what one line or moment should say."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import Project
from PIL import Image
from test_hostile import png
from test_run_edit import start

from unike.datasets.images import MOST_PIXELS, open_image
from unike.runs.records import read_lines
from unike.system import launching
from unike.system.arguments import ArgumentParser
from unike.types import UserError

# ---------------------------------------------------------------- options


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--seed", "5", "seed=6"], "seed: given twice"),
        (["--seed", "5", "--seed", "6"], "seed: given twice"),
        (["k=1", "k=2"], "k: given twice"),
        (["--k", "2", "--sequence_length", "3"], "sequence_length: given twice"),
        (["coco_image=a", "image_root=b"], "image_root: given twice"),
        (["data.vqa.eval=a", "data.vqa.eval=b"], "data.vqa.eval: given twice"),
        (["data.vqa.eval=a", "data={}"], "data: given twice"),
        (["--size", "1", "--size", "2"], "--size: given twice: 1 and 2"),
        (["--output", "a", "--output", "b"], "--output: given twice: a and b"),
        (["--k", "10"], "sequence_length: has no effect with protocol: one_step"),
        (["--sequences", "3"], "sequences: has no effect with protocol: one_step"),
        (["curve_cases=3"], "curve_cases: has no effect"),
        (["ft_target=projection"], "ft_target: has no effect with method: unike"),
        (["ike_demonstrations=3"], "it belongs to method: ike"),
        (["--num_processes", "10000", "--size", "1"], "num_processes: 10000; expected at most"),
        (
            ["--sequences", "1000000", "--protocol", "sequential"],
            "sequences: expected a whole number between",
        ),
    ],
)
def test_options_that_contradict_or_have_no_effect(copied: Project, capsys, arguments, expected) -> None:
    for more in ([], ["--check"]):
        assert start(copied, *arguments, *more) == 2
        shown = capsys.readouterr()
        assert expected in shown.out + shown.err, shown


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", "5", "seed=5"],
        ["data.vqa.eval={data}/vqa_eval.json", "data.vqa.train={data}/vqa_train.json"],
        ["--protocol", "sequential", "--k", "2", "--sequences", "3"],
        ["method=ft", "ft_target=projection"],
        ["--size", "2", "--size", "2"],
    ],
)
def test_options_that_agree(copied: Project, arguments) -> None:
    assert start(copied, *(a.format(data=copied.data) for a in arguments), "--check") == 0


def test_a_parser_takes_an_option_once() -> None:
    parser = ArgumentParser()
    parser.add_argument("--size", type=int)
    parser.add_argument("--word", action="append")
    parser.add_argument("names", nargs="*")
    found = parser.parse_intermixed_args(["a", "--size", "1", "b", "--word", "x", "--word", "y"])
    assert (found.size, found.word, found.names) == (1, ["x", "y"], ["a", "b"])


def test_no_more_processes_than_cores_serve(monkeypatch) -> None:
    monkeypatch.setattr(launching, "count_cores", lambda: 4)
    launching.check_number(16)
    with pytest.raises(UserError, match="num_processes: 17; expected at most 16 on this machine's 4 cores"):
        launching.check_number(17)
    monkeypatch.setattr(launching, "count_cores", lambda: 64)
    launching.check_number(128)


# ---------------------------------------------------------------- resuming


@pytest.mark.usefixtures("nothing_loads")
def test_a_folder_that_is_not_there_is_not_resumed(copied: Project, capsys) -> None:
    lost = copied.root / "rum"
    for more in ([], ["--check"]):
        assert start(copied, "--output", str(lost), "--resume", *more) == 2
        shown = capsys.readouterr()
        assert f"{lost}: no such folder; expected a run to resume" in shown.out + shown.err
    assert not lost.exists()
    # One that a killed run left empty is.
    lost.mkdir()
    assert start(copied, "--output", str(lost), "--resume", "--check") == 0


@pytest.mark.parametrize("protocol", [[], ["--protocol", "sequential", "--k", "2", "--sequences", "1"]])
def test_a_run_is_resumed_with_its_records(copied: Project, capsys, protocol: list[str]) -> None:
    output = ["--output", str(copied.root / "run"), "--no_generated", *protocol]
    assert start(copied, *output, "--size", "3") == 0
    kept = read_lines(copied.root / "run")
    capsys.readouterr()
    for more in ([], ["--check"]):
        assert start(copied, *output, "--size", "2" if protocol else "1", "--resume", *more) in (0, 2)
        shown = capsys.readouterr()
        if not protocol:
            assert (
                "holds 3 records, among them vqa-1, which is not of this run's 1 cases"
                in shown.out + shown.err
            )
    assert read_lines(copied.root / "run") == kept
    assert start(copied, *output, "--size", "3", "--resume") == 0


# ---------------------------------------------------------------- images


@pytest.mark.parametrize(("width", "height"), [(9400, 9400), (12_000, 3_000), (1, MOST_PIXELS + 1)])
def test_an_image_of_too_many_pixels_costs_nothing(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height))
    started = time.perf_counter()
    with pytest.raises(UserError, match=f"{width * height} pixels; expected at most {MOST_PIXELS}"):
        open_image(path)
    assert time.perf_counter() - started < 1.0


def test_an_icon_that_holds_a_larger_image(tmp_path: Path) -> None:
    inner, path = png(12_000, 12_000), tmp_path / "a.ico"
    entry = bytes([16, 16, 0, 0, 1, 0, 32, 0]) + len(inner).to_bytes(4, "little") + (22).to_bytes(4, "little")
    path.write_bytes(bytes([0, 0, 1, 0, 1, 0]) + entry + inner)
    with pytest.raises(UserError, match=r"a\.ico: "):
        open_image(path)
    out = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(out, "ICO")
    path.write_bytes(out.getvalue())
    assert open_image(path).size == (16, 16)


# ---------------------------------------------------------------- bars


@pytest.mark.parametrize("size", ["1", "3"])
def test_a_bar_moves_when_a_batch_is_done(copied: Project, monkeypatch, size: str) -> None:
    from unike.runs import run as module

    moves: list[int] = []

    class Bar(module.BatchBar):
        def update(self, n: float | None = 1) -> bool | None:
            moves.append(int(n or 0))
            return super().update(n)

    monkeypatch.setattr(module, "BatchBar", Bar)
    assert start(copied, "--no_generated", f"edit_batch_size={size}") == 0
    assert moves == ([1, 1, 1, 1] if size == "1" else [3, 1])


def test_records_are_on_the_disk_before_the_bar_moves(copied: Project, monkeypatch) -> None:
    """A batch's records are written one by one, as they are evaluated."""
    from unike.runs.records import RecordWriter

    written: list[Any] = []
    write = RecordWriter.write

    def stop(self: RecordWriter, one: dict[str, Any]) -> None:
        write(self, one)
        written.append(one["id"])
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RecordWriter, "write", stop)
    output = copied.root / "run"
    assert start(copied, "--no_generated", "edit_batch_size=4", "--output", str(output)) == 130
    assert [r["id"] for r in read_lines(output)] == written == ["vqa-0", "vqa-1"]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["n"] == 2
