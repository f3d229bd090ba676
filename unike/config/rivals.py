"""The options of LoRA, GRACE and WISE, which no other method has."""

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


@dataclass(frozen=True, kw_only=True)
class SideMemoryOptions(Section):
    """WISE: its shards, its margins, and when a prompt gets to the side memory."""

    wise_mask: float = option(
        number(low=0, high=1, above=True), "share of the matrix's entries that a shard trains", 0.2
    )
    wise_shard_edits: int = option(whole(low=1), "edits of a sequence in one shard", 500)
    wise_density: float = option(
        number(low=0, high=1, above=True), "share of each shard's largest entries that merging keeps", 0.53
    )
    wise_alpha: float = option(
        number(low=0), "most activation of an unrelated prompt that costs nothing", 5.0
    )
    wise_beta: float = option(number(low=0), "least activation of an edit's prompt that costs nothing", 20.0)
    wise_gamma: float = option(number(low=0), "least difference of both that costs nothing", 10.0)
    wise_ratio: float = option(
        number(low=0, high=1),
        "share of the smallest of the edits' own activations from which on the side memory answers",
        0.88,
    )
    wise_clamp: float = option(
        number(low=0, above=True), "most that an entry of the side memory may differ from the matrix", 1.0
    )
    wise_unrelated: int = option(
        whole(low=1), "questions of the training split that an edit must not reach", 4
    )
