"""A batched training step's FLOP/s as a share of this machine's own matmul peak."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import Measurements, time_call
from benchmarks.models import PRESET, draw_cases, draw_knowledge, make_opt_config, make_random_backbone
from unike.backbones.prefix import PrefixCache
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.methods import build
from unike.methods.base import Knowledge, resolve_layers
from unike.types import EditRequest

WIDTH, FEW, MANY, SIDE = 1024, 2, 12, 2048
TARGET = ">= 0.5"


def measure_peak(runs: int, side: int = SIDE) -> list[float]:
    """FLOP/s of large square matmuls in fp32, with this process's threads."""
    one, other = torch.randn(side, side), torch.randn(side, side)
    time_call(lambda: one @ other)
    return [2 * side**3 / time_call(lambda: one @ other)[1] for _ in range(runs)]


class Steps:
    """Batched edits of a fixed number of steps on one backbone, prefixes cached."""

    def __init__(self, backbone: VisionLanguageBackbone, requests: Sequence[EditRequest]) -> None:
        self.backbone, self.requests = backbone, requests
        plain = HyperParams.from_dict(PRESET)
        layers = resolve_layers(plain, backbone)
        self.knowledge: Knowledge = draw_knowledge(backbone, layers, plain)
        self.prefixes = PrefixCache(backbone, layers[0])
        self.prefixes.state([r.query for r in requests])

    def take(self, count: int) -> None:
        hparams = HyperParams.from_dict({**PRESET, "max_steps": count, "stop_loss": 0.0})
        build(hparams, self.knowledge).edit_many(self.backbone, self.requests, self.prefixes)

    def time_step(self) -> float:
        """Seconds of one step: the time that further steps add to an edit."""
        few, many = (time_call(partial(self.take, n))[1] for n in (FEW, MANY))
        return (many - few) / (MANY - FEW)

    def count_flops(self) -> float:
        """FLOPs of one step's matmuls, forward and backward, as counted by torch."""
        counted = []
        for count in (FEW, FEW + 1):
            with FlopCounterMode(display=False) as counter:
                self.take(count)
            counted.append(counter.get_total_flops())
        return float(counted[1] - counted[0])


def profile_steps(rows: Measurements, batch: int, runs: int, width: int = WIDTH) -> None:
    """Adds the rows, and prints the table of torch's profiler for an edit's steps."""
    config = make_opt_config(width=width, layers=4, vision_layers=1, vision_width=64, side=4)
    backbone = make_random_backbone(config)
    requests = [c.request for c in draw_cases(batch, backbone.vision.image_size)]
    steps, case = Steps(backbone, requests), f"width {width}, {batch} records"
    flops = steps.count_flops()
    shares: list[float] = []
    speeds: list[float] = []
    peaks: list[float] = []
    for _ in range(runs):
        # The speed of a shared machine drifts: peak and step are measured close to each other.
        peak = max(measure_peak(3))
        speed = flops / steps.time_step()
        peaks.append(peak / 1e9)
        speeds.append(speed / 1e9)
        shares.append(speed / peak)
    rows.add(case, "matmul peak, fp32", peaks, "GFLOP/s")
    rows.add(case, "batched training step: matmuls", [flops / 1e9], "GFLOP")
    rows.add(case, "batched training step", speeds, "GFLOP/s")
    rows.add(case, "batched training step: share of the peak", shares, "", TARGET)
    with torch_profile(activities=[ProfilerActivity.CPU]) as seen:
        steps.take(FEW + 1)
    averages: Any = seen.key_averages()
    print(averages.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))
    print(f"median share of the peak: {statistics.median(shares):.2f}")
