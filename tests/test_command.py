"""The one command ``unike``: its help, its subcommands, and the YAMLs that it knows by name."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from helpers import Project

import unike
from unike.command import demo, edit, listing, main, table
from unike.config.hparams import HyperParams
from unike.config.shipped_yamls import find_yaml, list_names, suggest_name
from unike.evaluation.record import Answer, Record
from unike.methods.preparation.folders import choose_place
from unike.runs.drawing import wants_drawing
from unike.system import shipped
from unike.system.arguments import ArgumentParser, called_as
from unike.types import UserError

ROOT = Path(__file__).parents[1]
COMMANDS = {c.name: c for commands in table.COMMANDS.values() for c in commands}


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


# ---------------------------------------------------------------- help


def test_the_help_has_one_short_line_for_each_command() -> None:
    lines = main.format_help().splitlines()
    assert max(map(len, lines)) <= 80
    for group, commands in table.COMMANDS.items():
        start = lines.index(f"{group}:")
        for number, command in enumerate(commands, start + 1):
            assert lines[number].startswith(f"  unike {command.name} {command.example}".rstrip())
            assert lines[number].endswith(f"  {command.help}")
    expected = "demo edit list ask check prepare tables report compare edits doctor derive"
    assert COMMANDS.keys() >= set(expected.split())


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_is_printed_with_and_without_words(words: list[str], capsys) -> None:
    assert main.main(words) == 0
    assert capsys.readouterr().out == main.format_help() + "\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_its_own_name_and_knows_its_example(name: str, capsys) -> None:
    for words in ([name, "--help"], ["help", name]):
        with pytest.raises(SystemExit) as ended:
            main.main(words)
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: unike {name} ")
    flags = {word for word in shlex.split(COMMANDS[name].example) if word.startswith("--")}
    assert flags <= set(re.findall(r"--\w+", text))


def test_the_module_alone_keeps_its_name(capsys) -> None:
    with called_as("unike report"):
        assert ArgumentParser("python -m unike.report").prog == "unike report"
        assert ArgumentParser("python -m unike.report").prog == "python -m unike.report"
    with called_as("unike report"):
        pass
    with pytest.raises(SystemExit):
        import_module("unike.report.__main__").main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m unike.report ")


def test_versions_are_named(capsys) -> None:
    assert main.main(["--version"]) == 0
    assert f"unike {unike.__version__}" in capsys.readouterr().out


# ---------------------------------------------------------------- which command


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("edt", "error: unike: edt: unknown command; the nearest one is edit (unike --help)"),
        ("Compare", "error: unike: Compare: unknown command; the nearest one is compare (unike --help)"),
        ("--size", "error: unike: --size: unknown option; expected a command, see unike --help"),
        ("", "error: unike: : unknown command; the nearest one is "),
    ],
)
def test_an_unknown_command_is_one_line(word: str, line: str, capsys) -> None:
    assert main.main([word, "--size", "5"]) == 2
    (found,) = errors(capsys)
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["--image", "a.png", "--question", "What?"], table.OWN_START),
        (["--model=org/name"], table.OWN_START),
        (["--hparams", "tiny_blip2", "--images", "x"], "unike.command.edit:main"),
        (["--hparams", "tiny_blip2", "image_root=--image"], "unike.command.edit:main"),
    ],
)
def test_an_edit_without_a_yaml_is_another_module_s(words: list[str], start: str, monkeypatch) -> None:
    called: list[tuple[str, Sequence[str]]] = []
    for at in (table.OWN_START, "unike.command.edit:main"):
        module, _, function = at.partition(":")
        fake = ModuleType(module)
        fake.__spec__ = edit.__spec__
        setattr(fake, function, lambda words, at=at: called.append((at, words)) or 7)
        monkeypatch.setitem(sys.modules, module, fake)
    assert main.main(["edit", *words]) == 7
    assert called == [(start, words)]


def test_a_module_that_is_missing_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(main, "OWN_START", "unike.nowhere:run")
    assert main.main(["edit", "--image", "a.png"]) == 2
    (line,) = errors(capsys)
    assert line == "error: unike edit: needs the module unike.nowhere, which this version does not have"
    lost = table.Command("tables", "", "", "scripts.nowhere:main")
    monkeypatch.setattr(main, "find_command", lambda _: lost)
    assert main.main(["tables"]) == 2
    (line,) = errors(capsys)
    assert "scripts.nowhere, which is not installed" in line


def test_check_is_run_edit_s(blip2_project: Project, capsys) -> None:
    run_edit = import_module("run_edit")
    line = ["--hparams_dir", str(blip2_project.yaml), "--size", "1"]
    assert main.main(["check", *line]) == 0
    # What is estimated is another number each time.
    found = [text.split(":")[0] for text in capsys.readouterr().out.splitlines()]
    assert "ready to run" in found
    assert run_edit.main([*line, "--check"]) == 0
    again = [text.split(":")[0] for text in capsys.readouterr().out.splitlines()]
    # The last line is the command itself.
    assert again[:-1] == found[:-1]
    assert main.main(["edit", "--hparams", str(blip2_project.yaml), "method=nothing"]) == 2
    assert "nothing" in errors(capsys)[0]


def test_a_list_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from unike.command.main import main; codes = [main(w) for w in ([], ['list'], ['x'])]; "
        "print(codes, 'torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[0, 0, 2] False"


def test_commands_of_a_checkout_do_not_wait_for_torch() -> None:
    code = (
        "import sys; from scripts import derived_probes, figures, prepare, tables, tune, winners; "
        "print('torch' in sys.modules); "
        "from scripts import workers; workers.count_jobs(); print('torch' in sys.modules); "
        "import scripts.tiny.make_data; print('transformers' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "False"]


def test_the_package_shows_its_public_names() -> None:
    assert dir(unike) == sorted(unike.__all__)
    assert all(getattr(unike, name) is not None for name in dir(unike))
    assert Path(unike.find_example_image()) == ROOT / "data" / "example" / "kangaroo.png"


# ---------------------------------------------------------------- YAMLs by name


def test_all_yamls_are_listed_and_no_plan(capsys) -> None:
    files = {
        p.relative_to(ROOT / "hparams").with_suffix("").as_posix() for p in ROOT.glob("hparams/**/*.yaml")
    }
    assert main.main(["list", "--names"]) == 0
    names = capsys.readouterr().out.split()
    assert set(names) == files - {"tables", "tables_v1", "tuning"}
    assert names == list_names()


def test_the_matrix_has_a_cell_for_each_yaml() -> None:
    names = ["tiny_blip2", "scoped/tiny_blip2", "scoped/llava", "serac_multimodal/llava"]
    head, more, first, second, *_ = listing.format_matrix(names).splitlines()
    assert (head.split(), more.split()) == (["(none)", "scoped", "serac_"], ["multimodal"])
    assert (first.split(), second.split()) == (["tiny_blip2", "x", "x"], ["llava", "x", "x"])
    assert second.index("x") == head.index("scoped")
    whole = listing.format_matrix(list_names())
    assert max(map(len, whole.splitlines())) <= 88
    assert sum(line.split()[1:].count("x") for line in whole.splitlines()) == len(list_names())
    assert all(listing.METHODS.get(name.rpartition("/")[0]) for name in list_names())


def test_a_shipped_yaml_is_found_by_its_name_from_anywhere(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = str(ROOT / "hparams" / "scoped" / "tiny_blip2.yaml")
    for name in ("scoped/tiny_blip2", "scoped/tiny_blip2.yaml", "hparams/scoped/tiny_blip2.yaml"):
        assert find_yaml(name) == file
    assert HyperParams.from_hparams("scoped/tiny_blip2").to_dict() == HyperParams.from_hparams(file).to_dict()
    for name in (
        "../hparams/tiny_blip2",
        "scoped/nothing",
        "scoped",
        "tables/",
        str(tmp_path / "tiny_blip2"),
    ):
        assert find_yaml(name) == name
    # A folder of that name is no YAML; a file is the user's own.
    (tmp_path / "tiny_blip2").mkdir()
    assert find_yaml("tiny_blip2") == str(ROOT / "hparams" / "tiny_blip2.yaml")
    (tmp_path / "tiny_minigpt4.yaml").write_text("model_name: blip2\nname: x\n")
    assert find_yaml("tiny_minigpt4.yaml") == "tiny_minigpt4.yaml"
    monkeypatch.chdir(ROOT)
    assert find_yaml("scoped/tiny_blip2") == "hparams/scoped/tiny_blip2.yaml"


def test_an_unknown_name_has_its_nearest(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"scoped/tiny_blip: no such file, nor .* nearest one is scoped/tiny_blip2"
    ):
        HyperParams.from_hparams("scoped/tiny_blip")
    assert suggest_name("hparams/tiny_minigpt.yaml") == "tiny_minigpt4"
    assert suggest_name("quite/another") is None
    with pytest.raises(UserError, match=r"^quite/another: no such file; expected a YAML"):
        HyperParams.from_hparams("quite/another")


# ---------------------------------------------------------------- inside a wheel


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch) -> Path:
    """The project's files as a wheel has them, with an empty folder as the working folder."""
    inside = tmp_path / "site" / "unike" / "shipped"
    for name in ("hparams/tiny_blip2.yaml", "hparams/blip2.yaml", "hugging_cache/tiny-blip2-opt/.shipped"):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_bytes((ROOT / name).read_bytes())
    (inside / "hugging_cache" / "tiny-blip2-opt" / "knowledge").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(shipped, "PACKAGED", inside)
    monkeypatch.setenv(shipped.CACHE_VARIABLE, str(tmp_path / "cache"))
    return inside


def test_what_a_wheel_has_is_read_there_and_nothing_is_written_there(packaged: Path, tmp_path: Path) -> None:
    found = HyperParams.from_hparams("tiny_blip2")
    weights, cache = packaged / "hugging_cache" / "tiny-blip2-opt", tmp_path / "cache"
    assert found.source == str(packaged / "hparams" / "tiny_blip2.yaml")
    assert (found.name, found.knowledge_dir) == (str(weights), str(weights / "knowledge"))
    assert found.image_root == str(cache / "data" / "tiny" / "blip2")
    assert found.data["vqa"]["eval"] == str(cache / "data" / "tiny" / "blip2" / "vqa_eval.json")
    assert wants_drawing(found)
    assert choose_place(weights / "scope") == cache / "hugging_cache" / "tiny-blip2-opt.trained" / "scope"
    assert found.results_dir == HyperParams.from_hparams(ROOT / "hparams" / "tiny_blip2.yaml").results_dir
    assert not cache.exists()
    assert list(Path.cwd().iterdir()) == []


def test_a_clone_writes_beside_its_own_files() -> None:
    weights = ROOT / "hugging_cache" / "tiny-blip2-opt"
    assert choose_place(weights / "scope") == weights.with_name("tiny-blip2-opt.trained") / "scope"
    assert shipped.choose_writable(weights) == weights
    assert shipped.name_extra("demo") == "'.[demo]'"


def test_own_files_of_the_working_folder_come_before_a_wheel_s(packaged: Path) -> None:
    """The YAML's place first: its toy stays the wheel's; what it lacks is the working folder's."""
    for name in ("hugging_cache/tiny-blip2-opt", "data/tiny/blip2", "hugging_cache/opt-2.7b"):
        Path(name).mkdir(parents=True)
    found = HyperParams.from_hparams("tiny_blip2")
    assert found.name == str(packaged / "hugging_cache" / "tiny-blip2-opt")
    assert found.image_root == "./data/tiny/blip2"
    own = Path("my.yaml")
    own.write_text((ROOT / "hparams" / "tiny_blip2.yaml").read_text())
    assert HyperParams.from_hparams(own).name == "./hugging_cache/tiny-blip2-opt"
    Path("hugging_cache/tiny-blip2-opt").rmdir()
    assert HyperParams.from_hparams(own).name == str(packaged / "hugging_cache" / "tiny-blip2-opt")


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"UNIKE_CACHE": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/unike"),
        ({"HOME": "/h"}, "/h/.cache/unike"),
    ],
)
def test_the_cache_folder_is_the_user_s_choice(variables: dict[str, str], folder: str, monkeypatch) -> None:
    for name in ("UNIKE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert shipped.choose_cache_folder() == Path(folder)


def test_extras_are_named_as_pip_knows_them(packaged: Path) -> None:
    assert shipped.is_packaged()
    assert shipped.name_extra("demo") == "'unike[demo]'"
    with pytest.raises(FileNotFoundError, match=r"kangaroo\.png: not installed"):
        shipped.find_example_image()


# ---------------------------------------------------------------- the demo


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--size", "0"], "--size: 0; expected 1 to 20"),
        (["--size", "21"], "--size: 21; expected 1 to 20"),
        (["--output", " "], "--output: is empty; expected a folder"),
    ],
)
def test_bad_input_of_the_demo_is_one_line(words: list[str], line: str, capsys) -> None:
    assert main.main(["demo", *words]) == 2
    assert errors(capsys) == [f"error: {line}"]


def test_a_demo_takes_the_next_free_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo._choose_folder(None) == Path("results/demo")
    Path("results/demo").mkdir(parents=True)
    assert demo._choose_folder(None) == Path("results/demo-2")
    assert demo._choose_folder("mine") == Path("mine")


def test_the_example_s_records_are_read_as_any(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    from unike.runs.request import RunRequest

    hparams = demo._read_hparams("scoped/tiny_blip2")
    assert not hparams.generate_data
    cases = RunRequest(hparams, "vqa").cases
    assert len(cases) == demo.MOST
    assert (cases[0].request.query.target, len({c.request.id for c in cases})) == ("kangaroo", demo.MOST)


def test_the_comparison_has_the_summaries_means() -> None:
    from unike.evaluation.summary import summarise

    def score(**passed: float) -> Record:
        values = {name: {"before": 0.0, "after": value} for name, value in passed.items()}
        return Record.from_json({"id": str(len(passed)), "scores": {"generated": values}, "status": "ok"})

    probes = ("reliability", "t_generality", "m_generality", "t_locality", "m_locality", "same_image")
    summary = summarise([score(**dict.fromkeys(probes, 1.0), same_question=0.0)], seed=0)
    head, columns, line = demo.format_comparison({"gate": summary}).splitlines()
    assert (head, columns.split("  ")[-1]) == ("Passed probes, %:", "same image kept")
    assert line.split()[-5:] == ["100", "100", "100", "0", "100"]


def test_an_example_shows_before_and_after() -> None:
    answer = Answer("Question: What is it? Short answer:", "kangaroo", "deer", "kangaroo")
    other = Answer(None, None, "ball", "ball")
    text = demo.describe_example(Record("0", answers={"reliability": answer, "same_question": other}))
    assert "'What is it?', new answer 'kangaroo'" in text
    assert [line.split()[-3:] for line in text.splitlines()[1:]] == [
        ["deer", "->", "kangaroo"],
        ["ball", "->", "ball"],
    ]
