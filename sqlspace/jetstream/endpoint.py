"""Where `sqlspace.forward` sends to when that is a JetStream: each entry is there once.

The law: with the entries of a batch goes a *position*, the only message of a subject that belongs
to this file and this key. It names all entries that are in the stream and may still be in the
store, and one write of the server brings both: an atomic batch, which the server refuses if the
position isn't the one that we knew. So whoever goes on, after a crash of this process or of the
server, after a wait for an answer that never came, or beside another forwarder that stood still and
comes back, reads the position first and knows what not to send.

It names them one by one, by seq and time of the push. The last seq alone would not do: an entry
that was delayed goes out after later ones, and a file that was restored from a backup gives seqs
once more; both would be taken for sent, and lost. Nor would the server's own memory of message ids
(`duplicate_window`), which lasts for minutes.

A name leaves the position when its entry has left the store.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from sqlspace import clock
from sqlspace.delivery import Delivery
from sqlspace.errors import BackendError
from sqlspace.store import Store

from . import headers, link
from .link import Link, Outgoing, RefusedError
from .settings import Settings, differences

__all__ = ["Access", "Endpoint", "JetStreamSender", "Loop", "Opened"]

T = TypeVar("T")

_MOST = link.BATCH - 1  # beside the position
_TRIES = 100  # others can't be faster so often in a row
_HURRY_SECONDS = 1.0  # what is under way has so long to end, when it is to
_HEADER_BYTES = 1024  # of ours in a message, at most


class Endpoint:
    """A JetStream as the endpoint of `sqlspace.forward`: `JetStream.in_` takes what was sent.

    It connects when there is something to send, so nothing is raised here while the server is down.

    Each entry is in the stream once, whatever is killed, however long anything takes, and with any
    number of forwarders: the server must be 2.12.1 or later, and the stream have `allow_atomic`, as
    one that is made here has. With others an entry is sent again, if this process or the server
    dies, and more than the stream's `duplicate_window` passes until the forwarding goes on; and
    they get one entry at a time, for several under way could change places.

    It holds of a store that keeps its commits: with `sync=False` a power cut may bring back entries
    that were sent, and so does a file that is restored from a backup.

    Entries go out as they are, with their headers, under the `Nats-Msg-Id` FILE/SEQ/PUSHED of
    `Delivery.id`. What is left of their time to live goes with them.

    Args:
        servers: A URL, or several.
        stream: Its name. Made if it isn't there, as `JetStream` makes it.
        replicas: As of `JetStream`, like those that follow.
        storage: Likewise.
        max_bytes: Likewise.
        max_msgs: Likewise.
        patience: Seconds until a server that doesn't answer counts as down.
        connect: For `nats.connect`: user, password, token, user_credentials, tls, …
    """

    def __init__(
        self,
        servers: str | Sequence[str] = "nats://127.0.0.1:4222",
        *,
        stream: str = "sqlspace",
        replicas: int = 1,
        storage: str = "file",
        max_bytes: int | None = None,
        max_msgs: int | None = None,
        patience: float = 5.0,
        **connect: Any,
    ) -> None:
        self.settings = Settings(
            servers=servers,
            stream=stream,
            dumps=bytes,  # entries go as they are
            loads=bytes,
            replicas=replicas,
            storage=storage,
            max_bytes=max_bytes,
            max_msgs=max_msgs,
            patience=patience,
            connect=connect,
        )
        self.subjects = self.settings.subjects

    def _sender(self, store: Store) -> "JetStreamSender":
        return JetStreamSender(store, self.settings)

    def __repr__(self) -> str:
        return f"<sqlspace.jetstream.Endpoint {self.subjects.entries!r}>"


class _Position(NamedTuple):
    """What is in the stream and may be in the store."""

    seq: int
    """Of its message; 0: there is none."""
    names: frozenset[str]


class Opened(NamedTuple):
    """A connection, and what its stream can do."""

    link: Link
    id: str
    """Of the stream: its name, and when it was made."""
    longest: int
    """What it takes as one message, in bytes."""
    batches: bool
    expires: bool
    direct: bool


class Loop:
    """An event loop in a thread of its own, for those that are called from others."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="sqlspace-nats", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
            while tasks := asyncio.all_tasks(self._loop):
                for task in tasks:
                    task.cancel()
                self._loop.run_until_complete(asyncio.wait(tasks))
        finally:
            self._loop.close()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run it there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, function: Callable[[], object]) -> None:
        """Call it there soon; from anywhere, a signal's handler included."""
        with contextlib.suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Cancel all that is under way, and end the thread."""
        self.call(self._loop.stop)
        self._thread.join()


class Access:
    """One connection to an endpoint, opened when it is needed, for all the tasks of a loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._opening: asyncio.Task[Opened] | None = None

    @property
    def is_up(self) -> bool:
        """Whether something may be under way to the server."""
        opening = self._opening
        if opening is None or not opening.done() or opening.cancelled() or opening.exception():
            return False
        return opening.result().link.connected

    async def open(self) -> Opened:
        """The connection; made once for all that ask for it, and again if that failed."""
        opening = self._opening
        if opening is None or (
            opening.done() and (opening.cancelled() or opening.exception() is not None)
        ):
            opening = self._opening = asyncio.get_running_loop().create_task(self._open())
        return await asyncio.shield(opening)

    async def _open(self) -> Opened:
        settings = self._settings
        link = Link(settings.servers, settings.patience, settings.connect)
        await link.open()
        try:
            wanted, _ = settings.streams
            info = await link.ensure_stream(wanted)
            config = info["config"]
            if different := differences(wanted, config):
                raise BackendError(f"stream {wanted['name']} is not one of ours: {different}")
        except BaseException:
            await link.close(0)
            raise
        limits = (link.max_payload, config.get("max_msg_size", -1))
        return Opened(
            link,
            f"{config['name']}/{info['created']}",
            longest=min(limit for limit in limits if limit > 0),
            batches=config.get("allow_atomic", False),
            expires=config.get("allow_msg_ttl", False),
            direct=config.get("allow_direct", False) and config["num_replicas"] == 1,
        )

    async def close(self) -> None:
        """Disconnect; the next `open` connects anew."""
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.cancel()
            await asyncio.wait([opening])
            if not opening.cancelled() and not opening.exception():
                await opening.result().link.close(0)


class JetStreamSender:
    """Sends for one forwarder; all that touches the network runs in one loop."""

    most = _MOST

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._database = store._database  # noqa: SLF001  # it is a worker of the store's own
        self._file_id = self._database.file_id
        self._subjects = settings.subjects
        self._access = Access(settings)
        self._loop = Loop()
        self._batches = True  # unless the server takes no message ids in them, as 2.12.0
        self._sending: set[asyncio.Task[int]] = set()
        self._stopped = False
        # Known for certain; and what of it has left the store since. Only the loop touches them.
        self._positions: dict[str, _Position] = {}
        self._gone: dict[str, set[str]] = {}

    # -- for the forwarder, from its threads

    def send(self, batch: Sequence[Delivery]) -> Future[int]:
        """As `Sender` has it, like the others."""
        return self._loop.submit(self._noted(batch))

    def acked(self, batch: Sequence[Delivery]) -> None:
        """These need not be in the position any more, from the next one on."""
        names = list(map(_name, batch))
        self._loop.call(lambda: self._gone.setdefault(batch[0].key, set()).update(names))

    def stop(self, *, force: bool) -> None:
        """Cancel what is under way: the position tells what became of it."""
        self._stopped = True
        self._loop.call(self._cancel if force else self._hurry)

    def close(self) -> None:
        """Disconnect, and end the loop."""
        with contextlib.suppress(TimeoutError):
            self._loop.submit(self._access.close()).result(_HURRY_SECONDS)
        self._loop.close()

    # -- in the loop

    def _hurry(self) -> None:
        if self._access.is_up:
            asyncio.get_running_loop().call_later(_HURRY_SECONDS, self._cancel)
        else:
            self._cancel()

    def _cancel(self) -> None:
        for task in self._sending:
            task.cancel()

    async def _noted(self, batch: Sequence[Delivery]) -> int:
        task = asyncio.current_task()
        assert task is not None
        self._sending.add(task)
        try:
            if self._stopped:  # it began behind that, or it would have been cancelled
                raise asyncio.CancelledError
            return await self._send(batch)
        except BaseException as error:
            # Whatever has become of it, the position tells.
            self._positions.pop(batch[0].key, None)
            if isinstance(error, BackendError):  # the stream may be gone, or be another by now
                await self._access.close()
            raise
        finally:
            self._sending.discard(task)

    async def _send(self, batch: Sequence[Delivery]) -> int:
        stream = await self._access.open()
        key = batch[0].key
        entries = {_name(entry): entry for entry in batch}
        for _ in range(_TRIES):
            known = self._positions.get(key)
            gone = self._gone.pop(key, set())
            if known is None:
                known = await self._read(stream, key, entries)
            known = known._replace(names=known.names - gone)
            new = [entry for name, entry in entries.items() if name not in known.names]
            if not new or new[0] is not batch[0]:  # first those that are there leave the store
                return batch.index(new[0]) if new else len(batch)
            messages = self._messages(stream, new)
            new = new[: len(messages)]
            names = known.names.union(map(_name, new))
            position = Outgoing(
                self._subjects.position(self._file_id, key),
                "\n".join(sorted(names)).encode(),
                stream.link.new_id(),
                {
                    "Nats-Rollup": "sub",
                    "Nats-Expected-Last-Subject-Sequence": str(known.seq),
                },
            )
            try:
                seq = await self._publish(stream, [*messages, position], known)
            except RefusedError as error:
                self._positions.pop(key, None)
                if error.number in (link.WRONG_LAST_SEQUENCE, link.DUPLICATE_IN_BATCH):
                    continue  # another was faster; or it was us, and the answer got lost
                raise BackendError(f"forward {key!a}: {error}; nothing was sent") from error
            self._positions[key] = _Position(seq, names)
            return len(new)
        raise BackendError(f"forward {key!a}: others send the same all the time")

    async def _read(self, stream: Opened, key: str, entries: dict[str, Delivery]) -> _Position:
        """The position as it stands in the stream, less what has left the store since."""
        found = await stream.link.last_message(
            self._subjects.entries,
            self._subjects.position(self._file_id, key),
            doing=f"forward {key!a}",
        )
        if found is None:
            return _Position(0, frozenset())
        names = found.payload.decode(errors="replace").split("\n")
        held = (name for name in names if name in entries or self._is_held(key, name))
        return _Position(found.seq, frozenset(held))

    def _is_held(self, key: str, name: str) -> bool:
        seq, _, pushed_at = name.partition("/")
        if not (seq.isdecimal() and pushed_at.isdecimal()):
            return False
        entry = self._store.get(key, max(1, int(seq)))
        return entry is not None and round(entry.pushed_at * 1e6) == int(pushed_at)

    def _messages(self, stream: Opened, new: Sequence[Delivery]) -> list[Outgoing]:
        """Of entries, up to the first that the server would never take.

        Raises:
            ValueError: that is the first.
        """
        subject = self._subjects.entry(new[0].key)
        now = clock.now()
        messages: list[Outgoing] = []
        for entry in new:
            own = headers.carried(entry.headers)
            expires_at = entry._grant.head.expires_at  # noqa: SLF001
            if expires_at is not None:
                own |= headers.lifetime(expires_at / 1e6, now / 1e6, told=stream.expires)
            size = len(entry.payload) + _HEADER_BYTES
            if own:
                size += sum(len(name) + len(value) + 4 for name, value in own.items())
            if size > stream.longest:
                if messages:
                    break
                raise ValueError(
                    f"with its headers it is {size:,} bytes, and the server takes messages of at "
                    f"most {stream.longest:,}"
                )
            message_id = f"{self._file_id}/{_name(entry)}"
            messages.append(Outgoing(subject, entry.payload, message_id, own))
        return messages

    async def _publish(self, stream: Opened, messages: list[Outgoing], known: _Position) -> int:
        """Publish entries and position; the position's seq."""
        doing = "forward"
        if stream.batches and self._batches:
            try:
                return await stream.link.publish_batch(messages, doing=doing)
            except RefusedError as error:
                if error.number == link.UNSUPPORTED_IN_BATCH:
                    self._batches = False
                    return await self._publish(stream, messages, known)
                if error.number != link.DUPLICATE_IN_BATCH:
                    raise
                last = await stream.link.last_message(
                    self._subjects.entries, messages[-1].subject, doing=doing
                )
                if (0 if last is None else last.seq) != known.seq:
                    raise  # they are another's, and so is the position
        # There are no batches; or some messages came without a position. The server knows their
        # ids, for a while.
        for subject, payload, message_id, own in messages:
            seq = await stream.link.publish(
                subject, payload, headers=own, message_id=message_id, doing=doing
            )
        return seq


def _name(entry: Delivery) -> str:
    """What a position calls an entry."""
    return f"{entry.seq}/{entry._grant.head.pushed_at}"  # noqa: SLF001
