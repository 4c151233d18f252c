"""JetStream: the verbs of a space over JetStream, for threads.

A thread of its own runs a loop with an AsyncJetStream, and each call is a task there, whose end its
thread waits for. What ends the wait, a timeout, a context, Ctrl-C, cancels the task and waits until
that is done. A taken entry is deleted when its thread has the value in hand, and restored if an
interrupt came before that.
"""

import asyncio
import functools
import os
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self

from sqlspace.arguments import check_key, check_timeout
from sqlspace.durable import dumps_json, loads_json
from sqlspace.errors import BackendError, CanceledError, ClosedError, DeadlineError
from sqlspace.space import Context, check_context
from sqlspace.store import Store
from sqlspace.waiting import LOOK_AGAIN_SECONDS, MISSING, Waiter, nearer_end, surely

from .asynchronous import AsyncJetStream, Taken
from .endpoint import JetStreamSender
from .receipts import Claim

__all__ = ["JetStream"]

# What a forked child has inherited of its parent's loops. To collect it would unregister the
# parent's descriptors from the selector that they share.
_inherited: list["_Engine"] = []


class _Engine:
    """A thread with a loop, and a space in it."""

    def __init__(self, space: AsyncJetStream) -> None:
        self.pid = os.getpid()
        self.space = space
        self.loop = asyncio.new_event_loop()
        self.calls: set[_Call] = set()
        self.ended = False
        self._thread = threading.Thread(target=self._run, name="sqlspace-jetstream", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(self.space.close())
            while tasks := asyncio.all_tasks(self.loop):  # nats-py's, which may begin others
                for task in tasks:
                    task.cancel()
                self.loop.run_until_complete(asyncio.wait(tasks))
        finally:
            self.ended = True
            for call in list(self.calls):
                call.waiter.wake()
            self.loop.close()

    def post(self, step: Callable[..., object], *arguments: object) -> None:
        """Have the loop do something soon; nothing if it has ended."""
        try:
            self.loop.call_soon_threadsafe(step, *arguments)
        except RuntimeError:  # closed
            if not self.loop.is_closed():
                raise

    def close(self) -> None:
        """Close the space, and end the thread."""
        closing = _Call(self, self.space.close)
        closing.start()
        closing.wait()
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """End the thread soon."""
        self.post(self.loop.stop)


class _Call:
    """A call of a thread, and its task in the loop."""

    def __init__(self, engine: _Engine, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self.waiter = Waiter()
        self.done = False
        self.looked = False
        self.finished = False
        self._engine = engine
        self._work = work
        self._task: asyncio.Task[Any] | None = None
        self._canceled = False
        self.value: Any = MISSING
        self.error: BaseException | None = None

    def start(self) -> None:
        """Have it begin."""
        self._engine.calls.add(self)
        self._engine.post(self._begin)

    def _begin(self) -> None:
        if not self._canceled:
            self._task = self._engine.loop.create_task(self._work())
            self._task.add_done_callback(self._end)

    def _end(self, task: "asyncio.Task[Any]") -> None:
        if task.cancelled():
            self.error = asyncio.CancelledError()
        elif (error := task.exception()) is not None:
            self.error = error
        else:
            self.value = task.result()
        self._task = None  # to forget it runs Python, in which an interrupt would be swallowed
        self.done = True
        self._engine.calls.discard(self)
        self.waiter.wake()

    def look(self) -> None:
        """The first look was in vain."""
        self.looked = True
        self.waiter.wake()

    def cancel(self) -> None:
        """Have it end; what it has taken by then is its value."""
        self._engine.post(self._cancel)

    def _cancel(self) -> None:
        self._canceled = True
        if self._task is not None:
            self._task.cancel()
        elif not self.done:
            self.error = asyncio.CancelledError()
            self.done = True
            self._engine.calls.discard(self)
            self.waiter.wake()

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self.done or self._engine.ended

    def wait(self) -> None:
        """Until it is over."""
        while not self.is_over:
            self.waiter.park(LOOK_AGAIN_SECONDS)

    def result(self) -> Any:
        """Begin, wait, and return what it returned; an interrupt ends it."""
        try:
            self.start()
            self.wait()
        except BaseException:
            surely(self.abandon)
            raise
        return self.outcome()

    def outcome(self) -> Any:
        """What it returned; or raise what it raised."""
        error, self.error = self.error, None
        if error is not None and not isinstance(error, asyncio.CancelledError):
            raise error
        if error is not None or not self.done:
            raise ClosedError("the space is closed")
        return self.value

    def ensure_connected(self) -> None:
        """Refuse to say that there is nothing if nobody could look."""
        link = self._engine.space.link
        if not link.connected:
            raise BackendError(f"the wait's time is over, and {link.where} can't be reached")

    def finish(self, claim: Claim) -> None:
        """Its thread has the value of what it took."""
        self._engine.post(self._finish, claim)

    def _finish(self, claim: Claim) -> None:
        self.finished = True
        self._engine.space.finish(claim)

    def abandon(self) -> None:
        """End it, and give back what it has taken; idempotent."""
        self.cancel()
        self.wait()
        if isinstance(self.value, Taken):
            self._engine.post(self._restore)

    def _restore(self) -> None:
        if isinstance(self.value, Taken):
            claim, self.value = self.value.claim, MISSING
            self._engine.space.restore(claim, finished=self.finished)


class JetStream:
    """A `Space` in a NATS server, or a cluster of them: for threads, processes and machines.

    When `out` returns, the stream has the entry. `in_` takes the head, first in, first out for each
    key; no two take the same entry, and none is lost, whoever dies: taker, server or connection. A
    taker that is killed inside of `in_` may have consumed the one entry that it was taking; so may
    one that can't reach the server from then until it is closed. For up to two minutes such an
    entry is passed by, and still counted and shown.

    A wait is rung by the server, and asks it for nothing but a look every five seconds. The server
    must be nats-server 2.10 or later, for a ttl 2.11. In a forked child the space connects anew.

    Args:
        servers: A URL of a server, or several of one cluster.
        stream: The stream's name; a second, NAME-taken, holds who has taken what. Both are made
            unless they are there; then they are used as they are, or refused.
        dumps: Makes bytes of a value; JSON unless told otherwise.
        loads: Makes a value of them again.
        replicas: On how many servers of the cluster it stands, if this makes the stream.
        storage: "file" or "memory", likewise. A server writes to the disk what it acknowledges, and
            syncs it every two minutes, unless its configuration says `sync_interval: always`.
        max_bytes: All entries together; beyond that `out` raises `BackendError`. Likewise.
        max_msgs: How many entries there may be. Likewise.
        patience: Seconds that a call goes on asking a server that doesn't answer; then it raises
            `BackendError`.
        connect: More for `nats.connect`: user, password, token, user_credentials, tls, …

    Raises:
        BackendError: it can't connect within the patience, or the stream is not one of ours.
    """

    def __init__(
        self,
        servers: str | Sequence[str] = "nats://127.0.0.1:4222",
        *,
        stream: str = "sqlspace",
        dumps: Callable[[Any], bytes] = dumps_json,
        loads: Callable[[bytes], Any] = loads_json,
        replicas: int = 1,
        storage: str = "file",
        max_bytes: int | None = None,
        max_msgs: int | None = None,
        patience: float = 10.0,
        **connect: Any,
    ) -> None:
        self._closed = True  # until it is open
        self._make = functools.partial(
            AsyncJetStream,
            servers,
            stream=stream,
            dumps=dumps,
            loads=loads,
            replicas=replicas,
            storage=storage,
            max_bytes=max_bytes,
            max_msgs=max_msgs,
            patience=patience,
            **connect,
        )
        self._reopening = threading.Lock()
        self._started = self._start()
        self._closed = False

    def _start(self) -> _Engine:
        engine = _Engine(self._make())
        try:
            _Call(engine, engine.space.open).result()
        except BaseException:
            engine.close()
            raise
        return engine

    @property
    def _engine(self) -> _Engine:
        if self._closed:
            raise ClosedError("the space is closed")
        if self._started.pid != os.getpid():
            with self._reopening:
                if self._started.pid != os.getpid():
                    _inherited.append(self._started)
                    self._started = self._start()
        return self._started

    def out(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        """Add `value` behind all entries of `key`; when this returns, the stream has it.

        Args:
            key: 1 to 1,024 bytes in UTF-8, no NUL.
            value: What the codec takes; what it raises comes through, and nothing was added.
            ttl: Seconds until the entry is gone if nobody takes it; None or infinity: never. By
                the clocks of the machines that take part.

        Raises:
            ClosedError: nothing was added.
            BackendError: says whether it may have been. It is full: nothing was added.
        """
        key, payload, seconds = self._started.space.packed(key, value, ttl)
        engine = self._engine
        _Call(engine, lambda: engine.space.put(key, payload, seconds)).result()

    def in_(self, key: str, timeout: float | None = None, *, context: Context | None = None) -> Any:
        """Take the head of `key`, waiting for one.

        Raises:
            ClosedError, CanceledError, DeadlineError: in this order; nothing was taken.
            DecodeError: The codec can't read the head, which is under KEY/dead now, or, if `key` is
                too long for that, where it was.
            BackendError: nothing was taken. It comes instead of DeadlineError if the server can't
                be reached.
        """
        return self._wait(check_key(key), timeout, context, takes=True)

    def rd(self, key: str, timeout: float | None = None, *, context: Context | None = None) -> Any:
        """Return the head of `key` and leave it there, waiting for one; raises as `in_`.

        Raises:
            DecodeError: The codec can't read the head, which stays.
        """
        return self._wait(check_key(key), timeout, context, takes=False)

    def inp(self, key: str, default: Any = None) -> Any:
        """Take the head of `key`, or return `default`; never waits. Raises as `in_`."""
        key = check_key(key)
        engine = self._engine
        call = _Call(engine, lambda: engine.space.try_take(key))
        return _returned(call, lambda: _begun(call), default, takes=True)

    def rdp(self, key: str, default: Any = None) -> Any:
        """Return the head of `key` and leave it there, or return `default`. Raises as `rd`."""
        key = check_key(key)
        engine = self._engine
        value = _Call(engine, lambda: engine.space.try_read(key)).result()
        return default if value is MISSING else value

    def len(self, key: str) -> int:
        """How many entries `key` holds.

        What another client has just taken may be counted for a moment yet, or, if that client has
        died over it, for a minute or two; and so may for a second what has outlived its ttl.
        """
        key = check_key(key)
        engine = self._engine
        return int(_Call(engine, lambda: engine.space.len(key)).result())

    def close(self) -> None:
        """Close the space and end every wait with `ClosedError`; idempotent.

        What is under way to the server is finished if that takes no more than two seconds.
        """
        self._closed = True
        if self._started.pid == os.getpid():
            self._started.close()

    def _sender(self, store: Store) -> JetStreamSender:
        """What sends to it for `sqlspace.forward`; with a connection of its own."""
        return JetStreamSender(store, self._started.space.settings)

    def _wait(
        self, key: str, timeout: float | None, context: Context | None, *, takes: bool
    ) -> Any:
        seconds = check_timeout(timeout)
        check_context(context)
        deadline = nearer_end(seconds, context)
        engine = self._engine
        if context is not None and context.canceled:
            raise CanceledError("the wait's context was canceled")
        space = engine.space
        if deadline is not None and deadline <= time.monotonic():
            look = space.try_take if takes else space.try_read
            call = _Call(engine, lambda: look(key))
        else:
            verb = space.take if takes else space.read
            call = _Call(engine, lambda: verb(key, call.look))
        value = _returned(call, lambda: _bounded(call, deadline, context), MISSING, takes=takes)
        if value is MISSING:
            raise DeadlineError("the wait's time is over")
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        if not self._closed and self._started.pid == os.getpid():
            self._started.stop()
            _warn(f"unclosed {self!r}", ResourceWarning, source=self)

    def __repr__(self) -> str:
        return repr(self._started.space).replace("AsyncJetStream", type(self).__name__)


def _returned(call: _Call, wait: Callable[[], Any], default: Any, *, takes: bool) -> Any:
    """Wait, and return the value; what was taken is finished, or given back."""
    try:
        found = wait()
        if found is MISSING:
            return default
        if not takes:
            return found
        claim, value = found
        call.finish(claim)
        return value
    except BaseException:
        surely(call.abandon)
        raise


def _begun(call: _Call) -> Any:
    call.start()
    call.wait()
    return call.outcome()


def _bounded(call: _Call, deadline: float | None, context: Context | None) -> Any:
    """Wait for a call until the deadline, or its context's end."""
    if context is None:
        return _until(call, deadline, None)
    context._register(call.waiter)  # noqa: SLF001  # Context and its waits are one piece
    try:
        return _until(call, deadline, context)
    finally:
        context._unregister(call.waiter)  # noqa: SLF001


def _until(call: _Call, deadline: float | None, context: Context | None) -> Any:
    call.start()
    canceled = expired = False
    while not call.is_over:
        left = LOOK_AGAIN_SECONDS
        if not canceled and context is not None and context.canceled:
            canceled = True
            call.cancel()
        if deadline is not None and not canceled and not expired:
            left = min(left, deadline - time.monotonic())
            if left <= 0:
                left = LOOK_AGAIN_SECONDS
                if call.looked:  # else the first look is under way, and wakes us
                    expired = True
                    call.cancel()
        call.waiter.park(left)
    if isinstance(call.error, asyncio.CancelledError):
        if canceled:
            raise CanceledError("the wait's context was canceled")
        if expired:
            call.ensure_connected()
            return MISSING
    return call.outcome()
