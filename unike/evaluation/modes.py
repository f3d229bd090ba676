"""Evaluation modes: how a probe's answer is judged. Two that every run has, and one for each scorer.

``teacher_forced`` and ``generated`` are measured while a run goes. Further modes are scorers of its answers,
named as they are, or what was added to a finished run (``unike.runs.added_scores``).
"""

from __future__ import annotations

from collections.abc import Iterable

from unike.evaluation.record import Record
from unike.scoring import list_scorers

MODES = ("teacher_forced", "generated")
_BUILT_IN = {MODES[0]: "teacher-forced", MODES[1]: "generated"}
# Of modes that were read from a run's folder and that no scorer is known for.
_DECLARED: dict[str, str] = {}


def declare_mode(name: str, title: str) -> None:
    """Makes the title of a mode known to tables and pages of this process; a scorer's own goes first."""
    _DECLARED[name] = title


def name_mode(name: str) -> str:
    """What tables call a mode; of one that nobody declared, its name."""
    known = {scorer.name: scorer.title for scorer in list_scorers()}
    for titles in (_BUILT_IN, known, _DECLARED):
        if name in titles:
            return titles[name]
    return name.replace("_", " ")


def list_further(records: Iterable[Record]) -> tuple[str, ...]:
    """The modes beyond ``MODES`` that some record has: scorers in their order, then others by name."""
    found = {mode for record in records for mode in record.scores} - set(MODES)
    own = [scorer.name for scorer in list_scorers() if scorer.name in found]
    return (*own, *sorted(found - set(own)))


def list_modes(records: Iterable[Record]) -> tuple[str, ...]:
    """``MODES``, and the further ones that some record has."""
    return (*MODES, *list_further(records))
