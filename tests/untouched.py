"""The base model after an edit is what it was before it: one check for all tests."""

from __future__ import annotations

import torch
from torch import nn

from unike.backbones.vlm import VisionLanguageBackbone


def hook_count(model: nn.Module) -> int:
    """How many forward hooks the model carries: the same before and after an edit."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def weights_of(backbone: VisionLanguageBackbone) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in backbone.model.state_dict().items()}


def assert_untouched(backbone: VisionLanguageBackbone, before: dict[str, torch.Tensor], hooks: int) -> None:
    after = backbone.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert hook_count(backbone.model) == hooks
    assert not any(p.requires_grad or p.grad is not None for p in backbone.model.parameters())
