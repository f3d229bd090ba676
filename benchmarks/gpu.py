"""What this project does on a GPU, in one command of under eight minutes.

    python -m benchmarks.gpu --json results/benchmarks/gpu.json
    python -m benchmarks.gpu --device cpu --scale small      # the same script in seconds, without a GPU

Weights are random and drawn on the device. Nothing is read but the bundled tokenizers. First comes parity
with the CPU, then the matmul peak. Then, for BLIP2-OPT-2.7B, MiniGPT-4-7B and LLaVA-1.5-7B in bf16: an edit
with its probes, a step's share of the peak, edits in batches of 1, 2, 4, ... until memory ends, knowledge
states, edits on top of each other, the time of a token under them, and peak memory. A part that fails is a
line, and the next one follows; those that would start after ``--minutes`` are named. int8 and int4 through
bitsandbytes need a folder (``--weights``), several processes ``--processes 2``. Exit code 1 where a part
failed, or parity was missed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_models import SCALES, TITLES, Scale, draw_backbone, make_method
from benchmarks.measuring import Measurements
from benchmarks.models import draw_cases, write_random_folder
from unike.backbones import load_backbone
from unike.backbones.base import encode_queries
from unike.backbones.placement import pick_device
from unike.backbones.prefix import open_prefixes
from unike.backbones.vlm import VisionLanguageBackbone
from unike.datasets.triplets import Triplet
from unike.edits import Edit, compose
from unike.evaluation.reader import Reader
from unike.methods.preparation.knowledge import extract_states
from unike.methods.unike import UniKE
from unike.runs.records import read_records
from unike.system.launching import run_guarded
from unike.system.shipped import EXAMPLE, find_shipped
from unike.types import BackboneSpec, UserError

T = TypeVar("T")
# Largest difference of logits from the CPU's, as a share of their largest.
PARITY = {torch.float32: "<= 0.001", torch.bfloat16: "<= 0.05"}
TOKENS = 24


class Session:
    """The parts that ran on one device: their rows, their failures, and what was left out."""

    def __init__(self, device: torch.device, scale: Scale, minutes: float, rows: Measurements) -> None:
        self.device, self.scale, self.rows = device, scale, rows
        self.until = time.monotonic() + 60 * minutes
        self.failed: list[str] = []
        self.skipped: list[str] = []

    def run(self, name: str, part: Callable[[], None]) -> None:
        """One part; what it raises is a line. Memory that it held is free for the next one."""
        if time.monotonic() > self.until:
            self.skipped.append(f"{name}: its time was over")
            return
        try:
            part()
        except Exception as error:
            self.failed.append(name)
            print(
                f"{name}: failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}", file=sys.stderr
            )
        gc.collect()
        if self.device.type != "cpu":
            torch.get_device_module(self.device).empty_cache()

    def time(self, run: Callable[[], T]) -> tuple[T, float]:
        """The value of ``run()``, and its seconds until the device has finished."""
        self.wait()
        started = time.perf_counter()
        value = run()
        self.wait()
        return value, time.perf_counter() - started

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def read_peak(self) -> float | None:
        """GB at the peak since the last call, or None where the device does not count them."""
        if self.device.type == "cpu":
            return None
        module = torch.get_device_module(self.device)
        peak = float(module.max_memory_allocated()) / 1e9
        module.reset_peak_memory_stats()
        return peak


# ---------------------------------------------------------------- parity, and the peak


def compare_devices(session: Session, dtype: torch.dtype) -> None:
    """Logits without and with an edit on the device, against the same weights on the CPU in float32."""
    found = []
    small = SCALES["small"]
    for device, kind in ((torch.device("cpu"), torch.float32), (session.device, dtype)):
        # Drawn on the CPU: generators of devices differ.
        backbone = draw_backbone("blip2", small, torch.device("cpu"), torch.float32)
        backbone.model.to(device, kind)
        method = make_method(backbone, small, max_steps=5)
        (case,) = draw_cases(1, get_image_size(backbone))
        prefixes = open_prefixes(method.hparams, backbone, method.layers(backbone)[0])
        edit = method.edit(backbone, case.request, prefixes)
        asked = [case.request.query]
        with torch.no_grad():
            base = backbone(encode_queries(backbone, asked)).logits.float().cpu()
            with edit.applied(backbone):
                edited = backbone(encode_queries(backbone, asked)).logits.float().cpu()
        found.append((base, edited))
    (base, edited), (own_base, own_edited) = found
    name = f"parity, {str(dtype).removeprefix('torch.')}"
    # In bf16 each step of the training rounds anew: the edits are two, so there is no target.
    pairs = (
        ("logits", base, own_base, True),
        ("logits under an edit", edited, own_edited, dtype.itemsize > 2),
    )
    for what, wanted, got, is_held in pairs:
        share = float((wanted - got).abs().max() / wanted.abs().max())
        target = PARITY[dtype] if is_held else None
        session.rows.add(name, f"{what}: largest difference, share", [share], "", target)
    moved = float((edited - base).abs().max() / base.abs().max())
    session.rows.add(name, "what the edit changes, share", [moved], "")


def measure_peak(session: Session, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, the best of some."""
    side = 8192 if session.scale.is_full else 128
    one, other = (torch.randn(side, side, device=session.device, dtype=dtype) for _ in range(2))
    session.time(lambda: one @ other)
    return max(2 * side**3 / session.time(lambda: one @ other)[1] for _ in range(5))


# ---------------------------------------------------------------- one family


class Family:
    """The parts of one model. ``start`` draws its weights; the others need it."""

    def __init__(self, session: Session, name: str, peak: float | None) -> None:
        self.session, self.name, self.title, self.peak = session, name, TITLES[name], peak
        self.backbone: VisionLanguageBackbone | None = None

    def start(self) -> None:
        draw = partial(draw_backbone, self.name, self.session.scale, self.session.device, torch.bfloat16)
        self.backbone, seconds = self.session.time(draw)
        weights = sum(p.nbytes for p in self.backbone.model.parameters()) / 1e9
        self._add("weights, bf16", [weights], "GB")
        self._add("weights drawn", [seconds], "s")
        self.session.read_peak()

    def edit_once(self) -> None:
        """An edit with its five probes, caches empty, after one that warms the device up; peak memory."""
        backbone, method = self._get(), make_method(self._get(), self.session.scale)
        spent = []
        for case in draw_cases(4, get_image_size(backbone)):
            reader = self._open(method)
            before = reader.predict_base(case)
            edit, seconds = self.session.time(
                lambda c=case, r=reader: method.edit(backbone, c.request, r.prefixes)  # type: ignore[misc]
            )
            _, after = self.session.time(lambda c=case, r=reader, e=edit, b=before: r.predict_edited(c, e, b))  # type: ignore[misc]
            spent.append((seconds, after))
        self._add("an edit", [edit for edit, _ in spent[1:]], "s")
        self._add("probes after it", [after for _, after in spent[1:]], "s")
        if (peak := self.session.read_peak()) is not None:
            self._add("peak memory, an edit and its probes", [peak], "GB")

    def share_peak(self) -> None:
        """A training step's matrix products against the device's peak."""
        backbone = self._get()
        (case,) = draw_cases(1, get_image_size(backbone))
        few, many = (make_method(backbone, self.session.scale, max_steps=n) for n in (2, 12))
        prefixes = self._open(few).prefixes
        prefixes.state([case.request.query])
        flops, seconds = [], []
        for method in (few, many):
            edit = partial(method.edit, backbone, case.request, prefixes)
            edit()
            seconds.append(self.session.time(edit)[1])
            with FlopCounterMode(display=False) as counter:
                edit()
            flops.append(counter.get_total_flops())
        step, work = (seconds[1] - seconds[0]) / 10, (flops[1] - flops[0]) / 10
        self._add("a training step", [step], "s")
        if self.peak is not None and step > 0:
            self._add("a training step: share of the matmul peak", [work / step / self.peak], "")

    def edit_batches(self) -> None:
        """Seconds an edit in batches of 1, 2, 4, ... until memory ends, or 256."""
        backbone, method = self._get(), make_method(self._get(), self.session.scale)
        most = 256 if self.session.scale.is_full else 4
        cases = draw_cases(most, get_image_size(backbone))
        size = 1
        while size <= most and time.monotonic() < self.session.until:
            prefixes = self._open(method).prefixes
            requests = [case.request for case in cases[:size]]
            prefixes.state([request.query for request in requests])
            try:
                _, seconds = self.session.time(partial(method.edit_many, backbone, requests, prefixes))
            except torch.OutOfMemoryError:
                print(f"{self.title}: memory ends at a batch of {size}", flush=True)
                return
            self._add(f"an edit, in a batch of {size}", [seconds / size], "s")
            size *= 2

    def prepare(self) -> None:
        """Knowledge states by batch size: seconds a record."""
        backbone, method = self._get(), make_method(self._get(), self.session.scale)
        count = 64 if self.session.scale.is_full else 4
        made = draw_cases(count, get_image_size(backbone))
        triplets = [Triplet(c.request.query, "a goat") for c in made]
        for batch in (1, 32) if self.session.scale.is_full else (1, 4):
            extract = partial(extract_states, backbone, triplets, method.layers(backbone), batch)
            _, seconds = self.session.time(extract)
            self._add(f"knowledge states of a record, batches of {batch}", [seconds / count], "s")

    def edit_in_sequence(self) -> None:
        """Edits on top of each other; then the time of a token without, and under one and many edits."""
        backbone, method = self._get(), make_method(self._get(), self.session.scale)
        wanted, many = (100, 1000) if self.session.scale.is_full else (3, 5)
        cases, edits, whole = draw_cases(wanted, get_image_size(backbone)), list[Edit](), None
        prefixes = self._open(method).prefixes
        spent = []
        for case in cases:
            run = partial(method.edit, backbone, case.request, prefixes, history=whole)
            edit, seconds = self.session.time(run)
            edits.append(edit)
            spent.append(seconds)
            whole = compose(edits)
        self._add(f"an edit, median of a sequence of {wanted}", [statistics.median(spent)], "s")
        self._add(f"the last of {wanted} edits / the second", [spent[-1] / spent[1]], "x")
        query = cases[0].request.query
        copies = [edits[i % len(edits)] for i in range(many)]
        taken = {0: self._time_token(query.image, query.prompt, None)}
        for count, some in ((1, edits[:1]), (many, copies)):
            taken[count] = self._time_token(query.image, query.prompt, compose(some))
        for count, seconds in taken.items():
            self._add(f"tokens a second, {count} edits", [1 / seconds], "1/s")

    def _time_token(self, image: object, prompt: str, edit: Edit | None) -> float:
        """Seconds of a token: what ``TOKENS`` more of them add to an answer."""
        backbone = self._get()

        def answer(count: int) -> None:
            if edit is None:
                backbone.generate([image], [prompt], count)  # type: ignore[list-item]
            else:
                with edit.applied(backbone):
                    backbone.generate([image], [prompt], count)  # type: ignore[list-item]

        answer(2)
        spent = []
        for _ in range(3):
            few, many = (self.session.time(partial(answer, n))[1] for n in (2, 2 + TOKENS))
            spent.append(max(many - few, 1e-9) / TOKENS)
        return statistics.median(spent)

    def _open(self, method: UniKE) -> Reader:
        backbone = self._get()
        return Reader(
            backbone, open_prefixes(method.hparams, backbone, method.layers(backbone)[0]), generated=False
        )

    def _get(self) -> VisionLanguageBackbone:
        if self.backbone is None:
            raise UserError(f"{self.title}: its weights could not be drawn")
        return self.backbone

    def _add(self, metric: str, values: Sequence[float], unit: str) -> None:
        self.session.rows.add(self.title, metric, values, unit)


def get_image_size(backbone: VisionLanguageBackbone) -> int:
    """Pixels a side of the images that the vision tower takes."""
    size: int = backbone.model.config.vision_config.image_size
    return size


# ---------------------------------------------------------------- what needs files, or processes


def edit_quantized(session: Session, weights: Path, kind: str) -> None:
    """An edit of BLIP2-OPT-2.7B in int8 or int4, from a folder of random weights that is written once."""
    folder = write_random_folder("blip2", weights / "blip2")
    spec = BackboneSpec(model_name="blip2", name=str(folder), dtype="bfloat16", quantization=kind)
    backbone, loading = session.time(lambda: load_backbone(spec))
    method, title = make_method(backbone, session.scale), f"{TITLES['blip2']}, {kind}"
    session.rows.add(title, "loading", [loading], "s")
    session.read_peak()
    (case,) = draw_cases(1, get_image_size(backbone))
    prefixes = open_prefixes(method.hparams, backbone, method.layers(backbone)[0])
    _, seconds = session.time(lambda: method.edit(backbone, case.request, prefixes))
    session.rows.add(title, "an edit", [seconds], "s")
    if (peak := session.read_peak()) is not None:
        session.rows.add(title, "peak memory, an edit", [peak], "GB")


def compare_processes(session: Session, count: int) -> None:
    """Six records of the example by one process and by ``count``: seconds, and the share of equal answers."""
    example = find_shipped(EXAMPLE)
    options = [f"data.vqa.eval={example}/vqa_eval.json", f"image_root={example}", "generate_data=false"]
    answers = []
    with TemporaryDirectory() as folder:
        for processes in (1, count):
            run = Path(folder, str(processes))
            line = [sys.executable, "-m", "unike", "edit", "--hparams", "ft/tiny_blip2", "--size", "6"]
            line += ["--output", str(run), "--num_processes", str(processes), *options]
            line.append(f"device={session.device.type}")
            started = time.perf_counter()
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
            spent = time.perf_counter() - started
            session.rows.add("two processes", f"six edits by {processes}", [spent], "s")
            kept = {r.id: {p: a.after for p, a in r.answers.items()} for r in read_records(run)}
            answers.append(kept)
    one, other = answers
    equal = [one[name] == other.get(name) for name in one]
    session.rows.add("two processes", "records with equal answers", [sum(equal) / len(equal)], "", ">= 1")


def measure(session: Session, families: Sequence[str], weights: Path | None, processes: int) -> None:
    """Runs all parts, one family at a time."""
    for dtype in PARITY:
        session.run(f"parity, {dtype}", partial(compare_devices, session, dtype))
    peaks: list[float] = []
    session.run("matmul peak", lambda: peaks.append(measure_peak(session, torch.bfloat16)))
    if peaks:
        session.rows.add(str(session.device), "matmul peak, bf16", [peaks[0] / 1e12], "TFLOP/s")
    for name in families:
        family = Family(session, name, peaks[0] if peaks else None)
        parts = (family.start, family.edit_once, family.share_peak, family.edit_batches, family.prepare)
        for part in (*parts, family.edit_in_sequence):
            session.run(f"{TITLES[name]}, {part.__name__}", part)
        family.backbone = None
        gc.collect()
    for kind in ("int8", "int4"):
        if weights is None:
            session.skipped.append(f"{kind}: needs --weights")
        else:
            session.run(kind, partial(edit_quantized, session, weights, kind))
    if processes > 1:
        session.run("processes", partial(compare_processes, session, processes))


def run(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="auto", help="auto: this process's accelerator, where there is one")
    add("--scale", choices=SCALES, default="full", help="small: a few layers of width 64")
    add("--models", nargs="+", choices=TITLES, default=list(TITLES), metavar="NAME", help=", ".join(TITLES))
    add("--weights", type=Path, help="folder for 7.5 GB of random weights, which int8 and int4 are made of")
    add("--processes", type=int, default=1, metavar="N", help="also edit by N processes, and compare")
    add("--minutes", type=float, default=7.5, help="no part starts later")
    add("--json", type=Path, help="where the rows are written to")
    args = parser.parse_args(arguments)
    device, scale = pick_device(args.device), SCALES[args.scale]
    if scale.is_full and device.type == "cpu":
        raise UserError(
            "--scale: full: there is no accelerator here, and on a CPU it takes hours; expected --scale small"
        )
    rows = Measurements("gpu")
    session = Session(device, scale, args.minutes, rows)
    measure(session, args.models, args.weights, args.processes)
    rows.write(args.json)
    for name in session.skipped:
        print(f"not run: {name}", file=sys.stderr)
    missed = [row for row in rows.rows if row.is_met is False]
    return int(bool(session.failed or missed))


def main(arguments: Sequence[str] | None = None) -> int:
    return run_guarded(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
