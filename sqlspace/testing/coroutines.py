"""An `AsyncSpace` before the same laws: each verb is a task in a loop, and its bounds cancel it.

Left out are those that ask how a verb's own arguments bound it. In the others a timeout of 0 says
that there is no need to wait.
"""

import asyncio
import inspect
import itertools
import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast

from sqlspace.errors import CanceledError, DeadlineError
from sqlspace.space import AsyncSpace, Context

from . import laws
from .calls import Bench
from .laws import Law, ensure, same

__all__ = ["ASYNC_LAWS", "InALoop"]

T = TypeVar("T")

_TASKS: Final = 300
_TURNS: Final = 16
_FIRST_SECONDS, _GROWTH = 1e-5, 1.2


class InALoop:
    """An async space as a `Space`, for any thread but its loop's.

    Args:
        make_space: As `check_async_space` has it.
    """

    def __init__(self, make_space: Callable[[], AsyncSpace | Awaitable[AsyncSpace]]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

        async def make() -> AsyncSpace:
            made: Any = make_space()
            return cast("AsyncSpace", await made if inspect.isawaitable(made) else made)

        self.space = self.run(make())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What it returns, in the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def out(self, key: str, value: Any) -> None:
        """As `Space.out`."""
        return self.run(self.space.out(key, value))

    def in_(self, key: str, timeout: float | None = None, *, context: Context | None = None) -> Any:
        """As `Space.in_`."""
        return self._wait(self.space.in_, key, timeout, context)

    def rd(self, key: str, timeout: float | None = None, *, context: Context | None = None) -> Any:
        """As `Space.rd`."""
        return self._wait(self.space.rd, key, timeout, context)

    def inp(self, key: str, default: Any = None) -> Any:
        """As `Space.inp`."""
        return self.run(self.space.inp(key, default=default))

    def rdp(self, key: str, default: Any = None) -> Any:
        """As `Space.rdp`."""
        return self.run(self.space.rdp(key, default=default))

    def len(self, key: str) -> int:
        """As `Space.len`."""
        return self.run(self.space.len(key))

    def close(self) -> None:
        """As `Space.close`."""
        return self.run(self.space.close())

    def __enter__(self) -> Self:
        entered = self.run(cast("Any", self.space).__aenter__())
        ensure(entered is self.space, "__aenter__ doesn't return the space")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        exit_ = cast("Any", self.space).__aexit__
        return cast("bool | None", self.run(exit_(kind, error, trace)))

    def end(self) -> None:
        """Close it, and end the loop."""
        try:
            self.close()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _wait(
        self,
        verb: Callable[[str], Coroutine[Any, Any, Any]],
        key: str,
        timeout: float | None,
        context: Context | None,
    ) -> Any:
        seconds = None if timeout in (None, 0, math.inf) else timeout
        if context is not None and context.deadline is not None:
            left = context.deadline - time.monotonic()
            seconds = left if seconds is None else min(seconds, left)
        bound = _Bound(self._loop)

        async def wait() -> Any:
            bound.task = asyncio.current_task()
            try:
                async with asyncio.timeout(seconds):
                    return await verb(key)
            except TimeoutError as error:
                raise DeadlineError("the wait's time is over") from error
            except asyncio.CancelledError as error:
                raise CanceledError("the wait was cancelled") from error

        if context is None:
            return self.run(wait())
        context._register(bound)  # noqa: SLF001  # as a wait of the package's own
        try:
            return self.run(wait())
        finally:
            context._unregister(bound)  # noqa: SLF001


class _Bound:
    """Has a context cancel a task."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.task: asyncio.Task[Any] | None = None

    def wake(self) -> None:
        if self.task is not None:
            self._loop.call_soon_threadsafe(self.task.cancel)


def _of(bench: Bench) -> tuple[AsyncSpace, Callable[[Coroutine[Any, Any, Any]], Any]]:
    """The async space itself, and what runs a coroutine in its loop."""
    in_a_loop = cast("InALoop", bench.space)  # as check_async_space makes it
    return in_a_loop.space, in_a_loop.run


def is_an_async_space(bench: Bench) -> None:
    """A backend is an instance of `sqlspace.AsyncSpace` and an async context manager."""
    space, _ = _of(bench)
    ensure(isinstance(space, AsyncSpace), f"{type(space).__name__} lacks a verb of the protocol")
    ensure(isinstance(space, AbstractAsyncContextManager), "it has no __aenter__ and __aexit__")
    for name in ("out", "in_", "rd", "inp", "rdp", "len", "close"):
        ensure(inspect.iscoroutinefunction(getattr(space, name)), f"{name} is no async def")


def many_tasks_wait_at_once(bench: Bench) -> None:
    """Hundreds of tasks may wait at once, and each gets one of as many entries."""
    space, run = _of(bench)

    async def law() -> list[int]:
        takers = [asyncio.create_task(space.in_("k")) for _ in range(_TASKS)]
        await asyncio.sleep(0)
        for number in range(_TASKS):
            await space.out("k", number)
        return sorted(await asyncio.gather(*takers))

    same("what they got", run(law()), list(range(_TASKS)))


def a_cancelled_take_loses_nothing(bench: Bench) -> None:
    """Wherever `in_` is cancelled, it has returned the entry, or that stands at its place."""
    space, run = _of(bench)

    async def law() -> None:
        for turns in itertools.count():
            await space.out("k", "first")
            await space.out("k", "second")
            take = asyncio.create_task(space.in_("k"))
            await _go_on(turns)
            done = take.done()
            take.cancel()
            await asyncio.wait([take])
            taken = [] if take.cancelled() else [take.result()]
            left = [await space.inp("k") for _ in range(3 - len(taken))]
            same(f"cancelled after {turns} turns", [*taken, *left], ["first", "second", None])
            if done:
                return

    run(law())


async def _go_on(turns: int) -> None:
    """Let a task that has just begun go on: one turn of the loop after the other, then longer."""
    for _ in range(min(turns, _TURNS)):
        await asyncio.sleep(0)
    if turns > _TURNS:
        await asyncio.sleep(_FIRST_SECONDS * _GROWTH ** (turns - _TURNS))


_OF_ARGUMENTS = (
    laws.is_a_space,
    laws.a_wait_always_looks_once,
    laws.a_wait_without_end_waits,
    laws.wrong_bounds_are_refused,
    laws.cancel_is_sticky,
    laws.a_wait_asks_in_order,
)

ASYNC_LAWS: Final[tuple[Law, ...]] = (
    is_an_async_space,
    *(law for law in laws.LAWS if law not in _OF_ARGUMENTS),
    many_tasks_wait_at_once,
    a_cancelled_take_loses_nothing,
)
