"""The base model after an edit is what it was before it: one check for all tests."""

from __future__ import annotations

import torch

from unike.backbones.hooks import hook_count
from unike.backbones.vlm import VisionLanguageBackbone


def weights_of(backbone: VisionLanguageBackbone) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in backbone.model.state_dict().items()}


def assert_untouched(backbone: VisionLanguageBackbone, before: dict[str, torch.Tensor], hooks: int) -> None:
    after = backbone.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert hook_count(backbone.model) == hooks
    assert not any(p.requires_grad or p.grad is not None for p in backbone.model.parameters())
