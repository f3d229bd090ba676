"""BLIP2-OPT: EVA ViT-g, Q-Former, OPT. The image's tokens stand alone before the prompt."""

from unike.backbones.hf import Dialogue

BLIP2_OPT = Dialogue(decoders=("opt",))
