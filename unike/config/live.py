"""The options of LiveEdit, which no other method has."""

from __future__ import annotations

from dataclasses import dataclass

from unike.config.kinds import number, whole
from unike.config.schema import Section, option


@dataclass(frozen=True, kw_only=True)
class ExpertOptions(Section):
    """LiveEdit: the sizes of its experts and networks, and the weight of its routing losses."""

    live_rank: int = option(whole(low=1), "rank of an edit's expert", 4)
    live_queries: int = option(
        whole(low=1), "vectors that an image's and a question's features consist of", 4
    )
    live_heads: int = option(
        whole(low=1), "attention heads; a divisor of editor_rank and of the decoder's width", 8
    )
    live_scale: float = option(
        number(low=0, above=True),
        "what an expert's factors are divided by, besides the root of its rank",
        5.0,
    )
    live_image_tokens: int = option(
        whole(low=1),
        "tokens of the learnt image that an edit's image must beat; published: as an image has",
        32,
    )
    live_routing: float = option(number(low=0), "weight of the losses that train hard and soft routing", 1.0)
