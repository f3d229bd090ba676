"""``python -m unike.own``."""

import sys

from unike.own import run
from unike.system.launching import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(lambda: run(sys.argv[1:])))
