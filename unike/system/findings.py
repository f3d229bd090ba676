"""What checks find, one line each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unike.types import UserError


@dataclass(frozen=True)
class Finding:
    """One line of a check: ``ok`` with a ``remedy`` is a note, not ``ok`` is a problem. A run says a note
    that ``is_announced`` before it loads a model."""

    ok: bool
    what: str
    remedy: str | None = None
    is_announced: bool = False

    @property
    def line(self) -> str:
        """What was found, with its remedy."""
        return self.what if self.remedy is None else f"{self.what}; {self.remedy}"


def find_problems(check: Callable[[], object], what: str) -> list[Finding]:
    """The lines of the UserError that the check raises, each as a problem; ``what`` where it passes."""
    return [Finding(False, problem) for problem in collect_problems(check)] or [Finding(True, what)]


def collect_problems(*checks: Callable[[], object]) -> list[str]:
    """All lines of the UserErrors that the checks raise, in order, each once."""
    found: list[str] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found += error.problems
    return list(dict.fromkeys(found))


def require(*checks: Callable[[], object]) -> None:
    """Runs all checks, then raises one UserError with everything that they found."""
    if found := collect_problems(*checks):
        raise UserError(*found)
