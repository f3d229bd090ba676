"""Frozen vision-language models behind one protocol."""

from unike.backbones.base import Backbone, Batch, PrefixState
from unike.backbones.loading import load_backbone

__all__ = ["Backbone", "Batch", "PrefixState", "load_backbone"]
