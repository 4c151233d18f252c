"""Leases: an entry that was handed out, and comes back unless it is settled in time.

A token stands in the row for as long as the lease does, and every settling asks for it: a worker
that was frozen past its lease can't settle its successor's work. Whether a lease holds is decided
by its row and the clock, so it is lost when its time is over, taken over or not.
"""

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from . import clock, dead_letters, entries, upkeep
from .arguments import check_delay_micros, check_lease_micros, kind
from .committer import Operation
from .connection import Connection
from .database import Database
from .doorbell import room_token
from .entries import Grant
from .errors import ClosedError, LeaseError, SpaceError, StoreError
from .waiting import surely

if TYPE_CHECKING:
    from .store import Store

__all__ = ["Ack", "Delivery", "Nack", "Renewals", "ack_all", "extend_many", "give_back"]

log = logging.getLogger("sqlspace")


class Delivery:
    """One claimed entry, for the one worker that holds its lease.

    As a context manager it renews its lease by itself while the block runs, acks at the end of the
    block, and nacks when an exception leaves it, KeyboardInterrupt included. After an explicit
    `ack` or `nack` the end of the block does nothing. If the lease was lost all the same (the
    process was frozen, the entry was cleared), the ack at the end raises `LeaseError`.

    Attributes:
        key: Under which the entry stands.
        seq: Its number there.
        payload: As it was pushed.
        headers: As they were pushed.
        attempts: How often it was claimed, this time included.
    """

    __slots__ = (
        *("key", "seq", "payload", "headers", "attempts"),
        *("_store", "_database", "_renewals", "_grant", "_settled", "_lost", "__weakref__"),
    )

    def __init__(self, store: "Store", renewals: "Renewals", grant: Grant) -> None:
        head = grant.head
        self.key = head.key
        self.seq = head.seq
        self.payload = head.payload
        self.headers = dead_letters.readable_headers(head.headers)
        self.attempts = head.attempts + 1
        self._store = store  # which must not be closed as forgotten while a delivery is at work
        self._database = renewals.database
        self._renewals = renewals
        self._grant = grant
        self._settled = False
        self._lost = False

    @property
    def id(self) -> str:
        """Names the entry among those of all files, the same each time that it is delivered.

        FILE/SEQ/PUSHED: the file's random id, the seq, and when it was pushed, in Unix
        microseconds. The last is for a file that was restored from a backup: it has the id of the
        lost one, and gives some seqs once more.
        """
        return f"{self._database.file_id}/{self.seq}/{self._grant.head.pushed_at}"

    @property
    def deadline(self) -> float:
        """When the lease ends unless it is extended, in Unix seconds."""
        return self._grant.deadline / 1e6

    @property
    def lost(self) -> bool:
        """Whether the lease ended before the delivery was settled: another worker may have it."""
        return self._lost or (not self._settled and self._grant.is_over(clock.now()))

    def ack(self) -> None:
        """The work is done: turn the entry into a tombstone, as durable as a push.

        Raises:
            LeaseError: The delivery is settled, or its lease is lost; nothing changed.
            ClosedError, StoreError: The lease goes on, unless it is an UndecidedError.
        """
        self._database.write(Ack([self]))

    def nack(self, delay: float = 0.0) -> None:
        """The work is not done: give the entry back to its old place, for the next claim.

        If this was its last attempt it goes to the dead letters instead; if its time to live is
        over, it expires. Cut off by Ctrl-C, it may have happened all the same.

        Args:
            delay: Seconds until it is ready again.

        Raises:
            LeaseError, ClosedError, StoreError: as `ack`.
        """
        micros = check_delay_micros(delay, None)
        self._database.write(Nack(self, micros))

    def extend(self, lease: float) -> None:
        """Have the lease end `lease` seconds from now, sooner or later than it would have.

        Raises:
            LeaseError, ClosedError, StoreError: as `ack`.
        """
        micros = check_lease_micros(lease)
        before = self._grant

        def step(connection: Connection) -> Iterable[str]:
            self._extend_in(connection, micros)
            return ()

        try:
            self._database.transact(step)
        except BaseException:
            self._grant = before
            raise
        self._renewals.reschedule(self)

    def __enter__(self) -> Self:
        self._ensure_unsettled()
        if self.lost:
            raise self._gone()
        try:
            self._renewals.add(self)
        except BaseException:
            surely(lambda: self._renewals.discard(self))
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._settled:
                return
            if error is None:
                self.ack()
            else:
                self._nack_quietly()
        finally:
            self._renewals.discard(self)

    def __repr__(self) -> str:
        state = "settled " if self._settled else "lost " if self.lost else ""
        return f"<{state}sqlspace.Delivery {self.seq} of {self.key!a}, attempt {self.attempts}>"

    def _nack_quietly(self) -> None:
        """Give it back; what fails then must not hide the exception that the block ends with."""
        try:
            self.nack()
        except (SpaceError, ValueError) as error:  # the latter inside a transaction of the store
            log.warning("entry %d of %a could not be given back: %s", self.seq, self.key, error)

    # -- inside a write, of a transaction too

    def _ack_in(self, connection: Connection, done: list[Any]) -> list[str]:
        self._ensure_unsettled()
        entries.ack(done, connection, self.seq, self._grant.token, clock.now())
        if not connection.changes():
            done.clear()
            raise self._gone()
        return [room_token(self.key)]

    def _nack_in(self, connection: Connection, delay: int) -> list[str]:
        self._ensure_unsettled()
        rings = entries.nack(connection, self.seq, self._grant.token, clock.now(), delay)
        if rings is None:
            raise self._gone()
        return rings

    def _extend_in(self, connection: Connection, micros: int) -> None:
        self._ensure_unsettled()
        now = clock.now()
        if not entries.extend(connection, self.seq, self._grant.token, now, micros):
            raise self._gone()
        self._grant = self._grant._replace(micros=micros, deadline=now + micros)

    def _ensure_of(self, store: "Store") -> None:
        if self._store is not store:
            raise ValueError(f"the delivery belongs to another store than {store!r}: {self!r}")

    def _ensure_unsettled(self) -> None:
        if self._settled:
            raise LeaseError(f"entry {self.seq} of {self.key!a} is settled already")

    def _gone(self) -> LeaseError:
        self._lost = True
        return LeaseError(
            f"the lease of entry {self.seq} of {self.key!a} is lost: its time was over, or the "
            "entry was taken away"
        )


class _Settling(Operation):
    """Settles some deliveries, which the renewals take for settled from its step on."""

    def __init__(self, deliveries: Sequence[Delivery]) -> None:
        self.done = []
        self._deliveries = deliveries
        self._marked: list[Delivery] = []

    def mark(self, delivery: Delivery) -> None:
        """It is settled."""
        self._marked.append(delivery)
        delivery._settled = True  # noqa: SLF001  # they are one piece

    def retract(self) -> None:
        super().retract()
        while self._marked:
            self._marked[-1]._settled = False  # noqa: SLF001
            self._marked.pop()

    def undo(self, connection: Connection) -> None:
        for delivery in self._deliveries:
            self._unsettle(connection, delivery)
        self.retract()

    def _unsettle(self, connection: Connection, delivery: Delivery) -> None:
        entries.unack(connection, delivery._grant)  # noqa: SLF001


class Ack(_Settling):
    """Acks one, in one statement."""

    def step(self, connection: Connection) -> Iterable[str]:
        """As `Operation` has it."""
        (delivery,) = self._deliveries
        rings = delivery._ack_in(connection, self.done)  # noqa: SLF001
        self.mark(delivery)
        self.tidies = delivery.seq % upkeep.PRUNE_EVERY == 0
        return rings


class _AckAll(_Settling):
    """Acks several, all or none."""

    whole = True

    def __init__(self, deliveries: Sequence[Delivery], keep: int | None) -> None:
        super().__init__(deliveries)
        self._keep = keep

    def step(self, connection: Connection) -> Iterable[str]:
        rings: dict[str, None] = {}
        for delivery in self._deliveries:
            rings.update(dict.fromkeys(delivery._ack_in(connection, [])))  # noqa: SLF001
            self.mark(delivery)
        upkeep.prune(connection, self._keep, len(self._deliveries) + upkeep.PRUNE_ROWS)
        return rings


class Nack(_Settling):
    """Gives one back."""

    whole = True

    def __init__(self, delivery: Delivery, delay: int) -> None:
        super().__init__([delivery])
        self._delay = delay

    def step(self, connection: Connection) -> Iterable[str]:
        """As `Operation` has it."""
        (delivery,) = self._deliveries
        rings = delivery._nack_in(connection, self._delay)  # noqa: SLF001
        self.mark(delivery)
        return rings

    def _unsettle(self, connection: Connection, delivery: Delivery) -> None:
        """Cut off behind its commit, it stays done."""


class _GiveBack(_Settling):
    """Gives several back as if they had never been claimed, and nacks the first of them."""

    whole = True

    def __init__(self, deliveries: Sequence[Delivery], delay: int | None) -> None:
        super().__init__(deliveries)
        self._delay = delay

    def step(self, connection: Connection) -> Iterable[str]:
        rings: dict[str, None] = {}
        for place, delivery in enumerate(self._deliveries):
            if delivery._settled:  # noqa: SLF001
                continue
            if place == 0 and self._delay is not None:
                rings.update(dict.fromkeys(delivery._nack_in(connection, self._delay)))  # noqa: SLF001
            else:
                entries.unlease(connection, delivery._grant)  # noqa: SLF001
                rings[delivery.key] = None
            self.mark(delivery)
        return rings

    def _unsettle(self, connection: Connection, delivery: Delivery) -> None:
        """As that of a nack."""


def give_back(
    database: Database, deliveries: Sequence[Delivery], *, delay: float | None = None
) -> None:
    """Give all of them back, in one transaction: no attempt counts, nor does a lost lease matter.

    Args:
        database: Theirs.
        deliveries: In order; those that are settled are left alone.
        delay: Seconds; None, or the first of them is nacked, and its attempt counts. LeaseError
            then if its lease is lost, and nothing changed.
    """
    micros = None if delay is None else check_delay_micros(delay, None)
    database.write(_GiveBack(deliveries, micros))


def extend_many(database: Database, deliveries: Sequence[Delivery]) -> None:
    """Have the leases of all of them begin anew, in one transaction; LeaseError: one is lost."""

    def step(connection: Connection) -> Iterable[str]:
        for delivery in deliveries:
            delivery._extend_in(connection, delivery._grant.micros)  # noqa: SLF001
        return ()

    database.transact(step)


def ack_all(store: "Store", database: Database, given: Iterable[object]) -> Operation:
    """The operation that acks all of them, or none."""
    if isinstance(given, Delivery | memoryview) or not isinstance(given, Iterable):
        wanted = "an iterable of sqlspace.Delivery"
        raise TypeError(f"deliveries must be {wanted}, not {kind(given)}")
    deliveries: list[Delivery] = []
    for index, delivery in enumerate(given):
        if not isinstance(delivery, Delivery):
            argument = f"deliveries[{index}]"
            raise TypeError(f"{argument} must be a sqlspace.Delivery, not {kind(delivery)}")
        delivery._ensure_of(store)  # noqa: SLF001
        deliveries.append(delivery)
    return _AckAll(deliveries, database.history())


# -- renewing

_RENEW_AT = 3  # at this part of a lease, so that one that fails can be tried again
_RETRY_SECONDS = 1.0
_LINGER_SECONDS = 1.0
_END_SECONDS = 1.0


class Renewals:
    """The leases of one store that are renewed while their blocks run, by one thread.

    The thread begins with the first block, and ends by itself when it comes round and none has run
    for a while: one for each block was measured at 50 µs a block. Leases that are due at about the
    same time are renewed in one transaction.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        # Entered as it is: a Condition's own enter and exit are Python's, where Ctrl-C gets in.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # When each is due, on the monotonic clock. Weak, so that a block which an interrupt kept
        # from beginning is not renewed for ever.
        self._due: weakref.WeakKeyDictionary[Delivery, float] = weakref.WeakKeyDictionary()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._wakes_at = 0.0  # when the thread comes round; while it is at work, nobody calls it
        _all.add(self)

    def add(self, delivery: Delivery) -> None:
        """Renew it from now on."""
        with self._lock:
            self._stopped = False
            self._due[delivery] = due = self._next(delivery)
            if self._thread is None:
                self._thread = self._start()
            elif due < self._wakes_at:
                self._changed.notify()

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="sqlspace-renewals", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the process may have no more threads
            raise StoreError(f"no thread to renew leases: {error}") from error
        return thread

    def discard(self, delivery: Delivery) -> None:
        """Renew it no more; idempotent."""
        with self._lock:
            self._due.pop(delivery, None)

    def reschedule(self, delivery: Delivery) -> None:
        """Its lease has another length now."""
        with self._lock:
            if delivery in self._due:
                self._due[delivery] = due = self._next(delivery)
                if due < self._wakes_at:
                    self._changed.notify()

    def _next(self, delivery: Delivery) -> float:
        # From the claim's time: it may have lain about before its block began.
        grant = delivery._grant  # noqa: SLF001  # they are one piece
        lease = grant.micros / 1e6
        left = (grant.deadline - clock.now()) / 1e6
        return time.monotonic() + max(0.0, min(left, lease) - lease * (1 - 1 / _RENEW_AT))

    def _run(self) -> None:
        while (batch := self._wait()) is not None:
            try:
                self._renew(batch)
            except ClosedError:
                self.stop()
            except SpaceError as error:
                log.warning("%s: leases could not be renewed: %s", self._path(), error)
                self._postpone(batch)
            del batch  # while it waits, it must not be what keeps them

    def _wait(self) -> list[Delivery] | None:
        """Those that are due; None if there are none any more, and then the thread ends."""
        with self._lock:
            return self._wait_inside()

    def _wait_inside(self) -> list[Delivery] | None:
        lingers = True
        while True:
            due = {} if self._stopped else dict(self._due)
            now = time.monotonic()
            self._wakes_at = min(due.values(), default=now + _LINGER_SECONDS)
            if self._wakes_at <= now:
                return [each for each, at in due.items() if at <= now]
            if not due and (self._stopped or not lingers):
                self._thread = None
                return None
            lingers = bool(due)
            del due  # or it would keep them
            self._changed.wait(min(self._wakes_at - now, threading.TIMEOUT_MAX))

    def _renew(self, batch: list[Delivery]) -> None:
        lost: set[Delivery] = set()
        grants = {delivery: delivery._grant for delivery in batch}  # noqa: SLF001

        def step(connection: Connection) -> Iterable[str]:
            for delivery in batch:
                if delivery._settled:  # noqa: SLF001
                    continue
                try:
                    delivery._extend_in(connection, delivery._grant.micros)  # noqa: SLF001
                except LeaseError as error:
                    log.warning("%s", error)
                    lost.add(delivery)
            return ()

        try:
            self.database.transact(step)
        except BaseException:
            for delivery, grant in grants.items():
                delivery._grant = grant  # noqa: SLF001
            raise
        with self._lock:
            self._reschedule_all(batch, lost)

    def _reschedule_all(self, batch: list[Delivery], lost: set[Delivery]) -> None:
        for delivery in batch:
            if delivery in lost or delivery._settled:  # noqa: SLF001
                self._due.pop(delivery, None)
            elif delivery in self._due:
                self._due[delivery] = self._next(delivery)

    def _postpone(self, batch: list[Delivery]) -> None:
        with self._lock:
            self._put_off(batch)

    def _put_off(self, batch: list[Delivery]) -> None:
        for delivery in batch:
            if delivery in self._due:
                lease = delivery._grant.micros / 1e6  # noqa: SLF001
                pause = min(_RETRY_SECONDS, lease / 10)
                self._due[delivery] = time.monotonic() + pause

    def stop(self) -> None:
        """Renew no more, and have the thread end; soon, or if others are at it, when it is due."""
        self._stopped = True
        if self._lock.acquire(blocking=False):  # a signal's handler may have cut in there
            try:
                self._changed.notify()
            finally:
                self._lock.release()

    def end(self) -> None:
        """The same, and wait for the thread to end, if it does within a second."""
        self.stop()
        thread = self._thread
        if thread is not None:
            thread.join(_END_SECONDS)

    def _path(self) -> str:
        return self.database.options.path

    def forget(self) -> None:
        """In a forked child: the leases are the parent's to renew."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._due = weakref.WeakKeyDictionary()
        self._thread = None


_all: weakref.WeakSet[Renewals] = weakref.WeakSet()


def _forget_all() -> None:
    for renewals in list(_all):
        renewals.forget()


def _end_all() -> None:
    """Before the interpreter takes the daemon threads' locks to the grave."""
    for renewals in list(_all):
        renewals.end()


os.register_at_fork(after_in_child=_forget_all)
atexit.register(_end_all)
