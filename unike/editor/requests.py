"""Requests of an edit, as arguments or rows give them, checked together and made into cases."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from unike.backbones.images import content_key, take_image
from unike.backbones.store import row_key
from unike.editor.templates import make_wrapper
from unike.system.shipped import find_shipped
from unike.system.text import is_unicode, one_line
from unike.types import Case, EditRequest, Expectation, ImageLike, Probe, Query, UserError

Texts = str | Sequence[str]
Images = ImageLike | Sequence[ImageLike | None] | None
# What a locality probe is given by, text and images in the order of ``Request``.
LOCALITY = {"text": ("prompt", "ground_truth"), "vision": ("prompt", "ground_truth", "image")}
PROBES = {"text": "t_locality", "vision": "m_locality"}


@dataclass
class Request:
    """One edit with its probes, checked: texts are texts, and images can be opened later.

    ``locality`` holds ``(metric, image, prompt, answer)`` each, ``hard`` further probes with what is
    expected of them.
    """

    prompt: str
    target: str
    image: ImageLike | None = None
    rephrased: str | None = None
    rephrased_image: ImageLike | None = None
    locality: list[tuple[str, ImageLike | None, str, str]] = field(default_factory=list)
    hard: list[tuple[str, ImageLike | None, str, str, Expectation]] = field(default_factory=list)
    wrong: str | None = None
    id: str | None = None
    task: str = "vqa"

    def make_case(self, name: str, wrap: Callable[[str], str]) -> Case:
        """The case of this id; prompts about an image go through ``wrap``.

        A second locality probe of a kind, and further ones, have a number after the metric's name.
        """

        def ask(image: ImageLike | None, prompt: str, answer: str) -> Query:
            return Query(image, prompt if image is None else wrap(prompt), answer)

        query = ask(self.image, self.prompt, self.target)
        probes: list[tuple[str, Query, Expectation]] = [("reliability", query, "target")]
        if self.rephrased is not None:
            probes.append(("t_generality", ask(self.image, self.rephrased, self.target), "target"))
        if self.rephrased_image is not None:
            probes.append(("m_generality", replace(query, image=self.rephrased_image), "target"))
        numbers = dict.fromkeys(PROBES.values(), 0)
        for metric, image, prompt, answer in sorted(
            self.locality, key=lambda probe: probe[0] != "t_locality"
        ):
            numbers[metric] += 1
            known = metric if numbers[metric] == 1 else f"{metric} {numbers[metric]}"
            probes.append((known, ask(image, prompt, answer), "unchanged"))
        for metric, image, prompt, answer, expect in self.hard:
            probes.append((metric, ask(image, prompt, answer), expect))
        return Case(EditRequest(name, query, self.wrong), tuple(Probe(*p) for p in probes), self.task)


def make_cases(requests: Sequence[Request], template: str | None, taken: Iterable[str] = ()) -> list[Case]:
    """One case per request. Its id, ``edit-`` and a checksum unless the request has one, is the same for the
    same request, and is followed by a number where it is one of ``taken``."""
    wrap, used, cases = make_wrapper(template), set(taken), list[Case]()
    for request in requests:
        stem = request.id
        if stem is None:
            prompt = request.prompt if request.image is None else wrap(request.prompt)
            image = "" if request.image is None else content_key(request.image)
            stem = f"edit-{row_key((image, prompt, request.target))[:8]}"
        name = next(n for i in count(1) if (n := stem if i == 1 else f"{stem}-{i}") not in used)
        used.add(name)
        cases.append(request.make_case(name, wrap))
    return cases


# ---------------------------------------------------------------- values


class Values:
    """Reads single values, and collects what is wrong with them."""

    def __init__(self, image_root: str | None = None, rephrase_root: str | None = None) -> None:
        self.roots = {False: image_root, True: image_root if rephrase_root is None else rephrase_root}
        self.problems: list[str] = []

    def require(self) -> None:
        """UserError with all problems."""
        if self.problems:
            raise UserError(*self.problems)

    def read_text(self, value: object, at: str) -> str:
        """A text without white space around it; empty, and a problem, for everything else."""
        if value is None:
            self.problems.append(f"{at}: is missing; expected a text")
        elif not isinstance(value, str):
            self.problems.append(f"{at}: expected a text, got {type(value).__name__}")
        elif not value.strip():
            self.problems.append(f"{at}: is empty; expected a text")
        elif not is_unicode(value):
            self.problems.append(f"{at}: half of a surrogate pair, which is no text")
        else:
            return str(value).strip()
        return ""

    def read_image(self, value: object, at: str, rephrased: bool = False) -> ImageLike | None:
        """An image as it is kept; None, and a problem, for what is none."""
        try:
            return locate_image(value, self.roots[rephrased])
        except UserError as error:
            self.problems += (f"{at}: {line.removeprefix('image: ')}" for line in error.problems)
            return None


def locate_image(image: ImageLike | None, root: str | None = None) -> ImageLike | None:
    """An image as it is kept until it is encoded. A relative path is that of a file, lies in ``root``, or
    is one of the project's own.

    UserError, in one line, for what is no image, for a path that leads to no file, and for one that leads
    to two.
    """
    taken = take_image(image)
    if not isinstance(taken, (str, os.PathLike)):
        return taken
    name = os.fspath(taken)
    if not name.strip():
        raise UserError("image: is empty; expected an image's file name")
    below = None if root is None or os.path.isabs(name) else os.path.join(root, name)
    here, there = os.path.isfile(name), below is not None and os.path.isfile(below)
    if here and there and below is not None and not os.path.samefile(name, below):
        raise UserError(
            f"image: {one_line(name)}: is a file here, and another one in image_root ({one_line(root)}); "
            "expected an absolute path"
        )
    if not here and not there:
        # The example's images come with an installed package, where the working folder lacks them.
        if os.path.isfile(shipped := find_shipped(name)):
            return shipped
        where = "" if below is None else f", here or in image_root ({one_line(root)})"
        raise UserError(f"image: {one_line(name)}: no such image{where}")
    return taken if here or below is None else below


# ---------------------------------------------------------------- columns


def list_texts(value: object) -> list[Any]:
    """A text as a list of it, or the texts of a list, a generator, an array or a column of a table."""
    return _list_members(value) if isinstance(value, Iterable) and not _is_single(value) else [value]


def list_images(value: object) -> list[Any]:
    """An image as a list of it, or the images of a list, a generator or a batch of arrays."""
    shape = getattr(value, "shape", None)
    if shape is not None and not isinstance(value, (list, tuple)):
        batch = len(shape) == 4 or (
            len(shape) == 1 and getattr(getattr(value, "dtype", None), "kind", "") == "O"
        )
        return _list_members(value) if batch else [value]
    if hasattr(value, "read") or hasattr(value, "tobytes"):
        return [value]
    return list_texts(value)


def _list_members(value: Any) -> list[Any]:
    try:
        return list(value)
    except Exception as error:  # a class of the user's raises anything
        name = type(value).__name__
        raise UserError(f"edit: a value of type {name} cannot be listed: {one_line(error, 80)}") from error


def _is_single(value: object) -> bool:
    # A set has no order by which its members could belong to requests.
    return isinstance(value, (str, bytes, bytearray, memoryview, Mapping, os.PathLike, set, frozenset)) or (
        getattr(value, "shape", None) == ()
    )


def read_columns(values: Values, columns: Mapping[str, object], locality: object) -> list[Request]:
    """The arguments of ``edit``, each a value or a list of them; UserError with all problems at once."""
    prompts = list_texts(columns["prompts"])
    if not prompts:
        values.problems.append("prompts: is empty; expected at least one")
    n = len(prompts)
    made = [Request("", "") for _ in prompts]

    def fill(name: str, attribute: str, given: list[Any], read: Callable[[object, str], Any]) -> None:
        if len(given) != n:
            values.problems.append(f"{name}: expected as many as prompts, {n}, got {len(given)}")
        for i, value in enumerate(given):
            found = read(value, name if len(given) == 1 else f"{name}[{i}]")
            if i < n:
                setattr(made[i], attribute, found)

    def read_probe_text(value: object, at: str) -> str | None:
        return None if value is None else values.read_text(value, at)

    def read_rephrased_image(value: object, at: str) -> ImageLike | None:
        return values.read_image(value, at, rephrased=True)

    fill("prompts", "prompt", prompts, values.read_text)
    fill("targets", "target", list_texts(columns["targets"]), values.read_text)
    if columns["image"] is not None:
        fill("image", "image", list_images(columns["image"]), values.read_image)
    if columns["rephrase_prompts"] is not None:
        fill("rephrase_prompts", "rephrased", list_texts(columns["rephrase_prompts"]), read_probe_text)
    if columns["rephrase_image"] is not None:
        shown = list_images(columns["rephrase_image"])
        fill("rephrase_image", "rephrased_image", shown, read_rephrased_image)
    for i, request in enumerate(made):
        if request.rephrased_image is not None and request.image is None and not values.problems:
            at = "rephrase_image" if n == 1 else f"rephrase_image[{i}]"
            values.problems.append(f"{at}: the request has no image; expected None")
    _add_locality(values, made, locality)
    values.require()
    return made


def _add_locality(values: Values, made: list[Request], locality: object) -> None:
    if locality is None:
        return
    if not isinstance(locality, Mapping):
        values.problems.append(f"locality_inputs: expected text and vision, got {type(locality).__name__}")
        return
    for part, given in locality.items():
        if part not in LOCALITY:
            name = one_line(repr(part), 60)
            values.problems.append(f"locality_inputs: {name} is unknown; expected text or vision")
        elif given is not None:
            _add_part(values, made, part, given)


def _add_part(values: Values, made: list[Request], part: str, given: object) -> None:
    at, names = f"locality_inputs[{part!r}]", LOCALITY[part]
    if not isinstance(given, Mapping) or set(given) != set(names):
        got = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        values.problems.append(f"{at}: expected {', '.join(names)}, got {one_line(got, 80) or 'nothing'}")
        return
    if all(value is None for value in given.values()):
        return
    lists = {name: (list_images if name == "image" else list_texts)(given[name]) for name in names}
    shared = {name: _share_out(column, len(made), name) for name, column in lists.items()}
    for name, parts in shared.items():
        if parts is None:
            values.problems.append(
                f"{at}[{name!r}]: expected as many as prompts, {len(made)}, got {len(lists[name])}; "
                "a list of lists gives several probes to a request"
            )
    columns = [parts for parts in shared.values() if parts is not None]
    if len(columns) < len(names):
        return
    for i, (request, *rows) in enumerate(zip(made, *columns, strict=True)):
        first = len(rows[0])
        for name, row in zip(names, rows, strict=True):
            if len(row) != first:
                where = f"{at}[{name!r}]" + (f"[{i}]" if len(made) > 1 else "")
                values.problems.append(f"{where}: expected as many as probes, {first}, got {len(row)}")
        for k, probe in enumerate(zip(*rows, strict=False)):
            where = "" if len(made) == first == 1 else f"[{i}][{k}]" if first > 1 else f"[{i}]"
            _add_probe(values, request, part, dict(zip(names, probe, strict=True)), at, where)


def _share_out(column: list[Any], n: int, name: str) -> list[list[Any]] | None:
    """The probes of each request: one each, lists of lists, or all of them for the only request."""
    nested = [isinstance(value, (list, tuple)) for value in column]
    if len(column) == n and all(nested):
        return [list(value) for value in column]
    if any(nested):
        return None
    if n == 1:
        return [column]
    return [[value] for value in column] if len(column) == n else None


def _add_probe(
    values: Values, request: Request, part: str, probe: Mapping[str, object], at: str, where: str
) -> None:
    """Adds a locality probe; one that is None altogether is none."""
    if all(value is None for value in probe.values()):
        return
    prompt, answer = (values.read_text(probe[n], f"{at}[{n!r}]{where}") for n in ("prompt", "ground_truth"))
    image = None
    if part == "vision":
        place = f"{at}['image']{where}"
        if probe["image"] is None:
            values.problems.append(f"{place}: is missing; expected an image")
        image = values.read_image(probe["image"], place)
    request.locality.append((PROBES[part], image, prompt, answer))
