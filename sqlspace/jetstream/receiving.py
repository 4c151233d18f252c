"""The way back: entries of a stream go into a store, each once.

The law: an entry is pushed into the store, and only then deleted from the stream. What is cut off
in between is pushed again, and swallowed: its `dedupe` is the stream's name, the time when that was
made, and its seq there, and no two messages have the same. So nothing is ever lost, and nothing is
doubled as long as the file remembers it (see `dedupe` of `Store.push`).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from sqlspace.arguments import check_flag, check_headers, kind
from sqlspace.errors import BackendError, ClosedError
from sqlspace.forwarding import Pause, Route
from sqlspace.space import Context, check_context
from sqlspace.store import Store, checked_keys
from sqlspace.waiting import Waiter

from . import headers
from .endpoint import Access, Endpoint, Loop, Opened
from .link import Message, RefusedError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from tenacity.wait import wait_base

__all__ = ["Receiver", "receive"]

log = logging.getLogger("sqlspace")

_BATCH = 128
_BATCH_BYTES = 4 << 20
_LOOK_AGAIN_SECONDS = 5.0  # a lost ring is a delay and never a hang
_GRACE_SECONDS = 2.0


def receive(
    store: Store,
    keys: str | Iterable[str],
    endpoint: Endpoint,
    *,
    wait: "wait_base | None" = None,
    drain: bool = False,
    context: Context | None = None,
) -> int:
    """Take entries of a JetStream into a store, until the store or the context ends it.

    In order per key, each once: an entry is committed in the store before it is deleted from the
    stream, and a repetition after a crash is swallowed by its `dedupe`, as long as the file
    remembers that: with a history that is too short for what is pulled between a crash and the
    restart, or a `clear`, `put` or `compact` just then, an entry may be there twice. Nobody else
    takes from these keys of the stream at the same time.

    Headers, and what is left of a time to live, come along. While the server is down it is tried
    again and again.

    Args:
        store: Where they go, under the same keys.
        keys: One key, or several.
        endpoint: Where they come from.
        wait: The pause after a failure, as of `sqlspace.forward`.
        drain: Whether to return when the stream holds none of these keys any more.
        context: Ends it when it is canceled or its time is over.

    Returns:
        How many entries were received.

    Raises:
        StoreError: the store failed. Its closing and the context's end are no failure.
        ImportError: tenacity is missing.
    """
    receiver = Receiver(store, keys, endpoint, wait=wait, drain=drain, context=context)
    receiver.start()
    try:
        receiver.wait()
    finally:
        receiver.end()
    return receiver.done


class Receiver:
    """The same in parts, for who wants to watch it; the arguments are those of `receive`.

    Attributes:
        routes: By key, as it is at the moment; what was received is `sent` there.
        on_end: Called when it has ended by itself, in another thread.
    """

    def __init__(
        self,
        store: Store,
        keys: str | Iterable[str],
        endpoint: Endpoint,
        *,
        wait: "wait_base | None" = None,
        drain: bool = False,
        context: Context | None = None,
    ) -> None:
        if not isinstance(store, Store):
            raise TypeError(f"store must be a sqlspace.Store, not {kind(store)}")
        self._store = store
        self.routes = {key: Route() for key in checked_keys(keys, "keys")}
        if not isinstance(endpoint, Endpoint):
            raise TypeError(f"endpoint must be an Endpoint of jetstream, not {kind(endpoint)}")
        self._subjects = endpoint.subjects
        self._drains = check_flag(drain, "drain")
        check_context(context)
        self._pause = Pause(wait, "sqlspace.jetstream.receive")
        self._access = Access(endpoint.settings)
        self._context = context
        self._waiter = Waiter()
        self.on_end: Callable[[], object] = lambda: None
        self._moving: set[asyncio.Task[None]] = set()
        self._running: Future[None]

    @property
    def done(self) -> int:
        """How many entries were received."""
        return sum(route.sent for route in self.routes.values())

    def start(self) -> None:
        """Begin."""
        if self._context is not None:
            self._context._register(self._waiter)  # noqa: SLF001  # Context and its waits are one
        self._loop = Loop()
        self._running = self._loop.submit(self._receive_all())
        self._running.add_done_callback(self._end)

    def _end(self, _: "Future[None]") -> None:
        self._waiter.wake()
        self.on_end()

    def is_at_work(self) -> bool:
        """Whether it goes on."""
        context = self._context
        over = context is not None and (
            context.canceled
            or (context.deadline is not None and time.monotonic() >= context.deadline)
        )
        return not over and not self._running.done()

    def wait(self) -> None:
        """Wait until nothing is left to be done, or it is to end."""
        while self.is_at_work():
            left = _LOOK_AGAIN_SECONDS
            if self._context is not None and self._context.deadline is not None:
                left = min(left, max(0.0, self._context.deadline - time.monotonic()))
            self._waiter.park(left)

    def end(self, *, force: bool = False) -> None:  # noqa: ARG002  # it never takes long
        """Have it end, and wait for that; raises what it ended by."""
        self._running.cancel()
        try:
            self._loop.submit(self._finish()).result(2 * _GRACE_SECONDS)
        except TimeoutError:
            log.debug("the connection did not close in time")
        self._loop.close()
        if self._context is not None:
            self._context._unregister(self._waiter)  # noqa: SLF001
        if self._running.done() and not self._running.cancelled():
            error = self._running.exception()
            if error is not None and not isinstance(error, ClosedError):
                raise error

    # -- in the loop

    async def _receive_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for key, route in self.routes.items():
                    group.create_task(self._receive(key, route))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _receive(self, key: str, route: Route) -> None:
        """All of one key, whatever the server does."""
        failures = 0
        while True:
            try:
                await self._receive_some(key, route)
            except (BackendError, RefusedError) as error:
                failures += 1
                pause = self._pause(failures, error)
                route.failure, route.retry_at = str(error), time.time() + pause
                log.warning("%a: nothing is received: %s; again in %.1f s", key, error, pause)
                await asyncio.sleep(pause)
            else:
                return

    async def _receive_some(self, key: str, route: Route) -> None:
        """All of one key, until it is empty and drained."""
        stream = await self._access.open()
        rung = asyncio.Event()
        listener = await stream.link.listen(self._subjects.ring(key), "", rung.set)
        try:
            while True:
                rung.clear()
                batch = await self._next(stream, key)
                route.failure = ""
                if batch:
                    moving = asyncio.ensure_future(self._move(stream, key, batch, route))
                    self._moving.add(moving)
                    moving.add_done_callback(self._moved)
                    await asyncio.shield(moving)
                elif self._drains:
                    return
                else:
                    try:
                        async with asyncio.timeout(_LOOK_AGAIN_SECONDS):
                            await rung.wait()
                    except TimeoutError:
                        continue
        finally:
            await listener.end()

    async def _next(self, stream: Opened, key: str) -> list[Message]:
        """The first of the stream."""
        found: list[Message] = []
        size = seq = 0
        while len(found) < _BATCH and size < _BATCH_BYTES:
            message = await stream.link.next_message(
                self._subjects.entries,
                self._subjects.entry(key),
                seq,
                direct=stream.direct,
                doing=f"receive {key!a}",
            )
            if message is None:
                break
            found.append(message)
            size += len(message.payload)
            seq = message.seq + 1
        return found

    def _moved(self, moving: asyncio.Task[None]) -> None:
        self._moving.discard(moving)
        if not moving.cancelled():
            moving.exception()  # it has been seen, though nobody may wait any more

    async def _finish(self) -> None:
        """What is on its way into the store leaves the stream, too."""
        if self._moving:
            await asyncio.wait(self._moving, timeout=_GRACE_SECONDS)
        await self._access.close()

    async def _move(self, stream: Opened, key: str, batch: list[Message], route: Route) -> None:
        """Into the store, and when that has them, out of the stream."""
        await asyncio.to_thread(self._push, stream, key, batch)
        await stream.link.purge(  # all up to there are in the batch: it began with the first
            self._subjects.entries,
            self._subjects.entry(key),
            below=batch[-1].seq + 1,
            doing=f"receive {key!a}",
        )
        route.sent += len(batch)

    def _push(self, stream: Opened, key: str, batch: list[Message]) -> None:
        with self._store.transaction() as together:
            for message in batch:
                end = headers.expiry(message.headers)
                left = None if end is None else end - time.time()
                if left is None or left > 0:
                    together.push(
                        key,
                        message.payload,
                        ttl=left,
                        dedupe=f"{stream.id}/{message.seq}",
                        headers=_fit(headers.entry_headers(message.headers)),
                    )


def _fit(found: dict[str, str]) -> dict[str, str]:
    """Headers that the store takes; others have written them."""
    try:
        check_headers(found)
    except ValueError:
        return {
            name.encode(errors="backslashreplace").decode(): value.encode(
                errors="backslashreplace"
            ).decode()
            for name, value in found.items()
        }
    return found
