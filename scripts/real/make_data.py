"""``python -m scripts.real.make_data``: a benchmark of what a backbone gets wrong on labelled photographs.

    python -m scripts.real.make_data --images photos --hparams_dir hparams/smol.yaml

``photos`` has a subfolder for each name, or files named as ImageNet's. Written are MMEdit's fields for both
tasks, in train, validation and test, which share neither names nor photographs:

- edits are questions that the backbone gets wrong: what is shown, which of two names it is, captions;
- rephrased prompts come from fixed lists that nothing is trained on (``scripts/real/wordings.py``), rephrased
  images are other photographs of the same name;
- text locality asks facts that the language model knows, image locality photographs of other names;
- hard probes are comparisons with the name that looks most alike.

The photographs stay where they are: ``images`` in the new folder is a link to them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

from scripts.real.facts import keep_known, list_facts
from scripts.real.packages import require_facts
from scripts.real.photos import Photo, read_photos
from scripts.real.records import collect, make_album, make_record
from unike.backbones import load_backbone
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.datasets.answers import normalise_answer
from unike.own.benchmark import write_records
from unike.system.arguments import ArgumentParser
from unike.system.faults import explain_write_errors
from unike.system.files import replace_atomically
from unike.system.findings import require
from unike.system.launching import run_guarded
from unike.system.progress import show_progress
from unike.system.text import one_line
from unike.types import UserError

ROOT = Path(__file__).resolve().parents[2]
# Shares of the names.
SHARES = {"train": 0.4, "val": 0.15, "eval": 0.45}
IMAGES = "images"


def choose_split(name: str, seed: int) -> str:
    """The split of a name, which decides for all of its photographs."""
    digest = hashlib.sha256(f"{seed}/{normalise_answer(name)}".encode()).hexdigest()
    drawn, total = int(digest[:12], 16) / 16**12, 0.0
    for split, share in SHARES.items():
        total += share
        if drawn < total:
            return split
    return "eval"


def make(
    backbone: VisionLanguageBackbone, photos: Sequence[Photo], root: Path, into: Path, count: int, seed: int
) -> dict[str, Counter[str]]:
    """Writes the benchmark into a new folder; the number of records by file and kind."""
    asked = list_facts(seed)
    with show_progress({"facts": len(asked)}) as tick:
        facts = keep_known(backbone, asked, lambda n: tick("facts", n))
    if len(facts) < len(SHARES):
        raise UserError(f"facts: the language model knows {len(facts)}; expected {len(SHARES)} or more")
    counts: dict[str, Counter[str]] = {}
    with explain_write_errors(into, resumable=False):
        into.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: a part would be in the way of the next run.
        with replace_atomically(into, is_folder=True) as folder:
            os.symlink(os.path.abspath(root), folder / IMAGES, target_is_directory=True)
            for number, split in enumerate(SHARES):
                own = [photo for photo in photos if choose_split(photo.name, seed) == split]
                known = facts[number :: len(SHARES)]
                with show_progress({f"{split}: photographs": len(own)}) as tick:
                    album = make_album(backbone, own, lambda n, s=split: tick(f"{s}: photographs", n))
                    for task in ("vqa", "caption"):
                        found = collect(
                            backbone,
                            album,
                            task,
                            count,
                            split == "train",
                            seed,
                            lambda n, at=f"{split}: {task} questions": tick(at, n),
                        )
                        if not found:
                            raise UserError(
                                f"{split}/{task}: the backbone gets nothing wrong; expected mistakes"
                            )
                        rows = [make_record(q, album, known, root, seed) for q in found]
                        path = folder / f"{task}_{split}.json"
                        train = None if split == "train" else folder / f"{task}_train.json"
                        kind = cast(Literal["vqa", "caption"], task)
                        write_records(rows, path, path.with_suffix(".probes.json"), kind, train, seed)
                        counts[path.name] = Counter(q.kind for q in found)
    return counts


def run(argv: Sequence[str]) -> int:
    parser = ArgumentParser("python -m scripts.real.make_data", description="A benchmark from photographs.")
    add = parser.add_argument
    add("--images", required=True, metavar="DIR", help="labelled photographs")
    add("--hparams_dir", default=str(ROOT / "hparams/smol.yaml"), metavar="FILE", help="default: %(default)s")
    add("--into", default=str(ROOT / "data/smol"), metavar="DIR", help="a new folder: %(default)s")
    add("--records", type=int, default=400, help="most records of a task and split: %(default)s")
    add("--seed", type=int, default=42, help="of what is drawn: %(default)s")
    add("overrides", nargs="*", metavar="key=value", help="options of the YAML")
    args: argparse.Namespace = parser.parse_intermixed_args(argv)
    root, into, photos = Path(args.images), Path(args.into), list[Photo]()
    hparams = HyperParams.from_hparams(args.hparams_dir, args.overrides)
    require(
        lambda: photos.extend(read_photos([root])),
        lambda: _require_new(into),
        lambda: _require_count(args.records),
        require_facts,
    )
    counts = make(load_backbone(hparams), photos, root, into, args.records, args.seed)
    for file, kinds in counts.items():
        shown = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        print(f"{into / file}: {sum(kinds.values())} records ({shown})")
    print(f"to edit and measure: python run_edit.py --hparams_dir {one_line(args.hparams_dir)} --task vqa")
    return 0


def _require_new(into: Path) -> None:
    if os.path.lexists(into):
        raise UserError(f"--into {one_line(into)}: is there already; expected a new folder")


def _require_count(records: int) -> None:
    if records < 1:
        raise UserError(f"--records: {records}; expected 1 or more")


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: run(sys.argv[1:])))
