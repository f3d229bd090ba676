"""Hyper-parameters: one strict YAML per run."""

from unike.config.hparams import OPTIONS, HyperParams, UniKEHyperParams

__all__ = ["OPTIONS", "HyperParams", "UniKEHyperParams"]
