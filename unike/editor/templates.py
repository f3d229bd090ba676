"""A template around prompts: ``Question: {} Short answer:``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from unike.datasets.mmedit import CapVQADataset, wrap_prompt
from unike.types import Case, Query, UserError


def make_wrapper(template: str | None) -> Callable[[str], str]:
    if template is None:
        return lambda text: text
    if not isinstance(template, str):
        raise UserError(f"template: expected a text with {{}} in it, got {type(template).__name__}")
    if template.count("{}") != 1:
        raise UserError(f"template {template!r}: expected exactly one {{}} where the question goes")
    return partial(wrap_prompt, template)


def apply_template(ds: Sequence[Case], template: str) -> Sequence[Case]:
    wrap = make_wrapper(template)
    if isinstance(ds, CapVQADataset):
        raise UserError("template: give it to CapVQADataset itself; expected None here")
    if hasattr(ds, "template"):
        changed = copy.copy(ds)
        changed.template = template  # type: ignore[attr-defined]
        return changed

    def wrap_query(query: Query) -> Query:
        return query if query.image is None else replace(query, prompt=wrap(query.prompt))

    return [
        replace(
            case,
            request=replace(case.request, query=wrap_query(case.request.query)),
            probes=tuple(replace(p, query=wrap_query(p.query)) for p in case.probes),
        )
        for case in ds
    ]
