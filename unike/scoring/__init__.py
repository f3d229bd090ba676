"""How free answers are scored, and what form they have: texts alone, without torch or a model."""

from unike.scoring.scorers import SCORERS, Scorer, find_scorer, list_scorers, register_scorer

__all__ = ["SCORERS", "Scorer", "find_scorer", "list_scorers", "register_scorer"]
