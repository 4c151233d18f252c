"""Store: the verbs of the durable queue.

Each checks what it was given, and says what to do; how it is done stands in the rooms that it
calls: `pushing`, `taking`, `browsing`, `upkeep`, and for the SQL of an entry's life `entries`.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, Self

from . import ageing, browsing, clock, delivery, entries, opening, pushing, rules, taking, upkeep
from .arguments import (
    check_callable,
    check_flag,
    check_int,
    check_key,
    check_keys,
    check_lease_micros,
    check_payload,
    check_size,
    check_timeout,
    check_ttl_micros,
)
from .connection import Connection, Options
from .database import Database
from .delivery import Delivery, Renewals
from .doorbell import room_token
from .durable import DurableSpace, dumps_json, loads_json
from .entries import Grant, Lease
from .errors import CanceledError, ClosedError, DeadlineError, StoreError
from .pushing import Adding, Batch, Push
from .records import Compaction, Entry, Stats, Tombstone
from .space import Context, check_context
from .taking import Claim, Grab
from .transaction import Transaction
from .waiting import wait

__all__ = ["Store", "checked_keys", "checked_lease", "checked_limit", "open", "open_existing"]


class Store:
    """A durable store-and-forward queue in one SQLite file; made by `sqlspace.open`.

    Any number of threads may use one Store, and any number of processes may open the same file.
    A Store that was open when the process forked opens anew in the child; one that is pickled opens
    where it is unpickled.

    What an entry is follows from its row and the clock: expired, else leased, else delayed, else
    ready. Verbs that take see ready entries only. Its place is its seq, always: one that was given
    back, or has come due at last, stands there again.

    Attributes:
        path: Of the file, absolute and resolved.
        sync: As given to `open`.
    """

    def __init__(self, options: Options) -> None:
        self.path = options.path
        self.sync = options.sync
        self._database = Database(options, browsing.stirring, ageing.tidy)
        self._renewals = Renewals(self._database)

    # -- pushing

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
        timeout: float | None = None,
        context: Context | None = None,
    ) -> int:
        """Add an entry behind all others of `key`.

        When this returns the entry is committed, and unless sync=False on the disk: a power cut
        leaves it there, once, in its place.

        Args:
            key: 1 to 1,024 bytes in UTF-8, no NUL.
            payload: Bytes-like; copied. At most 1,000,000,000 bytes less the rest of its row.
            ttl: Seconds from now until the entry is gone if nobody takes it; not while it is
                leased. None or infinity: never.
            delay: Seconds from now until it is ready; less than ttl. It keeps its place meanwhile.
            dedupe: With the rules of a key. If an entry of `key` has the same one, live or in the
                history, its seq is returned and nothing is added. Forgotten by put, clear, compact.
            headers: Kept with the entry, and readable without its payload.
            max_len: Wait until `key` holds fewer live entries than that.
            timeout: Seconds to wait for room, None for ever, 0 not at all; only with max_len.
            context: Another bound on that wait; only with max_len.

        Returns:
            The entry's seq: it grows over the whole file and is never used twice.

        Raises:
            ClosedError, CanceledError, DeadlineError: asked for in this order; nothing was added.
            StoreError: the entry was not added, unless it is an UndecidedError.
        """
        wanted = Push(
            key,
            payload,
            headers=headers,
            ttl=ttl,
            delay=delay,
            dedupe=dedupe,
            max_len=max_len,
        )
        if max_len is not None:
            added: Adding = wait(pushing.vigil_for_room(self._database, wanted), timeout, context)
            return added.seq
        if timeout is not None or context is not None:
            check_timeout(timeout)
            check_context(context)
            raise ValueError("timeout and context bound the wait for room: they need max_len")
        return pushing.push(self._database, wanted)

    def push_many(
        self,
        key: str,
        payloads: Iterable[bytes],
        *,
        ttl: float | None = None,
        delay: float | None = None,
    ) -> list[int]:
        """Add one entry for each payload, in one transaction: all of them, or none.

        Args:
            key: As in `push`.
            payloads: Bytes-likes, as in `push`; all are checked before the first is added.
            ttl: As in `push`, of each.
            delay: As in `push`, of each.

        Returns:
            Their seqs, in the order of the payloads.

        Raises:
            ClosedError, StoreError: as `push`.
        """
        work, seqs = pushing.push_many(Batch.checked(key, payloads, ttl, delay))
        self._database.write(work)
        return seqs

    def put(self, key: str, payload: bytes, *, ttl: float | None = None) -> int:
        """Make `payload` the one entry of `key`, in place of all that it held, in one transaction.

        What it replaces leaves no tombstone: ready, delayed and leased entries alike. A worker that
        holds one of those gets `LeaseError` when it settles.

        Args:
            key: As in `push`.
            payload: As in `push`.
            ttl: As in `push`.

        Returns:
            The new entry's seq.

        Raises:
            ClosedError, StoreError: nothing changed, unless it is an UndecidedError.
        """
        key, payload = check_key(key), check_payload(payload)
        ttl_micros = check_ttl_micros(ttl)
        check_size(key, payload, None)
        seq = 0

        def step(connection: Connection) -> Iterable[str]:
            nonlocal seq
            seq, rings = entries.put(connection, key, payload, clock.now(), ttl_micros)
            return rings

        self._database.transact(step, adds=len(payload), largest=len(payload))
        return seq

    # -- taking

    def pull(
        self, key: str, timeout: float | None = None, *, context: Context | None = None
    ) -> bytes:
        """Take the head of `key` and return its payload, waiting for one.

        At most once: the tombstone is committed before the payload is returned, so no crash brings
        it back; a process that is killed inside the call may have consumed its entry. `claim` is
        the form for work that must come back then.

        Args:
            key: Of the entry.
            timeout: Seconds; None or infinity waits for ever, 0 looks exactly once.
            context: Another bound on the wait.

        Raises:
            ClosedError, CanceledError, DeadlineError: asked for in this order; nothing was taken.
            StoreError: nothing was taken, unless it is an UndecidedError.
        """
        keys = [check_key(key)]
        if context is None and (timeout is None or check_timeout(timeout)):
            # There mostly is one, and then there is nothing to wait for.
            grab = Grab(self._database, keys)
            if grab.run():
                return grab.head.payload
            return self._wait_and_take(keys, timeout, context, looked=True).head.payload
        return self._wait_and_take(keys, timeout, context).head.payload

    def pull_any(
        self, keys: Iterable[str], timeout: float | None = None, *, context: Context | None = None
    ) -> tuple[str, bytes]:
        """Take the head of the first listed key that has one ready, waiting; otherwise as `pull`.

        Returns:
            The key, and the payload taken from it.
        """
        taken = self._wait_and_take(check_keys(keys), timeout, context).head
        return taken.key, taken.payload

    def pullp(self, key: str) -> bytes | None:
        """Take the head of `key`, or return None; never waits for one. Otherwise as `pull`."""
        grab = Grab(self._database, [check_key(key)])
        return grab.head.payload if grab.run() else None

    def pull_many(self, key: str, limit: int) -> list[bytes]:
        """Take up to `limit` entries of `key` from its head, in one transaction; never waits.

        Args:
            key: Of the entries.
            limit: At least 1.

        Returns:
            Their payloads, in order; fewer than `limit`, or none, if there aren't so many.

        Raises:
            ClosedError, StoreError: as `pull`.
        """
        key = check_key(key)
        work, payloads = taking.pull_many(self._database, key, checked_limit(limit))
        self._database.write(work)
        return payloads

    def remove(self, key: str, seq: int) -> bool:
        """Delete one live entry, ready, delayed or leased; it leaves no tombstone.

        A worker that holds it gets `LeaseError` when it settles.

        Args:
            key: Of the entry.
            seq: As `push` returned it.

        Returns:
            Whether it was there.

        Raises:
            ClosedError, StoreError: as `put`.
        """
        key, seq = check_key(key), min(check_int(seq, "seq", 1), rules.NO_SEQ)
        removed = False

        def step(connection: Connection) -> Iterable[str]:
            nonlocal removed
            removed = entries.remove(connection, key, seq, clock.now())
            return (room_token(key),) if removed else ()

        self._database.transact(step)
        return removed

    def clear(self, key: str) -> int:
        """Delete all live entries of `key`, also those that are delayed or leased; how many.

        They leave no tombstones. A worker that holds one of them gets `LeaseError` when it settles.

        Raises:
            ClosedError, StoreError: as `put`.
        """
        key = check_key(key)
        held = 0

        def step(connection: Connection) -> Iterable[str]:
            nonlocal held
            held, rings = entries.clear(connection, key, clock.now())
            return rings

        self._database.transact(step)
        return held

    # -- claiming

    def claim(
        self,
        key_or_keys: str | Iterable[str],
        timeout: float | None = None,
        *,
        lease: float = 30.0,
        max_attempts: int | None = None,
        ordered: bool = False,
        context: Context | None = None,
    ) -> Delivery:
        """Lease the head of the first listed key that has one ready, waiting for one.

        At least once: the entry stays in the file until it is acked. When the lease ends first, by
        a crash or because the work takes too long, or when it is given back, it is ready again at
        its old place.

        Args:
            key_or_keys: One key, or several in the order of preference.
            timeout: As in `pull`.
            lease: Seconds; as a context manager the delivery renews it by itself.
            max_attempts: The entry goes to the dead letters, KEY/dead, when so many claims have
                come to nothing; the number that its last claim gave counts. None: never. Needs
                keys of at most 1,019 bytes, for the /dead behind them.
            ordered: Strictly in order also when entries come back: none of a key, while an earlier
                one of it is leased or waits out the delay of a `nack`. It binds those who say it.
            context: Another bound on the wait.

        Returns:
            The delivery, to be settled by `ack` or `nack`, or by the end of its `with` block.

        Raises:
            ClosedError, CanceledError, DeadlineError: asked for in this order; nothing was leased.
            StoreError: nothing was leased, unless it is an UndecidedError.
        """
        keys = checked_keys(key_or_keys)
        wanted = checked_lease(keys, lease, max_attempts, ordered)
        looked = context is None and bool(timeout is None or check_timeout(timeout))
        if looked:
            claim = Claim(self._database, keys, wanted, self._deliver)  # as in pull
            if claim.run():
                return claim.delivery
        claim = taking.wait_and_grab(
            self._database,
            lambda waiter: Claim(self._database, keys, wanted, self._deliver, waiter),
            keys,
            timeout,
            context,
            looked=looked,
            in_turn=ordered,
        )
        return claim.delivery

    def claimp(
        self,
        key_or_keys: str | Iterable[str],
        *,
        lease: float = 30.0,
        max_attempts: int | None = None,
        ordered: bool = False,
    ) -> Delivery | None:
        """As `claim`, or None if no entry is ready; never waits for one."""
        keys = checked_keys(key_or_keys)
        wanted = checked_lease(keys, lease, max_attempts, ordered)
        claim = Claim(self._database, keys, wanted, self._deliver)
        return claim.delivery if claim.run() else None

    def claim_many(
        self,
        key_or_keys: str | Iterable[str],
        limit: int,
        *,
        lease: float = 30.0,
        max_attempts: int | None = None,
    ) -> list[Delivery]:
        """Lease up to `limit` entries, of the first listed key first, in one transaction.

        Never waits; otherwise as `claim`. Fewer, or none, if there aren't so many.
        """
        keys = checked_keys(key_or_keys)
        limit = checked_limit(limit)
        wanted = checked_lease(keys, lease, max_attempts, ordered=False)
        work, deliveries = taking.claim_many(keys, limit, wanted, self._deliver)
        self._database.write(work)
        return deliveries

    def consume(
        self,
        key_or_keys: str | Iterable[str],
        *,
        lease: float = 30.0,
        max_attempts: int | None = None,
        ordered: bool = False,
        context: Context | None = None,
    ) -> Iterator[Delivery]:
        """Claim one entry after the other, until the store is closed or the context ends.

        Each is the caller's to settle, so the loop's first line is mostly `with delivery:`. An
        exception that leaves that block gives the entry back, and ends the loop, too.
        """
        keys = checked_keys(key_or_keys)
        checked_lease(keys, lease, max_attempts, ordered)
        check_context(context)

        def deliveries() -> Iterator[Delivery]:
            while True:
                try:
                    claimed = self.claim(
                        keys,
                        lease=lease,
                        max_attempts=max_attempts,
                        ordered=ordered,
                        context=context,
                    )
                except (ClosedError, CanceledError, DeadlineError):
                    return
                yield claimed

        return deliveries()

    def ack_many(self, deliveries: Iterable[Delivery]) -> None:
        """Ack all of these, in one transaction: all of them, or none.

        Raises:
            LeaseError: One of them is settled, or its lease is lost; nothing changed.
            ClosedError, StoreError: as `Delivery.ack`.
        """
        self._database.write(delivery.ack_all(self, self._database, deliveries))

    def requeue(self, key: str) -> int:
        """Move the dead letters of `key` back to where they came from; how many.

        Those that stand ready under KEY/dead go to the end of the key that each came from, as new
        entries with their own headers and no attempts, a thousand in a transaction.
        """
        key = check_key(key)
        total = 0
        moved = ageing.BATCH_ROWS

        def step(connection: Connection) -> Iterable[str]:
            nonlocal moved
            moved, rings = entries.requeue(connection, key, clock.now(), ageing.BATCH_ROWS)
            return rings

        while moved == ageing.BATCH_ROWS:
            self._database.transact(step, adds=0)
            total += moved
        return total

    # -- together

    def transaction(self) -> Transaction:
        """Several verbs in one commit: all of them, or none.

            with store.transaction() as together:
                together.push("invoices", payload)
                together.ack(order)

        It belongs to the calling thread, which can't use the store itself meanwhile (ValueError);
        others that write wait. An exception rolls all back; waiters are woken after the commit.
        """
        return Transaction(self, self._database)

    def space(
        self,
        *,
        dumps: Callable[[Any], bytes] = dumps_json,
        loads: Callable[[bytes], Any] = loads_json,
    ) -> DurableSpace:
        """The `Space` protocol over this store.

        Args:
            dumps: Encodes a value; JSON unless told otherwise.
            loads: Decodes it. What it raises makes a DecodeError; it may not use this store.
        """
        check_callable(dumps, "dumps")
        check_callable(loads, "loads")
        return DurableSpace(self, self._database, dumps, loads)

    # -- waiting without taking

    def wait(
        self, key: str, timeout: float | None = None, *, context: Context | None = None
    ) -> None:
        """Wait until `key` has an entry that can be taken; takes nothing. Raises as `pull`."""
        wait(taking.vigil_until_ready(self._database, check_key(key)), timeout, context)

    def wait_empty(
        self, key: str, timeout: float | None = None, *, context: Context | None = None
    ) -> None:
        """Wait until `key` holds no live entry. Raises as `pull`."""
        wait(taking.vigil_until_empty(self._database, check_key(key)), timeout, context)

    # -- looking

    def peek(self, key: str) -> bytes | None:
        """What a pull of `key` would take, left where it is; None if there is none."""
        found = browsing.head(self._database, check_key(key))
        return None if found is None else found[1]

    def len(self, key: str) -> int:
        """How many live entries `key` holds: ready, delayed and leased; not the expired."""
        return browsing.count(self._database, check_key(key))

    def keys(self) -> list[str]:
        """The keys that hold live entries, sorted."""
        return browsing.keys(self._database)

    def get(self, key: str, seq: int) -> Entry | None:
        """One live entry, left where it is; None if it isn't there.

        Args:
            key: Of the entry.
            seq: As `push` returned it.
        """
        key, seq = check_key(key), min(check_int(seq, "seq", 1), rules.NO_SEQ)
        return browsing.entry(self._database, key, seq)

    def entries(self, key: str) -> Iterator[Entry]:
        """All live entries of `key`, by seq, read in batches as the iterator advances."""
        key = check_key(key)
        self._database.ensure_open()
        return browsing.live(self._database, key)

    def history(self, key: str) -> Iterator[Tombstone]:
        """What was taken from `key` and is still in the history, oldest taking first.

        What has expired or died is taken when the next verb comes by that has to do with it.
        """
        key = check_key(key)
        self._database.ensure_open()
        return browsing.history(self._database, key)

    def stats(self) -> Stats:
        """Counts, ages and sizes of all keys and of the file; costs a look at every live entry."""
        return browsing.stats(self._database)

    # -- upkeep

    def compact(self) -> Compaction:
        """Delete all tombstones, give the free pages back to the system, cut the -wal to nothing.

        Safe at any time, also while other processes work: they wait while the file is rewritten,
        about 1 s for 100 MB. Seqs are preserved, and none is used again. Rewriting needs as much
        free disk as the live entries take, twice; without it, everything but that is done. In a
        file with others' tables nothing is rewritten: it would renumber their rows.
        """
        return upkeep.compact(self._database)

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Copy a consistent state to a new file, while the store is in use.

        Args:
            path: Of a file that isn't there yet.

        Raises:
            StoreError: it is there, or can't be written, or beside it lies what is left of another
                file of that name; what was begun is removed.
        """
        target = opening.check_path(path)
        self._database.ensure_open()
        try:
            descriptor = os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"{target}: {error.strerror}") from error
        os.close(descriptor)
        try:
            for end in ("-wal", "-journal", "-shm"):
                if os.path.lexists(target + end):
                    raise StoreError(
                        f"{target + end}: it is left of another file, and SQLite would carry it "
                        "over into this one; remove it first"
                    )
            self._database.backup(target)
        except BaseException:
            os.unlink(target)
            raise

    # -- closing, sharing

    def close(self) -> None:
        """Close the store and end every wait with `ClosedError`; idempotent.

        Leases stay as they are: what is not settled comes back when they are over.
        """
        self._database.close()
        self._renewals.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        database = self.__dict__.get("_database")
        if database is not None and not database.closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __reduce__(self) -> tuple[Callable[[Options], "Store"], tuple[Options]]:
        return Store, (self._database.options,)

    def __repr__(self) -> str:
        state = "closed " if self._database.closed else ""
        return f"<{state}sqlspace.Store {self.path!r}>"

    # -- what several verbs share

    def _wait_and_take(
        self,
        keys: list[str],
        timeout: float | None,
        context: Context | None,
        *,
        looked: bool = False,
    ) -> Grab:
        return taking.wait_and_grab(
            self._database,
            lambda waiter: Grab(self._database, keys, waiter),
            keys,
            timeout,
            context,
            looked=looked,
        )

    def _deliver(self, grant: Grant) -> Delivery:
        return Delivery(self, self._renewals, grant)


def open(
    path: str | os.PathLike[str],
    *,
    sync: bool | Literal["group"] = True,
    history: int | None = 10_000,
    embed: bool = False,
    mode: int = 0o600,
    busy_timeout: float = 30.0,
    allow_network: bool = False,
    vfs: str | None = None,
) -> Store:
    """Open the store in the file at `path`, creating it if it isn't there.

    Args:
        path: Of the file; resolved once, so a later chdir changes nothing.
        sync: True: what a verb has done is on the disk when it returns (`PRAGMA synchronous=FULL`).
            "group": the same promise, with fsyncs that processes share, for several that write at
            once. What a verb returns is on the disk; but others can see an entry (`peek`, `len`,
            `wait`) a moment before it is. Who takes one has it on the disk first, and its taking.
            False (`NORMAL`): a crash of the process loses nothing, a power cut may lose the newest
            entries, the file never corrupts. Threads share their commits in any case.
        history: How many tombstones of taken entries the file keeps, over all keys: 0 none, None
            all. Of several stores that have the file open, the smallest number counts.
        embed: Whether the file may be another application's database. It is switched to WAL and
            gets our tables, all named `sqlspace_…`; nothing else of it is touched.
        mode: The permissions of a new file, -wal, -shm and -reserve included.
        busy_timeout: Seconds until a verb gives up on a write lock that others hold.
        allow_network: Whether the file may lie on a network file system, where several machines
            that have it open would corrupt it.
        vfs: The name of an apsw VFS to open through. Without a real -wal beside the path there is
            no doorbell, turnstile or "group": waiting polls, SQLite's lock isn't fair, and each
            commit has its fsync.

    Raises:
        StoreError: and by kind: CorruptError, damaged or no database; SchemaError, another
            application's, tampered with, or a newer sqlspace's; BusyError. The file was not changed
            by one byte.
    """
    return Store(
        opening.options(
            path,
            sync=sync,
            history=history,
            embed=embed,
            mode=mode,
            busy_timeout=busy_timeout,
            allow_network=allow_network,
            vfs=vfs,
            create=True,
        )
    )


def open_existing(
    path: str | os.PathLike[str], *, history: int | None, busy_timeout: float, allow_network: bool
) -> Store:
    """As `open`, for a command line that looks: StoreError if there is no store, and none made."""
    return Store(
        opening.options(
            path,
            sync=True,
            history=history,
            embed=False,
            mode=0o600,
            busy_timeout=busy_timeout,
            allow_network=allow_network,
            vfs=None,
            create=False,
        )
    )


def checked_keys(key_or_keys: object, argument: str = "key_or_keys") -> list[str]:
    """One key, or several."""
    if isinstance(key_or_keys, str):
        return [check_key(key_or_keys, argument)]
    return check_keys(key_or_keys, argument)


def checked_limit(limit: object) -> int:
    """Of entries at once."""
    return min(check_int(limit, "limit", 1), 1 << 62)


def checked_lease(keys: list[str], lease: object, max_attempts: object, ordered: object) -> Lease:
    """What a claim wants."""
    micros = check_lease_micros(lease)
    flag = check_flag(ordered, "ordered")
    if max_attempts is None:
        return Lease(micros, None, flag)
    attempts = min(check_int(max_attempts, "max_attempts", 1), rules.NO_SEQ)
    for key in keys:
        if rules.dead_key(key) is None:
            raise ValueError(
                f"max_attempts needs a key of at most {rules.LONGEST_WITH_DEAD:,} bytes, since "
                f"its dead letters stand under KEY/dead: {key[:20]!a}…"
            )
    return Lease(micros, attempts, flag)
