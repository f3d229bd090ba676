"""Train records as everything that learns is trained on them: meta-learned editors and scope classifier.

One function makes them, so that all methods see the same queries (``editor_probes: recombined``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from unike.types import Case, Probe, UserError

INSIDE = ("edit", "rephrased", "rephrased image", "both rephrased")
OUTSIDE = ("text only", "unrelated", "same question elsewhere", "other question here")
_READ = ("t_generality", "m_generality", "t_locality", "m_locality")


def make_training_cases(cases: Sequence[Case]) -> list[Case]:
    """The records with other probes: those that an edit should apply to (``INSIDE``, which expect the
    target), then others (``OUTSIDE``, unchanged).

    They are recombinations of a record's own four neighbours, so that any data in MMEdit's layout will do:
    of the edit and its rephrased question, each on the image and on the rephrased one; the text-only
    question, the unrelated question on its image, and question and image of the edit with image and question
    of the unrelated one. UserError where a record lacks a probe.
    """
    return [_recombine(case) for case in cases]


def _recombine(case: Case) -> Case:
    queries = {probe.name: probe.query for probe in case.probes}
    if missing := [name for name in _READ if name not in queries]:
        at = f"record {case.request.id}: {', '.join(missing)}"
        raise UserError(f"{at}: missing; editors and the scope classifier are trained on it")
    edit = case.request.query
    rephrased, other_image, text, unrelated = (queries[name] for name in _READ)
    joint = replace(rephrased, image=other_image.image)
    elsewhere, here = replace(edit, image=unrelated.image), replace(unrelated, image=edit.image)
    inside = zip(INSIDE, (edit, rephrased, other_image, joint), strict=True)
    outside = zip(OUTSIDE, (text, unrelated, elsewhere, here), strict=True)
    probes = (
        *(Probe(name, query, "target") for name, query in inside),
        *(Probe(name, query, "unchanged") for name, query in outside),
    )
    return replace(case, probes=probes)
