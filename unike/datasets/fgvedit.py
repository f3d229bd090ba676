"""FGVEdit (Zeng et al., ICCV 2025): edits of one of several objects in an image.

Records have MMEdit's ``src``, ``rephrase``, ``alt``, ``image``, ``loc`` and ``loc_ans``, and two questions on
the edit's own image: ``fg_gen_q`` about what the edit changes, to be answered with ``fg_gen_a``, and
``fg_loc_q`` about another object, whose answer should stay. There are no rephrased or unrelated images.

Read: the release's loader and editor (zeng-zhen/FGVEdit, easyeditor/dataset/vqa.py,
easyeditor/editors/multimodal_editor.py), which average the two to its Specificity.
"""

from __future__ import annotations

from typing import Any

from unike.datasets.images import PathLike
from unike.datasets.layout import (
    Asked,
    Described,
    Joined,
    Layout,
    find_optional_problem,
    find_text_problems,
    strip_or_none,
)
from unike.datasets.mmedit import load_records

_MARKS = ("fg_gen_q", "fg_gen_a", "fg_loc_q", "fg_loc_a")
_NEEDED = ("src", "rephrase", "alt", "image", "loc", "loc_ans", *_MARKS)
_KNOWN = (*_NEEDED, "pred")


def _find_problems(joined: Joined) -> list[str | None]:
    record: Any = joined.record
    return [*find_text_problems(record, _NEEDED, _KNOWN), find_optional_problem(record, "pred")]


def _describe(joined: Joined) -> Described:
    record: Any = joined.record
    image, target = record["image"], record["alt"]
    probes = (
        Asked("reliability", record["src"], target, image),
        Asked("t_generality", record["rephrase"], target, image),
        Asked("t_locality", record["loc"], record["loc_ans"], is_plain=True),
        Asked("fine_generality", record["fg_gen_q"], record["fg_gen_a"], image),
        Asked("fine_locality", record["fg_loc_q"], record["fg_loc_a"], image),
    )
    return Described(probes[0], strip_or_none(record.get("pred")), probes)


def _read(path: PathLike) -> list[Joined]:
    return [Joined(record) for record in load_records(path)]


FGVEDIT = Layout("fgvedit", "FGVEdit", _KNOWN, _MARKS, _read, _find_problems, _describe)
