"""Coverage-guided fuzzing of the parsers of a user's files: ``pip install atheris`` (Linux), then

    python -m benchmarks.fuzz_coverage yaml -max_total_time=60
    python -m benchmarks.fuzz_coverage annotations -max_total_time=60 CORPUS

The arguments after the target are libFuzzer's. Bytes must load correctly or be refused by a UserError, one
printable line per problem. Anything else ends the run with the input that caused it. ``benchmarks.fuzz`` has
more targets, without guidance.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["unike"]):
    from unike.config.hparams import HyperParams
    from unike.datasets.mmedit import VQADataset
    from unike.types import UserError

SEED = b"model_name: blip2\nname: x\nmethod: ft\nlayers: [1, 2]\nlr: 1e-3\ndata: {vqa: {eval: a.json}}\n"


def read_yaml(path: Path) -> None:
    """A YAML that loads must give the same hyper-parameters when it is written out and read again."""
    hparams = HyperParams.from_hparams(path)
    again = HyperParams.from_dict(hparams.to_dict())
    assert again == hparams, "written out and read again it differs"


def read_annotations(path: Path) -> None:
    """Every record must become a case, or one line about why it is left out."""
    data = VQADataset(path, skip_broken=True)
    assert len(list(data)) == len(data)


TARGETS: dict[str, Callable[[Path], None]] = {"yaml": read_yaml, "annotations": read_annotations}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        print(f"error: target {name!r}: expected {' or '.join(TARGETS)}", file=sys.stderr)
        sys.exit(2)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / f"input.{name}"

    def try_input(data: bytes) -> None:
        path.write_bytes(data)
        try:
            TARGETS[name](path)
        except UserError as error:
            if not error.problems or not all(line.isprintable() for line in error.problems):
                raise ValueError(f"refused with {error.problems!r}") from error

    try_input(SEED if name == "yaml" else b"[]")
    atheris.Setup([sys.argv[0], *sys.argv[2:]], try_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
