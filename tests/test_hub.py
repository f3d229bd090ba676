"""Trained parts pushed to, and pulled from, a server that plays the hub: its upload protocol without Xet."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from finished_runs import as_records, ended, save_run
from stand_in import StandIn, serve

from unike.config.hparams import HyperParams
from unike.evaluation.summary import summarise
from unike.hub import pull, push
from unike.hub.parts import ITEM_FIELDS, find_parts, group_files, list_names
from unike.methods.preparation.folders import find_editor, find_scope_classifier
from unike.system.files import read_index, to_json_types, write_index, write_json
from unike.system.launching import run_guarded
from unike.types import KnowledgeItem, UserError

ROOT = Path(__file__).parents[1]
TINY = ROOT / "hugging_cache" / "tiny-blip2-opt"
NAME = "me/parts"
PLACES = {
    "knowledge/d75e115d17653689",
    "editors/mend/e3bcde032fc8a886",
    "scope/27876370ecc47e6d",
}
FOLDERS = [TINY / "knowledge", TINY / "editors" / "mend", TINY / "scope" / "27876370ecc47e6d"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.address)
        yield state


@pytest.fixture
def pushed(hub: StandIn) -> StandIn:
    assert push.run([NAME, *map(str, FOLDERS), "--yes"]) == 0
    return hub


def run_push(*arguments: str) -> int:
    return run_guarded(lambda: push.run([NAME, *arguments, "--yes"]))


def run_pull(*arguments: str) -> int:
    return run_guarded(lambda: pull.run([NAME, "--yes", *arguments]))


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of stderr, but for the library's bars."""
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


# ---------------------------------------------------------------- there and back


def test_what_is_pulled_is_what_was_pushed_and_the_yaml_finds_it(pushed: StandIn, capsys) -> None:
    assert run_pull("--into", "got") == 0
    files = {p.relative_to("got").as_posix(): p.read_bytes() for p in Path("got").rglob("*") if p.is_file()}
    assert {name.rpartition("/")[0] for name in files} == PLACES
    for folder in FOLDERS:
        for path in (p for p in folder.rglob("*") if p.is_file()):
            assert path.read_bytes() in files.values()
    shown = capsys.readouterr().out
    assert "to use them, add to the command: knowledge_dir=got/knowledge/d75e115d17653689" in shown
    assert "editor_dir=got/editors scope_dir=got/scope" in shown
    options = ["editor_dir=got/editors", "scope_dir=got/scope"]
    mend = HyperParams.from_hparams(ROOT / "hparams/mend/tiny_blip2.yaml", options[:1])
    assert find_editor(mend) == Path("got/editors/mend/e3bcde032fc8a886")
    scoped = HyperParams.from_hparams(ROOT / "hparams/scoped/tiny_blip2.yaml", options[1:])
    assert find_scope_classifier(scoped) == Path("got/scope/27876370ecc47e6d")
    assert not list(Path().glob(".got*"))


def test_a_second_pull_reads_no_file(pushed: StandIn) -> None:
    assert run_pull("--into", "got") == 0
    asked = len(pushed.asked)
    assert run_pull("--into", "got") == 0
    assert [request.path for request in pushed.asked[asked:]] == [f"/api/models/{NAME}"]


def test_an_interrupted_pull_goes_on(pushed: StandIn, capsys) -> None:
    capsys.readouterr()
    pushed.cuts["knowledge.safetensors"] = [1_000_000, 0]
    assert run_pull("--into", "got") == 2
    assert "run the same command again to go on" in only_line(capsys)
    assert not Path("got").exists()
    assert run_pull("--into", "got") == 0
    assert pushed.starts("knowledge.safetensors")[-1] == 1_000_000
    assert find_parts([Path("got")])


def test_a_pull_into_a_shipped_model_goes_beside_it(pushed: StandIn, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / ".shipped").touch()
    assert run_pull("--into", str(model)) == 0
    assert {path.name for path in model.iterdir()} == {".shipped"}
    assert (tmp_path / "model.trained" / "scope").is_dir()


def test_the_token_is_the_logins_and_a_new_repository_is_private(pushed: StandIn) -> None:
    sent = {r.authorization for r in pushed.asked if r.path.startswith("/api/") and r.method == "POST"}
    assert sent == {"Bearer hf_secret"}
    assert [is_private(created) for created in pushed.created] == [True]


def is_private(created: dict[str, object]) -> bool:
    """By the name that the library's version sends."""
    return created["private"] is True if "private" in created else created["visibility"] == "private"


def test_a_public_repository_is_asked_for(hub: StandIn) -> None:
    assert run_push(str(FOLDERS[2]), "--public") == 0
    assert not is_private(hub.created[0])


def test_without_a_login_nothing_is_sent(hub: StandIn, monkeypatch, capsys) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert run_push(str(FOLDERS[0])) == 2
    assert "not logged in to the hub: run `hf auth login`" in only_line(capsys)
    assert not hub.asked


@pytest.mark.parametrize(("path", "code"), [("/api/repos/create", 403), ("/commit/main", 503)])
def test_what_the_hub_refuses_is_one_line(hub: StandIn, monkeypatch, capsys, path: str, code: int) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.codes[path] = code
    assert run_push(str(FOLDERS[2])) == 2
    line = only_line(capsys)
    assert f"{NAME}: 127.0.0.1: answers {code}" in line
    assert line.endswith("hf auth login" if code == 403 else "run the same command again")
    assert not hub.repositories.get(NAME)


# ---------------------------------------------------------------- damaged and foreign files


def flip(data: bytes, at: int = -1) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


KNOWLEDGE, MEND, SCOPE = (
    "knowledge/d75e115d17653689/",
    "editors/mend/e3bcde032fc8a886/",
    "scope/27876370ecc47e6d/",
)


def change_index(data: bytes, **changes: object) -> bytes:
    """An index with other values and a checksum that fits them."""
    values = json.loads(data)
    sums = values.pop("sha256")
    folder = Path("changed")
    folder.mkdir(exist_ok=True)
    (folder / "x").write_bytes(b"")
    write_index(folder / "i.json", values | changes, folder / "x")
    signed = json.loads((folder / "i.json").read_text())
    own = {name: value for name, value in sums.items() if name != "index"}
    return json.dumps({**signed, "sha256": {**own, "index": signed["sha256"]["index"]}}).encode()


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "tensors": (KNOWLEDGE + "knowledge.safetensors", flip, "is damaged: its checksum is another one"),
    "index": (MEND + "editor.json", lambda d: d.replace(b'"step": 600', b'"step": 601'), "is damaged"),
    "no index": (SCOPE + "scope.json", lambda _: b"[]", "is damaged"),
    "kind": (SCOPE + "scope.json", lambda d: change_index(d, layer="4"), "layer: expected int"),
    "place": (
        MEND + "editor.json",
        lambda d: change_index(d, options={**json.loads(d)["options"], "method": "ke"}),
        "its index is that of editors/ke/",
    ),
    "items": (KNOWLEDGE + "items.jsonl", lambda d: d[: d.index(b"\n") + 1], "1 lines for 1197 items"),
    "item": (KNOWLEDGE + "items.jsonl", lambda d: d.replace(b'"target"', b'"code"', 1), "line 1 is no item"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_part_is_one_line_and_nothing_is_put_in_place(pushed: StandIn, capsys, name: str) -> None:
    path, damage, expected = DAMAGES[name]
    capsys.readouterr()
    data = pushed.repositories[NAME][path]
    pushed.repositories[NAME][path] = damage(data)
    assert run_pull("--into", "got") == 2
    line = only_line(capsys)
    assert expected in line
    assert line.endswith("nothing was put in place")
    assert not Path("got").exists()
    # With the repository repaired, nothing of the damaged file is left.
    pushed.repositories[NAME][path] = data
    assert run_pull("--into", "got") == 0


@pytest.mark.parametrize("name", ["tensors", "index", "items"])
def test_a_damaged_part_is_not_pushed(hub: StandIn, tmp_path: Path, capsys, name: str) -> None:
    path, damage, expected = DAMAGES[name]
    folders = {KNOWLEDGE: TINY / "knowledge", MEND: next((TINY / "editors/mend").iterdir())}
    place, _, file = path.rpartition("/")
    shutil.copytree(folders[f"{place}/"], tmp_path / "part")
    (tmp_path / "part" / file).write_bytes(damage((tmp_path / "part" / file).read_bytes()))
    assert run_push(str(tmp_path / "part")) == 2
    assert expected in only_line(capsys)
    assert not hub.asked


def test_tensors_that_are_none_are_refused_even_where_the_checksum_fits(tmp_path: Path) -> None:
    folder = tmp_path / "scope" / "key"
    shutil.copytree(next((TINY / "scope").iterdir()), folder)
    values = read_index(folder / "scope.json")
    values.pop("sha256", None)
    (folder / "scope.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    write_index(folder / "scope.json", values, folder / "scope.safetensors")
    with pytest.raises(UserError, match=r"scope\.safetensors: is no safetensors file"):
        find_parts([folder])


def test_only_safetensors_and_json_are_asked_for(pushed: StandIn, capsys) -> None:
    foreign = ("pytorch_model.bin", SCOPE + "scope.pkl", SCOPE + "run.py", "scope/../../x/scope.json")
    pushed.repositories[NAME] |= dict.fromkeys(foreign, b"harm")
    asked = len(pushed.asked)
    assert run_pull("--into", "got") == 0
    assert "other files, not read: 5" in capsys.readouterr().out  # with the card
    got = {request.path.rpartition("/")[2] for request in pushed.asked[asked:]}
    assert not got & {"pytorch_model.bin", "scope.pkl", "run.py", "README.md"}
    allowed = {name for kind in ("knowledge", "editor", "scope") for name in list_names(kind)}
    assert {path.name for path in Path("got").rglob("*") if path.is_file()} <= allowed


NO_PLACES = (
    "scope/../scope.json",
    "scope/a/b/scope.json",
    "/scope/a/scope.json",
    "editors/a/scope.json",
    "scope/a..b/scope.json",
)


@pytest.mark.parametrize("name", NO_PLACES)
def test_a_name_that_is_no_place_is_left_out(name: str) -> None:
    tensors = name.replace(".json", ".safetensors")
    assert group_files([name, tensors]) == {}
    assert group_files(["scope/a/scope.json"]) == {}
    assert list(group_files(["scope/a/scope.json", "scope/a/scope.safetensors"])) == ["scope/a"]


def test_a_repository_without_parts_is_one_line(hub: StandIn, capsys) -> None:
    hub.repositories[NAME] = {"model.safetensors": b"x"}
    assert run_pull() == 2
    assert "holds no knowledge, editors or scope classifiers" in only_line(capsys)


def test_another_part_in_its_place_is_never_replaced(pushed: StandIn, capsys) -> None:
    capsys.readouterr()
    mine = Path("got/scope/27876370ecc47e6d/scope.json")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert run_pull("--into", "got") == 2
    assert "is there already, and is another one; move it away, or name --into" in only_line(capsys)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("nowhere", "nowhere: no such folder"),
        (".", "holds nothing that was trained; expected knowledge.json"),
    ],
)
def test_a_folder_without_parts_is_one_line(hub: StandIn, capsys, folder: str, expected: str) -> None:
    assert run_push(folder) == 2
    assert expected in only_line(capsys)


def test_items_have_the_fields_of_the_memory() -> None:
    assert {field.name for field in fields(KnowledgeItem)} == ITEM_FIELDS


# ---------------------------------------------------------------- the card


def read_card(hub: StandIn) -> tuple[dict[str, object], str]:
    text = hub.repositories[NAME]["README.md"].decode()
    _, about, body = text.split("---\n", 2)
    return yaml.safe_load(about), body


def test_the_card_states_what_the_indexes_know_and_guesses_nothing(pushed: StandIn) -> None:
    about, body = read_card(pushed)
    assert about["library_name"] == "unike"
    assert about["license"] == "other"
    assert "base_model" not in about
    assert "Model: not stated." in body
    assert "| knowledge | `knowledge/d75e115d17653689` | `d75e115d17653689` | 4, 5, 6, 7 | 42 |" in body
    assert "`knowledge/d75e115d17653689`: up to 1200 triplets of train questions" in body
    assert "`scope/27876370ecc47e6d`: 1200 train records" in body
    assert "`editors/mend/e3bcde032fc8a886`: train records: not stated" in body
    assert "editor_rank: 96" in body
    assert "top1 0.4833" in body
    assert "best 0.01707, best_step 600, step 600" in body
    assert "annotation files: not stated" in body
    assert "## Scores\n\nnot stated." in body


def save_finished(folder: Path, **changes: object) -> Path:
    records = [ended(i) for i in range(4)]
    index = json.loads((FOLDERS[2] / "scope.json").read_text())
    save_run(folder, records)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["hparams"] |= {**index["options"], "name": "Salesforce/blip2-opt-2.7b"} | changes
    manifest["data"] = {"data.vqa.train": "abc123"}
    manifest["weights"] = {"backbone": index["backbone"]}
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "summary.json", to_json_types(summarise(as_records(records), 0)))
    return folder


def test_a_runs_data_and_scores_are_on_the_card(hub: StandIn, tmp_path: Path) -> None:
    run = save_finished(tmp_path / "run")
    assert run_push(str(FOLDERS[2]), "--run", str(run), "--license", "mit") == 0
    about, body = read_card(hub)
    assert about["license"] == "mit"
    assert about["base_model"] == "Salesforce/blip2-opt-2.7b"
    assert "`data.vqa.train` of the run below: sha256 `abc123`" in body
    summary = json.loads((run / "summary.json").read_text())
    after = summary["metrics"]["reliability"]["generated"]["after"]
    row = next(line for line in body.splitlines() if line.startswith("| Reliability |"))
    assert f"{after['mean']:.1f} [{after['low']:.1f}, {after['high']:.1f}], n 4" in row
    assert str(tmp_path) not in body


def test_a_run_of_other_options_is_refused(hub: StandIn, tmp_path: Path, capsys) -> None:
    run = save_finished(tmp_path / "run", scope_steps=7)
    assert run_push(str(FOLDERS[2]), "--run", str(run)) == 2
    line = only_line(capsys)
    assert "the run had other options than scope/27876370ecc47e6d: scope_steps" in line
    assert not hub.asked


def test_a_run_of_another_model_is_refused(hub: StandIn, tmp_path: Path, capsys) -> None:
    run = save_finished(tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    write_json(run / "manifest.json", manifest | {"weights": {"backbone": "0" * 16}})
    assert run_push(str(FOLDERS[2]), "--run", str(run)) == 2
    assert f"the run edited the weights {'0' * 16}, and scope/" in only_line(capsys)


def test_parts_of_an_earlier_push_stay_and_are_named(pushed: StandIn) -> None:
    assert run_push(str(FOLDERS[2])) == 0
    assert set(group_files(list(pushed.repositories[NAME]))) == PLACES
    _, body = read_card(pushed)
    assert "from an earlier push: `editors/mend/e3bcde032fc8a886`, `knowledge/d75e115d17653689`" in body


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("push", NAME, "nowhere"), "nowhere: no such folder"),
        (("pull", NAME), f"{NAME}: 127.0.0.1: cannot be reached"),
        (("send",), "expected push or pull"),
    ],
)
def test_the_module_runs_without_torch(tmp_path: Path, arguments: tuple[str, ...], shown: str) -> None:
    import os

    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('unike.hub', run_name='__main__', alter_sys=True)\n"
        "finally: print('torch' if 'torch' in sys.modules else 'no torch')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert shown in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout.endswith("no torch\n")
