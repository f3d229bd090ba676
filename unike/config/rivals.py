"""The options of LoRA, which no other method has."""

from __future__ import annotations

from dataclasses import dataclass

from unike.config.kinds import choice, number, whole
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
