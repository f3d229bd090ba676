"""The best trials of a tuning, from its logs, as a table.

    python -m scripts.winners                                    # prints the table
    python -m scripts.winners --write docs/results/tuning.md     # puts it between its markers in that page

Exit code 0, 2 for problems with the input (one line each).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.plan import BACKBONES
from scripts.tuning import GRID, LOGS, Entry, TuningPlan, get_log, read_log, read_tuning
from unike.report.paper.tables import rewrite_blocks
from unike.system.arguments import ArgumentParser
from unike.system.files import write_text
from unike.system.launching import run_guarded
from unike.types import UserError

_SCORES = ("HM5", "HM8 (min. pair)", "min. pair", "M-Gen")
_HEAD = ("method", "backbone", "records", *_SCORES, "options", "ended by")
_SHOWN = ("minimal_pair", "m_generality")


def find_winner(entries: Sequence[Entry]) -> Entry | None:
    """The trial of the best score, of equal ones the first; None where none has a score."""
    scored = [entry for entry in entries if entry.get("score") is not None]
    return max(scored, key=lambda entry: entry["score"], default=None)


def find_winners(logs: Path = LOGS, backbones: Sequence[str] = BACKBONES) -> dict[tuple[str, str], Entry]:
    """By method and backbone, for those that have been tuned. UserError for a log without all of its trials:
    what was tuned less is compared with nothing."""
    plan, found, problems = read_tuning(GRID), {}, []
    for method in plan.methods:
        for backbone in backbones:
            path = get_log(logs, backbone, method)
            entries = read_log(path)
            if entries and len(entries) != plan.trials:
                problems.append(f"{path}: {len(entries)} trials; expected {plan.trials}")
            if (winner := find_winner(entries)) is not None:
                found[method, backbone] = winner
    if problems:
        raise UserError(*problems)
    return found


def render(winners: Mapping[tuple[str, str], Entry], plan: TuningPlan) -> str:
    """A Markdown table: scores of the winners, teacher-forced and generated, and what they have chosen."""
    lines = [f"| {' | '.join(_HEAD)} |", f"|{' --- |' * len(_HEAD)}"]
    for (method, backbone), entry in winners.items():
        cells = [method, backbone, str(entry["records"]), _pair(entry["hm5"]), _pair(entry["hm8_minimal"])]
        both = entry["validation"]
        cells += [_pair({mode: both[mode].get(name) for mode in both}) for name in _SHOWN]
        cells.append(", ".join(f"`{key}: {_write(value)}`" for key, value in entry["options"].items()))
        cells.append(str(entry.get("stopped") or ""))
        lines.append(f"| {' | '.join(cells)} |")
    size = "the first `records` validation records of each task"
    return "\n".join(
        [*lines, "", f"{plan.trials} trials each on {size}. Teacher-forced, generated; percent."]
    )


def _pair(values: Mapping[str, float | None]) -> str:
    return ", ".join("-" if value is None else f"{value:.1f}" for value in values.values())


def _write(value: Any) -> str:
    return "null" if value is None else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="the page with the table's markers")

    def run() -> int:
        args = parser.parse_args(argv)
        shown = render(find_winners(), read_tuning(GRID))
        if args.write is None:
            print(shown)
            return 0
        if not args.write.is_file():
            raise UserError(f"--write: {args.write}: no such file")
        page = args.write.read_text(encoding="utf-8")
        write_text(args.write, rewrite_blocks(page, str(args.write), {"winners": shown}))
        return 0

    return run_guarded(run)


if __name__ == "__main__":
    sys.exit(main())
