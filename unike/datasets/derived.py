"""Probes derived from annotations, as they lie in a file of their own beside them.

``unike.datasets.derive`` makes such a file from any annotations in MMEdit's layout; the datasets of
``unike.datasets.mmedit`` ask its probes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from unike.datasets.images import PathLike
from unike.system.text import one_line
from unike.types import DERIVED_METRICS, HARD_METRICS, UserError

# What a file of derived probes says of itself; another layout gets another number.
LAYOUT = "unike derived probes 1"
FILE_BYTES = 1 << 30
CELLS = (*HARD_METRICS, *DERIVED_METRICS)
# How a text becomes a prompt: as the prompt of an edit, or as a question about an image.
Form = Literal["edit", "question"]


@dataclass(frozen=True)
class DerivedProbe:
    """A question to ask after an edit. ``image`` is a name under the images' folder, or None: asked without
    an image. ``answer`` is what is forced under teacher forcing."""

    text: str
    form: Form
    image: str | None
    answer: str


# By cell; ``joint`` needs nothing but to be asked.
RecordProbes = Mapping[str, DerivedProbe | None]


def sign_file(path: PathLike) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def describe_probes(probes: Sequence[RecordProbes]) -> list[dict[str, object]]:
    """As JSON values, one object a record."""
    return [
        {
            cell: probe
            if probe is None
            else {"text": probe.text, "form": probe.form, "image": probe.image, "answer": probe.answer}
            for cell, probe in by_cell.items()
        }
        for by_cell in probes
    ]


def read_derived(path: PathLike, annotations: PathLike) -> list[RecordProbes]:
    """The probes of each record of ``annotations``, in order.

    Raises:
        UserError: one line naming the file, if it cannot be read, is no such file, or was made from
            other annotations.
    """
    name = one_line(path)
    expected = "expected a file that python -m unike.datasets.derive made"
    try:
        if Path(path).stat().st_size > FILE_BYTES:
            raise UserError(f"{name}: more than {FILE_BYTES} bytes; {expected}")
        whole = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {one_line(error.strerror or error)}; {expected}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: broken JSON: {one_line(error)}; {expected}") from error
    if not isinstance(whole, dict) or whole.get("layout") != LAYOUT:
        raise UserError(f"{name}: {expected}")
    if whole.get("sha256") != sign_file(annotations):
        raise UserError(
            f"{name}: its probes were derived from other annotations than {one_line(annotations)}; derive "
            "them anew"
        )
    rows = whole.get("probes")
    if not isinstance(rows, list):
        raise UserError(f"{name}: probes: expected a list; {expected}")
    return [_read_row(row, f"{name}: record {index}") for index, row in enumerate(rows)]


def _read_row(row: object, at: str) -> RecordProbes:
    if not isinstance(row, dict):
        raise UserError(f"{at}: expected an object with a probe for each cell")
    out: dict[str, DerivedProbe | None] = {}
    for cell, values in row.items():
        if cell not in CELLS:
            raise UserError(f"{at}: {one_line(repr(cell), 80)} is unknown; expected {', '.join(CELLS)}")
        out[cell] = None if values is None and cell == "joint" else _read_probe(values, f"{at}: {cell}")
    return out


def _read_probe(values: object, at: str) -> DerivedProbe:
    if not isinstance(values, dict) or set(values) != {"text", "form", "image", "answer"}:
        raise UserError(f"{at}: expected text, form, image and answer")
    texts = (values["text"], values["answer"])
    image = values["image"]
    if not all(isinstance(t, str) and t.strip() for t in texts) or not (
        image is None or isinstance(image, str)
    ):
        raise UserError(f"{at}: expected texts, and an image's name or null")
    if values["form"] not in ("edit", "question"):
        raise UserError(f"{at}: form: expected edit or question")
    return DerivedProbe(values["text"], cast(Form, values["form"]), image, values["answer"])
