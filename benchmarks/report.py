"""One table of all benchmarks in ``docs/performance_figures.md``, from the files of their ``--json``.

``python -m benchmarks.report results/benchmarks/*.json --write docs/performance_figures.md``
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import Measurement
from unike.report.paper.tables import rewrite_blocks
from unike.types import UserError

HEAD = (
    "| benchmark | case | figure | median | runs | target | met |",
    "| --- | --- | --- | ---: | ---: | --- | --- |",
)
VERDICTS = {None: "", True: "yes", False: "**no**"}


def read(path: Path) -> tuple[dict[str, Any], list[Measurement]]:
    """A file's machine and rows; UserError if no benchmark wrote it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content["machine"]), [Measurement(**row) for row in content["rows"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: {error}; expected a file that a benchmark wrote with --json") from error


def describe(machine: Mapping[str, Any]) -> str:
    """The machine in one line."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads of torch, "
        f"{machine['memory_gib']} GiB; Python {machine['python']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}"
    )


def format_table(files: Sequence[tuple[Mapping[str, Any], Sequence[Measurement]]]) -> str:
    """Markdown: the rows of each machine, then their commands."""
    blocks: dict[str, list[Measurement]] = {}
    for machine, rows in files:
        blocks.setdefault(describe(machine), []).extend(rows)
    out = []
    for machine_line, rows in blocks.items():
        out += [f"Machine: {machine_line}.", "", *HEAD, *(_format_row(row) for row in rows), ""]
        commands = dict.fromkeys(row.command for row in rows)
        out += ["Commands:", "", "```bash", *commands, "```", ""]
    return "\n".join(out).rstrip()


def _format_row(row: Measurement) -> str:
    unit = f" {row.unit}" if row.unit else ""
    cells = [row.benchmark, row.case, row.metric, f"{row.median:.3g}{unit}", str(row.runs)]
    target = "" if row.target is None else f"{row.target.replace('>=', '≥').replace('<=', '≤')}{unit}"
    return "| " + " | ".join([*cells, target, VERDICTS[row.is_met]]) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="files that benchmarks wrote with --json")
    parser.add_argument("--write", type=Path, help="the page with the table's markers")
    args = parser.parse_args(arguments)
    try:
        shown = format_table([read(path) for path in args.files])
        if args.write is None:
            print(shown)
        else:
            page = args.write.read_text(encoding="utf-8") if args.write.is_file() else ""
            args.write.write_text(
                rewrite_blocks(page, str(args.write), {"all": shown}, "benchmarks"), encoding="utf-8"
            )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
