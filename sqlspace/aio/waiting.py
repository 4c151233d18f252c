"""How a coroutine keeps a vigil: it looks elsewhere, and is parked asleep in its loop.

What was begun is brought to its end before a cancellation goes on, for what it finds must be given
back; so it is never awaited bare.
"""

import _thread
import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from sqlspace.waiting import Vigil, Waiter

__all__ = ["Run", "to_the_end", "wait"]

T = TypeVar("T")

Run = Callable[[Callable[[], Any], Callable[[], object]], Awaitable[Any]]
"""Calls a function to its end; the other one too, if the task is cancelled meanwhile."""


async def wait(vigil: Vigil, run: Run, *, looked: bool = False) -> Any:
    """Wait until something is found, and return that; as `sqlspace.waiting.wait`."""
    waiter = Waiter()
    parks = vigil.parks(waiter, None, None, looked=looked)
    lock = threading.Lock()  # while it advances
    over = False

    def advance() -> float | None:
        if over:
            return None
        with lock:
            return None if over else next(parks, None)

    def call_off() -> None:
        nonlocal over
        over = True
        vigil.call_off()

    def end() -> None:
        nonlocal over
        with lock:
            over = True
            vigil.end(waiter)

    def abandon() -> None:
        with contextlib.suppress(RuntimeError):  # the interpreter ends
            _thread.start_new_thread(end, ())

    try:
        while (seconds := await run(advance, call_off)) is not None:
            await _sleep(waiter, seconds, abandon)
    except GeneratorExit:
        # Thrown away unfinished, so nothing can be awaited; and perhaps by the garbage collector in
        # the middle of anything, so no lock can be waited for.
        abandon()
        raise
    except BaseException:
        await to_the_end(run(end, lambda: None))
        raise
    return waiter.found


async def _sleep(waiter: Waiter, seconds: float, abandon: Callable[[], None]) -> None:
    """Until woken, from any thread, or until the time is over.

    Args:
        waiter: That of a wait.
        seconds: How long, at most.
        abandon: Called if it is woken when its loop is closed: somebody else must hear that.
    """
    loop = asyncio.get_running_loop()
    woken = asyncio.Event()

    def nudge() -> None:
        try:
            loop.call_soon_threadsafe(woken.set)
        except RuntimeError:  # it is closed
            abandon()

    waiter.listen(nudge)
    timer = loop.call_later(seconds, woken.set)
    try:
        if not waiter.park(0):  # it may have been woken before it listened
            await woken.wait()
            waiter.park(0)
    finally:
        timer.cancel()
        waiter.listen(None)


async def to_the_end(awaitable: Awaitable[T], call_off: Callable[[], object] = lambda: None) -> T:
    """What it returns; it goes on, and this waits for it, even if the task is cancelled meanwhile.

    Args:
        awaitable: Awaited.
        call_off: Called then, to have that end the sooner.

    Raises:
        CancelledError: The task was cancelled, but only now.
    """
    future = asyncio.ensure_future(awaitable)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
            call_off()
    if cancelled is not None:
        future.exception()  # else the loop would tell that nobody asked
        raise cancelled
    return future.result()
