"""Edit what a multimodal large language model knows (UniKE, Pan et al., NeurIPS 2024)."""

from typing import TYPE_CHECKING, Any

from unike.system.lazy import load_attribute
from unike.system.moved import forward_moved_modules

__version__ = "0.1.0"
"""The version of this package, as ``MAJOR.MINOR.PATCH``."""
__all__ = [
    "HyperParams",
    "MultimodalEditor",
    "UniKEHyperParams",
    "__version__",
    "find_example_image",
    "load_backbone",
]

if TYPE_CHECKING:
    from unike.backbones import load_backbone
    from unike.config import HyperParams, UniKEHyperParams
    from unike.editor import MultimodalEditor
    from unike.system.shipped import find_example_image

# EasyEdit's names, but for its MultimodalEditor, whose place here the project's own has.
_EASYEDIT = (
    *("CaptionDataset", "VQADataset", "MultimodalTrainer", "FTHyperParams", "FTMultimodalHyperParams"),
    *("MENDMultimodalHparams", "MENDMultimodalTrainingHparams", "MENDHyperParams", "IKEHyperParams"),
    *("SERACMultimodalHparams", "SERACMultimodalTrainingHparams", "IKEMultimodalHyperParams"),
    *("BaseEditor", "ComprehendEditDataset", "WISEMultimodalHyperParams", "GraceHyperParams"),
    *("LoRAMultimodalHyperParams", "encode_ike_facts_multimodal"),
)
_HOMES = {
    **dict.fromkeys(_EASYEDIT, "unike.easyedit"),
    "HyperParams": "unike.config",
    "MultimodalEditor": "unike.editor",
    "UniKEHyperParams": "unike.config",
    "find_example_image": "unike.system.shipped",
    "load_backbone": "unike.backbones",
}

forward_moved_modules()


def __getattr__(name: str) -> Any:
    # On first use: torch takes seconds, and a YAML error should not.
    return load_attribute(__name__, name, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
