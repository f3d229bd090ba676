"""EfficientNet-Lite as a vision tower: inverted bottlenecks with ReLU6, without squeeze-and-excitation.

Sources: Tan and Le 2019 (arXiv 1905.11946) for the stages, and the Lite variant's model card for what it
leaves out. Each convolution has the batch norm after it folded in, so that no running statistics are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

# EfficientNet-Lite2's stages: kernel, blocks, stride of the first one, expansion, channels.
LITE2 = (
    (3, 1, 1, 1, 16),
    (3, 3, 2, 6, 24),
    (5, 3, 2, 6, 48),
    (3, 4, 2, 6, 88),
    (5, 4, 1, 6, 120),
    (5, 5, 2, 6, 208),
    (3, 1, 1, 6, 352),
)


class EfficientNetLiteConfig(PreTrainedConfig):
    """The shape of a tower: ``stem`` and ``hidden_size`` are channels at its two ends, ``grid`` the cells per
    side that its map is pooled to, besides the mean of all; 0 for the mean alone."""

    model_type = "efficientnet_lite"

    def __init__(
        self,
        image_size: int = 260,
        stem: int = 32,
        stages: Sequence[Sequence[int]] = LITE2,
        hidden_size: int = 1280,
        grid: int = 2,
        **kwargs: Any,
    ) -> None:
        self.image_size, self.stem, self.hidden_size, self.grid = image_size, stem, hidden_size, grid
        self.stages = [list(stage) for stage in stages]
        super().__init__(**kwargs)


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: as many outputs as ``ceil(size / stride)``; where the
    padding is odd, the larger half is below and to the right."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads: list[int] = []
        for size, kernel, stride in reversed(
            list(zip(x.shape[-2:], self.kernel_size, self.stride, strict=True))
        ):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, groups=self.groups)


class InvertedBottleneck(nn.Module):
    """Expansion, depthwise convolution, projection; the input is added where shapes allow."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width * expansion
        self.adds_input = stride == 1 and width == out
        self.expand = SameConv2d(width, inner, 1) if expansion > 1 else None
        self.depthwise = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv2d(inner, out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(b, c, h, w)`` to ``(b, out, ceil(h / stride), ceil(w / stride))``."""
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.adds_input else y


class EfficientNetLite(nn.Module):
    """The tower without its classifier."""

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.stem = SameConv2d(3, config.stem, 3, 2)
        blocks, width = [], config.stem
        for kernel, count, stride, expansion, out in config.stages:
            for i in range(count):
                blocks.append(InvertedBottleneck(width, out, kernel, stride if i == 0 else 1, expansion))
                width = out
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv2d(width, config.hidden_size, 1)

    def map(self, pixels: torch.Tensor) -> torch.Tensor:
        """``(b, 3, H, W)`` normalised pixels to the last map ``(b, hidden_size, h, w)``."""
        x = F.relu6(self.stem(pixels))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """``(b, 1 + grid², hidden_size)``: the mean of the map, then its cells row by row."""
        return pool_cells(self.map(pixels), self.grid)


def pool_cells(features: torch.Tensor, grid: int) -> torch.Tensor:
    """A map ``(b, c, h, w)`` as ``(b, 1 + grid², c)``: its mean, then the means of ``grid x grid`` cells."""
    whole = features.mean((2, 3))[:, None]
    if not grid:
        return whole
    cells = F.adaptive_avg_pool2d(features, grid).flatten(2).transpose(1, 2)
    return torch.cat([whole, cells], 1)
