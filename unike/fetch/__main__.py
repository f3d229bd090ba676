"""``python -m unike.fetch NAME``: the same as ``unike fetch NAME``."""

from __future__ import annotations

import sys

from unike.fetch import run
from unike.system.launching import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(lambda: run(sys.argv[1:])))
