"""EasyEdit's calls with the import changed: each runs as it did, or is refused by name."""

from __future__ import annotations

import ast
import copy
import importlib
import io
import logging
import pickle
import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from easyedit_files import make_values, write
from helpers import Project, record

import unike.easyedit
from unike import MultimodalEditor as PlainEditor
from unike.easyedit import (
    REFUSED,
    CaptionDataset,
    IKEMultimodalHyperParams,
    MENDMultimodalHparams,
    MENDMultimodalTrainingHparams,
    MultimodalEditor,
    MultimodalTrainer,
    SERACMultimodalHparams,
    SERACMultimodalTrainingHparams,
    VQADataset,
)
from unike.editor import METRIC_KEYS, arguments
from unike.methods import ike
from unike.types import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = Path(__file__).parents[1] / "docs" / "easyedit.md"
TOY = Path(__file__).parents[1] / "hugging_cache" / "tiny-blip2-opt"
TEMPLATE = "Question: {} Short answer:"
PROMPTS = ["what is number 5?", "what is number 6?"]
TARGETS = ["two dogs", "the sea"]
IMAGES = ["5.png", "6.png"]
PROBES: dict[str, Any] = {
    "rephrase_prompts": ["which thing is number 5?", "which thing is number 6?"],
    "rephrase_image": ["6.png", "7.png"],
    "locality_inputs": {
        "text": {"prompt": ["who was king?"] * 2, "ground_truth": ["a man"] * 2},
        "vision": {
            "prompt": ["what color is it?"] * 2, "ground_truth": ["blue"] * 2, "image": ["7.png", "8.png"],
        },
    },
}  # fmt: skip
SMALL = {
    "qformer_checkpoint": ".", "qformer_name_or_path": ".", "state_dict_file": ".", "device": "cpu",
    "layers": 2, "max_new_tokens": 4, "inner_params": None, "rank": 4, "max_iters": 2, "val_interval": 2,
    "val_steps": 1, "edit_lr": 1e-3, "lr": 1e-3, "triplets": 5, "max_steps": 10,
}  # fmt: skip
OF_TRAINING = ("rank", "max_iters", "val_interval", "val_steps", "edit_lr", "lr", "inner_params")


def print_result(metrics: list[dict[str, Any]]) -> None:
    """As EasyEdit's scripts print theirs."""
    for name in METRIC_KEYS.values():
        print(f"{name}: {mean([m['post'][name].item() for m in metrics])}")


class World:
    """The toy model with YAMLs in EasyEdit's keys, and train annotations enough to hold one out."""

    def __init__(self, project: Project, root: Path) -> None:
        self.project = project.copy(root / "project")
        self.project.write_records([record(i % 9) for i in range(12)], "vqa", "train")
        self.project.write_records([record(i % 9, True) for i in range(12)], "caption", "train")

    def data(self, name: str) -> str:
        return str(self.project.data / name)

    def file(self, method: str, training: bool = False, **changes: Any) -> str:
        trained = method in ("MEND", "SERAC")
        own = {k: v for k, v in SMALL.items() if trained or k not in OF_TRAINING}
        about = {
            "name": str(TOY), "coco_image": str(self.project.data),
            "rephrase_image": str(self.project.data), "results_dir": str(self.project.root / "results"),
        }  # fmt: skip
        values = make_values(method, "blip2", training, **own, **about, **changes)
        if method == "IKE":
            # The test's images are tiny, and so is its context; no sentence model is downloaded.
            values |= {"k": 2, "ike_retriever": "states"}
        if method == "FT":
            values |= {"layers": 1}
        path = self.project.root / ("TRAINING" if training else ".") / f"{method}.yaml"
        return str(write(path, values))


@pytest.fixture(scope="module")
def world(blip2_project: Project, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(blip2_project, tmp_path_factory.mktemp("easyedit"))


@pytest.fixture(autouse=True)
def short_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ike, "RESERVED_TOKENS", 40)


def train(world: World, method: str, task: str) -> Any:
    """The shape of ``train_MEND_MiniGPT4_VQA`` and its like."""
    kind = {"MEND": MENDMultimodalTrainingHparams, "SERAC": SERACMultimodalTrainingHparams}[method]
    hparams = kind.from_hparams(world.file(method, training=True))
    dataset = VQADataset if task == "vqa" else CaptionDataset
    train_ds = dataset(world.data(f"{task}_train.json"), config=hparams)
    eval_ds = dataset(world.data(f"{task}_eval.json"), config=hparams, size=2)
    trainer = MultimodalTrainer(config=hparams, train_set=train_ds, val_set=eval_ds)
    return trainer.run()


def list_editors(world: World, method: str) -> list[Path]:
    return sorted((world.project.root / "results" / "models").glob(f"*/{method}/*/editor.json"))


# ---------------------------------------------------------------- its example functions


@pytest.mark.parametrize("method", ["MEND", "SERAC"])
def test_an_editor_is_trained_measured_and_found_again(world: World, method: str) -> None:
    summary = train(world, method, "vqa")
    assert summary["n"] == 2
    assert set(summary["presets"]) == {"paper", "easyedit"}
    (kept,) = list_editors(world, method.lower())
    made = kept.stat().st_mtime_ns
    assert train(world, method, "vqa")["metrics"] == summary["metrics"]
    assert [path.stat().st_mtime_ns for path in list_editors(world, method.lower())] == [made], "trained once"
    train(world, method, "caption")
    assert len(list_editors(world, method.lower())) == 2, "trained on other records: another editor"

    archive = str(kept.parents[2])
    kind = {"MEND": MENDMultimodalHparams, "SERAC": SERACMultimodalHparams}[method]
    hparams = kind.from_hparams(world.file(method, archive=archive))
    assert hparams.eval_only
    eval_ds = VQADataset(world.data("vqa_eval.json"), config=hparams, size=2)
    again = MultimodalTrainer(config=hparams, train_set=eval_ds, val_set=eval_ds).run()
    assert again["metrics"] == summary["metrics"], "measured with the editor in the archive"

    editor = MultimodalEditor.from_hparams(hparams)
    given = {"prompts": PROMPTS, "targets": TARGETS, "image": IMAGES, **PROBES, "keep_original_weight": True}
    metrics, edited_model, _ = editor.edit(**given)
    print_result(metrics)
    assert [list(m["post"]) for m in metrics] == [list(METRIC_KEYS.values())] * 2
    assert edited_model.attached
    metrics, edited_model, _ = editor.edit_dataset(ds=eval_ds, keep_original_weight=True, template=TEMPLATE)
    print_result(metrics)
    assert metrics[0]["requested_rewrite"]["prompt"] == TEMPLATE.replace("{}", "what is number 5?")


def test_nothing_is_trained_with_eval_only(world: World, tmp_path: Path) -> None:
    hparams = MENDMultimodalHparams.from_hparams(world.file("MEND", archive=str(tmp_path)))
    eval_ds = VQADataset(world.data("vqa_eval.json"), config=hparams)
    trainer = MultimodalTrainer(config=hparams, train_set=eval_ds, val_set=eval_ds)
    with pytest.raises(UserError, match=r"eval_only: true, but .* holds no editor of these options"):
        trainer.run()
    assert list(tmp_path.iterdir()) == []


def test_ike_edits(world: World) -> None:
    hparams = IKEMultimodalHyperParams.from_hparams(world.file("IKE"))
    hparams.task_name = "vqa"  # type: ignore[attr-defined]
    editor = MultimodalEditor.from_hparams(hparams)
    train_ds = VQADataset(world.data("vqa_train.json"), config=hparams, size=5)
    given = {"prompts": PROMPTS, "targets": TARGETS, "image": IMAGES, **PROBES}
    with pytest.raises(UserError, match=r"data\.vqa\.train: missing"):
        editor.edit(**given, keep_original_weight=True)
    metrics, _, _ = editor.edit(**given, train_ds=train_ds, keep_original_weight=True)
    print_result(metrics)
    (edit,) = editor.edits
    assert len(edit.state_dict()) == 0
    assert edit.info == {"steps": 0}
    assert edit.nbytes == 0
    eval_ds = VQADataset(world.data("vqa_eval.json"), config=hparams, size=1)
    metrics, _, _ = editor.edit_dataset(
        ds=eval_ds, train_ds=train_ds, keep_original_weight=True, template=TEMPLATE
    )
    print_result(metrics)


def test_fine_tuning_edits(world: World) -> None:
    hparams = unike.easyedit.FTHyperParams.from_hparams(world.file("FT"))
    metrics, _, _ = MultimodalEditor.from_hparams(hparams).edit(PROMPTS[0], TARGETS[0], IMAGES[0], "image")
    assert list(metrics[0]["post"]) == ["rewrite_acc"]


def test_metrics_are_by_easyedits_definitions(world: World) -> None:
    """Locality compares the most probable tokens of all positions there, of the answer's here."""
    hparams = unike.easyedit.FTHyperParams.from_hparams(world.file("FT"))
    theirs = MultimodalEditor.from_hparams(hparams)
    ours = PlainEditor(hparams, theirs.backbone, progress=False)
    given = (PROMPTS, TARGETS, IMAGES)
    found, plain = (editor.edit(*given, **PROBES)[0] for editor in (theirs, ours))
    for there, here in zip(found, plain, strict=True):
        assert there["post"]["rewrite_acc"] == here["post"]["rewrite_acc"]
    assert [m["post"]["locality_acc"] for m in found] != [m["post"]["locality_acc"] for m in plain]
    summary = theirs.edit(*given, **PROBES)[2]
    share = summary["presets"]["easyedit"]["metrics"]["t_locality"]["mean"]
    assert mean(m["post"]["locality_acc"] for m in found) == pytest.approx(share / 100)


# ---------------------------------------------------------------- the order of arguments


@pytest.fixture(scope="module")
def editor(blip2_project: Project) -> PlainEditor:
    return PlainEditor.from_hparams(blip2_project.yaml, progress=False)


def score(result: tuple[Any, ...]) -> list[Any]:
    return [(m["pre"], m["post"]) for m in result[0]]


def test_easyedits_order_is_known_by_its_types_of_files(editor: PlainEditor) -> None:
    named = score(editor.edit(PROMPTS, TARGETS, IMAGES, **PROBES))
    rest = (PROBES["rephrase_prompts"], PROBES["rephrase_image"], PROBES["locality_inputs"])
    for kind in ("image", ["image", "image"], ["image", "single-image"]):
        assert score(editor.edit(PROMPTS, TARGETS, IMAGES, kind, *rest)) == named
        assert score(editor.edit(PROMPTS, TARGETS, IMAGES, kind, *rest, True, False, False)) == named
    assert score(editor.edit(PROMPTS, TARGETS, IMAGES, *rest)) == named, "our own order"
    assert score(editor.edit(PROMPTS, TARGETS, IMAGES, *rest, True, None)) == named
    assert score(editor.edit(PROMPTS, TARGETS, IMAGES, *rest, True, False)) == named, (
        "EasyEdit's former order"
    )
    bare = score(editor.edit(PROMPTS, TARGETS, IMAGES))
    for given in (["image"] * 2, "image", None):
        assert score(editor.edit(PROMPTS, TARGETS, IMAGES, given)) == bare, "no rephrased prompt is asked"
        assert score(editor.edit(PROMPTS, TARGETS, IMAGES, file_type=given)) == bare
    probed = score(editor.edit(PROMPTS[0], TARGETS[0], IMAGES[0], "which thing is it?"))
    assert "rephrase_acc" in probed[0][1]


def test_our_order_with_nothing_fourth_is_known_by_what_follows(
    editor: PlainEditor, project_root: Path
) -> None:
    image = str(project_root / "1.png")
    named = score(editor.edit(PROMPTS[0], TARGETS[0], IMAGES[0], rephrase_image=image))
    assert score(editor.edit(PROMPTS[0], TARGETS[0], IMAGES[0], None, image)) == named
    text = {"text": {"prompt": "who?", "ground_truth": "me"}}
    named = score(editor.edit(PROMPTS[0], TARGETS[0], IMAGES[0], locality_inputs=text))
    assert score(editor.edit(PROMPTS[0], TARGETS[0], IMAGES[0], None, None, text)) == named


@pytest.fixture
def project_root(blip2_project: Project) -> Path:
    return blip2_project.data


BAD_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "nothing, then texts": ((None, ["a", "b"]), {}, "the fourth argument is None"),
    "nothing, then nothing, then images": ((None, None, "1.png"), {}, "the fourth argument is None"),
    "mixed": ((["image", "what?"],), {}, "mixes types of files with other values"),
    "capitals": (("Image",), {}, "near a type of file"),
    "another word": (("img",), {}, "near a type of file"),
    "a video": (("video",), {}, "file_type: 'video' has no counterpart"),
    "many images": ((), {"file_type": "multi-image"}, "'multi-image' has no counterpart"),
    "a text with an image": ((), {"file_type": "text"}, "'text', but the request has an image"),
    "an unknown type": ((), {"file_type": "audio"}, "file_type: expected one of image"),
    "types of two": ((), {"file_type": ["image"] * 2}, "file_type: expected as many as prompts, 1, got 2"),
    "too many": (("image", None, None, None, True, True, True, 1), {}, "arguments by position"),
    "given twice": (("which?",), {"rephrase_prompts": "what?"}, "rephrase_prompts is given twice"),
    "both": ((), {"sequential_edit": True, "keep_original_weight": True}, "contradict each other"),
    "neither": ((), {"sequential_edit": False, "keep_original_weight": False}, "contradict each other"),
    "EasyEdit's False": (("image", None, None, None, False), {}, "EasyEdit edits each request"),
    "False, and its type": ((), {"file_type": "image", "keep_original_weight": False}, "EasyEdit edits each"),
    "no switch": ((), {"sequential_edit": "yes"}, "sequential_edit: expected True or False, got str"),
    "eval_metric": ((), {"eval_metric": "token em"}, "eval_metric: has no counterpart here"),
    "loc_prompts": ((), {"loc_prompts": "a"}, "loc_prompts: has no counterpart here"),
    "a mistyped name": ((), {"rephrase_prompt": "a"}, "nearest known one is rephrase_prompts"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_CALLS)
def test_a_call_that_may_mean_two_things_is_refused(editor: PlainEditor, kind: str) -> None:
    others, named, expected = BAD_CALLS[kind]
    with pytest.raises(UserError) as caught:
        editor.edit(PROMPTS[0], TARGETS[0], IMAGES[0], *others, **named)
    (line,) = caught.value.problems
    assert expected in line


def test_edits_add_up_where_that_is_said(
    editor: PlainEditor, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    given = (PROMPTS, TARGETS, IMAGES)
    # It is said once in a process.
    arguments._say_that_edits_add_up.cache_clear()
    for named in ({}, {"keep_original_weight": True}, {"sequential_edit": False}):
        assert len(editor.edit(*given, **named)[1].edits) == 1
    assert not caplog.text
    for named in ({"sequential_edit": True}, {"keep_original_weight": False}):
        editor.edit(PROMPTS[0], "green", IMAGES[1])
        edits = editor.edit(*given, **named)[1].edits
        assert len(edits) == 3, "with what is attached"
    assert "edits add up here, unlike in EasyEdit" in caplog.text
    editor._slot.put(())
    theirs = MultimodalEditor(editor.hparams, editor.backbone, progress=False)
    with pytest.raises(UserError, match="EasyEdit edits each request from the original all the same"):
        theirs.edit(*given, keep_original_weight=False)
    assert len(theirs.edit(*given, sequential_edit=True, file_type="image", verbose=True)[1].edits) == 2


def test_verbose_logs_and_shows(
    editor: PlainEditor, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    editor.edit(PROMPTS[0], TARGETS[0], IMAGES[0], verbose=False)
    assert capsys.readouterr().err == caplog.text == ""
    with caplog.at_level(logging.INFO, logger="unike"):
        editor.edit(PROMPTS[0], TARGETS[0], IMAGES[0], verbose=True)
    assert "rewrite_acc" in caplog.text
    assert "edits" in capsys.readouterr().err


def test_the_data_sets_arguments(editor: PlainEditor, blip2_project: Project) -> None:
    ds = VQADataset(str(blip2_project.data / "vqa_eval.json"), 1, editor.hparams)
    assert len(ds) == 1
    assert ds[0].request.query.image == str(blip2_project.data / "5.png")
    plain = score(editor.edit_dataset(ds, generated=False))
    assert score(editor.edit_dataset(ds, True, False, generated=False)) == plain
    assert (
        score(editor.edit_dataset(ds=ds, keep_original_weight=True, verbose=False, generated=False)) == plain
    )
    for named, expected in (
        ({"keep_original_weight": False}, "keep_original_weight=False: edit_dataset edits each case"),
        ({"keep_original_weights": True}, "nearest known one is keep_original_weight"),
        ({"verbose": "no"}, "verbose: expected True or False"),
        ({"train_ds": 3}, "expected a data set"),
        ({"template": 3}, "template"),
    ):
        with pytest.raises(UserError, match=re.escape(expected)):
            editor.edit_dataset(ds, **named)
    with pytest.raises(UserError, match="given twice"):
        editor.edit_dataset(ds, True, keep_original_weight=True)
    with pytest.raises(UserError, match="config: expected hyper-parameters, got dict"):
        VQADataset("a.json", config={})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="size: expected"):
        CaptionDataset(str(blip2_project.data / "vqa_eval.json"), "5")  # type: ignore[arg-type]


def test_questions_without_a_template_are_said_to_be_wrapped(
    editor: PlainEditor, blip2_project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = MultimodalEditor(editor.hparams, editor.backbone, progress=False)
    ds = VQADataset(str(blip2_project.data / "vqa_eval.json"), 1, editor.hparams)
    metrics, _, _ = theirs.edit_dataset(ds, generated=False)
    assert "EasyEdit uses bare ones" in caplog.text
    bare, _, _ = theirs.edit_dataset(ds, template="{}", generated=False)
    assert bare[0]["requested_rewrite"]["prompt"] == "what is number 5?"
    assert metrics[0]["requested_rewrite"]["prompt"] == TEMPLATE.replace("{}", "what is number 5?")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_without_a_counterpart_says_so_when_it_is_used(name: str) -> None:
    made = getattr(importlib.import_module("unike.easyedit"), name)
    for use in (lambda: made(), lambda: made.from_hparams("a.yaml"), lambda: made("a", config=None)):
        with pytest.raises(UserError, match=f"^{name}: has no counterpart here; "):
            use()
    assert repr(made)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("LoRAMultimodalTrainingHparams", "the methods here are"),
        ("ZsreDataset", "VQADataset and CaptionDataset"),
        ("KnowledgeEditor", "MultimodalEditor"),
        ("MENDMultimodalHyperParams", "is MENDMultimodalHparams meant"),
        ("compute_edit_quality", ".*the metrics of each probe"),
        ("summary_metrics", ".*the metrics of each probe"),
    ],
)
def test_further_names_are_known_by_their_shape(name: str, instead: str) -> None:
    made = getattr(importlib.import_module("unike.easyedit"), name)
    with pytest.raises(UserError, match=f"^{name}: has no counterpart here; {instead}"):
        made()


def test_a_class_of_theirs_cannot_be_built_upon() -> None:
    with pytest.raises(UserError, match="BaseEditor: has no counterpart here"):

        class Own(unike.easyedit.BaseEditor):  # type: ignore[name-defined, misc]
            pass


def test_hyper_parameters_have_easyedits_attributes_or_say_so(world: World) -> None:
    hparams: Any = IKEMultimodalHyperParams.from_hparams(world.file("IKE"))
    assert hparams.coco_image == hparams.rephrase_image == str(world.project.data)
    assert hparams.archive is None
    assert not hasattr(hparams, "batch_size")
    with pytest.raises(UserError, match=r"^hparams\.batch_size: has no counterpart here"):
        hparams.batch_size  # noqa: B018
    assert copy.deepcopy(hparams) == pickle.loads(pickle.dumps(hparams)) == hparams


@pytest.mark.parametrize("kind", [VQADataset, CaptionDataset])
def test_other_arguments_of_a_data_set_are_named(world: World, kind: Any) -> None:
    task = "vqa" if kind is VQADataset else "caption"
    hparams = IKEMultimodalHyperParams.from_hparams(world.file("IKE"))
    path = world.data(f"{task}_eval.json")
    assert len(kind(path, 2, hparams, False, None)) == 2
    for given, line in (
        ({"no_image": True}, "no_image: has no counterpart here"),
        ({"hop": 2}, "hop: has no counterpart here"),
        ({"templates": "{}"}, "templates: unknown argument; the nearest known one is template"),
    ):
        with pytest.raises(UserError, match=f"^{line}"):
            kind(path, config=hparams, **given)


def test_the_names_stand_in_the_package_too() -> None:
    import unike

    for name in unike._EASYEDIT:
        found, here = getattr(unike, name), getattr(unike.easyedit, name)
        assert found is here or name in REFUSED
    assert {*unike.easyedit.__all__} - {"Case", "EasyEditHyperParams", "MultimodalEditor"} <= {
        *unike._EASYEDIT
    }
    assert unike.MultimodalEditor is PlainEditor is not MultimodalEditor


def test_an_unknown_name_is_none() -> None:
    with pytest.raises(AttributeError, match=r"docs/easyedit\.md"):
        unike.easyedit.MultimodalEditors  # noqa: B018


def test_a_class_reads_its_own_method_alone(world: World, blip2_project: Project) -> None:
    with pytest.raises(UserError, match="method: serac; MENDMultimodalHparams expects mend"):
        MENDMultimodalHparams.from_hparams(world.file("SERAC"))
    with pytest.raises(UserError, match="method: unike; IKEMultimodalHyperParams expects ike"):
        IKEMultimodalHyperParams.from_hparams(blip2_project.yaml)
    hparams = IKEMultimodalHyperParams.from_hparams(world.file("IKE").removesuffix(".yaml"))
    assert hparams.alg_name == "IKE"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"hparams = hparams\.replace"):
        hparams.k = 3  # type: ignore[misc]
    with pytest.raises(UserError, match="MultimodalTrainer: ike learns nothing"):
        MultimodalTrainer(hparams, [], [])
    with pytest.raises(UserError, match="config: expected hyper-parameters"):
        MultimodalTrainer(None, [], [])  # type: ignore[arg-type]
    mend = MENDMultimodalTrainingHparams.from_hparams(world.file("MEND", training=True))
    with pytest.raises(UserError, match="train_set: holds no case"):
        MultimodalTrainer(mend, [], [])
    with pytest.raises(UserError, match="train_set: expected a data set"):
        MultimodalTrainer(mend, None, None)


def test_the_page_names_what_is_there() -> None:
    """Every name of the module stands on the page, and what the page imports can be imported."""
    text = PAGE.read_text(encoding="utf-8")
    for name in (*unike.easyedit.__all__, *REFUSED):
        if name not in ("Case", "EasyEditHyperParams"):
            assert f"`{name}" in text, name
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_pages_calls_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's examples, on the toy files."""
    monkeypatch.chdir(world.project.root)
    for name, method, training in (("MEND", "MEND", True), ("IKE", "IKE", False)):
        values = Path(world.file(method, training)).read_text(encoding="utf-8")
        path = world.project.root / "hparams" / ("TRAINING" if training else ".") / name / "blip2.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(values)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 2
    output = io.StringIO()
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {"print": lambda *a: print(*a, file=output)})
    assert "rewrite_acc" in output.getvalue()
