"""``python -m unike.hub push``, ``python -m unike.hub pull``: the same as ``unike push``, ``unike pull``."""

from __future__ import annotations

import sys

from unike.hub import pull, push
from unike.system.launching import run_guarded
from unike.types import UserError

COMMANDS = {"push": push.run, "pull": pull.run}


def main(argv: list[str]) -> int:
    """Runs the command that is named; the exit code."""
    if argv[:1] in (["--help"], ["-h"]):
        print("usage: python -m unike.hub push|pull ...; push --help and pull --help say more")
        return 0
    if not argv or argv[0] not in COMMANDS:
        raise UserError("python -m unike.hub: expected push or pull, and --help for more")
    return COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
