"""The life of an entry, in SQL: pushed, looked at, taken, leased, settled, requeued, erased.

Every function here, in `ageing` and in `dead_letters` works on a connection, inside whatever
transaction its caller has; none waits, none locks, none commits. Those after which somebody may
wake return the doorbell's tokens.

A row of `sqlspace_entries` is an entry while its state is below 3, and a tombstone afterwards; its
place is its seq, for ever. What an entry is follows from its row and the clock, never from who
looks (see `rules`).

Invariants: due_at and deadline are NULL in a row of state 0 and in tombstones, and never both set;
a token stands in a row that is leased, or was when it was acked.
"""

import os
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

from . import ageing, dead_letters, upkeep
from .ageing import FREED
from .connection import Connection, change_each, run
from .doorbell import room_token
from .rules import (
    DEAD,
    DIED_FIRST,
    GRACE_MICROS,
    HELD,
    LAST,
    LAST_LEASE,
    LEASED,
    LIVE,
    UNEXPIRED,
    dead_key,
)

__all__ = [
    "Grant",
    "Head",
    "Lease",
    "ack",
    "blocked",
    "clear",
    "count",
    "extend",
    "find_dedupe",
    "heads",
    "lease",
    "lease_all",
    "look",
    "nack",
    "put",
    "put_back",
    "remove",
    "requeue",
    "take",
    "unack",
    "unbarred",
    "unlease",
]

# -- adding

INSERT = """
INSERT INTO sqlspace_entries (key, payload, headers, pushed_at) VALUES (?, ?, ?, ?)
"""
INSERT_TIMED = """
INSERT INTO sqlspace_entries
  (key, payload, headers, pushed_at, state, due_at, delay, expires_at, dedupe)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
SELECT_DEDUPE = f"""
SELECT seq, taken_no, state < 3 AND NOT {LIVE}, {LAST} AND {DIED_FIRST}
  FROM sqlspace_entries WHERE key = ?2 AND dedupe = ?3 AND dedupe IS NOT NULL
"""
FORGET_DEDUPE = "UPDATE sqlspace_entries SET dedupe = NULL WHERE seq = ?"
FORGET_ALL_DEDUPES = """
UPDATE sqlspace_entries INDEXED BY sqlspace_entries_dedupe SET dedupe = NULL
 WHERE key = ? AND dedupe IS NOT NULL
"""
# In four parts that have nothing in common: what is gone, but has not been carried out.
COUNT = f"""
SELECT (SELECT count(*) FROM sqlspace_entries INDEXED BY sqlspace_entries_live
         WHERE key = ?2 AND state < 3)
     - (SELECT count(*) FROM sqlspace_entries INDEXED BY sqlspace_entries_expiring
         WHERE expires_at <= ?1 AND expires_at IS NOT NULL AND state < 3 AND key = ?2
           AND NOT {LEASED})
     - (SELECT count(*) FROM sqlspace_entries INDEXED BY sqlspace_entries_lives
         WHERE lives_since > ?1 AND lives_since IS NOT NULL AND state < 3 AND key = ?2
           AND expires_at > ?1 AND NOT {LEASED})
     - (SELECT count(*) FROM sqlspace_entries INDEXED BY sqlspace_entries_last
         WHERE deadline <= ?1 AND {LAST_LEASE} AND key = ?2
           AND {UNEXPIRED})
     - (SELECT count(*) FROM sqlspace_entries INDEXED BY sqlspace_entries_last_since
         WHERE since_at > ?1 AND {LAST_LEASE} AND key = ?2
           AND deadline > ?1 AND {UNEXPIRED})
"""
# Those dead letters of ?2's that have not been moved.
COUNT_DYING = f"""
SELECT (SELECT count(*) FROM sqlspace_entries INDEXED BY sqlspace_entries_last
         WHERE deadline <= ?1 AND {LAST_LEASE} AND key = ?2 AND {DIED_FIRST})
     + (SELECT count(*) FROM sqlspace_entries INDEXED BY sqlspace_entries_last_since
         WHERE since_at > ?1 AND {LAST_LEASE} AND key = ?2 AND deadline > ?1 AND {DIED_FIRST})
"""

# -- looking for the head

# What stands first, and whether it has expired; then a row of nothing, if something was freed. One
# look, for each takes SQLite's lock: a pull of an empty key needed two, and 11 µs instead of 7.
SELECT_HEAD = f"""
SELECT seq, key, CAST(ifnull(payload, x'') AS BLOB), CAST(headers AS BLOB), pushed_at, expires_at,
       ifnull(CAST(attempts AS INTEGER), 0), max_attempts, NOT {UNEXPIRED}
  FROM sqlspace_entries WHERE seq = (
    SELECT seq FROM sqlspace_entries INDEXED BY sqlspace_entries_live
     WHERE key = ?2 AND state = 0 AND state < 3 ORDER BY seq LIMIT 1)
UNION ALL SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 1 WHERE {FREED}
"""
SELECT_HEADS = f"""
SELECT seq, key, CAST(ifnull(payload, x'') AS BLOB), CAST(headers AS BLOB), pushed_at, expires_at,
       ifnull(CAST(attempts AS INTEGER), 0), max_attempts
  FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE key = ?2 AND state = 0 AND state < 3 AND {UNEXPIRED} ORDER BY seq LIMIT ?3
"""
BARRING = f"""
FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE key = ?2 AND state = 2 AND state < 3 AND seq < ?3 AND {HELD}
   AND (deadline IS NOT NULL OR {UNEXPIRED})
"""
SELECT_BLOCKED = f"SELECT 1 {BARRING} LIMIT 1"
SELECT_BARS = f"SELECT seq, token {BARRING} ORDER BY seq"

# -- taking and leasing

HEAD = f"""
(SELECT seq FROM sqlspace_entries INDEXED BY sqlspace_entries_live
  WHERE key = ?2 AND state = 0 AND state < 3 AND {UNEXPIRED} ORDER BY seq LIMIT 1)
"""
NEXT_TAKEN = """
(SELECT ifnull(max(taken_no), 0) + 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_taken
  WHERE taken_no IS NOT NULL)
"""
# RETURNING would show the row as it is afterwards, so the payload was read before; if the head has
# changed since, this takes nothing.
TAKE = f"""
UPDATE sqlspace_entries
   SET state = 3, payload = NULL, headers = NULL, taken_at = ?1, taken_no = {NEXT_TAKEN}
 WHERE seq = ?3 AND seq = {HEAD}
"""
# Attempts tell whether others have claimed it since, and given it back: then it was read too early.
LEASE = f"""
UPDATE sqlspace_entries
   SET state = 2, deadline = ?1 + ?4, lease = ?4, token = ?5, attempts = attempts + 1,
       max_attempts = ?6
 WHERE seq = ?3 AND seq = {HEAD} AND attempts = ?7
"""
LEASE_ONE_OF_MANY = """
UPDATE sqlspace_entries
   SET state = 2, deadline = ?1 + ?3, lease = ?3, token = ?4, attempts = attempts + 1,
       max_attempts = ?5
 WHERE seq = ?2 AND state = 0
"""
# The tombstone may have been pruned since, or, as the highest, laid bare.
PUT_BACK = """
INSERT INTO sqlspace_entries
  (seq, key, payload, headers, pushed_at, expires_at, attempts, max_attempts)
VALUES (?, ?, ?, CAST(? AS TEXT), ?, ?, ?, ?)
ON CONFLICT (seq) DO UPDATE SET state = 0, key = excluded.key, payload = excluded.payload,
                                headers = excluded.headers, expires_at = excluded.expires_at,
                                attempts = excluded.attempts, max_attempts = excluded.max_attempts,
                                taken_at = NULL, taken_no = NULL
 WHERE state IN (3, 7)
"""
UNLEASE = """
UPDATE sqlspace_entries
   SET state = 0, deadline = NULL, lease = NULL, token = NULL, attempts = ?1, max_attempts = ?2
 WHERE seq = ?3 AND token = ?4 AND state = 2
"""

# -- settling

ACK = f"""
UPDATE sqlspace_entries
   SET state = 4, payload = NULL, headers = NULL, deadline = NULL, lease = NULL, taken_at = ?1,
       taken_no = {NEXT_TAKEN}
 WHERE seq = ?2 AND token = ?3 AND state = 2 AND {LEASED}
"""
UNACK = """
INSERT INTO sqlspace_entries
  (seq, key, payload, headers, pushed_at, expires_at, attempts, max_attempts, state, deadline,
   lease, token)
VALUES (?, ?, ?, CAST(? AS TEXT), ?, ?, ?, ?, 2, ?, ?, ?)
ON CONFLICT (seq) DO UPDATE SET state = 2, key = excluded.key, payload = excluded.payload,
                                headers = excluded.headers, expires_at = excluded.expires_at,
                                attempts = excluded.attempts, max_attempts = excluded.max_attempts,
                                deadline = excluded.deadline, lease = excluded.lease,
                                token = excluded.token, taken_at = NULL, taken_no = NULL
 WHERE state = 7 OR state = 4 AND token = excluded.token
"""
SELECT_LEASED = f"""
SELECT key, {LAST}, {UNEXPIRED}
  FROM sqlspace_entries WHERE seq = ?2 AND token = ?3 AND state = 2 AND {LEASED}
"""
NACK = """
UPDATE sqlspace_entries
   SET state = CASE WHEN ?2 > 0 THEN 2 ELSE 0 END, deadline = NULL, lease = NULL, token = NULL,
       due_at = CASE WHEN ?2 > 0 THEN ?1 + ?2 END, delay = CASE WHEN ?2 > 0 THEN ?2 END
 WHERE seq = ?3
"""
EXTEND = f"""
UPDATE sqlspace_entries SET deadline = ?1 + ?4, lease = ?4
 WHERE seq = ?2 AND token = ?3 AND state = 2 AND {LEASED}
"""

# -- erasing

DELETE_EARLIER = """
DELETE FROM sqlspace_entries WHERE seq IN (
  SELECT seq FROM sqlspace_entries INDEXED BY sqlspace_entries_live
   WHERE key = ?1 AND state < 3) AND seq < ?2
"""
SELECT_IS_LIVE = (
    f"SELECT 1 FROM sqlspace_entries WHERE seq = ?2 AND key = ?3 AND state < 3 AND {LIVE}"
)


class Head(NamedTuple):
    """An entry as it was read before it was taken or leased."""

    seq: int
    key: str
    payload: bytes
    headers: bytes | None
    pushed_at: int
    expires_at: int | None
    attempts: int
    max_attempts: int | None


class Lease(NamedTuple):
    """What a claim wants."""

    micros: int
    max_attempts: int | None
    ordered: bool = False


class Grant(NamedTuple):
    """An entry as it was leased."""

    head: Head
    token: bytes
    micros: int
    deadline: int
    max_attempts: int | None

    @property
    def since(self) -> int:
        """When it was leased, in Unix microseconds."""
        return self.deadline - self.micros

    def is_over(self, now: int) -> bool:
        """What OVER says of its row, unless somebody has changed that since."""
        return self.deadline <= now or self.deadline - 2 * self.micros - GRACE_MICROS > now


# -- adding


def find_dedupe(
    connection: Connection, key: str, dedupe: str, keep: int | None, now: int
) -> int | None:
    """The seq of the entry that has this `dedupe` already, live or in the history; None: none.

    Args:
        connection: For writing: what the history has forgotten is forgotten here too.
        key: Of the push.
        dedupe: Of the push.
        keep: How many tombstones the history keeps; None: all.
        now: The time.
    """
    found: list[Any] = connection.execute(SELECT_DEDUPE, (now, key, dedupe)).fetchall()
    if not found:
        return None
    seq, taken_no, gone, died = found[0]
    if gone:
        dead_letters.carry_out(connection, seq, now, died=died)
    last: Any = connection.execute(upkeep.SELECT_LAST_TAKEN).get
    if gone:
        taken_no = last
    if taken_no is not None and keep is not None and taken_no <= last - keep:
        connection.execute(FORGET_DEDUPE, (seq,))
        return None
    return int(seq)


def count(connection: Connection, key: str, now: int) -> int:
    """How many live entries `key` holds; of dead letters also those that must still be moved."""
    found: Any = connection.execute(COUNT, (now, key)).get
    if key.endswith(DEAD):
        found += connection.execute(COUNT_DYING, (now, key.removesuffix(DEAD))).get
    return int(found)


def put(
    connection: Connection, key: str, payload: bytes, now: int, ttl: int | None
) -> tuple[int, list[str]]:
    """Make it the one entry of `key`; its seq, and tokens."""
    tokens = ageing.catch_up(connection, key, now, everything=True)
    expires_at = None if ttl is None else now + ttl
    connection.execute(INSERT_TIMED, (key, payload, None, now, 0, None, None, expires_at, None))
    seq = connection.last_insert_rowid()
    connection.execute(DELETE_EARLIER, (key, seq))
    connection.execute(FORGET_ALL_DEDUPES, (key,))
    return seq, [*tokens, key, room_token(key)]


# -- looking for the head


def look(connection: Connection, key: str, now: int) -> tuple[Head | None, bool]:
    """The head of `key`, and whether `catch_up` must come first; then it isn't told."""
    rows: list[Any] = connection.execute(SELECT_HEAD, (now, key)).fetchall()
    if not rows:
        return None, key.endswith(DEAD) and dead_letters.has_died(connection, now)
    if rows[-1][8]:
        return None, True
    return Head(*rows[0][:8]), False


def heads(connection: Connection, key: str, now: int, limit: int) -> list[Head]:
    """The first entries of `key` that stand ready in the file."""
    rows: list[Any] = connection.execute(SELECT_HEADS, (now, key, limit)).fetchall()
    return [Head(*row) for row in rows]


def blocked(connection: Connection, key: str, seq: int, now: int) -> bool:
    """Whether an earlier entry of `key` is leased, or waits out a nack's delay."""
    return bool(connection.execute(SELECT_BLOCKED, (now, key, seq)).fetchall())


def unbarred(
    connection: Connection, found: Sequence[Head], now: int, own: Container[bytes]
) -> Sequence[Head]:
    """Of heads of one key, those before which nothing is held but by leases of one's own."""
    if found:
        last = found[-1]
        for seq, token in connection.execute(SELECT_BARS, (now, last.key, last.seq)):
            if token not in own:
                return [head for head in found if head.seq < seq]
    return found


# -- taking and leasing: one C call from the commit to the note of it in `done`


def take(done: list[Any], connection: Connection, head: Head, now: int) -> None:
    """Turn it into a tombstone, if it is the head; `connection.changes()` tells."""
    run(done, connection, TAKE, (now, head.key, head.seq))


def put_back(back: list[Any], connection: Connection, head: Head) -> None:
    """Restore what `take` has taken."""
    run(back, connection, PUT_BACK, head)


def lease(done: list[Any], connection: Connection, grant: Grant) -> None:
    """Lease its head, if it still is one; `connection.changes()` tells."""
    head = grant.head
    row = (grant.since, head.key, head.seq, grant.micros, grant.token, grant.max_attempts)
    run(done, connection, LEASE, (*row, head.attempts))


def lease_all(
    connection: Connection, found: Sequence[Head], now: int, wanted: Lease
) -> list[Grant]:
    """Lease several entries."""
    deadline = now + wanted.micros
    grants = [
        Grant(head, os.urandom(16), wanted.micros, deadline, wanted.max_attempts) for head in found
    ]
    change_each(
        connection,
        LEASE_ONE_OF_MANY,
        [(now, grant.head.seq, grant.micros, grant.token, grant.max_attempts) for grant in grants],
    )
    return grants


def unlease(connection: Connection, grant: Grant) -> None:
    """Undo a lease, as if it had never been; nothing, if the row has another token by now."""
    head = grant.head
    connection.execute(UNLEASE, (head.attempts, head.max_attempts, head.seq, grant.token))


# -- settling


def ack(done: list[Any], connection: Connection, seq: int, token: bytes, now: int) -> None:
    """Turn a leased entry into a tombstone, if the lease still holds; `changes()` tells."""
    run(done, connection, ACK, (now, seq, token))


def unack(connection: Connection, grant: Grant) -> None:
    """Undo an ack."""
    head = grant.head
    row = (*head[:6], head.attempts + 1, grant.max_attempts)
    connection.execute(UNACK, (*row, grant.deadline, grant.micros, grant.token))


def nack(connection: Connection, seq: int, token: bytes, now: int, delay: int) -> list[str] | None:
    """Give a leased entry back, after a delay; dead if that was its last attempt.

    Returns:
        Tokens; None if the lease doesn't hold any more.
    """
    found: list[Any] = connection.execute(SELECT_LEASED, (now, seq, token)).fetchall()
    if not found:
        return None
    key, last, unexpired = found[0]
    if not unexpired:
        upkeep.entomb(connection, [seq], now, state=5)
        return [room_token(key)]
    if last:
        return dead_letters.bury_one(connection, seq, now, "attempts")
    connection.execute(NACK, (now, delay, seq))
    return [key]


def extend(connection: Connection, seq: int, token: bytes, now: int, micros: int) -> bool:
    """Have a lease end so much later than now; whether it still held."""
    connection.execute(EXTEND, (now, seq, token, micros))
    return bool(connection.changes())


# -- requeueing, erasing


def requeue(connection: Connection, key: str, now: int, limit: int) -> tuple[int, list[str]]:
    """Move ready dead letters of `key` back to where they came from; how many, and tokens."""
    source = dead_key(key)
    if source is None:
        return 0, []
    tokens = ageing.catch_up(connection, source, now)
    found = heads(connection, source, now, limit)
    for head in found:
        headers = dead_letters.readable_headers(head.headers)
        target = dead_letters.origin(headers) or key
        if target == source:
            target = key
        kept = dead_letters.stripped(headers)
        text = dead_letters.spelled(kept) if kept else None
        connection.execute(dead_letters.INSERT_MOVED, (target, text, now, head.seq))
        tokens.append(target)
    upkeep.entomb(connection, [head.seq for head in found], now)
    return len(found), [*dict.fromkeys(tokens), room_token(source)]


def clear(connection: Connection, key: str, now: int) -> tuple[int, list[str]]:
    """Delete all live entries of `key`; how many, and tokens."""
    tokens = ageing.catch_up(connection, key, now, everything=True)
    held = count(connection, key, now)
    if held:
        upkeep.erase_key(connection, key)
    connection.execute(FORGET_ALL_DEDUPES, (key,))
    return held, [*tokens, room_token(key)]


def remove(connection: Connection, key: str, seq: int, now: int) -> bool:
    """Delete one live entry; whether it was."""
    if not connection.execute(SELECT_IS_LIVE, (now, seq, key)).fetchall():
        return False
    return upkeep.erase(connection, key, seq)
