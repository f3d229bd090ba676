"""Runs: inputs checked, every case edited and recorded, the records summed up."""

from typing import TYPE_CHECKING, Any

from unike.system.lazy import load_attribute

if TYPE_CHECKING:
    from unike.runs.inputs import preflight
    from unike.runs.parts import Parts, assemble, prepare
    from unike.runs.run import checksums, drawn, edit_store, open_run, run_cases, run_directory

__all__ = [
    "Parts", "assemble", "checksums", "drawn", "edit_store", "open_run", "preflight", "prepare", "run_cases",
    "run_directory",
]  # fmt: skip

_HOMES = {
    **dict.fromkeys(("Parts", "assemble", "prepare"), "unike.runs.parts"),
    "preflight": "unike.runs.inputs",
    **dict.fromkeys(
        ("checksums", "drawn", "edit_store", "open_run", "run_cases", "run_directory"), "unike.runs.run"
    ),
}


def __getattr__(name: str) -> Any:
    # On first use: who only reads records should not wait for torch.
    return load_attribute(__name__, name, _HOMES)
