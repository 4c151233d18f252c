"""DurableSpace: the `Space` protocol over a Store, with a codec between values and bytes.

What the codec can't read is not lost. A taking verb moves it to the dead letters of its key and
says so by `DecodeError`; a reading verb leaves it and raises the same. Values are decoded first,
and taken then, so a value that was taken has been read.
"""

import json
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from . import browsing, clock, dead_letters, rules, taking
from .arguments import check_key, check_payload
from .connection import Connection
from .database import Database
from .entries import Head
from .errors import DecodeError, SpaceError
from .pushing import Push
from .space import Context
from .waiting import Vigil, Waiter, wait

if TYPE_CHECKING:
    from .store import Store

__all__ = ["DurableSpace", "UnreadableError", "dumps_json", "loads_json"]


def dumps_json(value: Any) -> bytes:
    """JSON in UTF-8; TypeError or ValueError for what JSON doesn't have, NaN among it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


def loads_json(payload: bytes) -> Any:
    """What `dumps_json` has made."""
    return json.loads(payload.decode())


class UnreadableError(SpaceError):
    """The codec's own error is its cause."""

    def __init__(self, head: Head) -> None:
        super().__init__(head)
        self.head = head


class DurableSpace:
    """A `Space` in a file; made by `Store.space`, whose threads and processes share it.

    Values are encoded when they are added and decoded by whoever gets them, so no two share one.
    With the codec that is there by default a value is what JSON has: a tuple comes back as a list.

    To close it closes the store.
    """

    def __init__(
        self,
        store: "Store",
        database: Database,
        dumps: Callable[[Any], bytes],
        loads: Callable[[bytes], Any],
    ) -> None:
        self._store = store
        self._database = database
        self._dumps = dumps
        self._loads = loads

    def out(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        """Add `value` behind all entries of `key`; it is as durable as a push.

        Args:
            key: 1 to 1,024 bytes in UTF-8, no NUL.
            value: What the codec takes; what it raises comes through, and nothing was added.
            ttl: Seconds until the entry is gone if nobody takes it; None or infinity: never.

        Raises:
            ClosedError, StoreError: as `Store.push`.
        """
        self._database.write(self._adding(key, value, ttl))

    def in_(self, key: str, timeout: float | None = None, *, context: Context | None = None) -> Any:
        """Take the head of `key`, waiting for one; raises as `Store.pull`.

        Raises:
            DecodeError: The codec can't read the head, which is under KEY/dead now, or, if `key` is
                too long for that, where it was.
        """
        key = check_key(key)
        values: list[Any] = []
        make = self._grabs(key, values)
        try:
            taking.wait_and_grab(self._database, make, [key], timeout, context)
        except UnreadableError as error:
            raise self._bury(error.head) from error.__cause__
        return values[-1]

    def inp(self, key: str, default: Any = None) -> Any:
        """Take the head of `key`, or return `default`; never waits. Raises as `in_`."""
        values: list[Any] = []
        grab = self._grabs(check_key(key), values)(None)
        try:
            return values[-1] if grab.run() else default
        except UnreadableError as error:
            raise self._bury(error.head) from error.__cause__

    def rd(self, key: str, timeout: float | None = None, *, context: Context | None = None) -> Any:
        """Return the head of `key` and leave it there, waiting for one; raises as `Store.wait`.

        Raises:
            DecodeError: The codec can't read the head, which stays.
        """
        return wait(self._vigil_to_read(check_key(key)), timeout, context)

    def rdp(self, key: str, default: Any = None) -> Any:
        """Return the head of `key` and leave it there, or return `default`. Raises as `rd`."""
        key = check_key(key)
        found = browsing.head(self._database, key)
        if found is None:
            return default
        seq, payload = found
        try:
            return self._loads(payload)
        except Exception as error:
            if self._is_readable(payload):
                raise
            raise self._unreadable(key, seq, payload, "it stays") from error

    def len(self, key: str) -> int:
        """How many live entries `key` holds."""
        return self._store.len(key)

    def close(self) -> None:
        """Close the store, and end every wait with `ClosedError`; idempotent."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<sqlspace.DurableSpace over {self._store!r}>"

    # -- what the verbs for coroutines share

    def _adding(self, key: str, value: Any, ttl: float | None) -> Push:
        """The operation that adds `value`."""
        key = check_key(key)
        return Push(key, check_payload(self._dumps(value), "what dumps returns"), ttl=ttl)

    def _grabs(self, key: str, values: list[Any]) -> Callable[[Waiter | None], taking.Grab]:
        """Makes attempts to take the head, of the waiter each gets; decoded first, into `values`.

        They raise UnreadableError for one that must be buried.
        """

        def accept(head: Head) -> None:
            try:
                values[:] = [self._loads(head.payload)]
            except Exception as error:
                if self._is_readable(head.payload):
                    raise
                raise UnreadableError(head) from error

        return lambda waiter: taking.Grab(self._database, [key], waiter, accept)

    def _vigil_to_read(self, key: str) -> Vigil:
        """A vigil that finds the head's value."""
        absent = object()

        def look(waiter: Waiter, _: bool) -> None:
            value = self.rdp(key, absent)
            if value is not absent:
                waiter.found = value

        return taking.vigil(self._database, look, [key])

    def _is_readable(self, payload: bytes) -> bool:
        """Whether what was raised was no verdict over the entry, but an alarm's TimeoutError."""
        try:
            self._loads(payload)
        except Exception:  # noqa: BLE001  # raised the first time
            return False
        return True

    def _bury(self, head: Head) -> DecodeError:
        """Move what can't be read to the dead letters, if it still is there; the error to raise."""
        where = rules.dead_key(head.key)
        if where is None:
            return self._unreadable(head.key, head.seq, head.payload, "it stays")
        key, seq = head.key, head.seq

        def step(connection: Connection) -> Iterable[str]:
            return dead_letters.bury_unreadable(connection, head.seq, clock.now())

        self._database.transact(step)
        return self._unreadable(key, seq, head.payload, f"it is under {where!a} now")

    def _unreadable(self, key: str, seq: int, payload: bytes, where: str) -> DecodeError:
        text = f"the codec can't read entry {seq} of {key!a}; {where}"
        return DecodeError(text, key, seq, payload)
