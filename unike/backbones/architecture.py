"""What distinguishes one backbone from another, as data: its class, its vision side, its dialogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from unike.backbones.dialogue import Dialogue
from unike.backbones.vision import Vision


@dataclass(frozen=True)
class Architecture:
    """A class of ``transformers``, and how queries are written for it.

    ``decoder`` is the attribute that holds the causal language model; empty where the model is one itself.
    Without a ``dialogue`` queries are written by the checkpoint's own chat template, in which the text
    ``image`` stands for an image.
    """

    model: type[PreTrainedModel]
    vision: type[Vision]
    decoder: str = ""
    dialogue: Dialogue | None = None
    image: str = "<image>"

    def find_decoder(self, model: PreTrainedModel) -> Any:
        """The causal language model within a model."""
        return getattr(model, self.decoder) if self.decoder else model
