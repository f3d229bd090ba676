"""Edits: what a method hands over."""

from unike.edits.base import Edit, Mixed, Together, compose, same_weights
from unike.edits.counterfactual import SeracEdit
from unike.edits.deltas import LowRankDelta, WeightDelta
from unike.edits.origin import Origin
from unike.edits.prompt import Fact, PromptEdit, Shown
from unike.edits.routed import RoutedEdit, RoutedTogether
from unike.edits.shares import EditRecord, LayerKnowledge, LayerShare, Routing
from unike.edits.store import EditStore

__all__ = [
    "Edit", "EditRecord", "EditStore", "Fact", "LayerKnowledge", "LayerShare", "LowRankDelta", "Mixed",
    "Origin", "PromptEdit", "RoutedEdit", "RoutedTogether", "Routing", "SeracEdit", "Shown", "Together",
    "WeightDelta", "compose", "same_weights",
]  # fmt: skip
