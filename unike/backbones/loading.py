"""From a YAML (or its values) to a backbone."""

from __future__ import annotations

import os

import torch

from unike.backbones.checking import require_files
from unike.backbones.placement import check_placement, pick_device
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.combined import LoadingOptions
from unike.config.hparams import HyperParams
from unike.types import BackboneSpec, UserError

__all__ = ["load_backbone", "pick_device"]


def load_backbone(source: str | os.PathLike[str] | LoadingOptions | BackboneSpec) -> VisionLanguageBackbone:
    """The frozen model of a YAML file, of a shipped YAML's name, of hyper-parameters or of a spec.

    It is in eval mode, on the YAML's ``device`` and in its ``dtype``; no weight requires a gradient.
    UserError, with every problem at once and before anything is loaded, for missing or wrong weight files and
    for a device that is not there.
    """
    if isinstance(source, (str, os.PathLike)):
        source = HyperParams.from_hparams(source)
    if not isinstance(source, (LoadingOptions, BackboneSpec)):
        raise UserError(f"load_backbone: expected a YAML file, got {type(source).__name__}")
    limit = source.max_new_tokens if isinstance(source, LoadingOptions) else 16
    spec = source.backbone if isinstance(source, LoadingOptions) else source
    device = pick_device(spec.device)
    check_placement(spec)
    require_files(spec)
    # Each backend needs a `transformers` in which the other's classes are missing.
    if spec.backend == "lavis":
        from unike.backbones.lavis import load_lavis

        with torch.inference_mode(False):
            return load_lavis(spec, device, limit)
    from unike.backbones.huggingface import load_huggingface

    # With `device_map`, the edited layers lie together; four are edited unless a YAML says otherwise.
    layers = source.layers if isinstance(source, LoadingOptions) else 4
    # Weights that are made in inference mode can never be trained through.
    with torch.inference_mode(False):
        return load_huggingface(spec, device, layers, limit)
