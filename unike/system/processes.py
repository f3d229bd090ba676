"""Several processes at one run: which share each takes, and what they exchange.

``unike.system.launching``, ``accelerate launch`` or torchrun starts them, and each calls ``join``. In a
process that runs alone every function here does nothing but its work. Torch and accelerate are imported
late: a wrong argument should not wait for them.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from unike.types import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
S = TypeVar("S")

LOST = "another process of this run has ended; what is recorded is kept, continue with --resume"
# One process may work for hours while the others wait for it.
_PATIENCE = timedelta(days=30)


class LostError(Exception):
    """Another process ended before its work was done."""

    def __init__(self) -> None:
        super().__init__(LOST)


class SharedError(UserError):
    """A problem that all processes know: one of them reports it."""


class _Team:
    """This process's place, from ``accelerate``, and a group for messages on the CPU."""

    def __init__(self, cpu: bool) -> None:
        import torch
        from accelerate import PartialState

        self.state = PartialState(cpu=cpu, timeout=_PATIENCE)
        # NCCL and its like carry tensors of their own device only, and never notice a dead peer.
        self.group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        self.waiting = self.interrupted = False

    def exchange(self, value: T) -> list[T]:
        """The value of each process, by rank. A Ctrl-C that comes meanwhile is kept for later."""
        import torch

        found: list[Any] = [None] * self.state.num_processes
        self.waiting = True
        try:
            torch.distributed.all_gather_object(found, value, group=self.group)
        except RuntimeError:
            raise (KeyboardInterrupt if self.interrupted else LostError) from None
        finally:
            self.waiting = False
        return found


_team: _Team | None = None


def count_planned() -> int:
    """How many processes a launcher has started for this run."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def has_joined() -> bool:
    """Whether this process shares its work with others."""
    return _team is not None


def get_rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK") or 0) if _team is None else _team.state.process_index


def count() -> int:
    """How many processes share the work."""
    return 1 if _team is None else _team.state.num_processes


def is_main() -> bool:
    """Whether this process logs and writes for all."""
    return get_rank() == 0


def join(device: str = "auto") -> None:
    """Connects this process with the others that a launcher has started. ``device`` is the YAML's.

    UserError where several processes can't have a device each.
    """
    global _team
    if count_planned() == 1 or _team is not None:
        return
    if not is_main():
        from transformers.utils import logging as theirs

        logging.getLogger("unike").setLevel(logging.ERROR)
        theirs.set_verbosity_error()
        theirs.disable_progress_bar()
    check_devices(device, count_planned(), int(os.environ.get("LOCAL_WORLD_SIZE") or count_planned()))
    listen()
    _team = _Team(cpu=not _has_accelerator(device))


def check_devices(device: str, number: int, here: int | None = None) -> None:
    """UserError where ``number`` processes, ``here`` of them on this machine, can't have a device each.
    ``here`` is all of them by default."""
    if ":" in device:
        raise UserError(f"device: {device}: one device for {number} processes; expected auto or cpu")
    if not _has_accelerator(device):
        return
    import torch

    found, wanted = torch.accelerator.device_count(), number if here is None else here
    if wanted > found:
        raise UserError(f"num_processes: {wanted}; found {found} devices, expected no more than these")


def _has_accelerator(device: str) -> bool:
    """Whether a process with this ``device`` in its YAML takes one of the machine's accelerators."""
    if device == "cpu":
        return False
    import torch

    return torch.accelerator.is_available()


def leave() -> None:
    """Disconnects from the others."""
    global _team
    if _team is not None:
        _team = None
        import torch

        torch.distributed.destroy_process_group()


def get_default_device() -> torch.device:
    """What ``auto`` means: this process's own device, as accelerate picks it."""
    from accelerate import PartialState

    device: torch.device = PartialState().default_device if _team is None else _team.state.device
    return device


# ---------------------------------------------------------------- sharing work


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of ``items``: every n-th."""
    return items if count() == 1 else items[get_rank() :: count()]


def gather(value: T) -> list[T]:
    """The ``value`` of each process, by rank. LostError where a process has ended."""
    if _team is None:
        return [value]
    found = _team.exchange(value)
    if _team.interrupted:
        raise KeyboardInterrupt
    return found


def gather_at_end(value: T) -> tuple[list[T], bool]:
    """Like ``gather``, and whether Ctrl-C came meanwhile; it does not end the process."""
    if _team is None:
        return [value], False
    return _team.exchange(value), _team.interrupted


def run_everywhere(work: Callable[[], T]) -> T:
    """Every process does the work; a UserError of one is raised by all."""
    done, problems = _try_work(work)
    _raise(gather(problems))
    return done  # type: ignore[return-value]


def run_once(work: Callable[[], T]) -> T:
    """The main process does the work; the others wait for its result, which all return."""
    if count() == 1:
        return work()
    done, problems = _try_work(work) if is_main() else (None, ())
    (done, problems), *_ = gather((done, problems))
    _raise([problems])
    return done  # type: ignore[return-value]


def run_in_turn(work: Callable[[], T]) -> T:
    """The main process does the work, then all others do, which find what it has written."""
    if count() == 1:
        return work()
    done, problems = _try_work(work) if is_main() else (None, ())
    _raise(gather(problems)[:1])
    if not is_main():
        done, problems = _try_work(work)
    _raise(gather(problems))
    return done  # type: ignore[return-value]


def spread(
    items: Sequence[S], work: Callable[[S], T], notify: Callable[[S], None] = lambda _: None
) -> list[T]:
    """``[work(item) for item in items]``, each item worked on by one process; all get the whole list.

    ``notify`` is called with every item: with this process's own when it is done, with the others' at the
    end.
    """

    def own() -> list[T]:
        found = []
        for item in share(items):
            found.append(work(item))
            notify(item)
        return found

    if count() == 1:
        return own()
    parts = gather(_try_work(own))
    _raise([problems for _, problems in parts])
    done = [found or [] for found, _ in parts]
    for i, item in enumerate(items):
        if i % count() != get_rank():
            notify(item)
    return [done[i % count()][i // count()] for i in range(len(items))]


def add_gradients(parameters: Sequence[torch.Tensor]) -> None:
    """Each parameter's gradient becomes the sum over all processes; none where none has one."""
    if count() == 1:
        return
    import torch
    from accelerate.utils import reduce

    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=grads[0].device)
    try:
        whole: Any = reduce(torch.cat([there, *(g.float().flatten() for g in grads)]), "sum")
    except RuntimeError:
        raise LostError from None
    there, *sums = whole.split([len(there), *(g.numel() for g in grads)])
    for parameter, grad, known in zip(parameters, sums, there.tolist(), strict=True):
        parameter.grad = grad.view_as(parameter).to(parameter.dtype) if known else None


def _try_work(work: Callable[[], T]) -> tuple[T | None, tuple[str, ...]]:
    if count() == 1:
        return work(), ()
    try:
        return work(), ()
    except UserError as error:
        return None, error.problems


def _raise(problems: Sequence[tuple[str, ...]]) -> None:
    if found := dict.fromkeys(line for lines in problems for line in lines):
        raise SharedError(*found)


# ---------------------------------------------------------------- Ctrl-C


def listen() -> None:
    """From here on the first Ctrl-C ends the work, and further ones change nothing. SIGTERM, by which
    accelerate and torchrun end their processes, counts as one."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(*_: object) -> None:
    """Ctrl-C reaches a process twice, from the terminal and from its launcher: once counts."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if _team is not None and _team.waiting:
        _team.interrupted = True
    else:
        raise KeyboardInterrupt
