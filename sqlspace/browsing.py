"""Looking into a store: counts, entries, history, stats. Nothing here writes, but for `settle`.

All of it runs on the connection for browsing, and what is handed out lazily is read in batches: a
read transaction that stays open would keep the -wal from being used again.

What the clock says counts, whether or not it has been carried out (see `ageing`). Only of the dead
letters that must come into being the seq isn't known yet, so whoever looks at dead letters has them
moved first.
"""

import contextlib
import functools
import heapq
import itertools
import json
import logging
import operator
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from . import clock, dead_letters, entries, rules, upkeep
from .arguments import nameable
from .connection import Connection, disagreement
from .database import Database
from .doorbell import limit_of, room_token, turn_token, waited_key
from .errors import BusyError, CorruptError, FullError
from .records import Entry, KeyStats, Stats, Tombstone
from .rules import DEAD, HELD, LAST, LAST_LEASE, LEASED, LIVE, UNEXPIRED

__all__ = [
    "count",
    "entry",
    "first",
    "has_live",
    "has_ready",
    "head",
    "history",
    "keys",
    "live",
    "seconds_ahead",
    "stands_ready",
    "stats",
    "stirring",
]

log = logging.getLogger("sqlspace")

SELECT_READY = f"""
SELECT EXISTS (SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_live
                WHERE key = ?2 AND state = 0 AND state < 3 AND {UNEXPIRED})
    OR EXISTS (SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_until
                WHERE key = ?2 AND until_at <= ?1 AND state < 3 AND {UNEXPIRED} AND NOT {LAST})
    OR EXISTS (SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_since
                WHERE key = ?2 AND since_at > ?1 AND state < 3 AND {UNEXPIRED} AND NOT {LAST})
"""
# Whether some entry of ?2 is dead and only not moved yet.
SELECT_DEAD = f"""
SELECT EXISTS (SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_last
                WHERE deadline <= ?1 AND {LAST_LEASE}
                  AND key = ?2 AND {rules.DIED_FIRST})
    OR EXISTS (SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_last_since
                WHERE since_at > ?1 AND {LAST_LEASE}
                  AND key = ?2 AND {rules.DIED_FIRST})
"""
SELECT_LIVE = f"""
SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE key = ?2 AND state < 3 AND {LIVE} LIMIT 1
"""
# The first of what stands ready, of what has come due, and of what a clock that has jumped back
# would hold.
_NONE = rules.NO_SEQ
SELECT_FIRST = f"""
SELECT nullif(min(
  ifnull((SELECT seq FROM sqlspace_entries INDEXED BY sqlspace_entries_live
           WHERE key = ?2 AND state = 0 AND state < 3 AND {UNEXPIRED} ORDER BY seq LIMIT 1),
         {_NONE}),
  ifnull((SELECT min(seq) FROM sqlspace_entries INDEXED BY sqlspace_entries_until
           WHERE key = ?2 AND until_at <= ?1 AND state < 3 AND {UNEXPIRED} AND NOT {LAST}),
         {_NONE}),
  ifnull((SELECT min(seq) FROM sqlspace_entries INDEXED BY sqlspace_entries_since
           WHERE key = ?2 AND since_at > ?1 AND state < 3 AND {UNEXPIRED} AND NOT {LAST}),
         {_NONE})), {_NONE})
"""
SELECT_HEAD = f"""
SELECT seq, CAST(ifnull(payload, x'') AS BLOB) FROM sqlspace_entries WHERE seq = ({SELECT_FIRST})
"""
# The headers as a blob: what somebody else's SQL made of no valid UTF-8 can't be a str.
SELECT_ENTRY = f"""
SELECT seq, key, CAST(ifnull(payload, x'') AS BLOB), CAST(headers AS BLOB),
       CASE WHEN {LEASED} THEN 2 WHEN due_at IS NOT NULL AND {HELD} THEN 1 ELSE 0 END,
       pushed_at, CASE WHEN {HELD} THEN due_at END, expires_at, CASE WHEN {HELD} THEN deadline END,
       attempts
  FROM sqlspace_entries
 WHERE seq = ?2 AND key = ?3 AND state < 3 AND {LIVE}
"""
SELECT_SEQS = """
SELECT seq FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE key = ? AND state = ? AND state < 3 AND seq > ? ORDER BY seq LIMIT ?
"""
# The keys are read as blobs: one that somebody else's SQL made of no valid UTF-8 can't be a str.
SELECT_NEXT_KEY = """
SELECT CAST(min(key) AS BLOB) FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE key > CAST(? AS TEXT) AND state < 3
"""
SELECT_STATS = f"""
SELECT CAST(key AS BLOB), count(*), count(CASE WHEN {LEASED} THEN 1 END),
       count(CASE WHEN due_at IS NOT NULL AND {HELD} THEN 1 END),
       min(pushed_at), sum(length(payload))
  FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE state < 3 AND {LIVE} GROUP BY key
"""
SELECT_HISTORY = """
SELECT taken_no, seq, key, pushed_at, ifnull(taken_at, 0), state
  FROM sqlspace_entries INDEXED BY sqlspace_entries_taken
 WHERE taken_no > ? AND taken_no IS NOT NULL AND state BETWEEN 3 AND 6 AND key = ?
 ORDER BY taken_no LIMIT ?
"""
COUNT_HISTORY = """
SELECT count(*) FROM sqlspace_entries INDEXED BY sqlspace_entries_taken
 WHERE taken_no > ? AND taken_no IS NOT NULL
"""
# When the clock next changes something: for a key, for dead letters, for those that wait for room.
SELECT_NEXT_DUE = """
SELECT min(until_at) FROM sqlspace_entries INDEXED BY sqlspace_entries_until
 WHERE key = ?2 AND until_at > ?1 AND state < 3
"""
# The latter two have no index by key. Not every death or expiry of other keys is worth a look, so
# the next few are passed over, and if there are more it is the last of these.
_PASSED_OVER = 256
SELECT_NEXT_DEATH = f"""
SELECT ifnull(min(CASE WHEN key = ?2 THEN deadline END),
              CASE WHEN count(*) = {_PASSED_OVER} THEN max(deadline) END)
  FROM (SELECT key, deadline FROM sqlspace_entries INDEXED BY sqlspace_entries_last
         WHERE deadline > ?1 AND {LAST_LEASE} ORDER BY deadline LIMIT {_PASSED_OVER})
"""
SELECT_NEXT_EXPIRY = f"""
SELECT ifnull(min(CASE WHEN key = ?2 THEN expires_at END),
              CASE WHEN count(*) = {_PASSED_OVER} THEN max(expires_at) END)
  FROM (SELECT key, expires_at FROM sqlspace_entries INDEXED BY sqlspace_entries_expiring
         WHERE expires_at > ?1 AND expires_at IS NOT NULL AND state < 3
         ORDER BY expires_at LIMIT {_PASSED_OVER})
"""

_BATCH_ROWS = 256
_BATCH_BYTES = 1 << 20

_STATES: tuple[Literal["ready", "delayed", "leased"], ...] = ("ready", "delayed", "leased")
_OUTCOMES: dict[int, Literal["taken", "acked", "expired", "dead"]] = {
    3: "taken",
    4: "acked",
    5: "expired",
    6: "dead",
}


def stands_ready(connection: Connection, key: str, now: int | None = None) -> bool:
    """Whether an entry of `key` can be taken now, or at that time."""
    if now is None:
        now = clock.now()
    ready: Any = connection.execute(SELECT_READY, (now, key)).get
    if not ready and key.endswith(DEAD):
        ready = connection.execute(SELECT_DEAD, (now, key.removesuffix(DEAD))).get
    return bool(ready)


def has_ready(database: Database, key: str) -> bool:
    """The same, looked up while others write."""
    return bool(database.browse(lambda connection: stands_ready(connection, key)))


def has_live(database: Database, key: str) -> bool:
    """Whether `key` holds any live entry."""
    settle(database, key)
    return bool(database.browse(lambda connection: _holds_any(connection, key, clock.now())))


def head(database: Database, key: str) -> tuple[int, bytes] | None:
    """The seq and the payload of the head."""
    settle(database, key)
    found: tuple[int, bytes] | None = database.browse(lambda connection: first(connection, key))
    return found


def first(connection: Connection, key: str) -> tuple[int, bytes] | None:
    """The same, on any connection."""
    rows: list[Any] = connection.execute(SELECT_HEAD, (clock.now(), key)).fetchall()
    return rows[0] if rows else None


def stirring(
    database: Database, tokens: Iterable[str], timed: bool
) -> tuple[list[str], float | None] | None:
    """For the doorbell: what is worth waking somebody for.

    Args:
        database: Where to look.
        tokens: What is waited for.
        timed: Look, even if nobody has committed anything since the last look.

    Returns:
        Those tokens that have something, and in how many seconds the clock will next change
        something for one of them; None if there was no reason to look.
    """
    if not database.changed() and not timed:
        return None

    def step(connection: Connection) -> tuple[list[str], float | None]:
        now = clock.now()  # one for both, so that nothing comes due in between
        found = [token for token in tokens if _is_met(connection, token, now)]
        return found, _ahead(connection, tokens, now)

    result: tuple[list[str], float | None] = database.browse(step)
    return result


def seconds_ahead(database: Database, tokens: Iterable[str], since: int) -> float | None:
    """In how many seconds the clock next changes something for one of these tokens.

    Args:
        database: Where to look.
        tokens: What is waited for.
        since: When it was last looked for; what has changed since is 0 or less seconds ahead.
    """
    with _of_right_types(database):
        ahead: float | None = database.browse(lambda connection: _ahead(connection, tokens, since))
    return ahead


def _is_met(connection: Connection, token: str, now: int) -> bool:
    """Whether there is what a token of the doorbell stands for."""
    key = waited_key(token)
    if token == room_token(key):
        return not _holds_any(connection, key, now)
    if (limit := limit_of(token)) is not None:
        return entries.count(connection, key, now) < limit
    if token == turn_token(key):
        seq: Any = connection.execute(SELECT_FIRST, (now, key)).get
        if seq is not None:
            return not entries.blocked(connection, key, seq, now)
    return stands_ready(connection, key, now)


def _holds_any(connection: Connection, key: str, now: int) -> bool:
    return bool(connection.execute(SELECT_LIVE, (now, key)).fetchall())


def _ahead(connection: Connection, tokens: Iterable[str], since: int) -> float | None:
    times: list[Any] = []
    for token in tokens:
        key = waited_key(token)
        times.append(connection.execute(SELECT_NEXT_DUE, (since, key)).get)
        if key.endswith(DEAD):
            origin = key.removesuffix(DEAD)
            times.append(connection.execute(SELECT_NEXT_DEATH, (since, origin)).get)
        if token != key:  # for it to go
            times.append(connection.execute(SELECT_NEXT_EXPIRY, (since, key)).get)
    ahead = min((at for at in times if at is not None), default=None)
    return None if ahead is None else (ahead - clock.now()) / 1e6


def settle(database: Database, key: str = DEAD) -> None:
    """Have the dead moved to where they belong, before somebody looks at dead letters.

    Args:
        database: Where.
        key: Under which somebody looks.
    """
    if not key.endswith(DEAD):
        return
    while database.browse(lambda connection: dead_letters.has_died(connection, clock.now())):
        try:
            database.transact(lambda connection: dead_letters.bury(connection, clock.now()))
        except (BusyError, FullError) as error:
            log.warning("%s: dead letters could not be moved: %s", database.options.path, error)
            return


def count(database: Database, key: str) -> int:
    """How many live entries."""
    settle(database, key)
    found: int = database.browse(lambda connection: entries.count(connection, key, clock.now()))
    return found


def entry(database: Database, key: str, seq: int) -> Entry | None:
    """One live entry."""
    settle(database, key)
    rows = database.read(SELECT_ENTRY, (clock.now(), seq, key))
    return _entry(rows[0], database) if rows else None


def live(database: Database, key: str) -> Iterator[Entry]:
    """The live entries of `key`, by seq."""
    settle(database, key)
    last = 0
    while True:
        batch, last = database.browse(functools.partial(_some, key=key, last=last))
        for row in batch:
            yield _entry(row, database)
        if not last:
            return


def keys(database: Database) -> list[str]:
    """The keys with live entries, sorted; those that no caller could name are left out."""
    settle(database)

    def step(connection: Connection) -> list[str]:
        found: list[str] = []
        last: Any = b""
        while (following := connection.execute(SELECT_NEXT_KEY, (last,)).get) is not None:
            if following <= last:  # as SQLite has it, what is no TEXT stands behind all that is
                raise disagreement()
            last = following
            key = nameable(last)
            if key is not None and _holds_any(connection, key, clock.now()):
                found.append(key)
        return found

    return sorted(database.browse(step))


def history(database: Database, key: str) -> Iterator[Tombstone]:
    """The tombstones of `key`, oldest first."""
    last = _forgotten(database)
    while True:
        batch = database.read(SELECT_HISTORY, (last, key, _BATCH_ROWS))
        for _, seq, name, pushed_at, taken_at, state in batch:
            with _of_right_types(database):
                times = pushed_at / 1e6, taken_at / 1e6
            yield Tombstone(seq, name, *times, _OUTCOMES[state])
        if len(batch) < _BATCH_ROWS:
            return
        last = batch[-1][0]


def stats(database: Database) -> Stats:
    """All that can be counted."""
    settle(database)
    now = clock.now()

    def step(connection: Connection) -> tuple[list[Any], int, int]:
        return (
            connection.execute(SELECT_STATS, (now,)).fetchall(),
            connection.pragma("freelist_count"),
            connection.pragma("page_size"),
        )

    rows, free_pages, page_bytes = database.browse(step)
    with _of_right_types(database):
        found = {
            str(row[0], "utf-8", "backslashreplace"): (*row[1:4], operator.index(row[4]), row[5])
            for row in rows
        }
    for dead in [key for key in found if key.endswith(DEAD)]:
        found.setdefault(dead.removesuffix(DEAD), (0, 0, 0, now, 0))
    file_bytes, wal_bytes = database.sizes()
    return Stats(
        keys={
            key: KeyStats(
                ready=number - leased - delayed,
                leased=leased,
                delayed=delayed,
                dead=found.get(key + DEAD, (0,))[0],
                oldest_age=max(0.0, (now - pushed_at) / 1e6),
                bytes=size or 0,
            )
            for key, (number, leased, delayed, pushed_at, size) in sorted(found.items())
            if key
        },
        file_bytes=file_bytes,
        wal_bytes=wal_bytes,
        free_pages=free_pages,
        page_bytes=page_bytes,
        tombstones=int(database.read(COUNT_HISTORY, (_forgotten(database),))[0][0]),
    )


def _forgotten(database: Database) -> int:
    """The last taking that is beyond the history; pruning may not have got to it yet."""
    keep = database.history()
    if keep is None:
        return 0
    return max(0, int(database.read(upkeep.SELECT_LAST_TAKEN)[0][0]) - keep)


def _some(connection: Connection, key: str, last: int) -> tuple[list[Any], int]:
    """The next entries, bounded in number and in bytes, and the last seq read; 0: no more.

    By state, so that the tombstones of the key are not walked through; and all of it in one state
    of the file, or an entry that is leased or given back meanwhile would be read twice, or never.
    """
    with connection:
        batch, last = _some_inside(connection, key, last)
    return batch, last


def _some_inside(connection: Connection, key: str, last: int) -> tuple[list[Any], int]:
    seqs: list[Iterator[int]] = []
    for state in (0, 1, 2):
        rows: list[Any] = connection.execute(
            SELECT_SEQS, (key, state, last, _BATCH_ROWS)
        ).fetchall()
        seqs.append(seq for (seq,) in rows)
    batch: list[Any] = []
    size = number = 0
    now = clock.now()
    for seq in itertools.islice(heapq.merge(*seqs), _BATCH_ROWS):
        found: list[Any] = connection.execute(SELECT_ENTRY, (now, seq, key)).fetchall()
        last = seq
        number += 1
        for row in found:  # none, if it has expired
            batch.append(row)
            size += len(row[2])
        if size >= _BATCH_BYTES:
            return batch, last
    return batch, last if number == _BATCH_ROWS else 0


@contextlib.contextmanager
def _of_right_types(database: Database) -> Iterator[None]:
    """What STRICT doesn't let into a table can only be damage."""
    try:
        yield
    except (TypeError, ValueError) as error:
        path = database.options.path
        raise CorruptError(f"{path}: a row holds values of wrong types: {error}") from error


def _headers(text: bytes | None) -> dict[str, str]:
    """Those of an entry; ValueError if somebody else's SQL made them what they shouldn't be."""
    if text is None:
        return {}
    try:
        found = json.loads(text.decode())
    except RecursionError:
        raise ValueError("too deeply nested") from None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("something else")
    return found


def _entry(row: Any, database: Database) -> Entry:
    seq, key, payload, headers, state, pushed_at, due_at, expires_at, deadline, attempts = row
    try:
        named = _headers(headers)
    except ValueError as error:
        raise CorruptError(
            f"{database.options.path}: the headers of entry {seq} of {key!a} aren't a JSON object "
            "of strings; it stays where it is"
        ) from error
    with _of_right_types(database):
        return Entry(
            seq=seq,
            key=key,
            payload=payload,
            headers=named,
            state=_STATES[state],
            pushed_at=pushed_at / 1e6,
            due_at=None if due_at is None else due_at / 1e6,
            expires_at=None if expires_at is None else expires_at / 1e6,
            deadline=None if deadline is None else deadline / 1e6,
            attempts=operator.index(attempts),
        )
