"""Draws the paper's figures from our records: runs what is missing, reads what is there.

    python -m scripts.figures --figures 2a 4c --backbones tiny_blip2 --write docs/results/figures.md

Figures 2a and 4a to 4c show runs of ``hparams/tables.yaml``, 5a the spaces of the two encoders, 5b and 7
worked examples. Runs are those of the plan's first seed. Each is a PNG, and an SVG if that is small;
``--write`` puts them and their captions between ``<!-- figure 2a -->`` and ``<!-- end of figure 2a -->``.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import figure_data as data
from scripts.plan import BACKBONES, OUTPUT, PLAN, Run, is_complete, load_records, read_plan
from scripts.plan_file import read_plan_file
from scripts.workers import ensure
from unike.config.hparams import HyperParams
from unike.report.paper import figures
from unike.report.paper.tables import rewrite_blocks
from unike.system import findings
from unike.system.arguments import ArgumentParser
from unike.system.launching import count_most_processes, run_guarded
from unike.system.places import require_folder
from unike.types import UserError

# The table of the plan with a figure's runs.
TABLES = {
    "2a": "figure2a",
    "4a": "figure4a",
    "4b": "figure4b",
    "4c": "collaboration",
    "5b": "figure5b",
    "7": "figure5b",
    "hero": "figure5b",
}
NAMES = ("2a", "4a", "4b", "4c", "5a", "5b", "7")
# The README's: ``--figures hero --backbones tiny_blip2 --write README.md``.
HERO = "hero"
VARIANTS = {"UniKE + scope gate": "with gate", "UniKE": "preset"}
# The edits of each task's file that are shown as examples, by figure.
EXAMPLES = {"5b": (0, 2), "7": (2, 5), HERO: (0, 1)}
NOT_COMPARABLE = "full-size models, not comparable with these toy models"
BARS = "bars are 95% bootstrap intervals over records"
MEANS = "generality is the mean of T-Gen and M-Gen, locality of T-Loc and M-Loc"


@dataclass(frozen=True)
class PaperFigure:
    """A figure's images by file name without its ending, and the sentence under them."""

    images: Mapping[str, Any]
    caption: str
    alt: str = ""


def plan_runs(args: argparse.Namespace) -> dict[str, list[Run]]:
    """The runs of each figure that shows runs."""
    wanted = {name: TABLES[name] for name in args.figures if name in TABLES}
    # Read together: rows of two tables that mean the same run share its folder.
    tables = list(dict.fromkeys(wanted.values()))
    benchmark = read_plan_file(args.plan).benchmark
    first = benchmark.seeds[:1] if benchmark else ()
    planned = (
        read_plan(args.plan, tables, args.backbones, args.size, args.results, seeds=first) if tables else []
    )
    found = {name: [run for run in planned if run.table == table] for name, table in wanted.items()}
    if "4c" in found:
        found["4c"] = [run for run in found["4c"] if run.row.paper]
    if lost := [name for name, some in found.items() if not some]:
        raise UserError(
            *(f"{args.plan}: {wanted[name]}: none of the rows of figure {name} is there" for name in lost)
        )
    return found


def describe_sample(planned: Sequence[Run]) -> str:
    """How many records each run has, and from which seed."""
    counts = {sum(r.ok for r in load_records(run)) for run in planned}
    seeds = ", ".join(str(s) for s in sorted({run.hparams.seed for run in planned}))
    n = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(*counts)
    return f"n = {n} records of each row and task, seed {seeds}"


def draw_trade_off(planned: Sequence[Run]) -> PaperFigure:
    caption = (
        f"generality against locality after one edit, teacher-forced; {MEANS}; filled: ours, {BARS}; "
        f"hollow: the paper's Table 1, {NOT_COMPARABLE}; both axes have most room near 100; "
        f"{describe_sample(planned)}"
    )
    return PaperFigure({"figure2a": figures.draw_trade_off(data.collect_trade_off(planned))}, caption)


def draw_items(planned: Sequence[Run]) -> PaperFigure:
    caption = (
        f"the number of states that Latent-IKE retrieves and of demonstrations that IKE shows, both with the "
        f"intrinsic half and without collaboration, as the paper has them, after one edit, teacher-forced; "
        f"{MEANS}; {BARS}; {describe_sample(planned)}"
    )
    return PaperFigure({"figure4a": figures.draw_sweeps(data.collect_sweeps(planned))}, caption)


def draw_alpha(planned: Sequence[Run]) -> PaperFigure:
    caption = (
        f"a fixed weight alpha of the retrieved knowledge against the adaptive one, after one edit, "
        f"teacher-forced; {MEANS}; {BARS}; {describe_sample(planned)}"
    )
    return PaperFigure({"figure4b": figures.draw_sweeps(data.collect_sweeps(planned))}, caption)


def draw_zeta(planned: Sequence[Run]) -> PaperFigure:
    caption = (
        f"the direction zeta that is added to the extra values, after one edit, teacher-forced; {MEANS}; "
        f"{BARS}; diamonds: the paper, assumed to be of MiniGPT-4 on E-VQA, {NOT_COMPARABLE}; "
        f"{describe_sample(planned)}"
    )
    return PaperFigure({"figure4c": figures.draw_grouped_bars(*data.collect_zetas(planned))}, caption)


def draw_spaces(backbones: Sequence[HyperParams], layer: int | None, size: int | None) -> PaperFigure:
    rows, counts = {}, []
    for hparams in backbones:
        rows[data.name_backbone(hparams)], n, at = data.compute_spaces(hparams, layer, size)
        counts.append(f"{data.name_backbone(hparams)}: n = {n} triplets, layer {at}")
    seeds = ", ".join(str(s) for s in sorted({h.seed for h in backbones}))
    caption = (
        f"states of right and wrong answers to questions that the encoders were not trained on, by t-SNE "
        f"over cosine distance, seed {seeds}; {'; '.join(counts)}; under each panel, measured in the "
        f"space itself: the share of states whose nearest state is the other answer to the same question, "
        f"and the share of the {data.NEIGHBOURS} nearest to other questions that are as true as the state "
        f"(50% by chance)"
    )
    return PaperFigure({"figure5a": figures.draw_spaces(rows)}, caption)


def draw_examples(planned: Sequence[Run], name: str = "5b") -> PaperFigure:
    images, (first, last) = {}, EXAMPLES[name]
    for backbone in dict.fromkeys(run.backbone for run in planned):
        own = [run for run in planned if run.backbone == backbone]
        found = data.collect_examples(own, VARIANTS, first, last)
        images[f"figure{name}-{backbone}"] = figures.draw_examples(found)
    count = f"edits {first + 1} to {last}" if last > first + 1 else f"edit {last}"
    shown = ", ".join(data.name_backbone(h) for h in {r.backbone: r.hparams for r in planned}.values())
    seeds = ", ".join(str(s) for s in sorted({run.hparams.seed for run in planned}))
    caption = (
        f"{count} of each task's eval split ({shown}), answers generated before and after; the first three "
        f"columns should give the target, the last two the answer before the edit; "
        f"{figures.PASS_MARK}: passes, {figures.FAIL_MARK}: fails; with gate: the row UniKE + scope "
        f"gate; preset: the paper's settings; seed {seeds}"
    )
    return PaperFigure(images, caption)


def draw_hero(planned: Sequence[Run]) -> PaperFigure:
    drawn = draw_examples(planned, HERO)
    alt = "An edit of each task: image, question, the answers before and after, and what should not change"
    return PaperFigure(drawn.images, drawn.caption, alt)


DRAW: Mapping[str, Callable[[Sequence[Run]], PaperFigure]] = {
    "2a": draw_trade_off,
    "4a": draw_items,
    "4b": draw_alpha,
    "4c": draw_zeta,
    "5b": draw_examples,
    "7": functools.partial(draw_examples, name="7"),
    HERO: draw_hero,
}


def format_block(name: str, drawn: PaperFigure, files: Sequence[Path], document: Path) -> str:
    """Markdown of a figure: its images, linked from the document, and its caption."""
    links = [
        f"![{drawn.alt or f'Figure {name}'}]({Path(os.path.relpath(f, document.parent)).as_posix()})"
        for f in files
        if f.suffix == ".png"
    ]
    # The README's has no number.
    title = "" if name == HERO else f"Figure {name}: "
    return "\n\n".join([*links, f"{title}{drawn.caption}."])


def insert_blocks(document: Path, blocks: Mapping[str, str]) -> str:
    """The document with figures' blocks between their markers; UserError if it or a marker is missing."""
    try:
        text = document.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--write: {document}: cannot be read: {error}") from None
    return rewrite_blocks(text, str(document), blocks, "figure")


def check_inputs(args: argparse.Namespace) -> tuple[dict[str, list[Run]], list[HyperParams]]:
    """The runs and YAMLs to draw; UserError with every problem before a model is loaded."""
    planned: dict[str, list[Run]] = {}
    own: list[HyperParams] = []
    spaces = "5a" in args.figures
    findings.require(
        lambda: figures.require("matplotlib"),
        lambda: spaces and figures.require("sklearn"),
        lambda: args.write and insert_blocks(args.write, dict.fromkeys(args.figures, "")),
        lambda: require_folder(args.results, "--results: "),
        lambda: planned.update(plan_runs(args)),
        *(
            lambda b=b: own.append(HyperParams.from_hparams(args.plan.parent / f"{b}.yaml"))
            for b in (args.backbones if spaces else ())
        ),
    )
    findings.require(
        *(
            lambda stem=stem: figures.check_place(args.output / stem)
            for name in args.figures
            for stem in (f"figure{name}", *(f"figure{name}-{b}" for b in args.backbones))
        )
    )
    findings.require(*(lambda h=h: data.check_spaces(h, args.layer, args.size) for h in own))
    return planned, own


def run(args: argparse.Namespace) -> int:
    if args.jobs is not None and not 1 <= args.jobs <= (most := count_most_processes()):
        raise UserError(f"--jobs: {args.jobs}; expected 1 to {most} on this machine")
    planned, own = check_inputs(args)
    outcome = ensure([r for some in planned.values() for r in some], args.jobs)
    problems = list(outcome.failures)
    for name in args.figures:
        left = sum(not is_complete(r) for r in planned.get(name, ()))
        if left:
            problems.append(
                f"figure {name}: is not drawn: {left} of its {len(planned[name])} rows are not complete"
            )
            continue
        drawn = DRAW[name](planned[name]) if name in DRAW else draw_spaces(own, args.layer, args.size)
        files = [f for stem, image in drawn.images.items() for f in figures.save(image, args.output / stem)]
        print(*files, sep="\n")
        if args.write:
            text = insert_blocks(args.write, {name: format_block(name, drawn, files, args.write)})
            args.write.write_text(text, encoding="utf-8")
    print(
        *(f"error: {problem}" for problem in problems), sep="\n", end="\n" * bool(problems), file=sys.stderr
    )
    return 130 if outcome.interrupted else int(bool(problems))


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--figures",
        nargs="+",
        choices=(*NAMES, HERO),
        default=list(NAMES),
        metavar="NAME",
        help=f"which ones: {' '.join(NAMES)} (default: all of them), or the README's: {HERO}",
    )
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), metavar="NAME")
    parser.add_argument("--size", type=int, metavar="N", help="records of each run and triplets of figure 5a")
    parser.add_argument("--layer", type=int, metavar="N", help="layer of figure 5a; default: the last edited")
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=OUTPUT, metavar="FOLDER", help="where the runs are")
    parser.add_argument("--plan", type=Path, default=PLAN, metavar="FILE")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes; default: one a core")
    parser.add_argument("--write", type=Path, metavar="FILE", help="markdown file with the figures' markers")
    return run_guarded(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
