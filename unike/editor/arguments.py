"""The arguments of ``MultimodalEditor.edit`` in both of their orders: this project's and EasyEdit's.

Both call the first three ``prompts, targets, image``. What comes fourth differs: ``rephrase_prompts`` here,
``file_type`` in EasyEdit. The values tell which is meant; where they do not, the call is refused.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from unike.system.text import one_line
from unike.types import ImageLike, UserError

logger = logging.getLogger("unike")

NAMED = (
    *("file_type", "rephrase_prompts", "rephrase_image", "locality_inputs", "keep_original_weight"),
    *("template", "sequential_edit", "verbose", "train_ds"),
)
OURS = ("rephrase_prompts", "rephrase_image", "locality_inputs", "keep_original_weight", "template")
EASYEDITS = (
    *("file_type", "rephrase_prompts", "rephrase_image", "locality_inputs", "keep_original_weight"),
    *("verbose", "sequential_edit"),
)
FILE_TYPES = ("image", "single-image", "text", "video", "multi-image")
# What somebody writes who means one of these.
_LIKE_FILE_TYPES = ("img", "images", "picture", "photo", "jpg", "jpeg", "png", "videos", "audio")
# Arguments of EasyEdit that have no counterpart, with what serves instead.
OTHERS = {
    "eval_metric": "the scores are those of metric_presets in the YAML",
    "loc_prompts": "locality probes go to locality_inputs",
    "edit_fn": "the YAML's method edits",
    "test_generation": "ask and edited_model.generate give answers",
}


@dataclass(frozen=True)
class Arguments:
    """The optional arguments by name; ``easyedit`` says whether some of them are EasyEdit's alone."""

    values: Mapping[str, Any]
    easyedit: bool

    @property
    def accumulate(self) -> bool:
        """Whether each request is edited on top of the former ones.

        UserError where ``sequential_edit`` and ``keep_original_weight`` contradict each other.
        """
        keep = read_switch(self.values["keep_original_weight"], "keep_original_weight")
        sequential = read_switch(self.values["sequential_edit"], "sequential_edit")
        if keep is not None and sequential is not None and keep == sequential:
            raise UserError(
                f"sequential_edit={sequential} and keep_original_weight={keep} contradict each other here; "
                f"expected sequential_edit={sequential} alone"
            )
        if sequential is None and keep is False:
            _report_meaning(self.easyedit)
        return sequential if sequential is not None else keep is False


def _report_meaning(easyedit: bool) -> None:
    if easyedit:
        raise UserError(
            "keep_original_weight=False: EasyEdit edits each request from the original all the same, here "
            "edits add up; expected sequential_edit=False for the former, sequential_edit=True for the latter"
        )
    _say_that_edits_add_up()


@cache
def _say_that_edits_add_up() -> None:
    # Once: whoever knows it need not read it each time.
    logger.warning(
        "keep_original_weight=False: edits add up here, unlike in EasyEdit (sequential_edit=True: the same)"
    )


def read_switch(value: object, name: str) -> bool | None:
    """True, False, or None where it is not given; UserError for everything else."""
    if value is None or isinstance(value, bool):
        return value
    if type(value).__name__ in ("bool_", "bool"):
        return bool(value)
    raise UserError(f"{name}: expected True or False, got {type(value).__name__}")


def read_arguments(
    others: Sequence[Any], named: Mapping[str, Any], unknown: Mapping[str, Any], easyedit: bool = False
) -> Arguments:
    """The arguments after ``image``: by position in either order, by name, and those of other names.

    UserError, in one line each, for an order that is not clear, for what is given twice, and for unknown
    names.
    """
    problems = [_describe_unknown(name) for name in unknown]
    placed = _name_positional(others)
    values = dict(named)
    for name, value in placed.items():
        if values.get(name) is not None:
            problems.append(f"edit: {name} is given twice, by position and by name")
        values[name] = value
    if problems:
        raise UserError(*problems)
    easyedit = (
        easyedit or "file_type" in placed or values["file_type"] is not None or values["verbose"] is not None
    )
    return Arguments(values, easyedit)


def _describe_unknown(name: str, known: Sequence[str] = ("prompts", "targets", "image", *NAMED)) -> str:
    if name in OTHERS:
        return f"{name}: has no counterpart here; {OTHERS[name]}"
    near = difflib.get_close_matches(name, known, 1, 0.0)
    return f"{one_line(name, 60)}: unknown argument; the nearest known one is {near[0]}"


def _name_positional(others: Sequence[Any]) -> dict[str, Any]:
    """What stands by position after ``image``, by name."""
    if not others or all(value is None for value in others):
        return {}
    order = EASYEDITS if _is_easyedits_order(others) else OURS
    if order is OURS and len(others) == len(OURS) and isinstance(others[-1], bool):
        # EasyEdit's order before it had file_type.
        order = (*OURS[:-1], "verbose")
    if len(others) > len(order):
        raise UserError(f"edit: {3 + len(others)} arguments by position; expected at most {3 + len(order)}")
    return dict(zip(order, others, strict=False))


def _is_easyedits_order(others: Sequence[Any]) -> bool:
    fourth = others[0]
    if fourth is None:
        return _is_easyedits_without_type(others)
    listed = list(fourth) if isinstance(fourth, (list, tuple)) else [fourth]
    types = [isinstance(value, str) and value in FILE_TYPES for value in listed]
    if any(types):
        if not all(types):
            raise _refuse_order("mixes types of files with other values")
        return True
    for value in listed:
        if isinstance(value, str) and value.strip().lower() in (*FILE_TYPES, *_LIKE_FILE_TYPES):
            raise _refuse_order(f"is {one_line(value, 20)!r}, near a type of file ({', '.join(FILE_TYPES)})")
    return False


def _is_easyedits_without_type(others: Sequence[Any]) -> bool:
    """Whether ``None, ...`` is EasyEdit's: images or texts that come next show it."""
    fifth = others[1]
    if _are_images(fifth):
        return False
    sixth = others[2] if len(others) > 2 else None
    if fifth is None and isinstance(sixth, Mapping) and set(sixth) <= {"text", "vision"}:
        return False
    raise _refuse_order("is None")


def _are_images(value: ImageLike | Sequence[ImageLike]) -> bool:
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    known = [v for v in listed if v is not None]
    return bool(known) and all(not isinstance(v, str) or os.path.isfile(v) for v in known)


def _refuse_order(what: str) -> UserError:
    return UserError(
        f"edit: the fourth argument {what}: it is rephrase_prompts here and file_type in EasyEdit; "
        "expected the arguments after image by name"
    )


def read_dataset_arguments(named: Mapping[str, Any], unknown: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``edit_dataset``; its second and third may be EasyEdit's ``keep_original_weight`` and
    ``verbose``, which are True or False where ours are a data set and a text.

    UserError, in one line each, for unknown names and for ``keep_original_weight=False``.
    """
    problems = [_describe_unknown(name, ("ds", *named)) for name in unknown]
    values = dict(named)
    for ours, easyedits in (("train_ds", "keep_original_weight"), ("template", "verbose")):
        if isinstance(values[ours], bool):
            if values[easyedits] is not None:
                problems.append(f"edit_dataset: {easyedits} is given twice, by position and by name")
            values[ours], values[easyedits] = None, values[ours]
    if problems:
        raise UserError(*problems)
    for name in ("keep_original_weight", "verbose", "generated"):
        values[name] = read_switch(values[name], name)
    if values["keep_original_weight"] is False:
        raise UserError(
            "keep_original_weight=False: edit_dataset edits each case from the original; "
            "edit(sequential_edit=True) and run_edit.py --protocol sequential measure edits that add up"
        )
    return {**values, "generated": values["generated"] is not False}


def check_file_types(file_type: object, images: Sequence[object]) -> None:
    """UserError, one line each, for types of files that a request here cannot have.

    ``images`` holds each request's image, None where it has none. A request has one image or none.
    """
    if file_type is None:
        return
    given = list(file_type) if isinstance(file_type, (list, tuple)) else [file_type] * len(images)
    if len(given) != len(images):
        raise UserError(f"file_type: expected as many as prompts, {len(images)}, got {len(given)}")
    problems = []
    for i, (kind, image) in enumerate(zip(given, images, strict=True)):
        at = "file_type" if len(given) == 1 else f"file_type[{i}]"
        if kind is None:
            continue
        if not isinstance(kind, str) or kind not in FILE_TYPES:
            problems.append(f"{at}: expected one of {', '.join(FILE_TYPES)}, got {one_line(repr(kind), 40)}")
        elif kind in ("video", "multi-image"):
            problems.append(f"{at}: {kind!r} has no counterpart: a request here has one image or none")
        elif (kind == "text") != (image is None):
            problems.append(f"{at}: {kind!r}, but the request has {'no' if image is None else 'an'} image")
    if problems:
        raise UserError(*problems)
