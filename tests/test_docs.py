"""What the documentation says is there, runs, and leads somewhere."""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from scripts import reference
from unike.command import edit
from unike.command.main import main
from unike.command.table import OWN_OPTIONS
from unike.system import launching
from unike.types import BACKBONES, UserError

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")] if p.is_file()
)
SUBCOMMANDS = (["ask"], ["compare"], ["show"], ["list"], ["diff"], ["remove"], ["apply"], ["push"], ["pull"])
METHOD_PAGE = ROOT / "docs" / "adding_a_method.md"


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """Titles and texts of a page's code blocks."""
    found = re.findall(rf"^```{language}([^\n]*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [(title.strip().removeprefix("title=").strip('"'), text) for title, text in found]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    out = []
    for link in re.findall(r"\]\(<?([^)>\s]+)>?\)", text):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            out.append(link)
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A head\n\n[a](#a-head) [b](#another) [c](nowhere.md) [d](https://example.org/x)\n")
    assert broken_links(page) == ["#another", "nowhere.md"]


# Files that a page names in code, with their folder; those of a run, a user or a model are not ours.
NAMED = re.compile(
    r"`((?:unike|scripts|tests|benchmarks|notebooks|docs|hparams)/[\w./-]+\.(?:py|md|ipynb|yaml))`"
)
USERS = {"hparams/my_tables.yaml"}


def lost_files(text: str) -> list[str]:
    """The files of the project that a text names and that do not exist."""
    return sorted(name for name in set(NAMED.findall(text)) - USERS if not (ROOT / name).is_file())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    assert lost_files(page.read_text(encoding="utf-8")) == []


def test_a_file_that_moved_is_noticed() -> None:
    text = "see `unike/retrieval.py`, `unike/types.py` and `hparams/my_tables.yaml`"
    assert lost_files(text) == ["unike/retrieval.py"]


def test_the_reference_is_that_of_the_dataclass() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.render_page()
    assert reference.main(["--check"]) == 0


# ---------------------------------------------------------------- commands


def commands() -> list[tuple[str, list[str]]]:
    """Every command of ours in a shell block: its page, and its words."""
    out = []
    for page in PAGES:
        for _, text in blocks(page, "bash"):
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["unike"]:
                    words = ["python", "-m", *words]
                if words[:1] in (["python"], ["accelerate"]):
                    out.append((str(page.relative_to(ROOT)), words))
    return out


def program(words: list[str]) -> list[str]:
    """What a command starts: a module with ``-m``, or a script; with its subcommand, where it has one."""
    start = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    stop = start + (2 if words[start] == "-m" else 1)
    if words[start : start + 3] == ["-m", "unike", "edit"] and set(words) & set(OWN_OPTIONS):
        return ["-m", "unike.own"]
    if words[start : start + 2] == ["-m", "unike"]:
        return words[start : stop + 1]
    return words[start : stop + (words[stop : stop + 1] in SUBCOMMANDS)]


def show_help(name: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """The exit code and what ``--help`` prints. Our own modules share this process: each imports torch."""
    if name[0] == "-m" and name[1].partition(".")[0] in ("benchmarks", "scripts", "unike"):
        monkeypatch.setattr(sys, "argv", ["", *name[2:], "--help"])
        shown = io.StringIO()
        with pytest.raises(SystemExit) as ended, redirect_stdout(shown), redirect_stderr(shown):
            runpy.run_module(name[1], run_name="__main__")
        return int(ended.value.code or 0), shown.getvalue()
    ask = [sys.executable, *name, "--help"]
    done = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*prior to execution:RuntimeWarning")
def test_commands_of_the_docs_know_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[tuple[str, ...], set[str]] = {}
    wrong = []
    for page, words in commands():
        name = tuple(program(words))
        if name not in known and not any(word.startswith("--") for word in words):
            continue
        if name not in known:
            code, shown = show_help(name, monkeypatch)
            assert code == 0, f"{page}: {' '.join(name)}: {shown}"
            known[name] = set(re.findall(r"(?<![\w-])--[\w-]+", shown))
        # What stands before the program is the launcher's.
        after = words[words.index(name[-1]) + 1 :] if name[-1] in words else words
        own = {word.partition("=")[0] for word in after if word.startswith("--")} - known[name]
        wrong += [f"{page}: {' '.join(name)}: {flag}" for flag in own]
    assert len(known) > 5
    assert wrong == []


# ---------------------------------------------------------------- code


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md", "docs/python.md", "docs/caching.md"])
def test_python_blocks_run(name: str, tmp_path: Path) -> None:
    """All of a page in one go, in a folder that sees the project's YAMLs and weights."""
    for shared in ("hparams", "hugging_cache", "data"):
        (tmp_path / shared).symlink_to(ROOT / shared)
    image = "from PIL import Image\nImage.new('RGB', (64, 64), 'blue').save('my_image.png')\n"
    # What the page leaves to its reader.
    rows = "import torch\nkeys, values, queries = (torch.randn(50, 768) for _ in range(3))\n"
    code = image + rows + "\n".join(text for _, text in blocks(ROOT / name, "python"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "kangaroo" in done.stdout or "print(" not in code
    if name == "README.md":
        # Each line of the example states its printed answer.
        promised = re.findall(r"print\(.*\)  # ([\w ]+?)(?:, as before)?$", code, re.M)
        assert done.stdout.split("\n")[:3] == promised


# ---------------------------------------------------------------- length


def count_words(page: Path) -> int:
    return count_in(page.read_text(encoding="utf-8"))


def count_in(text: str) -> int:
    """Words, not the bars and rules of tables."""
    return sum(any(c.isalnum() for c in word) for word in text.split())


def count_own_words(page: Path) -> int:
    """Without the blocks that commands write."""
    text = page.read_text(encoding="utf-8")
    return count_in(re.sub(r"<!-- ([\w ]+) -->.*?<!-- end of \1 -->", "", text, flags=re.S))


def test_pages_are_short() -> None:
    """A page that is written by hand; those of results and of options are written by commands."""
    written = {"docs/hparams.md", "docs/performance_figures.md", "CHANGELOG.md"}
    own = {str(page.relative_to(ROOT)): page for page in PAGES}
    long = {
        name: words
        for name, page in own.items()
        if name not in written
        and not name.startswith("docs/results/")
        and (words := count_own_words(page)) > 1500
    }
    assert long == {}
    assert count_words(ROOT / "README.md") <= 900
    assert count_words(ROOT / "docs" / "compared.md") <= 1000


def test_the_comparison_has_no_gap() -> None:
    """Each row has a cell for each tool, and says what was not found; ours names no more than there is."""
    lines = (ROOT / "docs" / "compared.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == ["", "unike", "EasyEdit", "peft", "lm-evaluation-harness", "pyvene"]
    assert len(rows) > 18
    assert all(len(row) == len(rows[0]) and all(row) for row in rows[1:])
    (ours,) = (row[1] for row in rows if row[0] == "methods x vision-language models")
    kinds = {path.parent.name.removesuffix("_multimodal") for path in ROOT.glob("hparams/*/llava.yaml")}
    # A gate is around a method, and UniKE's own YAMLs lie above.
    assert ours == f"{len(kinds - {'scoped'}) + 1} x {len(BACKBONES)}"


@pytest.mark.slow
def test_a_method_of_ones_own_appears_in_a_table(tmp_path: Path) -> None:
    ((name, code),) = blocks(METHOD_PAGE, "python")
    (tmp_path / name).write_text(code)
    ((_, plan),) = blocks(METHOD_PAGE, "yaml")
    yamls = tmp_path / "hparams"
    yamls.mkdir()
    (yamls / "my_tables.yaml").write_text(plan)
    (yamls / "ft").symlink_to(ROOT / "hparams" / "ft")
    (command,) = (words for _, words in commands() if "hparams/my_tables.yaml" in words)
    for shared in ("hugging_cache", "data"):
        (tmp_path / shared).symlink_to(ROOT / shared)
    words = [sys.executable, *command[1:], "--jobs", "2"]
    words[words.index("--size") + 1] = "2"

    def run(own: str, output: str) -> subprocess.CompletedProcess[str]:
        whole = [*words, "--output", str(tmp_path / output)]
        return subprocess.run(
            whole, cwd=tmp_path, env=environment(UNIKE_METHODS=own), capture_output=True, text=True
        )

    done = run(str(tmp_path / name), "runs")
    assert done.returncode == 0, done.stderr
    assert "| Rank one | **100.0** |" in done.stdout
    without = run("", "without")
    assert without.returncode == 2
    assert "'rank_one' is unknown" in without.stderr
    broken = tmp_path / "broken.py"
    broken.write_text("import math\n\nmath.nothing\n")
    lost = run(str(broken), "broken")
    assert lost.returncode == 2
    assert "UNIKE_METHODS: " in lost.stderr
    assert "(broken.py, line 3)" in lost.stderr


# ---------------------------------------------------------------- the installed package


def test_the_installed_command_is_the_script() -> None:
    import run_edit

    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.scripts]\n")[2]
    named = dict(re.findall(r'^([\w-]+) = "(.+)"', section.partition("\n[")[0], re.M))
    points = {name: EntryPoint(name, value, "console_scripts").load() for name, value in named.items()}
    assert points == {"unike": main, "unike-edit": edit.main}
    assert run_edit.arguments is edit.parse_arguments


def test_a_clone_does_not_hide_the_package_from_its_parent_folder(tmp_path: Path) -> None:
    (tmp_path / "unike").mkdir()
    line = [sys.executable, "-c", "import unike; print(unike.__file__)"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT / "unike" / "__init__.py"), done.stderr


def test_what_a_checkout_alone_has_is_said_in_one_line() -> None:
    assert launching.import_from_checkout("scripts.reference") is reference
    with pytest.raises(UserError, match=r"scripts\.nothing, which is not installed"):
        launching.import_from_checkout("scripts.nothing")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(NO_MKDOCS_2_WARNING="1"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # What a reader's browser would fetch from elsewhere.
    for name in ("method.html", "api.html"):
        page = (tmp_path / "site" / name).read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)', page) == []
        assert re.findall(r'<link[^>]+rel="stylesheet"[^>]+href="(https?:[^"]+)', page) == []
    # The reference is filled from the docstrings.
    assert "Edits a vision-language model with the method that the hyper-parameters name." in page
    assert "sequential_edit" in page
