"""Writes the page of a finished run.

python -m unike.report results/tiny_blip2-vqa
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unike.report.page import check_page
from unike.report.run_page import MOST_CASES, write_report
from unike.system import launching
from unike.system.arguments import ArgumentParser
from unike.types import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m unike.report", description="one HTML file of a run")
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in the run's folder")
    parser.add_argument("--cases", type=int, default=MOST_CASES, metavar="N", help="most cases shown")

    def write() -> int:
        args = parser.parse_args(argv)
        if args.cases < 0:
            raise UserError(f"cases: {args.cases}; expected 0 or more")
        if args.output is not None:
            check_page(args.output)
        print(write_report(args.run, args.output, args.cases))
        return 0

    return launching.run_guarded(write)


if __name__ == "__main__":
    sys.exit(main())
