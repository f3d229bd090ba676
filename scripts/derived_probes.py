"""Derives the hard probes of annotations, asks them of a model on stand-in images, and counts every cell.

python -m scripts.derived_probes FILE --train FILE --into FOLDER --size 20

The images of a benchmark need not be here: each is drawn from its name (scripts.stand_in_images). The texts
are the file's own. This shows that every cell can be asked; what is answered is no figure of a method.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import run_edit
from scripts.stand_in_images import draw_all, list_image_names
from unike.config.hparams import HyperParams
from unike.datasets import derive
from unike.datasets.derive import DERIVED_CELLS
from unike.datasets.probe_files import read_probes
from unike.evaluation.record import Record
from unike.report.terminal import as_text
from unike.runs.records import read_records
from unike.system.arguments import ArgumentParser
from unike.system.launching import run_guarded
from unike.system.text import one_line
from unike.types import UserError

PROBES, IMAGES, RUN = "probes.json", "images", "run"


@dataclass(frozen=True)
class CellCount:
    """Of one cell: how many records have it, how many of the edited records have it, and of these how many
    were asked under teacher forcing and how many by generation."""

    derived: int
    wanted: int
    forced: int
    generated: int


def count_cells(rows: Sequence[Mapping[str, object]], records: Sequence[Record]) -> dict[str, CellCount]:
    """By cell; ``rows`` are the probes of all records of the file, ``records`` those that were edited, by
    their place in the file."""
    scores = {int(record.id.rsplit("-", 1)[-1]): record.scores for record in records}
    asked: dict[str, Counter[str]] = {
        mode: Counter(cell for found in scores.values() for cell in found.get(mode, {}))
        for mode in ("teacher_forced", "generated")
    }
    out = {}
    for cell in DERIVED_CELLS:
        having = [i for i, row in enumerate(rows) if cell in row]
        wanted = sum(i in scores for i in having)
        out[cell] = CellCount(len(having), wanted, asked["teacher_forced"][cell], asked["generated"][cell])
    return out


def make_table(counts: Mapping[str, CellCount], total: int, edited: int) -> Table:
    """A row per cell."""
    title = f"{edited} of {total} records edited, stand-in images"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("cell")
    for column in ("records with it", "of those edited", "scored, forced", "scored, generated"):
        table.add_column(column, justify="right")
    for cell, count in counts.items():
        table.add_row(cell, *map(str, (count.derived, count.wanted, count.forced, count.generated)))
    return table


def run(args: argparse.Namespace) -> int:
    folder, file = Path(args.into), Path(args.file)
    if folder.exists():
        raise UserError(f"{one_line(folder)}: is there already; expected a new folder")
    probes, images = folder / PROBES, folder / IMAGES
    if args.size < 1:
        raise UserError(f"--size: expected at least 1, got {args.size}")
    # Read first, so that nothing is made from what is none.
    HyperParams.from_hparams(args.hparams_dir, args.overrides)
    list_image_names(file)
    folder.mkdir(parents=True)
    train = ["--train", args.train] if args.train else []
    made = ["--task", args.task, "--seed", str(args.seed), "--output", str(probes)]
    if code := derive.main([str(file), *train, *made]):
        folder.rmdir()
        return code
    print(f"{draw_all(list_image_names(file, probes), images)} stand-ins drawn: {images}")
    data = {"eval": file, "probes": probes}
    code = run_edit.main(
        [
            *("--hparams_dir", args.hparams_dir, "--task", args.task, "--size", str(args.size)),
            *("--output", str(folder / RUN)),
            *(f"data.{args.task}.{key}={path}" for key, path in data.items()),
            *(f"image_root={images}", "rephrase_root=null", "generate_data=false"),
            *args.overrides,
        ]
    )
    if code:
        return code
    rows, records = [row.probes for row in read_probes(probes, file)], read_records(folder / RUN)
    counts = count_cells(rows, records)
    print(as_text(make_table(counts, len(rows), len(records))))
    if lost := [
        cell for cell, count in counts.items() if not count.wanted == count.forced == count.generated
    ]:
        print(f"not scored for every record that has them: {', '.join(lost)}", file=sys.stderr)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, 1 where a cell was not asked of each record that has it, or 2 with a line
    per problem."""
    parser = ArgumentParser(
        description="Derive the hard probes of annotations, ask them on stand-in images, count every cell.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="annotations in MMEdit's layout")
    parser.add_argument("--train", metavar="FILE", help="annotations that confusable questions come from")
    parser.add_argument("--task", choices=("vqa", "caption"), default="vqa", help="kind of annotations")
    parser.add_argument("--into", required=True, metavar="FOLDER", help="a new folder for all that is made")
    parser.add_argument("--hparams_dir", default="hparams/ft/tiny_blip2.yaml", metavar="YAML", help="the run")
    parser.add_argument("--size", type=int, default=20, metavar="N", help="records that are edited")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is derived")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the YAML")
    argv = sys.argv[1:] if argv is None else argv
    return run_guarded(lambda: run(parser.parse_intermixed_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
