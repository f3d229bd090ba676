"""Methods of a user's own: found by file and by module, and what is wrong with one is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from worlds import BASE, SETTINGS, case, load_small

from unike.backbones.prefix import PrefixCache
from unike.config.hparams import HyperParams
from unike.methods import (
    EditMethod,
    MethodNeeds,
    TrainableMethod,
    build,
    list_methods,
    registry,
    resolve_needs,
)
from unike.methods import plugins as own
from unike.methods.catalogue import BUILT_IN
from unike.types import UserError

ROOT = Path(__file__).parents[1]

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
    monkeypatch.setattr(registry, "_REGISTER", dict(registry._REGISTER))
    yield
    for name in ("by_file", "by_module", "mine"):
        sys.modules.pop(name, None)


def hparams(method: str) -> HyperParams:
    return HyperParams.from_dict({"model_name": "blip2", "name": "x", "method": method}, source="my.yaml")


def test_a_file_and_a_module_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "by_file.py").write_text(METHOD.format(name="filed"))
    (tmp_path / "by_module.py").write_text(METHOD.format(name="moduled"))
    monkeypatch.syspath_prepend(tmp_path)
    assert not {"filed", "moduled"} & set(list_methods())
    with pytest.raises(UserError, match=r"my\.yaml: method: 'filed' is unknown"):
        registry.check_method(hparams("filed"))
    monkeypatch.setenv("UNIKE_METHODS", f"{tmp_path / 'by_file.py'}{os.pathsep}by_module")
    assert {"filed", "moduled"} <= set(list_methods())
    # Once: a second import would register the name again.
    registry.check_method(hparams("filed"))
    registry.check_method(hparams("moduled"))


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
        registry.check_method(hparams("unike"))
    (said,) = raised.value.problems
    assert said.isprintable()
    assert "mine" not in sys.modules


def test_a_package_names_its_method_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = EntryPoint("mine", "no_such_package.mine", own.GROUP)
    monkeypatch.setattr(own, "entry_points", lambda group: [lost] if group == own.GROUP else [])
    with pytest.raises(UserError, match=r"entry point mine of unike\.methods: no_such_package\.mine cannot"):
        list_methods()


FORMER = """
from unike.methods import EditMethod, TrainableMethod
from unike.methods.base import edited_layers, register


class Former:
    def __init__(self, hparams, knowledge):
        self.hparams, self.network = hparams, "network"

    def layers(self, backbone):
        return edited_layers(self.hparams, backbone)[-1:]

    def edit(self, backbone, request, prefixes, history=None):
        if request.id == "broken":
            raise FloatingPointError("the loss is nan")
        return PromptEdit((Fact(request.id, Shown("New Fact", 2), ()),), 100, {"steps": 0})


@register("plain")
class Plain(Former):
    pass


@register("batched")
class Batched(Former):
    def edit_many(self, backbone, requests, prefixes):
        return [self.edit(backbone, request, prefixes) for request in reversed(requests)][::-1]


@register("made")
def make(hparams, knowledge):
    return Former(hparams, knowledge)


@register("derived")
class Derived(EditMethod):
    edit = Former.edit


@register("trained")
class Trained(TrainableMethod):
    edit = Former.edit

    def build(self, backbone):
        raise NotImplementedError

    def loss(self, backbone, case, prefixes):
        raise NotImplementedError
"""


@pytest.mark.parametrize("name", ["plain", "batched", "made", "derived", "trained"])
def test_a_method_of_the_former_shape_works_with_a_warning(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("from unike.edits import Fact, PromptEdit, Shown\n" + FORMER)
    monkeypatch.setenv("UNIKE_METHODS", str(tmp_path / "mine.py"))
    with pytest.warns(DeprecationWarning, match=r"defines edit: a method is a subclass of unike\.methods"):
        method = build(hparams(name))
    assert isinstance(method, EditMethod)
    assert resolve_needs(hparams(name)) == MethodNeeds(training=name == "trained")
    backbone = load_small("blip2")
    if isinstance(method, TrainableMethod):
        assert method.get_shared_parts().network is None
    elif name != "derived":
        assert method.layers(backbone) == [len(backbone.layout) - 1]
        assert method.get_shared_parts().network == "network"
    prefixes = PrefixCache(backbone, method.layers(backbone)[0])
    requests = [case(0).request, case(1).request]
    alone, together = (
        method.edit(backbone, requests[0], prefixes),
        method.edit_many(backbone, requests, prefixes),
    )
    assert [edit.id for edit in (alone, *together)] == ["e0", "e0", "e1"]
    assert [origin.method for edit in (alone, *together) for origin in edit.origins] == [name] * 3
    if name != "batched":
        broken = [replace(requests[0], id="broken"), requests[1]]
        failed, made = method.edit_many(backbone, broken, prefixes)
        assert isinstance(failed, FloatingPointError)
        assert made.id == "e1"


def test_registering_leaves_the_class_as_it_is() -> None:
    class Mine(EditMethod):
        def _edit(self, backbone, request, prefixes, history):
            raise NotImplementedError

    before = dict(vars(Mine))
    assert registry.register("mine")(Mine) is Mine
    assert dict(vars(Mine)) == before


def test_what_makes_no_edits_is_said_in_one_line() -> None:
    registry.register("mine")(lambda hparams, knowledge: knowledge)
    with pytest.raises(UserError, match=r"my\.yaml: method: mine: dict makes no edits; expected"):
        build(hparams("mine"))


def test_names_and_needs_are_known_without_torch() -> None:
    code = (
        "import sys; from unike.config import HyperParams; from unike.methods import resolve_needs\n"
        "needs = resolve_needs(HyperParams.from_hparams('hparams/tiny_blip2.yaml'))\n"
        "print(needs.knowledge, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["True", "False"]


def test_installed_packages_are_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    monkeypatch.setattr(own, "entry_points", lambda group: searched.append(group) or [])
    for _ in range(3):
        resolve_needs(hparams("unike"))
    assert searched == [own.GROUP]


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_an_entry_says_whether_its_method_is_trained(name: str) -> None:
    method = build(HyperParams.from_dict({**BASE, "method": name, **SETTINGS[name][0]}))
    assert isinstance(method, TrainableMethod) == BUILT_IN[name].trainable == method.trainable
