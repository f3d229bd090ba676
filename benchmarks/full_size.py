"""One UniKE edit with all five probes at full dimensions, in bf16 on the CPU: seconds of each part, memory.

``python -m benchmarks.full_size --model blip2 --weights DIR`` writes random weights into ``DIR`` once (7.5
GB; ``minigpt4``: 15.7 GB). ``--reference`` also times the reference procedure with a few steps and scales
its training to our number of steps.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measuring import Measurements, read_resident, time_call
from benchmarks.models import draw_cases, load_full, locate_knowledge, make_full_hparams
from benchmarks.reference import Reference
from unike.backbones.images import FeatureCache
from unike.backbones.prefix import open_prefixes
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.edits import LayerKnowledge
from unike.evaluation.reader import Reader
from unike.methods import build
from unike.methods.preparation.knowledge import read_knowledge
from unike.methods.unike import UniKE
from unike.types import Case

TITLES = {"blip2": "BLIP2-OPT-2.7B", "minigpt4": "MiniGPT-4-7B"}
# Targets: seconds of one edit with its probes, and GB of memory.
SECONDS = {"blip2": "<= 60"}
MEMORY = {"minigpt4": "<= 24"}
FEW = 2


def build_method(backbone: VisionLanguageBackbone, hparams: HyperParams, knowledge: Path) -> UniKE:
    """The method with the folder's memory and encoders."""
    method = build(hparams, read_knowledge(knowledge, hparams, backbone.device))
    assert isinstance(method, UniKE)
    return method


def _count_bytes(known: LayerKnowledge) -> int:
    memory = {t.data_ptr(): t.nbytes for t in vars(known.bank).values() if isinstance(t, torch.Tensor)}
    return sum(memory.values()) + sum(p.nbytes for p in known.semantic.parameters())


def time_edit(backbone: VisionLanguageBackbone, method: UniKE, case: Case) -> dict[str, float]:
    """Seconds of each part of a record's edit with an empty cache."""
    backbone.cache = FeatureCache(backbone.cache.compute)
    prefixes = open_prefixes(method.hparams, backbone, method.layers(backbone)[0])
    reader = Reader(backbone, prefixes, generated=False)
    queries = [p.query for p in case.probes]
    images = list({id(q.image): q.image for q in queries if q.image is not None}.values())
    spent = {}
    _, spent["images"] = time_call(lambda: backbone.cache.get(images, backbone.vision.pixels))
    _, spent["prefixes"] = time_call(lambda: prefixes.state(queries))
    before, spent["probes before"] = time_call(lambda: reader.predict_base(case))
    edit, spent["edit"] = time_call(lambda: method.edit(backbone, case.request, prefixes))
    _, spent["probes after"] = time_call(lambda: reader.predict_edited(case, edit, before))
    return spent


def time_reference(backbone: VisionLanguageBackbone, method: UniKE, case: Case) -> float:
    """Seconds of the reference at the method's steps: probes as measured, training scaled up from a few."""
    few = UniKE(replace(method.hparams, max_steps=FEW), method.knowledge)
    reference, training = Reference(backbone, few), [0.0]
    train = reference.train

    def train_timed(*args: object) -> list[float]:
        losses, training[0] = time_call(lambda: train(*args))  # type: ignore[arg-type]
        return losses

    reference.train = train_timed  # type: ignore[method-assign, assignment]
    _, whole = time_call(lambda: reference.record(case))
    return whole - training[0] + training[0] * (method.hparams.max_steps + 1) / (FEW + 1)


def measure(args: argparse.Namespace, rows: Measurements) -> None:
    """Loads the model, edits, and adds the rows."""
    folder, title = args.weights / args.model, TITLES[args.model]
    hparams = make_full_hparams(args.steps, args.encoder_hidden)
    # In another process: the memory that writing takes must not count as that of an edit.
    subprocess.run(
        [sys.executable, "-m", "benchmarks.models", "--model", args.model, "--weights", str(args.weights),
         "--items", str(args.items), "--encoder-hidden", str(hparams.encoder_hidden)],
        check=True,
    )  # fmt: skip
    backbone, loading = time_call(lambda: load_full(args.model, folder))
    weights = sum(p.nbytes for p in backbone.model.parameters())
    rows.add(title, "weights, bf16", [weights / 1e9], "GB")
    rows.add(title, "loading", [loading], "s")
    rows.add(title, "peak resident after loading / weights", [read_resident("VmHWM") / weights], "x")
    knowledge = locate_knowledge(args.model, args.weights, hparams, args.items)
    method = build_method(backbone, hparams, knowledge)
    size = sum(_count_bytes(known) for known in method.knowledge.values())
    rows.add(title, "memory and encoders", [size / 1e9], "GB")
    cases = draw_cases(args.runs, backbone.vision.image_size)
    parts = [time_edit(backbone, method, case) for case in cases]
    case = f"{title}, {args.steps} steps"
    for name in parts[0]:
        rows.add(case, f"{name}: time", [p[name] for p in parts], "s")
    whole = [sum(p.values()) for p in parts]
    rows.add(case, "edit and five probes, cold", whole, "s", SECONDS.get(args.model))
    peak = read_resident("VmHWM")
    rows.add(title, "peak resident", [peak / 1e9], "GB", MEMORY.get(args.model))
    rows.add(title, "peak resident / weights", [peak / weights], "x", "<= 1.1")
    rows.add(title, "of it file pages (reclaimable)", [read_resident("RssFile") / 1e9], "GB")
    if args.reference:
        taken = time_reference(backbone, method, cases[0])
        rows.add(case, f"reference, training scaled from {FEW} steps", [taken], "s")
        rows.add(case, "reference / ours", [taken / s for s in whole], "x", ">= 5")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=sorted(TITLES), required=True)
    parser.add_argument("--weights", type=Path, required=True, help="parent of the models' folders")
    parser.add_argument("--steps", type=int, default=10, help="training steps of the edit")
    parser.add_argument("--items", type=int, default=2000, help="items in each layer's knowledge memory")
    parser.add_argument(
        "--encoder-hidden", type=int, help="hidden width of the encoders; default: the YAML's"
    )
    parser.add_argument(
        "--runs", type=int, default=1, help="edits, each of another record, with an empty cache"
    )
    parser.add_argument("--reference", action="store_true", help="time the reference procedure too")
    parser.add_argument("--json", type=Path, help="where the rows are written to")
    args = parser.parse_args(arguments)
    if min(args.steps, args.items, args.runs) < 1:
        parser.error("--steps, --items and --runs: expected at least 1")
    rows = Measurements("full_size")
    measure(args, rows)
    rows.write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
