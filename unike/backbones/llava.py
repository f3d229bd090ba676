"""LLaVA-1.5 and LLaVA-OneVision: vision tower, projector, decoder, and the checkpoint's own chat."""

from transformers import LlavaForConditionalGeneration, LlavaOnevisionForConditionalGeneration

from unike.backbones.architecture import Architecture
from unike.backbones.vision import ProjectorVision, SplitVision

LLAVA = Architecture(LlavaForConditionalGeneration, ProjectorVision)
LLAVA_ONEVISION = Architecture(LlavaOnevisionForConditionalGeneration, SplitVision)
