"""Options of what is evaluated beyond a record's own probes."""

from __future__ import annotations

from dataclasses import dataclass

from unike.config.kinds import switch
from unike.config.schema import Section, option


@dataclass(frozen=True, kw_only=True)
class FurtherEvaluationOptions(Section):
    """Probes that are made of a record's own question, target and old answer; numbers that are no scores."""

    consistency_probes: bool = option(
        switch(),
        "also ask whether the target and the old answer are right, the same negated, and which of them is",
        False,
    )
    likelihoods: bool = option(
        switch(),
        "also record the log-probability margin of the target over the old answer, and the KL divergence on "
        "locality probes",
        False,
    )
