"""What a newcomer meets in a folder of their own: bundled files, nearest names, edits that are not learnt."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from unike import own
from unike.backbones.placement import pick_device
from unike.command import edit
from unike.config.hparams import HyperParams
from unike.datasets.images import open_image
from unike.editor.models import describe_model
from unike.own.edits import OwnEdit
from unike.report.compare import _name_runs
from unike.runs.costs import describe_run_costs
from unike.runs.drawing import choose_splits
from unike.system.shipped import is_bundled
from unike.types import UserError

ROOT = Path(__file__).parents[1]
MODEL, PICTURE = "./hugging_cache/tiny-blip2-opt", "data/example/pictures/vqa-0000-image.png"


def test_bundled_models_and_images_are_found_from_anywhere(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(describe_model(MODEL).name).resolve() == (ROOT / MODEL).resolve()
    assert open_image(PICTURE).size == (64, 64)
    assert is_bundled(MODEL)
    (tmp_path / PICTURE).parent.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / PICTURE)
    assert open_image(PICTURE).size == (9, 9), "a file of one's own comes first"
    with pytest.raises(UserError, match="no such folder"):
        describe_model("./hugging_cache/none")
    assert not is_bundled(tmp_path)


def test_the_readmes_python_runs_in_an_empty_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out.split("\n")
    assert said[:3] == ["deer", "kangaroo", "soccer ball"]


def test_a_missing_image_names_the_nearest_one_beside_it(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "photo.png")
    with pytest.raises(UserError, match=r"phto\.png: image does not exist; the nearest name there is photo"):
        open_image(tmp_path / "phto.png")
    with pytest.raises(UserError, match=r"zebra\.png: image does not exist$"):
        open_image(tmp_path / "zebra.png")


def test_fine_tuning_draws_no_train_split() -> None:
    found = {
        name: choose_splits(HyperParams.from_hparams(ROOT / f"hparams/{name}/tiny_blip2.yaml"))
        for name in ("ft", "wise")
    }
    assert found == {"ft": ("eval",), "wise": ("train", "eval")}


def test_runs_of_different_methods_are_compared_with_their_names(tmp_path: Path) -> None:
    def make(folder: str, **hparams: str) -> Path:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "manifest.json").write_text(json.dumps({"hparams": hparams}))
        return tmp_path / folder

    ft, more = make("a", method="ft"), make("b", method="ft")
    gated = make("c", method="unike", scope_gate="nearest")
    assert _name_runs(ft, more) == ("a", "b")
    assert _name_runs(ft, gated) == ("a (ft)", "c (unike, scope_gate: nearest)")


def test_an_edit_that_is_not_learnt_is_told_from_one_that_failed() -> None:
    metrics = [
        {"reached": True, "steps": 4, "loss": 0.1},
        {"reached": False, "steps": 60, "loss": 2.82},
        {"error": "the loss is nan"},
        {"reached": None, "steps": 0, "loss": None},
    ]
    editor = SimpleNamespace(edit=lambda *args, **options: (metrics, None, None))
    edits = [OwnEdit(None, f"question {i}?", "an answer") for i in range(4)]
    failed, unreached = own.apply_edits(editor, edits, "{}")
    assert failed == {2: "the loss is nan"}
    assert unreached == {1: "its answer is not learnt after 60 steps (loss 2.8)"}


@pytest.mark.parametrize(("task", "near"), [("vqq", "; the nearest is vqa"), ("qqq", "'cross'")])
def test_a_mistyped_choice_names_the_nearest(
    capsys: pytest.CaptureFixture[str], task: str, near: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        edit.main(["--hparams", "tiny_blip2", "--task", task])
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.endswith(near)
    assert f"--task: invalid choice: '{task}', expected one of 'vqa', 'caption', 'cross'" in last


def test_a_check_names_the_device_that_is_taken() -> None:
    (run,) = describe_run_costs(HyperParams.from_hparams(ROOT / "hparams" / "tiny_blip2.yaml"), 3)
    assert " GFLOP/s on " in run.line
    assert run.line.rsplit(" on ", 1)[1].split(";")[0] == pick_device("auto").type
