"""A page's images: small copies, each once, as data URIs, and which image each probe of a run has."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence

from PIL import Image

from unike.config.hparams import OPTIONS, HyperParams
from unike.datasets.consistency import ConsistencyCases
from unike.datasets.images import open_image
from unike.runs.inputs import find_annotations, list_parts, open_eval_split
from unike.system.files import compute_sha256
from unike.types import Case, UserError

# The longer side of an image, where a page has at most so many of them.
SIDES = ((150, 320), (600, 224), (2000, 160))
SMALLEST, QUALITY = 112, 78
# Of all images together, as text: what a browser opens in a moment and mail takes.
MOST_BYTES = 16 << 20

# Files by case and probe.
ProbeImages = Mapping[str, Mapping[str, str]]


class Album:
    """Small copies of at most ``count`` image files, in the order in which they are first shown."""

    def __init__(self, count: int) -> None:
        self.side = next((side for most, side in SIDES if count <= most), SMALLEST)
        self.uris: list[str] = []
        self.missing = self.left_out = self._bytes = 0
        self._places: dict[str, int | None] = {}

    def place(self, path: str) -> int | None:
        """Where the image is in ``uris``; None where it can't be read or the page is full."""
        if path not in self._places:
            self._places[path] = self._add(path)
        return self._places[path]

    def list_notes(self) -> list[str]:
        """What the page lacks, a sentence each."""
        found = []
        if self.missing:
            found.append(
                f"{self.missing} images could not be read. Make the report in the folder that the run was "
                "started in."
            )
        if self.left_out:
            found.append(
                f"{self.left_out} images are left out: those before take {MOST_BYTES >> 20} MB already."
            )
        return found

    def _add(self, path: str) -> int | None:
        try:
            image = open_image(path)
        except UserError:
            self.missing += 1
            return None
        image.thumbnail((self.side, self.side), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "WEBP", quality=QUALITY)
        uri = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
        if self._bytes + len(uri) > MOST_BYTES:
            self.left_out += 1
            return None
        self._bytes += len(uri)
        self.uris.append(uri)
        return len(self.uris) - 1


def find_images(manifest: Mapping[str, object]) -> tuple[ProbeImages, str]:
    """The image file of each probe, read from the annotations that the run names, or why there are none, in
    a sentence."""
    try:
        values, checksums = manifest.get("hparams"), manifest.get("data")
        if not isinstance(values, dict) or not isinstance(checksums, dict):
            raise UserError("the manifest holds no hyper-parameters or checksums")
        hparams = HyperParams.from_dict({key: v for key, v in values.items() if key in OPTIONS})
        task = str(values.get("task"))
        for name in list_parts(task):
            path = find_annotations(hparams, name, "eval")
            if compute_sha256(path) != checksums.get(f"data.{name}.eval"):
                raise UserError(f"{path} has changed since the run")
        cases: Sequence[Case] = open_eval_split(hparams, task, skip_broken=True)
        if hparams.consistency_probes:
            cases = ConsistencyCases(cases)
    except UserError as error:
        return {}, f"No images: {error.problems[0]}."
    return {
        case.request.id: {
            # Of several probes of a name, records keep the first one's answers.
            probe.name: os.fspath(probe.query.image)
            for probe in reversed(case.probes)
            if probe.query.image is not None
        }
        for case in cases
    }, ""
