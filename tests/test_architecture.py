"""How the code is built: who may import whom, how long things may be, what nobody may do.

Every rule reads syntax trees or text only, and carries samples that it must catch and must pass.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def files(*patterns: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


PYTHON = files("run_edit.py", *(f"{part}/**/*.py" for part in ("unike", "scripts", "tests", "benchmarks")))
TEXT = files(
    *("*.md", "*.txt", "*.toml", "Makefile", ".ci/run", "data/*.md", "hugging_cache/*.md"),
    *("docs/**/*.md", "hparams/**/*.yaml", "benchmarks/**/*.md", "notebooks/**/*.ipynb"),
)

# ---------------------------------------------------------------- who may import whom

# Ground first: a room may import itself and what stands before it. Entry points are last.
ROOMS = (
    "types", "system", "config", "datasets", "scoring", "knowledge", "backbones", "edits", "methods",
    "evaluation", "runs", "report", "editor", "easyedit", "ask", "own", "tables", "fetch", "hub", "demo",
    "command", "",
)  # fmt: skip
# Methods and edits see of a backbone its protocol, never a concrete one.
SEES_PROTOCOL = ("edits", "methods")
_SEEN = ("base", "guard", "routing", "layout", "prefix", "images", "hooks")
PROTOCOL = {f"unike.backbones.{name}" for name in _SEEN}
# Methods do not know each other.
ALONE = set(re.findall(r"unike\.methods\.\w+(?=:)", (ROOT / "unike/methods/catalogue.py").read_text("utf-8")))
THIRD_PARTY = (
    ("unike.types", ""),
    ("unike.system.text", ""),
    # Memories on disk, and FAISS.
    *((f"unike.knowledge.{name}", "torch torch.* numpy filelock faiss") for name in ("disk", "index")),
    ("unike.knowledge*", "torch torch.*"),
)


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_name(path) for path in PYTHON}


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every imported module, wherever in the file it is imported."""
    package = module_name(path) if path.endswith("/__init__.py") else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
            base = ".".join(filter(None, (above if node.level else "", node.module)))
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name if name in MODULES else base) for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(arg.value)) for arg in node.args if isinstance(arg, ast.Constant))


def room_of(module: str) -> str:
    """The folder or loose module right below ``unike``; empty for entry points and the package itself."""
    return "" if module.endswith(".__main__") else ".".join(module.split(".")[1:2])


def wrong_imports(path: str, source: str) -> Iterator[str]:
    room = room_of(module_name(path))
    if room not in ROOMS:
        yield f"{path}: {room} is no room; expected one of {', '.join(filter(None, ROOMS))}"
        return
    for line, name in imports(path, source):
        if name.split(".")[0] != "unike":
            continue
        other = room_of(name)
        if other not in ROOMS or ROOMS.index(other) > ROOMS.index(room) or (other == "" and room != ""):
            yield f"{path}:{line}: {room} imports {name}; it may import what stands before it"
        elif other == "backbones" and room in SEES_PROTOCOL and name not in PROTOCOL:
            yield f"{path}:{line}: {room} imports {name}; expected a backbone's protocol"
        elif name in ALONE and room == "methods" and not path.endswith("__init__.py"):
            yield f"{path}:{line}: imports another method, {name}"


def circles(sources: dict[str, str]) -> list[list[str]]:
    """Groups of files that import each other, directly or not; imports inside functions count."""
    known = {module_name(path): path for path in sources}
    arrows = {
        path: {known[name] for _, name in imports(path, source) if known.get(name, path) != path}
        for path, source in sources.items()
    }
    reached: dict[str, set[str]] = {}
    for path in sources:
        seen, left = set[str](), [path]
        while left:
            new = arrows[left.pop()] - seen
            seen |= new
            left += new
        reached[path] = seen
    groups = {tuple(sorted(p for p in seen if path in reached[p])) for path, seen in reached.items()}
    return sorted(list(group) for group in groups if group)


def allowed(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


def wrong_packages(path: str, source: str) -> Iterator[str]:
    known = sys.stdlib_module_names | {"unike"}
    row = next((patterns for name, patterns in THIRD_PARTY if fnmatchcase(module_name(path), name)), None)
    for line, name in imports(path, source):
        if row is not None and name.split(".")[0] not in known and not allowed(name, row):
            yield f"{path}:{line}: imports {name}"


# ---------------------------------------------------------------- sizes

LINES, FUNCTION = 500, 60
SHORTER = {"run_edit.py": 80}


def too_long(path: str, source: str) -> Iterator[str]:
    lines, limit = len(source.splitlines()), SHORTER.get(path, LINES)
    if lines > limit:
        yield f"{path}: {lines} lines; expected at most {limit}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines; expected at most {FUNCTION}"


# ---------------------------------------------------------------- what nobody does

HOOKS = {"register_forward_hook", "register_forward_pre_hook"}
UNSAFE_YAML = re.compile(r"(full_|unsafe_)?load(_all)?|(C?Full|C?Unsafe|C)?Loader")
REPLACING = {"replace", "rename", "renames", "move"}
# OPT's, LLaMA's and EVA's widths: code that knows one works for one size only.
WIDTHS = {1408, 2560, 4096, 5120}


def wrong_hooks(path: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
        if isinstance(name, str) and name in HOOKS:
            yield f"{path}:{node.lineno}: {name}; unike/backbones/hooks.py has capture and transform"


def unsafe_loading(path: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        at = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if given.get("weights_only") != "True":
                yield f"{at}: torch.load without weights_only=True"
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "yaml":
            if UNSAFE_YAML.fullmatch(node.attr):
                yield f"{at}: yaml.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module in ("yaml", "torch"):
            yield from (f"{at}: imports {a.name}" for a in node.names if UNSAFE_YAML.fullmatch(a.name))
        elif "trust_remote_code" in (getattr(node, "arg", None), getattr(node, "value", None)):
            yield f"{at}: trust_remote_code"


def pickles(path: str, source: str) -> Iterator[str]:
    """Pickle may be imported for the name of its exception, by which a bad file is told."""
    tree = ast.parse(source)
    harmless = {"pickle.UnpicklingError", "pickle.PickleError"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bad = [a.name for a in node.names if a.name in ("cPickle", "dill", "cloudpickle", "joblib")]
            bad += [a.name for a in node.names if a.name == "pickle" and a.asname]
        elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "cloudpickle", "joblib"):
            bad = [a.name for a in node.names if f"{node.module}.{a.name}" not in harmless]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            bad = [] if ast.unparse(node) in harmless else [ast.unparse(node)]
        elif isinstance(node, ast.keyword) and ast.unparse(node.value) == "pickle":
            bad = [f"{node.arg}=pickle"]
        else:
            continue
        yield from (f"{path}:{node.lineno}: {name}" for name in bad)


def second_writers(path: str, source: str) -> Iterator[str]:
    """Whatever puts one file in another one's place."""
    for node in ast.walk(ast.parse(source)):
        at = f"{path}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)}"
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil"):
            yield from (at for a in node.names if a.name in REPLACING)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            module, name = ast.unparse(node.func.value), node.func.attr
            # ``str.replace`` takes two texts, ``Path.replace`` one path.
            one = len(node.args) == 1 and not node.keywords and name in ("replace", "rename")
            if (module in ("os", "shutil") and name in REPLACING) or (one and module != "dataclasses"):
                yield at


def wired_in(path: str, source: str) -> Iterator[str]:
    """Devices and widths that belong into a YAML or come from the model."""
    for node in ast.walk(ast.parse(source)):
        at = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            yield f"{at}: .cuda()"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"cuda:\d+", node.value):
                yield f"{at}: {node.value}"
        elif isinstance(node, ast.Constant) and type(node.value) is int and node.value in WIDTHS:
            yield f"{at}: the width {node.value}"


def copied_models(path: str, source: str) -> Iterator[str]:
    """Where torch is at hand, what is copied deeply is a model sooner or later."""
    if any(name.split(".")[0] in ("torch", "transformers") for _, name in imports(path, source)):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Attribute, ast.alias)) and "deepcopy" in ast.unparse(node):
                yield f"{path}:{node.lineno}: deepcopy"


def commented_out_code(path: str, source: str) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and _is_code(token.string.lstrip("#! ")):
            yield f"{path}:{token.start[0]}: {token.string}"


def _is_code(text: str) -> bool:
    try:
        (statement,) = ast.parse(text + "\n    pass" if text.endswith(":") else text).body
    except (SyntaxError, ValueError):
        return False
    if isinstance(statement, (ast.Expr, ast.AnnAssign)):
        return isinstance(statement.value, (ast.Call, ast.Await, ast.Yield))
    return True


MACHINE_PATH = re.compile(r"(?<![\w./~>-])/(?:home|root|tmp|Users|mnt|opt|work|workspace|scratch)/\w")


def machine_paths(path: str, source: str) -> Iterator[str]:
    for number, line in enumerate(source.splitlines(), 1):
        if MACHINE_PATH.search(line):
            yield f"{path}:{number}: {line.strip()}"


def squeezed_lines(path: str, source: str) -> Iterator[str]:
    """Lines that the formatter would spread, kept short against the limits above."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and re.search(r"fmt:\s*(skip|off)", token.string):
            yield f"{path}:{token.start[0]}: {token.string}"


# ---------------------------------------------------------------- the rules


@dataclass(frozen=True)
class Rule:
    """``caught`` and ``passed`` are sources, as lying at ``at``; ``but`` are files it does not hold for."""

    find: Callable[[str, str], Iterator[str]]
    scope: tuple[str, ...]
    at: str
    caught: tuple[str, ...]
    passed: tuple[str, ...]
    but: tuple[str, ...] = ()

    def held(self) -> list[str]:
        return [p for p in (*PYTHON, *TEXT) if p.startswith(self.scope) and p not in self.but]


SHIPPED = ("unike/", "scripts/", "run_edit.py")
CODE = (*SHIPPED, "tests/", *files("benchmarks/*.py"))
METHOD = "unike/methods/unike.py"
RULES = (
    Rule(
        wrong_imports, ("unike/",), METHOD,
        caught=(
            "import unike.evaluation.metrics",
            "from unike.evaluation import metrics",
            "from unike import load_backbone",
            "from unike.methods.ft import FineTuning",
            "from unike.methods import ft",
            "from .ft import FineTuning",
            "from . import ft",
            "def late():\n    from unike.backbones.vlm import Dialogue",
            "from unike.backbones import load_backbone",
            "import importlib\nimportlib.import_module('unike.backbones.loading')",
        ),
        passed=(
            "import torch\nfrom unike.methods.base import register",
            "from .base import register",
            "from unike.backbones.base import Backbone",
        ),
    ),
    Rule(
        wrong_imports, ("unike/",), "unike/system/files.py",
        caught=("from unike.config import OPTIONS", "def late():\n    from unike.runs.records import merge"),
        passed=("from unike.types import UserError", "from unike.system.faults import explain_write_errors"),
    ),
    Rule(
        wrong_imports, ("unike/",), "unike/runs/check.py",
        caught=("import unike.report", "from unike.tables import main", "from unike.edits import __main__"),
        passed=("from unike.evaluation import summary", "from unike.methods import ft"),
    ),
    Rule(
        wrong_imports, ("unike/",), "unike/edits/__main__.py",
        caught=("from unike import MultimodalEditors as M\nimport unike.nothing",),
        passed=("from unike.editor import MultimodalEditor", "from unike.tables import main"),
    ),
    Rule(wrong_imports, ("unike/",), "unike/somewhere.py", ("",), ()),
    Rule(
        wrong_packages, ("unike/",), "unike/knowledge/patch.py",
        caught=("import numpy as np", "from transformers import AutoConfig"),
        passed=("import math\nimport torch.nn.functional as F\nfrom torch import nn",),
    ),
    Rule(wrong_packages, ("unike/",), "unike/types.py", ("import torch",), ("import typing",)),
    Rule(
        too_long, CODE, METHOD,
        caught=("x = 1\n" * (LINES + 1), "def f():\n" + "    pass\n" * FUNCTION),
        passed=("x = 1\n" * LINES, "def f():\n" + "    pass\n" * (FUNCTION - 1)),
    ),
    Rule(
        wrong_hooks, SHIPPED, METHOD,
        caught=(
            "m.register_forward_hook(h)",
            "m.layers[0].register_forward_pre_hook(h, with_kwargs=True)",
            "getattr(m, 'register_forward_hook')(h)",
        ),
        passed=("from unike.backbones.hooks import capture",),
        but=("unike/backbones/hooks.py",),
    ),
    Rule(
        unsafe_loading, SHIPPED, METHOD,
        caught=(
            "torch.load(p)",
            "torch.load(p, weights_only=False)",
            "from torch import load",
            "yaml.load(t, Loader=yaml.SafeLoader)",
            "yaml.unsafe_load(t)",
            "class L(yaml.FullLoader): pass",
            "from yaml import load",
            "AutoModel.from_pretrained(n, trust_remote_code=True)",
            "options = {'trust_remote_code': True}",
        ),
        passed=("torch.load(p, weights_only=True)", "yaml.safe_load(t)", "class L(yaml.SafeLoader): pass"),
    ),
    Rule(
        pickles, SHIPPED, METHOD,
        caught=(
            "import pickle\npickle.load(f)",
            "import pickle\ntorch.load(f, pickle_module=pickle)",
            "from pickle import loads",
            "import pickle as p",
            "import dill",
        ),
        passed=("import pickle\ntry: f()\nexcept pickle.UnpicklingError: pass",),
    ),
    Rule(
        second_writers, SHIPPED, METHOD,
        caught=(
            "import os\nos.replace(part, path)",
            "import os\nos.rename(part, path)",
            "from os import replace",
            "import shutil\nshutil.move(part, path)",
            "part.replace(path)",
            "Path(part).rename(path)",
        ),
        passed=(
            "from unike.system.files import replace_atomically\nwith replace_atomically(p) as part: f(part)",
            "text.replace(a, b)",
            "from dataclasses import replace\nreplace(query, image=None)",
            "store.add(edit, replace=True)",
        ),
        but=("unike/system/files.py",),
    ),
    Rule(
        wired_in, SHIPPED, METHOD,
        caught=("model.cuda()", "x.to('cuda:0')", "nn.Linear(2560, n)"),
        passed=("x.to(device)", "f'cuda:{number}'", "nn.Linear(width, n)"),
        # EVA ViT-g is known by its width, as published models are: its file has one block too many.
        but=("unike/backbones/original.py", "unike/backbones/published.py"),
    ),
    Rule(
        copied_models, SHIPPED, METHOD,
        caught=("import copy, torch\ncopy.deepcopy(m)", "import torch\nfrom copy import deepcopy"),
        passed=("import copy\ncopy.deepcopy(values)", "import torch\nm.state_dict()"),
    ),
    Rule(
        commented_out_code, CODE, METHOD,
        caught=("# x = f(y)", "x = 1  # print(x)", "# if x:", "# import torch", "# return x + 1"),
        passed=(
            "# The rate decides everything.", "# fmt: skip", "# type: ignore[arg-type]", "# noqa: E501",
            "# alpha = 0 where none is left", "# prompt", "#!/usr/bin/env python", "# ---------- reading",
        ),
    ),
    Rule(
        squeezed_lines, ("unike/", "run_edit.py"), METHOD,
        caught=("x = (1, 2)  # fmt: " + "skip", "# fmt: " + "off"),
        passed=("x = 1  # noqa: E501", "# fmt: on"),
    ),
    Rule(
        machine_paths, ("",), METHOD,
        caught=("x = '/ho" + "me/me/x.pth'", "cd /tm" + "p/x", "(/ro" + "ot/x)"),
        passed=("https://host/home/x", "./a/tm" + "p/x", "Path('/proc/meminfo')", "work/vision.safetensors"),
    ),
)  # fmt: skip
NAMES = [f"{rule.find.__name__}-{Path(rule.at).stem}" for rule in RULES]


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_the_code_keeps_the_rule(rule):
    held = rule.held()
    assert held, "a rule that reads no file holds nothing"
    assert [p for f in held for p in rule.find(f, (ROOT / f).read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_the_rule_catches_what_it_should_and_nothing_else(rule):
    assert [s for s in rule.caught if not list(rule.find(rule.at, s))] == []
    assert [s for s in rule.passed if list(rule.find(rule.at, s))] == []


def test_no_files_import_each_other_in_a_circle():
    assert circles({p: (ROOT / p).read_text("utf-8") for p in PYTHON if p.startswith("unike/")}) == []


def test_a_circle_is_found_wherever_its_imports_stand():
    sources = {
        "unike/types.py": "import unike.config.schema",
        "unike/config/schema.py": "def late():\n    from unike.knowledge import memory",
        "unike/knowledge/memory.py": "from unike import types",
        "unike/tables.py": "import unike.types",
    }
    assert circles(sources) == [["unike/config/schema.py", "unike/knowledge/memory.py", "unike/types.py"]]
    sources["unike/types.py"] = ""
    assert circles(sources) == []


def test_every_room_is_there():
    there = {room_of(module_name(path)) for path in PYTHON if path.startswith("unike/")}
    assert there == set(ROOMS)


def test_few_modules_are_loose():
    loose = [p for p in PYTHON if re.fullmatch(r"unike/\w+\.py", p) and "__" not in p]
    assert len(loose) <= 5


def test_a_short_script_stays_short():
    assert [bool(list(too_long("run_edit.py", "x = 1\n" * n))) for n in (80, 81)] == [False, True]


# ---------------------------------------------------------------- equations

CLAIM = re.compile(r"Eq\.\s+\((\d+)\)")
CORE = {*range(1, 8), *range(11, 21)}


def claims(path: str, source: str) -> list[tuple[int, str]]:
    """``(n, who)`` for each "Eq. (n)" in a docstring."""

    def walk(node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str) -> Iterator[tuple[int, str]]:
        yield from ((int(n), name) for n in set(CLAIM.findall(ast.get_docstring(node) or "")))
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                yield from walk(child, f"{name}.{child.name}")

    return list(walk(ast.parse(source), module_name(path)))


CLAIMED = [c for p in PYTHON if p.startswith("unike/") for c in claims(p, (ROOT / p).read_text("utf-8"))]


def test_claims_are_found_in_docstrings_only():
    source = '"""Eq. (1)."""\nclass A:\n  def f(self):\n    """Eq. (2),\n    Eq.\n (3)."""\n# Eq. (4)\n'
    found = sorted(claims("unike/a.py", source + 'x = "Eq. (5), Eq. 6"'))
    assert found == [(1, "unike.a"), (2, "unike.a.A.f"), (3, "unike.a.A.f")]


def test_each_equation_has_one_owner():
    twice = [n for n, times in Counter(n for n, _ in CLAIMED).items() if times > 1]
    assert [claim for claim in CLAIMED if claim[0] in twice] == []
    assert {n for n, _ in CLAIMED} >= CORE


def test_the_documentation_names_each_owner():
    rows = re.findall(r"^\| \((\d+)\) \| `([\w.]+)`", (ROOT / "docs/paper.md").read_text("utf-8"), re.M)
    assert sorted((int(n), name) for n, name in rows) == sorted(CLAIMED)
