"""What metrics are called, in full and in the head of a column."""

from __future__ import annotations

from unike.types import IMAGE_STYLES

TITLES = {
    "reliability": "Reliability",
    "t_generality": "T-Generality",
    "m_generality": "M-Generality",
    "t_locality": "T-Locality",
    "m_locality": "M-Locality",
    "same_question": "same question",
    "same_image": "same image",
    "joint": "joint",
    "t1_i3": "edit's question, unrelated image",
    "t3_i1": "unrelated question, edit's image",
    "t1_i4": "edit's question, no image",
    "t2_i4": "confusable question, no image",
    "t1_i2": "edit's question, confusable image",
    "t2_i1": "confusable question, edit's image",
    "t2_i2": "confusable question and image",
    "minimal_pair": "same question, minimal pair",
    "same_object": "same object",
    **{f"m_generality_{style}": f"M-Generality, {style.replace('_', ' ')}" for style in IMAGE_STYLES},
}
SHORT_TITLES = {
    "reliability": "Rel",
    "t_generality": "T-Gen",
    "m_generality": "M-Gen",
    "t_locality": "T-Loc",
    "m_locality": "M-Loc",
    "same_question": "same Q",
    "same_image": "same I",
    "joint": "joint",
    "t1_i3": "T1I3",
    "t3_i1": "T3I1",
    "t1_i4": "T1I4",
    "t2_i4": "T2I4",
    "t1_i2": "T1I2",
    "t2_i1": "T2I1",
    "t2_i2": "T2I2",
    "minimal_pair": "min. pair",
    "same_object": "same O",
    **{f"m_generality_{style}": f"M-Gen {style.replace('_', ' ')}" for style in IMAGE_STYLES},
}
