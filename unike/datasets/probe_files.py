"""Further probes of annotations in MMEdit's layout, which lie in a file of their own.

``unike.datasets.derive`` makes such a file from any annotations, and the bundled benchmark's version 2 has
some; the datasets of ``unike.datasets.mmedit`` ask them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, cast

from unike.datasets.declarations import declare_metrics, find_metric, list_metrics
from unike.datasets.images import PathLike
from unike.system.text import one_line
from unike.types import FIVE_METRICS, UserError

# What such a file says of itself; another layout gets another number.
LAYOUT = "unike probes 1"
FILE_BYTES = 1 << 30
GROUP_LENGTH = 60
# How a text becomes a prompt: as the prompt of an edit, or as a question about an image.
Form = Literal["edit", "question"]


@dataclass(frozen=True)
class FurtherProbe:
    """A question to ask after an edit. ``image`` is a name under the images' folder, or None: asked without
    an image. ``answer`` is what is forced under teacher forcing."""

    text: str
    form: Form
    image: str | None
    answer: str


@dataclass(frozen=True)
class RecordProbes:
    """One record's probes by name, and its ``groups``. ``joint`` is None: it needs nothing but to be
    asked."""

    probes: Mapping[str, FurtherProbe | None]
    groups: Mapping[str, str] = field(default_factory=dict)


NO_PROBES = RecordProbes({})


def sign_file(path: PathLike) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def describe_probes(sha256: str, records: Sequence[RecordProbes], **facts: object) -> str:
    """The text of a file with the probes of each record of the annotations with this checksum, in order;
    ``facts`` say how they were made."""
    rows = [
        {
            "probes": {name: None if p is None else asdict(p) for name, p in record.probes.items()},
            "groups": dict(record.groups),
        }
        for record in records
    ]
    whole = {"layout": LAYOUT, "sha256": sha256, **facts, "records": rows}
    return json.dumps(whole, ensure_ascii=False, indent=0) + "\n"


def read_probes(path: PathLike, annotations: PathLike) -> list[RecordProbes]:
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
            f"{name}: its probes are of other annotations than {one_line(annotations)}; make them anew"
        )
    declare_metrics(whole.get("metrics", []), name)
    rows = whole.get("records")
    if not isinstance(rows, list):
        raise UserError(f"{name}: records: expected a list; {expected}")
    return [_read_row(row, f"{name}: record {index}") for index, row in enumerate(rows)]


def _read_row(row: object, at: str) -> RecordProbes:
    if not isinstance(row, dict) or set(row) != {"probes", "groups"}:
        raise UserError(f"{at}: expected probes and groups")
    probes, groups = row["probes"], row["groups"]
    if not isinstance(probes, dict) or not isinstance(groups, dict):
        raise UserError(f"{at}: expected probes and groups by name")
    if not all(isinstance(value, str) and len(value) <= GROUP_LENGTH for value in groups.values()):
        raise UserError(f"{at}: groups: expected texts of at most {GROUP_LENGTH} characters")
    out: dict[str, FurtherProbe | None] = {}
    for name, values in probes.items():
        if name in FIVE_METRICS or find_metric(name) is None:
            known = [metric.name for metric in list_metrics() if metric.name not in FIVE_METRICS]
            raise UserError(
                f"{at}: {one_line(repr(name), 80)} is unknown; expected {', '.join(known)}, or one that the "
                f"file declares under metrics"
            )
        out[name] = None if values is None and name == "joint" else _read_probe(values, f"{at}: {name}")
    return RecordProbes(out, groups)


def _read_probe(values: object, at: str) -> FurtherProbe:
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
    return FurtherProbe(values["text"], cast(Form, values["form"]), image, values["answer"])
