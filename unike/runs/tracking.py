"""Logging a run while it goes on, to TensorBoard or Weights & Biases: what ``log_to`` in the YAML names."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from unike.config.hparams import HyperParams
from unike.config.sections import OutputOptions
from unike.evaluation.record import Record
from unike.evaluation.summary import RunningMeans
from unike.runs.records import RecordWriter
from unike.system import processes
from unike.system.shipped import name_extra
from unike.system.text import one_line
from unike.types import UserError

TENSORBOARD, PROJECT = "tensorboard", "unike"


class Sink(Protocol):
    """Somewhere that numbers go to."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes numbers by name, of the edit with the number ``step``."""


class Tracker:
    """Logs every record to ``sinks``. ``done`` records were logged before."""

    def __init__(self, sinks: list[Sink], done: int) -> None:
        self.sinks, self.step = sinks, done

    def add(self, record: Record, means: RunningMeans) -> None:
        """``after/<metric>`` are the running means in percent, ``edit/...`` this edit's own numbers."""
        self.step += 1
        values = {f"after/{metric}": value for metric, value in means.values().items()}
        own = {"loss": record.loss, "steps": record.steps, "seconds": record.seconds, "bytes": record.bytes}
        values |= {f"edit/{key}": float(value) for key, value in own.items() if value is not None}
        for sink in self.sinks:
            sink.log(values, self.step)


def check_trackers(hparams: OutputOptions) -> None:
    """UserError for each of ``log_to`` that is not installed."""
    lost = [name for name in hparams.log_to if importlib.util.find_spec(name) is None]
    if lost:
        raise UserError(
            *(
                f"{hparams.source}: log_to: {n} is not installed; pip install {name_extra('logging')}"
                for n in lost
            )
        )


@contextmanager
def track(hparams: HyperParams, writer: RecordWriter) -> Iterator[Tracker]:
    """The main process logs its records to ``log_to``; a run that is resumed goes on there."""
    with ExitStack() as stack:
        names = hparams.log_to if processes.is_main() else ()
        sinks = [stack.enter_context(_SINKS[name](hparams, writer)) for name in names]
        yield Tracker(sinks, len(writer.list_done()))


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)


@contextmanager
def _open_tensorboard(hparams: HyperParams, writer: RecordWriter) -> Iterator[Sink]:
    events = import_module("torch.utils.tensorboard").SummaryWriter(str(writer.directory / TENSORBOARD))
    try:
        # Indented, it is shown as code.
        text = json.dumps(hparams.to_dict(), indent=1).replace("\n", "\n    ")
        events.add_text("hparams", f"    {text}")
        yield _TensorBoard(events)
    finally:
        events.close()


class _Wandb:
    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)


@contextmanager
def _open_wandb(hparams: HyperParams, writer: RecordWriter) -> Iterator[Sink]:
    wandb = import_module("wandb")
    try:
        run = wandb.init(
            project=PROJECT,
            name=writer.directory.name,
            dir=str(writer.directory),
            config=hparams.to_dict(),
            id=name_run(writer.directory, writer.manifest),
            resume="allow",
        )
    except wandb.Error as error:
        raise UserError(f"{hparams.source}: log_to: wandb does not start: {one_line(error)}") from error
    try:
        yield _Wandb(run)
    finally:
        run.finish()


def name_run(directory: Path, manifest: Mapping[str, object]) -> str:
    """An id that a run keeps when it is resumed; every other run has another."""
    return hashlib.sha256(f"{directory.resolve()} {manifest.get('started')}".encode()).hexdigest()[:12]


_SINKS = {"tensorboard": _open_tensorboard, "wandb": _open_wandb}
