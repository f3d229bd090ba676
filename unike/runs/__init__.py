"""Runs: inputs checked, every case edited and recorded, the records summed up."""

from typing import TYPE_CHECKING, Any

from unike.system.lazy import load_attribute

if TYPE_CHECKING:
    from unike.runs.inputs import open_datasets, preflight
    from unike.runs.parts import Parts, assemble, prepare
    from unike.runs.run import (
        choose_directory,
        compute_checksums,
        draw_data,
        open_edit_store,
        open_run,
        run_cases,
    )

__all__ = [
    "Parts",
    "assemble",
    "choose_directory",
    "compute_checksums",
    "draw_data",
    "open_datasets",
    "open_edit_store",
    "open_run",
    "preflight",
    "prepare",
    "run_cases",
]

_HOMES = {
    **dict.fromkeys(("Parts", "assemble", "prepare"), "unike.runs.parts"),
    **dict.fromkeys(("open_datasets", "preflight"), "unike.runs.inputs"),
    **dict.fromkeys(
        ("choose_directory", "compute_checksums", "draw_data", "open_edit_store", "open_run", "run_cases"),
        "unike.runs.run",
    ),
}


def __getattr__(name: str) -> Any:
    # On first use: who only reads records should not wait for torch.
    return load_attribute(__name__, name, _HOMES)
