"""``run_edit.py ask``: what a model with saved edits answers, and which of them were active."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from unike.config.hparams import HyperParams
from unike.datasets.images import open_image
from unike.datasets.lengths import check_question
from unike.datasets.mmedit import VQA_TEMPLATE, wrap_prompt
from unike.edits.store import EditStore
from unike.runs.checks import require_backbone
from unike.system import launching
from unike.system.arguments import ArgumentParser
from unike.system.console import Console
from unike.system.findings import require
from unike.system.text import one_line
from unike.types import UserError

if TYPE_CHECKING:
    from unike.edits.explain import EditReport, Explanation

# The editor and what explains its answers come late, since torch comes with them: a missing file should not
# wait for it.


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser("run_edit.py ask", description=__doc__)
    add = parser.add_argument
    add("--hparams_dir", "--hparams", metavar="FILE", help="YAML that the edits were made with")
    add("--model", metavar="ID", help="folder or id of the model, for edits of unike edit --model")
    add("--edits", required=True, metavar="DIR", help="a store of edits: all of them are attached, in order")
    add("--only", action="append", metavar="ID", help="attach only this edit; may be given again")
    add("--image", metavar="FILE", help="the image; without one only the language model answers")
    add("--template", default=VQA_TEMPLATE, help="what the question goes into, '{}' for none: %(default)s")
    add("--top", type=int, default=5, metavar="N", help="retrieved items and edits to show: %(default)s")
    add("--json", action="store_true", help="print everything as JSON")
    add("question")
    add("overrides", nargs="*", metavar="key=value", help="changes to the YAML")
    return parser.parse_intermixed_args(argv)


def run(argv: Sequence[str]) -> int:
    """Checks all that can be checked without a model, then asks; returns the exit code."""
    args = parse_arguments(argv)
    hparams = _read_hparams(args)
    folders: list[Path] = []
    require(
        lambda: require_backbone(hparams),
        lambda: _check_question(args),
        lambda: check_question(hparams.name, args.question, args.image is not None),
        lambda: args.image is None or open_image(args.image),
        lambda: folders.extend(_choose_edits(args.edits, args.only)),
    )
    from unike.editor import MultimodalEditor

    editor = MultimodalEditor.from_hparams(hparams, progress=not args.json)
    for folder in folders:
        editor.attach(editor.load(folder))
    explanation = editor.ask(args.image, wrap_prompt(args.template, args.question), args.top)
    if args.json:
        print(json.dumps(explanation.to_dict(), indent=1, ensure_ascii=False))
    else:
        print_explanation(explanation, args.top)
    return 0


def _read_hparams(args: argparse.Namespace) -> HyperParams:
    if (args.model is None) == (args.hparams_dir is None):
        raise UserError("--hparams_dir, --model: expected one of them")
    if args.model is None:
        return HyperParams.from_hparams(args.hparams_dir, args.overrides)
    from unike.editor.models import describe_model

    return HyperParams.from_dict(describe_model(args.model).to_dict(), "model", args.overrides)


def _check_question(args: argparse.Namespace) -> None:
    problems = []
    if not args.question.strip():
        problems.append("question: is empty; expected a text")
    if args.template.count("{}") != 1:
        problems.append(f"template {one_line(args.template)!r}: expected exactly one {{}} for the question")
    if args.top < 1:
        problems.append(f"top: {args.top}; expected 1 or more")
    if problems:
        raise UserError(*problems)


def _choose_edits(folder: str, only: Sequence[str] | None) -> list[Path]:
    """The folders of the store's edits to attach, in its order."""
    if not os.path.isdir(folder):
        raise UserError(f"{one_line(folder)}: no such folder; expected a store of edits")
    store = EditStore(folder)
    store.require(*(only or ()))
    found = [store.read(name).folder for name in store.ids() if only is None or name in only]
    if not found:
        raise UserError(f"{one_line(folder)}: holds no edit")
    return found


# ---------------------------------------------------------------- as a table


def print_explanation(explanation: Explanation, top: int, console: Console | None = None) -> None:
    """Prints the answers, the edits that were active, and what was retrieved."""
    from unike.edits.explain import rate_strength

    out = console or Console()
    for name, value in (
        ("question", explanation.prompt),
        ("before", explanation.before),
        ("after", explanation.after),
    ):
        out.print(Text(f"{name:<8} {value}"))
    if not explanation.edits:
        out.print("no edit is attached")
        return
    active = sorted((e for e in explanation.edits if e.active), key=rate_strength, reverse=True)
    for contradiction in explanation.contradictions[:top]:
        out.print(Text(f"{contradiction}"))
    gates = "".join(f"; {name} scope gate: from {at:.3f} on" for name, at in explanation.gates.items())
    out.print(Text(f"\n{len(active)} of {len(explanation.edits)} edits could change the answer{gates}"))
    out.print(_tabulate_edits(active[:top] or explanation.edits[:top]))
    if explanation.layers:
        out.print(_tabulate_items(explanation))


def _tabulate_edits(edits: Sequence[EditReport]) -> Table:
    from unike.edits.explain import describe_activity

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("edit", "method", "its question", "its answer", "scope", "what it did"):
        table.add_column(name, justify="right" if name == "scope" else "left", overflow="fold")
    for edit in edits:
        scope = "-" if edit.scope is None else f"{edit.scope:.3f}"
        texts = (
            edit.id,
            edit.method or "-",
            edit.prompt or "-",
            edit.target or "-",
            scope,
            describe_activity(edit),
        )
        table.add_row(*map(Text, texts))
    return table


def _tabulate_items(explanation: Explanation) -> Table:
    from unike.edits.explain import describe_item

    caption = "alpha: knowledge's share of attention; weight: the item's share of that"
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for name in ("layer", "alpha", "weight", "similarity"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("retrieved", overflow="fold")
    for layer in explanation.layers:
        for n, item in enumerate(layer.items):
            first = (str(layer.layer), f"{layer.alpha:.3f}") if n == 0 else ("", "")
            texts = (*first, f"{item.weight:.3f}", f"{item.similarity:.3f}", describe_item(item))
            table.add_row(*map(Text, texts), end_section=n == len(layer.items) - 1)
    return table


if __name__ == "__main__":
    sys.exit(launching.run_guarded(lambda: run(sys.argv[1:])))
