"""Runs of single edits: which batches are left to a process, and the outcomes of each."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

import psutil
import torch

from unike.backbones.base import Backbone
from unike.config.hparams import HyperParams
from unike.datasets.lengths import name_long_field
from unike.evaluation.protocols import Outcome, run_one_step_batch
from unike.evaluation.reader import Reader
from unike.evaluation.record import Record
from unike.methods import resolve_layers
from unike.runs.parts import Parts
from unike.runs.sharing import SharedRun
from unike.system import faults, processes
from unike.types import Case, TooLongError, UserError

logger = logging.getLogger("unike")

# Larger batches of edits gain nothing; tokens assumed per query.
AT_ONCE, TOKENS = 32, 128


class Batches:
    """This process's share of the cases that are not recorded, each edited from the base model.

    ``order`` has the ids of the run's records. A progress bar counts to ``total`` edits, from ``already`` on.
    ``pending`` outcomes of the batch at hand are still to come: they took their time together, so that a bar
    that moved for each of them would expect the first one's time of all. ``sizes`` are the edits that each
    batch makes, also those that are recorded already.
    """

    pending = 0

    def __init__(
        self, parts: Parts, cases: Sequence[Case], reader: Reader, done: AbstractSet[str], skip_broken: bool
    ) -> None:
        self.parts, self.reader, self.done, self.skip_broken = parts, reader, done, skip_broken
        self.order = [case.request.id for case in cases]
        size = count_edits_at_once(parts.hparams, parts.backbone)
        # Whole batches, wherever a former run ended: what is made in one batch is rounded alike.
        batches = [cases[start : start + size] for start in range(0, len(cases), size)]
        left = [batch for batch in batches if any(case.request.id not in done for case in batch)]
        self.batches = processes.share(left)
        self.sizes = [len(batch) for batch in self.batches]
        self.already = sum(name in done for name in self.order)
        self.total = self.already + sum(c.request.id not in done for batch in self.batches for c in batch)

    def run(self, shared: SharedRun) -> Iterator[Outcome]:
        """The outcomes that are not recorded yet, batch by batch until the run is stopped."""
        for batch in shared.take_until_stopped(self.batches):
            self.pending = sum(case.request.id not in self.done for case in batch)
            for outcome in self._edit(batch):
                if outcome.record.id not in self.done:
                    self.pending -= 1
                    yield outcome

    def _edit(self, cases: Sequence[Case]) -> Iterator[Outcome]:
        """The cases' outcomes, edited in one batch; half as many at a time where memory does not suffice, or
        one of them is too long for the model or can't be read, down to the one that fails."""
        try:
            yield from run_one_step_batch(self.parts.backbone, self.parts.method, cases, self.reader)
            return
        except (UserError, RuntimeError, MemoryError) as error:
            full = faults.is_out_of_memory(error)
            tolerated = UserError if self.skip_broken else TooLongError
            if not full and not isinstance(error, tolerated):
                raise
            reason = "out of memory" if full else str(error)
            if isinstance(error, TooLongError):
                reason = f"{name_long_field(cases[0])}: {reason}"
        # Out here the error is gone, and with it what its frames held in memory.
        free = getattr(torch.get_device_module(self.parts.backbone.device), "empty_cache", None)
        if full and free is not None:
            free()
        if len(cases) == 1:
            (case,) = cases
            yield Outcome(Record(case.request.id, case.task, "failed", error=reason))
            return
        half = len(cases) // 2
        if full:
            logger.warning("out of memory with a batch of %d edits; %d are tried", len(cases), half)
        yield from self._edit(cases[:half])
        yield from self._edit(cases[half:])


def count_edits_at_once(hparams: HyperParams, backbone: Backbone) -> int:
    """How many independent edits are made in one batch: ``edit_batch_size``, or with ``auto`` as many as an
    eighth of the memory takes, at most ``AT_ONCE``: the same on the same machine, whatever else runs."""
    if isinstance(hparams.edit_batch_size, int):
        return hparams.edit_batch_size
    width, layers = backbone.layout.width, len(resolve_layers(hparams, backbone))
    trained = layers * width * (3 * hparams.n_keys + (hparams.encoder_dim or width))
    if hparams.method == "ft":
        edited = (backbone.layout.layer(i) for i in resolve_layers(hparams, backbone))
        trained = sum(p.numel() for layer in edited for p in layer.parameters())
    # Each with its gradient and two moments; and a few dozen states a token and layer for the gradient.
    need = 4 * 4 * trained + 4 * layers * width * 40 * TOKENS
    return max(1, min(AT_ONCE, measure_memory(backbone.device) // 8 // need))


def measure_memory(device: torch.device) -> int:
    """Bytes of a device's memory, in use or not."""
    about = getattr(torch.get_device_module(device), "get_device_properties", None)
    return int(psutil.virtual_memory().total if about is None else about(device).total_memory)
