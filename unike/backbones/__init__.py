"""Frozen vision-language models behind one protocol."""

from typing import TYPE_CHECKING, Any

from unike.system.lazy import load_attribute

if TYPE_CHECKING:
    from unike.backbones.base import Backbone, Batch, PrefixState
    from unike.backbones.loading import load_backbone

__all__ = ["Backbone", "Batch", "PrefixState", "load_backbone"]

_HOMES = {
    **dict.fromkeys(("Backbone", "Batch", "PrefixState"), "unike.backbones.base"),
    "load_backbone": "unike.backbones.loading",
}


def __getattr__(name: str) -> Any:
    # On first use: torch takes seconds, and a missing file should not.
    return load_attribute(__name__, name, _HOMES)
