"""Qwen2-VL and Qwen2.5-VL: pictures of any size, whose tokens have a place in time, height and width."""

from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

from unike.backbones.architecture import Architecture
from unike.backbones.vision import GridVision

QWEN2_VL = Architecture(Qwen2VLForConditionalGeneration, GridVision, image="<|image_pad|>")
QWEN2_5_VL = Architecture(Qwen2_5_VLForConditionalGeneration, GridVision, image="<|image_pad|>")
