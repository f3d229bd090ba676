"""Files of version 0.1.0, from before its modules moved: unfinished runs, edits, and what is learnt once.

How they were made stands in ``tests/fixtures/before_the_move/README.md``. Only what users type is used here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unike import MultimodalEditor, UniKEHyperParams, load_backbone
from unike.edits import EditStore

ROOT = Path(__file__).parents[1]
# As in the files themselves, which were made in the folder of the checkout.
HOME = Path("tests/fixtures/before_the_move")
EXPECTED: dict[str, Any] = json.loads((ROOT / HOME / "expected.json").read_text(encoding="utf-8"))
RUNS = {"one_step": (), "sequential": ("--protocol", "sequential", "--k", "3", "--sequences", "1")}
# Another processor rounds otherwise, and an edit takes many steps.
CLOSE = 5e-3

pytestmark = pytest.mark.usefixtures("one_thread", "in_the_checkout")


@pytest.fixture
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Copies that a test may write to."""
    for part in ("runs", "edits", "learnt"):
        shutil.copytree(ROOT / HOME / part, tmp_path / part)
    return tmp_path


@pytest.fixture(scope="module")
def backbone() -> Any:
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        return load_backbone(UniKEHyperParams.from_hparams(HOME / "hparams/unike.yaml"))
    finally:
        os.chdir(before)


def typed(*words: object) -> str:
    """What a command prints that a user types in the checkout's folder; it must end well."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_edit(yaml: str, *words: object) -> str:
    return typed("run_edit.py", "--hparams_dir", HOME / "hparams" / yaml, "--task", "vqa", *words)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "records.jsonl").read_text(encoding="utf-8").splitlines()]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(v) for key, v in value.items() if key != "seconds"}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def unlike(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two values of JSON differ, and numbers by more than another processor makes them."""
    if isinstance(one, dict) and isinstance(other, dict):
        lost = [f"{at}.{key}: in one alone" for key in sorted(one.keys() ^ other.keys())]
        return lost + [d for k in one.keys() & other.keys() for d in unlike(one[k], other[k], f"{at}.{k}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            d for i, (x, y) in enumerate(zip(one, other, strict=True)) for d in unlike(x, y, f"{at}[{i}]")
        ]
    if isinstance(one, float) and isinstance(other, float):
        near = math.isclose(one, other, rel_tol=CLOSE, abs_tol=CLOSE)
        return [] if near else [f"{at}: {one} and {other}"]
    return [] if one == other and type(one) is type(other) else [f"{at}: {one!r} and {other!r}"]


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_difference_is_seen() -> None:
    one = records(ROOT / HOME / "runs/one_step")[-1]
    assert unlike(one, json.loads(json.dumps(one))) == []
    assert unlike(one, one | {"loss": one["loss"] + 0.01}) != []
    assert unlike(one, one | {"steps": one["steps"] + 1}) != []
    assert unlike(one, {key: value for key, value in one.items() if key != "scores"}) != []
    changed = json.loads(json.dumps(one))
    changed["answers"]["reliability"]["after"] += "s"
    (found,) = unlike(one, changed)
    assert found.startswith(".answers.reliability.after: ")


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("protocol", RUNS)
def test_a_run_that_was_cut_off_goes_on_to_the_records_of_the_whole_one(kept: Path, protocol: str) -> None:
    cut, whole = kept / "runs" / f"{protocol}_cut", kept / "runs" / protocol
    former = (cut / "records.jsonl").read_bytes()
    complete = former[: former.rfind(b"\n") + 1]
    assert not (cut / "summary.json").exists()
    assert complete != former, "the last line is half written"

    printed = run_edit("unike.yaml", "--size", 5, *RUNS[protocol], "--output", cut, "--resume")

    assert "Reliability" in printed
    assert (cut / "records.jsonl").read_bytes().startswith(complete), "what is done is not done again"
    found, wanted = without_times(records(cut)), without_times(records(whole))
    assert len(found) > complete.count(b"\n")
    assert [r["id"] for r in found] == [r["id"] for r in wanted]
    assert unlike(found, wanted) == []
    summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in (cut, whole)]
    assert unlike(*(without_times(s["metrics"]) for s in summaries)) == []


def test_a_finished_run_is_shown_and_compared(kept: Path) -> None:
    run = kept / "runs/one_step"
    before = (run / "records.jsonl").read_bytes()
    assert "5 records" in run_edit("unike.yaml", "--size", 5, "--output", run, "--resume", "--report")
    assert (run / "records.jsonl").read_bytes() == before
    assert "vqa-4" in (run / "report.html").read_text(encoding="utf-8")
    assert "Reliability" in typed("-m", "unike.tables", "compare", run, kept / "runs/learnt_unike")


# ---------------------------------------------------------------- edits


def test_a_store_of_edits_is_listed_read_and_changed(kept: Path) -> None:
    folder = kept / "edits"
    assert EditStore(folder).ids() == list(EXPECTED)
    listed = typed("-m", "unike.edits", "list", folder)
    assert all(name in listed for name in EXPECTED)
    store = EditStore(folder)
    assert (store.read("vqa-3").origins[0].method, store.read("vqa-3").kind) == ("tpatcher", "routed")
    store.remove("vqa-4")
    assert EditStore(folder).ids() == [name for name in EXPECTED if name != "vqa-4"]


def test_a_run_adds_to_a_store_that_is_there(kept: Path, tmp_path: Path) -> None:
    store = EditStore(kept / "edits")
    former = store.read("vqa-0").tensors()
    run_edit("unike.yaml", "--size", 1, "--save_edits", kept / "edits", "--output", tmp_path / "run")
    assert store.ids() == list(EXPECTED)
    again = store.read("vqa-0").tensors()
    assert former.keys() == again.keys()
    assert all(former[name].shape == again[name].shape for name in former)
    # The others are as they were.
    own = store.read("vqa-0").folder.name
    others = [{n: d for n, d in files_in(f).items() if n.startswith("vqa-") and not n.startswith("vqa-0")}
              for f in (kept / "edits", ROOT / HOME / "edits")]  # fmt: skip
    assert own.startswith("vqa-0")
    assert others[0] == others[1] != {}


@torch.no_grad()
def logits(backbone: Any, image: str | None, prompt: str) -> torch.Tensor:
    """The first 8 at the prompt's last token."""
    batch = backbone.encode([image], [prompt])
    return backbone(batch).logits[0, int(batch.question_end[0]), :8]


@pytest.mark.parametrize("name", EXPECTED)
def test_an_edit_of_each_method_says_what_it_said(backbone: Any, kept: Path, name: str) -> None:
    expected = EXPECTED[name]
    hparams = UniKEHyperParams.from_hparams(HOME / "hparams" / expected["yaml"])
    editor = MultimodalEditor(hparams, backbone, progress=False)
    edit = editor.load(EditStore(kept / "edits").read(name).folder)
    probes = expected["probes"]
    asked = [(p["image"], p["prompt"]) for p in probes]
    found = {"before": [logits(backbone, *one) for one in asked]}
    with edit.applied(backbone):
        found["after"] = [logits(backbone, *one) for one in asked]
    answers = {"before": [editor.generate(*one) for one in asked]}
    editor.attach(edit)
    answers["after"] = [editor.generate(*one, edited=True) for one in asked]
    shown = list(editor.ask(*asked[0]).edits[0].shown)
    # The next edit gets the same backbone.
    assert editor.detach(edit.id) is edit
    for when in ("before", "after"):
        wanted = torch.tensor([p[f"logits_{when}"] for p in probes])
        torch.testing.assert_close(torch.stack(found[when]), wanted, rtol=1e-3, atol=1e-3)
        assert answers[when] == [p[when] for p in probes]
    assert shown == expected["shown"]
    assert probes[0]["after"] != probes[0]["before"], "an edit that changes nothing tests nothing"


@pytest.mark.parametrize("name", ["vqa-7", "vqa-8"])
def test_edits_are_asked_from_the_shell(kept: Path, name: str) -> None:
    expected = EXPECTED[name]
    first = expected["probes"][0]
    yaml = HOME / "hparams" / expected["yaml"]
    options = ("--edits", kept / "edits", "--only", name, "--image", first["image"], "--template", "{}")
    told = json.loads(typed("run_edit.py", "ask", "--hparams_dir", yaml, *options, "--json", first["prompt"]))
    assert (told["before"], told["after"]) == (first["before"], first["after"])
    assert [edit["id"] for edit in told["edits"]] == [name]


# ---------------------------------------------------------------- what is learnt once


@pytest.mark.parametrize(
    ("yaml", "places"),
    [
        ("learnt_unike", {"knowledge_dir": "knowledge", "scope_dir": "scope"}),
        ("mend", {"editor_dir": "editors"}),
        ("ke", {"editor_dir": "editors"}),
    ],
)
def test_what_was_learnt_is_read_and_not_learnt_again(kept: Path, yaml: str, places: dict[str, str]) -> None:
    before, again, former = files_in(kept / "learnt"), kept / "again", kept / "runs" / yaml
    options = [f"{key}={kept / 'learnt' / folder}" for key, folder in places.items()]
    run_edit(f"{yaml}.yaml", "--size", 2, "--output", again, *options)
    assert files_in(kept / "learnt") == before
    assert unlike(without_times(records(again)), without_times(records(former))) == []
    used, wanted = (json.loads((run / "manifest.json").read_text("utf-8"))["data"] for run in (again, former))
    assert used == wanted
    assert used.keys() >= set(places)
