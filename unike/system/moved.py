"""Modules that have moved and still load under their former names, for one release."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Those that README, documentation or notebooks named; CHANGELOG lists them.
MOVED = {
    "unike.asking": "unike.edits.explain",
    "unike.attached": "unike.edits.attached",
    "unike.claims": "unike.report.paper.claims",
    "unike.compare": "unike.report.compare",
    "unike.comparison": "unike.report.paper.tables",
    "unike.figures": "unike.report.paper.figures",
    "unike.hooks": "unike.backbones.hooks",
    "unike.hparams": "unike.config.hparams",
    "unike.launching": "unike.system.launching",
    "unike.metrics": "unike.evaluation.metrics",
    "unike.pairs": "unike.knowledge.disk",
    "unike.processes": "unike.system.processes",
    "unike.protocols": "unike.evaluation.protocols",
    "unike.published": "unike.report.paper.published",
    "unike.reading": "unike.evaluation.reader",
    "unike.retrieval": "unike.knowledge.index",
    "unike.sequences": "unike.runs.sequences",
    "unike.sharing": "unike.runs.sharing",
    "unike.tracking": "unike.runs.tracking",
}


class _Forward(MetaPathFinder, Loader):
    """Gives the module at its new name, with a DeprecationWarning that says it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        # Two frames of importlib lie in between; what they are called differs between versions.
        warnings.warn(f"{module.__name__} has moved to {new}", DeprecationWarning, stacklevel=2)
        # The import statement takes what stands here at the end, so both names are one module.
        sys.modules[module.__name__] = importlib.import_module(new)


def forward_moved_modules() -> None:
    """Lets the former names be imported."""
    if not any(isinstance(finder, _Forward) for finder in sys.meta_path):
        sys.meta_path.append(_Forward())
