"""EfficientNet-Lite2's published weights under the names of our tower, with batch norms folded in."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from unike.types import UserError

# Of the published network's batch norms.
EPSILON = 1e-3
State = Mapping[str, torch.Tensor]
_BLOCK = (
    ("expand", "_expand_conv", "_bn0"),
    ("depthwise", "_depthwise_conv", "_bn1"),
    ("project", "_project_conv", "_bn2"),
)


def fold(weight: torch.Tensor, norm: State) -> tuple[torch.Tensor, torch.Tensor]:
    """A convolution's weight ``(out, in, k, k)`` and the batch norm after it, as one convolution's weight and
    bias: ``w g / s`` and ``b - m g / s``, where ``s`` is the root of variance plus epsilon."""
    scale = norm["weight"].double() / (norm["running_var"].double() + EPSILON).sqrt()
    bias = norm["bias"].double() - norm["running_mean"].double() * scale
    return (weight.double() * scale[:, None, None, None]).float(), bias.float()


def convert_tower(state: State) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tower's tensors, and its classifier's ``weight`` and ``bias``. UserError for another network."""
    left = dict(state)
    out: dict[str, torch.Tensor] = {}

    def take(name: str) -> torch.Tensor:
        if name not in left:
            raise UserError(f"vision tower: the file has no `{name}`; expected EfficientNet-Lite2's weights")
        return left.pop(name)

    def add(to: str, convolution: str, norm: str) -> None:
        keys = ("weight", "bias", "running_mean", "running_var")
        parts = {key: take(f"{norm}.{key}") for key in keys}
        left.pop(f"{norm}.num_batches_tracked", None)
        out[f"{to}.weight"], out[f"{to}.bias"] = fold(take(f"{convolution}.weight"), parts)

    add("stem", "_conv_stem", "_bn0")
    count = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("_blocks.")), default=-1)
    for i in range(count):
        for name, convolution, norm in _BLOCK:
            # The first block expands nothing, and its norms keep their numbers.
            if f"_blocks.{i}.{convolution}.weight" in left:
                add(f"blocks.{i}.{name}", f"_blocks.{i}.{convolution}", f"_blocks.{i}.{norm}")
    add("head", "_conv_head", "_bn1")
    classifier = {key: take(f"_fc.{key}").float() for key in ("weight", "bias")}
    if left:
        raise UserError(f"vision tower: the file has an unexpected `{next(iter(left))}`")
    return out, classifier
