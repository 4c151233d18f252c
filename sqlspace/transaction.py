"""Several verbs, one commit: what `Store.transaction()` gives.

It belongs to the thread that opened it. While it is open that thread has the one right to write,
so others wait: what takes long belongs before it or behind it. Nothing in here waits.

Each verb is all or nothing by itself, too: one that raises leaves what was done before it, and the
caller may go on. Waiters are woken after the commit only.
"""

import threading
from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import apsw

from . import ageing, browsing, clock, entries, rules, taking
from .arguments import (
    check_delay_micros,
    check_int,
    check_key,
    check_payload,
    check_size,
    check_ttl_micros,
    kind,
)
from .connection import Connection, run
from .database import Database
from .delivery import Delivery
from .doorbell import room_token
from .errors import LeaseError, StoreError
from .pushing import Batch, Push
from .waiting import surely

if TYPE_CHECKING:
    from .store import Store

__all__ = ["Transaction"]

T = TypeVar("T")


class Transaction:
    """Verbs that commit together: all of them at the end of the block, or none.

    An exception out of the block rolls all back, and comes through. A verb that raises has changed
    nothing by itself: who catches that may go on. A verb of the store itself, one that waits, and
    another transaction are ValueError in here.

    Ctrl-C that strikes exactly between the block's end and the commit rolls back when this object
    is let go, and not before: until then the thread counts as inside.

    Example:
        with store.claim("orders") as order, store.transaction() as together:
            together.push("invoices", order.payload)
            together.ack(order)
    """

    def __init__(self, store: "Store", database: Database) -> None:
        self._store = store
        self._database = database
        self._held: list[Any] = []
        self._left = _end_if_left(database, self._held)
        self._thread: int | None = None
        self._over = False
        self._connection: Connection
        self._rings: list[str] = []
        self._settled: dict[Delivery, None] = {}
        self._added = 0  # bytes, by so many pushes
        self._pushes = 0

    def __enter__(self) -> Self:
        if self._over or self._thread is not None:
            raise ValueError("a transaction can be entered once")
        try:
            next(self._left)
            self._connection = self._database.begin(self._held)
            self._thread = threading.get_ident()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._database.commit(dict.fromkeys(self._rings), takes=not self._pushes)
                for delivery in self._settled:
                    delivery._settled = True  # noqa: SLF001  # one piece with it
        finally:
            self._end()

    def _end(self) -> None:
        self._over = True
        try:
            interrupt = surely(lambda: self._database.end(self._held))
        except BaseException:  # on the way into it or out of it
            surely(lambda: self._database.end(self._held))
            raise
        self._left.close()
        if interrupt is not None:
            raise interrupt

    # -- adding

    def push(
        self,
        key: str,
        payload: bytes,
        *,
        ttl: float | None = None,
        delay: float | None = None,
        dedupe: str | None = None,
        headers: dict[str, str] | None = None,
        max_len: int | None = None,
    ) -> int:
        """As `Store.push`, but a full key raises `DeadlineError` at once."""
        wanted = Push(
            key,
            payload,
            headers=headers,
            ttl=ttl,
            delay=delay,
            dedupe=dedupe,
            max_len=max_len,
        )

        def step(connection: Connection) -> int:
            seq, new = wanted.add(connection, self._database.history())
            if seq is None:
                raise wanted.full()
            if new:
                self._rings.append(wanted.key)
            else:
                self._database.touch(connection)
            return seq

        return self._do(step, wanted.adds, wanted.largest)

    def push_many(
        self,
        key: str,
        payloads: Iterable[bytes],
        *,
        ttl: float | None = None,
        delay: float | None = None,
    ) -> list[int]:
        """As `Store.push_many`."""
        wanted = Batch.checked(key, payloads, ttl, delay)

        def step(connection: Connection) -> list[int]:
            seqs = wanted.add(connection) if wanted.payloads else []
            self._rings.append(wanted.key)
            return seqs

        return self._do(step, wanted.size, max(map(len, wanted.payloads), default=0))

    def put(self, key: str, payload: bytes, *, ttl: float | None = None) -> int:
        """As `Store.put`."""
        key, payload = check_key(key), check_payload(payload)
        ttl_micros = check_ttl_micros(ttl)
        check_size(key, payload, None)

        def step(connection: Connection) -> int:
            seq, rings = entries.put(connection, key, payload, clock.now(), ttl_micros)
            self._rings += rings
            return seq

        return self._do(step, len(payload), len(payload))

    # -- taking

    def pullp(self, key: str) -> bytes | None:
        """As `Store.pullp`; what is taken is gone when the transaction commits, and not before."""
        payloads = self.pull_many(key, 1)
        return payloads[0] if payloads else None

    def pull_many(self, key: str, limit: int) -> list[bytes]:
        """As `Store.pull_many`; what is taken is gone when the transaction commits."""
        key = check_key(key)
        limit = min(check_int(limit, "limit", 1), 1 << 62)

        def step(connection: Connection) -> list[bytes]:
            found, rings = taking.take_up_to(connection, key, limit)
            self._rings += rings
            return [head.payload for head in found]

        return self._do(step)

    def clear(self, key: str) -> int:
        """As `Store.clear`."""
        key = check_key(key)

        def step(connection: Connection) -> int:
            count, rings = entries.clear(connection, key, clock.now())
            self._rings += rings
            return count

        return self._do(step)

    def remove(self, key: str, seq: int) -> bool:
        """As `Store.remove`."""
        key, seq = check_key(key), min(check_int(seq, "seq", 1), rules.NO_SEQ)

        def step(connection: Connection) -> bool:
            removed = entries.remove(connection, key, seq, clock.now())
            if removed:
                self._rings.append(room_token(key))
            return removed

        return self._do(step)

    # -- settling

    def ack(self, delivery: Delivery) -> None:
        """As `Delivery.ack`; the delivery is settled when the transaction commits."""
        self._check_delivery(delivery)

        def step(connection: Connection) -> None:
            self._rings += delivery._ack_in(connection, [])  # noqa: SLF001
            self._settled[delivery] = None

        self._do(step)

    def nack(self, delivery: Delivery, delay: float = 0.0) -> None:
        """As `Delivery.nack`; the delivery is settled when the transaction commits."""
        self._check_delivery(delivery)
        micros = check_delay_micros(delay, None)

        def step(connection: Connection) -> None:
            self._rings += delivery._nack_in(connection, micros)  # noqa: SLF001
            self._settled[delivery] = None

        self._do(step)

    def _check_delivery(self, delivery: object) -> None:
        if not isinstance(delivery, Delivery):
            raise TypeError(f"delivery must be a sqlspace.Delivery, not {kind(delivery)}")
        delivery._ensure_of(self._store)  # noqa: SLF001
        if delivery in self._settled:
            raise LeaseError(
                f"entry {delivery.seq} of {delivery.key!a} is settled already, in this transaction"
            )

    # -- looking

    def peek(self, key: str) -> bytes | None:
        """As `Store.peek`, with what this transaction has done."""
        key = check_key(key)

        def step(connection: Connection) -> bytes | None:
            self._settle(connection, key)
            found = browsing.first(connection, key)
            return None if found is None else found[1]

        return self._do(step)

    def len(self, key: str) -> int:
        """As `Store.len`, with what this transaction has done."""
        key = check_key(key)

        def step(connection: Connection) -> int:
            self._settle(connection, key)
            return entries.count(connection, key, clock.now())

        return self._do(step)

    def _settle(self, connection: Connection, key: str) -> None:
        """Have the dead moved to where they belong, if they belong under `key`."""
        if key.endswith(rules.DEAD):
            self._rings += ageing.catch_up(connection, key, clock.now())

    # -- how a verb runs

    def _do(self, step: Callable[[Connection], T], adds: int | None = None, largest: int = 0) -> T:
        """Run a step that is all or nothing, whatever comes after it.

        Args:
            step: The verb.
            adds: How many bytes it pushes; None: it takes.
            largest: Bytes of the largest entry of these.
        """
        if self._thread is None or self._over:
            raise ValueError("the transaction is over, or hasn't begun")
        if self._thread != threading.get_ident():
            raise ValueError("a transaction belongs to the thread that opened it")
        self._database.ensure_usable()
        connection = self._connection
        rings, settled = len(self._rings), len(self._settled)
        done: list[Any] = []  # not empty once the verb is, whatever interrupts come then
        try:
            if not connection.in_transaction:
                raise StoreError(
                    f"{self._store.path}: SQLite rolled the transaction back when one of its "
                    "statements failed"
                )
            if adds is not None:
                self._added += adds
                self._pushes += 1
                self._database.cover(self._added, largest, self._pushes)
            connection.execute("SAVEPOINT sqlspace")
            result = step(connection)
            run(done, connection, "RELEASE sqlspace", ())
        except BaseException as error:
            if done:
                raise
            self._database.ensure_not_forked_inside()
            del self._rings[rings:]
            for delivery in list(self._settled)[settled:]:
                del self._settled[delivery]
            if connection.in_transaction:
                _undo(connection)
            if isinstance(error, apsw.Error):
                if isinstance(error, apsw.FullError) and not self._pushes:
                    self._database.relieve()
                raise self._database.mapped(error) from error
            raise
        return result


def _end_if_left(database: Database, held: list[Any]) -> Generator[None, None, None]:
    """Ends a transaction that an interrupt has left between two bytecodes, when it is let go.

    A generator, and no `__del__`: that would run at the end of every transaction, and swallow a
    Ctrl-C that strikes just there. One that was closed runs nothing.
    """
    try:
        yield
    finally:
        database.end(held)


def _undo(connection: Connection) -> None:
    """Go back to where the verb began, if it has got so far."""
    try:
        connection.execute("ROLLBACK TO sqlspace")
        connection.execute("RELEASE sqlspace")
    except apsw.SQLError:  # no such savepoint
        pass
