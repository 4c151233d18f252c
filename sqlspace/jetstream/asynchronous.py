"""AsyncJetStream: the verbs of a space over JetStream, for coroutines.

An entry is a message of the stream, under its key's subject. To take one is to read the first,
decode it, claim it, and delete it: `receipts` says how, and why no two take the same. There are no
consumers: one for each key would cost the server more than the entries, and the server confirms
the acknowledgement of a message that it has meanwhile handed to somebody else, so a taker that was
frozen, or a server that died before it wrote its consumers' state, made two takers return the same.

Nothing is awaited between the claim's coming through and the return of the value.
"""

import asyncio
import logging
import math
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self
from weakref import WeakValueDictionary

from sqlspace.arguments import (
    check_key,
    check_payload,
    check_ttl,
    kind,
)
from sqlspace.durable import dumps_json, loads_json
from sqlspace.errors import BackendError, ClosedError, DecodeError, SpaceError
from sqlspace.rules import dead_key
from sqlspace.waiting import MISSING

from .bells import Bells
from .headers import EXPIRES, expiry
from .link import Link, Message, RefusedError
from .receipts import Claim, Receipts
from .settings import NANOSECONDS, Settings, differences
from .subjects import encoded

__all__ = ["AsyncJetStream", "Taken"]

log = logging.getLogger("sqlspace")

# What else a message may carry: the dead letter's headers name its key, up to 3,072 bytes as it is
# spelled there.
_HEADER_BYTES = 4096
_LONGEST_TTL_SECONDS = 3_155_760_000  # 100 years; in nanoseconds it fits int64
_CLOSING_SECONDS = 2.0


class _UnreadableError(Exception):
    """The codec's own error is its cause."""


class Taken(NamedTuple):
    """What was taken: its value may be returned when the claim is finished, or it is restored."""

    claim: Claim
    value: Any


class AsyncJetStream:
    """A space in a NATS server, or a cluster of them, for coroutines; see `JetStream`.

        async with AsyncJetStream("nats://host:4222", stream="work") as space: ...
        space = await AsyncJetStream("nats://host:4222", stream="work")

    Any number of tasks of one loop may use it. A wait is ended by the cancellation of its task, or
    `asyncio.timeout`. Whenever that comes, the entry is returned, or it stands at its place.

    Args:
        servers: A URL of a server, or several of one cluster.
        stream: The stream's name; a second, NAME-taken, holds who has taken what.
        dumps: Makes bytes of a value; JSON unless told otherwise.
        loads: Makes a value of them again.
        replicas: On how many servers of the cluster it stands, if this makes the stream.
        storage: "file" or "memory", likewise.
        max_bytes: All entries together; beyond that `out` raises `BackendError`. Likewise.
        max_msgs: How many entries there may be. Likewise.
        patience: Seconds that a call goes on asking a server that doesn't answer.
        connect: More for `nats.connect`: user, password, token, user_credentials, tls, …
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
        self.settings = settings = Settings(
            servers=servers,
            stream=stream,
            dumps=dumps,
            loads=loads,
            replicas=replicas,
            storage=storage,
            max_bytes=max_bytes,
            max_msgs=max_msgs,
            patience=patience,
            connect=connect,
        )
        self._subjects = settings.subjects
        self._link = Link(settings.servers, settings.patience, connect)
        self._receipts = Receipts(self._link, self._subjects, self._again)
        self._bells = Bells(self._link, self._subjects.ring)
        self._direct = self._expires = False
        self._longest = 0
        # By key, entries that this client is taking, and those of them that are ours already, whose
        # deletion the server has not confirmed.
        self._taking: dict[str, set[int]] = {}
        self._deleting: dict[str, set[int]] = {}
        self._looks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._progress = asyncio.Event()  # another deletion is confirmed, or it is closed
        self._tidying: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._opened = self._closed = False

    async def open(self) -> Self:
        """Connect, and make the streams if they aren't there; awaiting the space does it too.

        Raises:
            BackendError: it can't within the patience, or the stream that is there is another's.
        """
        if self._opened:
            return self
        await self._link.open()
        try:
            await self._open_streams()
        except BaseException:
            self._closed = True
            await self._link.close(0)
            raise
        self._opened = True
        self._link.on_reconnect = self._bells.wake_all
        self._tidying = asyncio.get_running_loop().create_task(self._receipts.tidy())
        return self

    async def _open_streams(self) -> None:
        for wanted in self.settings.streams:
            info = await self._link.ensure_stream(wanted)
            config = info["config"]
            if different := differences(wanted, config):
                raise BackendError(f"stream {wanted['name']} is not one of ours: {different}")
            if wanted["name"] == self._subjects.entries:
                # A follower may be behind: what it shows may be gone for longer than receipts stay.
                self._direct = config["num_replicas"] == 1
                self._expires = config.get("allow_msg_ttl", False)
                limits = [self._link.max_payload, config.get("max_msg_size", -1)]
                self._longest = min(limit for limit in limits if limit > 0) - _HEADER_BYTES
                window = config.get("duplicate_window", 0) / NANOSECONDS
                if window <= self.settings.patience:
                    raise BackendError(
                        f"stream {wanted['name']}: its duplicate_window, {window:g} s, must be "
                        f"longer than patience, {self.settings.patience:g} s"
                    )

    # -- the verbs

    async def out(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        """Add `value` behind all entries of `key`; when this returns, the stream has it.

        Args:
            key: 1 to 1,024 bytes in UTF-8, no NUL.
            value: What the codec takes; what it raises comes through, and nothing was added.
            ttl: Seconds until the entry is gone if nobody takes it; None or infinity: never. By
                the clocks of the machines that take part.

        Raises:
            ClosedError: nothing was added.
            BackendError: says whether it may have been.
        """
        key, payload, seconds = self.packed(key, value, ttl)
        await self.put(key, payload, seconds)

    def packed(self, key: str, value: Any, ttl: float | None) -> tuple[str, bytes, float | None]:
        """What `out` adds, checked."""
        key, seconds = check_key(key), check_ttl(ttl)
        payload = check_payload(self.settings.dumps(value), "what dumps returns")
        if self._opened and len(payload) > self._longest:
            raise ValueError(
                f"what dumps returns must be at most {self._longest:,} bytes here, "
                f"not {len(payload):,}"
            )
        return key, payload, seconds

    async def put(self, key: str, payload: bytes, seconds: float | None) -> None:
        """Add what `packed` has returned."""
        self._ensure_open()
        headers = {}
        if seconds is not None and seconds < _LONGEST_TTL_SECONDS:
            if not self._expires:
                raise BackendError(
                    f"out of {key!a}: a ttl needs nats-server 2.11 or later, and a stream with "
                    "allow_msg_ttl; nothing was added"
                )
            headers = {
                "Nats-TTL": str(math.ceil(seconds)),
                EXPIRES: repr(time.time() + seconds),
            }
        doing = f"out of {key!a}"
        with self._link.lasting():
            try:
                await self._link.publish(
                    self._subjects.entry(key), payload, headers=headers, doing=doing
                )
            except RefusedError as error:
                raise BackendError(f"{doing}: {error}; nothing was added") from error
            except ClosedError as error:
                raise BackendError(f"{doing}: closed meanwhile; it may have happened") from error

    async def in_(self, key: str) -> Any:
        """Take the head of `key`, waiting for one.

        Raises:
            ClosedError: the space is closed, or was closed meanwhile; nothing was taken.
            DecodeError: The codec can't read the head, which is under KEY/dead now, or, if `key` is
                too long for that, where it was.
            BackendError: nothing was taken.
        """
        claim, value = await self.take(check_key(key))
        self.finish(claim)
        return value

    async def rd(self, key: str) -> Any:
        """Return the head of `key` and leave it there, waiting for one; raises as `in_`.

        Raises:
            DecodeError: The codec can't read the head, which stays.
        """
        return await self.read(check_key(key))

    async def inp(self, key: str, default: Any = None) -> Any:
        """Take the head of `key`, or return `default`; never waits. Raises as `in_`."""
        found = await self.try_take(check_key(key))
        if found is MISSING:
            return default
        claim, value = found
        self.finish(claim)
        return value

    async def rdp(self, key: str, default: Any = None) -> Any:
        """Return the head of `key` and leave it there, or return `default`. Raises as `rd`."""
        value = await self.try_read(check_key(key))
        return default if value is MISSING else value

    async def len(self, key: str) -> int:
        """How many entries `key` holds.

        What another client has just taken may be counted for a moment yet, or, if that client has
        died over it, for a minute or two; and so may for a second what has outlived its ttl.
        """
        key = check_key(key)
        self._ensure_open()
        await self._deleted(key)
        subject = self._subjects.entry(key)
        info = await self._link.info(self._subjects.entries, subject)
        return int(info["state"].get("subjects", {}).get(subject, 0))

    async def _deleted(self, key: str) -> None:
        """Until the server has confirmed what this client has taken of a key."""
        patience = self.settings.patience
        try:
            async with asyncio.timeout(patience):
                while key in self._deleting:
                    self._progress.clear()
                    await self._progress.wait()
                    self._ensure_open()
        except TimeoutError as error:
            raise BackendError(
                f"len of {key!a}: no answer from {self._link.where} for {patience:g} s"
            ) from error

    async def close(self) -> None:
        """Close the space and end every wait with `ClosedError`; idempotent.

        What is under way to the server is finished if that takes no more than two seconds.
        """
        if self._closing is None:
            self._closed = True
            self._bells.wake_all()
            self._progress.set()
            if self._tidying is not None:
                self._tidying.cancel()
            self._closing = asyncio.get_running_loop().create_task(
                self._link.close(_CLOSING_SECONDS)
            )
        await asyncio.shield(self._closing)

    # -- their parts, which JetStream uses too

    async def take(self, key: str, looked: Callable[[], None] = lambda: None) -> Any:
        """Take the head of a checked key, waiting for one: what is `Taken`.

        Args:
            key: A key.
            looked: Called after the first look.
        """
        return await self._wait(key, self.try_take, looked, takes=True)

    async def read(self, key: str, looked: Callable[[], None] = lambda: None) -> Any:
        """Return the head of a checked key, waiting for one."""
        return await self._wait(key, self.try_read, looked, takes=False)

    async def _wait(
        self,
        key: str,
        look: Callable[[str], Any],
        looked: Callable[[], None],
        *,
        takes: bool,
    ) -> Any:
        found = await look(key)
        if found is not MISSING:
            return found
        looked()
        return await self._bells.wait(key, lambda: look(key), takes=takes)

    async def try_take(self, key: str) -> Any:
        """Take the head of a checked key: what is `Taken`, or MISSING."""
        seq = 0
        while True:
            message, seen = await self._picked(key, seq)
            if message is None:
                return MISSING
            seq = message.seq + 1
            try:
                taken = await self._try_message(key, message, seen)
            except BaseException:
                _remove(self._taking, key, message.seq)
                raise
            if taken is not None:
                return taken  # it stays there until it is deleted or restored
            _remove(self._taking, key, message.seq)

    async def _picked(self, key: str, seq: int) -> tuple[Message | None, float]:
        """The first entry from a seq on that this client isn't taking: now it is; and when seen.

        One call of a key looks at a time: 16 at once all saw the same head, and took 1,000 a second
        together, not 2,300.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        lock = self._looks.setdefault(key, asyncio.Lock())
        async with lock:
            seen = loop.time()
            if seen - begun > self.settings.patience:  # what the one before has waited for
                raise BackendError(f"take of {key!a}: no answer from {self._link.where}; not taken")
            message = await self._next(key, seq, self._taking)
            if message is not None:
                self._taking.setdefault(key, set()).add(message.seq)
            return message, seen

    async def _try_message(self, key: str, message: Message, seen: float) -> Taken | None:
        """Take an entry, unless it is another's."""
        try:
            value = self._loaded(message)
        except _UnreadableError as error:
            await self._bury(key, message, seen, error.__cause__)
            return None
        claim = await self._receipts.claim(key, message, seen)
        return None if claim is None else Taken(claim, value)

    async def try_read(self, key: str) -> Any:
        """The head of a checked key, or MISSING."""
        message = await self._next(key, 0, self._deleting)
        if message is None:
            return MISSING
        try:
            return self._loaded(message)
        except _UnreadableError as error:
            raise _unreadable(key, message, "it stays") from error.__cause__

    def _loaded(self, message: Message) -> Any:
        loads = self.settings.loads
        try:
            return loads(message.payload)
        except Exception as error:
            try:
                loads(message.payload)
            except Exception:  # noqa: BLE001  # raised the first time
                raise _UnreadableError from error
            raise  # no verdict over the entry, but an alarm's TimeoutError

    async def _next(self, key: str, seq: int, skipped: Mapping[str, set[int]]) -> Message | None:
        """The first live entry of a key from a seq on that is not among those."""
        # What stands before the last of those is mostly among them, or held by others. If there is
        # nothing beyond it, all are looked at, for somebody may have given one back.
        start, step = seq, False
        if skip := skipped.get(key):
            seq = max(seq, max(skip) + 1)
        while True:
            skip = set(skipped.get(key, ()))
            message = await self._from(key, seq)
            # Both before and after: the deletion may have been confirmed first, and yet be later.
            skip |= skipped.get(key, set())
            if message is None:
                if step or seq == start:
                    return None
                step, seq = True, start
            elif message.seq in skip:
                seq = (message.seq if step else max(skip)) + 1
            elif _is_over(message):
                seq = message.seq + 1
            else:
                return message

    async def _from(self, key: str, seq: int) -> Message | None:
        self._ensure_open()
        subject, doing = self._subjects.entry(key), f"look at {key!a}"
        return await self._link.next_message(
            self._subjects.entries, subject, seq, direct=self._direct, doing=doing
        )

    def finish(self, claim: Claim) -> None:
        """Its value is returned: delete the entry."""
        key, seq = claim.key, claim.message.seq
        self._deleting.setdefault(key, set()).add(seq)

        def gone() -> None:
            self._receipts.drop(claim)
            _remove(self._deleting, key, seq)
            _remove(self._taking, key, seq)
            self._progress.set()

        self._link.delete_soon(self._subjects.entries, seq, gone)

    def restore(self, claim: Claim, *, finished: bool) -> None:
        """Give back what was taken; what was finished is added anew, behind all others."""
        if not finished:
            _remove(self._taking, claim.key, claim.message.seq)
        self._receipts.give_back(claim, finished=finished)

    async def _again(self, claim: Claim, lost_its_place: bool) -> None:
        """An entry was given back: have its key's takers look; if it is deleted, add it anew."""
        if lost_its_place:
            headers = {
                name: text
                for name, text in claim.message.headers.items()
                if name in {"Nats-TTL", EXPIRES}
            }
            await self._link.publish(
                self._subjects.entry(claim.key),
                claim.message.payload,
                headers=headers,
                doing=f"undo a take of {claim.key!a}",
                message_id=claim.token,
            )
        else:
            await self._link.ring(self._subjects.ring(claim.key))

    async def _bury(
        self, key: str, message: Message, seen: float, error: BaseException | None
    ) -> None:
        """Move what can't be read to the dead letters, and raise DecodeError, unless another did.

        Published first, with an id of the entry's: who dies in between leaves it to the next one.
        """
        where = dead_key(key)
        if where is None:
            raise _unreadable(key, message, "it stays") from error
        await self._link.publish(
            self._subjects.entry(where),
            message.payload,
            headers={"Sqlspace-Key": encoded(key), "Sqlspace-Seq": str(message.seq)},
            doing=f"move an unreadable entry to {where!a}",
            message_id=f"dead-{message.seq}",
        )
        claim = await self._receipts.claim(key, message, seen)
        if claim is not None:
            self.finish(claim)
            raise _unreadable(key, message, f"it is under {where!a} now") from error

    def _ensure_open(self) -> None:
        if self._closed:
            raise ClosedError("the space is closed")
        if not self._opened:
            raise SpaceError("the space is not open: await it first")

    @property
    def link(self) -> Link:
        """The connection."""
        return self._link

    def __await__(self) -> Generator[Any, None, Self]:
        return self.open().__await__()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        if getattr(self, "_opened", False) and not self._closed:
            _warn(f"unclosed {self!r}", ResourceWarning, source=self)

    def __repr__(self) -> str:
        where = "closed" if self._closed else self._link.where
        return f"<sqlspace.jetstream.{kind(self)} {self._subjects.entries}: {where}>"


def _is_over(message: Message) -> bool:
    end = expiry(message.headers)
    return end is not None and end <= time.time()


def _remove(sets: dict[str, set[int]], key: str, seq: int) -> None:
    if (found := sets.get(key)) is not None:
        found.discard(seq)
        if not found:
            del sets[key]


def _unreadable(key: str, message: Message, where: str) -> DecodeError:
    text = f"the codec can't read entry {message.seq} of {key!a}; {where}"
    return DecodeError(text, key, message.seq, message.payload)
