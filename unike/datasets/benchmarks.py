"""Benchmarks of other layouts than MMEdit's, by name: as data sets, and as the option ``layout``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from unike.datasets.comprehend_edit import COMPREHEND_EDIT
from unike.datasets.declarations import get_expectation
from unike.datasets.fgvedit import FGVEDIT
from unike.datasets.images import PathLike, image_path, lies_outside
from unike.datasets.layout import Asked, Described, Joined, Layout
from unike.datasets.mc_mke import MC_MKE
from unike.datasets.mmedit import Annotation, VQADataset, has_nothing_to_edit, wrap_prompt
from unike.datasets.mmke_bench import MMKE_BENCH
from unike.system.text import one_line
from unike.types import Case, EditRequest, Probe, Query

# Bytes of a file that are read to recognise its layout: many records.
_BEGINNING = 1 << 20


class _LayoutDataset(VQADataset):
    layout: ClassVar[Layout]

    def __init__(
        self,
        path: PathLike,
        image_root: PathLike | None = None,
        rephrase_root: PathLike | None = None,
        size: int | None = None,
        clean: bool = False,
        skip_broken: bool = False,
        template: str | None = None,
        allow_outside: bool = False,
        probes: PathLike | None = None,
        second_edit: bool = False,
    ) -> None:
        self._own_template = template
        used = self.layout.template if template is None else template
        super().__init__(
            path,
            image_root,
            rephrase_root,
            size,
            clean,
            skip_broken,
            used,
            allow_outside,
            probes,
            second_edit,
        )

    def _read(self, path: PathLike) -> Sequence[object]:
        return self.layout.read(path)

    def _list_problems(self, record: object, index: int) -> list[str]:
        return self.layout.list_problems(cast(Joined, record), index)

    def _has_nothing_to_edit(self, record: Any) -> bool:
        return has_nothing_to_edit(view_as_annotation(self.layout.describe(record)))

    def _list_outside_images(self, record: Any, index: int) -> list[str]:
        named = [(asked.metric, asked) for asked in list_asked(self.layout.describe(record))]
        return [
            f"record {index}: probe {name!r}: {one_line(asked.image, 80)} lies outside of {one_line(root)}; "
            "expected an image in that folder (allow_outside: true takes others)"
            for name, asked in named
            if asked.image is not None and lies_outside(root := self._choose_root(asked), asked.image)
        ]

    def _choose_root(self, asked: Asked) -> PathLike | None:
        return self.rephrase_root if asked.is_rephrased else self.image_root

    def _make_query(self, asked: Asked) -> Query:
        image = None if asked.image is None else str(image_path(self._choose_root(asked), asked.image))
        template = self.template
        if asked.template is not None and self._own_template is None:
            template = asked.template
        prompt = asked.text if asked.is_plain else wrap_prompt(template, asked.text)
        return Query(image, prompt, asked.answer)

    def _make_case(self, position: int) -> Case:
        index, record = self._records[position]
        found = self.layout.describe(cast(Any, record))
        request = EditRequest(f"{self.layout.name}-{index}", self._make_query(found.edit), found.wrong)
        further = self._get_further(index)
        probes = [
            Probe(
                asked.metric,
                self._make_query(asked),
                get_expectation(asked.metric),
                asked.aliases,
                asked.match,
            )
            for asked in found.probes
        ]
        probes += [self._make_further_probe(cell, p) for cell, p in further.probes.items() if p is not None]
        return Case(request, tuple(probes), self.task, {**found.groups, **further.groups})


class MMKEBenchDataset(_LayoutDataset):
    """MMKE-Bench (``unike.datasets.mmke_bench``): targets of a paragraph, of one of its files
    (``data_json/entity/eval.json``). Its metrics are the five, ``text_reliability``, ``image_reliability``,
    ``image_generality`` and ``portability_1_hop``.

    Arguments, attributes and errors are those of ``VQADataset``; ``template`` is ``{}`` if it is not given:
    questions are asked as they are, as in the release.
    """

    layout: ClassVar[Layout] = MMKE_BENCH


class MCMKEDataset(_LayoutDataset):
    """MC-MKE (``unike.datasets.mc_mke``): one of its three files of edits, with its tests beside it. Its
    metrics are reliability, T-Generality, M-Generality, one locality (M-Locality, or T-Locality of edits
    without an image) and ``consistency``. Where a target is expected, a generated answer passes that
    contains it or an alias.

    Arguments, attributes and errors are those of ``VQADataset``. Of absolute image names the last part
    counts.
    """

    layout: ClassVar[Layout] = MC_MKE


class ComprehendEditDataset(_LayoutDataset):
    """ComprehendEdit (``unike.datasets.comprehend_edit``). Its metrics are reliability, T-Generality, both
    localities, and in the test file ``kgi`` and ``kpi``, of up to 20 questions each.

    Arguments, attributes and errors are those of ``VQADataset``; ``template`` is that of each record's source
    if it is not given. There are no rephrased images: methods that are trained on these refuse its train
    file.
    """

    layout: ClassVar[Layout] = COMPREHEND_EDIT


class FGVEditDataset(_LayoutDataset):
    """FGVEdit (``unike.datasets.fgvedit``). Its metrics are reliability, T-Generality, T-Locality,
    ``fine_generality`` and ``fine_locality``, and ``specificity``, the mean of the last two.

    Arguments, attributes and errors are those of ``VQADataset``. There are no rephrased and no unrelated
    images: methods that are trained on these refuse its train file.
    """

    layout: ClassVar[Layout] = FGVEDIT


DATASETS: dict[str, type[_LayoutDataset]] = {
    kind.layout.name: kind for kind in (MMKEBenchDataset, MCMKEDataset, ComprehendEditDataset, FGVEditDataset)
}
LAYOUTS: dict[str, Layout] = {name: kind.layout for name, kind in DATASETS.items()}


def recognise_layout(path: PathLike) -> Layout | None:
    """The benchmark that a file's field names are of; None where it is of none, MMEdit's among them."""
    try:
        with Path(path).open("rb") as file:
            beginning = file.read(_BEGINNING).decode("utf-8-sig", errors="replace")
    except (OSError, ValueError):
        # What is wrong with the file, its reader says.
        return None
    for layout in LAYOUTS.values():
        if any(
            f"{json.dumps(mark)}:" in beginning or f"{json.dumps(mark)} :" in beginning
            for mark in layout.marks
        ):
            return layout
    return None


def list_asked(found: Described) -> list[Asked]:
    """The edit's own question and all others."""
    return [found.edit, *found.probes]


def view_as_annotation(found: Described) -> Annotation:
    """What a description has of MMEdit's texts. Without a rephrased question ``rephrase`` is empty."""
    rephrased = [asked.text for asked in found.probes if asked.metric == "t_generality"]
    view: Annotation = {
        "src": found.edit.text,
        "rephrase": rephrased[0] if rephrased else "",
        "alt": found.edit.answer,
        "pred": found.wrong,
    }
    if found.edit.image is not None:
        view["image"] = found.edit.image
    for asked in found.probes:
        if asked.metric == "m_locality" and asked.image is not None and "m_loc" not in view:
            view |= {"m_loc": asked.image, "m_loc_q": asked.text, "m_loc_a": asked.answer}
    return view
