"""Fetching models and benchmarks from a server that plays the hub, the drive and a storage."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from fetched import fetch, list_files, make_zip, offer, only_line
from stand_in import StandIn, serve

from unike.config.hparams import HyperParams
from unike.fetch import command, run
from unike.fetch.catalogue import Piece, find_item, read_catalogue
from unike.system.launching import run_guarded

ROOT = Path(__file__).parents[1]
WEIGHTS = bytes(range(256)) * 4000
MODEL = {
    "config.json": b'{"model_type": "llava"}',
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"the same, pickled",
    "flax_model.msgpack": b"the same, for flax",
    "README.md": b"---\nlicense: mit\n---\n",
    ".gitattributes": b"*.bin lfs\n",
}
NAME, PLACE = "some/model", "hugging_cache/model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    monkeypatch.chdir(tmp_path)
    with serve() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        state.repositories[NAME] = dict(MODEL)
        yield state


# ---------------------------------------------------------------- the hub


def test_a_repository_is_where_the_yaml_looks_and_nothing_else_is_left(hub: StandIn, capsys) -> None:
    assert fetch(NAME) == 0
    shown = capsys.readouterr().out
    # Pickles and copies for other libraries are left out.
    names = ("config.json", "model.safetensors", "README.md", ".fetched.json")
    assert list_files() == {f"{PLACE}/{name}" for name in names}
    assert Path(PLACE, "model.safetensors").read_bytes() == WEIGHTS
    assert "size: 1.0 MB; files: 3, of which 3 with a known checksum" in shown
    assert "licence: mit" in shown
    asked = len(hub.asked)
    assert fetch(NAME) == 0
    assert "everything is there already" in capsys.readouterr().out
    assert [request.path for request in hub.asked[asked:]] == [f"/api/models/{NAME}"]


def test_pickles_are_fetched_where_there_is_nothing_else(hub: StandIn) -> None:
    del hub.repositories[NAME]["model.safetensors"]
    assert fetch(NAME) == 0
    assert Path(PLACE, "pytorch_model.bin").read_bytes() == MODEL["pytorch_model.bin"]


def test_a_broken_connection_is_gone_on_with_in_the_same_run(hub: StandIn) -> None:
    hub.cuts["model.safetensors"] = [300_000, 200_000]
    assert fetch(NAME) == 0
    assert Path(PLACE, "model.safetensors").read_bytes() == WEIGHTS
    assert hub.starts("model.safetensors") == [0, 0, 300_000, 300_000, 500_000, 500_000]


def test_interrupted_it_leaves_no_final_name_and_a_second_run_goes_on(hub: StandIn, capsys) -> None:
    hub.cuts["model.safetensors"] = [300_000, 0]
    assert fetch(NAME) == 2
    line = only_line(capsys)
    assert line.startswith("error: model.safetensors: 127.0.0.1: the connection broke after 0 of ")
    assert line.endswith("what has arrived is kept: run the same command again to go on")
    assert not Path(PLACE).exists()
    asked = len(hub.asked)
    assert fetch(NAME) == 0
    assert Path(PLACE, "model.safetensors").read_bytes() == WEIGHTS
    sent = [r for r in hub.asked[asked:] if r.path.startswith("/large/") and r.method == "GET"]
    assert [r.start for r in sent] == [300_000]
    assert not [p for p in Path("hugging_cache").iterdir() if p.name != "model"]


def test_ctrl_c_is_130_and_a_second_run_goes_on(hub: StandIn, monkeypatch, capsys) -> None:
    @contextmanager
    def interrupting(*_: object) -> Iterator[Callable[[int], object]]:
        def count(_: int) -> None:
            raise KeyboardInterrupt

        yield count

    monkeypatch.setattr("unike.fetch.web._BLOCK", 100_000)
    hub.repositories[NAME] = {"model.safetensors": WEIGHTS}
    with monkeypatch.context() as patch:
        patch.setattr(command, "show_bytes", interrupting)
        assert fetch(NAME) == 130
    assert only_line(capsys) == "interrupted"
    assert not Path(PLACE).exists()
    assert fetch(NAME) == 0
    assert hub.starts("model.safetensors")[-1] == 100_000
    assert Path(PLACE, "model.safetensors").read_bytes() == WEIGHTS


def test_killed_it_leaves_no_final_name_and_a_second_run_goes_on(hub: StandIn) -> None:
    hub.repositories[NAME] = {"model.safetensors": WEIGHTS}
    hub.stalls["model.safetensors"] = 200_000
    code = "from unike.fetch import web, run; web._BLOCK = 50_000; run(['--yes', 'some/model'])"
    started = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 60
    while sum(p.stat().st_size for p in Path().glob("hugging_cache/.*/parts/*")) < 150_000:
        assert time.monotonic() < end
        assert started.poll() is None
        time.sleep(0.02)
    started.kill()
    started.wait()
    hub.stalls.clear()
    hub.go_on.set()
    assert not Path(PLACE).exists()
    assert fetch(NAME) == 0
    assert 150_000 <= hub.starts("model.safetensors")[-1] <= 200_000
    assert Path(PLACE, "model.safetensors").read_bytes() == WEIGHTS


def test_offline_mode_is_named(hub: StandIn, monkeypatch, capsys) -> None:
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch(NAME) == 2
    assert only_line(capsys) == "error: some/model: HF_HUB_OFFLINE is set; unset it to use 127.0.0.1"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("is_shorter", [False, True])
def test_a_wrong_checksum_is_one_line_and_nothing_of_it_is_kept(
    hub: StandIn, capsys, name: str, is_shorter: bool
) -> None:
    data = MODEL[name]
    hub.repositories[NAME][name] = data[:-1] if is_shorter else data[:-1] + b"?"
    hub.stated[name] = data
    assert fetch(NAME) == 2
    line = only_line(capsys)
    assert line.startswith(f"error: {name}: arrived damaged, or is another file by now: ")
    assert "it was deleted, run the same command again" in line
    algorithm = "sha256" if name.endswith("safetensors") else "git"
    assert (f"{len(data) - 1} bytes; expected {len(data)}" if is_shorter else f": {algorithm} ") in line
    assert not Path(PLACE).exists()
    hub.repositories[NAME][name] = data
    assert fetch(NAME) == 0
    assert Path(PLACE, name).read_bytes() == data


def test_the_token_goes_to_the_hub_alone(hub: StandIn, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch(NAME) == 0
    sent = {r.authorization for r in hub.asked if "/resolve/" in r.path}
    stored = {r.authorization for r in hub.asked if r.path.startswith("/large/")}
    assert sent == {"Bearer hf_secret"}
    assert stored == {None}


def test_no_space_is_found_before_anything_is_asked_for(hub: StandIn, monkeypatch, capsys) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    assert fetch(NAME) == 2
    line = only_line(capsys)
    assert "needs 68.1 MB in hugging_cache, and 1.0 MB are free there; free some space" in line
    assert not list_files()
    assert not [r for r in hub.asked if "/resolve/" in r.path]


def test_a_disk_that_fills_up_is_one_line_and_a_second_run_goes_on(hub: StandIn, monkeypatch, capsys) -> None:
    @contextmanager
    def filling(*_: object) -> Iterator[Callable[[int], object]]:
        def count(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        yield count

    with monkeypatch.context() as patch:
        patch.setattr(command, "show_bytes", filling)
        assert fetch(NAME) == 2
    line = only_line(capsys)
    assert "cannot be written: No space left on device; what has arrived is kept" in line
    assert not Path(PLACE).exists()
    assert fetch(NAME) == 0


def test_no_network_is_one_line(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch(NAME) == 2
    line = only_line(capsys)
    assert line.startswith("error: some/model: 127.0.0.1: cannot be reached, or the connection broke: ")
    assert not list_files()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda hub: hub.repositories.clear(), "is not on 127.0.0.1, or is private; if it is yours, log in"),
        (lambda hub: setattr(hub, "is_gated", True), "is gated: accept its terms on http"),
        (lambda hub: hub.codes.update({NAME: 503}), "127.0.0.1: answers 503; what has arrived is kept"),
        (lambda hub: hub.codes.update({NAME: 401}), "log in with: hf auth login"),
        (lambda hub: hub.codes.update({"config.json": 500}), "config.json: 127.0.0.1: answers 500"),
        (
            lambda hub: hub.repositories[NAME].update({"../x.json": b"{}"}),
            "../x.json: leads out of the folder",
        ),
    ],
    ids=["lost", "gated", "down", "unknown", "half down", "path"],
)
def test_what_the_hub_refuses_is_one_line(hub: StandIn, monkeypatch, capsys, change, expected: str) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    change(hub)
    assert fetch(NAME) == 2
    assert expected in only_line(capsys)
    assert not Path(PLACE).exists()


def test_a_file_of_ones_own_is_taken_where_it_is_the_hubs_and_never_replaced(hub: StandIn, capsys) -> None:
    Path(PLACE).mkdir(parents=True)
    Path(PLACE, "model.safetensors").write_bytes(WEIGHTS)
    assert fetch(NAME) == 0
    assert hub.count("model.safetensors") == 0
    assert Path(PLACE, "config.json").read_bytes() == MODEL["config.json"]
    Path(PLACE, ".fetched.json").unlink()
    Path(PLACE, "config.json").write_bytes(b"mine")
    assert fetch(NAME) == 2
    assert "config.json: is there already, and is not the hub's: 4 bytes; expected 23" in only_line(capsys)
    assert Path(PLACE, "config.json").read_bytes() == b"mine"


def test_a_dataset_is_unpacked_once(hub: StandIn, monkeypatch, capsys) -> None:
    packed = make_zip({"mmkb_images/m.1/a.jpg": b"a picture"})
    hub.repositories["owner/data"] = {"eval.json": b"[]", "mmkb_images.zip": packed}
    piece = Piece("hub", "data/vlkeb", (), repository="owner/data", type="dataset", unpack=True)
    offer(monkeypatch, piece)
    assert fetch("vlkeb") == 0
    assert list_files() == {
        f"data/vlkeb/{n}" for n in ("eval.json", "mmkb_images/m.1/a.jpg", ".fetched.json")
    }
    assert fetch("vlkeb") == 0
    assert "everything is there already" in capsys.readouterr().out
    assert hub.count("mmkb_images.zip") == 2  # the hub, and where it sends on to


# ---------------------------------------------------------------- asking


def test_sizes_and_licences_come_before_the_question(hub: StandIn, monkeypatch, capsys) -> None:
    hub.licence = None
    asked = []

    def answer(question: str) -> str:
        asked.append((question, capsys.readouterr().out))
        return "n"

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert run([NAME]) == 0
    ((question, before),) = asked
    assert question == "Fetch 1.0 MB? [y/N] "
    assert "licence: not stated" in before
    assert not list_files()
    assert "nothing was fetched" in capsys.readouterr().out


def test_where_nobody_can_be_asked_nothing_is_fetched(hub: StandIn, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert run_guarded(lambda: run([NAME])) == 2
    assert only_line(capsys) == "error: no terminal to confirm in: agree to sizes and licences with --yes"
    assert not list_files()


def test_a_dry_run_fetches_nothing(hub: StandIn, capsys) -> None:
    assert fetch(NAME, "--dry_run") == 0
    assert "into: hugging_cache/model" in capsys.readouterr().out
    assert not list_files()


# ---------------------------------------------------------------- plain addresses


def plain(hub: StandIn, data: bytes = WEIGHTS) -> Piece:
    hub.files["/LAVIS/eva.pth"] = data
    return Piece("url", "hugging_cache/eva.pth", (), url=f"{hub.address}/LAVIS/eva.pth")


def test_a_file_by_address_goes_on_and_is_compared_with_the_servers_checksum(
    hub: StandIn, monkeypatch, capsys
) -> None:
    offer(monkeypatch, plain(hub))
    hub.cuts["eva.pth"] = [300_000, 0]
    assert fetch("eva") == 2
    assert "run the same command again to go on" in only_line(capsys)
    assert not Path("hugging_cache/eva.pth").exists()
    hub.stated["/LAVIS/eva.pth"] = b"another"
    assert fetch("eva") == 2
    assert "md5 " in only_line(capsys)
    assert not Path("hugging_cache/eva.pth").exists()
    del hub.stated["/LAVIS/eva.pth"]
    assert fetch("eva") == 0
    assert list_files() == {"hugging_cache/eva.pth"}
    assert hub.starts("eva.pth") == [0, 300_000, 300_000, 0]
    assert fetch("eva") == 0
    assert "everything is there already" in capsys.readouterr().out


def test_a_file_that_changed_in_between_is_not_patched_together(hub: StandIn, monkeypatch) -> None:
    offer(monkeypatch, plain(hub))
    hub.cuts["eva.pth"] = [300_000, 0]
    assert fetch("eva") == 2
    changed = WEIGHTS[::-1]
    hub.files["/LAVIS/eva.pth"] = changed
    assert fetch("eva") == 0
    assert Path("hugging_cache/eva.pth").read_bytes() == changed


def test_a_checksum_of_the_catalogue_is_compared(hub: StandIn, monkeypatch, capsys) -> None:
    piece = plain(hub)
    known = {"eva.pth": hashlib.sha256(b"another").hexdigest()}
    offer(monkeypatch, Piece("url", piece.to, (), url=piece.url, sha256=known))
    assert fetch("eva") == 2
    assert f"expected {known['eva.pth']}" in only_line(capsys)
    offer(
        monkeypatch,
        Piece("url", piece.to, (), url=piece.url, sha256={"eva.pth": hashlib.sha256(WEIGHTS).hexdigest()}),
    )
    assert fetch("eva") == 0


# ---------------------------------------------------------------- the catalogue


def list_targets() -> set[str]:
    """Every file and folder that the catalogue puts somewhere."""
    targets = set()
    for item in read_catalogue().values():
        for piece in item.pieces:
            names = (
                *piece.files,
                *piece.folders,
                *([piece.file] if piece.file and not piece.folders else []),
            )
            targets |= {piece.to, *(f"{piece.to}/{name}" for name in names)}
    return targets


@pytest.mark.parametrize(
    # Neither the toys, which are shipped, nor smol, whose model and data are made on one's own machine.
    "path",
    sorted(p.name for p in (ROOT / "hparams").glob("*.yaml") if p.name[0] != "t" and p.stem != "smol"),
)
def test_the_yamls_find_what_is_fetched(path: str) -> None:
    hparams = HyperParams.from_hparams(ROOT / "hparams" / path)
    targets = list_targets()
    keys = ("state_dict_file", "qformer_checkpoint", "pretrained_ckpt")
    needed = [getattr(hparams, key) for key in keys if getattr(hparams, key)]
    needed += [split[part] for split in hparams.data.values() for part in ("train", "eval")]
    shown = {
        os.path.relpath(Path(ROOT, value) if Path(value).is_absolute() else value)
        for value in map(str, needed)
    }
    assert {value for value in shown if not any(value.endswith(target) for target in targets)} == set()
    repositories = {piece.repository for item in read_catalogue().values() for piece in item.pieces}
    assert str(hparams.name) in repositories or any(str(hparams.name).endswith(t) for t in targets)


def test_the_catalogue_names_its_sources_and_guesses_nothing() -> None:
    raw = json.loads((ROOT / "unike/fetch/catalogue.json").read_text("utf-8"))
    for item in raw.values():
        for piece in item["pieces"]:
            assert piece["sources"]
            # Stated or null, never left out.
            assert {"bytes", "licence"} <= piece.keys()
            assert piece["kind"] == "hub" or "sha256" in piece
            assert piece["kind"] in ("hub", "url", "drive", "drive_folder")


def test_without_a_name_the_catalogue_is_listed(capsys) -> None:
    assert run([]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: " in shown for name in read_catalogue())
    assert "size not stated; licence: not stated" in shown


def test_an_unknown_name_gets_the_nearest(capsys) -> None:
    assert fetch("lava") == 2
    assert "lava: is not in the catalogue; the nearest name is llava" in only_line(capsys)
    assert find_item("owner/Some.Model").pieces[0].to == "hugging_cache/Some.Model"


def test_the_module_runs_without_torch(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.argv[1:] = ['some/model']\n"
        "try: runpy.run_module('unike.fetch', run_name='__main__')\n"
        "finally: print('torch' if 'torch' in sys.modules else 'no torch')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "some/model: 127.0.0.1: cannot be reached" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout.endswith("no torch\n")
