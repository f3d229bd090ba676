"""``run_edit.py --check``: whether everything that a run needs is there, one line each, with the remedy.

The last lines are commands to paste: those that get what is missing, then the run itself.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from unike.backbones.checking import get_original_files
from unike.runs.checks import CHECKS, Check, RunRequest, find_all
from unike.system.findings import Finding
from unike.system.hub import find_model_folder, is_hub_id
from unike.system.shipped import is_packaged

_ADDRESS = re.compile(r"https://\S+\.pth\b")
# The folder of MMEdit's files in the YAMLs.
_MMEDIT = os.path.join("data", "mmedit")


def report(request: RunRequest, argv: Sequence[str] = (), checks: Sequence[Check] = CHECKS) -> int:
    """Runs all checks, prints what they find, and gives the exit code: 0, or 2 where the run would end
    before it starts. ``argv`` is the command line, of which the last line is made."""
    found = find_all(request, checks)
    print(*format_findings(found), sep="\n")
    if commands := list_commands(request, argv):
        print("to paste:", *(f"  {command}" for command in commands), sep="\n")
    return 2 if any(not finding.ok for finding in found) else 0


def format_findings(found: Sequence[Finding]) -> list[str]:
    """Lines: ✓ fine, • a note, ✗ a problem with its remedy; and how many problems there are."""
    marks = ("✗" if not finding.ok else "•" if finding.remedy else "✓" for finding in found)
    lines = [f"{mark} {finding.line}" for mark, finding in zip(marks, found, strict=True)]
    wrong = sum(not finding.ok for finding in found)
    problems = "1 problem" if wrong == 1 else f"{wrong} problems"
    return [*lines, f"{problems} to fix before this run" if wrong else "ready to run"]


def list_commands(request: RunRequest, argv: Sequence[str]) -> list[str]:
    """What gets the files that are missing, and then runs: a line each, for a shell."""
    run = [word for word in argv if word != "--check"]
    commands = [*_list_downloads(request), *_list_data(request)]
    return [*commands, shlex.join([*_name_program(), *run])] if run else commands


def _name_program() -> list[str]:
    """The command that edits, as its user started it: an installed package has no run_edit.py."""
    is_command = Path(sys.argv[0]).stem == "unike" or is_packaged()
    return ["unike", "edit"] if is_command else ["python", "run_edit.py"]


def _list_downloads(request: RunRequest) -> Iterator[str]:
    """Of the model: its files on the hub, and original files that have an address."""
    spec = request.hparams.backbone
    if is_hub_id(spec.name) and not os.path.isdir(find_model_folder(spec.name)):
        yield shlex.join(["hf", "download", spec.name])
    for key, kind in get_original_files(spec).items() if spec.original_files else ():
        path, address = getattr(spec, key), _ADDRESS.search(kind.remedy)
        if path is not None and address is not None and not os.path.exists(path):
            yield shlex.join(["curl", "-L", "--create-dirs", "-o", path, address[0]])


def _list_data(request: RunRequest) -> Iterator[str]:
    """MMEdit's annotations and images, where the YAML's files of theirs are missing."""
    named = [path for files in request.hparams.data.values() for path in files.values() if path]
    missing = [p for p in named if _MMEDIT in os.path.normpath(p) and not os.path.isfile(p)]
    # The command is a module of its own, which an older installation may lack.
    if missing and find_spec("unike.fetch") is not None:
        yield "python -m unike.fetch mmedit"
    elif missing:
        yield f"# MMEdit's files go to {Path(missing[0]).parent}: data/README.md says where they come from"
