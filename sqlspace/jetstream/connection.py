"""A connection to NATS that comes back by itself, and requests that are sent until answered.

Only this file talks to nats-py. Every request is idempotent, so it is sent again until it is
answered or `patience` is over: after a time without an answer, at once after a reconnect, and when
the server says that it has no leader yet. What a request has done by then, its caller may not know;
the message of the `BackendError` says so.

Requests have an inbox of their own, and a timer of the loop each: `Client.request` costs a
`wait_for`, and leaves requests waiting when their connection is lost.
"""

import asyncio
import contextlib
import inspect
import itertools
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, NamedTuple, TypeVar

from sqlspace.errors import BackendError, ClosedError

try:
    import nats
    import nats.aio.client
    import nats.aio.msg
    import nats.aio.subscription
    import nats.errors
except ImportError as error:  # pragma: no cover  # the extra is not installed
    raise ImportError("sqlspace.jetstream needs nats-py: pip install 'sqlspace[nats]'") from error

__all__ = ["AgainError", "Connection", "Listener", "Msg", "connect_options"]

log = logging.getLogger("sqlspace")

Result = TypeVar("Result")
Msg = nats.aio.msg.Msg

ATTEMPT_SECONDS = 2.0  # without an answer the request is sent again
AGAIN_SECONDS = 0.05  # between two tries when the server said no; doubled each time
_LONGEST_PAUSE_SECONDS = 0.5


class AgainError(Exception):
    """There is no answer yet; the cause says why."""


class _Client(nats.aio.client.Client):
    async def flush(self, timeout: int = 10) -> None:  # noqa: ASYNC109  # as nats-py has it
        """Until the server has seen all that was sent.

        nats-py sends its PING ahead of what it has buffered; so it drained subscriptions of which
        the server didn't know yet that they had ended, and dropped the rings in between. When the
        first answer is there, the buffer was sent.
        """
        await super().flush(timeout)
        await super().flush(timeout)

    async def _select_next_server(self) -> None:
        """Connect to the next; nats-py leaves the socket of an attempt that failed to the GC."""
        if self._transport:
            self._transport.close()  # type: ignore[no-untyped-call]
        await super()._select_next_server()

    async def send_commands(self, commands: bytes) -> None:
        """Send lines of the protocol, as a publish does when it has made its own."""
        await self._send_command(commands)
        await self._flush_pending()


class _Told(NamedTuple):
    """A request that nobody waits for."""

    subject: str
    payload: bytes
    heard: Callable[[Msg], None]


class Connection:
    """A connection to NATS that comes back by itself, and requests over it.

    Args:
        servers: A URL, or several.
        patience: Seconds until a request that nobody answers raises `BackendError`.
        options: For `nats.connect`.
    """

    def __init__(self, servers: str | list[str], patience: float, options: dict[str, Any]) -> None:
        self.servers = servers
        self.patience = patience
        self.requests = 0
        self.closed = False
        self._closing = False
        self._lasting: set[asyncio.Task[Any]] = set()  # may ask even while it closes
        self._settled = asyncio.Event()
        self._options = options
        self._client = _Client()
        self._up = False
        self._turn = asyncio.Event()  # set, and replaced, when the connection comes, goes or ends
        self._last_error: BaseException | None = None
        self._refused: asyncio.Future[Exception] | None = None
        prefix = options.get("inbox_prefix", "_INBOX")
        self._id = secrets.token_hex(11)
        self._inbox = f"{prefix if isinstance(prefix, str) else prefix.decode()}.{self._id}."
        self._numbers = itertools.count()
        self._replies: dict[str, tuple[asyncio.Future[Msg | None], asyncio.Task[Any] | None]] = {}
        self._listeners: dict[Listener, None] = {}
        self._told: dict[str, _Told] = {}
        self._unanswered: set[str] = set()  # of those, at the last repeat
        self._outbox: deque[str] = deque()
        self._posting: asyncio.Task[None] | None = None
        self._repeating: asyncio.TimerHandle | None = None
        self._reopening: asyncio.Task[None] | None = None
        self.on_reconnect: Callable[[], None] = lambda: None

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as this end of it knows."""
        return self._up

    @property
    def max_payload(self) -> int:
        """What the server takes as one message, in bytes."""
        return self._client.max_payload

    def new_id(self) -> str:
        """An id that no other message has."""
        return f"{self._id}{next(self._numbers):x}"

    # -- the connection

    async def open(self) -> None:
        """Connect.

        Raises:
            BackendError: it can't within the patience, or the server refuses us.
        """
        try:
            async with asyncio.timeout(self.patience):
                await self._connect()
        except BackendError:
            raise
        except (OSError, nats.errors.Error) as error:  # a TimeoutError is an OSError
            await self._end()
            raise BackendError(
                f"can't connect to {self.where} within {self.patience:g} s: "
                f"{self._last_error or error!r}"
            ) from (self._last_error or error)
        except BaseException:
            await self._end()
            raise

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Do something in the background that the closing waits for, for a while."""
        task = asyncio.get_running_loop().create_task(work)
        self._lasting.add(task)
        task.add_done_callback(self._ended)
        return task

    @contextlib.contextmanager
    def lasting(self) -> Iterator[None]:
        """The current task does something that the closing waits for, for a while."""
        task = asyncio.current_task()
        assert task is not None
        self._lasting.add(task)
        try:
            yield
        finally:
            self._forget(task)

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._forget(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s: left undone: %s", self.where, error)

    def _forget(self, task: "asyncio.Task[Any]") -> None:
        self._lasting.discard(task)
        if self._is_settled:
            self._settled.set()

    @property
    def _is_settled(self) -> bool:
        return not self._lasting and not self._told

    async def close(self, seconds: float) -> None:
        """Have what is under way raise ClosedError, finish what is in the background, disconnect.

        Args:
            seconds: For what is in the background.
        """
        self._closing = True
        for reply, task in self._replies.values():
            if task not in self._lasting:
                _give_up(reply)
        self._next_turn()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._is_settled:
                    self._settled.clear()
                    await self._settled.wait()
        self.closed = True
        self._wake_all()
        for ending in (self._reopening, self._repeating):
            if ending is not None:
                ending.cancel()
        if self._told:
            log.warning("%s: left without an answer: %d requests", self.where, len(self._told))
        await self._end()

    def _wake_all(self) -> None:
        """Have every request sent again, unless it ends now."""
        for reply, _ in self._replies.values():
            _give_up(reply)
        self._next_turn()

    def _next_turn(self) -> None:
        """Have those that wait for a connection look."""
        self._turn.set()
        self._turn = asyncio.Event()

    def _ensure_open(self) -> None:
        if self.closed or (self._closing and asyncio.current_task() not in self._lasting):
            raise ClosedError("the space is closed")

    async def _connect(self) -> None:
        client = self._client = _Client()
        loop = asyncio.get_running_loop()
        refused = self._refused = loop.create_future()
        connecting = loop.create_task(
            client.connect(
                self.servers if isinstance(self.servers, str) else list(self.servers),
                **{
                    "reconnect_time_wait": 0.1,
                    # Whoever asks in vain finds a dead connection by its requests; the pings find
                    # it for those that only wait to be rung.
                    "ping_interval": max(0.5, self.patience / 4),
                    "max_outstanding_pings": 1,
                    "connect_timeout": max(0.5, self.patience / 2),
                    **self._options,
                    "max_reconnect_attempts": -1,
                    "allow_reconnect": True,
                    "error_cb": self._on_error,
                    "disconnected_cb": self._on_disconnect,
                    "reconnected_cb": self._on_reconnect,
                    "closed_cb": self._on_close,
                },
            )
        )
        try:
            await asyncio.wait((connecting, refused), return_when=asyncio.FIRST_COMPLETED)
            if refused.done() and not connecting.done():
                await self._end()
                error = refused.result()
                raise BackendError(f"{self.where} refuses us: {error}") from error
        finally:
            self._refused = None
            refused.cancel()
            if not connecting.done():
                connecting.cancel()
                await asyncio.wait((connecting,))
        connecting.result()
        await client.subscribe(f"{self._inbox}*", future=_Sink(self._on_reply))
        for listener in list(self._listeners):
            await self._subscribe(listener)
        self._up = True
        self._wake_all()
        self._outbox.clear()
        self._post(*self._told)

    async def _end(self) -> None:
        try:
            await self._client.close()
        except Exception as error:  # noqa: BLE001  # it is over either way
            log.debug("closing the connection to %s: %r", self.where, error)

    @property
    def where(self) -> str:
        """The servers, without anybody's password."""
        servers = [self.servers] if isinstance(self.servers, str) else self.servers
        return ", ".join(server.rpartition("@")[2] for server in servers)

    async def _on_error(self, error: Exception) -> None:
        self._last_error = error
        log.debug("%s: %r", self.where, error)
        refused = (
            isinstance(error, nats.errors.AuthorizationError)
            or "authorization" in str(error).lower()
        )
        if refused and self._refused is not None and not self._refused.done():
            self._refused.set_result(error)

    async def _on_disconnect(self) -> None:
        if not self.closed and self._up:
            self._up = False
            log.warning("disconnected from %s: %s", self.where, self._last_error)
        self._wake_all()

    async def _on_reconnect(self) -> None:
        log.info("connected to %s again", self.where)
        self._up = True
        self._wake_all()
        self._outbox.clear()
        self._post(*self._told)
        self.on_reconnect()

    async def _on_close(self) -> None:
        """nats-py gives up for good after some errors; this doesn't."""
        if not self.closed and (self._reopening is None or self._reopening.done()):
            self._up = False
            self._reopening = asyncio.get_running_loop().create_task(self._reopen())

    async def _reopen(self) -> None:
        while True:
            try:
                await self._connect()
            except (OSError, nats.errors.Error, BackendError) as error:
                self._last_error = error
                await asyncio.sleep(_LONGEST_PAUSE_SECONDS)
            else:
                await self._on_reconnect()
                return

    def _on_reply(self, message: Msg) -> None:
        number = message.subject[len(self._inbox) :]
        asked = self._replies.get(number)
        if asked is None:
            self._on_told(number, message)
        elif not asked[0].done():
            asked[0].set_result(message)

    # -- requests

    async def request(
        self,
        send: Callable[[str], Awaitable[None]],
        read: Callable[[Msg], Result],
        doing: str,
        *,
        writes: bool,
    ) -> Result:
        """Ask until there is an answer, and return what `read` makes of it.

        Args:
            send: Called as `send(reply)`: publish, with the last message's answer to go there.
            read: May raise `RefusedError`, which comes through.
            doing: What it is, for the error's message.
            writes: Whether it may have happened when nobody answers.

        Raises:
            ClosedError: the link is closed.
            BackendError: nobody answered.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.patience
        pause = AGAIN_SECONDS
        while True:
            try:
                return read(await self._attempt(send, deadline))
            except AgainError as error:
                why = error
            left = deadline - loop.time()
            if left <= 0:
                break
            if self.connected:
                await asyncio.sleep(min(pause, left))
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        cause = why.__cause__ or self._last_error
        after = "it may have happened" if writes else "nothing changed"
        raise BackendError(
            f"{doing}: no answer from {self.where} for {self.patience:g} s ({why}); {after}"
        ) from cause

    async def _attempt(self, send: Callable[[str], Awaitable[None]], deadline: float) -> Msg:
        """Send it once, and wait for the answer."""
        loop = asyncio.get_running_loop()
        self._ensure_open()
        while not self._up:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._turn.wait()
            except TimeoutError as error:
                raise AgainError(f"not connected: {self._last_error}") from error
            self._ensure_open()
        number = f"{next(self._numbers):x}"
        reply: asyncio.Future[Msg | None] = loop.create_future()
        task = asyncio.current_task()
        self._replies[number] = reply, task
        timer = loop.call_at(min(loop.time() + ATTEMPT_SECONDS, deadline), _give_up, reply)
        self.requests += 1
        canceled = 0 if task is None else task.cancelling()
        try:
            await send(self._inbox + number)
            if self._outbox:  # it goes out with this, which is what somebody waits for
                await self._post_all()
            if task is not None and task.cancelling() > canceled:
                raise asyncio.CancelledError  # nats-py swallows it while its buffer is full
            message = await reply
        except nats.errors.MaxPayloadError as error:
            raise ValueError(
                f"a message must be at most {self.max_payload:,} bytes with its headers here"
            ) from error
        except nats.errors.Error as error:
            self._last_error = error
            raise AgainError(str(error)) from error
        finally:
            timer.cancel()
            del self._replies[number]
        if message is None:
            self._ensure_open()
            raise AgainError("it is silent" if self.connected else "disconnected")
        if _is_unheard(message):
            raise AgainError("no responders: JetStream is not enabled there, or has no leader")
        return message

    def sending(
        self, subject: str, payload: bytes, headers: dict[str, str] | None = None
    ) -> Callable[[str], Awaitable[None]]:
        """For `request`: a message."""
        return lambda reply: self._client.publish(subject, payload, reply, headers)

    # -- requests that nobody waits for

    def tell(self, subject: str, payload: bytes, heard: Callable[[Msg], None]) -> None:
        """Send a request soon, and again until it is answered; the closing waits for that a while.

        It costs less than a task with a request of its own.

        Args:
            subject: Where to.
            payload: What.
            heard: Called with the answer; if it raises AgainError, there is another.
        """
        number = f"{next(self._numbers):x}"
        self._told[number] = _Told(subject, payload, heard)
        self._post(number)
        if self._repeating is None:
            self._repeating = asyncio.get_running_loop().call_later(ATTEMPT_SECONDS, self._repeat)

    def _post(self, *numbers: str) -> None:
        self._outbox.extend(numbers)
        asyncio.get_running_loop().call_soon(self._post_soon)

    def _post_soon(self) -> None:
        if self._outbox and self._posting is None and self._up:
            self._posting = asyncio.get_running_loop().create_task(self._post_all())
            self._posting.add_done_callback(self._posted)

    def _posted(self, task: "asyncio.Task[None]") -> None:
        self._posting = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("%s: %r", self.where, error)  # they are sent again

    async def _post_all(self) -> None:
        while self._outbox and self._up:
            number = self._outbox.popleft()
            if (told := self._told.get(number)) is not None:
                self.requests += 1
                await self._client.publish(told.subject, told.payload, self._inbox + number)

    def _repeat(self) -> None:
        """Send again what has had no answer since the last time."""
        self._outbox.clear()
        self._post(*self._unanswered.intersection(self._told))
        self._unanswered = set(self._told)
        self._repeating = None
        if self._told:
            self._repeating = asyncio.get_running_loop().call_later(ATTEMPT_SECONDS, self._repeat)

    def _on_told(self, number: str, message: Msg) -> None:
        told = self._told.get(number)
        if told is None or _is_unheard(message):
            return
        try:
            told.heard(message)
        except AgainError:
            return
        self._told.pop(number, None)
        if self._is_settled:
            self._settled.set()

    # -- rings

    async def listen(self, subject: str, queue: str, ring: Callable[[], None]) -> "Listener":
        """Have `ring` called for each message of a subject; one listener of a queue gets it."""
        listener = Listener(self, subject, queue, ring)
        self._listeners[listener] = None
        await self._subscribe(listener)
        return listener

    async def _subscribe(self, listener: "Listener") -> None:
        try:
            await listener.subscribe(self._client)
        except nats.errors.Error as error:  # it is subscribed with the next connection
            log.debug("subscribing at %s: %r", self.where, error)

    def forget(self, listener: "Listener") -> None:
        """Don't subscribe it with the next connection."""
        self._listeners.pop(listener, None)

    async def ring(self, subject: str) -> None:
        """Publish an empty message that nobody keeps, unless it gets lost."""
        await self.send(subject, b"")

    def ensure_fits(self, size: int) -> None:
        """Refuse a message that the server would: it would close the connection, too."""
        if size > self.max_payload:
            raise nats.errors.MaxPayloadError

    async def send_commands(self, commands: bytes) -> None:
        """Send lines of the protocol: messages that were put together by the caller."""
        await self._client.send_commands(commands)

    async def send(self, subject: str, payload: bytes) -> None:
        """Publish what may get lost."""
        if self.connected and not self.closed:
            try:
                await self._client.publish(subject, payload)
            except nats.errors.Error as error:
                log.debug("%s: %r", subject, error)


class Listener:
    """A subscription, over all that a connection goes through."""

    def __init__(
        self, link: Connection, subject: str, queue: str, ring: Callable[[], None]
    ) -> None:
        self._link, self._subject, self._queue, self._ring = link, subject, queue, ring
        self._client: _Client | None = None
        self._subscription: nats.aio.subscription.Subscription | None = None

    async def subscribe(self, client: _Client) -> None:
        """Subscribe with this connection, once."""
        if client is self._client:
            return

        self._client = client
        self._subscription = await client.subscribe(
            self._subject, queue=self._queue, future=_Sink(lambda _: self._ring())
        )

    async def end(self) -> None:
        """Unsubscribe; what rings until the server knows of it still rings here."""
        self._link.forget(self)
        subscription, self._subscription = self._subscription, None
        if subscription is None:
            return
        try:
            await subscription.drain()  # type: ignore[no-untyped-call]
        except nats.errors.Error as error:
            log.debug("unsubscribing %s: %r", self._subject, error)
            with contextlib.suppress(nats.errors.Error):  # or its next connection brings it back
                await subscription.unsubscribe()


class _Sink(asyncio.Future[Msg]):
    """Where nats-py puts a subscription's messages, each as it is read.

    With a callback instead, each goes through a queue to a task: two turns of the loop more.
    """

    def __init__(self, put: Callable[[Msg], None]) -> None:
        super().__init__()
        self._put = put

    def set_result(self, message: Msg) -> None:
        """Called with every message."""
        self._put(message)


def connect_options() -> frozenset[str]:
    """The names of what `nats.connect` takes."""
    return frozenset(inspect.signature(nats.aio.client.Client.connect).parameters) - {"self"}


def _give_up(reply: "asyncio.Future[Msg | None]") -> None:
    if not reply.done():
        reply.set_result(None)


def _is_unheard(message: Msg) -> bool:
    headers = message.headers
    return not message.data and headers is not None and headers.get("Status") == "503"
