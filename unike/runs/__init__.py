"""Runs: inputs checked, every case edited and recorded, the records summed up."""

from typing import TYPE_CHECKING, Any

from unike.system.lazy import load_attribute

if TYPE_CHECKING:
    from unike.runs.checks import read_checked_cases
    from unike.runs.folders import choose_directory, open_edit_store
    from unike.runs.inputs import open_datasets
    from unike.runs.parts import Parts, assemble, prepare
    from unike.runs.request import RunRequest
    from unike.runs.run import compute_checksums, open_run, run_cases

__all__ = [
    "Parts",
    "RunRequest",
    "assemble",
    "choose_directory",
    "compute_checksums",
    "open_datasets",
    "open_edit_store",
    "open_run",
    "prepare",
    "read_checked_cases",
    "run_cases",
]

_HOMES = {
    **dict.fromkeys(("choose_directory", "open_edit_store"), "unike.runs.folders"),
    "RunRequest": "unike.runs.request",
    "open_datasets": "unike.runs.inputs",
    "read_checked_cases": "unike.runs.checks",
    **dict.fromkeys(("Parts", "assemble", "prepare"), "unike.runs.parts"),
    **dict.fromkeys(("compute_checksums", "open_run", "run_cases"), "unike.runs.run"),
}


def __getattr__(name: str) -> Any:
    # On first use: who only reads records should not wait for torch.
    return load_attribute(__name__, name, _HOMES)
