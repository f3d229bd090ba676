"""What users hand to the editor: each form gives what the plain form gives, or one clear line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Project, record
from PIL import Image

from unike.datasets.mmedit import VQA_TEMPLATE, VQADataset, wrap_prompt
from unike.editor import MultimodalEditor
from unike.editor.metrics import merge_probes
from unike.evaluation.record import Record, Score
from unike.types import Case, EditRequest, Probe, Query, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT, TARGET = "Question: what is it? Short answer:", "a red fox"


@pytest.fixture(scope="module")
def project(blip2_project: Project) -> Project:
    return blip2_project


def picture(project: Project, i: int = 0) -> Path:
    return project.data / f"{i}.png"


def score(result: tuple[Any, ...]) -> list[Any]:
    """What was measured, without times."""
    return [(m["pre"], m["post"]) for m in result[0]]


FORMS: dict[str, Callable[[Path], Any]] = {
    "array": lambda p: np.asarray(Image.open(p)),
    "floats": lambda p: np.asarray(Image.open(p)) / 255.0,
    "tensor": lambda p: torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1),
    "bytes": lambda p: p.read_bytes(),
    "BytesIO": lambda p: io.BytesIO(p.read_bytes()),
    "open file": lambda p: p.open("rb"),
    "Hugging Face": lambda p: {"bytes": p.read_bytes(), "path": None},
    "list of one": lambda p: [p],
    "generator": lambda p: (image for image in [p]),
    "batch of one": lambda p: np.asarray(Image.open(p))[None],
}


@pytest.mark.parametrize("form", FORMS)
def test_an_edit_is_the_same_whatever_the_image_is_handed_over_as(
    editor: MultimodalEditor, project: Project, form: str
) -> None:
    path = picture(project)
    plain = editor.edit(PROMPT, TARGET, path)
    found = editor.edit(PROMPT, TARGET, FORMS[form](path))
    assert score(found) == score(plain)
    assert score(editor.edit(PROMPT, TARGET, picture(project, 1))) != [], "another image is another edit"
    one, two = (result[1].edits[0].state_dict() for result in (plain, found))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("list of one", "generator", "batch of one")])
def test_a_question_is_the_same_whatever_the_image_is_handed_over_as(
    editor: MultimodalEditor, project: Project, form: str
) -> None:
    path = picture(project)
    _, edited, _ = editor.edit(PROMPT, TARGET, path)
    given = FORMS[form]
    assert edited.generate(given(path), PROMPT, 8).startswith(TARGET)
    assert editor.generate(given(path), PROMPT) == editor.generate(path, PROMPT)
    assert editor.ask(given(path), PROMPT).after == editor.ask(path, PROMPT).after


def test_lists_of_questions_give_lists_of_answers(editor: MultimodalEditor, project: Project) -> None:
    _, edited, _ = editor.edit(PROMPT, TARGET, picture(project))
    images, prompts = [picture(project), picture(project, 1), None], [PROMPT, "what is it?", "who was king?"]
    for model in (edited, editor):
        each = [model.generate(i, p) for i, p in zip(images, prompts, strict=True)]
        assert model.generate(images, prompts) == each
    assert editor.generate(images[:2], PROMPT) == [editor.generate(i, PROMPT) for i in images[:2]]
    assert editor.generate(images[0], prompts) == [editor.generate(images[0], p) for p in prompts]
    assert editor.generate([], []) == []
    with pytest.raises(UserError, match="as many as prompts, 3, got 2"):
        editor.generate(images[:2], prompts)
    with pytest.raises(UserError, match=r"\[1\] prompt: expected a text, got null"):
        editor.generate(images[0], [PROMPT, None])  # type: ignore[list-item]


def test_prompts_and_targets_are_stripped(minigpt4_project: Project) -> None:
    editor = MultimodalEditor.from_hparams(minigpt4_project.yaml, progress=False)
    image = picture(minigpt4_project)
    plain = editor.edit(PROMPT, TARGET, image)
    (edit,) = plain[1].edits
    (again,) = editor.edit(f" {PROMPT} \n", f"{TARGET} ", image)[1].edits
    assert again.id == edit.id
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in edit.state_dict().items())
    assert editor.generate(image, f"{PROMPT} ", 8, edited=True).startswith(TARGET)
    assert editor.ask(image, f"\t{PROMPT} ").after.startswith(TARGET)
    assert Query(None, " a ", " b ") == Query(None, "a", "b")


def test_a_prompt_that_is_templated_already_is_wrapped_once(
    editor: MultimodalEditor, project: Project
) -> None:
    for given in ("what is it?", " what is it? ", PROMPT, f"{PROMPT} "):
        metrics, _, _ = editor.edit(given, TARGET, picture(project), template=VQA_TEMPLATE)
        assert metrics[0]["requested_rewrite"]["prompt"] == PROMPT
    for given in ("what is it?", PROMPT, f"{PROMPT} "):
        rows = [{**mmedit_rows(1)[0], "src": given}]
        project.write_records(rows, "wrapped")
        cases = VQADataset(project.data / "wrapped_eval.json", project.data)
        assert cases[0].request.query.prompt == PROMPT
    assert wrap_prompt("Q: {} A: ", "Q: x A:") == "Q: x A:"
    assert wrap_prompt("Q: {} A: ", "Q: A:") == "Q: Q: A: A: "
    assert wrap_prompt("{}", " x ") == "x"
    assert wrap_prompt(VQA_TEMPLATE, "Question: is it?") == "Question: Question: is it? Short answer:"


# ---------------------------------------------------------------- requests


def test_a_missing_argument_is_named(editor: MultimodalEditor, project: Project) -> None:
    with pytest.raises(UserError, match="targets: is missing; expected a text"):
        editor.edit(prompts=PROMPT, image=picture(project))
    with pytest.raises(UserError) as caught:
        editor.edit()
    assert [line.split(":")[0] for line in caught.value.problems] == ["prompts", "targets"]
    with pytest.raises(UserError, match="ds: expected a data set"):
        editor.edit_dataset()


def test_a_request_without_an_image_is_of_the_language_model(
    editor: MultimodalEditor, project: Project
) -> None:
    for image in ((), (None,), ([None],)):
        (metric,), edited, _ = editor.edit("who was the king of 3?", TARGET, *image)
        assert metric["post"]["rewrite_acc"] == 1 > metric["pre"]["rewrite_acc"]
        assert edited.generate(None, "who was the king of 3?", 8).startswith(TARGET)
    mixed, _, _ = editor.edit([PROMPT, "who?"], [TARGET, "a man"], [picture(project), None])
    assert [m["requested_rewrite"]["image"] for m in mixed] == [picture(project), None]
    with pytest.raises(UserError, match="rephrase_image: the request has no image"):
        editor.edit("who?", TARGET, None, rephrase_image=picture(project))


def test_parts_and_probes_that_are_none_are_left_out(editor: MultimodalEditor, project: Project) -> None:
    text = {"prompt": "who was king?", "ground_truth": "a man"}
    nothing = {"prompt": None, "ground_truth": None}
    alone = editor.edit(PROMPT, TARGET, picture(project), locality_inputs={"text": text})
    for locality in ({"text": text, "vision": None}, {"text": text, "vision": {**nothing, "image": None}}):
        assert score(editor.edit(PROMPT, TARGET, picture(project), locality_inputs=locality)) == score(alone)
    bare = score(editor.edit(PROMPT, TARGET, picture(project)))
    for locality in (None, {}, {"text": None}, {"text": nothing}):
        assert score(editor.edit(PROMPT, TARGET, picture(project), locality_inputs=locality)) == bare
    given = {"prompt": ["who was king?", None], "ground_truth": ["a man", None]}
    first, second = editor.edit(
        [PROMPT] * 2,
        [TARGET] * 2,
        [picture(project)] * 2,
        rephrase_prompts=[None, "what?"],
        locality_inputs={"text": given},
    )[0]
    assert list(first["post"]) == ["rewrite_acc", "locality_acc"]
    assert list(second["post"]) == ["rewrite_acc", "rephrase_acc"]


def test_a_request_may_have_several_locality_probes(editor: MultimodalEditor, project: Project) -> None:
    prompts, answers = ["who was king?", "where is it?", "why?"], ["a man", "there", "no"]

    def measure(prompts: Any, answers: Any, n: int = 1) -> list[Any]:
        text = {"prompt": prompts, "ground_truth": answers}
        images = [picture(project, i) for i in range(n)]
        return editor.edit([PROMPT] * n, [TARGET] * n, images, locality_inputs={"text": text})

    single = [measure(p, a)[0][0]["post"]["locality_acc"] for p, a in zip(prompts, answers, strict=True)]
    metrics, _, summary = measure(prompts, answers)
    assert metrics[0]["post"]["locality_acc"] == pytest.approx(sum(single) / 3)
    assert list(metrics[0]["post"]) == ["rewrite_acc", "locality_acc"]
    assert list(summary["metrics"]) == ["reliability", "t_locality"]
    assert score(measure([prompts], [answers])) == score((metrics,))
    two = measure([prompts, ["why?"]], [answers, ["no"]], 2)[0]
    assert two[0]["post"] == metrics[0]["post"]
    with pytest.raises(UserError, match="expected as many as prompts, 2, got 3; a list of lists"):
        measure(prompts, answers, 2)
    with pytest.raises(UserError, match="expected as many as probes, 3, got 2"):
        measure(prompts, answers[:2])


def test_the_score_of_several_probes_is_their_mean() -> None:
    scores = {"reliability": Score(0.0, 1.0), "t_locality": Score(1.0, 0.0), "t_locality 2": Score(1.0, 1.0)}
    record = Record("a", "vqa", "ok", scores={"teacher_forced": scores})
    merged = merge_probes(record)
    assert merged.scores == {
        "teacher_forced": {"reliability": Score(0.0, 1.0), "t_locality": Score(1.0, 0.5)}
    }
    plain = Record("a", "vqa", "ok", scores={"teacher_forced": {"t_locality": Score(1.0, 0.0)}})
    assert merge_probes(plain) is plain


def test_relative_images_lie_in_image_root(
    editor: MultimodalEditor, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = editor.edit(PROMPT, TARGET, picture(project))
    metrics, edited, _ = editor.edit(PROMPT, TARGET, "0.png")
    assert score((metrics,)) == score(plain)
    assert edited.generate("0.png", PROMPT) == editor.ask("0.png", PROMPT).after
    assert edited.generate("0.png", PROMPT) != editor.generate("0.png", PROMPT)
    Image.new("RGB", (20, 20), "red").save("0.png")
    with pytest.raises(UserError, match="is a file here, and another one in image_root"):
        editor.edit(PROMPT, TARGET, "0.png")
    with pytest.raises(UserError, match="no such image, here or in image_root"):
        editor.edit(PROMPT, TARGET, "99.png")


# ---------------------------------------------------------------- data sets


class Table:
    """What pandas hands over, as far as it is asked."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.columns = rows, list(rows[0])

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        assert orient == "records"
        return self.rows


class Rows:
    """What `datasets` hands over: rows by number, images opened."""

    def __init__(self, rows: list[dict[str, Any]], root: Path) -> None:
        self.rows, self.root, self.column_names = rows, root, list(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = dict(self.rows[i])
        return {k: Image.open(self.root / v) if str(v).endswith(".png") else v for k, v in row.items()}


def mmedit_rows(n: int = 2) -> list[dict[str, Any]]:
    """Those of the eval split; an edit starts from numbers that follow from its id."""
    return [{"id": f"vqa-{i}", **record(5 + i)} for i in range(n)]


def our_rows(root: Path, n: int = 2) -> list[dict[str, Any]]:
    return [
        {
            "id": r["id"], "wrong": r["pred"],
            "prompt": r["src"], "target": r["alt"], "image": str(root / r["image"]),
            "rephrase_prompts": r["rephrase"], "rephrase_image": str(root / r["image_rephrase"]),
            "locality_inputs": {
                "text": {"prompt": r["loc"], "ground_truth": r["loc_ans"]},
                "vision": {"prompt": r["m_loc_q"], "ground_truth": r["m_loc_a"], "image": r["m_loc"]},
            },
        }
        for r in mmedit_rows(n)
    ]  # fmt: skip


def easyedit_rows(n: int = 2) -> list[dict[str, Any]]:
    names = ("id", "prompt", "rephrase_prompt",
             "wrong", "target", "image", "image_rephrase", "locality_prompt",
             "locality_ground_truth", "multimodal_locality_image", "multimodal_locality_prompt",
             "multimodal_locality_ground_truth")  # fmt: skip
    return [dict(zip(names, row.values(), strict=True)) for row in mmedit_rows(n)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


DATA: dict[str, Callable[[Path, Path], Any]] = {
    "ours": lambda root, to: our_rows(root),
    "MMEdit's": lambda root, to: mmedit_rows(),
    "EasyEdit's": lambda root, to: easyedit_rows(),
    "generator": lambda root, to: (row for row in mmedit_rows()),
    "tuple": lambda root, to: tuple(mmedit_rows()),
    "pandas": lambda root, to: Table(
        [{**row, "pred": row["pred"], "m_loc_x": 1, "wrong": float("nan")} for row in mmedit_rows()]
    ),
    "datasets": lambda root, to: Rows(mmedit_rows(), root),
    "JSON": lambda root, to: write_json(to / "a.json", mmedit_rows()),
    "JSON path as text": lambda root, to: str(write_json(to / "a.json", mmedit_rows())),
    "JSON lines": lambda root, to: write_lines(to / "a.jsonl", mmedit_rows()),
    "CSV": lambda root, to: write_table(to / "a.csv", mmedit_rows()),
    "cases": lambda root, to: list(VQADataset(root / "vqa_eval.json", root, size=2)),
}


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("form", DATA)
def test_a_data_set_is_the_same_whatever_it_is_handed_over_as(
    editor: MultimodalEditor, project: Project, tmp_path: Path, form: str
) -> None:
    plain = editor.edit_dataset(VQADataset(project.data / "vqa_eval.json", project.data, size=2))
    given = DATA[form](project.data, tmp_path)
    metrics, _, summary = editor.edit_dataset(given, template=VQA_TEMPLATE)
    assert score((metrics,)) == score(plain)
    assert summary["metrics"] == plain[2]["metrics"]
    assert len(metrics) == 2


def test_one_row_and_the_hard_probes(editor: MultimodalEditor, project: Project) -> None:
    hard = {
        "same_question_image": "3.png",
        "same_question_a": "blue",
        "same_image_q": "why?",
        "same_image_a": "no",
    }
    row = {**mmedit_rows(1)[0], **hard, "joint": True}
    project.write_records([row], "hard")
    plain = editor.edit_dataset(VQADataset(project.data / "hard_eval.json", project.data), generated=False)
    assert len(plain[0][0]["post"]) == 8
    found = editor.edit_dataset(project.data / "hard_eval.json", template=VQA_TEMPLATE, generated=False)
    assert score(found) == score(plain)
    assert score(editor.edit_dataset(row, template=VQA_TEMPLATE, generated=False)) == score(plain)


def test_prompts_of_rows_stand_as_they_are_and_that_is_said(
    editor: MultimodalEditor, project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    metrics, _, _ = editor.edit_dataset(mmedit_rows(1), generated=False)
    assert metrics[0]["requested_rewrite"]["prompt"] == "what is number 5?"
    assert "prompts are used without a template" in caplog.text


def test_train_rows_are_taken_too(editor: MultimodalEditor, project: Project, tmp_path: Path) -> None:
    train = [record(i) for i in range(5)]
    lean = MultimodalEditor.from_hparams(
        project.copy(tmp_path / "p").write_yaml(data={}, knowledge_dir=str(tmp_path / "k")), progress=False
    )
    lean.edit_dataset(mmedit_rows(1), train_ds=train, generated=False)
    assert len(lean.prepare().method.knowledge[1].bank) == 5  # type: ignore[attr-defined]


BAD_DATA: dict[str, tuple[Any, str]] = {
    "None": (None, "ds: expected a data set, cases, rows of fields"),
    "a number": (3, "got int"),
    "nothing": ([], "holds no case"),
    "texts": (["a"], "record 0: expected a mapping of fields, got str"),
    "None in a list": ([None], "record 0: expected a mapping of fields, got NoneType"),
    "a set": ({"a"}, "got set"),
    "bytes": (b"abc", "got bytes"),
    "splits": ({"train": [], "test": []}, "choose one of its splits"),
    "no target": ([{"prompt": "a"}], "record 0: target is missing; expected it as target,"),
    "a mistyped field": ([{"prompt": "a", "targt": "b"}], "is 'target' meant"),
    "an unknown field": ([{"prompt": "a", "target": "b", "rephrase_promt": "c"}], "'rephrase_prompt' meant?"),
    "an empty target": ([{"prompt": "a", "target": " "}], "record 0: targets: is empty"),
    "a field twice": ([{"prompt": "a", "src": "c", "target": "b"}], "src and prompt hold the same"),
    "an image of nothing": ([{"prompt": "a", "target": "b", "image": "no.png"}], "image: no.png: no such"),
    "two images": ([{"prompt": "a", "target": "b", "image": ["x", "y"]}], "2 images; expected one"),
    "a video": ([{"prompt": "a", "target": "b", "image_type": "video"}], "'video' has no counterpart"),
    "half a probe": ([{"prompt": "a", "target": "b", "loc": "c"}], "['ground_truth']: is missing"),
    "an id": ([{"prompt": "a", "target": "b", "id": 1.5}], "id: expected a text, got float"),
    "no probe": ([Case(EditRequest("x", Query(None, "a", "b")), ())], "case x has no probe"),
    "mixed": ([{"prompt": "a"}, Case(EditRequest("a", Query(None, "a", "b")), ())], "cases and others"),
    "no file": ("nowhere.json", "nowhere.json: file does not exist"),
    "no table": ("nowhere.csv", "nowhere.csv: no such file"),
    "NUL": ("a\0.json", "does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_DATA)
def test_what_is_no_data_set_is_one_line(editor: MultimodalEditor, kind: str) -> None:
    given, expected = BAD_DATA[kind]
    for arguments in ({"ds": given}, {"ds": mmedit_rows(1), "train_ds": given}):
        if arguments.get("train_ds", 0) is None:
            continue
        with pytest.raises(UserError) as caught:
            editor.edit_dataset(**arguments)
        assert len(caught.value.problems) == 1
        if "train_ds" not in arguments:
            assert expected in caught.value.problems[0]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "prompt,target\na,b,c\n", "line 2: expected as many cells"),
        ("a.csv", 'prompt,target\n"a', "unexpected end of data"),
        ("a.jsonl", '{"prompt": 1}\n{', "line 2: broken JSON"),
        ("a.jsonl", "[1]\n", "expected a mapping of fields, got list"),
        ("a.json", "{}", "expected a list of records"),
        ("a.txt", "a", "expected a file that ends in .json"),
    ],
)
def test_a_broken_file_is_named(
    editor: MultimodalEditor, tmp_path: Path, name: str, text: str, expected: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        editor.edit_dataset(tmp_path / name)
    assert expected in str(caught.value)
    assert len(caught.value.problems) == 1


def test_a_file_may_not_name_images_outside_of_their_folder(editor: MultimodalEditor, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "target": "b", "image": "../small.yaml"}]
    with pytest.raises(UserError, match="lies outside of"):
        editor.edit_dataset(write_json(tmp_path / "a.json", rows))


def test_a_case_holds_what_a_case_may_hold() -> None:
    query = Query(None, "a", "b")
    case = Case(EditRequest("a", query), [Probe("reliability", query, "target")])  # type: ignore[arg-type]
    assert isinstance(case.probes, tuple)
    for make in (
        lambda: Query(None, None),  # type: ignore[arg-type]
        lambda: Query(None, "a", 3),  # type: ignore[arg-type]
        lambda: EditRequest(None, query),  # type: ignore[arg-type]
        lambda: EditRequest("a", None),  # type: ignore[arg-type]
        lambda: EditRequest("a", query, 3),  # type: ignore[arg-type]
        lambda: Probe("a", query, "same"),  # type: ignore[arg-type]
        lambda: Probe("a", None, "target"),  # type: ignore[arg-type]
        lambda: Case(None, ()),  # type: ignore[arg-type]
        lambda: Case(EditRequest("a", query), None),  # type: ignore[arg-type]
        lambda: Case(EditRequest("a", query), (None,)),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError):
            make()
