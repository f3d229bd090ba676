"""What can be known before a run is said before it; what fails in it takes nothing else along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Project, record
from test_run_edit import ROOT, errors, start

import unike
from unike.config.hparams import HyperParams
from unike.datasets import doctor, lengths
from unike.runs.records import read_records
from unike.system import progress
from unike.types import TooLongError

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


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("more", [[], ["method=mend", "editor_dir=editors"]])
def test_preparing_checks_before_it_loads(copied: Project, capsys, monkeypatch, more: list[str]) -> None:
    from scripts import prepare

    monkeypatch.chdir(copied.root)
    monkeypatch.setattr("unike.backbones.load_backbone", None)
    gone = copied.root / "nope"
    assert prepare.main(["--hparams_dir", str(copied.yaml), *more, f"image_root={gone}"]) == 2
    assert any(f"image_root: {gone}: no such folder" in line for line in errors(capsys))
    assert not gone.exists()


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


def test_output_to_a_full_disk_is_one_line() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "scripts.architecture"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60,
        )  # fmt: skip
    assert done.returncode == 2
    lines = done.stderr.decode().splitlines()
    assert lines
    assert all(line.startswith("error: ") and "No space left" in line for line in lines)


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
    # The YAML's own place comes before the working folder, and an override means the working folder.
    (tmp_path / "empty" / "data").mkdir()
    found = HyperParams.from_hparams(copied.yaml, ["knowledge_dir=knowledge"])
    assert (found.image_root, found.knowledge_dir) == (str(copied.data), "knowledge")
    copied.data.rename(copied.root / "elsewhere")
    found = HyperParams.from_hparams(copied.yaml)
    assert (found.image_root, found.name) == ("data", str(copied.root / "model"))


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


# ---------------------------------------------------------------- what is trained on


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("more", [[], ["method=mend", "editor_dir=editors"]])
def test_a_check_decodes_what_is_trained_on(copied: Project, capsys, monkeypatch, more: list[str]) -> None:
    monkeypatch.chdir(copied.root)
    path = copied.data / "0.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    for check in ([], ["--check"]):
        assert start(copied, *more, *check) == 2
        shown = capsys.readouterr()
        assert "0.png: image cannot be read" in shown.out + shown.err
    path.write_bytes(whole)
    assert start(copied, *more, "--check") == 0


def test_a_train_record_that_is_too_long_is_left_out(copied: Project, caplog) -> None:
    short = [record(i) for i in range(5)]
    copied.write_records([*short, record(4) | {"alt": WORDS}], "vqa", "train")
    output = ("--size", "1", "--no_generated", "triplets=50", "--output")
    assert start(copied, *output, str(copied.root / "a")) == 0
    assert "1 train records are too long for the model" in caplog.text
    caplog.clear()
    copied.write_records(short, "vqa", "train")
    assert start(copied, *output, str(copied.root / "b")) == 0
    assert "too long" not in caplog.text
    one, other = (read_records(copied.root / name)[0] for name in "ab")
    assert (one.scores, one.loss) == (other.scores, other.loss)
