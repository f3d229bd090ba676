"""BLIP2-OPT: EVA ViT-g, Q-Former, OPT. The image's tokens stand alone before the prompt."""

from transformers import Blip2ForConditionalGeneration

from unike.backbones.architecture import Architecture
from unike.backbones.dialogue import Dialogue
from unike.backbones.vision import Blip2Vision

BLIP2_OPT = Architecture(
    Blip2ForConditionalGeneration, Blip2Vision, decoder="language_model", dialogue=Dialogue()
)
