"""The one waiting loop: look, park, look again.

A waiter enrolls wherever it can be woken from, looks once more, and only then parks; whoever
changes something wakes those enrolled afterwards. So no wake-up is ever lost. What a wait finds is
put into `Waiter.found` by the step that takes it; when the wait then ends by an exception all the
same (Ctrl-C between two bytecodes), it is restored from there: a wait that raises took nothing.

CPython delivers a signal only where a function is called, entered or left into C, and where a loop
turns; never between plain stores. So a step that takes writes all its marks in stores that follow
each other, with no call between them, and cleans up after them.

No loop stands directly inside a `with` of a lock, nor inside a `try` that takes something back:
CPython delivers Ctrl-C at a jump backwards too, and from 3.12 on compiles some of these out of the
handler, so that a lock stayed taken. Such a loop is a function of its own.

Backends differ in how they look, leave and restore, and in how they park; in nothing else, and all
of that is a `Vigil`. Threads keep it here, coroutines in `sqlspace.aio`.
"""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from .arguments import check_timeout
from .errors import CanceledError, DeadlineError, SpaceError
from .space import Context, check_context

__all__ = ["MISSING", "Vigil", "Waiter", "nearer_end", "surely", "wait"]

MISSING: Final[Any] = object()

# Parked threads look again this often, so that a lost wake-up (a process killed between its commit
# and its ring) is a delay and never a hang. Idle threads cost nothing measurable at this rate.
LOOK_AGAIN_SECONDS = 5.0

# A step that raises so often, raises by itself: no signals strike so fast.
_FAILURES = 100


class Waiter:
    """One blocked call: what it found, and the latch that its thread parks on."""

    __slots__ = ("_latch", "_nudge", "found")

    def __init__(self) -> None:
        self.found: Any = MISSING
        self._nudge: Callable[[], None] | None = None
        self._latch = threading.Lock()
        self._latch.acquire()

    def wake(self) -> None:
        """End this waiter's park, the present one or the next."""
        try:
            self._latch.release()
        except RuntimeError:  # awake already
            return
        if (nudge := self._nudge) is not None:
            nudge()

    def listen(self, nudge: Callable[[], None] | None) -> None:
        """Have `wake` call `nudge` too, while the thread sleeps elsewhere than on its latch."""
        self._nudge = nudge

    def park(self, seconds: float) -> bool:
        """Sleep until woken, for `seconds` at most; whether it was woken."""
        return self._latch.acquire(True, seconds)  # noqa: FBT003  # by name 0.28 µs, not 0.15


def surely(step: Callable[[], None]) -> BaseException | None:
    """Run an idempotent step to its end, however often a signal's handler cuts it off.

    By whatever it raises: Ctrl-C, SystemExit, an alarm's TimeoutError. Only what tells that the
    step itself has failed comes through: an error of this package, or any `Exception` again and
    again.

    Returns:
        The last interrupt that cut it off, which the caller raises unless one is on its way.
    """
    interrupt: BaseException | None = None
    failures = 0
    while True:
        try:
            step()
            return interrupt
        except SpaceError:
            raise
        except Exception as error:
            failures += 1
            if failures == _FAILURES:
                raise
            interrupt = error
        except BaseException as error:  # noqa: BLE001  # the caller raises it
            interrupt = error


class Vigil:
    """How one wait looks, leaves and gives back, and how it parks: all in which backends differ.

    Args:
        look: Called as `look(waiter, enroll)`: fill `found` if there is one; else, if asked to,
            enroll the waiter where it will be woken.
        leave: Take the waiter from wherever `look` enrolled it. Idempotent.
        restore: Give back what is in `found`. Idempotent.
        ensure_open: Raises ClosedError.
        park: How a thread sleeps.
        horizon: Seconds until something is to be seen that nobody will ring for, or None; asked
            before each park.
        call_off: Have a look that waits for others end in vain; by another thread than its own.
    """

    __slots__ = ("call_off", "ensure_open", "horizon", "leave", "look", "park", "restore")

    def __init__(
        self,
        look: Callable[[Waiter, bool], None],
        *,
        leave: Callable[[Waiter], None],
        restore: Callable[[Waiter], None] = lambda _: None,
        ensure_open: Callable[[], None],
        park: Callable[[Waiter, float], object] = Waiter.park,
        horizon: Callable[[], float | None] = lambda: None,
        call_off: Callable[[], object] = lambda: None,
    ) -> None:
        self.look = look
        self.leave = leave
        self.restore = restore
        self.ensure_open = ensure_open
        self.park = park
        self.horizon = horizon
        self.call_off = call_off

    def parks(
        self, waiter: Waiter, deadline: float | None, context: Context | None, *, looked: bool
    ) -> Iterator[float]:
        """Look until the waiter has found something; yields the seconds to park, each time.

        When it raises, or when an interrupt cuts it off, `end` must follow.

        Args:
            waiter: Of this wait.
            deadline: On the monotonic clock, or None.
            context: Another bound, or None.
            looked: Whether the caller has just looked, in vain: then the first look is enrolled.

        Raises:
            ClosedError, CanceledError, DeadlineError: in this order; what a look raises.
        """
        enroll = looked  # most waits find something at the first look, and need not enroll
        while True:
            self.ensure_open()
            if context is not None and context.canceled:
                raise CanceledError("the wait's context was canceled")
            self.look(waiter, enroll)
            if waiter.found is not MISSING:
                break
            remaining = LOOK_AGAIN_SECONDS
            if deadline is not None:
                remaining = min(remaining, deadline - time.monotonic())
                if remaining <= 0:
                    if enroll:  # what it is handed until it has left is taken, though late: given
                        self.leave(waiter)  # back, another's would overtake it
                    if waiter.found is MISSING:
                        raise DeadlineError("the wait's time is over")
                    return
            if enroll:
                ahead = self.horizon()
                yield remaining if ahead is None else max(0.0, min(remaining, ahead))
            enroll = True
        if enroll:
            self.leave(waiter)

    def end(self, waiter: Waiter) -> None:
        """Undo all that a wait has done. Idempotent."""
        self.leave(waiter)
        if waiter.found is not MISSING:
            self.restore(waiter)


def wait(
    vigil: Vigil, timeout: float | None, context: Context | None, *, looked: bool = False
) -> Any:
    """Wait in this thread until something is found, and return that.

    Args:
        vigil: What is waited for.
        timeout: Seconds, None for ever.
        context: Another bound, or None.
        looked: As `Vigil.parks` has it.

    Raises:
        ClosedError, CanceledError, DeadlineError: in this order; what a look raises.
    """
    seconds = check_timeout(timeout)
    check_context(context)
    deadline = nearer_end(seconds, context)
    waiter = Waiter()
    try:
        if context is not None:
            context._register(waiter)  # noqa: SLF001  # Context and its waits are one piece
        _park_as_told(vigil, waiter, vigil.parks(waiter, deadline, context, looked=looked))
        if context is not None:
            context._unregister(waiter)  # noqa: SLF001
    except BaseException:

        def end() -> None:
            if context is not None:
                context._unregister(waiter)  # noqa: SLF001
            vigil.end(waiter)

        try:
            interrupt = surely(end)
        except BaseException:  # on the way into it or out of it
            surely(end)
            raise
        if interrupt is not None:  # whatever ends this wait, Ctrl-C is not swallowed
            raise interrupt  # noqa: B904  # what it interrupted is its context
        raise
    return waiter.found


def _park_as_told(vigil: Vigil, waiter: Waiter, parks: Iterator[float]) -> None:
    for seconds in parks:
        vigil.park(waiter, seconds)


def nearer_end(seconds: float | None, context: Context | None) -> float | None:
    """The earlier end of the two, on the monotonic clock; None if there is none."""
    deadline = None if seconds is None else time.monotonic() + seconds
    if context is not None and context.deadline is not None:
        deadline = context.deadline if deadline is None else min(deadline, context.deadline)
    return deadline
