"""What the clock has decided, carried out: what was held stands ready, what expired is a tombstone.

Nobody needs this to see what an entry is. A verb that takes catches up with the key that it needs,
and sweeps the expired of all keys now and then; at most `BATCH_ROWS` at a time, so that no single
call stalls.
"""

import heapq
import logging
from typing import Any

from . import clock, dead_letters, upkeep
from .connection import Connection, change_each, disagreement
from .dead_letters import RELEASE
from .doorbell import room_token
from .rules import DEAD, LAST, NO_SEQ, OVER, UNEXPIRED

__all__ = ["BATCH_ROWS", "FREED", "catch_up", "expire", "has_expired", "is_behind", "tidy"]

log = logging.getLogger("sqlspace")

BATCH_ROWS = 1000  # changed in one step

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
SELECT_DUE = f"SELECT {DUE}"
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


def is_behind(connection: Connection, key: str, now: int) -> bool:
    """Whether there is something for `catch_up` to do."""
    found: Any = connection.execute(SELECT_DUE, (now, key)).get
    if not found and key.endswith(DEAD):
        found = dead_letters.has_died(connection, now)
    return bool(found)


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
    tokens = dead_letters.bury(
        connection, now, key.removesuffix(DEAD) if key.endswith(DEAD) else None
    )
    tokens += _expire_heads(connection, key, now)
    if _release(connection, key, now, limit):
        tokens.append(key)
    if everything:
        while is_behind(connection, key, now):
            before = connection.total_changes()
            tokens += catch_up(connection, key, now)
            if connection.total_changes() == before:
                raise disagreement()
        while expired := expire(connection, now):
            tokens += expired
    return tokens


def _release(connection: Connection, key: str, now: int, limit: int) -> int:
    """Have what has come due stand ready, the first in the queue first; how many."""
    over = _all_over(connection, key, now, limit + 1)
    if len(over) > limit:
        over = _first_over(connection, key, now, limit)
    change_each(connection, RELEASE, [(seq,) for seq in over])
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


def tidy(connection: Connection, keep: int | None) -> list[str]:
    """Now and then: keep the history short, and clear away what has expired; tokens.

    Args:
        connection: For writing.
        keep: How many tombstones the history keeps; None: all.
    """
    upkeep.prune(connection, keep)
    return expire(connection, clock.now())


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
    upkeep.entomb(connection, list(seqs), now, state=5)
    return dead_letters.rooms(row[1] for row in rows)


def _expire_heads(connection: Connection, key: str, now: int) -> list[str]:
    """The same for those that a look at the head of `key` would walk past."""
    rows: Any = connection.execute(SELECT_EXPIRED_HEADS, (now, key, BATCH_ROWS)).fetchall()
    seqs = [seq for seq, expired in rows if expired]
    if not seqs:
        return []
    upkeep.entomb(connection, seqs, now, state=5)
    return [room_token(key)]
