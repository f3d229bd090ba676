"""One UniKE edit with all five probes at full dimensions, in bf16 on the CPU: seconds of each part, memory.

``python -m benchmarks.full_size --model blip2 --weights DIR`` builds random weights into ``DIR`` once (7.5
GB; ``minigpt4``: 15.7 GB). ``--reference`` also times the reference procedure at a few steps and scales
its training to as many as ours.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measuring import Rows, resident, timed
from benchmarks.models import full_hparams, knowledge_folder, load_full, random_cases
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
# Seconds of one edit with its probes, and GB of memory, where a bound is set.
SECONDS = {"blip2": "<= 60"}
MEMORY = {"minigpt4": "<= 24"}
FEW = 2


def method_of(backbone: VisionLanguageBackbone, hparams: HyperParams, knowledge: Path) -> UniKE:
    """The method with the memory and encoders that the folder holds."""
    method = build(hparams, read_knowledge(knowledge, hparams, backbone.device))
    assert isinstance(method, UniKE)
    return method


def _bytes(known: LayerKnowledge) -> int:
    bank = {t.data_ptr(): t.nbytes for t in vars(known.bank).values() if isinstance(t, torch.Tensor)}
    return sum(bank.values()) + sum(p.nbytes for p in known.semantic.parameters())


def one_edit(backbone: VisionLanguageBackbone, method: UniKE, case: Case) -> dict[str, float]:
    """Seconds of each part of a record's edit from cold."""
    backbone.cache = FeatureCache(backbone.cache.compute)
    prefixes = open_prefixes(method.hparams, backbone, method.layers(backbone)[0])
    reader = Reader(backbone, prefixes, generated=False)
    queries = [p.query for p in case.probes]
    pictures = list({id(q.image): q.image for q in queries if q.image is not None}.values())
    spent = {}
    _, spent["pictures"] = timed(lambda: backbone.cache.seen(pictures, backbone.vision.pixels))
    _, spent["prefixes"] = timed(lambda: prefixes.state(queries))
    before, spent["probes before"] = timed(lambda: reader.predict_base(case))
    edit, spent["edit"] = timed(lambda: method.edit(backbone, case.request, prefixes))
    _, spent["probes after"] = timed(lambda: reader.predict_edited(case, edit, before))
    return spent


def reference_seconds(backbone: VisionLanguageBackbone, method: UniKE, case: Case) -> float:
    """Seconds of the reference at the method's steps: probes as measured, training scaled up from a few."""
    few = UniKE(replace(method.hparams, max_steps=FEW), method.knowledge)
    reference, training = Reference(backbone, few), [0.0]
    train = reference.train

    def clocked(*given: object) -> list[float]:
        losses, training[0] = timed(lambda: train(*given))  # type: ignore[arg-type]
        return losses

    reference.train = clocked  # type: ignore[method-assign, assignment]
    _, whole = timed(lambda: reference.record(case))
    return whole - training[0] + training[0] * (method.hparams.max_steps + 1) / (FEW + 1)


def measure(given: argparse.Namespace, rows: Rows) -> None:
    """Loads, edits, adds the rows."""
    folder, title = given.weights / given.model, TITLES[given.model]
    hparams = full_hparams(given.steps, given.encoder_hidden)
    # In another process: what it takes to write them is not what an edit takes.
    subprocess.run(
        [sys.executable, "-m", "benchmarks.models", "--model", given.model, "--weights", str(given.weights),
         "--items", str(given.items), "--encoder-hidden", str(hparams.encoder_hidden)],
        check=True,
    )  # fmt: skip
    backbone, loading = timed(lambda: load_full(given.model, folder))
    weights = sum(p.nbytes for p in backbone.model.parameters())
    rows.add(title, "weights, bf16", [weights / 1e9], "GB")
    rows.add(title, "loading", [loading], "s")
    rows.add(title, "peak resident after loading / weights", [resident("VmHWM") / weights], "x")
    knowledge = knowledge_folder(given.model, given.weights, hparams, given.items)
    method = method_of(backbone, hparams, knowledge)
    held = sum(_bytes(known) for known in method.knowledge.values())
    rows.add(title, "memory and encoders", [held / 1e9], "GB")
    cases = random_cases(given.runs, backbone.vision.image_size)
    parts = [one_edit(backbone, method, case) for case in cases]
    case = f"{title}, {given.steps} steps"
    for name in parts[0]:
        rows.add(case, f"{name}: time", [p[name] for p in parts], "s")
    whole = [sum(p.values()) for p in parts]
    rows.add(case, "edit and five probes, cold", whole, "s", SECONDS.get(given.model))
    peak = resident("VmHWM")
    rows.add(title, "peak resident", [peak / 1e9], "GB", MEMORY.get(given.model))
    rows.add(title, "peak resident / weights", [peak / weights], "x", "<= 1.1")
    rows.add(title, "of it file pages (can be given back)", [resident("RssFile") / 1e9], "GB")
    if given.reference:
        taken = reference_seconds(backbone, method, cases[0])
        rows.add(case, f"reference, training scaled from {FEW} steps", [taken], "s")
        rows.add(case, "reference / ours", [taken / s for s in whole], "x", ">= 5")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=sorted(TITLES), required=True)
    parser.add_argument("--weights", type=Path, required=True, help="parent of the models' folders")
    parser.add_argument("--steps", type=int, default=10, help="training steps of the edit")
    parser.add_argument("--items", type=int, default=2000, help="states in each layer's bank")
    parser.add_argument(
        "--encoder-hidden", type=int, help="hidden width of the encoders; default: the YAML's"
    )
    parser.add_argument("--runs", type=int, default=1, help="edits, each of another record, from cold")
    parser.add_argument("--reference", action="store_true", help="time the reference procedure too")
    parser.add_argument("--json", type=Path, help="where the rows are written to")
    given = parser.parse_args(arguments)
    if min(given.steps, given.items, given.runs) < 1:
        parser.error("--steps, --items and --runs: expected at least 1")
    rows = Rows("full_size")
    measure(given, rows)
    rows.write(given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
