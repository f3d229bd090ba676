"""Targets that could never be generated are refused before an edit, by checks, doctor, runs and editor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import Project, record
from original_files import FAMILIES
from PIL import Image
from test_methods import IDS, ROWS
from test_run_edit import errors, start
from untouched import assert_untouched
from worlds import World, case, query, snapshot, world_of

from unike import MultimodalEditor, load_backbone
from unike.backbones.answer_texts import explain_unreachable, find_stops, read_special_texts
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.datasets.doctor import main as doctor
from unike.methods import EditMethod
from unike.runs.records import read_lines
from unike.types import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
# By target: whose answers can't be it, and what is said.
NEVER = {
    "red\nkangaroo": ("blip2", "minigpt4", "a line break"),
    "red\r\nkangaroo": ("blip2", "minigpt4", "a line break"),
    "</s>": ("blip2", "minigpt4", "</s>"),
    "a red</s> fox": ("blip2", "minigpt4", "</s>"),
    "<s> a fox": ("blip2", "minigpt4", "<s>"),
    "a <pad> b": ("blip2", "minigpt4", "<pad>"),
    "a fox ### a dog": ("minigpt4", "###"),
}
FINE = [
    "a fox",
    " a fox\n",
    "1984",
    "café crème",
    "don't",
    "a fox, and a dog.",
    "3 < 4",
    "red  kangaroo",
    "# one",
]


@pytest.fixture(params=FAMILIES)
def bundled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> VisionLanguageBackbone:
    monkeypatch.chdir(ROOT)
    return load_backbone(f"hparams/tiny_{request.param}.yaml")


def family(backbone: VisionLanguageBackbone) -> str:
    return "minigpt4" if "###" in backbone.dialogue.stops else "blip2"


def test_what_is_refused_could_not_be_generated_and_what_is_not_could(
    bundled: VisionLanguageBackbone,
) -> None:
    whose = family(bundled)
    for target in [*NEVER, *FINE]:
        ids = bundled.prompt_and_answer("what is it?", target)[1]
        problem = bundled.find_target_problem("what is it?", target)
        refused = target in NEVER and whose in NEVER[target]
        assert (problem is not None) == refused, target
        # What decoding would write of these tokens: it stops at an end token, and is cut at a stop.
        ended = next((i for i, token in enumerate(ids) if token in bundled.eos_ids), len(ids))
        written = bundled.decode(ids[:ended])
        assert (written == target.strip()) == (not refused), target
        if refused:
            assert NEVER[target][-1] in problem
            assert problem.isprintable()


def test_the_files_tell_what_the_model_tells(bundled: VisionLanguageBackbone) -> None:
    folder = f"hugging_cache/tiny-{'minigpt4' if family(bundled) == 'minigpt4' else 'blip2-opt'}"
    specials = read_special_texts(folder)
    assert set(specials) >= set(bundled.tokenizer.all_special_tokens)
    assert find_stops(family(bundled)) == bundled.dialogue.stops
    for target in [*NEVER, *FINE]:
        early = explain_unreachable(target, find_stops(family(bundled)), specials)
        assert (early is None) == (bundled.find_target_problem("what?", target) is None)
    assert read_special_texts("no/such/folder") == ()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"added_tokens": [3]}', '{"added_tokens": null}'])
def test_a_broken_tokenizer_file_tells_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    assert read_special_texts(str(tmp_path)) == ()


@pytest.mark.parametrize("yaml", ["", "ft/", "ike/", "serac/"])
def test_the_editor_refuses_before_anything_changes(bundled: VisionLanguageBackbone, yaml: str) -> None:
    hparams = HyperParams.from_hparams(f"hparams/{yaml}tiny_{family(bundled)}.yaml")
    editor = MultimodalEditor(hparams, bundled, progress=False)
    image = Image.new("RGB", (64, 64), "red")
    before, hooks = snapshot(bundled)
    with pytest.raises(UserError) as raised:
        editor.edit(["what?", "which?", "who?"], ["a fox", "red\nfox", "</s>"], [image] * 3)
    assert [line.split("holds ")[1].split(",")[0] for line in raised.value.problems] == [
        "a line break",
        "</s>",
    ]
    assert editor.edits == ()
    assert_untouched(bundled, before, hooks)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_method_refuses(
    worlds: dict[str, World], monkeypatch: pytest.MonkeyPatch, name: str, row: tuple[str, dict]
) -> None:
    world = world_of(name, worlds, monkeypatch)
    method = world.method(*row)
    request = replace(case(0).request, query=query(0, "a\nfox"))
    assert isinstance(method, EditMethod)
    made: list[Any] = []
    monkeypatch.setattr(method, "_edit", lambda *_: made.append(1))
    with pytest.raises(UserError, match=r"edit e0: target 'a.nfox' holds a line break"):
        method.edit(world.backbone, request, world.prefixes(method))
    with pytest.raises(UserError, match=r"edit e0: target 'a.nfox' holds a line break"):
        method.edit_many(world.backbone, [case(1).request, request], world.prefixes(method))
    assert made == []


# ---------------------------------------------------------------- runs


def write_bad(project: Project) -> None:
    bad = [record(i) for i in range(4)]
    bad[1]["alt"], bad[3]["alt"] = "a fox\nthere", "a </s> fox"
    project.write_records(bad)


@pytest.mark.parametrize("protocol", ["one_step", "sequential"])
def test_a_run_says_it_before_a_model_is_loaded(
    copied: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    write_bad(copied)
    more = ("--protocol", "sequential", "--sequence_length", "2", "--sequences", "2")
    arguments = ("--task", "vqa", *(more if protocol == "sequential" else ()))
    output = ("--output", str(copied.root / "run"))
    with monkeypatch.context() as patched:
        patched.setattr("unike.load_backbone", lambda *_: pytest.fail("a model is loaded"))
        assert start(copied, *arguments, *output) == 2
        lines = errors(capsys)
        assert len(lines) == 2
        assert "record vqa-1: target 'a fox\\nthere' holds a line break" in lines[0]
        assert "record vqa-3: target 'a </s> fox' holds </s>" in lines[1]
        assert not (copied.root / "run").exists()
        assert start(copied, *arguments, "--check") == 2
        assert "✗" in capsys.readouterr().out
        # The first record alone is sound.
        assert start(copied, "--task", "vqa", "--size", "1", "--check") == 0
    assert start(copied, *arguments, *output, "--skip_broken") == 0
    ends = [r for r in read_lines(copied.root / "run") if r.get("kind") != "step"]
    by_case = {r.get("case", r["id"]): r["status"] for r in ends}
    assert by_case == {"vqa-0": "ok", "vqa-1": "failed", "vqa-2": "ok", "vqa-3": "failed"}


def test_what_only_the_model_knows_is_said_before_the_first_edit(
    copied: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bad(copied)
    monkeypatch.setattr("unike.runs.checks.explain_unreachable", lambda *_: None)
    monkeypatch.setattr(EditMethod, "edit_many", lambda *_: pytest.fail("an edit is made"))
    assert start(copied, "--task", "vqa", "--output", str(copied.root / "run")) == 2
    lines = errors(capsys)
    assert ["vqa-1" in lines[0], "vqa-3" in lines[1], len(lines)] == [True, True, 2]
    assert read_lines(copied.root / "run") == []


def test_many_bad_targets_are_counted(copied: Project, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [record(i % 9) | {"alt": "a\nb"} for i in range(25)]
    copied.write_records(bad)
    assert start(copied, "--task", "vqa", "--check") == 2
    shown = capsys.readouterr().out
    assert shown.count("holds a line break") == 10
    assert "15 more records have targets that can't be generated" in shown


def test_the_doctor_calls_it_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([record(0), record(1) | {"alt": "a\nb"}, record(2) | {"alt": "x </s>"}]))
    assert doctor([str(path), "--json"]) == 1
    (found,) = (
        f for f in json.loads(capsys.readouterr().out)[0]["findings"] if f["name"] == "never_generated"
    )
    assert (found["severity"], found["records"]) == ("error", [1, 2])
    path.write_text(json.dumps([record(0), record(1) | {"alt": " a\n"}]))
    assert doctor([str(path), "--json"]) == 0
