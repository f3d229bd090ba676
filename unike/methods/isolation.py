"""Gradients where an edit is trained, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from unike.backbones.base import Backbone


@contextmanager
def train_apart(backbone: Backbone) -> Iterator[None]:
    """Inside the block gradients are computed, whatever the caller has switched off, and none of them reaches
    the base model's own parameters. Afterwards these are as the caller had them."""
    open_ones = [p for p in backbone.model.parameters() if p.requires_grad]
    for parameter in open_ones:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in open_ones:
            parameter.requires_grad_(True)
