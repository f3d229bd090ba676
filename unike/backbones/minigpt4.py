"""MiniGPT-4: EVA ViT-g, BLIP-2's Q-Former, one projection, Vicuna. The image stands in a dialogue."""

from dataclasses import replace

from unike.backbones.blip2_opt import BLIP2_OPT
from unike.backbones.dialogue import Dialogue

MINIGPT4 = replace(
    BLIP2_OPT,
    dialogue=Dialogue(before_image="###Human: <Img>", after_image="</Img> ", stops=("###", "\n")),
)
