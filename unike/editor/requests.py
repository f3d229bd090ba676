"""The arguments of ``MultimodalEditor.edit`` as cases, checked together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from unike.backbones.images import content_key
from unike.backbones.store import row_key
from unike.editor.templates import make_wrapper
from unike.types import Case, EditRequest, Expectation, ImageLike, Probe, Query, UserError

Texts = str | Sequence[str]


class Requests:
    """The arguments of ``edit`` as lists, checked together."""

    def __init__(
        self,
        prompts: Texts,
        targets: Texts,
        image: ImageLike,
        rephrase_prompts: Texts | None,
        rephrase_image: ImageLike,
        locality: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.columns = {"prompts": as_list(prompts), "targets": as_list(targets), "image": as_list(image)}
        optional = {"rephrase_prompts": rephrase_prompts, "rephrase_image": rephrase_image}
        self.columns |= {name: as_list(value) for name, value in optional.items() if value is not None}
        self.problems: list[str] = []
        known = {"text": ("prompt", "ground_truth"), "vision": ("prompt", "ground_truth", "image")}
        for part, values in locality.items():
            if part not in known:
                self.problems.append(f"locality_inputs: {part!r} is unknown; expected text or vision")
                continue
            at = f"locality_inputs[{part!r}]"
            if set(values) != set(known[part]):
                self.problems.append(
                    f"{at}: expected {', '.join(known[part])}, got {', '.join(values) or 'nothing'}"
                )
                continue
            self.columns |= {f"{at}[{name!r}]": as_list(values[name]) for name in known[part]}
        self._check()

    def _check(self) -> None:
        count = len(self.columns["prompts"])
        if count == 0:
            self.problems.append("prompts: is empty; expected at least one")
        for name, values in self.columns.items():
            if len(values) != count:
                self.problems.append(f"{name}: expected as many as prompts, {count}, got {len(values)}")
            check = _find_image_problem if "image" in name.split("[")[-1] else _find_text_problem
            for i, value in enumerate(values):
                at = name if len(values) == 1 else f"{name}[{i}]"
                if problem := check(value):
                    self.problems.append(f"{at}: {problem}")
        if self.problems:
            raise UserError(*self.problems)

    def make_cases(self, template: str | None, taken: set[str]) -> list[Case]:
        """One case per request. Its id, ``edit-`` and a checksum, is the same for the same request, and
        is followed by a number where it is one of ``taken``."""
        wrap, names, taken = make_wrapper(template), list[str](), set(taken)
        requests = zip(*(self.columns[name] for name in ("image", "prompts", "targets")), strict=True)
        for image, prompt, target in requests:
            stem = f"edit-{row_key((content_key(image), wrap(prompt), target.strip()))[:8]}"
            free = (name for n in count(1) if (name := stem if n == 1 else f"{stem}-{n}") not in taken)
            names.append(next(free))
            taken.add(names[-1])
        return [self._make_case(i, name, wrap) for i, name in enumerate(names)]

    def _make_case(self, i: int, name: str, wrap: Callable[[str], str]) -> Case:
        row = {column: values[i] for column, values in self.columns.items()}
        query = Query(row["image"], wrap(row["prompts"]), row["targets"].strip())
        probes: list[tuple[str, Query, Expectation]] = [("reliability", query, "target")]
        if "rephrase_prompts" in row:
            probes.append(("t_generality", replace(query, prompt=wrap(row["rephrase_prompts"])), "target"))
        if "rephrase_image" in row:
            probes.append(("m_generality", replace(query, image=row["rephrase_image"]), "target"))
        for part, metric in (("text", "t_locality"), ("vision", "m_locality")):
            at = f"locality_inputs[{part!r}]"
            if f"{at}['prompt']" not in row:
                continue
            prompt, answer = row[f"{at}['prompt']"], row[f"{at}['ground_truth']"].strip()
            image = row.get(f"{at}['image']")
            probes.append(
                (metric, Query(image, prompt if image is None else wrap(prompt), answer), "unchanged")
            )
        return Case(EditRequest(name, query), tuple(Probe(*probe) for probe in probes))


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _find_text_problem(value: object) -> str | None:
    if not isinstance(value, str):
        return f"expected a text, got {type(value).__name__}"
    return None if value.strip() else "is empty; expected a text"


def _find_image_problem(value: object) -> str | None:
    if value is None:
        return "is missing; expected a path, a PIL image or a tensor"
    if isinstance(value, (str, os.PathLike)) and not os.path.isfile(value):
        return f"{os.fspath(value)}: no such image"
    return None
