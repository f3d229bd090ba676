"""Edits every record of a task and prints one table; ``run_edit.py ask --help`` asks an edited model.

    python run_edit.py --hparams_dir hparams/tiny_blip2.yaml --task vqa --size 20 k=10 alpha=0.5

Exit code 0, 1 where no record succeeded or a process died, 2 for problems to fix in the input (one line
each), 130 after Ctrl-C.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from importlib import import_module

from unike.command import edit
from unike.system import launching

arguments = edit.parse_arguments


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["ask"]:
        return launching.run_guarded(lambda: import_module("unike.ask").run(argv[1:]))
    return edit.main(argv)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
