"""``unike score RUN ...``: scores a finished run again, from the answers that it kept, without a model.

    unike score results/demo/gate --scorers contains token_f1
    unike score results/demo/gate --scorers contains --aliases aliases.json

Each scorer's scores are kept in the run's folder, in ``RUN/scores/<scorer>.jsonl``: its records stay as they
are.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from unike.evaluation.modes import MODES, list_further, name_mode
from unike.evaluation.record import Record
from unike.evaluation.summary import HARMONIC_TITLES, TITLES, Estimate, Summary, order_metrics, summarise
from unike.report.terminal import as_text
from unike.runs.added_scores import write_added_scores
from unike.runs.records import RECORDS, read_manifest, read_records
from unike.runs.rescoring import describe_form, score_answers
from unike.scoring.aliases import Aliases, read_aliases
from unike.scoring.scorers import SCORERS, Scorer, find_scorer
from unike.system.arguments import ArgumentParser
from unike.system.files import compute_sha256
from unike.types import UserError

_FORM = {
    "words": "words of an answer, mean",
    "empty": "empty answers, %",
    "repeated": "answers that repeat a pair of words, %",
    "run_on": "answers that go on after the target, %",
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser("unike score", description="Scores finished runs again, without a model.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run")
    add("--scorers", nargs="+", default=list(SCORERS), metavar="NAME", help=f"default: {' '.join(SCORERS)}")
    add("--aliases", metavar="FILE", help='further right answers: {"answer": ["alias", ...]} in JSON')
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Scores each run, keeps the scores and prints a table; the exit code. Nothing is written before all runs
    are read."""
    args = parse_arguments(argv)
    scorers = [find_scorer(name) for name in dict.fromkeys(args.scorers)]
    aliases = None if args.aliases is None else read_aliases(Path(args.aliases))
    found = {Path(folder): _read_run(Path(folder)) for folder in dict.fromkeys(args.runs)}
    about = {} if args.aliases is None else {"aliases": compute_sha256(Path(args.aliases))}
    for folder, records in found.items():
        _add_scores(folder, records, scorers, aliases, about)
        again = read_records(folder)
        summary = summarise(again, 0)
        print(as_text(make_score_table(summary, again, folder.name)))
        if form := describe_form(again):
            print(as_text(make_form_table(form)))
        print(f"scores: {folder / 'scores'}")
    return 0


def _read_run(folder: Path) -> list[Record]:
    # The metrics that the run declared, before its answers are scored.
    read_manifest(folder)
    records = read_records(folder)
    if not any(record.ok and "generated" in record.scores for record in records):
        raise UserError(
            f"{folder / RECORDS}: has no decoded answers; expected a run without --no_generated, "
            f"with a record that did not fail"
        )
    return records


def _add_scores(
    folder: Path,
    records: Sequence[Record],
    scorers: Sequence[Scorer],
    aliases: Aliases | None,
    about: Mapping[str, object],
) -> None:
    made_of = compute_sha256(folder / RECORDS)
    for scorer in scorers:
        said = {"title": scorer.title, "source": scorer.source, "records": made_of, **about}
        write_added_scores(folder, scorer.name, score_answers(records, scorer, aliases), said)


def make_score_table(summary: Summary, records: Sequence[Record], title: str) -> Table:
    """A row for each metric and harmonic mean, a column for each way of scoring: percent after the edit, with
    its 95% interval."""
    modes = (*MODES, *list_further(records))
    table = Table("after the edit", title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for mode in modes:
        table.add_column(name_mode(mode), justify="right")
    for metric in order_metrics(set(summary["metrics"])):
        values = summary["metrics"][metric]
        cells = [_format(values.get(mode, {}).get("after")) for mode in modes]
        table.add_row(TITLES.get(metric, metric), *cells)
    for name, words in HARMONIC_TITLES.items():
        means = [summary.get("harmonic_mean", {}).get(mode, {}).get(name, {}).get("after") for mode in modes]
        if any(means):
            table.add_row(words, *map(_format, means))
    return table


def make_form_table(form: Mapping[str, Mapping[str, float]]) -> Table:
    """What the answers look like, before and after the edit."""
    table = Table("decoded answers", box=box.SIMPLE_HEAD)
    for when in ("before", "after"):
        table.add_column(when, justify="right")
    for name, words in _FORM.items():
        if name in form.get("after", {}):
            table.add_row(words, *(f"{form[when][name]:.1f}" for when in ("before", "after")))
    return table


def _format(found: Estimate | None) -> str:
    if not found:
        return "-"
    mean, low, high = (f"{found[key]:.1f}" for key in ("mean", "low", "high"))  # type: ignore[literal-required]
    return mean if low == high else f"{mean} [{low}, {high}]"
