"""LLaVA-1.5 and LLaVA-OneVision: a vision tower, a projector, a decoder, in the checkpoint's own chat format."""

from transformers import LlavaForConditionalGeneration, LlavaOnevisionForConditionalGeneration

from unike.backbones.architecture import Architecture
from unike.backbones.vision import ProjectorVision, SplitVision

LLAVA = Architecture(LlavaForConditionalGeneration, ProjectorVision)
LLAVA_ONEVISION = Architecture(LlavaOnevisionForConditionalGeneration, SplitVision)
