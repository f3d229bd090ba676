"""Seconds per one-step edit with the paper's five probes before and after: the reference against ours.

``python -m benchmarks.edit_speed`` (also ``--model tiny_blip2``, ``--steps 10``, ``--profile``).

Each round times the reference and our four modes one after the other on the same records, and compares
their losses and logits; the exit code is 1 where they differ by more than 1e-5 (of the largest logit), by
more than the reference itself does where the last bit of its first keys is changed, and not because a ReLU
neuron at zero, give or take rounding, fired in one of the two alone. On random weights all
take the same fixed number of steps, since whether and when a random model reaches a target means
nothing; on the embedded backbones the YAML's stopping rule decides. Teacher-forced readings only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.kinks import kink
from benchmarks.measuring import Rows, timed
from benchmarks.models import PRESET, ROOT, random_cases, random_knowledge, wide
from benchmarks.reference import Done, Reference, at_answers
from benchmarks.step_profile import profile
from unike import runs
from unike.backbones import load_backbone
from unike.backbones.images import FeatureCache
from unike.backbones.prefix import PrefixCache
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.edits import Edit
from unike.evaluation.protocols import run_one_step, run_one_step_batch
from unike.evaluation.reader import Reader
from unike.evaluation.record import Record
from unike.methods import build
from unike.methods.base import resolve_layers
from unike.methods.unike import UniKE
from unike.types import FIVE_METRICS, Case, UserError

TOLERANCE = 1e-5
# Adam divides by the gradient's own size, so that a few records carry the last bit up to visible digits;
# there ours may be this many times as far from the reference as the reference is from itself.
FACTOR = 10
# What is kept from earlier runs, and whether records are edited side by side.
MODES = {
    "cold": (False, False),
    "cached": (True, False),
    "batched, cold": (False, True),
    "batched, cached": (True, True),
}
TARGETS = {
    "wide": {"cold": 4, "cached": 10, "batched, cold": 10, "batched, cached": 25},
    "tiny_blip2": {"batched, cached": 5},
    "tiny_minigpt4": {"batched, cached": 5},
}


@dataclass(frozen=True)
class Apart:
    """Differences of a record's results: of final losses, and the largest of its logits as a share of the
    largest logit."""

    loss: float
    logits: float

    def worse(self, other: Apart) -> Apart:
        return Apart(max(self.loss, other.loss), max(self.logits, other.logits))

    def within(self, tolerance: float) -> bool:
        return max(self.loss, self.logits) <= tolerance


@dataclass(frozen=True)
class World:
    """What is timed: ``blocks`` of records; the reference and the unbatched modes take the first
    ``alone`` of each."""

    backbone: VisionLanguageBackbone
    method: UniKE
    blocks: Sequence[Sequence[Case]]
    alone: int
    name: str


class Ours:
    """Our four modes on one backbone and method."""

    def __init__(self, backbone: VisionLanguageBackbone, method: UniKE) -> None:
        self.backbone, self.method = backbone, method
        self.prefixes = self.emptied()

    def emptied(self) -> PrefixCache:
        """Forgets every picture and every prefix."""
        self.backbone.cache = FeatureCache(self.backbone.cache.compute)
        first = self.method.layers(self.backbone)[0]
        self.prefixes = PrefixCache(self.backbone, first, batch=self.method.hparams.eval_batch)
        return self.prefixes

    def warm(self, cases: Sequence[Case]) -> None:
        """Computes the prefixes of all queries, as an earlier run would have."""
        self.prefixes.state([q for c in cases for q in (c.request.query, *(p.query for p in c.probes))])

    def records(self, cases: Sequence[Case], cached: bool, batched: bool) -> tuple[list[Record], float]:
        """The cases' records and their seconds; a new reader asks the base model again."""
        self.emptied()
        if cached:
            self.warm(cases)
        reader = Reader(self.backbone, self.prefixes, generated=False)
        if batched:
            outcomes, seconds = timed(lambda: run_one_step_batch(self.backbone, self.method, cases, reader))
        else:
            outcomes, seconds = timed(
                lambda: [run_one_step(self.backbone, self.method, c, reader) for c in cases]
            )
        return [outcome.record for outcome in outcomes], seconds

    @torch.no_grad()
    def logits(self, cases: Sequence[Case], batched: bool) -> list[list[torch.Tensor]]:
        """Logits at each probe's answer positions, case by case: before the edit, then after it."""
        if batched:
            with torch.enable_grad():
                edits = self.method.edit_many(self.backbone, [c.request for c in cases], self.prefixes)
        else:
            with torch.enable_grad():
                edits = [self.method.edit(self.backbone, c.request, self.prefixes) for c in cases]
        out = []
        for case, edit in zip(cases, edits, strict=True):
            assert isinstance(edit, Edit), str(edit)
            state = self.prefixes.state([p.query for p in case.probes])
            found = [self.backbone.suffix(state)]
            with edit.applied(self.backbone):
                found.append(self.backbone.suffix(state))
            out.append([at_answers(w[i], state.labels[i]) for w in found for i in range(len(state))])
        return out


def differences(done: Sequence[Done], records: Sequence[Record], logits: Sequence[Any]) -> list[Apart]:
    """How far each record is from the reference's; infinitely where the steps differ."""
    out = []
    for reference, record, ours in zip(done, records, logits, strict=True):
        loss = float("inf") if record.loss is None else abs(record.loss - reference.losses[-1])
        same = record.steps == reference.steps
        out.append(Apart(loss if same else float("inf"), _furthest(reference, ours)))
    return out


def _furthest(reference: Done, ours: Sequence[torch.Tensor]) -> float:
    pairs = list(zip([*reference.before, *reference.after], ours, strict=True))
    size = max(theirs.abs().max().item() for theirs, _ in pairs)
    return max((a - b).abs().max().item() for a, b in pairs) / size


def rounding(reference: Reference, case: Case, done: Done) -> Apart:
    """How far the reference is from itself where its first keys differ in their last bit."""
    nudged = reference.record(case, nudge=torch.finfo(torch.float32).eps)
    record = Record(case.request.id, info={"steps": nudged.steps, "loss": nudged.losses[-1]})
    return differences([done], [record], [[*nudged.before, *nudged.after]])[0]


def kink_of(world: World, reference: Reference, ours: Ours, case: Case) -> float | None:
    """See ``kink``: of our edit and the reference's."""
    layers = world.method.layers(world.backbone)
    edit = partial(world.method.edit, world.backbone, case.request, ours.prefixes)
    return kink(world.backbone, layers, edit, partial(reference.record, case), TOLERANCE)


def _all(reference: Reference, cases: Sequence[Case]) -> list[Done]:
    return [reference.record(c) for c in cases]


def compare(world: World, rows: Rows) -> bool:
    """Times all rounds; whether every result agrees with the reference's."""
    reference, ours = Reference(world.backbone, world.method), Ours(world.backbone, world.method)
    seconds: dict[str, list[float]] = {name: [] for name in ("reference", *MODES)}
    same = True
    found: list[Apart] = []
    unstable: list[Apart] = []
    kinks: list[float] = []
    for number, block in enumerate(world.blocks):
        alone = block[: world.alone]
        done, taken = timed(partial(_all, reference, alone))
        spent, worst = {"reference": taken / len(alone)}, [Apart(0.0, 0.0)] * len(alone)
        for name, (cached, batched) in MODES.items():
            some = block if batched else alone
            records, taken = ours.records(some, cached, batched)
            spent[name] = taken / len(some)
            logits = ours.logits(some, batched)
            apart = differences(done, records[: len(alone)], logits[: len(alone)])
            worst = [one.worse(other) for one, other in zip(worst, apart, strict=True)]
        found += worst
        for one, case, result in zip(worst, alone, done, strict=True):
            if not one.within(TOLERANCE):
                own = rounding(reference, case, result)
                if one.loss <= FACTOR * own.loss and one.logits <= FACTOR * own.logits:
                    unstable.append(own)
                elif (size := kink_of(world, reference, ours, case)) is not None:
                    kinks.append(size)
                else:
                    same = False
        # The first round brings the machine up to speed and is not counted, nor its comparison dropped.
        if number > 0:
            for name, value in spent.items():
                seconds[name].append(value)
        print(" ".join(f"{name} {value:.3f}s" for name, value in spent.items()), file=sys.stderr)
    report(world, rows, seconds, found, unstable, kinks)
    return same


def report(
    world: World,
    rows: Rows,
    seconds: dict[str, list[float]],
    found: Sequence[Apart],
    unstable: Sequence[Apart],
    kinks: Sequence[float],
) -> None:
    """Adds the rows: times, ratios, differences."""
    targets = TARGETS[world.name.split(",")[0]]
    for name, values in seconds.items():
        rows.add(world.name, f"{name}: time a record", values, "s")
    for name in MODES:
        pairs = zip(seconds["reference"], seconds[name], strict=True)
        target = f">= {targets[name]}" if name in targets else None
        rows.add(world.name, f"{name}: reference / ours", [a / b for a, b in pairs], "x", target)
    limit = f"<= {TOLERANCE}"
    rows.add(world.name, "difference of final losses", [a.loss for a in found], "", limit)
    rows.add(world.name, "difference of logits, share of the largest", [a.logits for a in found], "", limit)
    rows.add(world.name, "its largest", [max(a.logits for a in found)], "")
    if unstable:
        own = [max(a.logits for a in unstable)]
        rows.add(world.name, "the reference's own, last bit of the keys changed", own, "")
    if kinks:
        title = "records further apart: one neuron fires on one side alone"
        rows.add(world.name, title, [len(kinks)], "")
        rows.add(world.name, "how far from zero that neuron is", [max(kinks)], "")


def wide_world(given: argparse.Namespace) -> World:
    """Random weights, ``--steps`` steps an edit."""
    backbone = wide()
    hparams = HyperParams.from_dict({**PRESET, "max_steps": given.steps, "stop_loss": 0.0})
    layers = resolve_layers(hparams, backbone)
    method = build(hparams, random_knowledge(backbone, layers, hparams))
    assert isinstance(method, UniKE)
    count = (given.rounds + 1) * given.batch
    blocks = _blocks(random_cases(count, backbone.vision.image_size), given.batch)
    return World(backbone, method, blocks, 1, f"wide, {given.steps} steps")


def tiny_world(given: argparse.Namespace) -> World:
    """An embedded backbone with its knowledge, on the embedded benchmark's E-VQA."""
    hparams = HyperParams.from_hparams(ROOT / "hparams" / f"{given.model}.yaml", ["device=cpu"])
    count = (given.rounds + 1) * given.batch
    cases = runs.read_checked_cases(hparams, "vqa", count)
    if len(cases) < count:
        raise UserError(f"--rounds {given.rounds} --batch {given.batch}: {len(cases)} records are there")
    backbone = load_backbone(hparams)
    parts = runs.assemble(hparams, backbone, progress=False)
    assert isinstance(parts.method, UniKE)
    five = [replace(c, probes=tuple(p for p in c.probes if p.name in FIVE_METRICS)) for c in cases]
    return World(backbone, parts.method, _blocks(five, given.batch), given.batch, f"{given.model}, E-VQA")


def _blocks(cases: Sequence[Case], size: int) -> list[Sequence[Case]]:
    return [cases[i : i + size] for i in range(0, len(cases), size)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=sorted(TARGETS), default="wide")
    parser.add_argument("--rounds", type=int, default=5, help="paired runs, after one that is not counted")
    parser.add_argument("--batch", type=int, default=16, help="records side by side")
    parser.add_argument("--steps", type=int, default=60, help="training steps of an edit on random weights")
    parser.add_argument("--profile", action="store_true", help="what a batched step's time goes into")
    parser.add_argument("--json", type=Path, help="where the rows are written to")
    given = parser.parse_args(arguments)
    if min(given.rounds, given.batch, given.steps) < 1:
        parser.error("--rounds, --batch and --steps: expected at least 1")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 where a result differs from the reference's, 2 for input that is not there."""
    given = parse(arguments)
    rows, same = Rows("edit_speed"), True
    try:
        if given.profile:
            profile(rows, given.batch, given.rounds)
        else:
            same = compare(wide_world(given) if given.model == "wide" else tiny_world(given), rows)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    rows.write(given.json)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
