"""``MultimodalEditor`` on small random backbones: what it hands over, and that nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Project
from PIL import Image
from untouched import hook_count

from unike.backbones.base import encode_queries
from unike.config.hparams import HyperParams
from unike.datasets.mmedit import CaptionDataset, CapVQADataset, VQADataset
from unike.editor import METRIC_KEYS, MultimodalEditor
from unike.editor.requests import Request, make_cases
from unike.edits import RoutedEdit
from unike.types import Query, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = "Question: {} Short answer:"
PROMPT, TARGET = "Question: what is it? Short answer:", "a red fox"


def other(editor: MultimodalEditor, **changes: Any) -> MultimodalEditor:
    """An editor with other options on the same backbone."""
    hparams = HyperParams.from_dict(editor.hparams.to_dict() | changes, editor.hparams.source)
    return MultimodalEditor(hparams, editor.backbone, progress=False)


def picture(project: Project, i: int = 0) -> str:
    return str(project.data / f"{i}.png")


def probes(project: Project, n: int | None = None) -> dict[str, Any]:
    """All optional arguments, for one request or for lists of ``n``."""

    def many(value: Any) -> Any:
        return value if n is None else [value] * n

    return {
        "rephrase_prompts": many("Question: which thing is it? Short answer:"),
        "rephrase_image": many(picture(project, 1)),
        "locality_inputs": {
            "text": {"prompt": many("who was king?"), "ground_truth": many("a man")},
            "vision": {
                "prompt": many("Question: what color is it? Short answer:"),
                "ground_truth": many("blue"),
                "image": many(picture(project, 2)),
            },
        },
    }


def logits(editor: MultimodalEditor, image: Any) -> torch.Tensor:
    with torch.no_grad():
        return editor.backbone(encode_queries(editor.backbone, [Query(image, PROMPT, TARGET)])).logits


def snapshot(editor: MultimodalEditor) -> tuple[dict[str, torch.Tensor], int]:
    model = editor.backbone.model
    return {k: v.clone() for k, v in model.state_dict().items()}, hook_count(model)


def assert_untouched(editor: MultimodalEditor, before: tuple[dict[str, torch.Tensor], int]) -> None:
    now, hooks = snapshot(editor)
    assert hooks == before[1]
    assert now.keys() == before[0].keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in before[0].items())


# ---------------------------------------------------------------- metrics


def test_metrics_have_easyedits_keys(editor: MultimodalEditor, project: Project) -> None:
    metrics, edited, summary = editor.edit(PROMPT, TARGET, picture(project), **probes(project))
    (metric,) = metrics
    assert metric["case_id"] == 0
    assert metric["requested_rewrite"] == {"prompt": PROMPT, "target": TARGET, "image": picture(project)}
    assert metric["time"] > 0
    for when in ("pre", "post"):
        assert list(metric[when]) == list(METRIC_KEYS.values())
        assert all(0 <= value <= 1 for value in metric[when].values())
    assert metric["pre"]["rewrite_acc"] < metric["post"]["rewrite_acc"] == 1
    assert metric["pre"]["locality_acc"] == metric["pre"]["multimodal_locality_acc"] == 1
    assert summary["metrics"]["reliability"]["teacher_forced"]["after"]["mean"] == 100
    assert len(edited.edits) == 1


def test_only_given_probes_are_measured(editor: MultimodalEditor, project: Project) -> None:
    (metric,), _, _ = editor.edit([PROMPT], [TARGET], [picture(project)])
    assert list(metric["post"]) == ["rewrite_acc"]
    text = {"text": probes(project)["locality_inputs"]["text"]}
    (metric,), _, _ = editor.edit(PROMPT, TARGET, picture(project), locality_inputs=text)
    assert list(metric["post"]) == ["rewrite_acc", "locality_acc"]


def test_an_image_is_the_same_as_path_object_or_tensor(editor: MultimodalEditor, project: Project) -> None:
    path = picture(project)
    opened = Image.open(path)
    tensor = editor.backbone.vision.processor(opened.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    found = [editor.edit(PROMPT, TARGET, image) for image in (path, opened, tensor)]
    answers = [edited.generate(path, PROMPT) for _, edited, _ in found]
    assert len(set(answers)) == 1
    assert [m[0]["post"] for m, _, _ in found] == [found[0][0][0]["post"]] * 3


def test_the_template_wraps_prompts_about_images_once(editor: MultimodalEditor, project: Project) -> None:
    given = probes(project) | {"rephrase_prompts": "which thing is it?"}
    bare, _, _ = editor.edit("what is it?", TARGET, picture(project), template=TEMPLATE, **given)
    wrapped, _, _ = editor.edit(PROMPT, TARGET, picture(project), template=TEMPLATE, **probes(project))
    assert bare[0]["requested_rewrite"]["prompt"] == PROMPT
    assert bare[0]["pre"] == wrapped[0]["pre"]
    assert bare[0]["post"] == wrapped[0]["post"]
    with pytest.raises(UserError, match="exactly one"):
        editor.edit(PROMPT, TARGET, picture(project), template="no place")


# ---------------------------------------------------------------- the edited model


def test_the_edited_model_generates_and_the_base_stays(editor: MultimodalEditor, project: Project) -> None:
    image = picture(project)
    base, before = editor.generate(image, PROMPT), snapshot(editor)
    unedited = logits(editor, image)
    _, edited, _ = editor.edit(PROMPT, TARGET, image)
    assert edited.attached
    assert not torch.equal(logits(editor, image), unedited)
    assert edited.generate(image, PROMPT, max_new_tokens=8).startswith(TARGET)
    assert not base.startswith(TARGET)
    assert editor.generate(image, PROMPT) == base
    edited.remove()
    assert_untouched(editor, before)
    assert torch.equal(logits(editor, image), unedited)
    assert edited.generate(image, PROMPT) == base
    assert edited.edits == ()
    assert not edited.attached
    edited.remove()


@pytest.mark.parametrize("method", [{}, {"method": "ft", "layers": 1, "lr": 1e-2}])
def test_removing_restores_every_bit(
    editor: MultimodalEditor, project: Project, method: dict[str, Any]
) -> None:
    changed = other(editor, **method)
    before, unedited = snapshot(changed), logits(changed, picture(project))
    _, edited, _ = changed.edit(PROMPT, TARGET, picture(project))
    assert not torch.equal(logits(changed, picture(project)), unedited)
    edited.remove()
    assert_untouched(changed, before)
    assert torch.equal(logits(changed, picture(project)), unedited)


def test_each_request_is_edited_from_the_original(editor: MultimodalEditor, project: Project) -> None:
    first = (PROMPT, "two dogs", picture(project, 3))
    second = (PROMPT, TARGET, picture(project))
    _, one, _ = editor.edit(*first)
    alone, two, _ = editor.edit(*second)
    both, last, _ = editor.edit(*map(list, zip(first, second, strict=True)))
    assert len(last.edits) == 1
    assert [m["case_id"] for m in both] == [0, 1]
    assert both[1]["pre"] == alone[0]["pre"]
    assert one.generate(first[2], PROMPT, 8).startswith("two dogs"), "an earlier object keeps its own edit"
    assert two.generate(second[2], PROMPT, 8).startswith(TARGET)
    assert last.attached
    assert not one.attached
    assert not two.attached


def test_edits_accumulate_without_the_original_weight(editor: MultimodalEditor, project: Project) -> None:
    before = snapshot(editor)
    images = [picture(project), picture(project, 3)]
    _, two, _ = editor.edit([PROMPT] * 2, [TARGET, "two dogs"], images, keep_original_weight=False)
    assert len(two.edits) == 2
    _, three, _ = editor.edit(PROMPT, "green", picture(project, 4), keep_original_weight=False)
    assert three.edits[:2] == two.edits or all(a is b for a, b in zip(three.edits, two.edits, strict=False))
    ids = [record.id for edit in three.edits for record in edit.records if isinstance(edit, RoutedEdit)]
    assert len(set(ids)) == 3
    _, fresh, _ = editor.edit(PROMPT, TARGET, picture(project))
    assert len(fresh.edits) == 1
    fresh.remove()
    assert_untouched(editor, before)


def test_editors_of_one_backbone_share_what_is_attached(editor: MultimodalEditor, project: Project) -> None:
    tuned = other(editor, method="ft", layers=1)
    base, before = tuned.generate(picture(project), PROMPT), snapshot(editor)
    _, first, _ = editor.edit(PROMPT, TARGET, picture(project))
    assert tuned.generate(picture(project), PROMPT) == base
    with pytest.raises(UserError, match="another editor's"):
        tuned.edit(PROMPT, TARGET, picture(project), keep_original_weight=False)
    _, second, _ = tuned.edit(PROMPT, TARGET, picture(project))
    assert second.attached
    assert not first.attached
    second.remove()
    assert_untouched(editor, before)


def test_removing_leaves_what_else_is_attached(editor: MultimodalEditor, project: Project) -> None:
    before, tuned = snapshot(editor), other(editor, method="ft", layers=1)
    _, first, _ = editor.edit(PROMPT, TARGET, picture(project))
    (one,) = first.edits
    _, second, _ = tuned.edit(PROMPT, "two dogs", picture(project, 3))
    editor.attach(one)
    assert not second.attached
    with pytest.raises(UserError, match="another editor's"):
        editor.edit(PROMPT, "green", picture(project, 4), keep_original_weight=False)
    second.remove()
    assert editor.edits == (one,)
    assert editor.generate(picture(project), PROMPT, 8, edited=True).startswith(TARGET)
    assert not editor.generate(picture(project), PROMPT, 8).startswith(TARGET)
    assert editor.detach(one.id) is one
    assert_untouched(editor, before)
    tuned.attach(one)
    with pytest.raises(UserError, match="other kinds of edits are attached"):
        tuned.edit(PROMPT, "green", picture(project, 4), keep_original_weight=False)
    assert editor.edits == (one,)


def test_an_edits_id_is_that_of_its_request(project: Project) -> None:
    images = [picture(project), picture(project), picture(project, 1)]
    given = [Request(PROMPT, TARGET, image) for image in images]
    first, again, elsewhere = (case.request.id for case in make_cases(given, None))
    assert again == f"{first}-2"
    assert elsewhere != first
    assert [c.request.id for c in make_cases(given, None, {elsewhere})][2] == f"{elsewhere}-2"


def test_knowledge_in_the_prompt_reaches_generation(editor: MultimodalEditor, project: Project) -> None:
    ike = other(editor, external="prompt", intrinsic=False, zeta="none")
    _, edited, _ = ike.edit(PROMPT, TARGET, picture(project))
    shown = f"New Fact: {PROMPT} {TARGET}\nPrompt: {PROMPT}"
    assert edited.generate(picture(project), PROMPT) == ike.generate(picture(project), shown)


def test_an_edit_that_fails_is_reported(
    editor: MultimodalEditor,
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = snapshot(editor)

    def diverge(*_: Any, **__: Any) -> None:
        raise FloatingPointError("the loss is nan after 3 steps")

    monkeypatch.setattr(editor.prepare().method, "edit", diverge)
    (metric,), edited, summary = editor.edit(PROMPT, TARGET, picture(project))
    assert metric["error"] == "the loss is nan after 3 steps"
    assert metric["post"] == {}
    assert [metric[key] for key in ("steps", "loss", "reached")] == [None] * 3
    assert "1 of 1 edits failed, the first: the loss is nan after 3 steps" in caplog.text
    assert edited.edits == ()
    assert summary["failed"] == 1
    assert_untouched(editor, before)


def test_an_interrupted_edit_leaves_nothing_behind(
    editor: MultimodalEditor, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(editor)
    _, former, _ = editor.edit(PROMPT, TARGET, picture(project))

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(editor.backbone.layout, "head", stop)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(PROMPT, "two dogs", picture(project, 3))
    monkeypatch.undo()
    assert former.attached, "what was attached before is attached again"
    former.remove()
    assert_untouched(editor, before)


# ---------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"targets": ["a", "b"]}, ["targets: expected as many as prompts, 1, got 2"]),
        ({"rephrase_prompts": ["a", "b"]}, ["rephrase_prompts: expected as many as prompts"]),
        ({"prompts": [], "targets": [], "image": []}, ["prompts: is empty"]),
        ({"targets": "  "}, ["targets: is empty"]),
        ({"prompts": 3}, ["prompts: expected a text, got int"]),
        ({"image": 3}, ["image: expected a path"]),
        ({"prompts": None}, ["prompts: is missing"]),
        ({"image": "nowhere.png", "targets": ""}, ["targets: is empty", "image: nowhere.png: no such"]),
        ({"locality_inputs": {"txt": {}}}, ["locality_inputs: 'txt' is unknown"]),
        (
            {"locality_inputs": {"text": {"prompt": "a"}}},
            ["['text']: expected prompt, ground_truth, got prompt"],
        ),
        (
            {"locality_inputs": {"text": {"prompt": ["a"], "ground_truth": ["b", "c"]}}},
            ["locality_inputs['text']['ground_truth']: expected as many"],
        ),
    ],
)
def test_bad_arguments_are_named_together(
    editor: MultimodalEditor, project: Project, changes: dict[str, Any], expected: list[str]
) -> None:
    before = snapshot(editor)
    with pytest.raises(UserError) as caught:
        editor.edit(**{"prompts": PROMPT, "targets": TARGET, "image": picture(project)} | changes)
    assert len(caught.value.problems) == len(expected)
    for problem, text in zip(caught.value.problems, expected, strict=True):
        assert text in problem
    assert_untouched(editor, before)


# ---------------------------------------------------------------- data sets


def test_a_data_set_is_edited(editor: MultimodalEditor, project: Project) -> None:
    cases = VQADataset(project.data / "vqa_eval.json", project.data, size=2)
    metrics, edited, summary = editor.edit_dataset(cases)
    assert [m["case_id"] for m in metrics] == [0, 1]
    assert all(list(m["post"]) == list(METRIC_KEYS.values()) for m in metrics)
    assert summary["n"] == 2
    assert set(summary["metrics"]["reliability"]) == {"teacher_forced", "generated"}
    assert edited.attached
    assert len(edited.edits) == 1


def test_the_same_ids_in_another_data_set_are_other_cases(editor: MultimodalEditor, project: Project) -> None:
    evals = VQADataset(project.data / "vqa_eval.json", project.data, size=1)
    train = VQADataset(project.data / "vqa_train.json", project.data, size=1)
    assert evals[0].request.id == train[0].request.id
    editor.edit_dataset(evals, generated=False)
    after, _, _ = editor.edit_dataset(train, generated=False)
    alone, _, _ = other(editor).edit_dataset(train, generated=False)
    assert after[0]["pre"] == alone[0]["pre"]
    assert after[0]["post"] == alone[0]["post"]


def test_the_template_takes_the_data_sets_place(editor: MultimodalEditor, project: Project) -> None:
    cases = VQADataset(project.data / "vqa_eval.json", project.data, size=1)
    metrics, _, _ = editor.edit_dataset(cases, template="Q: {} A:", generated=False)
    assert metrics[0]["requested_rewrite"]["prompt"] == "Q: what is number 5? A:"
    assert cases.template == TEMPLATE
    same, _, _ = editor.edit_dataset(list(cases), template=TEMPLATE, generated=False)
    assert same[0]["requested_rewrite"]["prompt"] == "Question: what is number 5? Short answer:"
    captions = CaptionDataset(project.data / "caption_eval.json", project.data, size=1)
    metrics, _, _ = editor.edit_dataset(captions, template="Q: {} A:", generated=False)
    assert metrics[0]["requested_rewrite"]["prompt"] == "a photo of"
    mixed = CapVQADataset(project.data / "vqa_eval.json", project.data / "caption_eval.json", project.data)
    with pytest.raises(UserError, match="CapVQADataset itself"):
        editor.edit_dataset(mixed, template=TEMPLATE)


def test_knowledge_comes_from_the_given_train_set(
    editor: MultimodalEditor, project: Project, tmp_path: Any
) -> None:
    train = VQADataset(project.data / "vqa_train.json", project.data)
    cases = VQADataset(project.data / "vqa_eval.json", project.data, size=1)
    lean = other(editor, data={}, knowledge_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"data\.vqa\.train: missing"):
        lean.edit_dataset(cases)
    lean.edit_dataset(cases, train_ds=train, generated=False)
    bank = lean.prepare().method.knowledge[1].bank  # type: ignore[attr-defined]
    assert len(bank) == len(train)


def test_a_missing_weight_file_is_named_before_loading(project: Project, tmp_path: Any) -> None:
    hparams = HyperParams.from_dict(project.options(name=str(tmp_path / "nothing"), method="unki"))
    with pytest.raises(UserError) as caught:
        MultimodalEditor.from_hparams(hparams)
    assert len(caught.value.problems) == 2
    assert "did you mean 'unike'" in caught.value.problems[0]
    assert "name: " in caught.value.problems[1]
