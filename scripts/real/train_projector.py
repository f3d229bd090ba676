"""``python -m scripts.real.train_projector``: trains smol's projector on photographs and drawn scenes.

    python -m scripts.real.train_projector --images photos/a --images photos/b --seed 0 --max_seconds 5400

Stage 0 trains which name an image has (``scripts/real/scoring.py``), stage 1 the language model's answers
(``scripts/real/answering.py``). Tower features, the state of training and its log lie in ``--work``; the same
command goes on where it was interrupted. What is kept is the projector that answers best on the
photographs for validation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from scripts.real import folder as place
from scripts.real.answering import Lesson, Teacher
from scripts.real.names import embed_names, start_projector
from scripts.real.packages import CLASSES, TOWER, find_part, require_scenes
from scripts.real.photos import SPLITS, Photo, read_photos, split_photos
from scripts.real.scenes import DrawnScene, draw_scenes, group_facts, word_question
from scripts.real.scoring import (
    Labelled,
    ScoringOptions,
    add_names,
    compute_loss,
    index_names,
    join,
    label_photos,
    label_scenes,
    train_scores,
)
from scripts.real.views import Shown, ViewStore
from scripts.real.wordings import TRAINED
from scripts.tiny.questions import WEIGHT, add_article
from scripts.tiny.scenes import NAMES as DRAWN
from unike.backbones import load_backbone
from unike.backbones.smol import NameProjector
from unike.config.hparams import HyperParams
from unike.datasets.answers import normalise_answer
from unike.datasets.images import open_image
from unike.datasets.mmedit import VQA_TEMPLATE, wrap_prompt
from unike.system.arguments import ArgumentParser
from unike.system.faults import release_memory
from unike.system.files import replace_atomically, write_json
from unike.system.findings import require
from unike.system.launching import run_guarded
from unike.system.places import require_folder
from unike.system.progress import show_progress
from unike.system.text import one_line
from unike.types import UserError

ROOT = Path(__file__).resolve().parents[2]
# Share of the steps that are about scenes, and weight of stage 0's loss in stage 1.
SCENES_SHARE, NAMES_WEIGHT = 0.35, 0.3
WARMUP, SCENES_SEED = 20, 0
QUESTION = "What is this?"
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Material:
    """All that is trained on, as features: ``views`` of photographs, then scenes, in the same rows each; the
    photographs' names, the scenes' facts, and what is for validation."""

    views: Sequence[Labelled]
    names: Sequence[str]
    scenes: Sequence[DrawnScene]
    validation: Labelled
    validation_names: Sequence[str]


# ---------------------------------------------------------------- material


def gather(store: ViewStore, split: Mapping[str, list[Photo]], args: argparse.Namespace) -> tuple[Any, ...]:
    """Features by view of the photographs and the scenes to train on, and of those for validation."""
    # The same ones whatever the seed: their features serve all seeds.
    scenes = draw_scenes(args.scenes, SCENES_SEED) if args.scenes else []
    train, validation = ([_show(photo) for photo in split[name]] for name in SPLITS[:2])
    drawn = [scene.shown for scene in scenes]
    total = args.views * (len(train) + len(drawn)) + len(validation)
    with show_progress({"features": total}) as tick:

        def get(images: Sequence[Shown], view: int) -> torch.Tensor:
            width = store.backbone.model.config.vision_config.hidden_size
            if not images:
                return torch.zeros(0, 1 + store.backbone.vision.tower.grid**2, width).half()
            return store.get(images, view, lambda n: tick("features", n))

        photos = [get(train, view) for view in range(args.views)]
        # A scene has fewer views: more scenes are worth more.
        shown = get(drawn, 0)
        return photos, shown, get(validation, 0), scenes


def _show(photo: Photo) -> Shown:
    return Shown(photo.key, lambda: open_image(str(photo.path)))


def make_material(
    photos: Sequence[torch.Tensor],
    shown: torch.Tensor,
    validation: torch.Tensor,
    scenes: Sequence[DrawnScene],
    split: Mapping[str, list[Photo]],
    index: Mapping[str, int],
) -> Material:
    names, chosen_by = ([photo.name for photo in split[name]] for name in SPLITS[:2])
    drawn = label_scenes(shown, [[index[normalise_answer(n)] for n in s.scene.names] for s in scenes])
    own = [index[normalise_answer(name)] for name in names]
    views = [join([label_photos(view, own), drawn]) for view in photos]
    kept = label_photos(validation, [index[normalise_answer(name)] for name in chosen_by])
    return Material(views, names, scenes, kept, chosen_by)


# ---------------------------------------------------------------- stage 1


def build_projector(state: State, out: int) -> NameProjector:
    """A projector of these tensors, into a language model of width ``out``."""
    names, width = state["scores.weight"].shape
    slots, hidden = len(state["words.weight"]) // out, len(state["inner.bias"])
    projector = NameProjector(width, names, slots, hidden, out)
    projector.load_state_dict(state)
    return projector


class Lessons:
    """Draws a lesson for each step, the same ones for the same seed."""

    def __init__(self, material: Material, batch: int) -> None:
        self.material, self.batch = material, batch
        self.groups = group_facts(material.scenes)
        self.keys = list(self.groups)
        kinds: dict[str, int] = {}
        for kind, _ in self.keys:
            kinds[kind] = kinds.get(kind, 0) + 1
        self.weights = [WEIGHT[kind] / kinds[kind] for kind, _ in self.keys]

    def draw(self, chooser: random.Random) -> Lesson:
        if self.keys and chooser.random() < SCENES_SHARE:
            (key,) = chooser.choices(self.keys, self.weights)
            rows = chooser.sample(self.groups[key], min(self.batch, len(self.groups[key])))
            first = len(self.material.names)
            return Lesson(word_question(key, chooser), [first + r for r, _ in rows], [a for _, a in rows])
        rows = chooser.sample(range(len(self.material.names)), min(self.batch, len(self.material.names)))
        answers = [self.material.names[row] for row in rows]
        if chooser.random() < 0.25:
            return Lesson(chooser.choice(TRAINED["caption"]), rows, [add_article(a) for a in answers])
        return Lesson(wrap_prompt(VQA_TEMPLATE, chooser.choice(TRAINED["what"])), rows, answers)


@dataclass
class Progress:
    """Where training is: ``best`` is the highest share of validation photographs answered rightly, at
    ``best_step``."""

    step: int = 0
    seconds: float = 0.0
    best: float = -1.0
    best_step: int = 0


class Course:
    """Stage 1 with its checkpoints in ``folder``."""

    def __init__(
        self, teacher: Teacher, material: Material, state: State, folder: Path, args: argparse.Namespace
    ) -> None:
        self.teacher, self.material, self.folder, self.args = teacher, material, folder, args
        self.projector = build_projector(state, teacher.embed.weight.shape[1])
        slow = [*self.projector.scores.parameters(), *self.projector.words.parameters()]
        fast = [*self.projector.inner.parameters(), *self.projector.outer.parameters()]
        groups = [{"params": slow, "rate": args.lr / 3}, {"params": fast, "rate": args.lr}]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
        self.lessons, self.progress, self.best = Lessons(material, args.batch), Progress(), dict(state)

    def run(self, log: Path) -> None:
        """Trains until the time, the steps or the patience are used up."""
        self._resume()
        started = time.monotonic() - self.progress.seconds
        losses: list[float] = []
        if self.progress.best < 0:
            self._check(log, losses, started)
        while not self._is_over(time.monotonic() - started):
            losses.append(self._step())
            self.progress.step += 1
            if self.progress.step % self.args.check_every == 0:
                self._check(log, losses, started)
                losses.clear()
        if self.progress.step % self.args.check_every:
            self._check(log, losses, started)

    def _is_over(self, seconds: float) -> bool:
        waited = self.progress.step - self.progress.best_step
        tired = waited >= self.args.patience * self.args.check_every
        return tired or seconds >= self.args.max_seconds or self.progress.step >= self.args.steps

    def _step(self) -> float:
        step = self.progress.step
        chooser = random.Random(f"{self.args.seed}/{step}")
        rate = min(1.0, (step + 1) / WARMUP) * max(0.05, 1 - step / self.args.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = group["rate"] * rate
        lesson = self.lessons.draw(chooser)
        view = self.material.views[chooser.randrange(len(self.material.views))]
        features = view.features[lesson.rows].float()
        with torch.random.fork_rng():
            torch.manual_seed(step)
            features = torch.nn.functional.dropout(features, self.args.dropout)
        loss = self.teacher.compute_loss(self.projector, features, lesson)
        scores = compute_loss(
            self.projector.scores(features), view.names[lesson.rows], view.second[lesson.rows]
        )
        self.optimiser.zero_grad()
        (loss + NAMES_WEIGHT * scores).backward()
        torch.nn.utils.clip_grad_norm_(self.projector.parameters(), 1.0)
        self.optimiser.step()
        return loss.item()

    def _check(self, log: Path, losses: Sequence[float], started: float) -> None:
        """Answers validation photographs, keeps the best projector, writes a checkpoint and a log line."""
        prompt = wrap_prompt(VQA_TEMPLATE, QUESTION)
        said = self.teacher.answer(self.projector, self.material.validation.features, prompt)
        right = [
            normalise_answer(a[0]) == normalise_answer(n)
            for a, n in zip(said, self.material.validation_names, strict=True)
        ]
        progress, share = self.progress, sum(right) / max(1, len(right))
        # Without validation photographs the newest is kept.
        if share > progress.best or not right:
            progress.best, progress.best_step = share, progress.step
            self.best = {k: v.detach().clone() for k, v in self.projector.state_dict().items()}
        progress.seconds = time.monotonic() - started
        loss = sum(losses) / len(losses) if losses else None
        line = {
            "step": progress.step,
            "seconds": round(progress.seconds),
            "loss": loss,
            "validation_exact": share,
        }
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)
        self._save()

    def _save(self) -> None:
        tensors = {f"now.{k}": v for k, v in self.projector.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
        about = {k: str(v) for k, v in vars(self.progress).items()} | {"of": self._identify()}
        with replace_atomically(self.folder / "state.safetensors") as temporary:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, about)

    def _identify(self) -> str:
        """A checksum of what a checkpoint cannot go on without: material and options of a step."""
        material, args = self.material, self.args
        what = [len(material.views), len(material.scenes), *material.names, "", *material.validation_names]
        options = [args.seed, args.batch, args.lr, args.dropout]
        return hashlib.sha256(json.dumps([what, options]).encode()).hexdigest()

    def _resume(self) -> None:
        path = self.folder / "state.safetensors"
        if not path.is_file():
            return
        from safetensors import safe_open

        with safe_open(path, framework="pt") as opened:
            about = opened.metadata()
        if about.get("of") != self._identify():
            raise UserError(
                f"{one_line(path)}: is of other photographs, scenes, views or options (--batch, --lr, "
                "--dropout); delete it, or name another --work"
            )
        self.progress = Progress(
            int(about["step"]), float(about["seconds"]), float(about["best"]), int(about["best_step"])
        )
        kept: dict[str, State] = {"now": {}, "best": {}, "adam": {}}
        for name, tensor in load_file(path).items():
            part, _, rest = name.partition(".")
            kept[part][rest] = tensor
        self.projector.load_state_dict(kept["now"])
        self.best = kept["best"]
        whole = self.optimiser.state_dict()
        for name, tensor in kept["adam"].items():
            number, _, key = name.partition(".")
            whole["state"].setdefault(int(number), {})[key] = tensor
        self.optimiser.load_state_dict(whole)


# ---------------------------------------------------------------- the command


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser("python -m scripts.real.train_projector", description="Train smol's projector.")
    add = parser.add_argument
    add("--images", action="append", required=True, metavar="DIR", help="photographs; may be repeated")
    add("--hparams_dir", default=str(ROOT / "hparams/smol.yaml"), metavar="FILE", help="default: %(default)s")
    add("--out", metavar="DIR", help="folder that gets the projector; default: the backbone's own")
    add("--work", default="work/projector", metavar="DIR", help="features, checkpoints: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--views", type=int, default=4, help="views of each photograph: %(default)s")
    add("--scenes", type=int, default=1500, help="drawn scenes: %(default)s")
    add("--held_names", type=float, default=0.08, help="share of names kept from training: %(default)s")
    add("--epochs", type=int, default=30, help="of stage 0: %(default)s")
    add("--steps", type=int, default=1200, help="most steps of stage 1: %(default)s")
    add("--batch", type=int, default=16, help="images in a step of stage 1: %(default)s")
    add("--lr", type=float, default=1e-3, help="of stage 1: %(default)s")
    add("--dropout", type=float, default=0.1, help="of features: %(default)s")
    add(
        "--check_every",
        type=int,
        default=100,
        help="steps between two looks at validation: %(default)s",
    )
    add(
        "--patience", type=int, default=6, help="looks without a better one, after which it ends: %(default)s"
    )
    add("--max_seconds", type=float, default=7200, help="of stage 1: %(default)s")
    add("--dtype", default="bfloat16", help="of the language model: %(default)s")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    hparams = HyperParams.from_hparams(args.hparams_dir, [f"dtype={args.dtype}", "device=cpu"])
    home = Path(hparams.name)
    out, work = Path(args.out or home), Path(args.work)
    photos: list[Photo] = []
    require(
        lambda: photos.extend(read_photos([Path(folder) for folder in args.images])),
        lambda: require_folder(work, "--work "),
        lambda: require_folder(out, "--out "),
        lambda: place.require_smol(hparams),
        lambda: _require_options(args),
        lambda: _require_replaceable(out, args.seed),
        # Needed after the features, which take long.
        lambda: find_part(TOWER) and find_part(CLASSES),
        lambda: args.scenes > 0 and require_scenes(),
    )
    split = split_photos(photos, args.seed, args.held_names)
    print({name: len(group) for name, group in split.items()}, flush=True)
    backbone = load_backbone(hparams)
    folder = work / f"seed-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    found = gather(ViewStore(work / "features", backbone), split, args)
    state, names = start_projector(home)
    state, names, material = _add_all_names(backbone, state, names, found, split)
    # What the tower used.
    release_memory()
    state, accuracies = train_scores(
        state, material.views, material.validation, ScoringOptions(epochs=args.epochs), args.seed
    )
    print("stage 0, validation photographs named:", [round(a, 3) for a in accuracies], flush=True)
    course = Course(Teacher(backbone), material, state, folder, args)
    course.run(folder / "log.jsonl")
    trained = {
        **{key: value for key, value in vars(args).items() if key not in ("images", "work", "out")},
        "hparams_dir": Path(args.hparams_dir).name,
        "photographs": {name: len(group) for name, group in split.items()},
        "stage_0": accuracies,
        "steps_done": course.progress.step,
        "kept_step": course.progress.best_step,
        "validation_exact": course.progress.best,
    }
    projector = course.projector
    about = place.About(
        names, projector.slots, projector.inner.out_features, backbone.vision.tower.grid, trained
    )
    out.mkdir(parents=True, exist_ok=True)
    place.save_projector(out, course.best, about)
    write_json(folder / "trained.json", trained)
    if (out / place.LANGUAGE).is_file():
        place.write_config(out, json.loads((home / "config.json").read_text("utf-8"))["text_config"])
    print(f"{out / place.PROJECTOR}: {course.progress.best:.1%} of validation photographs named exactly")
    return 0


def _require_options(args: argparse.Namespace) -> None:
    least = {"seed": 0, "scenes": 0, "epochs": 0, "max_seconds": 0} | dict.fromkeys(
        ("views", "steps", "batch", "check_every", "patience"), 1
    )
    wrong = [
        f"--{name}: {getattr(args, name)}; expected {low} or more"
        for name, low in least.items()
        if not getattr(args, name) >= low
    ]
    if not 0 < args.lr < 1:
        wrong.append(f"--lr: {args.lr}; expected more than 0 and less than 1")
    wrong += [
        f"--{name}: {getattr(args, name)}; expected 0 or more and less than 1"
        for name in ("dropout", "held_names")
        if not 0 <= getattr(args, name) < 1
    ]
    if wrong:
        raise UserError(*wrong)


def _require_replaceable(out: Path, seed: int) -> None:
    """UserError where a projector of another seed lies, which took long to train."""
    if (out / place.ABOUT).is_file():
        former = place.read_about(out).trained.get("seed")
        if former not in (None, seed):
            raise UserError(
                f"--out {one_line(out)}: has the projector of seed {former}; name another folder, or move "
                f"{place.PROJECTOR} and {place.ABOUT}"
            )


def _add_all_names(
    backbone: Any, state: State, names: list[str], found: tuple[Any, ...], split: Mapping[str, list[Photo]]
) -> tuple[State, list[str], Material]:
    """Scores and words for all names of photographs and scenes that are none of the tower's classes."""
    photos, shown, validation, scenes = found
    index = index_names(names)
    wanted = [photo.name for name in SPLITS[:2] for photo in split[name]] + list(DRAWN if scenes else ())
    new = list({normalise_answer(n): n for n in wanted if normalise_answer(n) not in index}.values())
    index |= {normalise_answer(name): len(names) + i for i, name in enumerate(new)}
    material = make_material(photos, shown, validation, scenes, split, index)
    if new:
        embeddings = backbone.decoder.get_input_embeddings().weight
        slots = len(state["words.weight"]) // embeddings.shape[1]
        words = embed_names(new, backbone.tokenizer, embeddings, slots)
        state = add_names(state, words, material.views[0])
    return state, [*names, *new], material


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: run(sys.argv[1:])))
