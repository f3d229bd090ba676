"""Draws the bundled benchmark in MMEdit's JSON layout: E-VQA and E-IC, train, val and eval.

    python scripts/tiny/make_data.py --seed 42 --records 200 --out data/tiny/blip2

Edits are questions that the backbone gets wrong. In addition to MMEdit's fields a record has three hard
probes: ``same_question_image``, ``same_question_a`` (the same question on another image),
``same_image_q``, ``same_image_a`` (another question on the edited image) and ``joint`` (rephrased prompt
and rephrased image together). In train, if the backbone's answer is right, ``pred`` is a plausible wrong
answer instead, so that every record is a knowledge triplet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.tiny.facts import list_text_facts
from scripts.tiny.questions import HELD_OUT, TRAINED, SceneFact, draw_counterfactual, list_facts
from scripts.tiny.scenes import (
    CATEGORY,
    FREQUENCY,
    INDEX,
    OBJECTS,
    RARE,
    Painter,
    Scene,
    disturb,
    redraw,
    sample_scene,
)
from unike.config.hparams import HyperParams
from unike.datasets.answers import normalise_answer
from unike.runs.drawing import (
    PICTURES,
    TASKS,
    check_target,
    check_version,
    choose_splits,
    get_about_file,
    get_drawing_folder,
    get_drawing_lock,
    get_drawn_file,
    get_probe_file,
    get_size,
    list_missing_splits,
)
from unike.system.arguments import ArgumentParser
from unike.system.files import write_text
from unike.system.findings import require
from unike.system.launching import run_guarded
from unike.system.paths import check_path
from unike.system.places import lock
from unike.system.shipped import choose_writable
from unike.types import UserError

if TYPE_CHECKING:
    from unike.backbones import Backbone

VERSION = 1
Style = Callable[[Image.Image], Image.Image]
# In the project, or an installed package's cache folder: in the working folder it would lie among files of
# the user's.
TEXTURES = choose_writable(Path(__file__).resolve().parents[2] / "data/cache/openmoji.safetensors")
SPLITS = ("train", "val", "eval")
# What the backbone gets wrong by itself: rare objects, disturbed images.
RARE_SHARE, DISTURBED_SHARE = 0.5, 0.35
KIND_WEIGHT = {
    "what": 1.6,
    "left": 1.2,
    "right": 1.2,
    "category": 1.0,
    "color": 0.5,
    "count": 0.5,
    "yesno": 0.6,
}
# A small third object would change the answer to the other kinds.
DISTRACTOR_SAFE = {"what", "left", "right", "color", "caption"}
CANDIDATES = 128
MOST_ROUNDS = 60
MOST_RECORDS = 100_000
MOST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Candidate:
    """A question about a scene, in one of its trained wordings, and the backbone's answer."""

    scene: Scene
    fact: SceneFact
    prompt: str
    answer: str

    @property
    def is_wrong(self) -> bool:
        return normalise_answer(self.answer) != normalise_answer(self.fact.answer)


class Artist:
    """Draws candidates and records for one split, deterministic by seed."""

    version = VERSION

    def __init__(self, backbone: Backbone, painter: Painter, seed: int, split: str) -> None:
        self.backbone, self.painter, self.split = backbone, painter, split
        self.rng = np.random.default_rng([seed, self.version, zlib.crc32(split.encode())])
        self.images: dict[str, tuple[Scene, Style | None]] = {}

    def _draw_scene(self) -> Scene:
        rng = self.rng
        objects: tuple[int, ...] | None = None
        if rng.random() < RARE_SHARE:
            objects = (int(rng.choice(RARE)),)
            if rng.random() < 0.5:
                other = int(rng.choice(len(OBJECTS), p=FREQUENCY))
                pair = (objects[0], other) if rng.random() < 0.5 else (other, objects[0])
                objects = pair if pair[0] != pair[1] else objects
        scene = self._sample_scene(objects)
        return disturb(scene, rng) if rng.random() < DISTURBED_SHARE else scene

    def _sample_scene(self, objects: tuple[int, ...] | None = None) -> Scene:
        """A random scene that this split may show, or one with the given objects."""
        return sample_scene(self.rng, objects)

    def _draw_wording(self, kind: str) -> str:
        """A wording for the rephrased prompt."""
        return str(self.rng.choice(HELD_OUT[kind]))

    def draw_candidates(self, task: str, count: int) -> list[Candidate]:
        chosen: list[tuple[Scene, SceneFact, str]] = []
        while len(chosen) < count:
            scene = self._draw_scene()
            facts = [f for f in list_facts(scene, self.rng) if (f.kind == "caption") == (task == "caption")]
            if scene.disturbance is not None and scene.disturbance.kind == "distractor":
                facts = [f for f in facts if f.kind in DISTRACTOR_SAFE]
            weight = np.array([KIND_WEIGHT.get(f.kind, 1.0) for f in facts])
            fact = facts[int(self.rng.choice(len(facts), p=weight / weight.sum()))]
            chosen.append((scene, fact, fact.ask(self.rng)))
        images = self.painter.draw_images([s for s, _, _ in chosen])
        answers = self.backbone.generate(list(images), [p for _, _, p in chosen])
        return [Candidate(s, f, p, a) for (s, f, p), a in zip(chosen, answers, strict=True)]

    def collect(self, task: str, count: int) -> list[Candidate]:
        """``count`` candidates that the backbone gets wrong; in train, all drawn candidates."""
        kept: list[Candidate] = []
        for _ in range(MOST_ROUNDS):
            drawn = self.draw_candidates(task, CANDIDATES)
            kept += drawn if self.split == "train" else [c for c in drawn if c.is_wrong and c.answer]
            if len(kept) >= count:
                return kept[:count]
        raise UserError(
            f"{self.split}/{task}: the backbone got only {len(kept)} of {count} wanted questions wrong"
        )

    def _add_image(self, name: str, scene: Scene, style: Style | None = None) -> str:
        path = f"{PICTURES}/{self.split}/{name}.png"
        self.images[path] = scene, style
        return path

    def make_record(self, task: str, number: int, c: Candidate) -> dict[str, Any]:
        """One record in MMEdit's layout, with the hard probes."""
        rng, name = self.rng, f"{task}-{number:04d}"
        again = redraw(c.scene, rng, c.fact.kind in ("color", "caption"), c.fact.kind in DISTRACTOR_SAFE)
        wording = self._draw_wording(c.fact.kind)
        fact = list_text_facts()[int(rng.integers(len(list_text_facts())))]
        unrelated, unrelated_fact = self._draw_unrelated(c)
        twin, twin_fact = self._draw_twin(c)
        other = self._draw_other_fact(c)
        pred = c.answer if c.is_wrong and c.answer else draw_counterfactual(c.fact, c.scene, rng)
        return {
            "src": _strip_template(c.fact, c.prompt),
            "pred": pred,
            "rephrase": c.fact.format_question(wording),
            "alt": c.fact.answer,
            "image": self._add_image(f"{name}-image", c.scene),
            "image_rephrase": self._add_image(f"{name}-again", again),
            "loc": fact.ask(rng),
            "loc_ans": fact.answer,
            "m_loc": self._add_image(f"{name}-unrelated", unrelated),
            "m_loc_q": unrelated_fact.format_question(str(rng.choice(TRAINED[unrelated_fact.kind]))),
            "m_loc_a": unrelated_fact.answer,
            "same_question_image": self._add_image(f"{name}-twin", twin),
            "same_question_a": twin_fact.answer,
            "same_image_q": other.format_question(str(rng.choice(TRAINED[other.kind]))),
            "same_image_a": other.answer,
            "joint": True,
            "kind": c.fact.kind,
        }

    def _draw_unrelated(self, c: Candidate) -> tuple[Scene, SceneFact]:
        """A scene without the edited scene's objects, and a question of another kind."""
        while True:
            scene = self._sample_scene()
            facts = [f for f in list_facts(scene, self.rng) if f.kind not in (c.fact.kind, "caption")]
            if not set(scene.objects) & set(c.scene.objects) and facts:
                return scene, facts[int(self.rng.integers(len(facts)))]

    def _draw_twin(self, c: Candidate) -> tuple[Scene, SceneFact]:
        """Another scene for the same question, with another answer."""
        while True:
            objects = None
            if c.fact.kind == "category":
                peers = [INDEX[n] for n, k in CATEGORY.items() if k == c.fact.argument and n != c.fact.answer]
                objects = (int(self.rng.choice(peers)),)
            scene = self._sample_scene(objects)
            if set(scene.objects) & set(c.scene.objects):
                continue
            for f in list_facts(scene, self.rng):
                if (f.kind, f.argument) == (c.fact.kind, c.fact.argument) and f.answer != c.fact.answer:
                    return scene, f

    def _draw_other_fact(self, c: Candidate) -> SceneFact:
        """Another question about the edited scene, whose answer the edit does not imply."""
        kinds = (
            {"count", "color"}
            if c.fact.kind == "caption"
            else set(TRAINED) - {"caption", "yesno", c.fact.kind}
        )
        facts = [f for f in list_facts(c.scene, self.rng) if f.kind in kinds and f.answer != c.fact.answer]
        return facts[int(self.rng.integers(len(facts)))]

    def paint(self, out: Path) -> None:
        (out / PICTURES / self.split).mkdir(parents=True, exist_ok=True)
        items = list(self.images.items())
        for start in range(0, len(items), 256):
            part = items[start : start + 256]
            drawn = self.painter.draw_images([scene for _, (scene, _) in part])
            for (path, (_, style)), image in zip(part, drawn, strict=True):
                (image if style is None else style(image)).save(out / path)

    def describe_probes(self, task: str, sha256: str) -> str | None:
        """The text of the file of further probes, of annotations with this checksum; None without any."""
        return None


def _strip_template(fact: SceneFact, prompt: str) -> str:
    """The question inside a prompt's template."""
    return (
        prompt if fact.kind == "caption" else prompt.removeprefix("Question: ").removesuffix(" Short answer:")
    )


def make(
    backbone: Backbone,
    out: Path,
    split: str,
    records: int,
    seed: int,
    textures: Path = TEXTURES,
    version: int = VERSION,
) -> None:
    """Writes both tasks of a split; the annotations come last, so that a broken run is drawn again.

    UserError where something lies in the way that was not drawn.
    """
    check_target(out, split)
    artist = _find_artist(version)(backbone, Painter(textures), seed, split)
    written = {}
    for task in TASKS:
        found = artist.collect(task, records)
        written[task] = [artist.make_record(task, i, c) for i, c in enumerate(found)]
    files: dict[Path, str] = {}
    for task, rows in written.items():
        text = json.dumps(rows, indent=1) + "\n"
        # Before the annotations, whose absence alone is what has a split drawn again.
        if (probes := artist.describe_probes(task, digest(text.encode()))) is not None:
            files[get_probe_file(out, task, split)] = probes
        files[get_drawn_file(out, task, split)] = text
    about: dict[str, Any] = {"version": version, "seed": seed, "records": records}
    about |= {"backbone": backbone.fingerprint}
    sums = {path.name: digest(text.encode()) for path, text in files.items()}
    out.mkdir(parents=True, exist_ok=True)
    for path in files:
        path.unlink(missing_ok=True)
    # First, so that what a killed process leaves is known as drawn.
    write_text(get_about_file(out, split), json.dumps({**about, "sha256": sums}, indent=1) + "\n")
    artist.paint(out)
    for path, text in files.items():
        write_text(path, text)


def digest(content: bytes) -> str:
    """The checksum of a file with this content."""
    return hashlib.sha256(content).hexdigest()


def _find_artist(version: int) -> type[Artist]:
    if version == VERSION:
        return Artist
    # It imports this module.
    from scripts.tiny.second_version import SecondArtist

    return SecondArtist


def _load(hparams: HyperParams | str) -> Backbone:
    # On first use: bad input is said before the seconds that transformers takes.
    from unike.backbones import load_backbone

    return load_backbone(hparams)


def ensure(
    hparams: HyperParams, splits: tuple[str, ...] | None = None, backbone: Backbone | None = None
) -> None:
    """Draws the missing splits: eval, and train if memory, encoders or editor are still to be prepared."""
    out = get_drawing_folder(hparams)
    wanted = splits or choose_splits(hparams)
    check_version(hparams, out)
    if not list_missing_splits(out, wanted):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    # Two runs started at once would each overwrite the files that the other one reads.
    with lock(get_drawing_lock(out)):
        for split in list_missing_splits(out, wanted):
            backbone = backbone or _load(hparams)
            print(f"drawing the bundled benchmark's {split} split into {out}", file=sys.stderr)
            version = hparams.benchmark_version
            make(backbone, out, split, get_size(split, version), hparams.seed, version=version)


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--hparams_dir",
        default="hparams/tiny_blip2.yaml",
        help="YAML of the backbone whose errors are collected",
    )
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--records", type=int, default=None, help="records a task; default: by split")
    parser.add_argument("--version", type=int, choices=(1, 2), default=VERSION, help="of the benchmark")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    return run_guarded(lambda: run(parser.parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    """Draws the splits that are named; nothing where one of them can't be."""
    if args.records is not None and not 1 <= args.records <= MOST_RECORDS:
        raise UserError(f"--records: {args.records}; expected 1 to {MOST_RECORDS}")
    if not 0 <= args.seed <= MOST_SEED:
        raise UserError(f"--seed: {args.seed}; expected 0 to {MOST_SEED}")
    out = Path(check_path(args.out, "--out", "a folder"))
    splits = tuple(dict.fromkeys(args.splits))
    require(*(lambda s=split: check_target(out, s) for split in splits))
    backbone = _load(args.hparams_dir)
    for split in splits:
        count = args.records or get_size(split, args.version)
        make(backbone, out, split, count, args.seed, version=args.version)
    return 0


if __name__ == "__main__":
    sys.exit(main())
