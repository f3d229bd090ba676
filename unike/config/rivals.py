"""The options of LoRA and GRACE, which no other method has."""

from __future__ import annotations

from dataclasses import dataclass

from unike.config.kinds import choice, number, text, whole
from unike.config.schema import Section, option


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Section):
    """LoRA: an edit's factors, and which modules they are added to."""

    lora_rank: int = option(whole(low=1), "rank of an edit's change of a module", 8)
    lora_alpha: float = option(
        number(low=0, above=True), "the factors' product is multiplied by lora_alpha / lora_rank", 32.0
    )
    lora_target: str = option(
        choice("attention", "ffn", "both"),
        "changed modules of the edited layers: the attention's queries and values, the feed-forward "
        "network's projections, or both",
        "attention",
    )


@dataclass(frozen=True, kw_only=True)
class CodebookOptions(Section):
    """GRACE: its codebook's radii, and how values start."""

    grace_eps: float = option(
        number(low=0, above=True), "radius of a new key, in the states' Euclidean distance", 1.0
    )
    grace_radius: str = option(
        choice("fixed", "balanced"),
        "radius of a new key: grace_eps, or BalancEdit's, between the distances of a rephrased prompt and of "
        "a black image",
        "fixed",
    )
    grace_balance: float = option(
        number(low=0, high=1), "BalancEdit: share of the black image's distance in the radius", 0.2
    )
    grace_rephrase: str = option(
        text(), "BalancEdit: the rephrased prompt; {} is the edit's own", "Please answer this. {}"
    )
    grace_init: str = option(
        choice("cold", "warm"), "first values: random numbers from 0 to 1, or the network's output", "cold"
    )
