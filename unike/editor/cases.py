"""What ``edit_dataset`` is given, as cases."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from unike.config.sections import DataOptions
from unike.datasets.images import lies_outside
from unike.datasets.mmedit import VQA_TEMPLATE
from unike.datasets.rows import name_fields, read_rows, report_unknown_fields
from unike.editor.arguments import check_file_types
from unike.editor.requests import Request, Values, make_cases, read_columns
from unike.editor.templates import apply_template
from unike.system.text import one_line
from unike.types import Case, UserError

logger = logging.getLogger("unike")

_PROBES = {
    "text": {"prompt": "text_prompt", "ground_truth": "text_answer"},
    "vision": {"prompt": "vision_prompt", "ground_truth": "vision_answer", "image": "vision_image"},
}


def read_cases(ds: object, hparams: DataOptions, template: str | None, name: str = "ds") -> Sequence[Case]:
    """The cases of a data set of ours, of a list of cases, of rows, or of a file of rows.

    Relative paths of images lie in ``image_root`` where there is no such file here. UserError with the
    problems of all rows.
    """
    if isinstance(ds, Sequence) and hasattr(ds, "list_missing_images"):
        return ds if template is None else apply_template(ds, template)
    rows = read_rows(ds, name)
    if not rows:
        raise UserError(f"{name}: holds no case; expected one or more")
    if any(isinstance(row, Case) for row in rows):
        others = [type(row).__name__ for row in rows if not isinstance(row, Case)]
        if others:
            raise UserError(
                f"{name}: holds cases and others ({one_line(others[0], 40)}); expected cases alone"
            )
        bare = [case.request.id for case in rows if not case.probes]
        if bare:
            raise UserError(f"{name}: case {one_line(bare[0], 60)} has no probe; expected one or more")
        return rows if template is None else apply_template(rows, template)
    return _read_requests(rows, hparams, template, isinstance(ds, (str, os.PathLike)))


def _read_requests(
    rows: Sequence[Any], hparams: DataOptions, template: str | None, from_file: bool
) -> list[Case]:
    report_unknown_fields(rows)
    values, made = Values(hparams.image_root, hparams.rephrase_root), list[Request]()
    for i, row in enumerate(rows):
        at = f"record {i}"
        fields, problems = name_fields(row, at)
        if from_file and not hparams.allow_outside:
            problems += _list_outside(fields, hparams, at)
        if not problems:
            made += _collect(values, fields, at, problems)
        values.problems += problems
    values.require()
    if template is None and any(isinstance(row, Mapping) and "src" in row for row in rows):
        logger.warning("ds: prompts are used without a template; VQADataset uses template=%r", VQA_TEMPLATE)
    return make_cases(made, template)


def _collect(values: Values, fields: Mapping[str, Any], at: str, problems: list[str]) -> list[Request]:
    """The request of a row, read as ``edit`` reads its arguments; none where something is wrong."""
    own = Values(values.roots[False], values.roots[True])
    try:
        columns = {
            "prompts": [fields["prompt"]],
            "targets": [fields["target"]],
            "image": [_unwrap(fields["image"])] if "image" in fields else None,
            "rephrase_prompts": [fields["rephrase_prompts"]] if "rephrase_prompts" in fields else None,
            "rephrase_image": [fields["rephrase_image"]] if "rephrase_image" in fields else None,
        }
        (request,) = read_columns(own, columns, _collect_locality(fields))
        check_file_types(fields.get("file_type"), [request.image])
        _add_hard_probes(own, request, fields)
        own.require()
        for name in ("id", "wrong", "task"):
            if name in fields:
                setattr(request, name, _read_label(fields[name], name))
    except UserError as error:
        problems += (f"{at}: {line}" for line in error.problems)
        return []
    return [request]


def _unwrap(image: object) -> object:
    """The only image of a list, as some data sets have them."""
    if isinstance(image, (list, tuple)):
        if len(image) != 1:
            raise UserError(f"image: {len(image)} images; expected one")
        return image[0]
    return image


def _add_hard_probes(values: Values, request: Request, fields: Mapping[str, Any]) -> None:
    """The probes of MMEdit's records that ask one question of two images, or two of one image."""
    image, answer = fields.get("same_question_image"), fields.get("same_question_a")
    if image is not None or answer is not None:
        shown = values.read_image(image, "same_question_image")
        right = values.read_text(answer, "same_question_a")
        request.hard.append(("same_question", shown, request.prompt, right, "unchanged"))
    asked, answer = fields.get("same_image_q"), fields.get("same_image_a")
    if asked is not None or answer is not None:
        prompt, right = values.read_text(asked, "same_image_q"), values.read_text(answer, "same_image_a")
        request.hard.append(("same_image", request.image, prompt, right, "unchanged"))
    joint = fields.get("joint")
    if joint is not None and not isinstance(joint, bool):
        values.problems.append(f"joint: expected true or false, got {type(joint).__name__}")
    elif joint:
        if request.rephrased is None or request.rephrased_image is None:
            values.problems.append("joint: needs a rephrased prompt and a rephrased image")
        else:
            both = (request.rephrased_image, request.rephrased, request.target)
            request.hard.append(("joint", *both, "target"))


def _read_label(value: object, name: str) -> str:
    """A text, or a whole number as its digits."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise UserError(f"{name}: expected a text, got {type(value).__name__}")
    return str(value).strip()


def _collect_locality(fields: Mapping[str, Any]) -> object:
    """A row's locality probes as ``edit`` takes them: as they are, or from fields of MMEdit's names."""
    flat = {
        part: {name: fields.get(field) for name, field in names.items()}
        for part, names in _PROBES.items()
        if any(field in fields for field in names.values())
    }
    if "locality_inputs" in fields:
        if flat:
            raise UserError(
                "locality_inputs and fields of locality probes are both given; expected one of them"
            )
        return fields["locality_inputs"]
    return flat or None


def _list_outside(fields: Mapping[str, Any], hparams: DataOptions, at: str) -> list[str]:
    """Images that a file names outside of the folder of images."""
    roots = {"image": hparams.image_root, "rephrase_image": hparams.rephrase_root or hparams.image_root}
    roots["vision_image"] = hparams.image_root
    return [
        f"{at}: {field}: {one_line(fields[field], 80)} lies outside of {one_line(root)}; expected an "
        "image in that folder (allow_outside: true takes others)"
        for field, root in roots.items()
        if isinstance(fields.get(field), str) and lies_outside(root, fields[field])
    ]
