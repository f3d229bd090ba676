"""InstructBLIP with Vicuna: the image's tokens, BOS, the prompt, which the Q-Former reads too."""

from transformers import InstructBlipForConditionalGeneration

from unike.backbones.architecture import Architecture
from unike.backbones.dialogue import Dialogue
from unike.backbones.vision import InstructVision

INSTRUCTBLIP = Architecture(
    InstructBlipForConditionalGeneration,
    InstructVision,
    decoder="language_model",
    dialogue=Dialogue(bos=True),
)
