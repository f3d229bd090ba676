"""Tables of finished runs.

python -m unike.tables compare RUN_A RUN_B --html compared.html
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unike.evaluation.summary import TITLES, summarise
from unike.report.compare import build_flip_table, build_table, compare
from unike.report.page import check_page
from unike.report.terminal import as_text, summary_table
from unike.report.verdict import judge_comparison
from unike.system import launching
from unike.system.arguments import ArgumentParser
from unike.types import UserError

# Handed on to those who import them from here.
__all__ = ["TITLES", "as_text", "main", "summarise", "summary_table"]


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m unike.tables compare``."""
    parser = ArgumentParser(prog="python -m unike.tables", description="tables of finished runs")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("compare", help="two runs of the same data, record by record")
    command.add_argument("a", metavar="RUN_A", help="folder of a run")
    command.add_argument("b", metavar="RUN_B", help="folder of the other; differences are B less A")
    command.add_argument("--html", metavar="FILE", help="write a page of the cases that flipped, with images")
    command.add_argument("--most", type=int, default=20, metavar="N", help="flips printed; default: 20")
    command.add_argument("--seed", type=int, help="of the resampling; default: that of RUN_A")

    def run() -> int:
        args = parser.parse_args(argv)
        numbers = {"most": args.most, "seed": args.seed}
        if wrong := [f"{k}: {n}; expected 0 or more" for k, n in numbers.items() if n is not None and n < 0]:
            raise UserError(*wrong)
        if args.html is not None:
            check_page(args.html)
        found = compare(args.a, args.b, args.seed)
        print(f"A: {found.names[0]}\nB: {found.names[1]}\n{judge_comparison(found)}")
        print(as_text(build_table(found)))
        if found.flips and args.most:
            print(as_text(build_flip_table(found, args.most)))
        if args.html is not None:
            # Imported late: images need the data sets, and with them torch.
            from unike.report.compare_page import write_comparison

            print(f"written: {write_comparison(found, args.a, args.html)}")
        return 0

    return launching.run_guarded(run)


if __name__ == "__main__":
    sys.exit(main())
