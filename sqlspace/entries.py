"""The life of an entry, in SQL: pushed, held, taken, settled, expired, dead, requeued.

Every function here works on a connection, inside whatever transaction its caller has; none waits,
none locks, none commits. Those after which somebody may wake return the doorbell's tokens.

A row of `sqlspace_entries` is an entry while its state is below 3, and a tombstone afterwards; its
place is its seq, for ever. What an entry is follows from its row and the clock, never from who
looks (`migrations/0002_clock.sql` says how), so ?1 is now in every statement that asks. What the
clock has decided is carried out by `catch_up` for the key that somebody needs, and by `expire` and
`bury` for all keys; at most `BATCH_ROWS` at a time, so that no single call stalls.

Invariants: due_at and deadline are NULL in a row of state 0 and in tombstones, and never both set;
a token stands in a row that is leased, or was when it was acked.
"""

import heapq
import json
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from . import upkeep
from .arguments import KEY_BYTES, check_key, nameable
from .connection import Connection, run
from .doorbell import room_token

__all__ = [
    "BATCH_ROWS",
    "DEAD",
    "GRACE_MICROS",
    "NO_SEQ",
    "Grant",
    "Head",
    "Lease",
    "ack",
    "blocked",
    "bury",
    "bury_unreadable",
    "catch_up",
    "clear",
    "count",
    "dead_key",
    "due",
    "expire",
    "extend",
    "find_dedupe",
    "has_expired",
    "heads",
    "lease",
    "lease_all",
    "look",
    "nack",
    "put",
    "put_back",
    "readable_headers",
    "remove",
    "requeue",
    "take",
    "take_all",
    "unack",
    "unlease",
]

log = logging.getLogger("sqlspace")

DEAD = "/dead"
BATCH_ROWS = 1000  # changed in one step
BURY_ROWS = 200  # moved in one step; each costs several statements
LONGEST_WITH_DEAD = KEY_BYTES - len(DEAD)
NO_SEQ = (1 << 62) + 1  # beyond those that a row can have
GRACE_MICROS = 60_000_000  # by so much more than twice its length may an end lie ahead

# -- what a row is, by the clock

UNEXPIRED = "(expires_at IS NULL OR expires_at > ?1 AND lives_since <= ?1)"
HELD = "(until_at > ?1 AND since_at <= ?1)"
OVER = "(until_at <= ?1 OR since_at > ?1)"
LEASED = f"(deadline IS NOT NULL AND {HELD})"
LAST = "(deadline IS NOT NULL AND max_attempts IS NOT NULL AND attempts >= max_attempts)"
LAST_LEASE = "deadline IS NOT NULL AND attempts >= max_attempts AND state < 3"  # as the index says
DIED_FIRST = f"({UNEXPIRED} OR expires_at > deadline)"
LIVE = f"({LEASED} OR {UNEXPIRED} AND NOT {LAST})"

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

# What was held is not any more.
FREED = """
(EXISTS (SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_until
          WHERE key = ?2 AND until_at <= ?1 AND state < 3)
 OR EXISTS (SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_since
             WHERE key = ?2 AND since_at > ?1 AND state < 3))
"""
# The same, or what stands at the head has expired.
DUE = f"""
({FREED}
 OR ifnull((SELECT NOT {UNEXPIRED} FROM sqlspace_entries INDEXED BY sqlspace_entries_live
             WHERE key = ?2 AND state = 0 AND state < 3 ORDER BY seq LIMIT 1), 0))
"""
# What stands first, and whether it has expired; then a row of nothing, if something was freed. One
# look, for each takes SQLite's lock: a pull of an empty key needed two, and 11 µs instead of 7.
SELECT_HEAD = f"""
SELECT seq, key, ifnull(payload, x''), CAST(headers AS BLOB), pushed_at, expires_at, attempts,
       max_attempts, NOT {UNEXPIRED}
  FROM sqlspace_entries WHERE seq = (
    SELECT seq FROM sqlspace_entries INDEXED BY sqlspace_entries_live
     WHERE key = ?2 AND state = 0 AND state < 3 ORDER BY seq LIMIT 1)
UNION ALL SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 1 WHERE {FREED}
"""
SELECT_HEADS = f"""
SELECT seq, key, ifnull(payload, x''), CAST(headers AS BLOB), pushed_at, expires_at, attempts,
       max_attempts
  FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE key = ?2 AND state = 0 AND state < 3 AND {UNEXPIRED} ORDER BY seq LIMIT ?3
"""
SELECT_DUE = f"SELECT {DUE}"
# The last leases of all keys that are over.
SELECT_LAST_OVER = f"""
SELECT EXISTS (SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_last
                WHERE deadline <= ?1 AND {LAST_LEASE})
    OR EXISTS (SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_last_since
                WHERE since_at > ?1 AND {LAST_LEASE})
"""
SELECT_BLOCKED = f"""
SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE key = ?2 AND state = 2 AND state < 3 AND seq < ?3 AND {HELD}
   AND (deadline IS NOT NULL OR {UNEXPIRED}) LIMIT 1
"""

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
 WHERE seq = ?2
"""
# Any entry becomes a tombstone.
ENTOMB = """
UPDATE sqlspace_entries
   SET state = ?, payload = NULL, headers = NULL, due_at = NULL, delay = NULL, deadline = NULL,
       lease = NULL, taken_at = ?, taken_no = ?
 WHERE seq = ?
"""
# The tombstone may have been pruned since.
PUT_BACK = """
INSERT INTO sqlspace_entries
  (seq, key, payload, headers, pushed_at, expires_at, attempts, max_attempts)
VALUES (?, ?, ?, CAST(? AS TEXT), ?, ?, ?, ?)
ON CONFLICT (seq) DO UPDATE SET state = 0, payload = excluded.payload, headers = excluded.headers,
                                taken_at = NULL, taken_no = NULL
 WHERE state = 3
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
ON CONFLICT (seq) DO UPDATE SET state = 2, payload = excluded.payload, headers = excluded.headers,
                                deadline = excluded.deadline, lease = excluded.lease,
                                taken_at = NULL, taken_no = NULL
 WHERE state = 4 AND token = excluded.token
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

# -- carrying out what the clock has decided

SELECT_OVER = f"""
SELECT seq, deadline IS NOT NULL FROM sqlspace_entries INDEXED BY sqlspace_entries_until
 WHERE key = ?2 AND until_at <= ?1 AND state < 3 AND NOT {LAST} LIMIT ?3
"""
SELECT_STUCK = f"""
SELECT seq, deadline IS NOT NULL FROM sqlspace_entries INDEXED BY sqlspace_entries_since
 WHERE key = ?2 AND since_at > ?1 AND state < 3 AND NOT {LAST} LIMIT ?3
"""
# The first in the order of the queue; whether they are over, and leased.
SELECT_FIRST_HELD = f"""
SELECT seq, deadline IS NOT NULL, {OVER} AND NOT {LAST}
  FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE key = ?2 AND state = ?4 AND state < 3 ORDER BY seq LIMIT ?3
"""
RELEASE = """
UPDATE sqlspace_entries
   SET state = 0, due_at = NULL, delay = NULL, deadline = NULL, lease = NULL, token = NULL
 WHERE seq = ?
"""
SELECT_EXPIRED = f"""
SELECT seq, CAST(key AS BLOB) FROM sqlspace_entries INDEXED BY sqlspace_entries_expiring
 WHERE expires_at <= ?1 AND expires_at IS NOT NULL AND state < 3
   AND (deadline IS NULL OR {OVER} AND NOT ({LAST} AND expires_at > deadline))
 ORDER BY expires_at LIMIT ?2
"""
SELECT_EXPIRED_STUCK = f"""
SELECT seq, CAST(key AS BLOB) FROM sqlspace_entries INDEXED BY sqlspace_entries_lives
 WHERE lives_since > ?1 AND lives_since IS NOT NULL AND state < 3
   AND (deadline IS NULL OR {OVER} AND NOT ({LAST} AND expires_at > deadline))
 LIMIT ?2
"""
SELECT_LAST = f"""
SELECT seq, CAST(key AS BLOB), {DIED_FIRST}
  FROM sqlspace_entries INDEXED BY sqlspace_entries_last
 WHERE deadline <= ?1 AND {LAST_LEASE}
 ORDER BY deadline LIMIT ?2
"""
# Those of one key, if others have died before and are not moved yet.
SELECT_LAST_OF_KEY = f"""
SELECT seq, CAST(key AS BLOB), {DIED_FIRST}
  FROM sqlspace_entries INDEXED BY sqlspace_entries_last
 WHERE deadline <= ?1 AND {LAST_LEASE} AND key = ?3
 ORDER BY deadline LIMIT ?2
"""
SELECT_LAST_STUCK = f"""
SELECT seq, CAST(key AS BLOB), {DIED_FIRST}
  FROM sqlspace_entries INDEXED BY sqlspace_entries_last_since
 WHERE since_at > ?1 AND {LAST_LEASE} LIMIT ?2
"""
SELECT_EXPIRED_HEADS = f"""
SELECT seq, NOT {UNEXPIRED} FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE key = ?2 AND state = 0 AND state < 3 ORDER BY seq LIMIT ?3
"""
SELECT_ANY_EXPIRED = """
SELECT EXISTS (SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_expiring
                WHERE expires_at <= ?1 AND expires_at IS NOT NULL AND state < 3)
    OR EXISTS (SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_lives
                WHERE lives_since > ?1 AND lives_since IS NOT NULL AND state < 3)
"""
# Ready, whether or not that has been carried out.
SELECT_IS_READY = f"""
SELECT 1 FROM sqlspace_entries
 WHERE seq = ?2 AND state < 3 AND {UNEXPIRED} AND (until_at IS NULL OR {OVER} AND NOT {LAST})
"""
SELECT_DYING = """
SELECT CAST(key AS BLOB), CAST(headers AS BLOB), pushed_at, attempts
  FROM sqlspace_entries WHERE seq = ?
"""
INSERT_MOVED = """
INSERT INTO sqlspace_entries (key, payload, headers, pushed_at)
SELECT ?1, payload, ?2, ?3 FROM sqlspace_entries WHERE seq = ?4
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

# The headers of a dead letter that tell where it comes from.
ORIGIN_KEY, ORIGIN_SEQ = "sqlspace-key", "sqlspace-seq"
ORIGIN_PUSHED_AT, ORIGIN_ATTEMPTS = "sqlspace-pushed-at", "sqlspace-attempts"
ORIGIN_REASON = "sqlspace-reason"
ORIGIN_HEADERS = "sqlspace-headers"  # those that it had, if they were no JSON object of strings
_ORIGIN = {
    *(ORIGIN_KEY, ORIGIN_SEQ, ORIGIN_PUSHED_AT, ORIGIN_ATTEMPTS, ORIGIN_REASON, ORIGIN_HEADERS)
}


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
        _carry_out(connection, seq, now, died=died)
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
    tokens = catch_up(connection, key, now, everything=True)
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
        return None, key.endswith(DEAD) and bool(connection.execute(SELECT_LAST_OVER, (now,)).get)
    if rows[-1][8]:
        return None, True
    return Head(*rows[0][:8]), False


def heads(connection: Connection, key: str, now: int, limit: int) -> list[Head]:
    """The first entries of `key` that stand ready in the file."""
    rows: Any = connection.execute(SELECT_HEADS, (now, key, limit))
    return [Head(*row) for row in rows]


def due(connection: Connection, key: str, now: int) -> bool:
    """Whether there is something for `catch_up` to do."""
    found: Any = connection.execute(SELECT_DUE, (now, key)).get
    if not found and key.endswith(DEAD):
        found = connection.execute(SELECT_LAST_OVER, (now,)).get
    return bool(found)


def blocked(connection: Connection, key: str, seq: int, now: int) -> bool:
    """Whether an earlier entry of `key` is leased, or waits out a nack's delay."""
    return bool(connection.execute(SELECT_BLOCKED, (now, key, seq)).fetchall())


# -- taking and leasing: one C call from the commit to the note of it in `done`


def take(done: list[Any], connection: Connection, head: Head, now: int) -> None:
    """Turn it into a tombstone, if it is the head; `connection.changes()` tells."""
    run(done, connection, TAKE, (now, head.key, head.seq))


def put_back(back: list[Any], connection: Connection, head: Head) -> None:
    """Restore what `take` has taken."""
    run(back, connection, PUT_BACK, head)


def take_all(connection: Connection, seqs: Sequence[int], now: int, state: int = 3) -> None:
    """Turn entries into tombstones, in this order."""
    last: Any = connection.execute(upkeep.SELECT_LAST_TAKEN).get
    rows = [(state, now, last + number, seq) for number, seq in enumerate(seqs, 1)]
    connection.executemany(ENTOMB, rows)


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
    connection.executemany(
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
        take_all(connection, [seq], now, state=5)
        return [room_token(key)]
    if last:
        return _bury_one(connection, seq, now, "attempts")
    connection.execute(NACK, (now, delay, seq))
    return [key]


def extend(connection: Connection, seq: int, token: bytes, now: int, micros: int) -> bool:
    """Have a lease end so much later than now; whether it still held."""
    connection.execute(EXTEND, (now, seq, token, micros))
    return bool(connection.changes())


# -- carrying out what the clock has decided


def catch_up(
    connection: Connection,
    key: str,
    now: int,
    limit: int = BATCH_ROWS,
    *,
    everything: bool = False,
) -> list[str]:
    """Carry out, for `key`, what has come due: it stands ready again, or it is dead.

    Args:
        connection: For writing.
        key: Whose entries.
        now: The time.
        limit: Release no more than so many.
        everything: Rather all, however many.

    Returns:
        Tokens.
    """
    tokens = bury(connection, now, key.removesuffix(DEAD) if key.endswith(DEAD) else None)
    tokens += _expire_heads(connection, key, now)
    if _release(connection, key, now, limit):
        tokens.append(key)
    if everything:
        while due(connection, key, now):
            tokens += catch_up(connection, key, now)
        while expired := expire(connection, now):
            tokens += expired
    return tokens


def _release(connection: Connection, key: str, now: int, limit: int) -> int:
    """Have what has come due stand ready, the first in the queue first; how many."""
    over = _all_over(connection, key, now, limit + 1)
    if len(over) > limit:
        over = _first_over(connection, key, now, limit)
    connection.executemany(RELEASE, [(seq,) for seq in over])
    if lapsed := sum(over.values()):
        log.warning("%d leases under %a ran out; their entries are ready again", lapsed, key)
    return len(over)


def _all_over(connection: Connection, key: str, now: int, limit: int) -> dict[int, int]:
    """What has come due, by either clock, and whether it was leased; `limit` of each at most."""
    rows: list[Any] = []
    for sql in (SELECT_OVER, SELECT_STUCK):
        rows += connection.execute(sql, (now, key, limit)).fetchall()
    return dict(rows)


def _first_over(connection: Connection, key: str, now: int, limit: int) -> dict[int, int]:
    """Of what has come due, the `limit` lowest seqs.

    Mostly they are the first of all that is held. If others are held among those, all that is due
    is looked at, since no index has it in the order of its seqs.
    """
    found: dict[int, int] = {}
    known = NO_SEQ  # up to which all that is held was seen
    for state in (1, 2):
        rows: list[Any] = connection.execute(SELECT_FIRST_HELD, (now, key, limit, state)).fetchall()
        found.update({seq: leased for seq, leased, over in rows if over})
        if len(rows) == limit:
            known = min(known, rows[-1][0])
    first = sorted(seq for seq in found if seq <= known)[:limit]
    if len(first) < limit:
        found = _all_over(connection, key, now, NO_SEQ)
        first = heapq.nsmallest(limit, found)
    return {seq: found[seq] for seq in first}


def has_expired(connection: Connection, now: int) -> bool:
    """Whether there may be something for `expire` to do."""
    return bool(connection.execute(SELECT_ANY_EXPIRED, (now,)).get)


def expire(connection: Connection, now: int) -> list[str]:
    """Turn what has expired, under whatever key, into tombstones; tokens."""
    rows: list[Any] = connection.execute(SELECT_EXPIRED, (now, BATCH_ROWS)).fetchall()
    rows += connection.execute(SELECT_EXPIRED_STUCK, (now, BATCH_ROWS)).fetchall()
    if not rows:
        return []
    seqs = dict.fromkeys(row[0] for row in rows)  # a row may be found twice
    take_all(connection, list(seqs), now, state=5)
    return _rooms(row[1] for row in rows)


def _expire_heads(connection: Connection, key: str, now: int) -> list[str]:
    """The same for those that a look at the head of `key` would walk past."""
    rows: Any = connection.execute(SELECT_EXPIRED_HEADS, (now, key, BATCH_ROWS)).fetchall()
    seqs = [seq for seq, expired in rows if expired]
    if not seqs:
        return []
    take_all(connection, seqs, now, state=5)
    return [room_token(key)]


def bury(connection: Connection, now: int, origin: str | None = None) -> list[str]:
    """Move what died with its last lease to the dead letters, under whatever key; tokens.

    Args:
        connection: For writing.
        now: The time.
        origin: The key whose dead letters are needed: its own go first.
    """
    rows: list[Any] = connection.execute(SELECT_LAST, (now, BURY_ROWS)).fetchall()
    if origin is not None and len(rows) == BURY_ROWS:
        rows = connection.execute(SELECT_LAST_OF_KEY, (now, BURY_ROWS, origin)).fetchall() or rows
    rows += connection.execute(SELECT_LAST_STUCK, (now, BURY_ROWS)).fetchall()
    tokens: list[str] = []
    for seq, died in {row[0]: row[2] for row in rows}.items():
        tokens += _carry_out(connection, seq, now, died=died)
    return [*tokens, *_rooms(row[1] for row in rows)]


def _carry_out(connection: Connection, seq: int, now: int, *, died: bool) -> list[str]:
    """Make a tombstone of what is gone by the clock: dead, or expired; tokens."""
    if died:
        return _bury_one(connection, seq, now, "attempts")
    take_all(connection, [seq], now, state=5)
    return []


def _rooms(keys: Iterable[bytes]) -> list[str]:
    """The tokens of those that can be named; nobody can wait for the others."""
    named = map(nameable, set(keys))
    return [room_token(key) for key in named if key is not None]


def bury_unreadable(connection: Connection, head: Head, now: int) -> list[str]:
    """Move an entry to the dead letters because of what it holds, if it is still there; tokens."""
    if not connection.execute(SELECT_IS_READY, (now, head.seq)).fetchall():
        return []
    return _bury_one(connection, head.seq, now, "unreadable")


def dead_key(key: str) -> str | None:
    """Where the dead letters of `key` stand; None if it is too long to have any."""
    return key + DEAD if len(key.encode()) <= LONGEST_WITH_DEAD else None


def _bury_one(connection: Connection, seq: int, now: int, reason: str) -> list[str]:
    rows: list[Any] = connection.execute(SELECT_DYING, (seq,)).fetchall()
    blob, headers, pushed_at, attempts = rows[0]
    key = nameable(blob)
    target = None if key is None else dead_key(key)
    if key is None or target is None:  # somebody's SQL asked for that; nothing is lost
        connection.execute(NACK, (now, 0, seq))
        return [] if key is None else [key]
    origin = {
        ORIGIN_KEY: key,
        ORIGIN_SEQ: str(seq),
        ORIGIN_PUSHED_AT: f"{pushed_at / 1e6:.6f}",
        ORIGIN_ATTEMPTS: str(attempts),
        ORIGIN_REASON: reason,
    }
    text = _json({**readable_headers(headers), **origin})
    connection.execute(INSERT_MOVED, (target, text, now, seq))
    take_all(connection, [seq], now, state=6)
    log.warning(
        "entry %d of %a is dead after %d attempts (%s): it is under %a now",
        *(seq, key, attempts, reason, target),
    )
    return [target, room_token(key)]


def requeue(connection: Connection, key: str, now: int, limit: int) -> tuple[int, list[str]]:
    """Move ready dead letters of `key` back to where they came from; how many, and tokens."""
    source = dead_key(key)
    if source is None:
        return 0, []
    tokens = catch_up(connection, source, now)
    found = heads(connection, source, now, limit)
    for head in found:
        headers = readable_headers(head.headers)
        target = _origin(headers) or key
        if target == source:
            target = key
        kept = {name: text for name, text in headers.items() if name not in _ORIGIN}
        text = _json(kept) if kept else None
        connection.execute(INSERT_MOVED, (target, text, now, head.seq))
        tokens.append(target)
    take_all(connection, [head.seq for head in found], now)
    return len(found), [*dict.fromkeys(tokens), room_token(source)]


def _origin(headers: dict[str, str]) -> str | None:
    """The key that a dead letter comes from, if the headers name one that a caller could name."""
    try:
        return check_key(headers[ORIGIN_KEY])
    except (KeyError, ValueError):
        return None


def readable_headers(headers: bytes | None) -> dict[str, str]:
    """Those of an entry, whatever somebody else's SQL made of them."""
    if headers is None:
        return {}
    text = headers.decode(errors="backslashreplace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
        return found
    return {ORIGIN_HEADERS: text}


def _json(headers: dict[str, str]) -> str:
    """As JSON that is valid UTF-8: what somebody else's SQL escaped may be no character."""
    text = json.dumps(headers, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace").decode()


# -- erasing


def clear(connection: Connection, key: str, now: int) -> tuple[int, list[str]]:
    """Delete all live entries of `key`; how many, and tokens."""
    tokens = catch_up(connection, key, now, everything=True)
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
