"""Files of the user's are never overwritten: every writer of the program meets a foreign file in its way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finished_runs import ended, save_run
from helpers import Project, record
from test_edit_store import made
from test_run_edit import ROOT, errors, start

from scripts.tiny import make_data
from unike import report
from unike.config.hparams import HyperParams
from unike.edits import EditStore
from unike.knowledge.disk import DiskPairs
from unike.methods.preparation import folders
from unike.report.__main__ import main as report_main
from unike.runs.drawing import check_target, wants_drawing
from unike.runs.records import RecordWriter
from unike.system import places
from unike.tables import main as tables_main
from unike.types import UserError

TINY = ROOT / "hparams" / "tiny_minigpt4.yaml"
MINE = "my own words\n"


def list_all(root: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))}


def run(*arguments: str) -> int:
    import run_edit

    return run_edit.main(list(arguments))


# ---------------------------------------------------------------- drawing


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a benchmark file of the user's own."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "vqa_eval.json").write_text(json.dumps([record(0)]))
    return folder


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("more", [[], ["--check"], ["generate_data=true"]])
def test_nothing_is_drawn_where_an_override_leads(own: Path, capsys, more: list[str]) -> None:
    files = list_all(own.parent)
    changes = [f"data.vqa.eval={own / 'vqa_eval.json'}", f"image_root={own}"]
    code = run(
        "--hparams_dir", str(TINY), "--size", "1", "--output", str(own.parent / "run"), *changes, *more
    )
    assert code == 2
    shown = capsys.readouterr()
    assert "3 missing images" in shown.out + shown.err
    assert list_all(own.parent) == files


@pytest.mark.usefixtures("nothing_loads")
def test_a_folder_that_is_not_there_stays_away(tmp_path: Path, capsys) -> None:
    gone = tmp_path / "nope"
    assert run("--hparams_dir", str(TINY), "--size", "1", f"image_root={gone}") == 2
    assert any(f"image_root: {gone}: no such folder" in line for line in errors(capsys))
    assert not gone.exists()


def test_only_the_yamls_own_folder_is_drawn_into(tmp_path: Path) -> None:
    plain = HyperParams.from_hparams(TINY)
    assert wants_drawing(plain)
    assert wants_drawing(HyperParams.from_hparams(TINY, ["k=3", "seed=5"]))
    for change in ("image_root=x", "data.vqa.eval=x.json", "data={}", "coco_image=x", "generate_data=false"):
        assert not wants_drawing(HyperParams.from_hparams(TINY, [change]))
    values = plain.to_dict() | {"image_root": str(tmp_path)}
    assert not wants_drawing(HyperParams.from_dict(values))
    assert not wants_drawing(HyperParams.from_dict(values, source=str(TINY)))
    assert wants_drawing(HyperParams.from_dict(plain.to_dict(), source=str(TINY)))


def put_annotations(out: Path) -> Path:
    path = out / "vqa_eval.json"
    path.write_text("[]")
    return path


def put_about(out: Path) -> Path:
    path = out / "eval.about.json"
    path.write_text("{}")
    return path


def put_picture(out: Path) -> Path:
    path = out / "pictures" / "eval" / "cat.png"
    path.parent.mkdir(parents=True)
    path.write_text(MINE)
    return path.parent


def put_link(out: Path) -> Path:
    (out.parent / "elsewhere").mkdir()
    path = out / "pictures"
    path.symlink_to(out.parent / "elsewhere")
    return path


def put_changed(out: Path) -> Path:
    """What was drawn, and edited by hand since."""
    about = {"version": 1, "seed": 1, "records": 1, "backbone": "x", "sha256": {"vqa_eval.json": "0"}}
    (out / "eval.about.json").write_text(json.dumps(about))
    return put_annotations(out)


@pytest.mark.parametrize("put", [put_annotations, put_about, put_picture, put_link, put_changed])
def test_nothing_is_drawn_over_what_was_not_drawn(tmp_path: Path, put: Callable[[Path], Path]) -> None:
    out = tmp_path / "drawn"
    out.mkdir()
    check_target(out, "eval")
    path = put(out)
    files = list_all(tmp_path)
    for draw in (lambda: check_target(out, "eval"), lambda: make_data.make(None, out, "eval", 1, 1)):  # type: ignore[arg-type]
        with pytest.raises(UserError, match=f"{path}.*nothing is drawn over it"):
            draw()
    assert list_all(tmp_path) == files


@pytest.mark.usefixtures("nothing_loads")
def test_a_check_says_what_is_in_the_way_of_drawing(copied: Project, capsys) -> None:
    out = copied.root / "drawn"
    out.mkdir()
    (out / "vqa_eval.json").write_text(MINE)
    data = {t: {s: str(out / f"{t}_{s}.json") for s in ("train", "eval")} for t in ("vqa", "caption")}
    copied.write_yaml(generate_data=True, image_root=str(out), data=data)
    for more in ([], ["--check"]):
        assert start(copied, *more) == 2
        shown = capsys.readouterr()
        assert "vqa_eval.json: is there already, and was not written by this program" in shown.out + shown.err
    assert (out / "vqa_eval.json").read_text() == MINE


# ---------------------------------------------------------------- every other writer


def write_run_report(path: Path, run: Path) -> None:
    assert report_main([str(run), "--output", str(path)]) == 2


def write_comparison(path: Path, run: Path) -> None:
    assert tables_main(["compare", str(run), str(run), "--html", str(path)]) == 2


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "run", [ended(i) for i in range(3)])


@pytest.mark.parametrize("write", [write_run_report, write_comparison])
def test_a_page_replaces_pages_alone(recorded: Path, tmp_path: Path, capsys, write) -> None:
    mine, link = tmp_path / "page.html", tmp_path / "link.html"
    mine.write_text(MINE)
    link.symlink_to(tmp_path / "target.html")
    for path in (mine, link):
        write(path, recorded)
        assert len(errors(capsys)) == 1
    assert mine.read_text() == MINE
    assert not (tmp_path / "target.html").exists()
    # A page of ours is written anew.
    mine.unlink()
    report.write_report(recorded, mine)
    first = mine.read_bytes()
    assert report.write_report(recorded, mine) == mine
    assert mine.read_bytes() == first


def test_a_report_in_a_runs_folder_replaces_no_file_of_ones_own(recorded: Path, tmp_path: Path) -> None:
    import shutil

    run = shutil.copytree(recorded, tmp_path / "run")
    (run / "report.html").write_text(MINE)
    with pytest.raises(UserError, match=r"report\.html: is there already"):
        report.write_report(run)
    assert (run / "report.html").read_text() == MINE


def test_a_figure_replaces_figures_alone(tmp_path: Path) -> None:
    from PIL import Image

    from unike.report.paper import figures

    for name in ("figure4a.png", "figure4a.svg"):
        path = tmp_path / name
        if name.endswith("png"):
            Image.new("RGB", (4, 4)).save(path)
        else:
            path.write_text("<svg></svg>")
        with pytest.raises(UserError, match=f"{name}: is there already"):
            figures.check_place(tmp_path / "figure4a")
        path.unlink()
    figures.check_place(tmp_path / "figure4a")
    figures.check_place(ROOT / "docs" / "figures" / "figure4a")
    figures.check_place(ROOT / "docs" / "figures" / "figure4b")


@pytest.mark.parametrize("script", ["scripts.tiny.train_vision", "scripts.tiny.train_language"])
def test_a_training_script_replaces_nothing(script: str, tmp_path: Path, monkeypatch, capsys) -> None:
    from importlib import import_module

    out = tmp_path / "model"
    out.write_text(MINE)
    own = ["--decoder", "opt", "--vision", "x"] if script.endswith("language") else []
    monkeypatch.setattr("sys.argv", [script, "--out", str(out), *own])
    with pytest.raises(SystemExit) as ended:
        import_module(script).main()
    assert ended.value.code == 2
    assert str(out) in capsys.readouterr().err
    assert out.read_text() == MINE


def test_drawing_by_hand_replaces_nothing(own: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("unike.backbones.load_backbone", None)
    files = list_all(own)
    assert make_data.main(["--out", str(own)]) == 2
    assert any("vqa_eval.json: is there already" in line for line in errors(capsys))
    assert list_all(own) == files


def test_textures_are_not_cached_in_another_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from scripts.tiny.scenes import load_textures

    for name, write in (
        ("mine.txt", lambda p: p.write_text(MINE)),
        ("mine.safetensors", lambda p: save_file({"w": torch.zeros(2)}, p)),
    ):
        path = tmp_path / name
        write(path)
        before = path.read_bytes()
        with pytest.raises(UserError, match="holds no drawings"):
            load_textures(path)
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    "name", ["knowledge.safetensors", "knowledge.json", "items.jsonl", "editor.safetensors", "scope.json"]
)
def test_what_is_prepared_replaces_only_its_own(tmp_path: Path, name: str) -> None:
    folders.require_own_files(tmp_path, name)
    (tmp_path / name).write_text(MINE)
    with pytest.raises(UserError, match=f"{name}: is there already"):
        folders.require_own_files(tmp_path, name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="symbolic link"):
        folders.require_own_files(tmp_path, name)


def test_knowledge_is_not_built_over_a_file(copied: Project, capsys, monkeypatch) -> None:
    from unike.methods.preparation import knowledge

    monkeypatch.setattr(knowledge, "compute_knowledge_key", lambda *_: "key")
    monkeypatch.setattr(knowledge, "extract_states", None)
    path = copied.root / "knowledge" / "key" / "knowledge.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(MINE)
    assert start(copied, "--size", "1", "seed=9") == 2
    assert "knowledge.safetensors: is there already" in errors(capsys)[0]
    assert path.read_text() == MINE


def test_pairs_on_disk_replace_nothing(tmp_path: Path) -> None:
    from unike.knowledge import index

    (tmp_path / "keys.bin").write_text(MINE)
    with pytest.raises(UserError, match=r"keys\.bin: is there already"):
        DiskPairs.create(tmp_path, 2)
    assert (tmp_path / "keys.bin").read_text() == MINE
    memory = tmp_path / "memory-1"
    memory.mkdir()
    (memory / "notes.txt").write_text(MINE)
    with pytest.raises(UserError, match=r"notes\.txt: is in the way"):
        index._map_pairs(torch.zeros(1, 2), torch.zeros(1, 2), memory, "", torch.float16)
    assert (memory / "notes.txt").read_text() == MINE


def test_a_resumed_run_removes_only_what_runs_leave(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RecordWriter(folder, False, {"k": 1}).close()
    mine, left = folder / ".notes.tmp", folder / ".manifest.json.12.ab12.tmp"
    for path in (mine, left):
        path.write_text(MINE)
    RecordWriter(folder, True, {"k": 1}).close()
    assert mine.read_text() == MINE
    assert not left.exists()


# ---------------------------------------------------------------- edits of another run


def test_a_store_keeps_the_edits_of_another_run(copied: Project, capsys) -> None:
    store = copied.root / "st"
    ike = ("--size", "2", "--save_edits", str(store), "--no_generated", "method=ike", "ike_retriever=states")
    assert start(copied, *ike, "--output", str(copied.root / "a")) == 0
    kept = list_all(store)
    assert len(EditStore(store)) == 2
    ft = ("--size", "2", "--save_edits", str(store), "--output", str(copied.root / "b"), "method=ft")
    for more in ((), ("--check",)):
        capsys.readouterr()
        assert start(copied, *ft, *more) == 2
        shown = capsys.readouterr()
        assert f"{store}: holds vqa-0, vqa-1 of another run (method ike)" in shown.out + shown.err
    assert start(copied, *ike, "ike_demonstrations=1", "--output", str(copied.root / "b")) == 2
    assert start(copied, *ike, "seed=9", "--output", str(copied.root / "b")) == 2
    assert list_all(store) == kept
    assert not (copied.root / "b").exists()
    # The same run may be repeated, and resumed.
    assert start(copied, *ike, "--output", str(copied.root / "c")) == 0
    assert start(copied, *ike, "--output", str(copied.root / "c"), "--resume") == 0
    assert EditStore(store).ids() == ["vqa-0", "vqa-1"]


def test_other_records_of_the_same_ids_are_another_run(copied: Project, capsys) -> None:
    store = copied.root / "st"
    ike = ("--size", "1", "--save_edits", str(store), "--no_generated", "method=ike", "ike_retriever=states")
    assert start(copied, *ike, "--output", str(copied.root / "a")) == 0
    kept = list_all(store)
    copied.write_records([record(2)])
    assert start(copied, *ike, "--output", str(copied.root / "b")) == 2
    assert "of another run" in errors(capsys)[-1]
    assert list_all(store) == kept


def test_a_store_knows_the_same_edit(tmp_path: Path) -> None:
    store = EditStore(tmp_path)
    assert not store.holds_same(made("a"))
    store.add(made("a"))
    assert store.holds_same(made("a"))
    assert not store.holds_same(made("a", target="two dogs"))
    with pytest.raises(UserError, match="already, of method ike; remove it first"):
        store.add(made("a", target="two dogs"))


def test_edits_are_not_kept_in_the_runs_own_folder(copied: Project, capsys) -> None:
    both = str(copied.root / "both")
    assert start(copied, "--output", both, "--save_edits", both) == 2
    assert "is the run's own folder" in errors(capsys)[0]
    assert not os.path.exists(both)


# ---------------------------------------------------------------- links and locks


@pytest.mark.parametrize("name", [".lock", "index.jsonl"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_store_writes_through_no_link(tmp_path: Path, name: str, is_there: bool) -> None:
    store, mine = EditStore(tmp_path / "store"), tmp_path / "mine.txt"
    store.add(made("a"))
    path = store.folder / name
    content = path.read_bytes()
    path.unlink()
    if is_there:
        mine.write_bytes(content or MINE.encode())
    before = list_all(tmp_path)
    path.symlink_to(mine)
    for work in (lambda: store.remove("a"), lambda: store.add(made("b"))):
        with pytest.raises(UserError, match=f"{name}: is a symbolic link"):
            work()
    path.unlink()
    assert list_all(tmp_path) == before


def test_a_lock_empties_no_file(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text(MINE)
    with pytest.raises(UserError, match="has something in it"), places.lock(path):
        pass
    assert path.read_text() == MINE
    path.unlink()
    for _ in range(2):
        with places.lock(path):
            assert path.exists()


def test_every_lock_of_the_program_is_this_one() -> None:
    users = [p for p in (ROOT / "unike").rglob("*.py") if "filelock" in p.read_text()]
    users += [p for p in (ROOT / "scripts").rglob("*.py") if "filelock" in p.read_text()]
    assert users == [ROOT / "unike" / "system" / "places.py"]
    for name in ("pyproject.toml", "requirements.txt"):
        assert "filelock>=3.20.3" in (ROOT / name).read_text()


@pytest.mark.parametrize(
    "name", ["records.jsonl", "manifest.json", "summary.json", ".stop.tmp", "records.1.jsonl"]
)
def test_a_run_writes_through_no_link(tmp_path: Path, name: str) -> None:
    folder, mine = tmp_path / "run", tmp_path / "mine.txt"
    with RecordWriter(folder, False, {"k": 1}) as writer:
        writer.write({"id": "a"})
    path = folder / name
    mine.write_bytes(path.read_bytes() if path.exists() else MINE.encode())
    path.unlink(missing_ok=True)
    path.symlink_to(mine)
    before = mine.read_bytes()
    with pytest.raises(UserError, match="is a symbolic link"):
        RecordWriter(folder, True, {"k": 1})
    assert mine.read_bytes() == before


def test_pairs_write_through_no_link(tmp_path: Path) -> None:
    pairs, mine = DiskPairs.create(tmp_path / "pairs", 2), tmp_path / "mine.txt"
    mine.write_text(MINE)
    for name in ("keys.bin", "pairs.lock"):
        path = pairs.folder / name
        path.unlink(missing_ok=True)
        path.symlink_to(mine)
        with pytest.raises(UserError, match=f"{name}: is a symbolic link"):
            pairs.append(torch.zeros(1, 2), torch.zeros(1, 2))
        path.unlink()
        path.touch()
    assert mine.read_text() == MINE
    pairs.append(torch.zeros(1, 2), torch.zeros(1, 2))
    assert len(pairs) == 1


# ---------------------------------------------------------------- what is shipped


@pytest.mark.parametrize("model", ["tiny-blip2-opt", "tiny-minigpt4"])
@pytest.mark.parametrize("part", ["knowledge", "scope", "editors", "editors/mend"])
def test_nothing_is_written_into_a_shipped_folder(model: str, part: str, tmp_path: Path) -> None:
    shipped = ROOT / "hugging_cache" / model / part
    assert folders.choose_place(shipped) == ROOT / "hugging_cache" / f"{model}.trained" / part
    # A folder of one's own is written to itself.
    assert folders.choose_place(tmp_path / part) == tmp_path / part


def test_what_is_trained_anew_is_found_beside_the_shipped_folder(tmp_path: Path) -> None:
    from unike.system.files import write_index

    model = tmp_path / "model"
    (model / "editors").mkdir(parents=True)
    (model / folders.SHIPPED).touch()
    facts: folders.Facts = {"options": {"seed": 5}}
    assert folders.find_folder(model / "editors", "editor.json", facts) is None
    made_here = folders.choose_place(model / "editors") / "x"
    made_here.mkdir(parents=True)
    (made_here / "editor.safetensors").touch()
    write_index(made_here / "editor.json", facts, made_here / "editor.safetensors")
    assert folders.find_folder(model / "editors", "editor.json", facts) == made_here
    assert sorted(p.name for p in model.iterdir()) == [folders.SHIPPED, "editors"]


def test_what_the_documented_commands_write_is_ignored_by_git() -> None:
    import subprocess

    names = [
        "edits/index.jsonl",
        "my_edits/kangaroo/edit.json",
        "my_image.png",
        "compared.html",
        "results/x/records.jsonl",
        "data/tiny/blip2/vqa_eval.json",
        "hugging_cache/tiny-blip2-opt.trained/editors/mend/x/editor.json",
        "hugging_cache/opt-2.7b/config.json",
        "hugging_cache/editors/mend/x/editor.json",
    ]
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    done = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == names
    shipped = ["hugging_cache/tiny-blip2-opt/config.json", "hugging_cache/README.md", "unike/edits/store.py"]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *shipped], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == ""
