"""A command's processes: starting several of them, and the one exit code at the end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from types import ModuleType

from unike.system.faults import describe_fault
from unike.system.processes import LostError, SharedError, count_planned, has_joined, is_main, leave, listen
from unike.system.shipped import find_home
from unike.types import UserError

_LAUNCHED = "UNIKE_LAUNCHED"
_LOST_CODE, _NOTHING_CODE = 3, 4
# What a shell gives for a program that SIGPIPE ended.
PIPE_CODE = 141
# Processes that may share one core: more gain nothing, and each takes the model's memory.
_PER_CORE, _FEW_PROCESSES = 2, 16
# Seconds for the others to end by themselves, and then after Ctrl-C.
_GRACE, _ENDING = 5.0, 60.0


def run_guarded(work: Callable[[], int]) -> int:
    """Runs a command and gives its exit code: the work's own, 2 after a UserError (one line per
    problem) or where memory or disk are full, 130 after Ctrl-C, 1 where another process was lost.
    Of several processes one reports. Where nobody reads the output any more (``| head -1``), the code is
    141 and nothing is reported."""
    try:
        try:
            return _run_reported(work)
        finally:
            # Here, since what fails at the interpreter's end is printed as a traceback.
            _flush_output()
    except BrokenPipeError:
        _close_output()
        return PIPE_CODE
    except UserError as error:
        _close_output()
        print(f"error: {error}", file=sys.stderr)
        return 2


def _flush_output() -> None:
    """UserError where the output goes to a full disk."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"standard output: cannot be written: {error.strerror}") from error
    except (ValueError, AttributeError):
        # Closed, or none, as in a program without a terminal.
        return


def _close_output() -> None:
    """Sends what is still to be printed nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _run_reported(work: Callable[[], int]) -> int:
    try:
        return work()
    except BrokenPipeError:
        raise
    except UserError as error:
        if is_main() or not (isinstance(error, SharedError) or not has_joined()):
            print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_main():
            print("interrupted", file=sys.stderr)
        return 130
    except LostError as error:
        if _LAUNCHED in os.environ:
            return _LOST_CODE
        if is_main():
            print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if (line := describe_fault(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    finally:
        leave()


def choose_run_code(succeeded: int | None) -> int:
    """The exit code of a run with so many records that ``succeeded``: 1 where none did, else 0. None where
    another process counts them."""
    if succeeded != 0:
        return 0
    print("error: no record succeeded", file=sys.stderr)
    # From a process that died, ``launch`` distinguishes it by a code of its own.
    return _NOTHING_CODE if _LAUNCHED in os.environ else 1


# ---------------------------------------------------------------- starting processes


def wants_launch(number: int | None) -> bool:
    """Whether ``--num_processes`` asks for processes that nobody has started; UserError as
    ``check_number``."""
    check_number(number)
    return (number or 1) > 1 and count_planned() == 1


def is_launched() -> bool:
    """Whether another process started this one, and has checked its input."""
    return _LAUNCHED in os.environ


def check_number(number: int | None) -> None:
    """UserError for ``--num_processes`` under 1, and for more than this machine's cores can serve."""
    if number is not None and number < 1:
        raise UserError(f"num_processes: {number}; expected 1 or more")
    if number is not None and number > (most := count_most_processes()):
        raise UserError(
            f"num_processes: {number}; expected at most {most} on this machine's {count_cores()} cores"
        )


def count_most_processes() -> int:
    """How many processes may be started at once."""
    return max(_FEW_PROCESSES, _PER_CORE * count_cores())


def launch(number: int, main: Callable[[list[str]], int], argv: Sequence[str]) -> int:
    """Runs ``main(argv)`` in ``number`` processes and gives one exit code for all.

    ``main`` is a module's function and ends through ``run_guarded``. Where a process dies, the others are
    ended as by Ctrl-C; what they have recorded is kept.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), _LAUNCHED: "1"}
    place |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    crew = []
    with share_cores(number):
        for i in range(number):
            own = place | {"RANK": str(i), "LOCAL_RANK": str(i)}
            process = context.Process(target=_run_child, args=(main, list(argv), own))
            # It ignores Ctrl-C until it can end well: while it imports, it would print tracebacks.
            with ignore_interrupts():
                process.start()
            crew.append(process)
    try:
        while all(p.exitcode in (None, 0) for p in crew) and any(p.is_alive() for p in crew):
            time.sleep(0.05)
        _wait(crew, _GRACE)
    except KeyboardInterrupt:
        pass
    with ignore_interrupts():
        _end_all(crew)
    return _choose_exit_code([p.exitcode for p in crew])


def _wait(crew: Sequence[BaseProcess], seconds: float) -> None:
    until = time.monotonic() + seconds
    while any(p.is_alive() for p in crew) and time.monotonic() < until:
        time.sleep(0.05)


def _end_all(crew: Sequence[BaseProcess]) -> None:
    """Sends SIGINT until all have ended (a starting process ignores it), then kills those that are left."""
    until = time.monotonic() + _ENDING
    while any(p.is_alive() for p in crew) and time.monotonic() < until:
        for process in crew:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGINT)
        _wait(crew, 1.0)
    for process in crew:
        process.kill()
        process.join()


def _choose_exit_code(codes: Sequence[int | None]) -> int:
    for i, code in enumerate(codes):
        if code not in (0, 2, 130, PIPE_CODE, _LOST_CODE, _NOTHING_CODE):
            how = f"signal {-code}" if code is not None and code < 0 else f"code {code}"
            # A process that dies leaves the line of its bar open.
            print("" if i else "\n", end="", file=sys.stderr)
            line = f"process {i + 1} of {len(codes)} ended with {how}; what is recorded is kept"
            print(f"error: {line}, continue with --resume", file=sys.stderr)
            return 1
    chosen = next((code for code in codes if code not in (0, _LOST_CODE)), int(_LOST_CODE in codes)) or 0
    return 1 if chosen == _NOTHING_CODE else chosen


def _run_child(main: Callable[[list[str]], int], argv: list[str], place: dict[str, str]) -> None:
    os.environ.update(place)
    die_with_parent()
    listen()
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    sys.exit(main(argv))


def die_with_parent() -> None:
    """Ends this process when its parent ends: the command may be started again, and must then run alone."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def ignore_interrupts() -> Iterator[None]:
    """Ctrl-C is ignored inside the block, and by the processes started there until they listen."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def count_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def share_cores(number: int) -> Iterator[None]:
    """Processes started inside the block share the cores, unless OMP_NUM_THREADS is set."""
    # Read by the children's torch as it loads.
    name, former = "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault(name, str(max(1, count_cores() // number)))
    try:
        yield
    finally:
        if former is None:
            del os.environ[name]


def import_from_checkout(name: str) -> ModuleType:
    """A module of the project's folder, which a wheel has inside the package; UserError without it."""
    require_checkout(name)
    return import_module(name)


def require_checkout(name: str) -> None:
    """UserError where ``import_from_checkout`` would not find the module, which is not imported."""
    parts = name.split(".")
    home = find_home()
    if home is not None and str(home) not in sys.path:
        # First, so that a folder of the same name in the working folder does not hide it. Processes that are
        # spawned have the path, too.
        sys.path.insert(0, str(home))
    # ``find_spec`` imports the parents: the first one that is missing ends the search.
    if not all(find_spec(".".join(parts[: n + 1])) for n in range(len(parts))):
        raise UserError(
            f"generate_data: the bundled benchmark is drawn by {name}, which is not installed; "
            "expected python run_edit.py in the project's folder"
        )
