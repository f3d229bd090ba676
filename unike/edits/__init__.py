"""Edits: what a method hands over."""

from unike.edits.base import Edit, Together, compose
from unike.edits.prompt import Fact, PromptEdit, Shown
from unike.edits.routed import (
    EditRecord,
    LayerKnowledge,
    LayerShare,
    RoutedEdit,
    RoutedTogether,
    Routing,
)

__all__ = [
    "Edit", "EditRecord", "Fact", "LayerKnowledge", "LayerShare", "PromptEdit", "RoutedEdit",
    "RoutedTogether", "Routing", "Shown", "Together", "compose",
]  # fmt: skip
