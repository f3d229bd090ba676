"""Retrieval from knowledge memories of a thousand to a million items: exact, and with FAISS from disk.

    python -m benchmarks.retrieval                           # the tiny backbone's width, and 768
    python -m benchmarks.retrieval --items 1000 100000 --hparams hparams/blip2.yaml --json rows.json

Items are clustered like the states of questions of one kind: about 200 around each centre, cosine 0.5 with
each other and 0 with those of other clusters (``--spread``: the size of the noise relative to the centre). A
query is a further point of some cluster. ``--vectors noise`` has no clusters: the worst case of an inverted
file. Recall is the share of the 40 items nearest by exact search that FAISS also finds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.progress import track
from safetensors import safe_open
from transformers import AutoConfig

from benchmarks.measuring import Measurements
from unike.config.hparams import HyperParams
from unike.knowledge.disk import DiskPairs
from unike.knowledge.index import TAIL, IndexedMemory, check_faiss
from unike.knowledge.memory import KnowledgeMemory
from unike.system import launching

K, RUNS, PER_CLUSTER, QUERIES, APPENDED = 40, 7, 200, 320, 100
CHUNK = 50_000
Row = dict[str, Any]


def read_width(yaml: str) -> int:
    """The decoder's width: from the stored knowledge, or from the model's configuration."""
    hparams = HyperParams.from_hparams(yaml)
    path = Path(str(hparams.knowledge_dir)) / "knowledge.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            name = next(n for n in file.keys() if n.endswith(".sem"))  # noqa: SIM118
            return file.get_slice(name).get_shape()[1]
    return AutoConfig.from_pretrained(hparams.name).get_text_config().hidden_size


class Vectors:
    """Points ``(n, d)`` in half precision, in chunks; the same for the same seed."""

    def __init__(self, items: int, width: int, kind: str, spread: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.width, self.spread = width, spread
        self.centres = torch.randn(max(5, items // PER_CLUSTER), width, generator=generator)
        self.clustered = kind == "clustered"

    def draw(self, count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, self.width, generator=generator)
        if not self.clustered:
            return noise.half()
        at = torch.randint(len(self.centres), (count,), generator=generator)
        return noise.mul_(self.spread).add_(self.centres[at]).half()

    def draw_chunks(self, items: int) -> Iterator[torch.Tensor]:
        for start in range(0, items, CHUNK):
            yield self.draw(min(CHUNK, items - start), 1 + start)


def time_call(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def time_retrievals(memory: KnowledgeMemory, queries: torch.Tensor, batch: int) -> list[float]:
    """Milliseconds of a retrieval of ``batch`` queries, others in each run; the first run is a warm-up."""
    starts = [(i * batch) % (len(queries) - batch + 1) for i in range(RUNS + 1)]
    return [1e3 * time_call(lambda s=s: memory.retrieve(queries[s : s + batch], K)) for s in starts][1:]


def measure(items: int, width: int, args: argparse.Namespace, folder: Path) -> list[Row]:
    """All rows of one size: exact search in memory, then FAISS over memory-mapped pairs."""
    vectors, case = Vectors(items, width, args.vectors, args.spread), f"{items} x {width}"
    rows: list[Row] = []

    def add_row(metric: str, unit: str, runs: list[float]) -> None:
        median = statistics.median(runs)
        rows.append(
            {"benchmark": "retrieval", "case": case, "metric": metric, "median": median, "runs": runs}
            | {"unit": unit, "vectors": args.vectors}
        )

    queries = vectors.draw(QUERIES, 7_777_777)
    keys = torch.empty(items, width, dtype=torch.float16)
    for start, part in enumerate(vectors.draw_chunks(items)):
        keys[start * CHUNK : start * CHUNK + len(part)] = part
    exact = KnowledgeMemory(keys, keys)
    for batch in (1, 32):
        add_row(f"exact, {batch}", "ms", time_retrievals(exact, queries, batch))
    add_row("exact, bytes", "MB", [(exact.keys.nbytes + exact.directions.nbytes) / 1e6])
    truth = torch.cat([exact.retrieve(q, K).index for q in queries.split(32)])
    del exact
    pairs = DiskPairs.create(folder, width, torch.float16)
    # Keys serve as values: retrieval returns indices only.
    pairs.append(keys, keys)
    del keys
    memory = IndexedMemory(pairs, tail=max(items, TAIL))
    add_row("FAISS, build", "s", [time_call(memory.build)])
    del memory
    opened: list[IndexedMemory] = []
    add_row(
        "FAISS, open",
        "ms",
        [1e3 * time_call(lambda: opened.append(IndexedMemory(DiskPairs(folder)))) for _ in range(RUNS)],
    )
    memory = opened[-1]
    for batch in (1, 32):
        add_row(f"FAISS, {batch}", "ms", time_retrievals(memory, queries, batch))
    found = torch.cat([memory.retrieve(q, K).index for q in queries.split(32)])
    same = (found[:, :, None] == truth[:, None, :]).any(-1).float().mean(1)
    add_row("FAISS, recall@40", "share", [same.mean().item()])
    add_row("FAISS, index", "MB", [sum(f.stat().st_size for f in folder.glob("*.faiss")) / 1e6])
    more = [vectors.draw(APPENDED, 9_000_000 + i) for i in range(RUNS)]
    add_row(
        f"FAISS, append {APPENDED}", "ms", [1e3 * time_call(lambda p=p: memory.append(p, p)) for p in more]
    )
    return rows


def format_table(rows: list[Row]) -> str:
    """One line for each size, one column for each metric: medians."""
    cases = list(dict.fromkeys(str(r["case"]) for r in rows))
    metrics = list(dict.fromkeys((str(r["metric"]), str(r["unit"])) for r in rows))
    cells = {(r["case"], r["metric"]): f"{r['median']:.3g}" for r in rows}
    lines = ["| items x width | " + " | ".join(f"{m} [{u}]" for m, u in metrics) + " |"]
    lines.append("| --- |" + " ---: |" * len(metrics))
    for case in cases:
        lines.append(f"| {case} | " + " | ".join(cells.get((case, m), "") for m, _ in metrics) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[10**n for n in (3, 4, 5, 6)])
    parser.add_argument("--hparams", default="hparams/tiny_blip2.yaml", help="whose width is measured")
    parser.add_argument("--widths", type=int, nargs="*", default=[768], help="further widths")
    parser.add_argument("--vectors", choices=("clustered", "noise"), default="clustered")
    parser.add_argument("--spread", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="file that the rows are written to")
    args = parser.parse_args()
    check_faiss("faiss", "benchmarks/retrieval.py")
    sizes = [(m, w) for w in dict.fromkeys([read_width(args.hparams), *args.widths]) for m in args.items]
    rows: list[Row] = []
    with TemporaryDirectory() as root:
        for items, width in track(sizes, "retrieval", transient=True):
            folder = Path(root) / f"{items}-{width}"
            rows += measure(items, width, args, folder)
            shutil.rmtree(folder)
    print(f"{args.vectors} vectors; threads: {torch.get_num_threads()} on {os.cpu_count()} cores\n")
    print(format_table(rows))
    if args.json is not None:
        report = Measurements("retrieval")
        for r in rows:
            report.keep(str(r["case"]), str(r["metric"]), r["runs"], str(r["unit"]))
        report.write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(launching.run_guarded(main))
