"""How a store gets an entry: look at the head, take or lease it, wait for one, give it back.

A look costs no lock in the file, so an empty queue costs no write. Then, as the only writer, just
that entry is taken if it still is the head: its payload is in hand before it is gone from the file,
and nothing is handed out before the commit. What the clock has decided meanwhile is carried out
first, in the same transaction.

What a call has committed when an interrupt reaches it, it takes back: a call that raises did
nothing.
"""

import logging
import os
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, Generic, TypeVar

from . import ageing, browsing, clock, entries, upkeep
from .committer import Operation, Work
from .connection import Connection, disagreement
from .database import Database
from .doorbell import Doorbell, room_token
from .entries import Grant, Head, Lease
from .errors import ClosedError, SpaceError
from .space import Context
from .waiting import MISSING, Vigil, Waiter, surely, wait

__all__ = [
    "Claim",
    "Grab",
    "claim_many",
    "grabbing",
    "pull_many",
    "take_up_to",
    "vigil",
    "vigil_until_empty",
    "vigil_until_ready",
    "wait_and_grab",
]

log = logging.getLogger("sqlspace")

# Nobody is slower than others so often in a row: what is found again then can't be taken at all.
_TRIES = 1000


class Grab(Operation):
    """One attempt to take the head of the first of `keys` that has one ready.

    Args:
        database: Where.
        keys: In the order of preference.
        waiter: The caller's own, if it waits.
        accept: Called with the head before it is taken; a SpaceError that it raises ends the
            attempt.
    """

    head: Head
    """What was taken. A plain attribute: no Ctrl-C can come between the commit and a look at it."""
    got = False
    _due: str | None = None  # a key for which something has come due
    _now = 0
    refusal: Exception | None = None
    """What `accept` raised."""

    def __init__(
        self,
        database: Database,
        keys: list[str],
        waiter: Waiter | None = None,
        accept: Callable[[Head], None] | None = None,
    ) -> None:
        self.done = []
        self.back: list[Any] = []  # not empty once it was put back: twice would double it
        self.database = database
        self.keys = keys
        self.besides = waiter
        self._accept = accept

    def run(self) -> bool:
        """Make the attempt; whether there was one."""
        self.database.write(self)
        if self.refusal is not None:  # no call from here: Ctrl-C would find it outside of `write`
            raise self.refusal
        return self.got

    def probe(self, connection: Connection) -> bool:
        """Look for the head."""
        self.refusal = None
        return self._find(connection, clock.now())

    def _find(self, connection: Connection, now: int, caught: Iterable[str] = ()) -> bool:
        """Find the head, or a key that must be caught up with first; False: there is none.

        Args:
            connection: For writing.
            now: The time.
            caught: Keys that have been caught up with, as of that very time: else what comes due
                meanwhile would be passed over for what stands behind it.
        """
        self._due = None
        self._now = now
        for key in self.keys:
            head, late = entries.look(connection, key, now)
            if late:
                if key not in caught:
                    self._due = key
                    return True
                head = next(iter(entries.heads(connection, key, now, 1)), None)
            if head is not None and not self._is_barred(connection, head):
                self.head = head
                return self._accept is None or self._is_accepted(self._accept, head)
        return False

    def _is_accepted(self, accept: Callable[[Head], None], head: Head) -> bool:
        """Whether the caller wants it."""
        try:
            accept(head)
        except SpaceError as error:  # raised where the attempt was made
            self.refusal = error
            return False
        return True

    def _is_barred(self, connection: Connection, head: Head) -> bool:  # noqa: ARG002
        """Whether it may not be taken, though it is ready."""
        return False

    def step(self, connection: Connection) -> Iterable[str] | None:
        """Take it if it still is the head, or else what is."""
        if self.whole and not self._find(connection, clock.now()):
            return ()
        tokens = self._get(connection)
        if tokens is None or not self.got:
            return tokens
        tokens += self._rings(self.head.key)
        self.tidies = self.head.seq % upkeep.PRUNE_EVERY == 0
        if self.besides is not None:
            tokens += self._passed_on(connection, self.besides)
        return tokens

    def _passed_on(self, connection: Connection, waiter: Waiter) -> list[str]:
        """One ring wakes one taker, and this one may have been rung for each of its keys.

        So for what is left there it wakes the next.
        """
        bell = self.database.bell
        return [
            key
            for key in self.keys
            if bell.awaited(key, waiter) and browsing.stands_ready(connection, key)
        ]

    def _get(self, connection: Connection) -> list[str] | None:
        """Tokens of what was caught up with; None if that needs a transaction first."""
        tokens: list[str] = []
        caught: list[str] = []
        for _ in range(_TRIES):
            if self._due is not None:
                if not self.whole:
                    self.whole = True
                    return None
                tokens += ageing.catch_up(connection, self._due, self._now)
                caught.append(self._due)
            else:
                self._mark(connection)
                self.got = bool(connection.changes())
                if self.got:
                    return tokens
                self.done.clear()  # others were faster, or its time to live is over
                caught.clear()
                self._now = clock.now()
            if not self._find(connection, self._now, caught):
                return tokens
        raise disagreement()

    def _mark(self, connection: Connection) -> None:
        """Take the head, if it still is one."""
        entries.take(self.done, connection, self.head, self._now)

    def _rings(self, key: str) -> tuple[str, ...]:
        """For whom what was done makes a difference."""
        return (room_token(key),)

    def undo(self, connection: Connection) -> None:
        """Put it back. Idempotent."""
        # If it was cut off just behind its one statement, it doesn't know yet.
        cut_off = self.done and not self.finished and not self.whole
        got = self.got or (cut_off and connection.changes())
        if got and not self.back:
            entries.put_back(self.back, connection, self.head)

    def retract(self) -> None:
        """It was rolled back."""
        super().retract()
        self.got = False

    def restore(self) -> None:
        """Put it back, when the call that took it raises after all."""
        take_back(self.database, self, self.head.key, self.back)


def take_back(database: Database, found: Operation, token: str, back: list[Any]) -> None:
    """Undo what a wait has found, which raises after all.

    Args:
        database: Where.
        found: That did it.
        token: The doorbell's.
        back: Not empty once it is undone.
    """
    undoing = _Undoing(found, token, back)

    def undo() -> None:
        try:
            database.write(undoing)
        except ClosedError:
            database.undo(found)

    try:
        surely(undo)
    except SpaceError:
        log.exception("%s: a call that failed could not be undone", database.options.path)


class _Undoing(Operation):
    """Undoes another."""

    def __init__(self, found: Operation, token: str, back: list[Any]) -> None:
        super().__init__()
        self.whole = found.whole
        self._found = found
        self._token = token
        self._back = back

    def step(self, connection: Connection) -> Iterable[str]:
        self._found.undo(connection)
        return (self._token,)

    def retract(self) -> None:
        super().retract()
        self._back.clear()


D = TypeVar("D")
G = TypeVar("G", bound=Grab)


class Claim(Grab, Generic[D]):
    """The same, but leasing the head.

    Args:
        database: As above.
        keys: As above.
        wanted: The lease.
        deliver: Makes what the caller gets; called in reach of `undo`.
        waiter: As above.
    """

    delivery: D

    def __init__(
        self,
        database: Database,
        keys: list[str],
        wanted: Lease,
        deliver: Callable[[Grant], D],
        waiter: Waiter | None = None,
    ) -> None:
        super().__init__(database, keys, waiter)
        self._wanted = wanted
        self._deliver = deliver
        self._grant: Grant | None = None
        self.whole = wanted.ordered  # else an earlier one might be held between look and lease

    def _is_barred(self, connection: Connection, head: Head) -> bool:
        return self._wanted.ordered and entries.blocked(connection, head.key, head.seq, self._now)

    def _mark(self, connection: Connection) -> None:
        wanted = self._wanted
        # The wait for the turn to write is no part of the lease.
        deadline = clock.now() + wanted.micros
        token = os.urandom(16)
        grant = Grant(self.head, token, wanted.micros, deadline, wanted.max_attempts)
        self.delivery = self._deliver(grant)
        self._grant = grant
        entries.lease(self.done, connection, grant)

    def _rings(self, key: str) -> tuple[str, ...]:  # noqa: ARG002  # nothing has left
        return ()

    def _passed_on(self, connection: Connection, waiter: Waiter) -> list[str]:
        if self._wanted.ordered:  # it used up no ring: those who wait for their turn all hear it
            return []
        return super()._passed_on(connection, waiter)

    def undo(self, connection: Connection) -> None:
        """Unlease it. Idempotent, for the token says whether it still is ours."""
        if self._grant is not None:
            entries.unlease(connection, self._grant)


# -- several at once


def pull_many(database: Database, key: str, limit: int) -> tuple[Operation, list[bytes]]:
    """The operation that takes up to `limit` entries, and the list that gets their payloads."""
    found: list[Head] = []
    payloads: list[bytes] = []
    back: list[Any] = []  # one for each that was put back

    def step(connection: Connection) -> Iterable[str]:
        found[:], tokens = take_up_to(connection, key, limit)
        payloads[:] = [head.payload for head in found]  # here, within reach of undo
        upkeep.prune(connection, database.history(), len(found) + upkeep.PRUNE_ROWS)
        return [*tokens, *ageing.expire(connection, clock.now())]

    def undo(connection: Connection) -> None:
        for head in found[len(back) :]:
            entries.put_back(back, connection, head)

    return Work(step, lambda connection: any_ready(connection, [key]), undo), payloads


def take_up_to(connection: Connection, key: str, limit: int) -> tuple[list[Head], list[str]]:
    """Take up to `limit` entries in the caller's transaction; them, and tokens."""
    now = clock.now()
    tokens = caught_up(connection, key, now, limit)
    found = entries.heads(connection, key, now, limit)
    upkeep.entomb(connection, [head.seq for head in found], now)
    return found, [*tokens, room_token(key)]


def claim_many(
    keys: list[str],
    limit: int,
    wanted: Lease,
    deliver: Callable[[Grant], D],
    *,
    own: Container[bytes] = (),
) -> tuple[Operation, list[D]]:
    """The operation that leases up to `limit` entries, and the list that gets the deliveries.

    Args:
        keys: In the order of preference.
        limit: So many at most.
        wanted: The leases; ordered, of each key those that nothing bars.
        deliver: Makes what the caller gets.
        own: Tokens of leases that bar nothing: the caller keeps the order of these itself.
    """
    grants: list[Grant] = []
    deliveries: list[D] = []

    def step(connection: Connection) -> Iterable[str]:
        now = clock.now()
        grants.clear()
        rings: list[str] = []
        for key in keys:
            left = limit - len(grants)
            rings += caught_up(connection, key, now, left)
            found: Sequence[Head] = entries.heads(connection, key, now, left)
            if wanted.ordered:
                found = entries.unbarred(connection, found, now, own)
            grants.extend(entries.lease_all(connection, found, now, wanted))
            if len(grants) == limit:
                break
        deliveries[:] = map(deliver, grants)  # here, within reach of undo
        return rings

    def undo(connection: Connection) -> None:
        for grant in grants:
            entries.unlease(connection, grant)

    def probe(connection: Connection) -> bool:
        return any_ready(connection, keys, ordered=wanted.ordered and not own)

    return Work(step, probe, undo), deliveries


def caught_up(connection: Connection, key: str, now: int, limit: int) -> list[str]:
    """Carry out what has come due, as far as `limit` entries need it; tokens."""
    if not ageing.is_behind(connection, key, now):
        return []
    return ageing.catch_up(connection, key, now, max(limit, ageing.BATCH_ROWS))


def any_ready(connection: Connection, keys: Iterable[str], *, ordered: bool = False) -> bool:
    """Whether there is something to take, in its turn if it is ordered, or to catch up with."""
    now = clock.now()
    for key in keys:
        head, late = entries.look(connection, key, now)
        if late:
            return True
        if head is not None and not (ordered and entries.blocked(connection, key, head.seq, now)):
            return True
    return False


# -- waiting


def wait_and_grab(
    database: Database,
    make: Callable[[Waiter | None], G],
    tokens: Sequence[str],
    timeout: float | None,
    context: Context | None,
    *,
    looked: bool = False,
    in_turn: bool = False,
) -> G:
    """Make attempts until one succeeds; as `grabbing` has it.

    Args:
        database: Where.
        make: A new attempt, of the waiter it gets.
        tokens: For which to be woken.
        timeout: Seconds, or None.
        context: Another bound, or None.
        looked: Whether the caller has just looked, in vain.
        in_turn: As `vigil` has it.
    """
    grabbed: G = wait(
        grabbing(database, make, tokens, in_turn=in_turn), timeout, context, looked=looked
    )
    return grabbed


def grabbing(
    database: Database,
    make: Callable[[Waiter | None], Grab],
    tokens: Sequence[str],
    *,
    in_turn: bool = False,
) -> Vigil:
    """A vigil that makes attempts until one succeeds, which is what it finds."""
    attempt: Grab | None = None

    def look(waiter: Waiter, enrolled: bool) -> None:
        nonlocal attempt
        attempt = make(waiter if enrolled else None)
        if attempt.run():
            waiter.found = attempt
        attempt = None  # it has the waiter, and with that a task, which may have been forgotten

    def restore(waiter: Waiter) -> None:
        waiter.found.restore()

    def call_off() -> None:
        if attempt is not None:
            database.call_off(attempt)

    return vigil(database, look, tokens, restore=restore, in_turn=in_turn, call_off=call_off)


def vigil(
    database: Database,
    look: Callable[[Waiter, bool], None],
    tokens: Sequence[str],
    *,
    restore: Callable[[Waiter], None] | None = None,
    in_turn: bool = False,
    limit: int | None = None,
    call_off: Callable[[], object] = lambda: None,
) -> Vigil:
    """A vigil at the doorbell of a store.

    Args:
        database: Its file.
        look: As `Vigil` has it.
        tokens: For which to be woken.
        restore: Gives back what was found; whoever can is one that takes.
        in_turn: Whether it waits for its turn: then also for what is held before to go.
        limit: If it waits for room: until there are fewer entries than that.
        call_off: As `Vigil` has it.
    """
    bell: Doorbell | None = None
    watched = [*tokens, *map(room_token, tokens)] if in_turn else tokens
    looked_at = 0

    def look_enrolled(waiter: Waiter, enroll: bool) -> None:
        nonlocal bell, looked_at
        if enroll and bell is None:
            bell = database.bell
            takes = restore is not None and not in_turn
            bell.enroll(waiter, watched, takes=takes, in_turn=in_turn, limit=limit or 1)
        looked_at = clock.now()
        look(waiter, enroll)

    def leave(waiter: Waiter) -> None:
        if bell is None:
            return
        bell.dismiss(waiter, watched)
        # Rung once more, in vain: that ring is another's. And there may be more room: only now is
        # no other ring for that sent here, to be read by nobody.
        if waiter.park(0) or (limit is not None and waiter.found is not MISSING):
            for token in tokens:
                bell.ring(token)

    def park(waiter: Waiter, seconds: float) -> None:
        database.bell.park(waiter, seconds)

    def horizon() -> None:
        ahead = browsing.seconds_ahead(database, watched, looked_at)
        if ahead is not None:  # the watch looks then, for all of this process at once
            database.bell.expect(ahead)

    return Vigil(
        look_enrolled,
        leave=leave,
        restore=restore or (lambda _: None),
        ensure_open=database.ensure_open,
        park=park,
        horizon=horizon,
        call_off=call_off,
    )


def vigil_until_ready(database: Database, key: str) -> Vigil:
    """A vigil that ends when `key` has an entry ready, and takes nothing."""
    return _vigil_until(database, key, lambda: browsing.has_ready(database, key))


def vigil_until_empty(database: Database, key: str) -> Vigil:
    """A vigil that ends when `key` holds no live entry."""
    return _vigil_until(database, room_token(key), lambda: not browsing.has_live(database, key))


def _vigil_until(database: Database, token: str, met: Callable[[], bool]) -> Vigil:
    def look(waiter: Waiter, _: bool) -> None:
        if met():
            waiter.found = None

    return vigil(database, look, [token])
