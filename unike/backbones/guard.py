"""One thread at a time uses a backbone; and what is applied to it can be taken off and put back.

Every call of an editor, a method or a backbone holds the backbone until it is done; so does a block ``with
edit.applied(backbone)`` until it ends. Other threads wait. Where waiting would last for ever they get a
UserError that says why.
"""

from __future__ import annotations

import copy
import logging
import selectors
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from types import TracebackType
from typing import Any, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from unike.backbones.modes import plain_modes
from unike.backbones.weights import WeightWatch
from unike.types import UserError

logger = logging.getLogger("unike")

P = ParamSpec("P")
R = TypeVar("R")
Start = Callable[[], AbstractContextManager[Any]]

# How long a thread waits for another one's block while that one waits for something else itself.
PATIENCE_SECONDS = 5.0
# How long where it is in one call all the time, as a sleep in a loop is, which may also end by itself.
LONG_PATIENCE_SECONDS = 60.0
_LOOK_SECONDS = 0.25
# Where a thread is that waits for others: on a lock, or for its event loop.
_WAITING_ROOMS = (threading.__file__, selectors.__file__)


class Guard:
    """The lock of a backbone, what is applied to it, and the watch over its weights.

    The lock is re-entrant: a call within a call, and within a block, does not wait.
    """

    def __init__(self, backbone: Any) -> None:
        self.watch = WeightWatch(backbone.model)
        self._model = backbone.model
        self._lock = threading.RLock()
        self._owner: int | None = None
        # How often the owner holds the lock, and how many of these are calls rather than blocks.
        self._held = self._calls = 0
        self._applied: list[Application] = []
        self._is_starting = False

    @classmethod
    def of(cls, backbone: Any) -> Guard:
        """The backbone's guard; all its editors and edits share it, and other backbones of one model."""
        found = vars(backbone).get("_guard")
        if found is None:
            with _MAKING:
                found = _BY_MODEL.get(id(backbone.model)) or cls(backbone)
                # Kept on the backbone itself, so that both are freed together.
                vars(backbone)["_guard"] = _BY_MODEL[id(backbone.model)] = found
        guard: Guard = found
        return guard

    @property
    def epoch(self) -> int:
        """The number of changes of the weights that were noticed so far."""
        return self.watch.epoch

    @property
    def is_bare(self) -> bool:
        """Whether no edit is applied now."""
        return not any(a.running for a in self._applied)

    def carries(self, only: Application | None) -> bool:
        """Whether ``only`` is applied now, and nothing else."""
        running = [a for a in self._applied if a.running]
        return running == ([] if only is None else [only])

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Inside the block no other thread uses the backbone. Before the outermost call the weights are
        looked at; what the caller has switched on for all of torch is off until it ends.

        UserError where the thread that holds the backbone would never give it back.
        """
        self._acquire()
        try:
            with nullcontext() if self._calls else plain_modes(self.watch.device):
                if not self._calls:
                    self._look()
                self._calls += 1
                try:
                    yield
                finally:
                    self._calls -= 1
        finally:
            self._release()

    @contextmanager
    def bare(self) -> Iterator[None]:
        """As ``hold``, and inside the block nothing is applied to the backbone: it is the base model. After
        it all is applied again, in the same order."""
        with self.hold(), self._suspended():
            yield

    def exchange(self, former: Application | None, new: Application | None) -> None:
        """Puts ``new`` in the place of ``former``, below all that is applied by blocks; neither holds the
        lock. Where ``new`` cannot be applied, ``former`` stays."""
        with self.bare():
            if new is not None:
                new.start()
                self._applied.insert(0, new)
            if former is not None:
                self._applied.remove(former)

    def enter(self, application: Application) -> None:
        """Applies one more; the thread holds the backbone until ``leave``. UserError where it is applied."""
        if self._is_starting and self._owner == threading.get_ident():
            # A part of another one, which takes it off and puts it back.
            application.start()
            return
        self._acquire()
        try:
            if application.running or application in self._applied:
                # Left once, it would keep the lock of the other time for ever.
                raise UserError("edit: this block is entered already; expected edit.applied(backbone) anew")
            if not self._calls and self.is_bare:
                self._look()
            application.start()
            application.holds = True
            self._applied.append(application)
        except BaseException:
            self._release()
            raise

    def leave(self, application: Application) -> None:
        """Takes one off, whatever was applied after it."""
        if not application.holds:
            application.stop()
            return
        if self._owner != threading.get_ident():
            raise UserError("edit: another thread has applied it; expected that thread to leave the block")
        try:
            place = self._applied.index(application)
            above = [a for a in self._applied[place:] if a.running]
            for other in reversed(above):
                other.stop()
            self._applied.remove(application)
            for other in above:
                if other is not application:
                    other.start()
        finally:
            application.holds = False
            self._release()

    def start_parts(self, start: Start) -> AbstractContextManager[Any]:
        """Enters what ``start`` gives; what is applied by it is a part of it."""
        former, self._is_starting = self._is_starting, True
        try:
            with plain_modes(self.watch.device):
                running = start()
                running.__enter__()
        finally:
            self._is_starting = former
        return running

    @contextmanager
    def _suspended(self) -> Iterator[None]:
        stopped = [a for a in self._applied if a.running]
        for application in reversed(stopped):
            application.stop()
        try:
            if stopped:
                self._look()
            yield
        finally:
            for application in stopped:
                if application in self._applied:
                    application.start()

    def _look(self) -> None:
        """Notices weights that were changed since the last look."""
        bare = self.is_bare
        if self.watch.is_training:
            logger.warning("the model was in training mode: put back in eval mode, without dropout")
            self._model.eval()
        if not self.watch.seems_changed(bare):
            return
        if bare:
            self.watch.renew()
            return
        with self._suspended():
            pass

    def _acquire(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._wait()
        self._owner, self._held = threading.get_ident(), self._held + 1

    def _wait(self) -> None:
        me, stuck, still = threading.get_ident(), 0.0, 0.0
        place: object = None
        _WAITING[me] = self
        try:
            while not self._lock.acquire(timeout=_LOOK_SECONDS):
                stuck = stuck + _LOOK_SECONDS if self._owner_waits(me) else 0.0
                former, place = place, self._find_block()
                still = still + _LOOK_SECONDS if place is not None and place == former else 0.0
                if stuck >= PATIENCE_SECONDS or still >= LONG_PATIENCE_SECONDS:
                    raise UserError(_FOR_EVER)
        finally:
            del _WAITING[me]

    def _owner_waits(self, me: int) -> bool:
        """Whether the thread that holds the backbone waits for something itself, in a block; UserError where
        it is for this thread, or where it has ended."""
        owner, seen = self._owner, set[int]()
        # From thread to thread, each of which waits for another backbone.
        while owner not in (None, me) and owner not in seen and (further := _WAITING.get(owner)) is not None:
            seen.add(owner)
            owner = further._owner
        if owner == me:
            raise UserError(_FOR_EVER)
        frame = None if owner is None else sys._current_frames().get(owner)
        if owner is not None and frame is None and owner == self._owner:
            raise UserError(
                "edit: the thread that applied it has ended inside the block; load the model anew"
            )
        waits = frame is not None and frame.f_code.co_filename in _WAITING_ROOMS
        while frame is not None and frame.f_code.co_filename == threading.__file__:
            joined = frame.f_locals.get("self") if frame.f_code.co_name == "join" else None
            if isinstance(joined, threading.Thread) and joined.ident == me:
                raise UserError(_FOR_EVER)
            frame = frame.f_back
        # Calls come to an end by themselves; a block may wait for the very thread that waits for it.
        return waits and not self._calls and any(a.holds for a in self._applied)

    def _find_block(self) -> object:
        """Where the thread is that holds the backbone by a block alone; None where a call holds it."""
        frame = sys._current_frames().get(self._owner or 0)
        return None if self._calls or frame is None else (id(frame), frame.f_lasti)

    def _release(self) -> None:
        self._held -= 1
        if not self._held:
            self._owner = None
        self._lock.release()


_FOR_EVER = (
    "edit: the model is held by a thread that waits, inside `with edit.applied(...)` or a call, for this "
    "thread or for something else, which may last for ever; expected the block to end first"
)
_MAKING = threading.Lock()
# By thread the guard that it waits for now.
_WAITING: dict[int, Guard] = {}
# A guard keeps its model: no other one gets the same number as long as the guard is here.
_BY_MODEL: WeakValueDictionary[int, Guard] = WeakValueDictionary()


class Application(AbstractContextManager[None]):
    """An edit's ``with edit.applied(backbone)``: it can be taken off and put back while the block lasts.

    ``start`` gives a new context manager each time.
    """

    def __init__(self, guard: Guard, start: Start) -> None:
        self._guard, self._make = guard, start
        self._running: AbstractContextManager[Any] | None = None
        self.holds = False

    @property
    def running(self) -> bool:
        """Whether it is applied now, and not taken off for the time being."""
        return self._running is not None

    def start(self) -> None:
        """Applies it."""
        self._running = self._guard.start_parts(self._make)

    def stop(self) -> None:
        """Takes it off, if it is applied."""
        running, self._running = self._running, None
        if running is not None:
            running.__exit__(None, None, None)

    def __enter__(self) -> None:
        self._guard.enter(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.leave(self)


def guard_applied(kind: type) -> None:
    """Makes the method ``applied`` that a class defines known to the backbone that it is called with."""
    if "applied" not in vars(kind):
        return
    apply = vars(kind)["applied"]

    @wraps(apply)
    def applied(self: Any, backbone: Any, *rest: Any, **more: Any) -> Application:
        if not hasattr(type(backbone), "fingerprint"):
            name = getattr(self, "id", type(self).__name__)
            raise UserError(f"edit {name}: expected a backbone, got {type(backbone).__name__}")
        return Application(Guard.of(backbone), lambda: apply(self, backbone, *rest, **more))

    kind.applied = applied  # type: ignore[attr-defined]


def held(call: Callable[P, R]) -> Callable[P, R]:
    """A method of a backbone that holds it until it is done."""

    @wraps(call)
    def holding(*args: P.args, **kwargs: P.kwargs) -> R:
        with Guard.of(args[0]).hold():
            return call(*args, **kwargs)

    return holding


def copy_bare(backbone: Any, memo: dict[int, Any]) -> Any:
    """What ``copy.deepcopy`` of a user's gives: the base model with a lock of its own; what is applied stays
    with the original."""
    new = memo[id(backbone)] = object.__new__(type(backbone))
    with Guard.of(backbone).bare():
        vars(new).update(copy.deepcopy(backbone.__getstate__(), memo))
    return new
