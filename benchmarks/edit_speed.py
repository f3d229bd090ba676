"""Seconds per one-step edit with the paper's five probes before and after: the reference and ours.

``python -m benchmarks.edit_speed`` (also ``--model tiny_blip2``, ``--steps 10``, ``--profile``).

Each round times the reference and our four modes one by one on the same records, and compares their losses
and logits. The exit code is 1 if a record differs by more than 1e-5 (of the largest logit), unless the
reference itself differs as much when the last bit of its first keys is changed, or one ReLU neuron at zero to
within rounding fired in only one of the two. On random weights all take the same fixed number of steps, since
it means nothing when a random model reaches a target. On the bundled toy models the YAML's stopping rule
decides. Teacher-forced evaluation only.
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

from benchmarks.kinks import find_kink
from benchmarks.measuring import Measurements, time_call
from benchmarks.models import PRESET, ROOT, draw_cases, draw_knowledge, make_wide_backbone
from benchmarks.reference import Reference, ReferenceRecord, select_answers
from benchmarks.step_profile import profile_steps
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
# Adam divides by the gradient's own size, so in a few records the last bit grows into visible digits. There
# ours may be this many times as far from the reference as the reference is from itself.
FACTOR = 10
# Whether lower-layer activations are cached, and whether records are batched.
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
class Deviation:
    """Differences of a record's results: of final losses, and the largest of its logits as a share of the
    largest logit."""

    loss: float
    logits: float

    def combine(self, other: Deviation) -> Deviation:
        return Deviation(max(self.loss, other.loss), max(self.logits, other.logits))

    def is_within(self, tolerance: float) -> bool:
        return max(self.loss, self.logits) <= tolerance


@dataclass(frozen=True)
class TimedSetup:
    """The model, method and ``blocks`` of records to time; the reference and the unbatched modes take the
    first ``alone`` of each block."""

    backbone: VisionLanguageBackbone
    method: UniKE
    blocks: Sequence[Sequence[Case]]
    alone: int
    name: str


class OurModes:
    """Our four modes on one backbone and method."""

    def __init__(self, backbone: VisionLanguageBackbone, method: UniKE) -> None:
        self.backbone, self.method = backbone, method
        self.prefixes = self.empty_caches()

    def empty_caches(self) -> PrefixCache:
        """Forgets every image and every prefix."""
        self.backbone.cache = FeatureCache(self.backbone.cache.compute)
        first = self.method.layers(self.backbone)[0]
        self.prefixes = PrefixCache(self.backbone, first, batch=self.method.hparams.eval_batch)
        return self.prefixes

    def warm_caches(self, cases: Sequence[Case]) -> None:
        """Computes the prefixes of all queries, as an earlier run does."""
        self.prefixes.state([q for c in cases for q in (c.request.query, *(p.query for p in c.probes))])

    def make_records(self, cases: Sequence[Case], cached: bool, batched: bool) -> tuple[list[Record], float]:
        """The cases' records and their seconds; a new reader evaluates the base model again."""
        self.empty_caches()
        if cached:
            self.warm_caches(cases)
        reader = Reader(self.backbone, self.prefixes, generated=False)
        if batched:
            outcomes, seconds = time_call(
                lambda: run_one_step_batch(self.backbone, self.method, cases, reader)
            )
        else:
            outcomes, seconds = time_call(
                lambda: [run_one_step(self.backbone, self.method, c, reader) for c in cases]
            )
        return [outcome.record for outcome in outcomes], seconds

    @torch.no_grad()
    def compute_logits(self, cases: Sequence[Case], batched: bool) -> list[list[torch.Tensor]]:
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
            out.append([select_answers(w[i], state.labels[i]) for w in found for i in range(len(state))])
        return out


def compare_records(
    done: Sequence[ReferenceRecord], records: Sequence[Record], logits: Sequence[Any]
) -> list[Deviation]:
    """The difference of each record from the reference's; infinite if the steps differ."""
    out = []
    for reference, record, ours in zip(done, records, logits, strict=True):
        loss = float("inf") if record.loss is None else abs(record.loss - reference.losses[-1])
        same = record.steps == reference.steps
        out.append(Deviation(loss if same else float("inf"), _find_largest(reference, ours)))
    return out


def _find_largest(reference: ReferenceRecord, ours: Sequence[torch.Tensor]) -> float:
    pairs = list(zip([*reference.before, *reference.after], ours, strict=True))
    size = max(theirs.abs().max().item() for theirs, _ in pairs)
    return max((a - b).abs().max().item() for a, b in pairs) / size


def measure_rounding(reference: Reference, case: Case, done: ReferenceRecord) -> Deviation:
    """The reference's difference from itself with the last bit of its first keys changed."""
    nudged = reference.record(case, nudge=torch.finfo(torch.float32).eps)
    record = Record(case.request.id, info={"steps": nudged.steps, "loss": nudged.losses[-1]})
    return compare_records([done], [record], [[*nudged.before, *nudged.after]])[0]


def find_kink_of(world: TimedSetup, reference: Reference, ours: OurModes, case: Case) -> float | None:
    """``find_kink`` of our edit and the reference's."""
    layers = world.method.layers(world.backbone)
    edit = partial(world.method.edit, world.backbone, case.request, ours.prefixes)
    return find_kink(world.backbone, layers, edit, partial(reference.record, case), TOLERANCE)


def _run_reference(reference: Reference, cases: Sequence[Case]) -> list[ReferenceRecord]:
    return [reference.record(c) for c in cases]


def time_rounds(world: TimedSetup, rows: Measurements) -> bool:
    """Times all rounds; whether every result agrees with the reference's."""
    reference, ours = Reference(world.backbone, world.method), OurModes(world.backbone, world.method)
    seconds: dict[str, list[float]] = {name: [] for name in ("reference", *MODES)}
    same = True
    found: list[Deviation] = []
    unstable: list[Deviation] = []
    kinks: list[float] = []
    for number, block in enumerate(world.blocks):
        alone = block[: world.alone]
        done, taken = time_call(partial(_run_reference, reference, alone))
        spent, worst = {"reference": taken / len(alone)}, [Deviation(0.0, 0.0)] * len(alone)
        for name, (cached, batched) in MODES.items():
            some = block if batched else alone
            records, taken = ours.make_records(some, cached, batched)
            spent[name] = taken / len(some)
            logits = ours.compute_logits(some, batched)
            apart = compare_records(done, records[: len(alone)], logits[: len(alone)])
            worst = [one.combine(other) for one, other in zip(worst, apart, strict=True)]
        found += worst
        for one, case, result in zip(worst, alone, done, strict=True):
            if not one.is_within(TOLERANCE):
                own = measure_rounding(reference, case, result)
                if one.loss <= FACTOR * own.loss and one.logits <= FACTOR * own.logits:
                    unstable.append(own)
                elif (size := find_kink_of(world, reference, ours, case)) is not None:
                    kinks.append(size)
                else:
                    same = False
        # The first round warms up the machine: its times are dropped, its comparison is not.
        if number > 0:
            for name, value in spent.items():
                seconds[name].append(value)
        print(" ".join(f"{name} {value:.3f}s" for name, value in spent.items()), file=sys.stderr)
    add_rows(world, rows, seconds, found, unstable, kinks)
    return same


def add_rows(
    world: TimedSetup,
    rows: Measurements,
    seconds: dict[str, list[float]],
    found: Sequence[Deviation],
    unstable: Sequence[Deviation],
    kinks: Sequence[float],
) -> None:
    """Adds the rows of times, ratios and differences."""
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


def make_wide_setup(args: argparse.Namespace) -> TimedSetup:
    """Random weights, ``--steps`` steps an edit."""
    backbone = make_wide_backbone()
    hparams = HyperParams.from_dict({**PRESET, "max_steps": args.steps, "stop_loss": 0.0})
    layers = resolve_layers(hparams, backbone)
    method = build(hparams, draw_knowledge(backbone, layers, hparams))
    assert isinstance(method, UniKE)
    count = (args.rounds + 1) * args.batch
    blocks = _split(draw_cases(count, backbone.vision.image_size), args.batch)
    return TimedSetup(backbone, method, blocks, 1, f"wide, {args.steps} steps")


def make_tiny_setup(args: argparse.Namespace) -> TimedSetup:
    """A bundled toy model with its knowledge, on the bundled benchmark's E-VQA."""
    hparams = HyperParams.from_hparams(ROOT / "hparams" / f"{args.model}.yaml", ["device=cpu"])
    count = (args.rounds + 1) * args.batch
    cases = runs.read_checked_cases(hparams, "vqa", count)
    if len(cases) < count:
        raise UserError(f"--rounds {args.rounds} --batch {args.batch}: only {len(cases)} records exist")
    backbone = load_backbone(hparams)
    parts = runs.assemble(hparams, backbone, progress=False)
    assert isinstance(parts.method, UniKE)
    five = [replace(c, probes=tuple(p for p in c.probes if p.name in FIVE_METRICS)) for c in cases]
    return TimedSetup(backbone, parts.method, _split(five, args.batch), args.batch, f"{args.model}, E-VQA")


def _split(cases: Sequence[Case], size: int) -> list[Sequence[Case]]:
    return [cases[i : i + size] for i in range(0, len(cases), size)]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=sorted(TARGETS), default="wide")
    parser.add_argument("--rounds", type=int, default=5, help="paired runs, after one for warm-up")
    parser.add_argument("--batch", type=int, default=16, help="records in a batch")
    parser.add_argument("--steps", type=int, default=60, help="training steps of an edit on random weights")
    parser.add_argument("--profile", action="store_true", help="profile a batched training step")
    parser.add_argument("--json", type=Path, help="where the rows are written to")
    args = parser.parse_args(arguments)
    if min(args.rounds, args.batch, args.steps) < 1:
        parser.error("--rounds, --batch and --steps: expected at least 1")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 if a result differs from the reference's, 2 for missing input."""
    args = parse_arguments(arguments)
    rows, same = Measurements("edit_speed"), True
    try:
        if args.profile:
            profile_steps(rows, args.batch, args.rounds)
        else:
            same = time_rounds(make_wide_setup(args) if args.model == "wide" else make_tiny_setup(args), rows)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    rows.write(args.json)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
