"""MiniGPT-4: EVA ViT-g, BLIP-2's Q-Former, one projection, Vicuna. The image stands in a dialogue."""

from unike.backbones.hf import Dialogue

MINIGPT4 = Dialogue(
    decoders=("llama",), before_image="###Human: <Img>", after_image="</Img> ", stops=("###", "\n")
)
