"""What keeps a file small and its seqs unique: erasing, pruning, compacting.

The row with the highest seq is never deleted, only laid bare: SQLite gives the next row the number
behind it, so a seq is never used twice. AUTOINCREMENT would do the same for a fifth of a push's
time, and a table of its own.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from .connection import Connection, change_each
from .database import Database
from .errors import FullError
from .records import Compaction

__all__ = ["compact", "entomb", "erase", "erase_key", "prune"]

log = logging.getLogger("sqlspace")

DELETE_KEY = """
DELETE FROM sqlspace_entries WHERE seq IN (
  SELECT seq FROM sqlspace_entries INDEXED BY sqlspace_entries_live WHERE key = ? AND state < 3)
   AND seq < (SELECT max(seq) FROM sqlspace_entries)
"""
DELETE_ONE = """
DELETE FROM sqlspace_entries
 WHERE seq = ? AND key = ? AND state < 3 AND seq < (SELECT max(seq) FROM sqlspace_entries)
"""
SELECT_TOP = """
SELECT seq, CAST(key AS BLOB), state >= 3 FROM sqlspace_entries ORDER BY seq DESC LIMIT 1
"""
# What stays of the row with the highest seq.
BARE = """
UPDATE sqlspace_entries
   SET key = '', state = 7, payload = NULL, headers = NULL, due_at = NULL, delay = NULL,
       expires_at = NULL, deadline = NULL, lease = NULL, token = NULL, attempts = 0,
       max_attempts = NULL, dedupe = NULL, taken_at = NULL, taken_no = 0
 WHERE seq = ?
"""
# Any entry becomes a tombstone.
ENTOMB = """
UPDATE sqlspace_entries
   SET state = ?, payload = NULL, headers = NULL, due_at = NULL, delay = NULL, deadline = NULL,
       lease = NULL, taken_at = ?, taken_no = ? + ?
 WHERE seq = ? AND state < 3
"""
SELECT_LAST_TAKEN = """
SELECT ifnull(max(taken_no), 0) FROM sqlspace_entries INDEXED BY sqlspace_entries_taken
 WHERE taken_no IS NOT NULL
"""
# A bare row below the highest is needed no more. Here and below, what somebody else's SQL gave a
# number of a taking is no tombstone for that.
DELETE_BARE = """
DELETE FROM sqlspace_entries
 WHERE seq IN (SELECT seq FROM sqlspace_entries INDEXED BY sqlspace_entries_taken
                WHERE taken_no = 0 AND taken_no IS NOT NULL)
   AND seq < (SELECT max(seq) FROM sqlspace_entries) AND state >= 3
"""
DELETE_TAKEN = """
DELETE FROM sqlspace_entries WHERE seq IN (
  SELECT seq FROM sqlspace_entries INDEXED BY sqlspace_entries_taken
   WHERE taken_no <= ?1 AND taken_no IS NOT NULL
     AND seq < (SELECT max(seq) FROM sqlspace_entries)
   ORDER BY taken_no LIMIT ?2) AND state >= 3
"""

# One seq in so many prunes when it is taken. In between, so many tombstones beyond the history, or
# a few more, stand in the file, unseen by every verb.
PRUNE_EVERY = 64
# No prune deletes more, so that no single pull stalls; it catches up fourfold.
PRUNE_ROWS = 256
COMPACT_ROWS = 1000


def entomb(connection: Connection, seqs: Sequence[int], now: int, state: int = 3) -> None:
    """Turn entries into tombstones, in this order."""
    last: Any = connection.execute(SELECT_LAST_TAKEN).get
    rows = [(state, now, last, number, seq) for number, seq in enumerate(seqs, 1)]
    change_each(connection, ENTOMB, rows)


def erase_key(connection: Connection, key: str) -> None:
    """Delete the live entries of `key`, in the caller's transaction; they leave no tombstone."""
    connection.execute(DELETE_KEY, (key,))
    top: list[Any] = connection.execute(SELECT_TOP).fetchall()
    if top and top[0][1] == key.encode() and not top[0][2]:
        connection.execute(BARE, (top[0][0],))
    connection.execute(DELETE_BARE)


def erase(connection: Connection, key: str, seq: int) -> bool:
    """Delete one entry, if it is live; whether it was. It leaves no tombstone."""
    connection.execute(DELETE_ONE, (seq, key))
    if connection.changes():
        return True
    top: list[Any] = connection.execute(SELECT_TOP).fetchall()
    if not top or top[0][:2] != (seq, key.encode()) or top[0][2]:
        return False
    connection.execute(BARE, (seq,))
    connection.execute(DELETE_BARE)
    return True


def prune(connection: Connection, keep: int | None, rows: int = PRUNE_ROWS) -> None:
    """Delete tombstones beyond the history.

    Args:
        connection: For writing.
        keep: How many tombstones stay; None: all.
        rows: Delete so many at most.
    """
    if keep is not None:
        last: Any = connection.execute(SELECT_LAST_TAKEN).get
        connection.execute(DELETE_TAKEN, (max(last - keep, -1), rows))


def compact(database: Database) -> Compaction:
    """Delete all tombstones, a few at a time; VACUUM; cut the -wal."""
    before = sum(database.sizes())
    deleted = COMPACT_ROWS

    def some(connection: Connection) -> Iterable[str]:
        nonlocal deleted
        connection.execute(DELETE_TAKEN, (1 << 62, COMPACT_ROWS))
        deleted = connection.changes()
        return ()

    def top(connection: Connection) -> Iterable[str]:
        found: list[Any] = connection.execute(SELECT_TOP).fetchall()
        if found and found[0][2]:
            connection.execute(BARE, (found[0][0],))
        return ()

    while deleted == COMPACT_ROWS:
        database.transact(some)
    database.transact(top)
    try:
        database.vacuum()
    except FullError as error:
        log.warning("%s; the file keeps its size, its free pages are used again", error)
    database.checkpoint()
    return Compaction(before, sum(database.sizes()))
