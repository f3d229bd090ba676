"""What a scope classifier's preparation takes at full width, on random weights: a decoder of width 4,096 with
2 layers and prompts of 636 tokens, and 2,000 records' states at random.

``python -m benchmarks.scope_scale --json results/benchmarks/scope_scale.json``. Rows named "before" are
arithmetic: that form takes more memory than this machine has. Rows named "extrapolated" say from what.
Seconds are those of the processor, with one thread: others may use the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.measuring import Measurements, read_resident
from benchmarks.models import draw_cases, make_opt_config, make_random_backbone
from unike.backbones import load_backbone
from unike.backbones.base import Backbone
from unike.backbones.prefix import PrefixCache
from unike.config.hparams import HyperParams
from unike.datasets.triplets import make_triplets
from unike.knowledge.scope import fit_scope
from unike.knowledge.scope_states import GB, ScopeStates, StateRows
from unike.methods.preparation.knowledge import extract_states
from unike.methods.preparation.scope import collect_scope_samples, make_scope_encoder
from unike.methods.preparation.training_cases import INSIDE, OUTSIDE, make_training_cases
from unike.runs.costs import ModelSize, ScopeCost, count_parameters, estimate_scope, measure_speed
from unike.types import Case

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
IMAGE_TOKENS, TEXT_TOKENS = 576, 60
# LLaVA-1.5-7B: parameters of its decoder; tokens and vision encoder as above.
PUBLISHED = 6_607_000_000
LAYERS, FIRST = 2, 1


def spend(run: Callable[[], T]) -> tuple[T, float]:
    """The value of ``run()``, and the processor's seconds."""
    started = time.process_time()
    value = run()
    return value, time.process_time() - started


def lengthen(cases: Sequence[Case], backbone: Backbone) -> list[Case]:
    """The records with prompts of about ``TEXT_TOKENS`` tokens."""

    def fill(prompt: str) -> str:
        while len(backbone.tokens(prompt)) < TEXT_TOKENS - 4:
            prompt = f"so {prompt}"
        return prompt

    out = []
    for case in cases:
        probes = tuple(replace(p, query=replace(p.query, prompt=fill(p.query.prompt))) for p in case.probes)
        asked = replace(case.request.query, prompt=fill(case.request.query.prompt))
        out.append(replace(case, request=replace(case.request, query=asked), probes=probes))
    return out


def measure_training(hparams: HyperParams, width: int, steps: int, rows: Measurements) -> None:
    """States of all records, at random, and some steps of training on them."""
    size = ModelSize(width, PUBLISHED, IMAGE_TOKENS, 0, 0)
    cost = estimate_scope(hparams, size)
    case = f"scope classifier, width {width}"
    base = read_resident("VmHWM")
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        kept = StateRows(Path(folder), cost.memory_limit, int(hparams.scope_disk_gb * GB))
        generator = torch.Generator().manual_seed(0)

        def draw() -> None:
            for _ in range(cost.records * cost.queries):
                kept.append(torch.randn(cost.tokens, width, generator=generator))

        draw()
        rows.add(case, "states in memory", [kept.memory_bytes / GB], "GB", "<= 2")
        rows.add(case, "states on disk", [kept.disk_bytes / GB], "GB")
        samples = ScopeStates(kept, cost.queries, len(INSIDE))
        torch.manual_seed(0)
        encoder = make_scope_encoder(width, hparams)
        count = sum(p.numel() for p in encoder.parameters())
        rows.add(case, "parameters", [count / 1e6], "M", "<= 8")
        marks = list[float]()
        batch, lr, tau = hparams.scope_batch, hparams.scope_lr, hparams.scope_tau
        _, few = spend(lambda: fit_scope(samples, encoder, 0, batch, lr, tau, 0))
        encoder.requires_grad_(True)

        def mark() -> None:
            marks.append(time.process_time())

        fit_scope(samples, encoder, steps + 1, batch, lr, tau, 0, mark)
    step = (marks[-1] - marks[0]) / steps
    rows.add(case, f"a step of {batch} records, mean of {steps}", [step], "s")
    rows.add(case, "thresholds, or a validation, on 200 held-out records", [few], "s")
    whole = hparams.scope_steps * (step + few / hparams.scope_val_every) + few
    rows.add(case, f"training to the cap of {hparams.scope_steps} steps, extrapolated", [whole / 3600], "h")
    rows.add(
        case, "peak resident beyond torch: states and training", [(read_resident("VmHWM") - base) / GB], "GB"
    )
    add_before(hparams, size, cost, rows)


def add_before(hparams: HyperParams, size: ModelSize, cost: ScopeCost, rows: Measurements) -> None:
    """What the classifier took before, by arithmetic."""
    case = f"before, width {size.width}, by arithmetic"
    former = replace(hparams, scope_tokens=None, scope_width=size.width, scope_steps=1000)
    whole = estimate_scope(former, size)
    rows.add(case, "states, padded, in memory", [whole.states / GB], "GB")
    rows.add(case, "at peak, as rows and padded", [2 * whole.states / GB], "GB")
    rows.add(case, "parameters", [count_parameters(former, size.width) / 1e6], "M")
    # Each parameter met each token.
    former_step = 6.0 * whole.parameters * whole.batch * whole.queries * whole.tokens
    per_step = former_step / (cost.training_flops / cost.steps)
    rows.add(case, "operations of a step / today's", [per_step], "x")


def measure_reading(hparams: HyperParams, width: int, records: int, rows: Measurements) -> None:
    """Forward passes over a few records: each query alone, and batched."""
    config = make_opt_config(width, LAYERS, vision_layers=2, vision_width=64, queries=IMAGE_TOKENS)
    config.text_config.max_position_embeddings = 1024
    config.text_config.ffn_dim = width
    backbone = make_random_backbone(config)
    cases = lengthen(draw_cases(records, backbone.vision.image_size), backbone)
    case = f"reading, width {width}, {LAYERS} layers, float32"
    queries = records * len(INSIDE + OUTSIDE)
    found, taught = {}, make_training_cases(cases)
    for name, size in (("alone", 1), ("batched", hparams.states_batch)):
        backbone.keep_features(None, size == 1)
        prefixes = PrefixCache(backbone, FIRST, 0, size, alone=size == 1)

        def read(size: int = size, prefixes: PrefixCache = prefixes) -> ScopeStates:
            return collect_scope_samples(
                backbone, taught, FIRST, size, prefixes=prefixes, tokens=hparams.scope_tokens
            )

        found[name], spent = spend(read)
        rows.add(case, f"a forward pass, {name}, mean of {queries}", [spent / queries], "s")
    far = max(
        float((a.float() - b.float()).abs().max())
        for a, b in zip(*(s.rows.read(range(queries)) for s in found.values()), strict=True)
    )
    rows.add(case, "largest difference of a state, batched from alone", [far], "")
    # By operations: this decoder's layers against the published one's.
    own = LAYERS * 6 * width**2 + width * config.text_config.vocab_size
    passes = hparams.scope_records * len(INSIDE + OUTSIDE)
    whole = passes * spent / queries * PUBLISHED / own
    rows.add(case, f"{passes} passes of 6.6 B parameters on this CPU, extrapolated", [whole / 3600], "h")
    speed = measure_speed(replace(hparams, dtype="float32", device="cpu"))
    if speed is not None:
        # One query of a record has no image.
        seen = (queries - records) / queries
        told = 2.0 * own * (seen * IMAGE_TOKENS + TEXT_TOKENS) / speed
        rows.add(case, "a pass, measured / as --check estimates it", [spent / queries / told], "x")
    rows.add(case, "peak resident", [read_resident("VmHWM") / GB], "GB")
    weights = sum(p.nbytes for p in backbone.model.parameters())
    rows.add(case, "of it weights", [weights / GB], "GB")


def measure_toy(records: int, rows: Measurements) -> None:
    """Knowledge and scope states of the bundled BLIP2-OPT: each query alone, and batched."""
    hparams = HyperParams.from_hparams(ROOT / "hparams/scoped/tiny_blip2.yaml", ["device=cpu"])
    backbone = load_backbone(hparams)
    cases = draw_cases(records, backbone.vision.image_size)
    taught = make_training_cases(cases)
    triplets = [replace(t, wrong=t.wrong or "an owl") for t in make_triplets(cases)]
    layers = hparams.list_layers(len(backbone.layout))
    spent: dict[str, dict[str, float]] = {"scope": {}, "knowledge": {}}
    for name, size in (("alone", 1), ("batched", hparams.states_batch)):

        def open_cache(size: int = size) -> PrefixCache:
            backbone.keep_features(None, size == 1)
            return PrefixCache(backbone, layers[0], 0, size, alone=size == 1)

        def read_scope(size: int = size, cache: Callable[[], PrefixCache] = open_cache) -> object:
            return collect_scope_samples(backbone, taught, layers[0], size, prefixes=cache())

        def read_knowledge(size: int = size, cache: Callable[[], PrefixCache] = open_cache) -> object:
            return extract_states(backbone, triplets, layers, size, prefixes=cache())

        for what, run in (("scope", read_scope), ("knowledge", read_knowledge)):
            _, spent[what][name] = spend(run)
    for what, seconds in spent.items():
        case = f"{what} states, tiny_blip2.yaml, {records} records"
        rows.add(case, "each query alone / batched", [seconds["alone"] / seconds["batched"]], "x")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--records", type=int, default=1, help="records that are read by the wide decoder")
    parser.add_argument("--steps", type=int, default=4, help="training steps that are measured")
    parser.add_argument("--json", type=Path, help="where the rows are written to")
    args = parser.parse_args(arguments)
    if min(args.width, args.records, args.steps) < 1:
        parser.error("--width, --records and --steps: expected at least 1")
    torch.set_num_threads(1)
    rows = Measurements("scope_scale")
    hparams = HyperParams.from_hparams(ROOT / "hparams/scoped/llava.yaml", ["scope_probes=recombined"])
    # In this order: a peak is that of all before it.
    measure_training(hparams, args.width, args.steps, rows)
    measure_toy(60, rows)
    measure_reading(hparams, args.width, args.records, rows)
    rows.write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
