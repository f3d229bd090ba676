"""``python -m unike``: the command ``unike``."""

import sys

from unike.command.main import main

if __name__ == "__main__":
    sys.exit(main())
