"""The contract: what a space can do, and how a wait is bounded.

A keyed tuple space: a key holds a FIFO bag of entries, so a key is a queue. `out` adds, `in_`
takes the head, `rd` copies it, `inp` and `rdp` are their forms that never wait. Every backend
offers these verbs, and the conformance suite in `sqlspace.testing` is their law.
"""

import time
from typing import Any, Protocol, runtime_checkable

from .arguments import check_timeout, kind

__all__ = ["AsyncSpace", "Context", "Space"]


class Wakeable(Protocol):
    """Something that a `Context` wakes when it is canceled."""

    def wake(self) -> None:
        """End a park, now or, if none has begun, as soon as it begins."""


class Context:
    """A deadline and a switch that end waits; one context may bound many of them.

    Args:
        timeout: Seconds from now until waits under this context raise `DeadlineError`; None or
            infinity is no deadline.
    """

    __slots__ = ("_canceled", "_waiting", "deadline")

    def __init__(self, timeout: float | None = None) -> None:
        seconds = check_timeout(timeout)
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self._canceled = False
        # A dict as an ordered set. Its single steps are atomic, so cancel() needs no lock and may
        # be called from anywhere, a signal handler included.
        self._waiting: dict[Wakeable, None] = {}

    @property
    def canceled(self) -> bool:
        """Whether `cancel` was called; it stays so."""
        return self._canceled

    def cancel(self) -> None:
        """End every wait under this context with `CanceledError`, those to come included."""
        self._canceled = True
        for waiter in list(self._waiting):
            waiter.wake()

    def _register(self, waiter: Wakeable) -> None:
        self._waiting[waiter] = None

    def _unregister(self, waiter: Wakeable) -> None:
        self._waiting.pop(waiter, None)


@runtime_checkable
class Space(Protocol):
    """What every backend offers; any number of threads may call any verb at once."""

    def out(self, key: str, value: Any) -> None:
        """Add `value` behind all entries of `key`.

        After close it writes nothing: `Local` ignores the call, a durable backend raises
        `ClosedError`.
        """

    def in_(self, key: str, timeout: float | None = None, *, context: Context | None = None) -> Any:
        """Take the head of `key`, waiting for one.

        Raises:
            ClosedError, CanceledError, DeadlineError: asked for in this order, and a wait that
                ends so has taken nothing.
        """

    def rd(self, key: str, timeout: float | None = None, *, context: Context | None = None) -> Any:
        """Return the head of `key` and leave it there, waiting for one; raises as `in_`."""

    def inp(self, key: str, default: Any = None) -> Any:
        """Take the head of `key`, or return `default`; never waits."""

    def rdp(self, key: str, default: Any = None) -> Any:
        """Return the head of `key` and leave it there, or return `default`; never waits."""

    def len(self, key: str) -> int:
        """How many entries `key` holds."""

    def close(self) -> None:
        """Close the space and end every wait with `ClosedError`; idempotent."""


@runtime_checkable
class AsyncSpace(Protocol):
    """A `Space` for coroutines: the same verbs, awaited; any number of tasks may call them at once.

    A wait is bounded by `asyncio.timeout`, and ended by the cancellation of its task. Whenever that
    comes, nothing is lost: the verb has returned the entry, or it is in the space.
    """

    async def out(self, key: str, value: Any) -> None:
        """As `Space.out`."""

    async def in_(self, key: str) -> Any:
        """As `Space.in_`, without a bound of its own."""

    async def rd(self, key: str) -> Any:
        """As `Space.rd`, without a bound of its own."""

    async def inp(self, key: str, default: Any = None) -> Any:
        """As `Space.inp`."""

    async def rdp(self, key: str, default: Any = None) -> Any:
        """As `Space.rdp`."""

    async def len(self, key: str) -> int:
        """As `Space.len`."""

    async def close(self) -> None:
        """As `Space.close`."""


def check_context(context: object) -> None:
    """Refuse what isn't a `Context` or None."""
    if context is not None and not isinstance(context, Context):
        raise TypeError(f"context must be a sqlspace.Context or None, not {kind(context)}")
