"""Edits: what a method hands over."""

from typing import TYPE_CHECKING, Any

from unike.system.lazy import load_attribute

if TYPE_CHECKING:
    from unike.edits.base import Edit, EditBatch, Mixed, compose, have_same_weights
    from unike.edits.codebook import CodebookEdit, CodebookEntry
    from unike.edits.counterfactual import SeracEdit
    from unike.edits.deltas import LowRankDelta, WeightDelta
    from unike.edits.experts import ExpertEdit
    from unike.edits.origin import Origin
    from unike.edits.prompt import Fact, PromptEdit, PromptText
    from unike.edits.routed import RoutedBatch, RoutedEdit
    from unike.edits.shares import EditRecord, LayerKnowledge, LayerShare, Routing
    from unike.edits.side_memory import SideMemoryEdit, SideRecord
    from unike.edits.store import EditStore

__all__ = [
    "CodebookEdit",
    "CodebookEntry",
    "Edit",
    "EditBatch",
    "EditRecord",
    "EditStore",
    "ExpertEdit",
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
    "SideMemoryEdit",
    "SideRecord",
    "WeightDelta",
    "compose",
    "have_same_weights",
]

_HOMES = {
    **dict.fromkeys(("Edit", "EditBatch", "Mixed", "compose", "have_same_weights"), "unike.edits.base"),
    **dict.fromkeys(("CodebookEdit", "CodebookEntry"), "unike.edits.codebook"),
    "SeracEdit": "unike.edits.counterfactual",
    **dict.fromkeys(("LowRankDelta", "WeightDelta"), "unike.edits.deltas"),
    "ExpertEdit": "unike.edits.experts",
    "Origin": "unike.edits.origin",
    **dict.fromkeys(("Fact", "PromptEdit", "PromptText"), "unike.edits.prompt"),
    **dict.fromkeys(("RoutedEdit", "RoutedBatch"), "unike.edits.routed"),
    **dict.fromkeys(("EditRecord", "LayerKnowledge", "LayerShare", "Routing"), "unike.edits.shares"),
    **dict.fromkeys(("SideMemoryEdit", "SideRecord"), "unike.edits.side_memory"),
    "EditStore": "unike.edits.store",
}


def __getattr__(name: str) -> Any:
    # On first use: whoever only lists edits should not wait for torch.
    return load_attribute(__name__, name, _HOMES)
