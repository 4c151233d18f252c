"""The only file that talks to nats-py: one connection, requests that are tried again, and errors.

Every request is idempotent, so it is sent again until it is answered or `patience` is over: after
a time without an answer, at once after a reconnect, and when the server says that it has no leader
yet. What a request has done by then, its caller may not know; the message of the `BackendError`
says so.

Requests have an inbox of their own, and a timer of the loop each: `Client.request` costs a
`wait_for`, and leaves requests waiting when their connection is lost.
"""

import asyncio
import base64
import functools
import itertools
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
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

__all__ = ["Link", "Listener", "Message", "Outgoing", "RefusedError"]

log = logging.getLogger("sqlspace")

Result = TypeVar("Result")
Msg = nats.aio.msg.Msg

ATTEMPT_SECONDS = 2.0  # without an answer the request is sent again
BATCH = 1000  # messages in one atomic batch, as many as the server allows
AGAIN_SECONDS = 0.05  # between two tries when the server said no; doubled each time
_LONGEST_PAUSE_SECONDS = 0.5

# JetStream's own numbers of errors.
NO_MESSAGE = 10037
NO_STREAM = 10059
STREAM_DIFFERS = 10058
STORE_FAILED = 10077  # a full stream, above all; trying again doesn't help
WRONG_LAST_SEQUENCE = 10071
_CLAIM_UNDER_WAY = 10164  # a wrong last sequence too, of what is being written just now
_DUPLICATE_UNDER_WAY = 10158
DUPLICATE_IN_BATCH = 10201
_NO_BATCHES = 10174
_DELETE_FAILED = 10057
_NOT_THERE = frozenset({"no message found", "stream store EOF"})  # EOF: beyond the last


class Message(NamedTuple):
    """A message that a stream holds."""

    subject: str
    seq: int
    payload: bytes
    headers: Mapping[str, str]
    time: str
    """When the server stored it, as RFC 3339."""


class Outgoing(NamedTuple):
    """A message on its way into a stream."""

    subject: str
    payload: bytes
    message_id: str
    headers: Mapping[str, str] = MappingProxyType({})


class RefusedError(Exception):
    """The server's answer is no, and would be no again."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(number, text)
        self.number = number
        self.text = text

    def __str__(self) -> str:
        return f"{self.text} ({self.number})"


class _AgainError(Exception):
    """There is no answer yet; the cause says why."""


class Link:
    """A connection to NATS that comes back by itself, and what a space asks of JetStream.

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
        self._options = options
        self._client = nats.aio.client.Client()
        self._up = asyncio.Event()
        self._last_error: BaseException | None = None
        self._refused: asyncio.Future[Exception] | None = None
        self._inbox = f"_INBOX.{secrets.token_hex(11)}."
        self._numbers = itertools.count()
        self._replies: dict[str, asyncio.Future[Msg | None]] = {}
        self._subscriptions: dict[Listener, None] = {}
        self._reopening: asyncio.Task[None] | None = None
        self.on_reconnect: Callable[[], None] = lambda: None

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as this end of it knows."""
        return self._up.is_set()

    @property
    def max_payload(self) -> int:
        """What the server takes as one message, in bytes."""
        return self._client.max_payload

    def new_id(self) -> str:
        """An id that no other message has."""
        return f"{self._inbox[7:-1]}{next(self._numbers):x}"

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
                f"can't connect to {self._where()} within {self.patience:g} s: "
                f"{self._last_error or error!r}"
            ) from (self._last_error or error)
        except BaseException:
            await self._end()
            raise

    async def close(self) -> None:
        """Disconnect; what is under way raises ClosedError."""
        self.closed = True
        if self._reopening is not None:
            self._reopening.cancel()
        self._fail_all()
        self._up.set()  # for those that wait for it; they see that it is closed
        await self._end()

    async def _connect(self) -> None:
        client = self._client = nats.aio.client.Client()
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
                raise BackendError(f"{self._where()} refuses us: {error}") from error
        finally:
            self._refused = None
            refused.cancel()
            if not connecting.done():
                connecting.cancel()
                await asyncio.wait((connecting,))
        connecting.result()
        await client.subscribe(f"{self._inbox}*", cb=self._on_reply)
        for listener in self._subscriptions:
            await listener.subscribe(client)
        self._up.set()

    async def _end(self) -> None:
        try:
            await self._client.close()
        except Exception as error:  # noqa: BLE001  # it is over either way
            log.debug("closing the connection to %s: %r", self._where(), error)

    def _where(self) -> str:
        """The servers, without anybody's password."""
        servers = [self.servers] if isinstance(self.servers, str) else self.servers
        return ", ".join(server.rpartition("@")[2] for server in servers)

    async def _on_error(self, error: Exception) -> None:
        self._last_error = error
        log.debug("%s: %r", self._where(), error)
        refused = (
            isinstance(error, nats.errors.AuthorizationError)
            or "authorization" in str(error).lower()
        )
        if refused and self._refused is not None and not self._refused.done():
            self._refused.set_result(error)

    async def _on_disconnect(self) -> None:
        if not self.closed and self._up.is_set():
            self._up.clear()
            log.warning("disconnected from %s: %s", self._where(), self._last_error)
        self._fail_all()

    async def _on_reconnect(self) -> None:
        log.info("connected to %s again", self._where())
        self._up.set()
        self.on_reconnect()

    async def _on_close(self) -> None:
        """nats-py gives up for good after some errors; this doesn't."""
        if not self.closed and (self._reopening is None or self._reopening.done()):
            self._up.clear()
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

    def _fail_all(self) -> None:
        """Have every request sent again, as soon as there is a connection."""
        for reply in self._replies.values():
            if not reply.done():
                reply.set_result(None)

    async def _on_reply(self, message: Msg) -> None:
        reply = self._replies.get(message.subject[len(self._inbox) :])
        if reply is not None and not reply.done():
            reply.set_result(message)

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
            except _AgainError as error:
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
            f"{doing}: no answer from {self._where()} for {self.patience:g} s ({why}); {after}"
        ) from cause

    async def _attempt(self, send: Callable[[str], Awaitable[None]], deadline: float) -> Msg:
        """Send it once, and wait for the answer."""
        loop = asyncio.get_running_loop()
        if not self._up.is_set():
            try:
                async with asyncio.timeout_at(deadline):
                    await self._up.wait()
            except TimeoutError as error:
                raise _AgainError(f"not connected: {self._last_error}") from error
        if self.closed:
            raise ClosedError("the space is closed")
        number = f"{next(self._numbers):x}"
        reply: asyncio.Future[Msg | None] = loop.create_future()
        self._replies[number] = reply
        timer = loop.call_at(min(loop.time() + ATTEMPT_SECONDS, deadline), _give_up, reply)
        self.requests += 1
        try:
            await uncaught(send(self._inbox + number))
            message = await reply
        except nats.errors.MaxPayloadError as error:
            raise ValueError(
                f"a message must be at most {self.max_payload:,} bytes with its headers here"
            ) from error
        except nats.errors.Error as error:
            self._last_error = error
            raise _AgainError(str(error)) from error
        finally:
            timer.cancel()
            del self._replies[number]
        if self.closed:
            raise ClosedError("the space was closed")
        if message is None:
            raise _AgainError("it is silent" if self.connected else "disconnected")
        if not message.data and message.headers and message.headers.get("Status") == "503":
            raise _AgainError("no responders: JetStream is not enabled there, or has no leader")
        return message

    def _sending(
        self, subject: str, payload: bytes, headers: dict[str, str] | None = None
    ) -> Callable[[str], Awaitable[None]]:
        return lambda reply: self._client.publish(subject, payload, reply, headers)

    async def api(
        self, verb: str, request: Mapping[str, Any] | None, doing: str, *, writes: bool
    ) -> dict[str, Any]:
        """Ask JetStream's API, as `$JS.API.VERB`.

        Raises:
            RefusedError: its answer is an error.
        """
        payload = b"" if request is None else json.dumps(request).encode()
        send = self._sending(f"$JS.API.{verb}", payload)
        return await self.request(send, _answer, doing, writes=writes)

    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        doing: str = "publish",
        message_id: str | None = None,
    ) -> int:
        """Have a stream store a message, once however often it is sent; its seq there.

        That holds as long as the stream's duplicate_window, which is longer than the patience.

        Args:
            subject: Of the stream.
            payload: At most `max_payload` bytes with the headers.
            headers: More of them.
            doing: For the error's message.
            message_id: By which the stream knows it again; a new one unless given.

        Raises:
            BackendError: nobody answered, or the stream is full.
            RefusedError: the server said no for another reason.
        """
        own = {"Nats-Msg-Id": message_id or self.new_id(), **(headers or {})}
        try:
            return await self.request(
                self._sending(subject, payload, own), _seq, doing, writes=True
            )
        except RefusedError as error:
            if error.number == STORE_FAILED:
                raise BackendError(f"{doing}: {error}; nothing was written") from error
            raise

    async def publish_many(self, messages: Sequence[Outgoing], *, doing: str = "publish") -> None:
        """Have a stream store messages in this order, each once however often it is sent.

        They go out together, as one atomic batch of at most `BATCH`, so all or none are stored. To
        have several publishes under way at once instead would not keep the order: a stream that
        has just got a leader takes the later ones.

        Where some are stored already, or the server has no batches (before 2.12, or a stream
        without allow_atomic), they go one after the other.

        Args:
            messages: With ids by which the stream knows them again, of one stream.
            doing: For the error's message.

        Raises:
            BackendError, RefusedError: as `publish`. Published again, those that are stored
                already are not stored twice, as long as the duplicate_window lasts.
        """
        for start in range(0, len(messages), BATCH):
            await self._publish_batch(messages[start : start + BATCH], doing)

    async def publish_batch(self, messages: Sequence[Outgoing], *, doing: str = "publish") -> int:
        """Have a stream store up to `BATCH` messages as one, or none; the seq of the last one.

        Raises:
            BackendError: nobody answered, or the stream is full.
            RefusedError: the server said no for another reason. If an answer was lost before, it
                may be that all of them are there.
        """
        try:
            return await self.request(
                functools.partial(self._send_batch, messages), _seq, doing, writes=True
            )
        except RefusedError as error:
            if error.number == STORE_FAILED:
                raise BackendError(f"{doing}: {error}; nothing was written") from error
            raise

    async def _publish_batch(self, messages: Sequence[Outgoing], doing: str) -> None:
        if len(messages) > 1:
            try:
                await self.publish_batch(messages, doing=doing)
            except RefusedError as error:
                if error.number not in {DUPLICATE_IN_BATCH, _NO_BATCHES}:
                    raise
            else:
                return
        for subject, payload, message_id, headers in messages:
            await self.publish(
                subject, payload, headers=headers, doing=doing, message_id=message_id
            )

    async def _send_batch(self, messages: Sequence[Outgoing], reply: str) -> None:
        batch = self.new_id()
        for number, (subject, payload, message_id, headers) in enumerate(messages, 1):
            own = {
                "Nats-Msg-Id": message_id,
                "Nats-Batch-Id": batch,
                "Nats-Batch-Sequence": str(number),
                **headers,
            }
            if number < len(messages):
                await self._client.publish(subject, payload, headers=own)
            else:
                own["Nats-Batch-Commit"] = "1"
                await self._client.publish(subject, payload, reply, own)

    async def write_if(self, subject: str, payload: bytes, last: int, doing: str) -> int:
        """Store a message if `last` is the seq of the last one with this subject, 0 for none.

        Raises:
            RefusedError: it isn't, by `WRONG_LAST_SEQUENCE`. If an answer was lost before, the
                message that is there may be ours.
        """
        headers = {"Nats-Expected-Last-Subject-Sequence": str(last)}
        return await self.request(
            self._sending(subject, payload, headers), _seq, doing, writes=True
        )

    async def next_message(
        self, stream: str, subject: str, seq: int, *, direct: bool, doing: str
    ) -> Message | None:
        """The first message of a subject, wildcards allowed, whose seq is at least this."""
        request = {"seq": seq, "next_by_subj": subject}
        return await self._get(stream, request, direct=direct, doing=doing)

    async def last_message(self, stream: str, subject: str, *, doing: str) -> Message | None:
        """The last message of a subject."""
        return await self._get(stream, {"last_by_subj": subject}, direct=False, doing=doing)

    async def message(self, stream: str, seq: int, *, doing: str) -> Message | None:
        """The message with this seq."""
        return await self._get(stream, {"seq": seq}, direct=False, doing=doing)

    async def _get(
        self, stream: str, request: dict[str, Any], *, direct: bool, doing: str
    ) -> Message | None:
        payload = json.dumps(request).encode()
        verb, read = ("DIRECT.GET", _direct) if direct else ("STREAM.MSG.GET", _stored)
        send = self._sending(f"$JS.API.{verb}.{stream}", payload)
        return await self.request(send, read, doing, writes=False)

    async def delete(self, stream: str, seq: int, *, doing: str) -> bool:
        """Delete a message by its seq; whether it was there, if no answer was lost."""
        request = {"seq": seq, "no_erase": True}
        try:
            await self.api(f"STREAM.MSG.DELETE.{stream}", request, doing, writes=True)
        except RefusedError as error:
            if error.number != _DELETE_FAILED or error.text not in _NOT_THERE:
                raise
            return False
        return True

    async def purge(self, stream: str, subject: str, *, doing: str) -> None:
        """Delete all messages of a subject."""
        await self.api(f"STREAM.PURGE.{stream}", {"filter": subject}, doing, writes=True)

    async def ensure_stream(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Make a stream, unless there is one of this name; its info, whatever it is like."""
        name = config["name"]
        doing = f"stream {name}"
        try:
            return await self.api(f"STREAM.INFO.{name}", None, doing, writes=False)
        except RefusedError as error:
            if error.number != NO_STREAM:
                raise BackendError(f"{doing}: {error}") from error
        try:
            return await self.api(f"STREAM.CREATE.{name}", config, doing, writes=True)
        except RefusedError as error:
            if error.number != STREAM_DIFFERS:
                raise BackendError(f"{doing}: {error}") from error
        return await self.api(f"STREAM.INFO.{name}", None, doing, writes=False)  # made by another

    # -- rings

    async def listen(self, subject: str, queue: str, ring: Callable[[], None]) -> "Listener":
        """Have `ring` called for each message of a subject; one listener of a queue gets it."""
        listener = Listener(self, subject, queue, ring)
        self._subscriptions[listener] = None
        if self.connected:  # else it is subscribed with the next connection
            await listener.subscribe(self._client)
        return listener

    def forget(self, listener: "Listener") -> None:
        """Don't subscribe it with the next connection."""
        self._subscriptions.pop(listener, None)

    async def ring(self, subject: str) -> None:
        """Publish an empty message that nobody keeps; lost if there is no connection."""
        if self.connected and not self.closed:
            try:
                await self._client.publish(subject, b"")
            except nats.errors.Error as error:
                log.debug("ringing %s: %r", subject, error)


class Listener:
    """A subscription, over all connections of a link."""

    def __init__(self, link: Link, subject: str, queue: str, ring: Callable[[], None]) -> None:
        self._link, self._subject, self._queue, self._ring = link, subject, queue, ring
        self._subscription: nats.aio.subscription.Subscription | None = None

    async def subscribe(self, client: nats.aio.client.Client) -> None:
        """Subscribe with this connection."""

        async def rung(_: Msg) -> None:
            self._ring()

        self._subscription = await client.subscribe(self._subject, queue=self._queue, cb=rung)

    async def end(self) -> None:
        """Unsubscribe."""
        self._link.forget(self)
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            try:
                await subscription.unsubscribe()
            except nats.errors.Error as error:  # its connection is gone, and it with it
                log.debug("unsubscribing %s: %r", self._subject, error)


async def uncaught(sending: Awaitable[None]) -> None:
    """Await one of nats-py's sends, which may swallow a cancellation while its buffer is full."""
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    await sending
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError


def _give_up(reply: "asyncio.Future[Msg | None]") -> None:
    if not reply.done():
        reply.set_result(None)


def _answer(message: Msg) -> dict[str, Any]:
    """What the API has said, unless it is to be asked again."""
    answer: dict[str, Any] = json.loads(message.data)
    if (error := answer.get("error")) is not None:
        number, text = error.get("err_code", 0), error.get("description", "")
        again = number in {_CLAIM_UNDER_WAY, _DUPLICATE_UNDER_WAY} or (
            error.get("code") == 503 and number != STORE_FAILED
        )
        refused = RefusedError(number, text)
        if again:
            raise _AgainError(str(refused)) from refused
        raise refused
    return answer


def _seq(message: Msg) -> int:
    return int(_answer(message)["seq"])


def _stored(message: Msg) -> Message | None:
    try:
        found = _answer(message)["message"]
    except RefusedError as error:
        if error.number != NO_MESSAGE:
            raise
        return None
    headers = _headers(base64.b64decode(found["hdrs"])) if "hdrs" in found else {}
    payload = base64.b64decode(found.get("data", ""))
    return Message(found["subject"], found["seq"], payload, headers, found["time"])


def _direct(message: Msg) -> Message | None:
    headers = message.headers or {}
    status = headers.get("Status")
    if status is None:
        return Message(
            headers["Nats-Subject"],
            int(headers["Nats-Sequence"]),
            message.data,
            headers,
            headers["Nats-Time-Stamp"],
        )
    if status == "404":
        return None
    raise RefusedError(int(status), headers.get("Description", ""))


def _headers(lines: bytes) -> dict[str, str]:
    found = {}
    for line in lines.decode(errors="replace").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            found[name] = value.strip()
    return found
