"""How a store adds an entry: what the caller wants, checked once; added, or no room for it.

What a call has committed when an interrupt reaches it, it takes back: a call that raises did
nothing.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from . import ageing, clock, entries, taking, upkeep
from .arguments import (
    check_delay_micros,
    check_headers,
    check_int,
    check_key,
    check_payload,
    check_payloads,
    check_size,
    check_ttl_micros,
)
from .committer import Operation, Work
from .connection import Connection, run
from .database import Database
from .doorbell import room_token
from .errors import DeadlineError
from .waiting import Vigil, Waiter

__all__ = ["Adding", "Batch", "Push", "adding", "push", "push_many", "vigil_for_room"]

_LONGEST_PAGE = 65536
_INDEX_BYTES = 32  # of a row, or of its place in an index, beside the key


class Push(Operation):
    """One entry to add; as an operation, in one statement, without a look at what is there.

    Args:
        key: As the caller handed it in, like all others: TypeError or ValueError.
        payload: Of the entry.
        headers: Of the entry.
        ttl: In seconds.
        delay: In seconds.
        dedupe: Not looked at by the operation.
        max_len: Not looked at by the operation.

    Attributes:
        seq: The entry's, once it is added.
        ttl: In microseconds, as is `delay`.
    """

    seq = 0
    # Most pushes want nothing special: to ask each check for nothing took 0.4 µs.
    headers: str | None = None
    ttl: int | None = None
    delay = 0
    dedupe: str | None = None
    max_len: int | None = None

    def __init__(
        self,
        key: str,
        payload: bytes,
        *,
        headers: dict[str, str] | None = None,
        ttl: float | None = None,
        delay: float | None = None,
        dedupe: str | None = None,
        max_len: int | None = None,
    ) -> None:
        self.done = []
        self.key = check_key(key)
        self.payload = check_payload(payload)
        if ttl is not None:
            self.ttl = check_ttl_micros(ttl)
        if headers is not None:
            self.headers = check_headers(headers)
        check_size(self.key, self.payload, self.headers)
        self.adds = self.largest = len(self.payload) + len(self.headers or "")
        if delay is not None:
            self.delay = check_delay_micros(delay, self.ttl)
        if dedupe is not None:
            self.dedupe = check_key(dedupe, "dedupe")
        if max_len is not None:
            self.max_len = check_int(max_len, "max_len", 1)

    def step(self, connection: Connection) -> Iterable[str]:
        """Add it."""
        now = clock.now()
        if self.ttl is None and not self.delay:
            run(self.done, connection, entries.INSERT, (self.key, self.payload, self.headers, now))
        else:
            run(self.done, connection, entries.INSERT_TIMED, self.row(now))
        self.seq = seq = connection.last_insert_rowid()
        self.tidies = seq % upkeep.PRUNE_EVERY == 0
        return (self.key,)

    def undo(self, connection: Connection) -> None:
        """Erase it."""
        upkeep.erase(connection, self.key, self.seq or connection.last_insert_rowid())

    def retract(self) -> None:
        """It was rolled back."""
        super().retract()
        self.seq = 0

    def row(self, now: int) -> tuple[Any, ...]:
        """That of INSERT_TIMED."""
        times = _times(now, self.ttl, self.delay)
        return (self.key, self.payload, self.headers, *times, self.dedupe)

    def add(self, connection: Connection, keep: int | None) -> tuple[int | None, bool]:
        """In the caller's transaction.

        Args:
            connection: For writing.
            keep: How many tombstones the history keeps; None: all.

        Returns:
            The entry's seq, or None if there is no room; and whether it was added.
        """
        now = clock.now()
        if self.dedupe is not None:
            seq = entries.find_dedupe(connection, self.key, self.dedupe, keep, now)
            if seq is not None:
                return seq, False
        if self.max_len is not None and entries.count(connection, self.key, now) >= self.max_len:
            return None, False
        connection.execute(entries.INSERT_TIMED, self.row(now))
        return connection.last_insert_rowid(), True

    def full(self) -> DeadlineError:
        """What to raise if there is no room in time."""
        return DeadlineError(f"{self.key!a} holds {self.max_len:,} entries or more already")


def _times(now: int, ttl: int | None, delay: int) -> tuple[int | None, ...]:
    """Of a new row: pushed_at, state, due_at, delay, expires_at."""
    held = (1, now + delay, delay) if delay else (0, None, None)
    return (now, *held, None if ttl is None else now + ttl)


class Batch(NamedTuple):
    """Several entries to add to one key."""

    key: str
    payloads: list[bytes]
    ttl: int | None
    delay: int

    @classmethod
    def checked(
        cls, key: str, payloads: Iterable[bytes], ttl: float | None, delay: float | None
    ) -> "Batch":
        """What the caller handed in; TypeError or ValueError, before the first is added."""
        key = check_key(key)
        ttl_micros = check_ttl_micros(ttl)
        delay_micros = check_delay_micros(delay, ttl_micros)
        return cls(key, check_payloads(key, payloads), ttl_micros, delay_micros)

    @property
    def size(self) -> int:
        """By how many bytes the file may grow for them: a page may have room for one and a half."""
        row = 4 * (len(self.key.encode()) + _INDEX_BYTES)
        return sum(len(each) + min(len(each), _LONGEST_PAGE) + row for each in self.payloads)

    def add(self, connection: Connection) -> list[int]:
        """In the caller's transaction; their seqs."""
        now = clock.now()
        if self.ttl is None and not self.delay:
            rows = ((self.key, payload, None, now) for payload in self.payloads)
            connection.executemany(entries.INSERT, rows)
        else:
            times = _times(now, self.ttl, self.delay)
            timed_rows = ((self.key, payload, None, *times, None) for payload in self.payloads)
            connection.executemany(entries.INSERT_TIMED, timed_rows)
        # Nobody else writes in between, so they follow each other.
        last = connection.last_insert_rowid()
        return list(range(last - len(self.payloads) + 1, last + 1))


def adding(database: Database, wanted: Push) -> "Push | Adding":
    """The operation that adds it, if there need not be room: its `seq` is the entry's then."""
    return wanted if wanted.dedupe is None else Adding(database, wanted)


class Adding(Operation):
    """A look and, if what it finds allows that, an entry to add.

    Attributes:
        seq: The entry's, or of the one with the same dedupe; 0: there is no room.
        new: Whether it was added.
    """

    whole = True
    seq = 0
    new = False

    def __init__(self, database: Database, wanted: Push) -> None:
        super().__init__()
        self.adds, self.largest = wanted.adds, wanted.largest
        self._database = database
        self._wanted = wanted

    def step(self, connection: Connection) -> Iterable[str]:
        """Look and add."""
        seq, self.new = self._wanted.add(connection, self._database.history())
        self.seq = seq or 0
        if self.new:
            return (self._wanted.key, *ageing.expire(connection, clock.now()))
        if self.seq and self._database.options.sync:
            # What another store pushed without sync may not be on the disk yet.
            self._database.touch(connection)
        return ()

    def undo(self, connection: Connection) -> None:
        """Erase what was added."""
        if self.new:
            upkeep.erase(connection, self._wanted.key, self.seq)


def push(database: Database, wanted: Push) -> int:
    """Add an entry for which there need not be room; its seq."""
    operation = adding(database, wanted)
    database.write(operation)
    return operation.seq


def vigil_for_room(database: Database, wanted: Push) -> Vigil:
    """A vigil that adds the entry as soon as there is room, and finds the operation that did."""
    token = room_token(wanted.key)

    attempt: Adding | None = None

    def look(waiter: Waiter, _: bool) -> None:
        nonlocal attempt
        attempt = Adding(database, wanted)
        database.write(attempt)
        if attempt.seq:
            waiter.found = attempt

    def restore(waiter: Waiter) -> None:
        taking.take_back(database, waiter.found, token, [])

    def call_off() -> None:
        if attempt is not None:
            database.call_off(attempt)

    return taking.vigil(
        database, look, [token], restore=restore, limit=wanted.max_len, call_off=call_off
    )


def push_many(wanted: Batch) -> tuple[Operation, list[int]]:
    """The operation that adds all of them, or none, and the list that gets their seqs."""
    seqs: list[int] = []

    def step(connection: Connection) -> Iterable[str]:
        seqs[:] = wanted.add(connection)
        return (wanted.key, *ageing.expire(connection, clock.now()))

    def undo(connection: Connection) -> None:
        for seq in reversed(seqs):
            upkeep.erase(connection, wanted.key, seq)

    largest = max(map(len, wanted.payloads), default=0)
    probe = None if wanted.payloads else lambda _: False
    return Work(step, probe, undo, adds=wanted.size, largest=largest), seqs
