"""Writes the page of a finished run.

python -m unike.report results/tiny_blip2-vqa
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from unike import launching
from unike.report.run import MOST_CASES, write_report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unike.report", description="one HTML file of a run")
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in the run's folder")
    parser.add_argument("--cases", type=int, default=MOST_CASES, metavar="N", help="most cases shown")
    args = parser.parse_args(argv)

    def write() -> int:
        print(write_report(args.run, args.output, max(0, args.cases)))
        return 0

    return launching.guarded(write)


if __name__ == "__main__":
    sys.exit(main())
