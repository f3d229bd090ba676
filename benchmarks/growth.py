"""The time and the metrics of many edits: one sequence of edits, measured at several lengths.

    python -m benchmarks.growth                                  # K = 1, 10, 100, 1000 on a tiny backbone
    python -m benchmarks.growth --edits 1 10 100 --hparams hparams/tpatcher/tiny_blip2.yaml --json rows.json

The records are drawn with another seed than the benchmark's, into ``--data``: the backbone gets all of them
wrong, and nothing was tuned on them. After K edits the five metrics and the hard probes are those of all K
records, evaluated with all K edits (K = 1 and 10: means over the first 100 records, edited K at a time). The
time of a token is measured on an edited question, with its edit alone and with K, alternating: the edit
applies both times.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measuring import Measurements
from scripts.tiny import make_data
from unike import runs
from unike.backbones import load_backbone
from unike.config.hparams import HyperParams
from unike.edits import Edit
from unike.evaluation.metrics import score
from unike.evaluation.reader import Reader
from unike.report.paper import published
from unike.runs import inputs
from unike.system import launching
from unike.types import FIVE_METRICS, METRICS, Case, UserError

# Records for K = 1 and 10; tokens and paired runs of a token's time.
FEW, TOKENS, ROUNDS = 100, 24, 9


def draw_records(hparams: HyperParams, folder: Path, records: int, seed: int) -> HyperParams:
    """The YAML with its own records as ``eval``; draws them if they are missing."""
    values = hparams.to_dict()
    data = {"vqa": {**values["data"]["vqa"], "eval": str(folder / "vqa_eval.json")}}
    if not (folder / "vqa_eval.json").is_file():
        make_data.make(load_backbone(hparams), folder, "eval", records, seed)
    return HyperParams.from_dict(
        {**values, "data": {**values["data"], **data}, "image_root": str(folder), "generate_data": False},
        source=hparams.source,
    )


def score_cases(reader: Reader, cases: Sequence[Case], edit: Edit) -> Iterator[dict[str, float]]:
    """Each case's metrics with ``edit``, teacher-forced."""
    for case, asked in reader.predict_all(cases, edit, generated=False):
        base = reader.predict_base(case)
        yield {p.name: score(p, b, a) for p, b, a in zip(case.probes, base, asked.predictions, strict=True)}


def average(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {m: 100 * statistics.fmean(f[m] for f in found) for m in METRICS}


def time_token(parts: runs.Parts, edit: Edit, case: Case) -> float:
    """Seconds of a generated token with ``edit``, including its share of the prompt's forward pass."""
    backbone: Any = parts.backbone
    batch = backbone.encode([case.request.query.image], [case.request.query.prompt], padding_side="left")
    with torch.no_grad(), edit.applied(backbone):
        started = time.perf_counter()
        with backbone.prompt.announce(batch):
            backbone.model.language_model.generate(
                inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask, do_sample=False,
                max_new_tokens=TOKENS, min_new_tokens=TOKENS, pad_token_id=backbone.eos_ids[0],
            )  # fmt: skip
        return (time.perf_counter() - started) / TOKENS


class Growth:
    """One sequence of edits, measured at the wanted lengths."""

    def __init__(self, parts: runs.Parts, cases: Sequence[Case], rows: Measurements, case: str) -> None:
        self.parts, self.cases, self.rows, self.case = parts, cases, rows, case
        self.reader = parts.make_reader(generated=False)

    def edit(self, case: Case, history: Edit | None) -> Edit:
        return self.parts.method.edit(self.parts.backbone, case.request, self.reader.prefixes, history)

    def run(self, wanted: Sequence[int]) -> None:
        whole: Edit | None = None
        alone: list[Edit] = []
        seconds: list[float] = []
        for number, case in enumerate(tqdm(self.cases[: max(wanted)], desc="edits"), 1):
            self.reader.prefixes.state([case.request.query])
            started = time.perf_counter()
            edit = self.edit(case, whole)
            seconds.append(time.perf_counter() - started)
            whole = edit if whole is None else whole | edit
            alone += [edit] if number <= ROUNDS else []
            if number in wanted:
                self.measure(number, alone, whole, seconds)

    def measure(self, edits: int, alone: Sequence[Edit], whole: Edit, seconds: Sequence[float]) -> None:
        at, add = f"{self.case}, K = {edits}", self.rows.add
        gated = getattr(self.parts.hparams, "scope_gate", "none") != "none"
        add(at, "a new edit", seconds[-10:], "s")
        add(at, "bytes of an edit", [whole.nbytes / edits], "B")
        pairs = []
        for i in range(ROUNDS):
            place = i % len(alone)
            both = (alone[place], whole)
            pairs.append(tuple(time_token(self.parts, e, self.cases[place]) for e in both))
        add(at, "a token", [own for _, own in pairs], "s")
        goal = "<= 1.25" if gated and edits == 1000 else None
        add(at, "a token, against one edit", [own / one for one, own in pairs], "x", goal)
        found = average(self.score_edits(edits, whole))
        five = statistics.fmean(found[m] for m in FIVE_METRICS)
        add(at, "mean of the five metrics", [five], "%", ">= 95" if gated and edits == 1000 else None)
        for metric in METRICS:
            least = ">= 90" if gated and edits == 1000 and metric in FIVE_METRICS else None
            add(at, metric, [found[metric]], "%", least)

    def score_edits(self, edits: int, whole: Edit) -> list[dict[str, float]]:
        if edits >= FEW:
            return list(score_cases(self.reader, self.cases[:edits], whole))
        out: list[dict[str, float]] = []
        for start in range(0, FEW, edits):
            part: Edit | None = None
            for case in self.cases[start : start + edits]:
                one = self.edit(case, part)
                part = one if part is None else part | one
            assert part is not None
            out += score_cases(self.reader, self.cases[start : start + edits], part)
        return out


def add_published(rows: Measurements, family: str) -> None:
    """Adds the published lifelong figures at 1,000 edits, which are of full-size models."""
    for method, figures in published.read_lifelong(family).get(1000, {}).items():
        mean = statistics.fmean(v for v in figures.values() if v is not None)
        case = f"published: {method}, K = 1000 (full-size model: not comparable)"
        rows.add(case, "mean of the five metrics", [mean], "%")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--hparams", default="hparams/scoped/tiny_blip2.yaml", metavar="FILE")
    add("--edits", type=int, nargs="+", default=[1, 10, 100, 1000], metavar="K")
    add("--data", type=Path, default=Path("data/cache/growth/tiny_blip2"), metavar="DIR")
    add("--seed", type=int, default=43, help="for drawing the records")
    add("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if min(args.edits) < 1:
        raise UserError(f"--edits: {min(args.edits)}; expected 1 or more")
    read = HyperParams.from_hparams(args.hparams)
    hparams = draw_records(read, args.data, max(1000, *args.edits), args.seed)
    backbone = load_backbone(hparams)
    parts = runs.assemble(replace(hparams, eval_batch=64), backbone)
    cases = inputs.open_datasets(hparams, "vqa", max(args.edits))
    rows = Measurements("growth")
    Growth(parts, cases, rows, args.hparams.removeprefix("hparams/")).run(args.edits)
    add_published(rows, hparams.model_name)
    rows.write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(launching.run_guarded(main))
