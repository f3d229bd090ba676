"""Edits: what a method hands over."""

from unike.edits.base import Edit, EditBatch, Mixed, compose, have_same_weights
from unike.edits.counterfactual import SeracEdit
from unike.edits.deltas import LowRankDelta, WeightDelta
from unike.edits.origin import Origin
from unike.edits.prompt import Fact, PromptEdit, PromptText
from unike.edits.routed import RoutedBatch, RoutedEdit
from unike.edits.shares import EditRecord, LayerKnowledge, LayerShare, Routing
from unike.edits.store import EditStore

__all__ = [
    "Edit",
    "EditBatch",
    "EditRecord",
    "EditStore",
    "Fact",
    "LayerKnowledge",
    "LayerShare",
    "LowRankDelta",
    "Mixed",
    "Origin",
    "PromptEdit",
    "PromptText",
    "RoutedBatch",
    "RoutedEdit",
    "Routing",
    "SeracEdit",
    "WeightDelta",
    "compose",
    "have_same_weights",
]  # fmt: skip
