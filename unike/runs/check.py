"""``run_edit.py --check``: whether everything that a run needs is there, one line each, with the remedy."""

from __future__ import annotations

from collections.abc import Sequence

from unike.runs.checks import RunRequest, find_all
from unike.system.findings import Finding


def report(request: RunRequest) -> int:
    """Runs all checks, prints what they find, and gives the exit code: 0, or 2 where the run would end
    before it starts."""
    found = find_all(request)
    print(*format_findings(found), sep="\n")
    return 2 if any(not finding.ok for finding in found) else 0


def format_findings(found: Sequence[Finding]) -> list[str]:
    """Lines: ✓ fine, • a note, ✗ a problem with its remedy; and how many problems there are."""
    marks = ("✗" if not finding.ok else "•" if finding.remedy else "✓" for finding in found)
    lines = [f"{mark} {finding.line}" for mark, finding in zip(marks, found, strict=True)]
    wrong = sum(not finding.ok for finding in found)
    problems = "1 problem" if wrong == 1 else f"{wrong} problems"
    return [*lines, f"{problems} to fix before this run" if wrong else "ready to run"]
