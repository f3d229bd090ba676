"""A store of edits from the command line.

    python -m unike.edits list edits/
    python -m unike.edits show edits/ vqa-0
    python -m unike.edits diff edits/ vqa-0 vqa-1
    python -m unike.edits remove edits/ vqa-0
    python -m unike.edits apply edits/ --hparams_dir hparams/tiny_blip2.yaml

Exit code 0, 1 where no question of ``apply`` could be asked, or 2 for input that the user can fix, with one
line per problem.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from unike.config.hparams import HyperParams
from unike.datasets.answers import normalise_answer
from unike.datasets.lengths import check_question
from unike.edits.files import SavedEdit
from unike.edits.origin import Origin
from unike.edits.store import EditStore
from unike.system import launching
from unike.system.arguments import ArgumentParser
from unike.system.console import Console
from unike.system.text import one_line
from unike.types import Query, UserError

if TYPE_CHECKING:
    import torch

# Torch takes seconds to import: it comes late, where tensors are compared or a model is loaded.


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser("python -m unike.edits", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help, formatter_class=raw)
        made.add_argument("store", metavar="DIR", help="folder of the store, as --save_edits has made it")
        return made

    command("list", "List all edits, in the order in which they were added.")
    command("show", "Print what an edit's folder holds, as JSON.").add_argument("id", metavar="ID")
    diff = command("diff", "Compare two edits: requests, hyper-parameters, tensors.")
    diff.add_argument("id", metavar="ID", nargs=2)
    command("remove", "Remove edits from the store, for good.").add_argument("id", metavar="ID", nargs="+")
    text = (
        "Attach edits, all together and in the store's order, to the model of a YAML, and ask before and\n"
        "after: each edit's own question, to see which still work with the others, or only --prompt.\n"
        "Nothing is written. A question whose image is gone or has changed is left out, and counted."
    )
    apply = command("apply", text)
    apply.add_argument(
        *("--hparams_dir", "--hparams"),
        required=True,
        metavar="FILE",
        help="YAML that the edits were made with",
    )
    apply.add_argument("--edits", nargs="+", metavar="ID", help="only these")
    apply.add_argument("--prompt", help="ask this instead of the edits' own questions")
    apply.add_argument("--image", metavar="FILE", help="image of --prompt; without one it is text only")
    return parser.parse_args(argv)


def start_table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def add_row(table: Table, *cells: object) -> None:
    # Not as markup: a prompt may hold brackets.
    table.add_row(*(Text(one_line(cell)) for cell in cells))


def list_edits(store: EditStore) -> Table:
    table = start_table("id", "method", "question", "answer", "KB")
    for name in store.ids():
        saved = store.read(name)
        first, *more = saved.origins
        asked = first.prompt + (f" ... and {len(more)} more" if more else "")
        methods = sorted({origin.method for origin in saved.origins})
        add_row(table, name, ", ".join(methods), asked, first.target, round(saved.bytes / 1000))
    return table


def format_edit(saved: SavedEdit) -> str:
    """What the folder says, as JSON, without the edit's plain values."""
    about = asdict(saved) | {"folder": str(saved.folder)}
    return json.dumps({name: value for name, value in about.items() if name != "values"}, indent=1)


def compare_edits(one: SavedEdit, other: SavedEdit) -> Table:
    """A row for each value that differs, and for each tensor, with the norm of the difference."""
    import torch

    table = start_table("what", one.id, other.id)
    mine, theirs = _collect_facts(one), _collect_facts(other)
    for name in sorted({*mine, *theirs}):
        if mine.get(name) != theirs.get(name):
            add_row(table, name, mine.get(name, "-"), theirs.get(name, "-"))
    tensors, others = one.tensors(), other.tensors()
    for name in sorted({*tensors, *others}):
        a, b = tensors.get(name), others.get(name)
        if a is None or b is None or a.shape != b.shape:
            add_row(table, name, _format_shape(a), _format_shape(b))
        elif not torch.equal(a, b):
            apart = float((a.double() - b.double()).norm())
            add_row(table, name, f"|a| {float(a.double().norm()):.4g}", f"|a - b| {apart:.4g}")
    return table


def _format_shape(tensor: torch.Tensor | None) -> str:
    return "-" if tensor is None else str(tuple(tensor.shape))


def _collect_facts(saved: SavedEdit) -> dict[str, object]:
    found: dict[str, object] = {"kind": saved.kind, "model": saved.model, "backbone": saved.backbone}
    for i, origin in enumerate(saved.origins):
        start = "" if len(saved.origins) == 1 else f"{i}."
        found |= {f"{start}{name}": value for name, value in _flatten(asdict(origin)) if name != "id"}
    return found


def _flatten(values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", entry) for inner, entry in _flatten(value))
        else:
            yield name, value


def apply_edits(store: EditStore, args: argparse.Namespace) -> tuple[Table, str]:
    """Answers before and after, and a line that says how many edits' questions get their target."""
    hparams = HyperParams.from_hparams(args.hparams_dir)
    names = [name for name in store.ids() if args.edits is None or name in args.edits]
    store.require(*(args.edits or ()))
    saved = [store.read(name) for name in names]
    if not saved:
        raise UserError(f"{store.folder}: holds no edit")
    if args.prompt is None and args.image is not None:
        raise UserError("--image: expected --prompt with it")
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt: is empty; expected a text")
    if args.prompt is not None:
        check_question(hparams.name, args.prompt, args.image is not None)
    if args.prompt is None:
        origins = [origin for edit in saved for origin in edit.origins]
    else:
        origins = [_make_origin(args.prompt, args.image, saved[0].origins[0])]
    from unike.editor import MultimodalEditor
    from unike.edits.base import compose
    from unike.edits.conflicts import list_contradictions

    editor = MultimodalEditor.from_hparams(hparams)
    backbone = editor.backbone
    loaded = [editor.load(edit.folder) for edit in saved]
    whole = compose(loaded)
    assert whole is not None
    for contradiction in list_contradictions(loaded):
        print(contradiction)
    table, passed, asked = start_table("id", "question", "target", "before", "after"), 0, 0
    for origin in origins:
        if problem := _find_image_problem(origin):
            add_row(table, origin.id, origin.prompt, origin.target, problem, "-")
            continue
        query = Query(origin.image, origin.prompt)
        (before,) = backbone.generate([query.image], [query.prompt])
        rewritten = whole.rewrite(query)
        with whole.applied(backbone):
            (after,) = backbone.generate([rewritten.image], [rewritten.prompt])
        add_row(table, origin.id, origin.prompt, origin.target, before, after)
        passed, asked = passed + (normalise_answer(after) == normalise_answer(origin.target)), asked + 1
    attached = f"{len(saved)} edits attached"
    if args.prompt is not None:
        return table, attached
    left = len(origins) - asked
    more = f"; {left} left out" if left else ""
    return table, f"{attached}; {passed} of {asked} answers equal the target{more}"


def _make_origin(prompt: str, image: str | None, like: Origin) -> Origin:
    """A question that no edit was made for. UserError for an image that can't be read."""
    from unike.backbones.images import content_key

    key = None if image is None else content_key(image)
    return Origin("-", "-", prompt, "-", image, key, {}, like.backbone, like.model)


def _find_image_problem(origin: Origin) -> str | None:
    """Why the origin's question can't be asked; None where it can."""
    if origin.image_key is None:
        return None if origin.image is None else "(its image was not read)"
    if origin.image is None:
        return "(its image was in memory only)"
    from unike.backbones.images import content_key

    try:
        return None if content_key(origin.image) == origin.image_key else "(its image has changed)"
    except (UserError, ValueError):
        return "(its image is gone)"


def run(args: argparse.Namespace) -> int:
    """Runs the command that is named; the exit code."""
    store, console = EditStore(args.store), Console()
    if not store.folder.is_dir():
        raise UserError(f"{store.folder}: no such folder; expected a store of edits")
    if args.command == "list":
        console.print(list_edits(store))
    elif args.command == "show":
        store.require(args.id)
        print(format_edit(store.read(args.id)))
    elif args.command == "diff":
        store.require(*args.id)
        console.print(compare_edits(*(store.read(name) for name in args.id)))
    elif args.command == "remove":
        store.require(*args.id)
        for name in dict.fromkeys(args.id):
            store.remove(name)
    else:
        table, result = apply_edits(store, args)
        console.print(table)
        print(result)
        if args.prompt is None and not _are_questions_there(store, args.edits):
            print("error: no question could be evaluated", file=sys.stderr)
            return 1
    return 0


def _are_questions_there(store: EditStore, names: Sequence[str] | None) -> bool:
    """Whether any of the edits' own questions can be asked."""
    read = [store.read(name) for name in store.ids() if names is None or name in names]
    return any(_find_image_problem(origin) is None for edit in read for origin in edit.origins)


def main(argv: Sequence[str] | None = None) -> int:
    return launching.run_guarded(lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
