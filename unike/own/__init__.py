"""``python -m unike.own``: edits a model of one's own with no data but an image, a question and an answer.

    python -m unike.own --model Qwen/Qwen2.5-VL-7B-Instruct --image X.jpg --question Q --answer A

No benchmark, no knowledge and no train split are needed. It prints the answers before and after: to the
question, to rephrasings, and to questions whose answers should stay. Exit code 0, 1 where an edit failed, 2
for problems to fix in the input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich import box
from rich.table import Table
from rich.text import Text

from unike.config.hparams import HyperParams
from unike.datasets.answers import normalise_answer
from unike.datasets.images import open_image
from unike.datasets.mmedit import VQA_TEMPLATE, wrap_prompt
from unike.edits.store import EditStore
from unike.own.edits import OwnEdit, pair_flags, read_own_file
from unike.system.arguments import ArgumentParser
from unike.system.console import Console
from unike.system.findings import require
from unike.system.shipped import is_bundled
from unike.system.text import one_line
from unike.types import Expectation, ImageLike, UserError

if TYPE_CHECKING:
    from unike.editor import MultimodalEditor

# Asked where the user names nothing that should stay.
OTHER_QUESTION, NO_IMAGE_QUESTION = "What color is the background?", "What is the capital of France?"
# Pixels per side of the plain image that is shown then.
PLAIN_SIDE = 224


@dataclass(frozen=True)
class Ask:
    """A question to ask before and after: ``about`` says which, ``expect`` what a good edit does to it."""

    about: str
    image: ImageLike | None
    question: str
    expect: Expectation


@dataclass(frozen=True)
class Reply:
    """What the model said to an ``Ask`` before and after, and whether that ``is_right``."""

    about: str
    question: str
    image: str | None
    expect: Expectation
    before: str
    after: str
    is_right: bool


# ---------------------------------------------------------------- the command line


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        "python -m unike.own", description="Edit a model of your own, with no data but the edit."
    )
    add = parser.add_argument

    def many(flag: str, metavar: str, help: str) -> None:
        add(flag, action="append", default=[], metavar=metavar, help=help)

    add("--model", required=True, metavar="ID", help="Hugging Face folder, or an id of the hub")
    many("--image", "FILE", "the image; none: an edit of the language model alone; once for each edit")
    many("--question", "TEXT", "the question; once for each edit")
    many("--answer", "TEXT", "its right answer; once for each edit")
    add("--edits", metavar="FILE", help="many edits: a .csv, .json or .jsonl file of image, question, answer")
    add("--images", metavar="DIR", help="folder of the images that FILE names; default: that of FILE")
    many("--rephrase", "TEXT", "the question in other words: the answer should be edited, too")
    many("--rephrase_image", "FILE", "another image of the same: the answer should be edited, too")
    many("--other_question", "TEXT", "another question about the image: its answer should stay")
    many("--other_image", "FILE", "an image on which the question has another answer: that should stay")
    add("--template", default=VQA_TEMPLATE, help="what questions go into, '{}' for none: %(default)s")
    add("--save", metavar="DIR", help="keep the edits in a store: python -m unike.edits list DIR")
    add("--model_name", metavar="FAMILY", help="family of the model; default: from its config.json")
    add("--device", default="auto", help="where the model runs: %(default)s")
    add("--dtype", help="float32, bfloat16 or float16; default: that of the weights")
    add("--check", action="store_true", help="say what the model needs of disk and memory; load nothing")
    add("--json", action="store_true", help="print everything as JSON")
    add("overrides", nargs="*", metavar="key=value", help="options, e.g. lr=1e-3 (docs/hparams.md)")
    return parser.parse_intermixed_args(argv)


def run(argv: Sequence[str]) -> int:
    """Checks all that can be checked without a model, edits, and asks; returns the exit code."""
    args = parse_arguments(argv)
    edits: list[OwnEdit] = []
    # What the model needs can be asked before there is an edit.
    is_asked = args.check and not (args.edits or args.image or args.question or args.answer)
    require(
        lambda: edits.extend(() if is_asked else read_edits(args)),
        lambda: _check_template(args.template),
        lambda: args.save is None or EditStore(args.save),
    )
    # Imported late, as torch comes with it: a missing image should not wait for it.
    from unike.editor import MultimodalEditor
    from unike.editor.models import describe_model
    from unike.runs import check
    from unike.runs.checks import MODEL_CHECKS
    from unike.runs.request import RunRequest

    hparams = describe_model(args.model, args.model_name, args.dtype, args.device)
    if args.overrides:
        hparams = HyperParams.from_dict(hparams.to_dict(), hparams.source, args.overrides)
    if args.check:
        return check.report(RunRequest(hparams), checks=MODEL_CHECKS)
    editor = MultimodalEditor.from_hparams(hparams, progress=not args.json)
    if args.save is not None:
        _require_same_model(editor, args.save)
    failures, unreached = apply_edits(editor, edits, args.template)
    replies = [
        ask_all(editor, list_asks(edits, i), edit.answer, args.template) for i, edit in enumerate(edits)
    ]
    if args.save is not None:
        store = EditStore(args.save)
        for made in editor.edits:
            store.add(made, replace=True)
    _print_results(edits, replies, failures, unreached, args)
    return 1 if failures else 0


def read_edits(args: argparse.Namespace) -> list[OwnEdit]:
    """The edits of the flags, or of the file. UserError with all that is wrong."""
    if args.edits is None:
        edits = pair_flags(args.image, args.question, args.answer)
    elif args.image or args.question or args.answer:
        raise UserError("--edits and --image, --question or --answer are both given; expected one of them")
    else:
        edits = read_own_file(args.edits, args.images)
    names = ("rephrase", "rephrase_image", "other_question", "other_image")
    given = [f"--{name}" for name in names if getattr(args, name)]
    if given and len(edits) > 1:
        raise UserError(
            f"{', '.join(given)}: of {len(edits)} edits it is not clear which one is meant; expected a file "
            "(--edits) with a column for it"
        )
    if given:
        edits = [_add_flags(edits[0], args)]
    images = [image for e in edits for image in (e.image, *e.rephrase_image, *e.other_image)]
    require(*(lambda i=image: open_image(i) for image in dict.fromkeys(images) if image is not None))
    return edits


def _add_flags(edit: OwnEdit, args: argparse.Namespace) -> OwnEdit:
    return replace(
        edit,
        rephrase=(*edit.rephrase, *args.rephrase),
        rephrase_image=(*edit.rephrase_image, *args.rephrase_image),
        other_question=(*edit.other_question, *args.other_question),
        other_image=(*edit.other_image, *args.other_image),
    )


def _check_template(template: str) -> None:
    if template.count("{}") != 1:
        raise UserError(f"template {one_line(template)!r}: expected exactly one {{}} for the question")


def _require_same_model(editor: MultimodalEditor, folder: str) -> None:
    kept = EditStore(folder).backbone
    if kept is not None and kept != editor.backbone.fingerprint:
        raise UserError(f"--save {one_line(folder)}: holds edits of another model; name another folder")


# ---------------------------------------------------------------- editing and asking


def apply_edits(
    editor: MultimodalEditor, edits: Sequence[OwnEdit], template: str
) -> tuple[dict[int, str], dict[int, str]]:
    """Edits on top of each other. By their numbers, why some failed, and why some that were made do not hold:
    their training ended before the answer was learnt."""
    images = [edit.image for edit in edits]
    metrics, _, _ = editor.edit(
        [edit.question for edit in edits],
        [edit.answer for edit in edits],
        images if any(image is not None for image in images) else None,
        template=template,
        sequential_edit=True,
    )
    failed = {i: metric["error"] for i, metric in enumerate(metrics) if "error" in metric}
    unreached = {
        i: f"its answer is not learnt after {metric['steps']} steps (loss {metric['loss']:.1f})"
        for i, metric in enumerate(metrics)
        if metric.get("reached") is False
    }
    return failed, unreached


def list_asks(edits: Sequence[OwnEdit], number: int) -> list[Ask]:
    """The questions to ask about an edit: its user's, and without any a few whose answers should stay."""
    edit = edits[number]
    asks = [Ask("the question", edit.image, edit.question, "target")]
    asks += (Ask("in other words", edit.image, text, "target") for text in edit.rephrase)
    asks += (Ask("another view", image, edit.question, "target") for image in edit.rephrase_image)
    others = edit.other_question
    # A second edit of the same image may rightly change what is asked by default.
    is_alone = all(other.image != edit.image for other in (*edits[:number], *edits[number + 1 :]))
    if edit.image is not None and not others and is_alone:
        others = (OTHER_QUESTION,)
    asks += (Ask("another question", edit.image, text, "unchanged") for text in others)
    if edit.image is not None:
        shown = edit.other_image or (Image.new("RGB", (PLAIN_SIDE, PLAIN_SIDE), "gray"),)
        asks += (Ask("another image", image, edit.question, "unchanged") for image in shown)
    asks.append(Ask("no image", None, edit.no_image_question or NO_IMAGE_QUESTION, "unchanged"))
    return asks


def ask_all(editor: MultimodalEditor, asks: Sequence[Ask], answer: str, template: str) -> list[Reply]:
    """Each question before and after what is attached."""
    out = []
    for asked in asks:
        prompt = asked.question if asked.image is None else wrap_prompt(template, asked.question)
        before, after = (editor.generate(asked.image, prompt, edited=edited) for edited in (False, True))
        wanted = answer if asked.expect == "target" else before
        image = os.fspath(asked.image) if isinstance(asked.image, (str, os.PathLike)) else None
        about = "a plain image" if asked.image is not None and image is None else asked.about
        is_right = normalise_answer(after) == normalise_answer(wanted)
        out.append(Reply(about, asked.question, image, asked.expect, before, after, is_right))
    return out


# ---------------------------------------------------------------- what is printed


def _print_results(
    edits: Sequence[OwnEdit],
    replies: Sequence[Sequence[Reply]],
    failures: dict[int, str],
    unreached: dict[int, str],
    args: argparse.Namespace,
) -> None:
    if args.json:
        print(json.dumps(_describe(edits, replies, failures, unreached), indent=1, ensure_ascii=False))
        return
    out = Console()
    for i, (edit, rows) in enumerate(zip(edits, replies, strict=True)):
        where = "no image" if edit.image is None else os.path.basename(os.fspath(edit.image))
        out.print(Text(f"\n{where}: {edit.question} -> {edit.answer}", style="bold"))
        if i in failures:
            print(f"error: edit {i + 1}: {failures[i]}", file=sys.stderr)
        out.print(_tabulate(rows))
        if i in unreached:
            out.print(
                Text(f"edit {i + 1}: {unreached[i]}; more steps may help (max_steps=200), or another wording")
            )
    if unreached and is_bundled(args.model):
        out.print(Text(f"{args.model} is a toy: it can only say the words of its own benchmark"))
    right = [row.is_right for rows in replies for row in rows]
    out.print(f"{sum(right)} of {len(right)} answers are as expected")
    changed = [row for rows in replies for row in rows if row.expect == "unchanged" and not row.is_right]
    if changed and len(edits) > 1:
        out.print(
            Text(
                "answers that should stay have changed: without train data the gate tells edits apart by a "
                "cosine alone, and edits add up (docs/own_data.md)"
            )
        )
    if args.save is not None:
        # One line, however narrow the terminal is: it is meant to be pasted.
        print(f"saved in {args.save}; to ask the edited model:")
        print(f"unike ask --model {args.model} --edits {args.save} --image FILE 'QUESTION'")


def _tabulate(rows: Sequence[Reply]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "question", "before", "after", ""):
        table.add_column(name, overflow="fold")
    for row in rows:
        done = {"target": ("edited", "not edited"), "unchanged": ("stayed", "changed")}[row.expect]
        verdict = f"✓ {done[0]}" if row.is_right else f"✗ {done[1]}"
        table.add_row(*map(Text, (row.about, row.question, row.before, row.after, verdict)))
    return table


def _describe(
    edits: Sequence[OwnEdit],
    replies: Sequence[Sequence[Reply]],
    failures: dict[int, str],
    unreached: dict[int, str],
) -> list[dict[str, Any]]:
    return [
        {
            "image": edit.image,
            "question": edit.question,
            "answer": edit.answer,
            "error": failures.get(i),
            "unreached": unreached.get(i),
            "asked": [asdict(row) for row in rows],
        }
        for i, (edit, rows) in enumerate(zip(edits, replies, strict=True))
    ]
