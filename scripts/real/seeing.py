"""``python -m scripts.real.seeing``: what smol sees, as shares of right answers.

    python -m scripts.real.seeing --images photos --json seen.json

Photographs are split as in the projector's training, by what its ``projector.json`` says. An answer is right
if it is the name, as VQA compares answers; it is among the five if one of the five likeliest answers is (beam
search). Scenes are drawn for this, of common objects; they are asked about in trained and in other wordings.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from scripts.real.folder import read_about, require_smol
from scripts.real.packages import require_scenes
from scripts.real.photos import Photo, read_photos, split_photos
from scripts.real.scenes import draw_scenes, group_facts, word_question
from scripts.real.wordings import FREE, TRAINED
from unike.backbones import load_backbone
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.datasets.answers import normalise_answer
from unike.datasets.mmedit import VQA_TEMPLATE, wrap_prompt
from unike.system.arguments import ArgumentParser
from unike.system.files import write_json
from unike.system.findings import require
from unike.system.launching import run_guarded
from unike.system.places import contains, require_folder, require_own
from unike.system.progress import show_progress
from unike.types import ImageLike, UserError

ROOT = Path(__file__).resolve().parents[2]
BATCH, BEAMS, TOKENS = 16, 5, 10
# Drawn for this alone: training draws with small seeds.
SCENES_SEED = 1_000_003
# Questions for which a scene says where, or what.
OBJECT_KINDS = ("what", "left", "right", "category")


@dataclass(frozen=True)
class Seen:
    """The share of right answers ``exact`` to ``count`` questions, and of those with one among five.
    ``low`` and ``high`` are the 95% interval of ``exact`` (Wilson 1927)."""

    about: str
    count: int
    exact: float
    among_five: float | None
    low: float
    high: float
    examples: tuple[tuple[str, str], ...] = ()


def find_interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z, p = 1.959964, right / count
    middle, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def measure(
    backbone: VisionLanguageBackbone,
    about: str,
    asked: Sequence[tuple[ImageLike, str, str]],
    beams: int,
    tick: Callable[[int], object] = lambda n: None,
) -> Seen:
    """What is answered to each (image, prompt, right answer)."""
    right = five = 0
    examples = []
    for start in range(0, len(asked), BATCH):
        images, prompts, answers = (list(part) for part in zip(*asked[start : start + BATCH], strict=True))
        said = backbone.generate(images, prompts, TOKENS)
        wanted = [normalise_answer(answer) for answer in answers]
        right += sum(normalise_answer(s) == w for s, w in zip(said, wanted, strict=True))
        examples += list(zip(answers, said, strict=True))
        if beams > 1:
            many = backbone.generate(images, prompts, TOKENS, num_beams=beams, num_return_sequences=beams)
            rows = [many[i * beams : (i + 1) * beams] for i in range(len(images))]
            five += sum(w in map(normalise_answer, row) for w, row in zip(wanted, rows, strict=True))
        tick(len(images))
    low, high = find_interval(right, len(asked))
    chosen = random.Random(about).sample(examples, min(10, len(examples)))
    shares = right / len(asked), five / len(asked) if beams > 1 else None
    return Seen(about, len(asked), *shares, low, high, tuple(chosen))


def ask_photos(
    photos: Sequence[Photo], wordings: Sequence[str], size: int
) -> list[tuple[ImageLike, str, str]]:
    """Up to ``size`` photographs, each asked in one of the wordings."""
    chooser = random.Random(size)
    chosen = chooser.sample(list(photos), min(size, len(photos)))
    return [(str(p.path), wrap_prompt(VQA_TEMPLATE, chooser.choice(wordings)), p.name) for p in chosen]


def ask_scenes(size: int, held_out: bool) -> list[tuple[ImageLike, str, str]]:
    """``size`` questions about the objects of as many scenes."""
    scenes, chooser = draw_scenes(size, SCENES_SEED, common=True), random.Random(size)
    by_scene: dict[int, list[tuple[tuple[str, str | None], str]]] = {}
    for key, rows in group_facts(scenes).items():
        for row, answer in rows:
            if key[0] in OBJECT_KINDS:
                by_scene.setdefault(row, []).append((key, answer))
    out: list[tuple[ImageLike, str, str]] = []
    for row, facts in sorted(by_scene.items()):
        key, answer = chooser.choice(facts)
        image: Image.Image = scenes[row].shown.open()
        out.append((image, word_question(key, chooser, held_out), answer))
    return out


def run(argv: Sequence[str]) -> int:
    parser = ArgumentParser("python -m scripts.real.seeing", description="Measure what smol sees.")
    add = parser.add_argument
    add(
        "--images",
        action="append",
        required=True,
        metavar="DIR",
        help="labelled photographs; may be repeated",
    )
    add("--hparams_dir", default=str(ROOT / "hparams/smol.yaml"), metavar="FILE", help="default: %(default)s")
    add("--size", type=int, default=160, help="most questions of a kind: %(default)s")
    add("--beams", type=int, default=BEAMS, help="answers of which one may be right; 1: none: %(default)s")
    add("--new", action="store_true", help="the photographs are others than those of the training")
    add("--json", metavar="FILE", help="also write everything there")
    add("overrides", nargs="*", metavar="key=value", help="options of the YAML")
    args: argparse.Namespace = parser.parse_intermixed_args(argv)
    hparams = HyperParams.from_hparams(args.hparams_dir, args.overrides)
    photos: list[Photo] = []
    require(
        lambda: photos.extend(read_photos([Path(folder) for folder in args.images])),
        lambda: _require_size(args.size),
        lambda: _require_place(args.json),
        lambda: require_smol(hparams),
        require_scenes,
    )
    asked = list_questions(photos, hparams.name, args.size, args.new)
    backbone = load_backbone(hparams)
    found = []
    with show_progress({name: len(rows) for name, rows in asked.items()}) as tick:
        for name, rows in asked.items():
            if rows:
                beams = args.beams if "scene" not in name else 1
                found.append(measure(backbone, name, rows, beams, lambda n, at=name: tick(at, n)))
    for seen in found:
        five = "" if seen.among_five is None else f", among five {seen.among_five:.1%}"
        print(f"{seen.about}: {seen.exact:.1%} [{seen.low:.1%}, {seen.high:.1%}]{five} of {seen.count}")
        for answer, said in seen.examples[:5]:
            print(f"    {answer}: {said!r}")
    if args.json:
        write_json(Path(args.json), {"seen": [asdict(seen) for seen in found]})
    return 0


def list_questions(
    photos: Sequence[Photo], folder: str, size: int, are_new: bool
) -> dict[str, list[tuple[ImageLike, str, str]]]:
    """What is asked, by its title. ``are_new`` photographs are split by whether their names are known."""
    about = read_about(Path(folder))
    if are_new:
        known = {normalise_answer(name) for name in about.names}
        split = {
            "new photographs of known names": [p for p in photos if normalise_answer(p.name) in known],
            "new photographs of other names": [p for p in photos if normalise_answer(p.name) not in known],
        }
    else:
        trained = about.trained or {"seed": 0, "held_names": 0.08}
        split = {
            name.replace("_", " "): group
            for name, group in split_photos(photos, trained["seed"], trained["held_names"]).items()
        }
    out = {name: ask_photos(group, TRAINED["what"], size) for name, group in split.items()}
    first = next(name for name in split if name not in ("train", "validation"))
    out[f"{first}, other wordings"] = ask_photos(split[first], FREE["what"], size)
    out["scenes of common objects"] = ask_scenes(size, held_out=False)
    out["scenes of common objects, other wordings"] = ask_scenes(size, held_out=True)
    return out


def _require_place(file: str | None) -> None:
    if file is not None:
        require_folder(Path(file).absolute().parent, "--json: ")
        require_own(file, contains('"seen"'))


def _require_size(size: int) -> None:
    if size < 1:
        raise UserError(f"--size: {size}; expected 1 or more")


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: run(sys.argv[1:])))
