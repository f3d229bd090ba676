"""Where two computations of an edit diverge: a ReLU neuron that, by rounding, fires in only one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from unike.backbones.hooks import transform
from unike.backbones.vlm import VisionLanguageBackbone

# By layer, the pre-activations (s, f) of every pass with gradients, in order.
Seen = dict[int, list[torch.Tensor]]


@contextmanager
def _watch_neurons(backbone: VisionLanguageBackbone, layers: Sequence[int]) -> Iterator[Seen]:
    """Pre-activations of the model's own neurons at each training step; extra pairs are left out."""
    seen: Seen = {i: [] for i in layers}

    def keep(index: int, width: int, _: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen[index].append(output.detach().flatten(0, -2)[:, :width].clone())
        return output

    sites = {i: backbone.layout.ffn(i) for i in layers}
    afters = [
        (site.keys[0], site.keys[0], partial(keep, i, site.keys[0].weight.shape[0]))
        for i, site in sites.items()
        if isinstance(site.activation, nn.ReLU)
    ]
    with transform(afters):
        yield seen


def find_kink(
    backbone: VisionLanguageBackbone,
    layers: Sequence[int],
    one: Callable[[], object],
    other: Callable[[], object],
    tolerance: float,
) -> float | None:
    """The larger distance from zero of a neuron that fires in only one of ``one`` and ``other``, at the first
    step where there is such a neuron; both train the same edit.

    Its gradient exists in one of them only, and Adam carries the difference into every later step. None if
    there is no such neuron, or if the two already differ by more than ``tolerance``: that is not rounding.
    """
    passes = []
    for run in (one, other):
        with _watch_neurons(backbone, layers) as seen:
            run()
        passes.append(list(zip(*seen.values(), strict=False)))
    for ours, theirs in zip(*passes, strict=False):
        pairs = list(zip(ours, theirs, strict=True))
        if any(a.shape != b.shape or (a - b).abs().max() > tolerance for a, b in pairs):
            return None
        flips = [torch.maximum(a.abs(), b.abs())[(a > 0) != (b > 0)] for a, b in pairs]
        if (sizes := torch.cat(flips)).numel():
            return sizes.max().item()
    return None
