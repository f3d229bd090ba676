"""What can be known before a run is said before it; what fails in it takes nothing else along."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import Project, record
from PIL import Image
from test_hostile import png
from test_run_edit import ROOT, errors, start

import unike
from unike.config.hparams import HyperParams
from unike.datasets import doctor, lengths
from unike.datasets.images import MOST_PIXELS, open_image
from unike.runs.records import read_lines, read_records
from unike.system import launching, progress
from unike.system.arguments import ArgumentParser
from unike.types import TooLongError, UserError

TINY, LONG_NAME = ROOT / "hparams" / "tiny_blip2.yaml", "n" * 300
WORDS = " ".join(["fox"] * 500)


def run(*arguments: str) -> int:
    import run_edit

    return run_edit.main(list(arguments))


# ---------------------------------------------------------------- texts that are too long


def write_long(project: Project, **fields: str) -> None:
    """The last of four records has fields of too many words."""
    project.write_records([*(record(i) for i in (5, 6, 7)), record(8) | fields])


@pytest.mark.usefixtures("nothing_loads")
def test_a_text_that_is_too_long_is_named_before_the_run(copied: Project, capsys) -> None:
    write_long(copied, alt=WORDS)
    assert start(copied, "--check") == 0
    found = [line for line in capsys.readouterr().out.splitlines() if "vqa-3" in line]
    assert len(found) == 1
    assert "record vqa-3: alt: " in found[0]
    assert "the model takes 256; this record will fail" in found[0]
    write_long(copied)
    assert start(copied, "--check") == 0
    assert "will fail" not in capsys.readouterr().out


@pytest.mark.parametrize("field", ["alt", "src", "rephrase", "loc", "loc_ans", "m_loc_q", "m_loc_a"])
def test_one_text_that_is_too_long_takes_no_record_along(copied: Project, capsys, field: str) -> None:
    write_long(copied, **{field: WORDS})
    output = copied.root / "run"
    assert start(copied, "--output", str(output), "--no_generated") == 0
    assert f"note: record vqa-3: {field}: " in capsys.readouterr().err
    *sound, long = read_records(output)
    assert [r.ok for r in (*sound, long)] == [True, True, True, False]
    assert str(long.error).startswith(f"{field}: prompt: ")
    write_long(copied)
    assert start(copied, "--output", str(copied.root / "whole"), "--no_generated") == 0
    whole = read_records(copied.root / "whole")
    assert all(r.ok for r in whole)
    for one, other in zip(sound, whole, strict=False):
        # Smaller batches round the last digits differently.
        assert one.loss == pytest.approx(other.loss, rel=1e-3)
        assert one.answers.keys() == other.answers.keys()
        assert one.scores["teacher_forced"].keys() == other.scores["teacher_forced"].keys()


def test_one_text_that_is_too_long_in_a_sequence(copied: Project) -> None:
    write_long(copied, alt=WORDS)
    output, length = copied.root / "run", ("--sequence_length", "4", "--sequences", "1")
    assert start(copied, "--output", str(output), "--protocol", "sequential", *length) == 0
    failed = {(r.place.position, r.place.kind) for r in read_records(output) if not r.ok and r.place}
    assert len(failed) == 2
    assert len({position for position, _ in failed}) == 1
    assert len(read_records(output)) == 8


def test_one_text_that_is_too_long_in_python(copied: Project) -> None:
    from unike.runs import inputs

    write_long(copied, alt=WORDS)
    editor = unike.MultimodalEditor.from_hparams(HyperParams.from_hparams(copied.yaml), progress=False)
    cases = inputs.open_datasets(editor.hparams, "vqa")
    metrics, _, summary = editor.edit_dataset(cases, generated=False)
    assert ["error" in metric for metric in metrics] == [False, False, False, True]
    assert (summary["n"], summary["failed"]) == (3, 1)
    with pytest.raises(TooLongError, match="expected at most 256"):
        editor.edit_dataset(cases[3:], generated=False)


def test_the_doctor_counts_tokens(copied: Project, capsys) -> None:
    write_long(copied, alt=WORDS)
    path = str(copied.data / "vqa_eval.json")
    assert doctor.main([path]) == 0
    assert "record 3: alt: 1999 characters" in capsys.readouterr().out
    assert doctor.main([path, "--model", str(copied.root / "model")]) == 1
    assert "record 3: alt: " in capsys.readouterr().out
    assert doctor.audit(path, model=copied.root / "model")["too_long"].records == (3,)
    assert doctor.main([path, "--model", str(copied.data)]) == 2
    assert "expected a model's folder" in errors(capsys)[0]
    write_long(copied)
    assert doctor.main([path, "--model", str(copied.root / "model")]) == 0


def test_a_limit_counts_as_the_model_does(copied: Project) -> None:
    limit = lengths.read_limit(str(copied.root / "model"))
    assert limit is not None
    backbone = unike.load_backbone(HyperParams.from_hparams(copied.yaml))
    assert limit.context == backbone.context
    for count in (10, 200, 240, 250, 300):
        text = " ".join(["fox"] * count)
        found = limit.measure(unike.types.Query(str(copied.data / "5.png"), "what is it?", text))
        try:
            backbone.encode([str(copied.data / "5.png")], ["what is it?"], [text])
            fits = True
        except TooLongError:
            fits = False
        # What is named before a run does fail; the words of a dialogue may make a little more too long.
        assert not (found and fits)
    assert found


# ---------------------------------------------------------------- folders and names


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("key", "more"),
    [
        ("knowledge_dir", []),
        ("scope_dir", ["scope_gate=nearest", "scope_measure=trained"]),
        ("editor_dir", ["method=mend"]),
        ("prefix_dir", []),
        ("results_dir", []),
    ],
)
@pytest.mark.parametrize("place", ["small.yaml", "small.yaml/below", "dangling", LONG_NAME])
def test_a_folder_that_cannot_be_one_is_refused(
    copied: Project, capsys, key: str, more: list[str], place
) -> None:
    (copied.root / "dangling").symlink_to(copied.root / "no" / "where")
    path = copied.root / place
    for check in ([], ["--check"]):
        assert start(copied, f"{key}={path}", *more, *check) == 2
        shown = capsys.readouterr()
        lines = [line for line in (shown.out + shown.err).splitlines() if line.startswith(("error: ", "✗"))]
        assert len(lines) == 1, lines
        assert "Traceback" not in shown.err
    assert start(copied, f"{key}={copied.root / 'new' / key}", *more, "--check") == 0


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--output", LONG_NAME],
        ["--output", f"{LONG_NAME}/run"],
        ["--output", "a/" * 3000],
        ["--save_edits", LONG_NAME],
        ["--output", LONG_NAME, "--resume"],
        [f"image_root={LONG_NAME}"],
        [f"results_dir={LONG_NAME}"],
    ],
)
def test_a_name_that_no_disk_takes_is_one_line(copied: Project, capsys, monkeypatch, arguments) -> None:
    monkeypatch.chdir(copied.root)
    for more in ([], ["--check"]):
        assert start(copied, *arguments, *more) == 2
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["run_edit.py", "--hparams_dir", LONG_NAME],
        ["run_edit.py", "ask", "--hparams_dir", str(TINY), "--edits", LONG_NAME, "what?"],
        ["run_edit.py", "ask", "--hparams_dir", str(TINY), "--edits", ".", "--image", LONG_NAME, "what?"],
        ["-m", "unike.edits", "list", LONG_NAME],
        ["-m", "unike.report", LONG_NAME],
        ["-m", "unike.tables", "compare", LONG_NAME, LONG_NAME],
        ["-m", "unike.datasets.doctor", LONG_NAME],
        ["-m", "scripts.prepare", "--hparams_dir", LONG_NAME],
        ["-m", "scripts.tables", "--table", "1", "--plan", LONG_NAME],
        ["-m", "scripts.tables", "--table", "1", "--write", LONG_NAME],
        ["-m", "scripts.architecture", "--write", LONG_NAME],
        ["-m", "scripts.tiny.make_data", "--out", LONG_NAME],
        ["run_edit.py", "--hparams_dir", "/dev/zero"],
        ["-m", "scripts.tables", "--table", "1", "--plan", "/dev/zero"],
        ["-m", "unike.datasets.doctor", "/dev/zero"],
        ["run_edit.py", "ask", "--hparams_dir", str(TINY), "--edits", ".", "--image", "/dev/zero", "what?"],
    ],
    ids=lambda command: " ".join(part[:20] for part in command[:5]),
)
def test_bad_names_from_the_shell(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())


# ---------------------------------------------------------------- nobody reads any more


@pytest.mark.parametrize(
    "command",
    [
        "run_edit.py --hparams_dir hparams/tiny_blip2.yaml --check",
        "run_edit.py --help",
        "run_edit.py ask --help",
        "run_edit.py --hparams_dir lost.yaml",
        "-m unike.edits --help",
        "-m unike.report --help",
        "-m unike.tables --help",
        "-m unike.datasets.doctor tests/fixtures/before_the_move/data/vqa_eval.json",
        "-m unike.datasets.doctor --help",
        "-m scripts.prepare --help",
        "-m scripts.tables --help",
        "-m scripts.figures --help",
        "-m scripts.reference --check",
        "-m scripts.architecture",
        "-m scripts.notebooks --help",
        "-m scripts.tiny.make_data --help",
        "-m unike.demo --help",
    ],
)
@pytest.mark.parametrize("both", [False, True], ids=["stdout", "both"])
def test_a_closed_pipe_ends_quietly(command: str, both: bool) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    error = writing if both else subprocess.PIPE
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, stdout=writing, stderr=error, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(writing)
    assert done.returncode in (0, 2, 141) if "lost" in command else done.returncode in (0, 141)
    if not both:
        lines = done.stderr.decode().splitlines()
        assert all(line.startswith("error: ") for line in lines), lines


# ---------------------------------------------------------------- a check says what a run would


@pytest.mark.usefixtures("nothing_loads")
def test_a_check_decodes_the_images(copied: Project, capsys) -> None:
    path = copied.data / "6.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    for more in ([], ["--check"]):
        assert start(copied, *more) == 2
        shown = capsys.readouterr()
        assert "6.png: image cannot be read" in shown.out + shown.err
        assert "record vqa-0: " in shown.out + shown.err
    assert start(copied, "--check", "--skip_broken") == 0
    assert "6.png" in capsys.readouterr().out
    path.write_bytes(whole)
    assert start(copied, "--check") == 0


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--protocol", "sequential", "--k", "100000"], "sequence_length: 100000; the data hold at most 200"),
        (["--protocol", "cross_task", "--k", "402"], "sequence_length: 402; the data hold at most 400"),
        (
            ["--protocol", "cross_task", "--k", "4", "--task", "vqa"],
            "task: vqa; protocol cross_task needs both",
        ),
    ],
)
def test_sequences_of_a_benchmark_that_is_not_drawn(
    tmp_path: Path, capsys, monkeypatch, more, expected
) -> None:
    source = copy_tiny(tmp_path)
    for check in ([], ["--check"]):
        assert run("--hparams_dir", str(source), *more, *check) == 2
        shown = capsys.readouterr()
        assert expected in shown.out + shown.err
    assert run("--hparams_dir", str(source), "--protocol", "sequential", "--k", "200", "--check") == 0


def copy_tiny(folder: Path) -> Path:
    """A YAML of a toy model as in a fresh clone, its benchmark not drawn yet."""
    text = TINY.read_text().replace("./hugging_cache", str(ROOT / "hugging_cache"))
    source = folder / "hparams" / "tiny.yaml"
    source.parent.mkdir(exist_ok=True)
    source.write_text(text.replace("./data", str(folder / "data")))
    return source


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("yaml", ["tiny_blip2.yaml", "scoped/tiny_blip2.yaml", "mend/tiny_blip2.yaml"])
def test_what_was_made_for_another_model_is_refused(capsys, yaml: str) -> None:
    at = str(ROOT / "hparams" / yaml)
    for more in ([], ["--check"]):
        assert run("--hparams_dir", at, "name=Salesforce/blip2-opt-2.7b", *more) == 2
        shown = capsys.readouterr()
        text = shown.out + shown.err
        assert "was made for the model in tiny-blip2-opt, not for name: Salesforce/blip2-opt-2.7b" in text
    # A copy of the model is the model.
    same = ROOT / "hugging_cache" / "." / "tiny-blip2-opt"
    assert run("--hparams_dir", at, f"name={same}", "--check") == 0


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("yaml", ["tiny_blip2.yaml", "mend/tiny_blip2.yaml"])
@pytest.mark.parametrize("change", ["seed", "steps"])
def test_another_seed_in_a_fresh_clone(tmp_path: Path, capsys, monkeypatch, yaml: str, change: str) -> None:
    from unike.runs import checks
    from unike.runs.request import RunRequest

    text = (ROOT / "hparams" / yaml).read_text().replace("./hugging_cache", str(ROOT / "hugging_cache"))
    source = tmp_path / "tiny.yaml"
    source.write_text(text.replace("./data", str(tmp_path / "data")))
    key = {"seed": "seed=5", "steps": "editor_steps=7" if "mend" in yaml else "encoder_steps=7"}[change]
    hparams = HyperParams.from_hparams(source, [key])
    request = RunRequest(hparams, size=1)
    assert request.undrawn_splits == ["train", "eval"]
    notes = checks.require(request)
    assert len(notes) == 1
    assert "trained first, up to" in notes[0] if "mend" in yaml else "built anew" in notes[0]
    plain = RunRequest(HyperParams.from_hparams(source), size=1)
    assert plain.undrawn_splits == ["eval"]
    assert checks.require(plain) == []


def test_a_long_stage_is_announced_with_its_time(monkeypatch, capsys) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.show_progress({"training": 1000, "short": 10}) as tick:
        for _ in range(6):
            tick("training", 1)
            now[0] += 1.2
        for _ in range(6):
            tick("short", 1)
            now[0] += 1.2
    shown = capsys.readouterr().err
    assert "training: about 20 minutes for 1000 steps" in shown
    assert shown.count("minutes") == 1
    with progress.show_progress({"training": 1000}, progress=False) as tick:
        tick("training", 1)
        now[0] += 100
        tick("training", 1)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- from another folder


@pytest.mark.usefixtures("nothing_loads")
def test_a_run_is_checked_alike_from_any_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    here = HyperParams.from_hparams("hparams/tiny_blip2.yaml")
    assert here.name == "./hugging_cache/tiny-blip2-opt"
    monkeypatch.chdir(tmp_path)
    there = HyperParams.from_hparams(TINY)
    for key in ("name", "knowledge_dir", "scope_dir", "image_root"):
        assert Path(getattr(there, key)) == ROOT / getattr(here, key)
    assert Path(str(there.data["vqa"]["eval"])) == ROOT / "data" / "tiny" / "blip2" / "vqa_eval.json"
    assert there.results_dir == here.results_dir
    assert run("--hparams_dir", str(TINY), "--check") == 0
    assert list(tmp_path.iterdir()) == []


def test_paths_beside_the_yaml(copied: Project, monkeypatch, tmp_path: Path) -> None:
    data = {t: {"eval": f"data/{t}_eval.json"} for t in ("vqa", "caption")}
    copied.write_yaml(name="model", knowledge_dir="knowledge", image_root="data", data=data)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    found = HyperParams.from_hparams(copied.yaml)
    assert (found.name, found.image_root) == (str(copied.root / "model"), str(copied.data))
    assert found.data["vqa"]["eval"] == str(copied.data / "vqa_eval.json")
    # The working folder comes first, and an override means the working folder.
    (tmp_path / "empty" / "data").mkdir()
    found = HyperParams.from_hparams(copied.yaml, ["knowledge_dir=knowledge"])
    assert (found.image_root, found.knowledge_dir) == ("data", "knowledge")


def test_a_hub_name_stays_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "a.yaml"
    source.write_text("model_name: blip2\nname: Salesforce/blip2-opt-2.7b\nimage_root: images\n")
    assert HyperParams.from_hparams(source).name == "Salesforce/blip2-opt-2.7b"
    (tmp_path / "sub").mkdir()
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    found = HyperParams.from_hparams(source)
    assert (found.name, found.image_root) == ("Salesforce/blip2-opt-2.7b", str(tmp_path / "images"))


@pytest.mark.usefixtures("nothing_loads")
def test_a_missing_path_says_where_it_was_looked_for(copied: Project, capsys, monkeypatch) -> None:
    monkeypatch.chdir(copied.root)
    copied.write_yaml(name="nowhere", data={"vqa": {"eval": "lost.json"}})
    assert start(copied) == 2
    lines = errors(capsys)
    assert sum(f"looked for in {copied.root}" in line for line in lines) == 2


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

    class Bar(module.tqdm):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> bool | None:
            moves.append(int(n or 0))
            return super().update(n)

    monkeypatch.setattr(module, "tqdm", Bar)
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
