"""Store: the verbs of the durable queue, each with its SQL beside it.

A row of `sqlspace_entries` is an entry while its state is below 3, and a tombstone afterwards; its
place is its seq, for ever. A pull reads the head first and then turns just that row into a
tombstone if it still is the head: the payload is in hand before it is gone from the file, nothing
is handed out before the commit, and an empty queue costs no write.

What a verb has committed when an interrupt reaches it, it takes back: a call that raises did
nothing.
"""

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import apsw

from . import browsing, upkeep
from .arguments import (
    check_headers,
    check_int,
    check_key,
    check_keys,
    check_payload,
    check_size,
    check_timeout,
    kind,
)
from .connection import Connection, Options, run
from .database import Database
from .doorbell import Doorbell, room_token
from .errors import SpaceError, StoreError
from .records import Compaction, Entry, Stats, Tombstone
from .space import Context
from .waiting import Waiter, surely, wait

__all__ = ["Store", "open", "open_existing"]

log = logging.getLogger("sqlspace")

INSERT = """
INSERT INTO sqlspace_entries (key, payload, headers, pushed_at) VALUES (?, ?, ?, ?)
"""
SELECT_HEADS = """
SELECT seq, key, ifnull(payload, x''), CAST(headers AS BLOB), pushed_at
  FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE key = ? AND state = 0 AND state < 3 ORDER BY seq LIMIT ?
"""
# RETURNING would show the row as it is afterwards, so the payload was read before; if the head has
# changed since, this takes nothing.
TAKE = """
UPDATE sqlspace_entries
   SET state = 3, payload = NULL, headers = NULL, taken_at = ?1,
       taken_no = (SELECT ifnull(max(taken_no), 0) + 1
                     FROM sqlspace_entries INDEXED BY sqlspace_entries_taken
                    WHERE taken_no IS NOT NULL)
 WHERE seq = ?2
   AND seq = (SELECT seq FROM sqlspace_entries INDEXED BY sqlspace_entries_live
               WHERE key = ?3 AND state = 0 AND state < 3 ORDER BY seq LIMIT 1)
"""
TAKE_ONE_OF_MANY = """
UPDATE sqlspace_entries
   SET state = 3, payload = NULL, headers = NULL, taken_at = ?, taken_no = ?
 WHERE seq = ?
"""
# The tombstone may have been pruned since.
PUT_BACK = """
INSERT INTO sqlspace_entries (seq, key, payload, headers, pushed_at)
VALUES (?, ?, ?, CAST(? AS TEXT), ?)
ON CONFLICT (seq) DO UPDATE SET state = 0, payload = excluded.payload, headers = excluded.headers,
                                taken_at = NULL, taken_no = NULL
 WHERE state = 3
"""
DELETE_EARLIER = """
DELETE FROM sqlspace_entries WHERE seq IN (
  SELECT seq FROM sqlspace_entries INDEXED BY sqlspace_entries_live
   WHERE key = ?1 AND state < 3) AND seq < ?2
"""

_NO_SEQ = (1 << 62) + 1  # beyond those that a row can have
_LONGEST_BUSY_SECONDS = 1_000_000.0  # SQLite counts them in milliseconds, as an int


Head = tuple[int, str, bytes, bytes | None, int]
"""An entry as it was read before it was taken: seq, key, payload, headers, pushed_at."""


class Store:
    """A durable store-and-forward queue in one SQLite file; made by `sqlspace.open`.

    Any number of threads may use one Store, and any number of processes may open the same file.
    A Store that was open when the process forked opens anew in the child; one that is pickled opens
    where it is unpickled.

    Attributes:
        path: Of the file, absolute and resolved.
        sync: As given to `open`.
    """

    def __init__(self, options: Options) -> None:
        self.path = options.path
        self.sync = options.sync
        self._database = Database(options, browsing.stirring)

    # -- pushing

    def push(self, key: str, payload: bytes, *, headers: dict[str, str] | None = None) -> int:
        """Add an entry behind all others of `key`.

        When this returns the entry is committed, with sync=True on the disk: a power cut leaves it
        there, once, in its place.

        Args:
            key: 1 to 1,024 bytes in UTF-8, no NUL.
            payload: Bytes-like; copied. At most 1,000,000,000 bytes less the rest of its row.
            headers: Kept with the entry, and readable without its payload.

        Returns:
            The entry's seq: it grows over the whole file and is never used twice.

        Raises:
            ClosedError, StoreError: the entry was not added, unless it is an UndecidedError.
        """
        key, payload = check_key(key), check_payload(payload)
        text = None if headers is None else check_headers(headers)
        check_size(key, payload, text)
        done: list[Any] = []
        seq = 0

        def step(connection: Connection) -> Iterable[str]:
            nonlocal seq
            run(done, connection, INSERT, (key, payload, text, _now()))
            seq = connection.last_insert_rowid()
            return (key,)

        def undo(connection: Connection) -> None:
            if done:
                upkeep.erase(connection, key, seq or connection.last_insert_rowid())
                done.clear()

        self._database.write(step, undo=undo)
        return seq

    def push_many(self, key: str, payloads: Iterable[bytes]) -> list[int]:
        """Add one entry for each payload, in one transaction: all of them, or none.

        Args:
            key: As in `push`.
            payloads: Bytes-likes, as in `push`; all are checked before the first is added.

        Returns:
            Their seqs, in the order of the payloads.

        Raises:
            ClosedError, StoreError: as `push`.
        """
        key = check_key(key)
        if isinstance(payloads, bytes | bytearray | memoryview | str):
            raise TypeError(f"payloads must be an iterable of bytes-like, not {kind(payloads)}")
        try:
            iterator = iter(payloads)
        except TypeError:
            raise TypeError(
                f"payloads must be an iterable of bytes-like, not {kind(payloads)}"
            ) from None
        checked = []
        for index, payload in enumerate(iterator):
            argument = f"payloads[{index}]"
            checked.append(check_payload(payload, argument))
            check_size(key, checked[-1], None, argument)
        seqs: list[int] = []

        def step(connection: Connection) -> Iterable[str]:
            now = _now()
            connection.executemany(INSERT, ((key, payload, None, now) for payload in checked))
            # Nobody else writes in between, so they follow each other.
            last = connection.last_insert_rowid()
            seqs[:] = range(last - len(checked) + 1, last + 1)
            return (key,)

        def undo(connection: Connection) -> None:
            for seq in reversed(seqs):
                upkeep.erase(connection, key, seq)

        if checked:
            self._database.transact(step, undo=undo)
        else:
            self._database.ensure_open()
        return seqs

    def put(self, key: str, payload: bytes) -> int:
        """Make `payload` the one entry of `key`, in place of all that it held, in one transaction.

        What it replaces leaves no tombstone.

        Args:
            key: As in `push`.
            payload: As in `push`.

        Returns:
            The new entry's seq.

        Raises:
            ClosedError, StoreError: nothing changed, unless it is an UndecidedError.
        """
        key, payload = check_key(key), check_payload(payload)
        check_size(key, payload, None)
        seq = 0

        def step(connection: Connection) -> Iterable[str]:
            nonlocal seq
            connection.execute(INSERT, (key, payload, None, _now()))
            seq = connection.last_insert_rowid()
            connection.execute(DELETE_EARLIER, (key, seq))
            return key, room_token(key)

        self._database.transact(step)
        return seq

    # -- taking

    def pull(
        self, key: str, timeout: float | None = None, *, context: Context | None = None
    ) -> bytes:
        """Take the head of `key` and return its payload, waiting for one.

        At most once: the tombstone is committed before the payload is returned, so no crash brings
        it back; a process that is killed inside the call may have consumed its entry.

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
            taken = self._take(keys)
            if taken is not None:
                return taken[2]
        return self._wait_and_take(keys, timeout, context)[2]

    def pull_any(
        self, keys: Iterable[str], timeout: float | None = None, *, context: Context | None = None
    ) -> tuple[str, bytes]:
        """Take the head of the first listed key that has one ready, waiting; otherwise as `pull`.

        Returns:
            The key, and the payload taken from it.
        """
        taken = self._wait_and_take(check_keys(keys), timeout, context)
        return taken[1], taken[2]

    def pullp(self, key: str) -> bytes | None:
        """Take the head of `key`, or return None; never waits for one. Otherwise as `pull`."""
        taken = self._take([check_key(key)])
        return None if taken is None else taken[2]

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
        limit = min(check_int(limit, "limit", 1), 1 << 62)
        heads: list[Head] = []
        payloads: list[bytes] = []
        back: list[Any] = []  # one for each that was put back

        def step(connection: Connection) -> Iterable[str]:
            heads[:] = _select_heads(connection, key, limit)
            payloads[:] = [head[2] for head in heads]  # here, within reach of undo
            now = _now()
            last: Any = connection.execute(upkeep.SELECT_LAST_TAKEN).get
            connection.executemany(
                TAKE_ONE_OF_MANY,
                [(now, last + number, head[0]) for number, head in enumerate(heads, 1)],
            )
            upkeep.prune(connection, self._database.history(), len(heads) + upkeep.PRUNE_ROWS)
            return (room_token(key),)

        def undo(connection: Connection) -> None:
            for head in heads[len(back) :]:
                run(back, connection, PUT_BACK, head)

        def probe(connection: Connection) -> bool:
            return bool(connection.execute(browsing.SELECT_READY, (key,)).fetchall())

        self._database.transact(step, probe=probe, undo=undo)
        return payloads

    def remove(self, key: str, seq: int) -> bool:
        """Delete one live entry; it leaves no tombstone. Whether it was there.

        Args:
            key: Of the entry.
            seq: As `push` returned it.
        """
        key, seq = check_key(key), min(check_int(seq, "seq", 1), _NO_SEQ)
        removed = False

        def step(connection: Connection) -> Iterable[str]:
            nonlocal removed
            removed = upkeep.erase(connection, key, seq)
            return (room_token(key),) if removed else ()

        self._database.transact(step)
        return removed

    def clear(self, key: str) -> int:
        """Delete all live entries of `key`; they leave no tombstones. How many there were."""
        key = check_key(key)
        before: Any = 0

        def step(connection: Connection) -> Iterable[str]:
            nonlocal before
            before = connection.execute(browsing.COUNT, (key,)).get
            if before:
                upkeep.erase_key(connection, key)
            return (room_token(key),)

        self._database.transact(step)
        return int(before)

    # -- waiting without taking

    def wait(
        self, key: str, timeout: float | None = None, *, context: Context | None = None
    ) -> None:
        """Wait until `key` has an entry that can be taken; takes nothing. Raises as `pull`."""
        key = check_key(key)
        self._wait_until(key, lambda: browsing.has_ready(self._database, key), timeout, context)

    def wait_empty(
        self, key: str, timeout: float | None = None, *, context: Context | None = None
    ) -> None:
        """Wait until `key` holds no live entry. Raises as `pull`."""
        key = check_key(key)
        self._wait_until(
            room_token(key),
            lambda: not browsing.has_live(self._database, key),
            timeout,
            context,
        )

    # -- looking

    def peek(self, key: str) -> bytes | None:
        """The payload of the head of `key`, left where it is; None if there is none."""
        return browsing.head(self._database, check_key(key))

    def len(self, key: str) -> int:
        """How many live entries `key` holds: ready, delayed and leased."""
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
        key, seq = check_key(key), min(check_int(seq, "seq", 1), _NO_SEQ)
        return browsing.entry(self._database, key, seq)

    def entries(self, key: str) -> Iterator[Entry]:
        """All live entries of `key`, by seq, read in batches as the iterator advances."""
        key = check_key(key)
        self._database.ensure_open()
        return browsing.entries(self._database, key)

    def history(self, key: str) -> Iterator[Tombstone]:
        """What was taken from `key` and is still in the history, oldest taking first."""
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
            StoreError: it is there, or can't be written; what was begun is removed.
        """
        target = _check_path(path)
        self._database.ensure_open()
        try:
            descriptor = os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"{target}: {error.strerror}") from error
        os.close(descriptor)
        try:
            self._database.backup(target)
        except BaseException:
            os.unlink(target)
            raise

    # -- closing, sharing

    def close(self) -> None:
        """Close the store and end every wait with `ClosedError`; idempotent."""
        self._database.close()

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
            database.close()

    def __reduce__(self) -> tuple[Callable[[Options], "Store"], tuple[Options]]:
        return Store, (self._database.options,)

    def __repr__(self) -> str:
        state = "closed " if self._database.closed else ""
        return f"<{state}sqlspace.Store {self.path!r}>"

    # -- how a verb takes and waits

    def _take(self, keys: list[str], waiter: Waiter | None = None) -> Head | None:
        """Take the head of the first of `keys` that has one ready."""
        database = self._database
        heads: list[Head] = []
        done: list[Any] = []  # not empty once TAKE has run
        back: list[Any] = []  # and once PUT_BACK has: run twice, it would double what others took
        taken = False

        def probe(connection: Connection) -> bool:
            for key in keys:
                heads[:] = _select_heads(connection, key, 1)
                if heads:
                    return True
            return False

        def step(connection: Connection) -> Iterable[str]:
            nonlocal taken
            while not taken:
                seq, key, *_ = heads[0]
                run(done, connection, TAKE, (_now(), seq, key))
                taken = bool(connection.changes())
                if not taken:  # others were faster
                    done.clear()
                    if not probe(connection):
                        return ()
            if seq % upkeep.PRUNE_EVERY == 0:
                try:
                    upkeep.prune(connection, database.history())
                except apsw.Error:  # the entry is taken; the next prune does it
                    log.warning("%s: pruning the history failed", self.path, exc_info=True)
            if (
                waiter is not None
                and database.bell.awaited(key, waiter)
                and connection.execute(browsing.SELECT_READY, (key,)).fetchall()
            ):
                # One ring wakes one taker: there is more, so this one wakes the next.
                return room_token(key), key
            return (room_token(key),)

        def undo(connection: Connection) -> None:
            if not back and (taken or (done and connection.changes())):
                run(back, connection, PUT_BACK, heads[0])

        database.write(step, probe=probe, undo=undo, besides=waiter)
        return heads[0] if taken else None

    def _put_back(self, head: Head, back: list[Any] | None = None) -> None:
        """Restore an entry that was taken by a call that raises.

        Args:
            head: The entry.
            back: Not empty once that is done; for those who may have to say it again.
        """
        back = [] if back is None else back

        def step(connection: Connection) -> Iterable[str]:
            if not back:
                run(back, connection, PUT_BACK, head)
            return (head[1],)

        try:
            surely(lambda: self._database.write(step))
        except SpaceError:
            log.exception("%s: entry %d could not be put back", self.path, head[0])

    def _wait_and_take(
        self, keys: list[str], timeout: float | None, context: Context | None
    ) -> Head:
        def look(waiter: Waiter, enrolled: bool) -> None:
            taken = self._take(keys, waiter if enrolled else None)
            if taken is not None:
                waiter.found = taken

        back: list[Any] = []

        def restore(waiter: Waiter) -> None:
            self._put_back(waiter.found, back)

        found: Head = self._wait(look, keys, timeout, context, restore)
        return found

    def _wait_until(
        self, token: str, met: Callable[[], bool], timeout: float | None, context: Context | None
    ) -> None:
        def look(waiter: Waiter, _: bool) -> None:
            if met():
                waiter.found = None

        self._wait(look, [token], timeout, context, None)

    def _wait(
        self,
        look: Callable[[Waiter, bool], None],
        tokens: list[str],
        timeout: float | None,
        context: Context | None,
        restore: Callable[[Waiter], None] | None,
    ) -> Any:
        """Wait at the doorbell; who can restore is one that takes."""
        bell: Doorbell | None = None

        def park(waiter: Waiter, seconds: float) -> None:
            self._database.bell.park(waiter, seconds)

        def look_enrolled(waiter: Waiter, enroll: bool) -> None:
            nonlocal bell
            if enroll and bell is None:
                bell = self._database.bell
                bell.enroll(waiter, tokens, takes=restore is not None)
            look(waiter, enroll)

        def leave(waiter: Waiter) -> None:
            if bell is None:
                return
            bell.dismiss(waiter, tokens)
            if waiter.park(0):  # rung once more, in vain: that ring is another's
                for token in tokens:
                    bell.ring(token)

        return wait(
            look_enrolled,
            leave=leave,
            restore=restore or (lambda _: None),
            ensure_open=self._database.ensure_open,
            timeout=timeout,
            context=context,
            park=park,
        )


def open(
    path: str | os.PathLike[str],
    *,
    sync: bool = True,
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
            False (`NORMAL`): a crash of the process loses nothing, a power cut may lose the newest
            entries, the file never corrupts.
        history: How many tombstones of taken entries the file keeps, over all keys: 0 none, None
            all. Of several stores that have the file open, the smallest number counts.
        embed: Whether the file may be another application's database. It is switched to WAL and
            gets our tables, all named `sqlspace_…`; nothing else of it is touched.
        mode: The permissions of a new file, -wal and -shm included.
        busy_timeout: Seconds until a verb gives up on a write lock that others hold.
        allow_network: Whether the file may lie on a network file system, where several machines
            that have it open would corrupt it.
        vfs: The name of an apsw VFS to open through. Without a real -wal beside the path there is
            neither doorbell nor turnstile: waiting polls, and SQLite's lock isn't fair.

    Raises:
        StoreError: and by kind: CorruptError, damaged or no database; SchemaError, another
            application's, tampered with, or a newer sqlspace's; BusyError. The file was not changed
            by one byte.
    """
    return Store(
        _options(
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
        _options(
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


def _options(
    path: object,
    *,
    sync: bool,
    history: int | None,
    embed: bool,
    mode: int,
    busy_timeout: float,
    allow_network: bool,
    vfs: str | None,
    create: bool,
) -> Options:
    """What the caller wants, checked."""
    if history is not None:
        history = min(check_int(history, "history", 0), 1 << 53)
    check_int(mode, "mode", 0)
    if mode > 0o777 or mode & 0o600 != 0o600:
        raise ValueError(f"mode must let the owner read and write, at most 0o777, not {mode:#o}")
    seconds = check_timeout(busy_timeout, "busy_timeout")
    if busy_timeout is None:
        raise TypeError("busy_timeout must be seconds as a number, not None")
    if vfs is not None:
        if not isinstance(vfs, str):
            raise TypeError(f"vfs must be str or None, not {kind(vfs)}")
        if vfs not in apsw.vfs_names():
            raise ValueError(f"vfs must name a VFS that is registered, not {vfs!a}")
    return Options(
        path=_check_path(path),
        sync=_check_bool(sync, "sync"),
        history=history,
        embed=_check_bool(embed, "embed"),
        mode=mode,
        busy_timeout=min(
            _LONGEST_BUSY_SECONDS if seconds is None else seconds, _LONGEST_BUSY_SECONDS
        ),
        allow_network=_check_bool(allow_network, "allow_network"),
        vfs=vfs,
        create=create,
    )


def _now() -> int:
    """Unix time in microseconds, as the file has it."""
    return time.time_ns() // 1000


def _select_heads(connection: Connection, key: str, limit: int) -> list[Head]:
    """The first entries of `key` that can be taken."""
    rows: list[Any] = connection.execute(SELECT_HEADS, (key, limit)).fetchall()
    return rows


def _check_bool(value: object, argument: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{argument} must be bool, not {kind(value)}")
    return value


def _check_path(path: object) -> str:
    """An absolute path, symbolic links resolved."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be str or os.PathLike, not {kind(path)}")
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"path must be a path of str, not of {kind(text)}")
    if text in ("", ":memory:"):
        raise ValueError(f"path must name a file, not {text!r}; in memory there is sqlspace.Local")
    if "\0" in text:
        raise ValueError(f"path must not hold a NUL character: {text!a}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"path holds a lone surrogate: {text!a}") from None
    try:
        return os.path.realpath(text)
    except OSError as error:
        raise StoreError(f"{text}: {error.strerror}") from error
