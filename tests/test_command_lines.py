"""Command lines that nobody means: each is refused in one line by the run and by ``--check`` alike, before a
model is loaded or anything is written."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import Project, save_pictures
from test_edit_store import made
from test_run_edit import ROOT, errors, start
from test_user_files import MINE, list_all

import run_edit
from scripts import figures, tables
from scripts.tiny import make_data, scenes
from unike.config.hparams import OPTIONS, HyperParams
from unike.config.kinds import MOST
from unike.edits import EditStore
from unike.edits.__main__ import main as edits_main
from unike.runs.drawing import check_drawing, get_drawing_folder, get_drawing_lock
from unike.types import UserError

TINY = ROOT / "hparams" / "tiny_minigpt4.yaml"


def refused(project: Project, capsys, arguments: list[str], expected: str) -> None:
    """Both refuse, with this line, and leave all files as they were."""
    files = list_all(project.root)
    for more in ([], ["--check"]):
        assert start(project, *arguments, *more) == 2
        shown = capsys.readouterr()
        assert expected in shown.out + shown.err, shown
    assert list_all(project.root) == files


# ---------------------------------------------------------------- numbers


NUMBERS = [n for n, o in OPTIONS.items() if "number" in o.kind.words and n not in ("layers", "device")]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_limit(copied: Project, name: str) -> None:
    # The number of layers is compared with the decoder's.
    for value in ("9" * 40, "1e300"):
        with pytest.raises(UserError, match=rf"{name}: expected .*got (int|str) '?[19]"):
            HyperParams.from_hparams(copied.yaml, [f"{name}={value}"])


def test_a_limit_that_is_not_an_options_own_is_named(copied: Project) -> None:
    with pytest.raises(UserError, match=f"n_keys: expected a whole number at least 1, and at most {MOST}"):
        HyperParams.from_hparams(copied.yaml, [f"n_keys={MOST + 1}"])
    assert HyperParams.from_hparams(copied.yaml, [f"n_keys={MOST}"]).n_keys == MOST
    # One's own is named alone.
    with pytest.raises(UserError, match="image_size: expected a whole number between 1 and 8192 or null"):
        HyperParams.from_hparams(copied.yaml, ["image_size=1000000000000"])


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("layers=1000", "layers: 1000; the decoder has "),
        ("layers=[0,77]", "layers: [77]; expected numbers from 0 to "),
        ("image_size=1", "image_size: 1; expected at least "),
        ("device=99999999999999999999", "device: expected auto, cpu, cuda"),
        ("device=cuda:12345", "device: expected auto, cpu, cuda"),
    ],
)
def test_what_the_models_folder_tells_is_said_before_it_loads(
    copied: Project, capsys, option: str, expected: str
) -> None:
    refused(copied, capsys, [option], expected)
    assert start(copied, "layers=1", "--check") == 0


# ---------------------------------------------------------------- options without effect

OVERLAP = ("scope_gate=nearest", "scope_measure=overlap", "scope_overlap=0.5")
BOTH = ("scope_gate=nearest", "scope_measure=both", "scope_overlap=0.5")
TRAINED = ("scope_gate=nearest", "scope_measure=trained", "scope_dir={root}/s")


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["method=ft", "k=3"], "k: has no effect with method: ft; it belongs to method: unike"),
        (["method=ft", "alpha=0.5"], "alpha: has no effect with method: ft"),
        (["method=ft", "n_keys=3"], "n_keys: has no effect with method: ft; it belongs to method: unike, tp"),
        (["method=tpatcher", "activation_loss=1", "beta=1"], "beta: has no effect with method: tpatcher"),
        (["method=mend", "editor_dir={root}/e", "lr=1"], "lr: has no effect with method: mend"),
        (["editor_lr=1"], "editor_lr: has no effect with method: unike; it belongs to method: ke, mend, ser"),
        (["scope_overlap_tokens=3"], "scope_overlap_tokens: has no effect with scope_overlap: null"),
        (["method=ft", "scope_gate=nearest"], "scope_measure: cosine: is UniKE's own; expected trained, ov"),
        (["scope_threshold=0.5"], "scope_threshold: has no effect with scope_gate: none; give both"),
        (
            ["method=ft", "scope_measure=both"],
            "scope_measure: has no effect with scope_gate: none; give both",
        ),
        (
            [*OVERLAP, "scope_threshold=0.5"],
            "scope_threshold: has no effect with scope_measure: overlap; it",
        ),
        ([*OVERLAP, "scope_halves=both"], "scope_halves: has no effect with scope_measure: overlap; such a"),
        ([*OVERLAP, "scope_layer=1"], "scope_layer: has no effect with scope_measure: overlap; no scope"),
        ([*OVERLAP, "scope_recall=0.9"], "scope_recall: has no effect with scope_measure: overlap; no scope"),
        ([*TRAINED, "scope_recall_few=0.9"], "scope_recall_few: has no effect with scope_measure: trained"),
        (["alpha_overlap=true"], "alpha_overlap: has no effect with scope_overlap: null; give both"),
        (["method=ft", "alpha_overlap=true"], "alpha_overlap: has no effect with scope_overlap: null; give"),
        (
            ["method=ft", "alpha_overlap=true", *OVERLAP],
            "alpha_overlap: has no effect with method: ft; it belongs to",
        ),
        (
            ["method=ft", *TRAINED, "scope_threshold=0.5", "scope_recall=0.9"],
            "scope_threshold: 0.5: decides alone; expected null with scope_recall or scope_recall_few",
        ),
        (["scope_gate=nearest", "scope_layer=1"], "scope_layer: has no effect with scope_measure: cosine"),
        ([*TRAINED, "scope_layer=1"], "scope_layer: has no effect with scope_measure: trained; no scope"),
        (
            [*TRAINED, "method=ft", "scope_halves=both"],
            "scope_halves: has no effect with method: ft; it bel",
        ),
        (["scope_probes=hard"], "scope_probes: has no effect without a trained scope classifier; it needs a"),
        (["method=ft", "scope_steps=3"], "scope_steps: has no effect without a trained scope classifier"),
        (
            ["method=ft", "scope_gate=nearest", "scope_overlap=0.5", "scope_measure=cosine"],
            "scope_measure: has no effect with method: ft: cosine is UniKE's own, and scope_overlap decides",
        ),
        (["benchmark_version=2"], "benchmark_version: has no effect with generate_data: false"),
        (["own.a=1"], "own: has no effect with method: unike"),
        (["vision_config.depth=1"], "vision_config: has no effect with the folder "),
        (["qformer_config.num_hidden_layers=1"], "qformer_config: has no effect with the folder "),
    ],
)
def test_an_option_that_nothing_reads(copied: Project, capsys, arguments: list[str], expected: str) -> None:
    refused(copied, capsys, [a.format(root=copied.root) for a in arguments], expected)


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    "arguments",
    [
        ["k=3", "alpha=0.5", "n_keys=3", "beta=1", "lr=1", "scope_gate=none", "key_init=query"],
        ["method=ft", "lr=1", "max_steps=3", "seed=3", "layers=1"],
        ["method=ft", "scope_overlap=0.5", "scope_overlap_tokens=3", "scope_gate=nearest"],
        ["method=ft", *OVERLAP],
        [*OVERLAP, "scope_overlap_tokens=3"],
        ["scope_gate=nearest", "scope_threshold=0.5", "scope_halves=both"],
        [*TRAINED, "scope_threshold=0.5", "scope_halves=both", "scope_probes=hard"],
        [
            *BOTH,
            "scope_dir={root}/s",
            "scope_threshold=null",
            "scope_recall=0.9",
            "scope_recall_few=0.8",
            "alpha_overlap=true",
        ],
        ["method=ft", *TRAINED, "scope_threshold=null", "scope_layer=2", "scope_recall=0.9", "layers=1"],
        ["method=ft", *BOTH, "scope_dir={root}/s", "scope_layer=0", "layers=1"],
        ["method=tpatcher", "activation_loss=1", "n_keys=3", "lr=1"],
        ["method=mend", "editor_dir={root}/e", "editor_lr=1", "clip_norm=1", "answer_end=eos"],
    ],
)
def test_options_that_are_read(copied: Project, arguments: list[str]) -> None:
    assert start(copied, *(a.format(root=copied.root) for a in arguments), "--check") == 0


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("key", ["scope_recall", "scope_recall_few"])
def test_a_classifier_without_shares_has_no_recall(capsys, key: str) -> None:
    """The classifiers of version 1 are of the time before shares of prompts were measured."""
    former = ("scope_probes=recombined", "scope_records=2000", "scope_steps=1000", "scope_patience=null")
    other = {"scope_recall": "scope_recall_few=null", "scope_recall_few": "scope_recall=null"}[key]
    line = ["--hparams_dir", str(ROOT / "hparams/scoped/tiny_blip2.yaml"), "--task", "vqa", "--check"]
    line += [*former, other]
    assert run_edit.main([*line, f"{key}=0.9"]) == 2
    said = capsys.readouterr().out
    assert f"{key}: " in said
    assert "scope.json is of an earlier version, without the shares of prompts that pass; expected" in said
    assert run_edit.main([*line, f"{key}=null"]) == 0


# ---------------------------------------------------------------- folders


@pytest.mark.usefixtures("nothing_loads")
def test_there_is_no_last_run_to_resume(copied: Project, capsys) -> None:
    refused(copied, capsys, ["--resume"], "results/small-vqa: no run to resume; name its --output, or leave")
    refused(copied, capsys, ["--output", "", "--resume"], "output: is empty; expected a folder")
    refused(copied, capsys, ["--output", " "], "output: is empty; expected a folder")
    assert start(copied, "--check") == 0


def put_lock(folder: Path, kind: str) -> Path:
    mine = folder.parent / "mine.txt"
    mine.write_text(MINE)
    (folder / ".lock").unlink(missing_ok=True)
    if kind == "link":
        (folder / ".lock").symlink_to(mine)
    else:
        (folder / ".lock").write_text(MINE)
    return mine


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_stores_lock_is_looked_at_before_the_run(copied: Project, capsys, kind: str) -> None:
    store = EditStore(copied.root / "store")
    store.add(made("other"))
    assert start(copied, "--save_edits", str(store.folder), "--check") == 0
    mine = put_lock(store.folder, kind)
    refused(copied, capsys, ["--save_edits", str(store.folder)], "store/.lock: ")
    assert mine.read_text() == MINE


def test_a_store_keeps_an_edit_of_the_same_words_and_another_image(copied: Project, capsys) -> None:
    kept = ["--save_edits", str(copied.root / "store"), "--size", "1", "--no_generated"]
    assert start(copied, *kept, "--output", str(copied.root / "a")) == 0
    before = list_all(copied.root / "store")
    other = copied.root / "other"
    save_pictures(other)
    shutil.copy(other / "7.png", other / "5.png")
    capsys.readouterr()
    refused(copied, capsys, [*kept, f"image_root={other}"], "holds vqa-0 of another run")
    # The same request again replaces its own edit, wherever its image lies.
    shutil.copy(copied.data / "5.png", other / "5.png")
    assert start(copied, *kept, f"image_root={other}", "--check") == 0
    assert list_all(copied.root / "store").keys() == before.keys()


# ---------------------------------------------------------------- questions


@pytest.mark.usefixtures("nothing_loads")
def test_a_question_that_is_too_long_is_named_before_the_model_loads(copied: Project, capsys) -> None:
    store, words = EditStore(copied.root / "store"), "fox " * 400
    store.add(made("other"))
    yaml = ["--hparams_dir", str(copied.yaml)]
    asked = ["ask", *yaml, "--edits", str(store.folder)]
    applied = ["apply", str(store.folder), *yaml, "--prompt"]
    expected = "tokens; expected at most 256, the decoder's context"
    assert run_edit.main([*asked, words]) == 2
    assert expected in errors(capsys)[0]
    assert edits_main([*applied, words]) == 2
    assert expected in errors(capsys)[0]
    # A shorter one gets as far as the model.
    with pytest.raises(AssertionError, match="a backbone is loaded"):
        run_edit.main([*asked, "fox"])
    with pytest.raises(AssertionError, match="a backbone is loaded"):
        edits_main([*applied, "fox"])


def test_edits_of_which_no_question_can_be_asked(copied: Project, capsys) -> None:
    folder = copied.root / "store"
    kept = ["--save_edits", str(folder), "--size", "1", "--no_generated"]
    assert start(copied, *kept, "--output", str(copied.root / "a")) == 0
    command = ["apply", str(folder), "--hparams_dir", str(copied.yaml)]
    assert edits_main(command) == 0
    (copied.data / "5.png").unlink()
    capsys.readouterr()
    assert edits_main(command) == 1
    shown = capsys.readouterr()
    assert "0 of 0 answers equal the target; 1 left out" in shown.out
    assert shown.err.splitlines()[-1] == "error: no question could be evaluated"
    # Another question needs none of theirs.
    assert edits_main([*command, "--prompt", "fox"]) == 0


# ---------------------------------------------------------------- drawing


def draw(*arguments: str) -> int:
    return make_data.main(["--hparams_dir", str(TINY), "--splits", "eval", "--records", "2", *arguments])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--out", ""], "--out: is empty; expected a folder"),
        (["--out", "drawn", "--seed", "-1"], "--seed: -1; expected 0 to 4294967295"),
        (["--out", "drawn", "--seed", "9" * 30], "expected 0 to 4294967295"),
    ],
)
def test_nothing_is_drawn_for_such_arguments(
    tmp_path: Path, capsys, monkeypatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("unike.backbones.load_backbone", None)
    assert draw(*arguments) == 2
    assert expected in errors(capsys)[0]
    assert list_all(tmp_path) == {}


def test_drawing_leaves_the_working_folder_alone(tmp_path: Path, monkeypatch) -> None:
    made_in: list[Path] = []
    monkeypatch.setattr("unike.backbones.load_backbone", lambda _: None)
    monkeypatch.setattr(scenes, "load_textures", lambda cache: made_in.append(cache) or {})
    monkeypatch.setattr(make_data.Artist, "__init__", lambda *_: (_ for _ in ()).throw(UserError("enough")))
    monkeypatch.chdir(tmp_path)
    assert draw("--out", "drawn") == 2
    assert made_in == [ROOT / "data" / "cache" / "openmoji.safetensors"]


def test_the_lock_of_those_who_draw_is_looked_at_first(tmp_path: Path) -> None:
    yaml = tmp_path / "x" / "tiny.yaml"
    yaml.parent.mkdir()
    text = TINY.read_text().replace("./data/tiny", str(tmp_path / "drawn"))
    yaml.write_text(text.replace("./", f"{ROOT}/"))
    hparams = HyperParams.from_hparams(yaml)
    check_drawing(hparams, ["eval"])
    lock = get_drawing_lock(get_drawing_folder(hparams))
    lock.parent.mkdir()
    lock.write_text(MINE)
    with pytest.raises(UserError, match=r"\.drawing\.lock: has something in it"):
        check_drawing(hparams, ["eval"])
    # Who draws nothing takes no lock.
    check_drawing(hparams, [])


def test_the_demo_replaces_its_own_runs_alone(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in (".ready-demo", "bin/python", "bin/unike"):
        (tmp_path / ".venv" / name).write_text("#!/bin/sh\n")
        (tmp_path / ".venv" / name).chmod(0o755)
    run = tmp_path / "results" / "demo" / "tiny_blip2-vqa"
    run.mkdir(parents=True)
    mine, former = [run.parent / "notes.md", run / "notes.md"], [run / "manifest.json", run / "records.jsonl"]
    for path in (*mine, *former):
        path.write_text(MINE)
    command = ["make", "demo", "--assume-old=.venv/.ready-demo"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    assert [path.exists() for path in (*mine, *former)] == [True, True, False, False]


# ---------------------------------------------------------------- tables and figures


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--output", "{file}/below"], "--output: {file}: is a file; expected a folder"),
        (["--output", ""], "--output: is empty; expected a folder"),
        (["--output", "n" * 300], "is no valid path: a name in it is too long"),
    ],
)
def test_no_row_of_a_table_is_run_for_such_arguments(
    tmp_path: Path, capsys, monkeypatch, arguments: list[str], expected: str
) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(MINE)
    monkeypatch.setattr(tables, "ensure", None)
    given = ["--table", "1", "--backbones", "tiny_blip2", "--plan", str(ROOT / "hparams" / "tables.yaml")]
    monkeypatch.chdir(tmp_path)
    assert tables.main([*given, *(a.format(file=file) for a in arguments)]) == 2
    assert expected.format(file=file) in errors(capsys)[0]
    assert list_all(tmp_path) == {file: MINE.encode()}
    # With another folder the rows are run.
    with pytest.raises(TypeError, match="not callable"):
        tables.main([*given, "--output", "new"])


def test_no_figure_is_drawn_of_runs_in_a_file(tmp_path: Path, capsys, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text(MINE)
    monkeypatch.setattr(figures, "ensure", None)
    monkeypatch.chdir(ROOT)
    given = ["--figures", "4a", "--backbones", "tiny_blip2", "--output", str(tmp_path / "new")]
    assert figures.main([*given, "--results", str(tmp_path / "file" / "x")]) == 2
    assert "--results: " in errors(capsys)[0]
    with pytest.raises(TypeError, match="not callable"):
        figures.main([*given, "--results", str(tmp_path / "results")])
