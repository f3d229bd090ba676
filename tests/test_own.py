"""Methods of a user's own: found by file and by module, and what is wrong with one is one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from unike.config.hparams import HyperParams
from unike.methods import base, methods
from unike.methods import plugins as own
from unike.types import UserError

METHOD = """
from unike.methods.base import register

@register("{name}")
class Own:
    def __init__(self, hparams, knowledge):
        self.hparams = hparams
"""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers and imports is gone behind it."""
    monkeypatch.setattr(own, "_LOADED", set())
    monkeypatch.setattr(base, "_REGISTER", dict(base._REGISTER))
    yield
    for name in ("by_file", "by_module", "mine"):
        sys.modules.pop(name, None)


def hparams(method: str) -> HyperParams:
    return HyperParams.from_dict({"model_name": "blip2", "name": "x", "method": method}, source="my.yaml")


def test_a_file_and_a_module_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "by_file.py").write_text(METHOD.format(name="filed"))
    (tmp_path / "by_module.py").write_text(METHOD.format(name="moduled"))
    monkeypatch.syspath_prepend(tmp_path)
    assert not {"filed", "moduled"} & set(methods())
    with pytest.raises(UserError, match=r"my\.yaml: method: 'filed' is unknown"):
        base.check_method(hparams("filed"))
    monkeypatch.setenv("UNIKE_METHODS", f"{tmp_path / 'by_file.py'}{os.pathsep}by_module")
    assert {"filed", "moduled"} <= set(methods())
    # Once: a second import would register the name again.
    base.check_method(hparams("filed"))
    base.check_method(hparams("moduled"))


WRONG = [
    ("import math\n\nmath.nothing\n", r"AttributeError: .* \(mine\.py, line 3\)"),
    ("x = (\n", r"SyntaxError: .*\(mine\.py, line 1\)"),
    (METHOD.format(name="ft"), r"ValueError: a method named 'ft' is registered already"),
    (None, r"FileNotFoundError: no such file"),
]


@pytest.mark.parametrize(("text", "line"), WRONG, ids=["name", "syntax", "twice", "lost"])
def test_what_is_wrong_with_a_file_is_one_line(
    text: str | None, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("UNIKE_METHODS", str(path))
    with pytest.raises(UserError, match=rf"UNIKE_METHODS: \S*mine\.py cannot be imported: {line}") as raised:
        base.check_method(hparams("unike"))
    (said,) = raised.value.problems
    assert said.isprintable()
    assert "mine" not in sys.modules


def test_a_package_names_its_method_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = EntryPoint("mine", "no_such_package.mine", own.GROUP)
    monkeypatch.setattr(own, "entry_points", lambda group: [lost] if group == own.GROUP else [])
    with pytest.raises(UserError, match=r"entry point mine of unike\.methods: no_such_package\.mine cannot"):
        methods()
