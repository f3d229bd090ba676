"""Edit what a multimodal large language model knows (UniKE, Pan et al., NeurIPS 2024)."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["HyperParams", "MultimodalEditor", "UniKEHyperParams", "__version__", "load_backbone"]

if TYPE_CHECKING:
    from unike.backbones import load_backbone
    from unike.editor import MultimodalEditor
    from unike.hparams import HyperParams, UniKEHyperParams

_HOMES = {
    "HyperParams": "unike.hparams",
    "MultimodalEditor": "unike.editor",
    "UniKEHyperParams": "unike.hparams",
    "load_backbone": "unike.backbones",
}


def __getattr__(name: str) -> Any:
    """Imports the public names on first use: torch takes seconds, and a YAML error should not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
