"""VLKEB by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unike.datasets import vlkeb
from unike.datasets.declarations import HOPS, PORTABILITY_METRICS
from unike.datasets.images import PathLike
from unike.datasets.mmedit import Annotation, VQADataset
from unike.system.text import describe_value
from unike.types import Probe, Query, UserError


class VLKEBDataset(VQADataset):
    """VLKEB (Huang et al., NeurIPS 2024): E-VQA's layout and prompt, with questions about an edit's
    consequences in ``port_new`` (``unike.datasets.vlkeb``), its metrics ``portability_1_hop`` to ``_4_hop``.

    Arguments, attributes and errors are those of ``VQADataset``, which asks these, too. ``hops`` keeps the
    records that have questions of any of these numbers of hops, as VLKEB's evaluation of a hop does, and asks
    no others; None keeps all.
    """

    def __init__(
        self, path: PathLike, *arguments: Any, hops: Sequence[int] | None = None, **more: Any
    ) -> None:
        super().__init__(path, *arguments, **more)
        if hops is None:
            return
        if not hops or not set(hops) <= set(HOPS):
            raise UserError(f"hops: expected some of {', '.join(map(str, HOPS))}, got {describe_value(hops)}")
        self._asked = frozenset(PORTABILITY_METRICS[HOPS.index(n)] for n in hops)
        self._records = [
            (index, record)
            for index, record in self._records
            if self._asked & vlkeb.list_consequences(record).keys()
        ]

    def _make_portability_probes(self, record: Annotation, query: Query) -> list[Probe]:
        found = super()._make_portability_probes(record, query)
        return [probe for probe in found if probe.name in self._asked]

    _asked: frozenset[str] = frozenset(PORTABILITY_METRICS)
